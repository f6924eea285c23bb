//! What a stranger may send: bombs are refused, in bounded time, and nothing panics; and what grammars mean for masks.

mod common;

use std::time::{Duration, Instant};

use baton_grammar::GrammarError;
use baton_proto::limits::GRAMMAR_BYTES_MAX;
use baton_proto::worker::Grammar;
use common::{DEMO, lark, matcher, regex, schema, walk};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;

/// Far above what any of them takes, far below what would matter: this is no benchmark.
const COMPILE_MAX: Duration = Duration::from_secs(20);

fn text(grammar: &Grammar, seed: u64) -> Option<String> {
    let mut matcher = matcher(grammar).expect("usable");
    let tokens = walk(&mut matcher, DEMO.vocabulary(), &mut StdRng::seed_from_u64(seed)).expect("can be followed")?;
    Some(String::from_utf8(DEMO.vocabulary().text(&tokens)).expect("UTF-8"))
}

#[test]
fn bombs_are_taken_or_refused_in_bounded_time() {
    let deep = |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    let mut doubling = json!({"type": "string"});
    for _ in 0..90 {
        doubling = json!({"anyOf": [doubling, {"type": "null"}]});
    }
    let products: Vec<_> = (0..24)
        .map(|at| json!({"anyOf": [{"properties": {format!("a{at}"): {"type": "integer"}}}, {"required": [format!("b{at}")]}]}))
        .collect();
    let chain: serde_json::Map<_, _> = (0..3000)
        .map(|at| (format!("d{at}"), json!({"$ref": format!("#/$defs/d{}", at + 1)})))
        .collect();
    let wide: serde_json::Map<_, _> = (0..5000)
        .map(|at| (format!("p{at}"), json!({"type": "integer"})))
        .collect();
    let bombs = [
        ("deep json", json_text(&deep("[", "]", 50_000))),
        ("deep schema", json_text(&deep("{\"items\":", "}", 120))),
        ("nested unions", schema(&doubling)),
        ("product of unions", schema(&json!({"allOf": products}))),
        (
            "chain of references",
            schema(&json!({"$defs": chain, "$ref": "#/$defs/d0"})),
        ),
        (
            "wide",
            schema(&json!({"type": "object", "properties": wide, "additionalProperties": false})),
        ),
        (
            "many items",
            schema(&json!({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000})),
        ),
        (
            "long string",
            schema(&json!({"type": "string", "minLength": 1_000_000, "maxLength": 1_000_000_000})),
        ),
        ("counting regex", regex("((a{1,1000}){1,1000}){1,1000}")),
        ("unicode regex", regex(r"(\w{1,200}\s{1,200}){1,200}x")),
        ("exponential automaton", regex("(a|b)*a(a|b){60}")),
        (
            "intersections",
            lark("start: A & B\nA: /(a|b)*a(a|b){40}/\nB: /(b|a)*b(a|b){41}/"),
        ),
        ("deep regex", regex(&deep("(", ")", 100_000))),
        ("deep lark", lark(&format!("start: {}", deep("(", ")", 60_000)))),
        ("ambiguous", lark("start: e\ne: e e | \"a\" | \"aa\" | \"\"")),
        ("left recursion", lark("start: start")),
        (
            "rule chain",
            lark(
                &(0..20_000)
                    .map(|n| format!("r{n}: r{}\n", n + 1))
                    .collect::<String>()
                    .replacen("r0", "start", 1),
            ),
        ),
        (
            "terminal chain",
            lark(&format!(
                "start: T0\n{}T20000: \"x\"\n",
                (0..20_000).map(|n| format!("T{n}: T{}\n", n + 1)).collect::<String>()
            )),
        ),
        ("import", lark("%import common.NUMBER\nstart: NUMBER")),
        (
            "nested schema",
            lark("start: %json {\"$ref\": \"https://example.com/\"}"),
        ),
        ("nonsense", lark("\u{0}\u{ffff}%%%: (((")),
        ("too long", regex(&"a".repeat(GRAMMAR_BYTES_MAX + 1))),
        ("empty", regex("")),
        ("no kind", Grammar { kind: None }),
    ];
    for (name, bomb) in bombs {
        let started = Instant::now();
        let result = matcher(&bomb);
        let told = result.as_ref().map(|_| "taken").map_err(ToString::to_string);
        println!("{name}: {told:?} in {:?}", started.elapsed());
        if let Ok(mut matcher) = result {
            // Taken: then it can be followed a while, or says why not.
            for _ in 0..20 {
                let Ok(admitted) = matcher.admitted() else { break };
                if matcher.advance(admitted[admitted.len() / 2]).is_err() {
                    break;
                }
            }
        } else if let Err(error) = told {
            assert!(
                error.len() < 600 && !error.contains('\n') && !error.contains(".rs:"),
                "{name}: {error}"
            );
        }
        assert!(started.elapsed() < COMPILE_MAX, "{name} took {:?}", started.elapsed());
    }
}

