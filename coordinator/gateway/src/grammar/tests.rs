//! That a grammar admits the calls and texts that it is for, and no others, by the library that the workers use.

use super::*;
use crate::family::Family;

struct Words(&'static [(&'static str, u32)]);

impl Spell for Words {
    fn special(&self, text: &str) -> Option<u32> {
        self.0.iter().find(|(spelling, _)| *spelling == text).map(|(_, id)| *id)
    }
}

fn tool(strict: bool) -> Tool {
    Tool {
        name: "f".into(),
        description: None,
        parameters: Some(
            json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "null"}}}),
        ),
        strict,
    }
}

fn lark(grammar: Option<Grammar>) -> String {
    match grammar.expect("a grammar").kind {
        Some(Kind::Lark(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_format_alone_is_told_as_it_is() {
    let none = &Words(&[]);
    let told = |format: OutputFormat| {
        compose(&format, None, &Thought::None, none)
            .unwrap()
            .map(|told| told.kind.unwrap())
    };
    assert_eq!(told(OutputFormat::Text), None);
    let schema = json!({"type": "string"});
    let strict = OutputFormat::JsonSchema {
        schema: schema.clone(),
        strict: true,
    };
    assert_eq!(told(strict), Some(Kind::JsonSchema(schema.to_string())));
    assert_eq!(told(OutputFormat::Regex("a/b".into())), Some(Kind::Regex("a/b".into())));
    let choice = OutputFormat::Choice(vec!["a\"".into(), "b".into()]);
    assert_eq!(
        told(choice),
        Some(Kind::Lark("start: body\nbody: \"a\\\"\" | \"b\"\n".into()))
    );
}

#[test]
fn thoughts_come_before_a_format() {
    let format = Family::of("</think>").thoughts.unwrap();
    let regex = OutputFormat::Regex("a/b".into());
    let text = lark(compose(&regex, None, &Thought::Open(format.clone()), &Words(&[])).unwrap());
    assert!(text.starts_with("start: thought BODY\nBODY: /a\\/b/\n"), "{text}");
    assert!(text.contains("thinking[lazy]: /(?s:.*)<\\/think>/"), "{text}");
    let user = OutputFormat::Lark("start: x\nx: \"start\"".into());
    let special = Words(&[("<think>", 7), ("</think>", 8)]);
    let text = lark(compose(&user, None, &Thought::Possible(format), &special).unwrap());
    assert!(
        text.starts_with("start: thought? body\nbody: x\nx: \"start\"\n"),
        "{text}"
    );
    assert!(text.contains("thought: <[7]> /(?s:.*)/ <[8]>"), "{text}");
}

#[test]
fn forced_calls_are_in_the_familys_words() {
    let tools = [tool(true)];
    let rules = |parser, single| CallRules {
        tools: &tools,
        parser,
        forced: true,
        single,
    };
    let none = &Words(&[]);
    let of = |rules: &CallRules<'_>| lark(compose(&OutputFormat::Text, Some(rules), &Thought::None, none).unwrap());
    let text = of(&rules("qwen", false));
    assert!(
        text.contains("call: \"<tool_call>\" \"\\n\" object \"\\n\" \"</tool_call>\""),
        "{text}"
    );
    assert!(
        text.contains("(\"\\n\" call)*") && text.contains("#/$defs/tool0/$defs/A"),
        "{text}"
    );
    assert!(!of(&rules("qwen", true)).contains(")*"));
    let text = of(&rules("kimik2", true));
    assert!(
        text.contains("\"maxItems\":1") && rules("kimik2", true).parser() == "json",
        "{text}"
    );
    assert_eq!(rules("llama", false).parser(), "llama");
}

#[test]
fn free_text_is_left_free_but_for_strict_calls() {
    let none = &Words(&[]);
    let (strict, lax) = ([tool(true)], [tool(false)]);
    let rules = |tools, parser| CallRules {
        tools,
        parser,
        forced: false,
        single: false,
    };
    let told = |rules: &CallRules<'_>| compose(&OutputFormat::Text, Some(rules), &Thought::None, none).unwrap();
    assert!(told(&rules(&lax, "qwen")).is_none());
    assert!(told(&rules(&strict, "kimik2")).is_none());
    assert!(lark(told(&rules(&strict, "qwen"))).contains("head[lazy]: TEXT \"<tool_call>\""));
    let both = |parser| {
        compose(
            &OutputFormat::JsonObject,
            Some(&rules(&lax, parser)),
            &Thought::None,
            none,
        )
    };
    assert!(lark(both("qwen").unwrap()).starts_with("start: (body | calls)"));
    assert!(both("kimik2").is_err());
}

/// Whether the library that the workers use takes a grammar, and whether that admits a text.
fn admits(grammar: &Grammar, text: &str) -> bool {
    use llguidance::api::TopLevelGrammar;
    use llguidance::toktrie::ApproximateTokEnv;
    let grammar = match grammar.kind.as_ref().unwrap() {
        Kind::JsonSchema(schema) => TopLevelGrammar::from_json_schema(serde_json::from_str(schema).unwrap()),
        Kind::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Kind::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
    };
    let factory = llguidance::ParserFactory::new_simple(&ApproximateTokEnv::single_byte_env()).unwrap();
    let mut matcher = llguidance::Matcher::new(factory.create_parser(grammar));
    assert_eq!(matcher.get_error(), None);
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    matcher.consume_tokens(&tokens).is_ok() && matcher.is_accepting().unwrap_or(false)
}

#[test]
fn grammars_admit_what_they_should_and_nothing_else() {
    let none = &Words(&[]);
    let format = Family::of("</think>").thoughts.unwrap();
    let tools = [
        tool(true),
        Tool {
            name: "g".into(),
            parameters: None,
            ..tool(true)
        },
    ];
    let f = "{\"name\": \"f\", \"arguments\": {\"a\": null}}";
    let call = |body: &str| format!("<tool_call>\n{body}\n</tool_call>");
    let g = call("{\"name\":\"g\",\"arguments\":{}}");
    let text = OutputFormat::Text;
    let schema =
        json!({"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": false});
    let json = OutputFormat::JsonSchema { schema, strict: true };
    let check =
        |format: &OutputFormat, rules: Option<&CallRules<'_>>, thought: &Thought, good: &[String], bad: &[String]| {
            let grammar = compose(format, rules, thought, none).unwrap().unwrap();
            good.iter()
                .for_each(|text| assert!(admits(&grammar, text), "{text:?}: {grammar:?}"));
            bad.iter()
                .for_each(|text| assert!(!admits(&grammar, text), "{text:?}: {grammar:?}"));
        };
    let rules = |parser, forced, single| CallRules {
        tools: &tools,
        parser,
        forced,
        single,
    };
    let wrong = call("{\"name\": \"f\", \"arguments\": {\"a\": 7}}");
    check(
        &text,
        Some(&rules("qwen", true, false)),
        &Thought::None,
        &[call(f), format!("{}\n{g}", call(f))],
        &["hi".into(), wrong.clone(), format!("{} ", call(f))],
    );
    check(
        &text,
        Some(&rules("qwen", true, true)),
        &Thought::None,
        std::slice::from_ref(&g),
        &[format!("{g}\n{g}")],
    );
    check(
        &text,
        Some(&rules("qwen", false, false)),
        &Thought::None,
        &["hi".into(), String::new(), format!("well {} and {g}!", call(f))],
        &[format!("well {wrong}")],
    );
    check(
        &json,
        Some(&rules("qwen", false, false)),
        &Thought::None,
        &["{\"x\": 1}".into(), call(f)],
        &["hi".into(), "{}".into(), wrong],
    );
    let list = "[{\"name\": \"g\", \"parameters\": {}}]";
    check(
        &text,
        Some(&rules("kimik2", true, true)),
        &Thought::None,
        &[list.into()],
        &["[]".into(), f.into()],
    );
    check(
        &text,
        Some(&rules("llama", true, true)),
        &Thought::None,
        &["{\"name\": \"g\", \"parameters\": {}}".into()],
        &[list.into()],
    );
    let mistral = "[TOOL_CALLS] [{\"name\": \"g\", \"arguments\": {}}]";
    check(
        &text,
        Some(&rules("mistral", true, false)),
        &Thought::None,
        &[mistral.into()],
        &[list.into()],
    );
    check(
        &text,
        Some(&rules("mistral", false, false)),
        &Thought::None,
        &[format!("so {mistral}")],
        &["[TOOL_CALLS] x".into()],
    );

    let (open, possible) = (Thought::Open(format.clone()), Thought::Possible(format));
    check(
        &json,
        None,
        &open,
        &["so <b>\n</think>\n{\"x\":1}".into()],
        &["{\"x\":1}".into(), "so</think>no".into()],
    );
    check(
        &json,
        None,
        &possible,
        &["<think>so</think>{\"x\":1}".into(), "{\"x\":1}".into()],
        &["so</think>{\"x\":1}".into()],
    );
    check(
        &text,
        Some(&rules("qwen", true, true)),
        &open,
        &[format!("so</think>\n\n{g}")],
        std::slice::from_ref(&g),
    );
    check(
        &text,
        Some(&rules("qwen", false, false)),
        &possible,
        &[format!("<think>so</think>hi {g}")],
        &[],
    );
    let regex = OutputFormat::Regex("a/b|c".into());
    check(
        &regex,
        None,
        &open,
        &["x</think>a/b".into(), "x</think> c".into()],
        &["x</think>a".into()],
    );
    let lark = OutputFormat::Lark("start: \"a\" x\nx: \"b\"".into());
    check(&lark, None, &open, &["x</think>ab".into()], &["ab".into()]);
    let choice = OutputFormat::Choice(vec!["a\"\n".into(), "b".into()]);
    check(
        &choice,
        None,
        &Thought::None,
        &["a\"\n".into(), "b".into()],
        &["a".into()],
    );
    check(
        &choice,
        None,
        &possible,
        &["b".into(), "<think></think>b".into()],
        &["x".into()],
    );
}
