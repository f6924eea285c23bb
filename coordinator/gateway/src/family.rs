//! How a model's family writes tool calls and thoughts: which published parser reads them, and how a forced call is spelled.
//! Chosen by the marks in the chat template, which shows the model's own format; an operator may name the parsers instead.

use crate::error::GatewayError;
use serde::Deserialize;

/// An operator's choice for one model; what is not given is found out.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct ParserChoice {
    /// A tool parser's name (`qwen`, `llama`, `mistral`, `deepseek31`, ...), or `none`.
    pub tool_parser: Option<String>,
    /// A reasoning parser's name (`base`, `deepseek_r1`, `qwen3`, `kimi`, ...), or `none`.
    pub reasoning_parser: Option<String>,
}

/// What is known of a model's format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    /// `None`: the template has no tools. They are then told of in the system message, in Hermes' format.
    pub tools: Option<ToolFormat>,
    pub thoughts: Option<ThoughtFormat>,
}

/// How tool calls are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolFormat {
    /// The published parser.
    pub parser: String,
    /// Spellings that are to reach the parser even where they are special tokens.
    pub marks: &'static [&'static str],
}

/// How thoughts are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ThoughtFormat {
    pub parser: String,
    pub open: &'static str,
    pub close: &'static str,
}

/// Marks in a template, the parser they stand for, and the marks in a turn. The first that is found counts, so the more
/// special ones come first.
const TOOL_FORMATS: &[(&[&str], &str, &[&str])] = &[
    (&["<|tool_calls_section_begin|>"], "kimik2", &KIMI_K2),
    (
        &["<minimax:tool_call>"],
        "minimax_m2",
        &["<minimax:tool_call>", "</minimax:tool_call>"],
    ),
    (&["｜DSML｜tool_calls"], "deepseek_v4", &["｜DSML｜"]),
    (&["｜DSML｜"], "deepseek32", &["｜DSML｜"]),
    (&["<｜tool▁calls▁begin｜>", "```json"], "deepseek", &DEEPSEEK),
    (&["<｜tool▁calls▁begin｜>"], "deepseek31", &DEEPSEEK),
    (&["<｜tool_calls_begin｜>"], "step3", &STEP3),
    (&["<|START_ACTION|>"], "cohere", &COHERE),
    (&["<tool_call>", "<function="], "qwen_xml", &HERMES),
    (&["<tool_call>", "<arg_key>"], "glm45_moe", &GLM),
    (&["<tool_call>"], "qwen", &HERMES),
    (&["[TOOL_CALLS]"], "mistral", &["[TOOL_CALLS]"]),
    (
        &["<|python_start|>"],
        "pythonic",
        &["<|python_start|>", "<|python_end|>"],
    ),
    (&["<|python_tag|>"], "llama", &["<|python_tag|>"]),
    (
        &["\"parameters\": dictionary of argument name and its value"],
        "llama",
        &["<|python_tag|>"],
    ),
    // Tools are shown, and nothing tells how calls are written: JSON is what such templates ask for.
    (&["tools"], "json", &[]),
];

const HERMES: [&str; 2] = ["<tool_call>", "</tool_call>"];
const GLM: [&str; 6] = [
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
];
const KIMI_K2: [&str; 5] = [
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
];
const DEEPSEEK: [&str; 5] = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
];
const STEP3: [&str; 5] = [
    "<｜tool_calls_begin｜>",
    "<｜tool_calls_end｜>",
    "<｜tool_call_begin｜>",
    "<｜tool_call_end｜>",
    "<｜tool_sep｜>",
];
const COHERE: [&str; 8] = [
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_TEXT|>",
    "<|END_TEXT|>",
    "<|START_THINKING|>",
    "<|END_THINKING|>",
];

/// The mark in a template, the parser, how thoughts open and close.
const THOUGHT_FORMATS: &[(&str, &str, &str, &str)] = &[
    ("◁/think▷", "kimi", "◁think▷", "◁/think▷"),
    (
        "<|END_THINKING|>",
        "cohere_cmd",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
    ),
    ("<mm:think>", "minimax_m3", "<mm:think>", "</mm:think>"),
    // Everyone else. Whether a turn begins inside a thought is told by the prompt's end, not by the name.
    ("</think>", "base", "<think>", "</think>"),
    ("<think>", "base", "<think>", "</think>"),
];

impl Family {
    /// By the marks in a template.
    pub fn of(template: &str) -> Self {
        let tools = TOOL_FORMATS
            .iter()
            .find(|(marks, _, _)| marks.iter().all(|mark| template.contains(mark)));
        let thoughts = THOUGHT_FORMATS.iter().find(|(mark, ..)| template.contains(mark));
        Self {
            tools: tools.map(|(_, parser, marks)| ToolFormat {
                parser: (*parser).to_owned(),
                marks,
            }),
            thoughts: thoughts.map(|(_, parser, open, close)| ThoughtFormat {
                parser: (*parser).to_owned(),
                open,
                close,
            }),
        }
    }

