//! A model's chat template, rendered as Hugging Face renders it: Jinja with trimmed blocks, Python's string methods,
//! `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop controls. A template is data from a model
//! directory, so fuel bounds its time and output and it can reach nothing outside its arguments.
//!
//! Knows nothing of tokens: see `prompt.rs` for what keeps a user's text from becoming control tokens.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde_json::Value as Json;

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
        environment.add_filter("tojson", tojson);
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

    /// Renders a conversation, ready for the assistant's answer.
    pub fn render(&self, messages: &[Json]) -> Result<String, RenderError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| RenderError::Failed(error.to_string()))?;
        let mut context: Vec<(String, Value)> = vec![
            ("messages".into(), messages.iter().map(to_value).collect()),
            ("add_generation_prompt".into(), Value::from(true)),
            ("tools".into(), Value::from(())),
            ("documents".into(), Value::from(())),
        ];
        context.extend(
            self.tokens
                .0
                .iter()
                .map(|(name, text)| (name.clone(), Value::from(text.as_str()))),
        );
        template
            .render(Value::from_pairs(context))
            .map_err(|error| match refusal(&error) {
                Some(reason) => RenderError::Refused(reason),
                None => RenderError::Failed(format!("{error:#}")),
            })
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

/// Python's `json.dumps(…, ensure_ascii=False)`. The built-in filter writes the same, but for the characters HTML
/// minds, which it spells as `\u003c` and the like; those are put back.
fn tojson(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    // Arguments of Python's that change nothing here.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let _: Option<bool> = kwargs.get("sort_keys")?;
    let _: Option<Value> = kwargs.get("separators")?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get("indent")?,
    };
    let indent = indent.filter(|indent| !indent.is_none());
    let escaped = minijinja::filters::tojson(value, indent, std::iter::empty::<(String, Value)>().collect())?;
    let escaped = escaped.as_str().unwrap_or_default();
    let mut text = String::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let html = [("\\u003c", '<'), ("\\u003e", '>'), ("\\u0026", '&'), ("\\u0027", '\'')];
        if let Some((spelling, plain)) = html.iter().find(|(spelling, _)| rest.starts_with(spelling)) {
            text.push(*plain);
            rest = &rest[spelling.len()..];
        } else {
            // A backslash is always followed by an ASCII character; both stay.
            text.push_str(&rest[..2]);
            rest = &rest[2..];
        }
    }
    text.push_str(rest);
    Ok(Value::from(text))
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
        ChatTemplate::new(source, tokens)
            .unwrap()
            .render(messages.as_array().unwrap())
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
