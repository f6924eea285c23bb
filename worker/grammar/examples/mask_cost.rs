//! What a grammar costs per token: time to compute a mask and to read a token, by kind of grammar, at a large vocabulary.
//!
//! ```text
//! cargo run --release -p baton-grammar --example mask_cost [-- [--json] [tokens]]
//! ```
//!
//! The vocabulary is synthetic, because none of that size is in the repository: all bytes, then words grown from the demo
//! model's by joining, with and without a leading space and in several cases, punctuation runs and numbers, as byte-pair vocabularies
//! have them, up to the number of tokens (131,072 unless told). The walks are the tests': random admitted tokens with a
//! growing wish to end, which is harder on masks than a model, which follows the most likely path.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use baton_grammar::{GrammarCompiler, Vocabulary};
use baton_proto::worker::Grammar;
use baton_proto::worker::grammar::Kind;
use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;

const TOKENS: usize = 131_072;
/// Masks measured for each grammar.
const MASKS: u64 = 5_000;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let as_json = args.iter().any(|arg| arg == "--json");
    let tokens = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(TOKENS);
    let started = Instant::now();
    let words = words(tokens);
    let vocabulary = Vocabulary::from_words(words, &[tokens as u32 - 1]).expect("usable");
    let trie = started.elapsed();
    let started = Instant::now();
    let compiler = GrammarCompiler::new(vocabulary).expect("usable");
    let slices = started.elapsed();
    if !as_json {
        println!(
            "{tokens} tokens; trie {:.0} ms, slices {:.0} ms; microseconds a token\n",
            millis(trie),
            millis(slices)
        );
        println!(
            "{:<24}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "grammar", "compile", "copy", "p50", "p90", "p99", "p99.9", "max", "read p99"
        );
    }
    for (name, grammar) in grammars() {
        measure(name, &grammar, &compiler, as_json);
    }
}

fn measure(name: &str, grammar: &Grammar, compiler: &GrammarCompiler, as_json: bool) {
    let started = Instant::now();
    let first = compiler.matcher(grammar).expect("usable");
    let compile = started.elapsed();
    drop(first);
    let started = Instant::now();
    let copies: u32 = 50;
    for _ in 0..copies {
        compiler.matcher(grammar).expect("usable");
    }
    let copy = started.elapsed() / copies;
    let mut masks = histogram();
    let mut reads = histogram();
    let mut rng = StdRng::seed_from_u64(1);
    let mut logits = vec![0.0; compiler.vocabulary().len()];
    while masks.len() < MASKS {
        let mut matcher = compiler.matcher(grammar).expect("usable");
        for at in 0..400 {
            let started = Instant::now();
            matcher.prepare().expect("can be followed");
            matcher.apply(&mut logits).expect("prepared");
            masks.saturating_record(nanos(started.elapsed()));
            logits.fill(0.0);
            let admitted = matcher.admitted().expect("prepared");
            if matcher.is_over() || (matcher.may_end() && (at > 60 || rng.random_bool(0.2))) {
                break;
            }
            let eos = compiler.vocabulary().eos_ids()[0];
            // The ids of bytes are the bytes.
            let closers = [b'"', b'}', b']'].map(u32::from);
            let closer = closers
                .into_iter()
                .find(|id| at > 60 && admitted.binary_search(id).is_ok());
            let Some(token) = closer
                .or_else(|| admitted.choose(&mut rng).copied())
                .filter(|id| *id != eos)
            else {
                break;
            };
            let started = Instant::now();
            matcher.advance(token).expect("admitted");
            reads.saturating_record(nanos(started.elapsed()));
        }
    }
    let us = |nanos: u64| nanos as f64 / 1e3;
    let of = |quantile: f64| us(masks.value_at_quantile(quantile));
    let read = us(reads.value_at_quantile(0.99));
    if as_json {
        let line = json!({
            "grammar": name, "vocabulary": compiler.vocabulary().len(), "masks": masks.len(),
            "compile_us": us(nanos(compile)), "copy_us": us(nanos(copy)),
            "mask_us": {"p50": of(0.5), "p90": of(0.9), "p99": of(0.99), "p99.9": of(0.999), "max": us(masks.max()), "mean": masks.mean() / 1e3},
            "read_us_p99": read,
        });
        println!("{line}");
    } else {
        println!(
            "{name:<24}{:>10.0}{:>10.0}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{read:>10.1}",
            us(nanos(compile)),
            us(nanos(copy)),
            of(0.5),
            of(0.9),
            of(0.99),
            of(0.999),
            us(masks.max()),
        );
    }
}

