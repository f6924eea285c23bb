//! Whatever a schema's grammar admits, a validator of JSON schemas accepts; and a schema that cannot be followed is refused
//! with a sentence.

mod common;

use baton_grammar::GrammarError;
use common::{DEMO, STEPS_MAX, generated, matcher, schema, walk, written};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::Value as Json;

/// Texts drawn from each grammar.
const TEXTS: u64 = 3;

/// How a schema fared.
#[derive(Debug, PartialEq)]
enum Fared {
    Validated,
    Refused(String),
    Failed(String),
}

fn fare(of: &Json) -> Fared {
    match matcher(&schema(of)) {
        Ok(_) => {}
        Err(GrammarError::Invalid(message) | GrammarError::TooLarge(message)) if !message.is_empty() => {
            return Fared::Refused(message);
        }
        Err(error) => return Fared::Failed(error.to_string()),
    }
    match (0..TEXTS).try_for_each(|seed| validate(of, seed)) {
        Ok(()) => Fared::Validated,
        Err(why) => Fared::Failed(why),
    }
}

fn validate(of: &Json, seed: u64) -> Result<(), String> {
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .with_format("time", is_time)
        .with_format("date-time", |text: &str| {
            text.split_once(['T', 't']).is_some_and(|(_, time)| is_time(time))
        })
        .build(of);
    let validator = validator.map_err(|error| format!("taken, but no schema: {error}"))?;
    let mut matcher = matcher(&schema(of)).map_err(|error| error.to_string())?;
    let mut rng = StdRng::seed_from_u64(seed);
    let tokens = walk(&mut matcher, DEMO.vocabulary(), &mut rng).map_err(|error| error.to_string())?;
    let tokens = tokens.ok_or_else(|| format!("no end within {STEPS_MAX} tokens"))?;
    let text = String::from_utf8(DEMO.vocabulary().text(&tokens)).map_err(|error| error.to_string())?;
    let value: Json = match serde_json::from_str(&text) {
        Ok(value) => value,
        // JSON all the same: this parser keeps numbers as f64, and a walk may write 1E4000.
        Err(error) if error.to_string().contains("number out of range") => return Ok(()),
        Err(error) => return Err(format!("{text}: {error}")),
    };
    validator.validate(&value).map_err(|error| format!("{text}: {error}"))
}

/// With a leap second in any minute: RFC 3339's grammar, which knows no calendar.
fn is_time(text: &str) -> bool {
    let (time, zone) = text.split_at(text.find(['Z', 'z', '+', '-']).unwrap_or(text.len()));
    let (clock, fraction) = time.split_at(8.min(time.len()));
    let numbers = |text: &str, below: &[u32]| {
        let parts: Vec<_> = text.split(':').map(str::parse::<u32>).collect();
        parts.len() == below.len()
            && parts
                .iter()
                .zip(below)
                .all(|(part, below)| part.as_ref().is_ok_and(|n| n < below))
    };
    let fraction = fraction.strip_prefix('.').unwrap_or(fraction);
    numbers(clock, &[24, 60, 61])
        && fraction.bytes().all(|byte| byte.is_ascii_digit())
        && (zone.eq_ignore_ascii_case("z") || zone.len() == 6 && numbers(&zone[1..], &[24, 60]))
}

/// Those of the written ones that are refused. A change of this list is a change of what clients may send.
const REFUSED: &[&str] = &[
    "applications[10]",
    "applications[11]",
    "applications[12]",
    "applications[13]",
    "applications[14]",
    "applications[15]",
    "arrays[7]",
    "arrays[8]",
    "arrays[10]",
    "enums[9]",
    "numbers[12]",
    "objects[13]",
    "references[6]",
    "references[7]",
    "references[8]",
    "references[9]",
    "references[10]",
    "references[11]",
    "strings[20]",
    "strings[21]",
    "strings[22]",
    "unions[5]",
    "unions[9]",
    "unions[10]",
    "unions[11]",
    "unions[12]",
    "unions[15]",
];

#[test]
fn every_written_schema_validates_or_is_refused() {
    let (mut refused, mut failed) = (Vec::new(), Vec::new());
    for (name, of) in written() {
        match fare(&of) {
            Fared::Validated => {}
            Fared::Refused(message) => {
                println!("{name}: {message}");
                refused.push(name);
            }
            Fared::Failed(why) => failed.push(format!("{name}: {of}\n  {why}")),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert_eq!(refused, REFUSED);
}

#[test]
fn every_generated_schema_validates() {
    let fared = generated(260).into_iter().map(|(name, of)| (name, fare(&of), of));
    let failed: Vec<_> = fared
        .filter(|(_, fared, _)| *fared != Fared::Validated)
        .map(|(name, fared, of)| format!("{name}: {of}\n  {fared:?}"))
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
