//! Sums over rows, corrections included, per currency. Exact: 128 bits hold 2⁶⁴ charges of 64 bits.

use crate::money::Nano;
use baton_proto::state::{LedgerRow, ledger_row::Body};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What rows add up to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// Usage records.
    pub requests: u64,
    /// Corrections.
    pub corrections: u64,
    /// Prompt tokens.
    pub prompt_tokens: i64,
    /// Of them, cached.
    pub cached_tokens: i64,
    /// Delivered tokens.
    pub completion_tokens: i64,
    /// Money by currency; that of rows without a price (`""`) is zero and left out.
    pub currencies: BTreeMap<String, Amounts>,
}

/// Nano-units by class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Amounts {
    /// Uncached input.
    #[serde(with = "crate::json::nano")]
    pub input_nano: i128,
    /// Cached input.
    #[serde(with = "crate::json::nano")]
    pub cached_input_nano: i128,
    /// Output.
    #[serde(with = "crate::json::nano")]
    pub output_nano: i128,
}

impl Amounts {
    /// Of a row: its charge, or what a correction changes.
    pub fn of(row: &LedgerRow) -> Self {
        let charge = row.charge.clone().unwrap_or_default();
        let change = match &row.body {
            Some(Body::Correction(c)) => [c.input_nano, c.cached_input_nano, c.output_nano],
            _ => [0; 3],
        };
        Self {
            input_nano: i128::from(charge.input_nano) + i128::from(change[0]),
            cached_input_nano: i128::from(charge.cached_input_nano) + i128::from(change[1]),
            output_nano: i128::from(charge.output_nano) + i128::from(change[2]),
        }
    }

    /// All classes together.
    pub fn total(&self) -> Nano {
        Nano(self.input_nano + self.cached_input_nano + self.output_nano)
    }
}

impl Totals {
    /// Takes a row.
    pub fn add(&mut self, row: &LedgerRow) {
        let tokens = match &row.body {
            Some(Body::Usage(record)) => {
                self.requests += 1;
                [record.prompt_tokens, record.cached_tokens, record.completion_tokens].map(i64::from)
            }
            Some(Body::Correction(change)) => {
                self.corrections += 1;
                [change.prompt_tokens, change.cached_tokens, change.completion_tokens]
            }
            None => [0; 3],
        };
        // A forged correction may say anything; sums of honest ones are far from these limits.
        self.prompt_tokens = self.prompt_tokens.saturating_add(tokens[0]);
        self.cached_tokens = self.cached_tokens.saturating_add(tokens[1]);
        self.completion_tokens = self.completion_tokens.saturating_add(tokens[2]);
        let amounts = Amounts::of(row);
        let currency = row.charge.as_ref().map_or("", |charge| charge.currency.as_str());
        if currency.is_empty() && amounts == Amounts::default() {
            return;
        }
        // The lookup first: a currency is new once, and its name need not be copied for every row.
        let sum = match self.currencies.get_mut(currency) {
            Some(sum) => sum,
            None => self.currencies.entry(currency.to_owned()).or_default(),
        };
        sum.input_nano += amounts.input_nano;
        sum.cached_input_nano += amounts.cached_input_nano;
        sum.output_nano += amounts.output_nano;
    }
}
