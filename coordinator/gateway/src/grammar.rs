//! What the workers are to enforce: an output format, forced or strict tool calls, and the thoughts before them, put
//! together into one grammar. Text in, text out: compiling it is the workers' business, and so is saying what is wrong with
//! a schema.

use baton_proto::worker::{Grammar, grammar::Kind};
use serde_json::{Value as Json, json};

use crate::family::ThoughtFormat;
use crate::generation::request::{OutputFormat, Tool};

/// Text and special tokens as a grammar spells them.
pub(crate) trait Spell {
    /// The id of the special token of this spelling, if there is one: a grammar cannot spell it as text.
    fn special(&self, text: &str) -> Option<u32>;
}

/// How the turn begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Thought {
    /// With the answer.
    None,
    /// Maybe with a thought.
    Possible(ThoughtFormat),
    /// Inside one.
    Open(ThoughtFormat),
}

/// Which calls are to come.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CallRules<'a> {
    /// Those that may be called; not empty.
    pub tools: &'a [Tool],
    /// The family's parser.
    pub parser: &'a str,
    /// At least one call, and nothing else.
    pub forced: bool,
    /// At most one call.
    pub single: bool,
}

impl CallRules<'_> {
    /// The parser that reads what this grammar lets through.
    pub fn parser(&self) -> &str {
        if self.forced && !NATIVE.contains(&self.parser) {
            "json"
        } else {
            self.parser
        }
    }
}

/// Families whose own format the grammar writes. Forced calls of the others are a JSON array, which is as good for whoever
/// reads them, and strict arguments are enforced only there.
const NATIVE: [&str; 3] = ["qwen", "mistral", "llama"];

/// Puts a grammar together; `None` if nothing is to be enforced.
///
/// # Errors
/// A sentence for the client: the wishes cannot be met together.
pub(crate) fn compose(
    format: &OutputFormat,
    calls: Option<&CallRules<'_>>,
    thought: &Thought,
    spell: &impl Spell,
) -> Result<Option<Grammar>, &'static str> {
    let forced = calls.is_some_and(|calls| calls.forced);
    let strict = calls.is_some_and(|calls| calls.tools.iter().any(|tool| tool.strict));
    let kind = match (format, calls) {
        (OutputFormat::Text, None) => return Ok(None),
        (OutputFormat::Text, Some(calls)) if !calls.forced => {
            if !strict || !["qwen", "mistral"].contains(&calls.parser) {
                return Ok(None);
            }
            Kind::Lark(interspersed(calls, thought, spell))
        }
        (_, Some(calls)) if forced => {
            let (rules, body) = call_rules(calls, spell);
            Kind::Lark(format!(
                "start: {}{body}\n{rules}{}",
                lead(thought),
                thought_rules(thought, spell)
            ))
        }
        (_, Some(calls)) => {
            if !["qwen", "mistral"].contains(&calls.parser) {
                return Err(
                    "an output format and tools that may or may not be called cannot be had together of this model; \
                            set `tool_choice` to `none` or `required`",
                );
            }
            let (rules, body) = call_rules(calls, spell);
            let (start, more) = body_rules(format);
            let lead = lead(thought);
            let thoughts = thought_rules(thought, spell);
            Kind::Lark(format!("start: {lead}({start} | {body})\n{more}{rules}{thoughts}"))
        }
        (_, None) if *thought == Thought::None => match format {
            OutputFormat::Text => return Ok(None),
            OutputFormat::JsonObject => Kind::JsonSchema(json!({"type": "object"}).to_string()),
            OutputFormat::JsonSchema { schema, .. } => Kind::JsonSchema(schema.to_string()),
            OutputFormat::Regex(regex) => Kind::Regex(regex.clone()),
            OutputFormat::Lark(lark) => Kind::Lark(lark.clone()),
            OutputFormat::Choice(_) => {
                let (start, more) = body_rules(format);
                Kind::Lark(format!("start: {start}\n{more}"))
            }
        },
        (_, None) => {
            let (start, more) = body_rules(format);
            let lead = lead(thought);
            Kind::Lark(format!("start: {lead}{start}\n{more}{}", thought_rules(thought, spell)))
        }
    };
    Ok(Some(Grammar { kind: Some(kind) }))
}

