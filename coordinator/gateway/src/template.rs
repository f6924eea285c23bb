//! A model's chat template, rendered as Hugging Face renders it: Jinja with trimmed blocks, Python's string methods,
//! `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop controls. A template is data from a model
//! directory, so fuel bounds its time and output and it can reach nothing outside its arguments.
//!
//! Knows nothing of tokens: see `prompt.rs` for what keeps a user's text from becoming control tokens.

mod json;

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json};

/// Work one render may do: about one unit per instruction and per 64 bytes handled. A 4 MiB conversation passes a
/// template's filters a few times (under 1 M); this leaves a factor of ten.
const FUEL: u64 = 10_000_000;
/// Nested macro calls and blocks of a template. Templates in use stay under ten.
const RECURSION_MAX: usize = 100;
const NAME: &str = "chat";

/// Special tokens a template may name.
#[derive(Clone, Debug, Default)]
pub(crate) struct TemplateTokens(pub Vec<(String, String)>);

/// A compiled chat template.
#[derive(Clone)]
pub(crate) struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    tokens: TemplateTokens,
    source: Arc<str>,
}

/// What a template shows. All of it is the client's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    pub messages: Vec<Json>,
    /// Functions, in OpenAI's shape.
    pub tools: Vec<Json>,
    pub documents: Vec<Json>,
    /// More variables. None has the name of one that is set here ([`RESERVED`]).
    pub kwargs: Map<String, Json>,
    /// No answer follows: none is opened.
    pub closed: bool,
}

/// Variables that are not the client's to set.
pub(crate) const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Most bytes of a rendered conversation, per byte of it. A template repeats a tool or a message a few times at most; one that
/// does more is a bomb.
const GROWTH_MAX: usize = 16;
/// What a template may add by itself.
const OWN_BYTES_MAX: usize = 1 << 20;

/// Why a conversation could not be rendered.
#[derive(Debug)]
pub(crate) enum RenderError {
    /// The template itself refused the conversation (`raise_exception`): the client can change that.
    Refused(String),
    /// The template failed.
    Failed(String),
}

impl ChatTemplate {
    /// Compiles a template; the error says where it is wrong.
    pub fn new(source: &str, tokens: TemplateTokens) -> Result<Self, String> {
        // Training-only marks around the assistant's text; they print nothing.
        let source = [
            "{% generation %}",
            "{%- generation %}",
            "{%- generation -%}",
            "{% generation -%}",
        ]
        .iter()
        .chain(&[
            "{% endgeneration %}",
            "{%- endgeneration %}",
            "{%- endgeneration -%}",
            "{% endgeneration -%}",
        ])
        .fold(source.to_owned(), |source, tag| {
            // Kept as an empty comment, so that the tag's own whitespace control still works.
            let comment = tag.replace("% generation %", "##").replace("% endgeneration %", "##");
            let comment = comment.replace("{%", "{#").replace("%}", "#}");
            source.replace(tag, &comment)
        });
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, source.clone())
            .map_err(|error| error.to_string())?;
        Ok(Self {
            environment: Arc::new(environment),
            tokens,
            source: source.into(),
        })
    }

    /// True if the template's text names `word`: whether a field would be used at all.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Renders a conversation, ready for the assistant's answer unless it is closed.
    pub fn render(&self, conversation: &Conversation) -> Result<String, RenderError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| RenderError::Failed(error.to_string()))?;
        let list = |items: &[Json]| match items {
            [] => Value::from(()),
            items => items.iter().map(to_value).collect(),
        };
        let mut context: Vec<(String, Value)> = Vec::new();
        let tokens = self.tokens.0.iter();
        context.extend(tokens.map(|(name, text)| (name.clone(), Value::from(text.as_str()))));
        let kwargs = conversation.kwargs.iter();
        context.extend(kwargs.map(|(name, value)| (name.clone(), to_value(value))));
        context.extend([
            ("messages".into(), conversation.messages.iter().map(to_value).collect()),
            ("add_generation_prompt".into(), Value::from(!conversation.closed)),
            ("tools".into(), list(&conversation.tools)),
            ("documents".into(), list(&conversation.documents)),
        ]);
        let mut out = Bounded {
            text: Vec::new(),
            bytes_max: OWN_BYTES_MAX + GROWTH_MAX * conversation.bytes(),
        };
        let rendered = template.render_captured_to(Value::from_pairs(context), &mut out);
        match rendered {
            // Templates write strings alone.
            Ok(_) => String::from_utf8(out.text).map_err(|error| RenderError::Failed(error.to_string())),
            Err(error) => Err(match refusal(&error) {
                Some(reason) => RenderError::Refused(reason),
                None => RenderError::Failed(format!("{error:#}")),
            }),
        }
    }
}

