//! Our own price list, as TOML: what people write and review. Amounts are strings, so that they are read as they stand.
//!
//! ```toml
//! [[price]]
//! model = "demo"                           # or "*" for all models without a price of their own
//! service_tier = "default"                 # this is the default
//! currency = "USD"                         # this too
//! input = "20"                             # per million tokens
//! cached_input = "5"                       # as input, if left out
//! output = "80"
//! effective_from = 2026-01-01T00:00:00Z    # when the list is imported, if left out
//! effective_to = 2027-01-01T00:00:00Z      # open, if left out
//! ```

use super::{DEFAULT_TIER, PriceError, finish};
use crate::export::rfc3339;
use crate::money::{Nano, parse_price_per_mtok};
use baton_proto::state::Price;
use serde::Deserialize;
use std::fmt::Write;
use toml::value::{Datetime, Offset};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    price: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    model: String,
    #[serde(default = "default_tier")]
    service_tier: String,
    #[serde(default = "default_currency")]
    currency: String,
    input: String,
    cached_input: Option<String>,
    output: String,
    effective_from: Option<Datetime>,
    effective_to: Option<Datetime>,
}

fn default_tier() -> String {
    DEFAULT_TIER.to_owned()
}

fn default_currency() -> String {
    "USD".to_owned()
}

/// Reads a list. `now_unix_ms` is the start of prices that name none.
///
/// # Errors
/// [`PriceError`], naming the model.
pub fn parse(text: &str, now_unix_ms: u64) -> Result<Vec<Price>, PriceError> {
    let list: List = toml::from_str(text)?;
    list.price.into_iter().map(|entry| read(entry, now_unix_ms)).collect()
}

fn read(entry: Entry, now_unix_ms: u64) -> Result<Price, PriceError> {
    let model = entry.model;
    let amount = |field, text: &str| {
        parse_price_per_mtok(text).map_err(|error| PriceError::Amount {
            model: model.clone(),
            field,
            error,
        })
    };
    let time = |time: Option<Datetime>, default| match time {
        None => Ok(default),
        Some(time) => unix_ms(&time).ok_or(PriceError::Price {
            model: model.clone(),
            problem: "a time is a date, or a date and time with offset such as 2026-01-01T00:00:00Z, from 1970 on",
        }),
    };
    finish(Price {
        id: String::new(),
        input_nano_per_mtok: amount("input", &entry.input)?,
        cached_input_nano_per_mtok: amount("cached_input", entry.cached_input.as_ref().unwrap_or(&entry.input))?,
        output_nano_per_mtok: amount("output", &entry.output)?,
        effective_from_unix_ms: time(entry.effective_from, now_unix_ms)?,
        effective_to_unix_ms: time(entry.effective_to, 0)?,
        model,
        service_tier: entry.service_tier,
        currency: entry.currency,
    })
}

/// Of a date, its first moment in UTC; of a date and time, it needs an offset.
fn unix_ms(time: &Datetime) -> Option<u64> {
    let date = time.date?;
    let month = time::Month::try_from(date.month).ok()?;
    let date = time::Date::from_calendar_date(date.year.into(), month, date.day).ok()?;
    let (clock, offset_min) = match (time.time, time.offset) {
        (None, None) => (time::Time::MIDNIGHT, 0),
        (Some(clock), Some(offset)) => {
            let nanosecond = clock.nanosecond;
            let clock = time::Time::from_hms_nano(clock.hour, clock.minute, clock.second, nanosecond);
            let offset_min = match offset {
                Offset::Z => 0,
                Offset::Custom { minutes } => i128::from(minutes),
            };
            (clock.ok()?, offset_min)
        }
        _ => return None,
    };
    let nanoseconds = date.with_time(clock).assume_utc().unix_timestamp_nanos();
    u64::try_from(nanoseconds / 1_000_000 - offset_min * 60_000).ok()
}

/// Writes a list that [`parse`] reads back to the same prices.
pub fn print(prices: &[Price]) -> String {
    let quote = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut out = String::new();
    for price in prices {
        let amount = |nano: u64| Nano::from(nano).to_string();
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "[[price]]\nmodel = {}\nservice_tier = {}\ncurrency = {}\ninput = \"{}\"\ncached_input = \"{}\"\noutput = \"{}\"\n\
             effective_from = {}\n",
            quote(&price.model),
            quote(&price.service_tier),
            quote(&price.currency),
            amount(price.input_nano_per_mtok),
            amount(price.cached_input_nano_per_mtok),
            amount(price.output_nano_per_mtok),
            rfc3339(price.effective_from_unix_ms),
        );
        if price.effective_to_unix_ms != 0 {
            let _ = writeln!(out, "effective_to = {}", rfc3339(price.effective_to_unix_ms));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_written() {
        let text = r#"
            [[price]]
            model = "demo"
            input = "20"
            output = "$80.00"

            [[price]]
            model = "*"
            service_tier = "batch"
            currency = "EUR"
            input = "0.15"
            cached_input = "0.000000001"
            output = "0.6"
            effective_from = 2026-01-01T02:00:00+02:00
            effective_to = 2027-01-01
        "#;
        let prices = parse(text, 1_764_000_000_501).expect("a list");
        assert_eq!(prices.len(), 2);
        assert_eq!(
            (prices[0].input_nano_per_mtok, prices[0].cached_input_nano_per_mtok),
            (20_000_000_000, 20_000_000_000)
        );
        assert_eq!(
            (prices[0].output_nano_per_mtok, prices[0].effective_from_unix_ms),
            (80_000_000_000, 1_764_000_000_501)
        );
        assert_eq!(
            (prices[1].cached_input_nano_per_mtok, prices[1].currency.as_str()),
            (1, "EUR")
        );
        assert_eq!(prices[1].effective_from_unix_ms, 1_767_225_600_000);
        assert_eq!(prices[1].effective_to_unix_ms, 1_798_761_600_000);
        assert_eq!(parse(&print(&prices), 0).expect("its own"), prices);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| parse(text, 0).expect_err("wrong").to_string();
        let entry = |rest: &str| format!("[[price]]\nmodel = \"demo\"\n{rest}");
        assert!(error(&entry("input = 0.1\noutput = \"1\"")).contains("string"));
        assert!(error(&entry("input = \"x\"\noutput = \"1\"")).contains("demo, input"));
        assert!(
            error(&entry(
                "input = \"1\"\noutput = \"1\"\neffective_from = 2026-01-01T00:00:00"
            ))
            .contains("offset")
        );
        assert!(error(&entry("input = \"1\"\noutput = \"1\"\ndiscount = \"1\"")).contains("discount"));
        assert!(error(&entry("input = \"1\"")).contains("output"));
    }
}
