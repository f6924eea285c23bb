//! What the tests of grammars share: the demo model's vocabulary, the corpus of schemas, and a walk through a grammar.
#![allow(dead_code)] // each test file uses some of it

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use baton_grammar::vocabulary::eos_ids;
use baton_grammar::{COMPILE_STACK_BYTES, GrammarCompiler, GrammarError, TokenMatcher, Vocabulary};
use baton_proto::worker::Grammar;
use baton_proto::worker::grammar::Kind;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value as Json, json};

/// Over the vocabulary of the model in the repository.
pub static DEMO: LazyLock<GrammarCompiler> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model");
    let vocabulary = Vocabulary::load(&dir, &eos_ids(&dir)).expect("the demo model has a byte-level tokenizer");
    GrammarCompiler::new(vocabulary).expect("usable")
});

pub fn schema(schema: &Json) -> Grammar {
    Grammar {
        kind: Some(Kind::JsonSchema(schema.to_string())),
    }
}

pub fn regex(regex: &str) -> Grammar {
    Grammar {
        kind: Some(Kind::Regex(regex.to_owned())),
    }
}

pub fn lark(lark: &str) -> Grammar {
    Grammar {
        kind: Some(Kind::Lark(lark.to_owned())),
    }
}

/// Compiles on a thread as a worker does.
pub fn matcher(grammar: &Grammar) -> Result<TokenMatcher, GrammarError> {
    std::thread::scope(|scope| {
        let compile = || DEMO.matcher(grammar);
        let thread = std::thread::Builder::new().stack_size(COMPILE_STACK_BYTES);
        let thread = thread.spawn_scoped(scope, compile).expect("a thread");
        thread.join().expect("compiling does not panic")
    })
}

/// Schemas written by hand, by the name of their file and their place in it.
pub fn written() -> Vec<(String, Json)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemas");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("is there")
        .map(|entry| entry.expect("readable").path())
        .collect();
    paths.sort();
    let mut schemas = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).expect("readable");
        let all: Vec<Json> = serde_json::from_str(&text).expect("a list of schemas");
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        schemas.extend(
            all.into_iter()
                .enumerate()
                .map(|(at, schema)| (format!("{name}[{at}]"), schema)),
        );
    }
    schemas
}

/// Schemas put together at random: nesting, enums, patterns, references, recursion, unions, ranges.
pub fn generated(count: u64) -> Vec<(String, Json)> {
    (0..count)
        .map(|seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut schema = value(&mut rng, 4);
            if let Some(fields) = schema.as_object_mut() {
                fields.insert("$defs".to_owned(), defs(&mut rng));
            }
            (format!("generated {seed}"), schema)
        })
        .collect()
}

fn defs(rng: &mut StdRng) -> Json {
    json!({
        "leaf": value(rng, 0),
        "list": {"anyOf": [{"type": "null"}, {
            "type": "object",
            "properties": {"head": value(rng, 0), "tail": {"$ref": "#/$defs/list"}},
            "required": ["head", "tail"],
            "additionalProperties": false,
        }]},
        "tree": {
            "type": "object",
            "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
            "required": ["of"],
            "additionalProperties": false,
        },
    })
}

fn value(rng: &mut StdRng, depth: u32) -> Json {
    let leaves = 9;
    match rng.random_range(0..if depth == 0 { leaves } else { leaves + 6 }) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let low = rng.random_range(-2000..2000);
            json!({"type": "integer", "minimum": low, "maximum": low + rng.random_range(0..5000)})
        }
        3 => {
            let low = f64::from(rng.random_range(-400..400)) / 8.0;
            json!({"type": "number", "minimum": low, "exclusiveMaximum": low + f64::from(rng.random_range(1..99))})
        }
        4 => {
            let words = ["alpha", "beta", "g\"amma", "ε", "", "delta delta", "10"];
            let some: Vec<_> = words.choose_multiple(rng, 3).collect();
            json!({"enum": some})
        }
        5 => json!({"const": rng.random_range(0..1_000_000)}),
        6 => {
            let patterns = [
                "^[A-Z]{2}[0-9]{1,6}$",
                "^(yes|no|may(be)?)$",
                "^[^a-z]{1,5}$",
                "^\\w+@\\w+$",
                "^ab?c$",
            ];
            json!({"type": "string", "pattern": patterns.choose(rng)})
        }
        7 => {
            let least = rng.random_range(0..5);
            json!({"type": "string", "minLength": least, "maxLength": least + rng.random_range(0..20)})
        }
        8 => {
            let formats = ["date", "uuid", "ipv4", "time"];
            json!({"type": "string", "format": formats.choose(rng)})
        }
        9 | 10 => {
            let names: Vec<String> = (0..rng.random_range(0..6)).map(|at| format!("field_{at}")).collect();
            let properties: serde_json::Map<_, _> =
                names.iter().map(|name| (name.clone(), value(rng, depth - 1))).collect();
            let required: Vec<_> = names.iter().filter(|_| rng.random_bool(0.6)).collect();
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
        11 => {
            let least = rng.random_range(0..3);
            json!({"type": "array", "items": value(rng, depth - 1), "minItems": least, "maxItems": least + 3})
        }
        12 => json!({"anyOf": [value(rng, depth - 1), value(rng, depth - 1), {"type": "null"}]}),
        13 => {
            let names = ["#/$defs/leaf", "#/$defs/list", "#/$defs/tree"];
            json!({"$ref": names.choose(rng)})
        }
        _ => json!({"type": "array", "prefixItems": [value(rng, depth - 1), value(rng, depth - 1)], "items": false,
                    "minItems": 2}),
    }
}

/// Tokens after which a walk wants to come to an end.
const PATIENCE: usize = 60;
/// Tokens after which it is given up.
pub const STEPS_MAX: usize = 2000;

/// A text that the grammar admits, of tokens drawn at random with a growing wish to end. The last token ends the text.
/// `None` if it found no end.
pub fn walk(
    matcher: &mut TokenMatcher,
    vocabulary: &Vocabulary,
    rng: &mut StdRng,
) -> Result<Option<Vec<u32>>, GrammarError> {
    let mut tokens = Vec::new();
    while tokens.len() < STEPS_MAX {
        let admitted = matcher.admitted()?;
        let eos = admitted.iter().copied().find(|id| vocabulary.eos_ids().contains(id));
        let tired = tokens.len() > PATIENCE;
        let token = match eos {
            Some(eos) if tired || admitted.len() == 1 || rng.random_bool(0.3) => eos,
            _ => {
                let text: Vec<u32> = admitted.into_iter().filter(|id| Some(*id) != eos).collect();
                let closing = |id: &&u32| {
                    let text = vocabulary.text(&[**id]);
                    let starts = text.first().is_some_and(|byte| b"\"]}n".contains(byte));
                    tired && starts && text.len() <= 4
                };
                let closers: Vec<u32> = text.iter().filter(closing).copied().collect();
                // Where no closer helps, a character does in the end.
                let short: Vec<u32> = text
                    .iter()
                    .copied()
                    .filter(|id| vocabulary.text(&[*id]).len() == 1)
                    .collect();
                let from = match () {
                    () if !closers.is_empty() && rng.random_bool(0.6) => &closers,
                    () if tired && !short.is_empty() => &short,
                    () => &text,
                };
                *from.choose(rng).expect("something is admitted")
            }
        };
        matcher.advance(token)?;
        tokens.push(token);
        if Some(token) == eos {
            return Ok(Some(tokens));
        }
    }
    Ok(None)
}