impl Conversation {
    /// Bytes of all its strings, about.
    fn bytes(&self) -> usize {
        let all = self.messages.iter().chain(&self.tools).chain(&self.documents);
        let kwargs: usize = self
            .kwargs
            .iter()
            .map(|(name, value)| name.len() + json_bytes(value))
            .sum();
        all.map(json_bytes).sum::<usize>() + kwargs
    }
}

fn json_bytes(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(json_bytes).sum(),
        Json::Object(fields) => fields.iter().map(|(name, field)| name.len() + json_bytes(field)).sum(),
        _ => 8,
    }
}

/// Takes what a template writes, up to a limit.
struct Bounded {
    text: Vec<u8>,
    bytes_max: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.text.len() + bytes.len() > self.bytes_max {
            return Err(std::io::Error::other("the template writes too much"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The message of a `raise_exception`, however deep.
fn refusal(error: &Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return Some(raised.0.clone());
        }
        source = current.source();
    }
    None
}

#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "the template refused").with_source(Raised(message)))
}

/// The UTC date and time in `strftime`'s terms.
fn strftime_now(format: String) -> Result<String, Error> {
    let invalid = |error: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let items = time::format_description::parse_strftime_owned(&format).map_err(|error| invalid(error.to_string()))?;
    time::OffsetDateTime::now_utc()
        .format(&items)
        .map_err(|error| invalid(error.to_string()))
}

fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(integer), _, _) => Value::from(integer),
            (_, Some(integer), _) => Value::from(integer),
            (_, _, float) => Value::from(float.unwrap_or_default()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(name, field)| (name.clone(), to_value(field)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: Json) -> Result<String, RenderError> {
        let tokens = TemplateTokens(vec![
            ("bos_token".into(), "<s>".into()),
            ("eos_token".into(), "</s>".into()),
        ]);
        ChatTemplate::new(source, tokens).unwrap().render(&Conversation {
            messages: messages.as_array().unwrap().clone(),
            ..Conversation::default()
        })
    }

    #[test]
    fn renders_as_hugging_face_does() {
        // Trimmed blocks, Python methods, namespaces, slices, loop variables and controls, special tokens.
        let source = "{{ bos_token }}\n{% if messages[0]['role'] == 'system' %}\n    {% set rest = messages[1:] %}\n\
            {{ messages[0].content.strip() }}|\n{% else %}\n    {% set rest = messages %}\n{% endif %}\n\
            {% set ns = namespace(n=0) %}\n{% for m in rest %}\n    {% if m.content is none %}{% continue %}{% endif %}\n\
            {% set ns.n = ns.n + 1 %}\n{{ m.role.upper() }}:{{ m.content | trim }}{{ ',' if not loop.last }}\n{% endfor %}\n\
            {{ ns.n }}{{ eos_token }}{% if add_generation_prompt %}>{% endif %}";
        let messages = json!([{"role": "system", "content": " be kind "}, {"role": "user", "content": " hi\n"},
            {"role": "assistant", "content": null}, {"role": "user", "content": "<b>"}]);
        assert_eq!(
            render(source, messages).unwrap(),
            "<s>\nbe kind|\nUSER:hi,\nUSER:<b>\n2</s>>"
        );
    }

    #[test]
    fn tojson_is_pythons() {
        let messages = json!([{"a": "<&'>\\u003c\"é\n", "b": [1, 2.5, null, true]}]);
        let text = render("{{ messages[0] | tojson }}", messages.clone()).unwrap();
        assert_eq!(text, r#"{"a": "<&'>\\u003c\"é\n", "b": [1, 2.5, null, true]}"#);
        assert_eq!(serde_json::from_str::<Json>(&text).unwrap(), messages[0]);
        assert!(
            render("{{ messages[0] | tojson(indent=4) }}", messages)
                .unwrap()
                .contains("\n    \"a\"")
        );
    }

    #[test]
    fn tojson_takes_pythons_arguments() {
        // As Python 3 prints them.
        let value = json!([{"b": {}, "a": [1, 2.0, 1e16, 1.5e-5, 1e300, -0.25], "é": []}]);
        for (call, expected) in [
            (
                "tojson",
                r#"{"b": {}, "a": [1, 2.0, 1e+16, 1.5e-05, 1e+300, -0.25], "é": []}"#,
            ),
            (
                "tojson(sort_keys=true, separators=(',', ':'))",
                r#"{"a":[1,2.0,1e+16,1.5e-05,1e+300,-0.25],"b":{},"é":[]}"#,
            ),
            (
                "tojson(ensure_ascii=true)",
                r#"{"b": {}, "a": [1, 2.0, 1e+16, 1.5e-05, 1e+300, -0.25], "\u00e9": []}"#,
            ),
            (
                "tojson(indent=2)",
                "{\n  \"b\": {},\n  \"a\": [\n    1,\n    2.0,\n    1e+16,\n    1.5e-05,\n    1e+300,\n    -0.25\n  ],\n  \"é\": []\n}",
            ),
        ] {
            let source = format!("{{{{ messages[0] | {call} }}}}");
            assert_eq!(render(&source, value.clone()).unwrap(), expected, "{call}");
        }
        assert!(render("{{ messages[0].nosuch | tojson }}", value).is_err());
    }

    #[test]
    fn tools_documents_and_variables_are_shown() {
        let template = "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for d in documents or [] %}{{ d.text }}\
            {% endfor %}{{ mood }}{% if thinking is defined and thinking is false %}!{% endif %}{{ tools is none }}";
        let template = ChatTemplate::new(template, TemplateTokens::default()).unwrap();
        let mut conversation = Conversation::default();
        assert_eq!(template.render(&conversation).unwrap(), "True");
        conversation.tools = vec![json!({"type": "function", "function": {"name": "f"}})];
        conversation.documents = vec![json!({"text": "d"})];
        conversation.kwargs.insert("mood".into(), json!("m"));
        conversation.kwargs.insert("thinking".into(), json!(false));
        conversation.kwargs.insert("messages".into(), json!("never"));
        assert_eq!(template.render(&conversation).unwrap(), "fdm!False");
    }

    #[test]
    fn a_template_can_refuse_and_read_the_date() {
        let refused = render("{{ raise_exception('roles must alternate') }}", json!([]));
        assert!(matches!(refused, Err(RenderError::Refused(reason)) if reason == "roles must alternate"));
        let date = render("{{ strftime_now('%d %b %Y') }}", json!([])).unwrap();
        assert_eq!(date.split(' ').map(str::len).collect::<Vec<_>>(), [2, 3, 4], "{date}");
    }

    #[test]
    fn bombs_run_out_of_fuel() {
        for bomb in [
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
            "{{ 'x' * 100000000000 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set x = 'x' * 60000 %}{% for a in range(1000) %}{{ x }}{% endfor %}",
        ] {
            assert!(matches!(render(bomb, json!([])), Err(RenderError::Failed(_))), "{bomb}");
        }
    }

    #[test]
    fn training_marks_print_nothing() {
        assert_eq!(
            render("a{% generation %}b{% endgeneration %}c", json!([])).unwrap(),
            "abc"
        );
    }

    #[test]
    fn a_broken_template_says_where() {
        assert!(ChatTemplate::new("{% if %}", TemplateTokens::default()).is_err());
    }
}