fn grammars() -> Vec<(&'static str, Grammar)> {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 8},
            "role": {"enum": ["admin", "editor", "viewer"]},
        },
        "required": ["name", "age", "email", "tags", "role"],
        "additionalProperties": false,
    });
    let wide: serde_json::Map<_, _> = (0..200)
        .map(|at| (format!("property_{at}"), json!({"type": ["string", "number", "null"]})))
        .collect();
    let tree = json!({
        "$defs": {"node": {
            "type": "object",
            "properties": {"value": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value", "children"], "additionalProperties": false,
        }},
        "$ref": "#/$defs/node",
    });
    let schema = |schema: serde_json::Value| Kind::JsonSchema(schema.to_string());
    let kinds = [
        ("any JSON", schema(json!({}))),
        ("JSON object", schema(json!({"type": "object"}))),
        ("record", schema(person)),
        (
            "200 optional properties",
            schema(json!({"type": "object", "properties": wide, "additionalProperties": false})),
        ),
        ("recursive tree", schema(tree)),
        (
            "bounded string",
            schema(json!({"type": "string", "minLength": 100, "maxLength": 300})),
        ),
        (
            "pattern",
            schema(json!({"type": "string", "pattern": "^(\\w+\\.){3,20}[a-z]{2,6}$"})),
        ),
        (
            "regex",
            Kind::Regex(r"(\d{4}-\d\d-\d\d [A-Z]+ [^\n]{1,120}\n){1,50}".to_owned()),
        ),
        (
            "arithmetic (Lark)",
            Kind::Lark(
                "start: sum\nsum: product ((\"+\" | \"-\") product)*\nproduct: atom ((\"*\" | \"/\") atom)*\n\
                 atom: NUMBER | NAME | \"(\" sum \")\"\nNUMBER: /[0-9]+(\\.[0-9]+)?/\nNAME: /[a-z_][a-z0-9_]*/"
                    .to_owned(),
            ),
        ),
    ];
    kinds
        .into_iter()
        .map(|(name, kind)| (name, Grammar { kind: Some(kind) }))
        .collect()
}

/// A vocabulary of that many tokens, the last of which ends a text.
fn words(count: usize) -> Vec<Vec<u8>> {
    let tokenizer: serde_json::Value = serde_json::from_slice(
        &std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../demo/model/tokenizer.json"))
            .expect("the demo model"),
    )
    .expect("JSON");
    let seeds: Vec<String> = tokenizer["model"]["vocab"]
        .as_object()
        .expect("a vocabulary")
        .keys()
        .filter(|word| word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_lowercase()))
        .cloned()
        .collect();
    let mut rng = StdRng::seed_from_u64(7);
    // No text has byte 0xFF.
    let mut words: Vec<Vec<u8>> = (0..255u8).map(|byte| vec![byte]).collect();
    let mut seen: HashSet<Vec<u8>> = words.iter().cloned().collect();
    while words.len() < count - 1 {
        let word = match rng.random_range(0..20) {
            0 => format!("{}", rng.random_range(0..1000)),
            1 => ["\"", "}", "]", ",", ":", "{", "[", " ", "\n", "-", "=", ")", "(", ";"]
                .choose_multiple(&mut rng, 3)
                .copied()
                .collect(),
            2 => char::from_u32(rng.random_range(0xA1..0x9FFF)).into_iter().collect(),
            _ => {
                let parts = rng.random_range(1..4);
                let text: String = (0..parts).filter_map(|_| seeds.choose(&mut rng)).cloned().collect();
                let text = match rng.random_range(0..6) {
                    0 => text.to_uppercase(),
                    1 => text[..1].to_uppercase() + &text[1..],
                    _ => text,
                };
                if rng.random_bool(0.5) { format!(" {text}") } else { text }
            }
        };
        if seen.insert(word.clone().into_bytes()) {
            words.push(word.into_bytes());
        }
    }
    words.push(b"\xFF<end>".to_vec());
    words
}

/// Of nanoseconds, up to ten seconds.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 10_000_000_000, 3).expect("in range")
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