    /// With an operator's choice.
    ///
    /// # Errors
    /// A parser of that name does not exist.
    pub fn chosen(mut self, choice: &ParserChoice) -> Result<Self, GatewayError> {
        let unknown = |name: &str, known: Vec<String>| GatewayError::Setting {
            name: "parsers",
            problem: format!("names `{name}`; there are {} and none", known.join(", ")),
        };
        match choice.tool_parser.as_deref() {
            None => {}
            Some("none") => self.tools = None,
            Some(name) => {
                let factory = tool_parser::ParserFactory::new();
                if !factory.has_parser(name) {
                    let mut known = factory.list_parsers();
                    known.sort_unstable();
                    return Err(unknown(name, known));
                }
                let marks = TOOL_FORMATS.iter().find(|(_, parser, _)| *parser == name);
                self.tools = Some(ToolFormat {
                    parser: name.to_owned(),
                    marks: marks.map_or(&[], |(_, _, marks)| marks),
                });
            }
        }
        match choice.reasoning_parser.as_deref() {
            None => {}
            Some("none") => self.thoughts = None,
            Some(name) => {
                let factory = reasoning_parser::ParserFactory::new();
                let registry = factory.registry();
                if !registry.has_parser(name) {
                    return Err(unknown(name, registry.list_parsers()));
                }
                let format = THOUGHT_FORMATS.iter().find(|(_, parser, ..)| *parser == name);
                let (open, close) = format.map_or(("<think>", "</think>"), |(_, _, open, close)| (*open, *close));
                self.thoughts = Some(ThoughtFormat {
                    parser: name.to_owned(),
                    open,
                    close,
                });
            }
        }
        Ok(self)
    }

    /// The format of calls, which every model has: where the template knows none, Hermes' is taught.
    pub fn tool_format(&self) -> ToolFormat {
        self.tools.clone().unwrap_or(ToolFormat {
            parser: "qwen".into(),
            marks: &HERMES,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_tells_its_family() {
        for (template, tools, thoughts) in [
            ("{{ messages }}", None, None),
            ("{% if tools %}<tool_call>", Some("qwen"), None),
            ("{% if tools %}<tool_call></think>", Some("qwen"), Some("base")),
            ("{% if tools %}<tool_call>\n<function=", Some("qwen_xml"), None),
            ("{% if tools %}[TOOL_CALLS]", Some("mistral"), None),
            ("{% if tools %}<|python_tag|>", Some("llama"), None),
            ("tools <｜tool▁calls▁begin｜> ```json", Some("deepseek"), None),
            (
                "tools <｜tool▁calls▁begin｜> </think>",
                Some("deepseek31"),
                Some("base"),
            ),
            ("{{ tools }}", Some("json"), None),
            ("◁/think▷", None, Some("kimi")),
        ] {
            let family = Family::of(template);
            assert_eq!(
                family.tools.as_ref().map(|format| format.parser.as_str()),
                tools,
                "{template}"
            );
            assert_eq!(
                family.thoughts.as_ref().map(|format| format.parser.as_str()),
                thoughts,
                "{template}"
            );
        }
    }

    #[test]
    fn every_parser_named_here_exists_and_an_operator_may_name_another() {
        let tools = tool_parser::ParserFactory::new();
        assert!(TOOL_FORMATS.iter().all(|(_, parser, _)| tools.has_parser(parser)));
        let thoughts = reasoning_parser::ParserFactory::new();
        assert!(
            THOUGHT_FORMATS
                .iter()
                .all(|(_, parser, ..)| thoughts.registry().has_parser(parser))
        );
        let choice = |tool: Option<&str>, reasoning: Option<&str>| ParserChoice {
            tool_parser: tool.map(str::to_owned),
            reasoning_parser: reasoning.map(str::to_owned),
        };
        let family = Family::of("{{ tools }}")
            .chosen(&choice(Some("kimik2"), Some("deepseek_r1")))
            .unwrap();
        assert_eq!(family.tools.unwrap().marks, KIMI_K2);
        assert_eq!(family.thoughts.unwrap().close, "</think>");
        assert_eq!(
            Family::of("tools </think>")
                .chosen(&choice(Some("none"), Some("none")))
                .unwrap(),
            Family::of("")
        );
        assert!(Family::of("").chosen(&choice(Some("nosuch"), None)).is_err());
        assert!(Family::of("").chosen(&choice(None, Some("nosuch"))).is_err());
    }
}
