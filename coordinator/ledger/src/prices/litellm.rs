//! LiteLLM's `model_prices_and_context_window.json`: prices per token as JSON numbers such as `1.5e-07`. The numbers are read
//! as text, digit by digit, so that no float comes between.
//!
//! Taken are the input, output and cached input prices of models that generate text, and those of batches. Prices that
//! depend on the length of the prompt, of audio and images, of cache writes and of other tiers have no place in our list; a
//! model that has a dearer price for long prompts is named in the notes.

use super::{BATCH_TIER, DEFAULT_TIER, PriceError, finish};
use crate::money::{MoneyError, parse_price_per_token, round_price_per_token};
use baton_proto::state::Price;
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// The entry that explains the file.
const SAMPLE: &str = "sample_spec";
/// Modes of models that take and give tokens.
const MODES: [&str; 4] = ["chat", "completion", "responses", "embedding"];

/// How to import.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Which models, and what they are called here. Empty: all, under their own names.
    pub models: BTreeMap<String, String>,
    /// Start of the prices.
    pub effective_from_unix_ms: u64,
    /// Round what is finer than a nano-unit per million tokens; otherwise such a model is left out and named.
    pub round: bool,
}

/// What was read.
#[derive(Debug, Default, PartialEq)]
pub struct Imported {
    /// By model, then tier.
    pub prices: Vec<Price>,
    /// Models that were left out or taken in part, and why.
    pub notes: Vec<(String, String)>,
}

/// Reads the file.
///
/// # Errors
/// [`PriceError`] if it is none, or if a model that was asked for is not in it. What is odd about single models is noted.
pub fn import(text: &str, settings: &Settings) -> Result<Imported, PriceError> {
    let file: BTreeMap<String, &RawValue> = serde_json::from_str(text)?;
    if let Some(missing) = settings.models.keys().find(|name| !file.contains_key(*name)) {
        return Err(PriceError::Price {
            model: missing.clone(),
            problem: "LiteLLM's list has no such model",
        });
    }
    let mut imported = Imported::default();
    for (name, entry) in file {
        let here = match settings.models.get(&name) {
            Some(here) => here.clone(),
            None if settings.models.is_empty() && name != SAMPLE => name.clone(),
            None => continue,
        };
        match model(&here, entry, settings) {
            Ok((prices, note)) => {
                imported.prices.extend(prices);
                imported.notes.extend(note.map(|note| (name, note)));
            }
            Err(note) => imported.notes.push((name, note)),
        }
    }
    Ok(imported)
}

type Fields<'a> = BTreeMap<String, &'a RawValue>;

/// The prices of one model, or why there are none.
fn model(name: &str, entry: &RawValue, settings: &Settings) -> Result<(Vec<Price>, Option<String>), String> {
    let fields: Fields<'_> = serde_json::from_str(entry.get()).map_err(|_| "not an object".to_owned())?;
    let mode = fields.get("mode").map_or("chat", |mode| mode.get().trim_matches('"'));
    if !MODES.contains(&mode) {
        return Err(format!("its mode is {mode}, which is not billed by tokens here"));
    }
    let price = |field: &str| amount(&fields, field, settings.round);
    let (Some(input), output) = (price("input_cost_per_token")?, price("output_cost_per_token")?) else {
        return Err("it has no input_cost_per_token".to_owned());
    };
    let Some(output) = output.or((mode == "embedding").then_some(0)) else {
        return Err("it has no output_cost_per_token".to_owned());
    };
    let cached = price("cache_read_input_token_cost")?.unwrap_or(input);
    let mut prices = vec![make(name, DEFAULT_TIER, [input, cached, output], settings)?];
    if let Some(input) = price("input_cost_per_token_batches")? {
        let output = price("output_cost_per_token_batches")?.unwrap_or(output);
        // Nothing is said of cached tokens in batches: they cost at most what they cost elsewhere.
        prices.push(make(name, BATCH_TIER, [input, cached.min(input), output], settings)?);
    }
    let longer = fields.keys().find(|field| field.contains("cost_per_token_above_"));
    Ok((
        prices,
        longer.map(|field| format!("{field} was left out: prices here do not depend on the prompt's length")),
    ))
}

