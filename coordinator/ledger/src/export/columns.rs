//! The flat shape of a row: one table of columns that CSV, Parquet and PostgreSQL share. Money is in whole units of the
//! currency with nine decimal places, exactly; a correction has differences.

use super::{ExportError, Flat, rfc3339};
use crate::money::Nano;
use crate::totals::Amounts;
use baton_proto::state::LedgerRow;

impl Kind {
    /// Whether there may be nothing.
    pub const fn is_optional(self) -> bool {
        matches!(self, Self::OptionalInteger | Self::OptionalTime)
    }
}

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text, empty where there is none.
    Text,
    /// A whole number of 63 bits and a sign.
    Integer,
    /// The same, or nothing.
    OptionalInteger,
    /// A decimal with nine places.
    Money,
    /// A moment in UTC, to the millisecond.
    Time,
    /// The same, or nothing.
    OptionalTime,
}

/// One value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Of a [`Kind::Text`] column.
    Text(String),
    /// Of a [`Kind::Integer`] or [`Kind::OptionalInteger`] column.
    Integer(i64),
    /// Of a [`Kind::Money`] column.
    Money(Nano),
    /// Of a [`Kind::Time`] or [`Kind::OptionalTime`] column: milliseconds of Unix time.
    Time(i64),
    /// Nothing, where that may be.
    None,
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Integer(number) => number.fmt(f),
            Self::Money(amount) => amount.fmt(f),
            Self::Time(unix_ms) => f.write_str(&rfc3339(unix_ms.unsigned_abs())),
            Self::None => Ok(()),
        }
    }
}

/// Names and kinds, in order.
pub const COLUMNS: [(&str, Kind); 38] = [
    ("sequence", Kind::Integer),
    ("raft_index", Kind::Integer),
    ("at", Kind::Time),
    ("kind", Kind::Text),
    ("request_id", Kind::Text),
    ("status", Kind::Text),
    ("model", Kind::Text),
    ("revision", Kind::Text),
    ("endpoint", Kind::Text),
    ("service_tier", Kind::Text),
    ("organization_id", Kind::Text),
    ("project_id", Kind::Text),
    ("key_id", Kind::Text),
    ("user_id", Kind::Text),
    ("prompt_tokens", Kind::Integer),
    ("cached_tokens", Kind::Integer),
    ("completion_tokens", Kind::Integer),
    ("reasoning_tokens", Kind::Integer),
    ("accepted_prediction_tokens", Kind::Integer),
    ("rejected_prediction_tokens", Kind::Integer),
    ("sampled_tokens", Kind::Integer),
    ("attempts", Kind::Integer),
    ("prefill_worker_id", Kind::Text),
    ("decode_worker_id", Kind::Text),
    ("started_at", Kind::OptionalTime),
    ("settled_at", Kind::OptionalTime),
    ("price_id", Kind::Text),
    ("currency", Kind::Text),
    ("input_cost", Kind::Money),
    ("cached_input_cost", Kind::Money),
    ("output_cost", Kind::Money),
    ("total_cost", Kind::Money),
    ("corrects_sequence", Kind::OptionalInteger),
    ("correction_id", Kind::Text),
    ("reason", Kind::Text),
    ("id", Kind::Text),
    ("previous_hash", Kind::Text),
    ("hash", Kind::Text),
];

/// The values of a row, in the order of [`COLUMNS`].
///
/// # Errors
/// [`ExportError::Row`] for a row without body or with a number beyond 63 bits.
pub fn values(row: &LedgerRow) -> Result<Vec<Value>, ExportError> {
    let flat = Flat::of(row)?;
    let (usage, charge, correction) = (&flat.usage, &flat.charge, flat.correction);
    let integer = |number: u64| {
        let fits = i64::try_from(number).map(Value::Integer);
        fits.map_err(|_| ExportError::Row(row.sequence, "a number is beyond 63 bits"))
    };
    let time = |unix_ms: u64| {
        let fits = i64::try_from(unix_ms).map(Value::Time);
        fits.map_err(|_| ExportError::Row(row.sequence, "a time is beyond 63 bits"))
    };
    let optional_time = |unix_ms: u64| if unix_ms == 0 { Ok(Value::None) } else { time(unix_ms) };
    let text = |text: &str| Value::Text(text.to_owned());
    let amounts = Amounts::of(row);
    let money = |nano: i128| Value::Money(Nano(nano));
    Ok(vec![
        integer(row.sequence)?,
        integer(row.raft_index)?,
        time(row.at_unix_ms)?,
        text(flat.kind()),
        text(&usage.request_id),
        Value::Text(flat.status()),
        text(&usage.model),
        text(&usage.revision),
        text(&usage.endpoint),
        text(&usage.service_tier),
        text(&usage.organization_id),
        text(&usage.project_id),
        text(&usage.key_id),
        text(&usage.user),
        Value::Integer(flat.prompt_tokens),
        Value::Integer(flat.cached_tokens),
        Value::Integer(flat.completion_tokens),
        Value::Integer(usage.reasoning_tokens.into()),
        Value::Integer(usage.accepted_prediction_tokens.into()),
        Value::Integer(usage.rejected_prediction_tokens.into()),
        Value::Integer(usage.sampled_tokens.into()),
        Value::Integer(usage.attempts.into()),
        text(&usage.prefill_worker_id),
        text(&usage.decode_worker_id),
        optional_time(usage.started_unix_ms)?,
        optional_time(usage.settled_unix_ms)?,
        text(&charge.price_id),
        text(&charge.currency),
        money(amounts.input_nano),
        money(amounts.cached_input_nano),
        money(amounts.output_nano),
        Value::Money(amounts.total()),
        correction.map_or(Ok(Value::None), |correction| integer(correction.sequence))?,
        text(correction.map_or("", |correction| &correction.correction_id)),
        text(correction.map_or("", |correction| &correction.reason)),
        Value::Text(crate::hex(&row.id)),
        Value::Text(crate::hex(&row.previous_hash)),
        Value::Text(crate::hex(&row.hash)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_kinds_of_their_columns() {
        for row in crate::tests::ledger(5).rows {
            let values = values(&row).expect("exportable");
            assert_eq!(values.len(), COLUMNS.len());
            for (value, (name, kind)) in values.iter().zip(COLUMNS) {
                let matches = matches!(
                    (value, kind),
                    (Value::Text(_), Kind::Text)
                        | (Value::Integer(_), Kind::Integer | Kind::OptionalInteger)
                        | (Value::Time(_), Kind::Time | Kind::OptionalTime)
                        | (Value::None, Kind::OptionalInteger | Kind::OptionalTime)
                        | (Value::Money(_), Kind::Money)
                );
                assert!(matches, "{name}: {value:?}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut row = crate::tests::ledger(1).rows.remove(0);
        row.raft_index = u64::MAX;
        assert!(matches!(values(&row), Err(ExportError::Row(1, _))));
        row.body = None;
        assert!(matches!(values(&row), Err(ExportError::Row(1, _))));
    }
}