fn lead(thought: &Thought) -> &'static str {
    match thought {
        Thought::None => "",
        Thought::Possible(_) => "thought? ",
        Thought::Open(_) => "thought ",
    }
}

fn thought_rules(thought: &Thought, spell: &impl Spell) -> String {
    let (format, open) = match thought {
        Thought::None => return String::new(),
        Thought::Possible(format) => (format, format!("{} ", mark(format.open, spell))),
        Thought::Open(format) => (format, String::new()),
    };
    match spell.special(format.close) {
        Some(id) => format!("thought: {open}/(?s:.*)/ <[{id}]> /\\s*/\n"),
        None => {
            let close = regex_literal(format.close);
            format!("thought: {open}thinking /\\s*/\nthinking[lazy]: /(?s:.*){close}/\n")
        }
    }
}

/// A mark as a terminal or a special token.
fn mark(text: &str, spell: &impl Spell) -> String {
    match spell.special(text) {
        Some(id) => format!("<[{id}]>"),
        None => quoted(text),
    }
}

/// JSON's strings are Lark's.
fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}

/// Every character stands for itself within `/…/`.
fn regex_literal(text: &str) -> String {
    let special = |character: char| "\\/.+*?()|[]{}^$#&-~".contains(character);
    text.chars().fold(String::new(), |mut out, character| {
        if special(character) {
            out.push('\\');
        }
        out.push(character);
        out
    })
}

/// What `start` says for a format, and the rules that it needs.
fn body_rules(format: &OutputFormat) -> (String, String) {
    match format {
        OutputFormat::Text => ("TEXT".into(), "TEXT: /(?s:.*)/\n".into()),
        OutputFormat::JsonObject => {
            let object = tuned(&json!({"type": "object"}), JSON_WHITESPACE);
            ("body".into(), format!("body: %json {object}\n"))
        }
        OutputFormat::JsonSchema { schema, .. } => (
            "body".into(),
            format!("body: %json {}\n", tuned(schema, JSON_WHITESPACE)),
        ),
        OutputFormat::Regex(regex) => {
            let regex = slashed(regex);
            ("BODY".into(), format!("BODY: /{regex}/\n"))
        }
        OutputFormat::Lark(lark) => {
            let rule = |line: &str| {
                let rest = line.strip_prefix("start")?;
                rest.trim_start().starts_with(':').then(|| format!("body{rest}"))
            };
            let lines = lark.lines().map(|line| rule(line).unwrap_or_else(|| line.to_owned()));
            ("body".into(), lines.collect::<Vec<_>>().join("\n") + "\n")
        }
        OutputFormat::Choice(choices) => {
            let all: Vec<String> = choices.iter().map(|choice| quoted(choice)).collect();
            ("body".into(), format!("body: {}\n", all.join(" | ")))
        }
    }
}

/// A regular expression between slashes.
fn slashed(regex: &str) -> String {
    let mut out = String::with_capacity(regex.len());
    let mut escaped = false;
    for character in regex.chars() {
        match character {
            '/' if !escaped => out.push_str("\\/"),
            '\n' => out.push_str("\\n"),
            _ => out.push(character),
        }
        escaped = character == '\\' && !escaped;
    }
    out
}

/// Blanks between the tokens of JSON within a grammar: a line break and indentation, but no endless run, which is what a
/// model that has lost its way likes best. Alone, schemas get the same from the workers.
const JSON_WHITESPACE: &str = r"[ \n\r\t]{1,40}";

/// The same within calls, which models write on one line: every blank is a token that the caller waits and pays for.
const CALL_WHITESPACE: &str = r"[ \n]{1,2}";

/// With our options; the client's own are not taken.
fn tuned(schema: &Json, whitespace: &str) -> Json {
    let mut schema = schema.clone();
    if let Some(fields) = schema.as_object_mut() {
        fields.insert("x-guidance".into(), json!({"whitespace_pattern": whitespace}));
    }
    schema
}