fn make(name: &str, tier: &str, [input, cached, output]: [u64; 3], settings: &Settings) -> Result<Price, String> {
    let price = Price {
        model: name.to_owned(),
        service_tier: tier.to_owned(),
        currency: "USD".to_owned(),
        input_nano_per_mtok: input,
        cached_input_nano_per_mtok: cached,
        output_nano_per_mtok: output,
        effective_from_unix_ms: settings.effective_from_unix_ms,
        ..Price::default()
    };
    finish(price).map_err(|error| error.to_string())
}

/// An amount per token in nano-units per million, nothing where the field is missing or null.
fn amount(fields: &Fields<'_>, field: &str, round: bool) -> Result<Option<u64>, String> {
    let Some(text) = fields
        .get(field)
        .map(|value| value.get().trim_matches('"'))
        .filter(|text| *text != "null")
    else {
        return Ok(None);
    };
    let read: Result<u64, MoneyError> = if round {
        round_price_per_token(text)
    } else {
        parse_price_per_token(text)
    };
    read.map(Some).map_err(|error| format!("{field}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In the shape of the real file, with its ways of writing numbers.
    const FILE: &str = r#"{
        "sample_spec": {"input_cost_per_token": 0.0, "mode": "one of: chat, embedding, ..."},
        "gpt-x": {
            "input_cost_per_token": 2.5e-06, "output_cost_per_token": 1e-05, "cache_read_input_token_cost": 1.25e-06,
            "input_cost_per_token_batches": 1.25e-06, "output_cost_per_token_batches": 5e-06,
            "max_tokens": 16384, "mode": "chat", "supports_vision": true
        },
        "mini": {"input_cost_per_token": 0.00000015, "output_cost_per_token": 6e-7, "mode": "chat"},
        "vectors": {"input_cost_per_token": 2e-08, "output_cost_per_token": null, "mode": "embedding"},
        "long": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "input_cost_per_token_above_200k_tokens": 2e-6, "mode": "chat"},
        "noisy": {"input_cost_per_token": 3.5000000000000004e-07, "output_cost_per_token": 1e-06, "mode": "chat"},
        "pictures": {"input_cost_per_image": 0.04, "mode": "image_generation"},
        "free": {"mode": "chat"}
    }"#;

    fn find<'a>(imported: &'a Imported, model: &str, tier: &str) -> &'a Price {
        imported
            .prices
            .iter()
            .find(|price| price.model == model && price.service_tier == tier)
            .expect("imported")
    }

    #[test]
    fn prices_are_read_to_the_digit() {
        let imported = import(
            FILE,
            &Settings {
                effective_from_unix_ms: 5,
                ..Settings::default()
            },
        )
        .expect("the file");
        let amounts = |model, tier| {
            let price = find(&imported, model, tier);
            assert_eq!((price.currency.as_str(), price.effective_from_unix_ms), ("USD", 5));
            [
                price.input_nano_per_mtok,
                price.cached_input_nano_per_mtok,
                price.output_nano_per_mtok,
            ]
        };
        assert_eq!(
            amounts("gpt-x", "default"),
            [2_500_000_000, 1_250_000_000, 10_000_000_000]
        );
        assert_eq!(amounts("gpt-x", "batch"), [1_250_000_000, 1_250_000_000, 5_000_000_000]);
        assert_eq!(amounts("mini", "default"), [150_000_000, 150_000_000, 600_000_000]);
        assert_eq!(amounts("vectors", "default"), [20_000_000, 20_000_000, 0]);
        assert_eq!(
            amounts("long", "default"),
            [1_000_000_000, 1_000_000_000, 2_000_000_000]
        );
        assert_eq!(imported.prices.len(), 5);
        let noted: Vec<&str> = imported.notes.iter().map(|(model, _)| model.as_str()).collect();
        assert_eq!(noted, ["free", "long", "noisy", "pictures"]);
    }

    #[test]
    fn models_are_chosen_renamed_and_rounded() {
        let models = BTreeMap::from([("noisy".to_owned(), "demo".to_owned())]);
        let settings = Settings {
            models,
            round: true,
            ..Settings::default()
        };
        let imported = import(FILE, &settings).expect("the file");
        assert_eq!((imported.prices.len(), imported.notes.len()), (1, 0));
        assert_eq!(find(&imported, "demo", "default").input_nano_per_mtok, 350_000_000);
        let missing = Settings {
            models: BTreeMap::from([("none".into(), "x".into())]),
            ..Settings::default()
        };
        assert!(import(FILE, &missing).is_err());
        assert!(import("[]", &Settings::default()).is_err());
    }
}
