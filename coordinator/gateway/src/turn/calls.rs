//! Tool calls told from text, by a published parser.
//!
//! Those parsers look at all of a call with each piece they get, so a call of `n` bytes read byte by byte would cost `n²`.
//! Here a piece is held back until it is a sixteenth of what the parser has of the call: a call costs some `16·n·log n`, and
//! its arguments stream all the same. Text before a call is handed over at once.

use std::sync::LazyLock;

use futures_util::FutureExt;
use openai_protocol::common::{Function, Tool as ParserTool};
use tool_parser::types::StreamingParseResult;
use tool_parser::{ParserFactory, ToolParser};
use uuid::Uuid;

use super::add_text;
use crate::family::ToolFormat;
use crate::generation::output::Delta;
use crate::generation::request::Tool;

/// Times a parser is asked what else it has: it tells a call in a few parts.
const ROUNDS_MAX: usize = 1024;

static PARSERS: LazyLock<ParserFactory> = LazyLock::new(ParserFactory::new);

/// The share of a call that a piece must have before it is read.
const SHARE: usize = 16;

/// See the module.
pub(crate) struct Calls {
    parser: Box<dyn ToolParser>,
    tools: Vec<ParserTool>,
    /// At most one call.
    single: bool,
    /// Not read yet.
    pending: String,
    /// Bytes read since a call may have begun.
    read: usize,
    /// White space before anything else: it belongs to a call, if one comes.
    blank: String,
    /// The parser's numbers of the calls that began, in order.
    begun: Vec<usize>,
    /// Text came that is more than white space.
    spoke: bool,
    /// The parser gave up: all is text.
    broken: bool,
}

impl Calls {
    /// `single`: calls after the first are passed over. `None` if the parser does not exist.
    pub fn new(format: &ToolFormat, tools: &[Tool], single: bool) -> Option<Self> {
        let parser = PARSERS.registry().create_parser(&format.parser)?;
        let tools = tools.iter().map(|tool| ParserTool {
            tool_type: "function".into(),
            function: Function {
                name: tool.name.clone(),
                description: tool.description.clone(),
                parameters: tool.parameters.clone().unwrap_or_else(|| serde_json::json!({})),
                strict: Some(tool.strict),
                extra: Default::default(),
            },
        });
        Some(Self {
            parser,
            tools: tools.collect(),
            single,
            pending: String::new(),
            read: 0,
            blank: String::new(),
            begun: Vec::new(),
            spoke: false,
            broken: false,
        })
    }

    /// A call began.
    pub fn called(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Takes text.
    pub fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        if self.broken {
            return self.text(text, out);
        }
        self.pending.push_str(text);
        if self.pending.len() * SHARE >= self.read {
            self.parse(out);
        }
    }

    /// The turn is over. One that was cut short keeps the arguments that came: completing them would invent some.
    pub fn finish(&mut self, cut_short: bool, out: &mut Vec<Delta>) {
        if !self.pending.is_empty() {
            self.parse(out);
        }
        if self.broken {
            return;
        }
        let complete = !cut_short;
        let rest = complete.then(|| self.parser.get_unstreamed_tool_args()).flatten();
        for call in rest.unwrap_or_default() {
            self.call(call.tool_index, call.name, &call.parameters, out);
        }
        let rest = self.parser.take_unstreamed_normal_text();
        self.text(&rest, out);
        if !self.called() {
            add_text(&std::mem::take(&mut self.blank), out);
        }
    }

    fn parse(&mut self, out: &mut Vec<Delta>) {
        let mut piece = std::mem::take(&mut self.pending);
        for round in 0..ROUNDS_MAX {
            // The parsers wait for nothing, though their trait would let them.
            let parsed = self.parser.parse_incremental(&piece, &self.tools).now_or_never();
            let StreamingParseResult { normal_text, calls } = match parsed {
                Some(Ok(parsed)) => parsed,
                failed => {
                    tracing::debug!(failed = ?failed.map(|result| result.err()), "a tool parser failed");
                    self.broken = true;
                    return self.text(&piece, out);
                }
            };
            if round == 0 {
                let passed = normal_text.len() >= piece.len() && calls.is_empty();
                self.read = if passed { 0 } else { self.read + piece.len() };
            }
            if normal_text.is_empty() && calls.is_empty() {
                return;
            }
            self.text(&normal_text, out);
            for call in calls {
                self.call(call.tool_index, call.name, &call.parameters, out);
            }
            // What it tells it tells in parts: of two calls in a piece the first.
            piece.clear();
        }
    }

    /// Text beside calls. White space around them is theirs.
    fn text(&mut self, text: &str, out: &mut Vec<Delta>) {
        if !self.spoke && text.chars().all(char::is_whitespace) {
            if !self.called() {
                self.blank.push_str(text);
            }
            return;
        }
        if self.called() && text.chars().all(char::is_whitespace) {
            return;
        }
        self.spoke = true;
        add_text(&std::mem::take(&mut self.blank), out);
        add_text(text, out);
    }

    fn call(&mut self, number: usize, name: Option<String>, arguments: &str, out: &mut Vec<Delta>) {
        let surplus = self.single && self.begun.iter().any(|begun| *begun != number);
        if let Some(name) = name.filter(|_| !self.begun.contains(&number) && !surplus) {
            let index = self.begun.len() as u32;
            self.begun.push(number);
            out.push(Delta::ToolCall {
                index,
                id: call_id(),
                name,
            });
        }
        let index = self.begun.iter().position(|begun| *begun == number);
        if let Some(index) = index.filter(|_| !arguments.is_empty()) {
            let index = index as u32;
            match out.last_mut() {
                Some(Delta::ToolArguments { index: last, json }) if *last == index => json.push_str(arguments),
                _ => out.push(Delta::ToolArguments {
                    index,
                    json: arguments.to_owned(),
                }),
            }
        }
    }
}