fn json_text(text: &str) -> Grammar {
    use baton_proto::worker::grammar::Kind;
    Grammar {
        kind: Some(Kind::JsonSchema(text.to_owned())),
    }
}

#[test]
fn a_grammar_is_compiled_once_and_refused_once() {
    let good = regex("[a-f]{3,9}once");
    assert!(DEMO.known(&good).is_none());
    matcher(&good).expect("usable");
    assert!(matches!(DEMO.known(&good), Some(Ok(_))));
    let bad = regex("[a-");
    assert!(matcher(&bad).is_err());
    assert!(matches!(DEMO.known(&bad), Some(Err(GrammarError::Invalid(_)))));
}

#[test]
fn a_regex_is_matched_whole_and_the_end_only_where_it_may_be() {
    let whole = regex(r"(GET|PUT) /[a-z]{1,8}\.txt");
    for seed in 0..20 {
        let text = text(&whole, seed).expect("an end");
        let rest = text
            .strip_prefix("GET /")
            .or(text.strip_prefix("PUT /"))
            .expect("a method");
        let name = rest.strip_suffix(".txt").expect("the end");
        assert!(
            (1..=8).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase()),
            "{text}"
        );
    }
    let mut matcher = matcher(&regex("ab")).expect("usable");
    let eos = DEMO.vocabulary().eos_ids()[0];
    assert_eq!(matcher.advance(eos), Err(GrammarError::NotAdmitted(eos)));
}

#[test]
fn a_lark_grammar_counts() {
    let balanced = lark("start: \"(\" start \")\" | \"x\"");
    for seed in 0..10 {
        let text = text(&balanced, seed).expect("an end");
        let open = text.bytes().filter(|b| *b == b'(').count();
        assert_eq!(text, format!("{}x{}", "(".repeat(open), ")".repeat(open)));
    }
}

#[test]
fn after_its_end_a_text_only_ends_again() {
    let mut matcher = matcher(&regex("x")).expect("usable");
    let eos = DEMO.vocabulary().eos_ids()[0];
    let x = matcher.admitted().expect("computable");
    matcher.advance(x[0]).expect("admitted");
    assert!(matcher.is_over());
    for _ in 0..3 {
        assert_eq!(matcher.admitted().expect("computable"), DEMO.vocabulary().eos_ids());
        matcher.advance(eos).expect("again and again");
    }
    assert_eq!(matcher.advance(x[0]), Err(GrammarError::NotAdmitted(x[0])));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// P1: the mask is a function of the tokens read, whether masks were computed on the way or not; and it is what
    /// trying every token one by one gives.
    #[test]
    fn a_replayed_matcher_has_the_same_mask(seed in 0u64..1000, cut in 1usize..40, which in 0usize..4) {
        let grammars = [
            schema(&json!({"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "number"}},
                           "required": ["name", "n"], "additionalProperties": false})),
            schema(&json!({})),
            regex(r"\w+ (is|was) [^ ]{2,6}!"),
            lark("start: \"[\" (start (\",\" start)*)? \"]\""),
        ];
        let grammar = &grammars[which];
        let mut watched = matcher(grammar).expect("usable");
        let tokens = walk(&mut watched, DEMO.vocabulary(), &mut StdRng::seed_from_u64(seed)).expect("can be followed");
        let tokens = tokens.unwrap_or_default();
        let cut = cut.min(tokens.len());
        let mut stepped = matcher(grammar).expect("usable");
        let mut replayed = matcher(grammar).expect("usable");
        for token in &tokens[..cut] {
            stepped.prepare().expect("computable");
            stepped.advance(*token).expect("admitted");
            replayed.advance(*token).expect("admitted");
        }
        let mask = replayed.admitted().expect("computable");
        prop_assert_eq!(&mask, &stepped.admitted().expect("computable"));
        let mut logits = vec![0.0; DEMO.vocabulary().len() + 5];
        replayed.apply(&mut logits).expect("computable");
        let kept: Vec<u32> = (0u32..).zip(&logits).filter(|(_, l)| **l == 0.0).map(|(id, _)| id).collect();
        prop_assert_eq!(&kept, &mask);
        // A fresh matcher takes exactly those; one token in seven keeps the test short.
        for id in (0..DEMO.vocabulary().len() as u32).skip(seed as usize % 7).step_by(7) {
            let mut one = matcher(grammar).expect("usable");
            for token in &tokens[..cut.min(3)] {
                one.advance(*token).expect("admitted");
            }
            if cut <= 3 {
                prop_assert_eq!(one.advance(id).is_ok(), mask.binary_search(&id).is_ok(), "token {}", id);
            }
        }
    }
}