/// The rules of calls in the family's format, and what `start` says for them.
fn call_rules(calls: &CallRules<'_>, spell: &impl Spell) -> (String, &'static str) {
    let rules = match calls.parser {
        "qwen" => {
            let (open, close) = (mark("<tool_call>", spell), mark("</tool_call>", spell));
            let more = if calls.single { "" } else { " (\"\\n\" call)*" };
            format!(
                "calls: call{more}\ncall: {open} \"\\n\" object \"\\n\" {close}\nobject: %json {}\n",
                one_of(calls.tools, "arguments")
            )
        }
        "mistral" => format!(
            "calls: {} \" \" list\nlist: %json {}\n",
            mark("[TOOL_CALLS]", spell),
            list_of(calls, "arguments")
        ),
        "llama" => format!("calls: %json {}\n", one_of(calls.tools, "parameters")),
        _ => format!("calls: %json {}\n", list_of(calls, "parameters")),
    };
    (rules, "calls")
}

/// Free text, and calls anywhere in it: what follows the mark of a call must be one.
fn interspersed(calls: &CallRules<'_>, thought: &Thought, spell: &impl Spell) -> String {
    let (open, inner) = match calls.parser {
        "qwen" => {
            let close = mark("</tool_call>", spell);
            let inner = format!(
                "\"\\n\" object \"\\n\" {close}\nobject: %json {}\n",
                one_of(calls.tools, "arguments")
            );
            ("<tool_call>", inner)
        }
        _ => {
            let inner = format!("\" \" list\nlist: %json {}\n", list_of(calls, "arguments"));
            ("[TOOL_CALLS]", inner)
        }
    };
    let head = match spell.special(open) {
        Some(id) => format!("head: TEXT <[{id}]>\n"),
        None => format!("head[lazy]: TEXT {}\n", quoted(open)),
    };
    let many = if calls.single { "?" } else { "*" };
    let lead = lead(thought);
    let thoughts = thought_rules(thought, spell);
    format!("start: {lead}call{many} rest\nrest: TEXT\nTEXT: /(?s:.*)/\n{head}call: head {inner}{thoughts}")
}

/// The schema of a call of any of these.
fn one_of(tools: &[Tool], arguments: &str) -> Json {
    let mut definitions = serde_json::Map::new();
    let mut calls: Vec<Json> = Vec::with_capacity(tools.len());
    for (at, tool) in tools.iter().enumerate() {
        let name = format!("tool{at}");
        let mut parameters = tool.parameters.clone().unwrap_or_else(|| {
            // OpenAI's: none given, none taken.
            json!({"type": "object", "properties": {}, "additionalProperties": false})
        });
        rebase(&mut parameters, &format!("#/$defs/{name}"));
        calls.push(json!({"type": "object", "properties": {
                "name": {"const": tool.name}, arguments: {"$ref": format!("#/$defs/{name}")}},
            "required": ["name", arguments], "additionalProperties": false}));
        definitions.insert(name, parameters);
    }
    tuned(&json!({"anyOf": calls, "$defs": definitions}), CALL_WHITESPACE)
}

/// The schema of a list of calls.
fn list_of(calls: &CallRules<'_>, arguments: &str) -> Json {
    let mut one = one_of(calls.tools, arguments);
    let definitions = one.as_object_mut().and_then(|fields| {
        fields.remove("x-guidance");
        fields.remove("$defs")
    });
    let mut list = json!({"type": "array", "items": one, "minItems": 1, "$defs": definitions});
    if calls.single {
        list["maxItems"] = 1.into();
    }
    tuned(&list, CALL_WHITESPACE)
}

/// Lets references within a schema find their targets where the schema now stands.
fn rebase(schema: &mut Json, to: &str) {
    match schema {
        Json::Array(items) => items.iter_mut().for_each(|item| rebase(item, to)),
        Json::Object(fields) => {
            for (name, field) in fields.iter_mut() {
                match field {
                    Json::String(target) if name == "$ref" => {
                        if let Some(rest) = target.strip_prefix('#') {
                            *target = format!("{to}{rest}");
                        }
                    }
                    field => rebase(field, to),
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