fn call_id() -> String {
    let id = Uuid::new_v4().simple().to_string();
    format!("call_{}", &id[..24])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;
    use crate::generation::output::{Choice, Piece};
    use serde_json::json;

    fn tools() -> Vec<Tool> {
        let tool = |name: &str| Tool {
            name: name.into(),
            description: None,
            parameters: Some(json!({"type": "object", "properties": {"city": {"type": "string"}}})),
            strict: false,
        };
        vec![tool("weather"), tool("time")]
    }

    /// Reads a text in pieces of `len` characters.
    fn read(template: &str, text: &str, len: usize) -> Choice {
        let mut calls = Calls::new(&Family::of(template).tool_format(), &tools(), false).unwrap();
        let chars: Vec<char> = text.chars().collect();
        let mut deltas = Vec::new();
        for piece in chars.chunks(len) {
            calls.push(&piece.iter().collect::<String>(), &mut deltas);
        }
        calls.finish(false, &mut deltas);
        let mut choice = Choice::default();
        choice.take(Piece {
            deltas,
            ..Piece::default()
        });
        choice
    }

    #[test]
    fn calls_of_each_family_are_read() {
        let hermes = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>";
        let cases = [
            ("tools <tool_call>", hermes.to_owned(), 1),
            (
                "tools <tool_call>",
                format!("\n\n{hermes}\n{}", hermes.replace("weather", "time")),
                2,
            ),
            (
                "tools [TOOL_CALLS]",
                "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}]".into(),
                1,
            ),
            (
                "tools <|python_tag|>",
                "{\"name\": \"weather\", \"parameters\": {\"city\": \"Köln\"}}".into(),
                1,
            ),
            (
                "tools",
                "[{\"name\": \"weather\", \"parameters\": {\"city\": \"Köln\"}}]".into(),
                1,
            ),
            (
                "tools <tool_call> <function=",
                "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>"
                    .into(),
                1,
            ),
        ];
        for (template, text, count) in cases {
            for len in [1, 3, 1000] {
                let choice = read(template, &text, len);
                assert_eq!(choice.tool_calls.len(), count, "{template}, by {len}: {choice:?}");
                assert_eq!(choice.text, "", "{template}, by {len}");
                let call = &choice.tool_calls[0];
                assert_eq!(call.name, "weather");
                let arguments: serde_json::Value = serde_json::from_str(&call.arguments).expect(&call.arguments);
                assert_eq!(arguments, json!({"city": "Köln"}), "{template}, by {len}");
                assert!(call.id.starts_with("call_") && call.id.len() == 29);
            }
        }
    }

    #[test]
    fn one_call_at_most_if_asked_for() {
        let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>";
        let mut calls = Calls::new(&Family::of("tools <tool_call>").tool_format(), &tools(), true).unwrap();
        let mut deltas = Vec::new();
        calls.push(&format!("{call}\n{call}"), &mut deltas);
        calls.finish(false, &mut deltas);
        let begun = deltas.iter().filter(|delta| matches!(delta, Delta::ToolCall { .. }));
        assert_eq!(begun.count(), 1);
    }

    #[test]
    fn what_is_cut_short_is_not_completed() {
        let mut calls = Calls::new(&Family::of("tools <tool_call>").tool_format(), &tools(), false).unwrap();
        let mut deltas = Vec::new();
        for character in "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\":   ".chars() {
            calls.push(&character.to_string(), &mut deltas);
        }
        calls.finish(true, &mut deltas);
        let mut choice = Choice::default();
        choice.take(Piece {
            deltas,
            ..Piece::default()
        });
        assert_eq!(choice.tool_calls.len(), 1);
        let arguments = &choice.tool_calls[0].arguments;
        assert!(
            serde_json::from_str::<serde_json::Value>(arguments).is_err(),
            "{arguments}"
        );
    }

    #[test]
    fn text_without_calls_passes_unchanged() {
        for text in ["  hello <b>\n", "a < b", "\n\n", "<tool_cal", "{\"name\": 1"] {
            for len in [1, 1000] {
                let choice = read("tools <tool_call>", text, len);
                assert_eq!((choice.text.as_str(), choice.tool_calls.len()), (text, 0), "by {len}");
            }
        }
    }

    #[test]
    fn a_long_call_is_not_read_again_and_again() {
        let city = "x".repeat(200_000);
        let text =
            format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {{\"city\": \"{city}\"}}}}\n</tool_call>");
        let mut calls = Calls::new(&Family::of("tools <tool_call>").tool_format(), &tools(), true).unwrap();
        let mut deltas = Vec::new();
        for piece in text.as_bytes().chunks(4) {
            calls.push(std::str::from_utf8(piece).unwrap(), &mut deltas);
        }
        calls.finish(false, &mut deltas);
        let mut choice = Choice::default();
        let pieces = deltas.len();
        choice.take(Piece {
            deltas,
            ..Piece::default()
        });
        let arguments: serde_json::Value = serde_json::from_str(&choice.tool_calls[0].arguments).unwrap();
        assert_eq!(arguments["city"].as_str().map(str::len), Some(city.len()));
        assert!(pieces < 10, "one call, and its arguments joined");
    }
}
