//! Sums of usage by time, kept as rows are appended, so that reports need not read rows.
//!
//! A row counts in the bucket of its replicated time, which never goes back: so what is over never changes, and a report of
//! a past day is the same whenever it is asked for. Five entries are written for a row: by minute, hour and day without
//! users, and by hour and day with users, who may be as many as rows. Minutes are kept for [`MINUTES_KEPT_MS`]; older ones, and
//! minutes by user, are added up from rows (`view::usage_report`).

use crate::calendar::{DAY_MS, HOUR_MS, MINUTE_MS};
use crate::keys;
use crate::machine::Machine;
use crate::sums::{Dimensions, Sums, set_bucket};
use crate::tables::{Tables as _, TablesError, TablesMut as _};
use baton_proto::state::{Charge, Correction, LedgerRow, UsageRecord, ledger_row::Body};
use std::ops::ControlFlow;

/// How long sums by minute are kept: a report shows at most a day of them.
pub const MINUTES_KEPT_MS: u64 = 2 * DAY_MS;

/// The tables, the width of their buckets, and whether they tell users apart.
const TABLES: [(u8, u64, bool); 5] = [
    (keys::USAGE_MINUTES, MINUTE_MS, false),
    (keys::USAGE_HOURS, HOUR_MS, false),
    (keys::USAGE_DAYS, DAY_MS, false),
    (keys::USAGE_USER_HOURS, HOUR_MS, true),
    (keys::USAGE_USER_DAYS, DAY_MS, true),
];

pub(crate) fn add_usage(machine: &mut Machine<'_>, record: &UsageRecord, charge: &Charge) -> Result<(), TablesError> {
    add(
        machine,
        &dimensions(record, &charge.currency),
        &of_usage(record, charge),
    )
}

pub(crate) fn add_correction(
    machine: &mut Machine<'_>,
    record: &UsageRecord,
    currency: &str,
    correction: &Correction,
) -> Result<(), TablesError> {
    add(machine, &dimensions(record, currency), &of_correction(correction))
}

fn add(machine: &mut Machine<'_>, dimensions: &Dimensions, sums: &Sums) -> Result<(), TablesError> {
    let mut keys = dimensions.keys();
    for (table, width_ms, with_user) in TABLES {
        let start = machine.now_ms - machine.now_ms % width_ms;
        let key = &mut keys[usize::from(with_user)];
        set_bucket(key, table, start);
        let mut total = match machine.get(key)? {
            Some(bytes) => Sums::decode(&bytes)?,
            None => Sums::default(),
        };
        total.add(sums);
        machine.put(key, &total.encode())?;
    }
    Ok(())
}

pub(crate) fn dimensions(record: &UsageRecord, currency: &str) -> Dimensions {
    Dimensions {
        project_id: record.project_id.clone(),
        key_id: record.key_id.clone(),
        model: record.model.clone(),
        service_tier: record.service_tier.clone(),
        currency: currency.to_owned(),
        user: record.user.clone(),
    }
}

fn of_usage(record: &UsageRecord, charge: &Charge) -> Sums {
    Sums {
        requests: 1,
        prompt_tokens: record.prompt_tokens.into(),
        cached_tokens: record.cached_tokens.into(),
        completion_tokens: record.completion_tokens.into(),
        input_nano: charge.input_nano.into(),
        cached_input_nano: charge.cached_input_nano.into(),
        output_nano: charge.output_nano.into(),
    }
}

fn of_correction(correction: &Correction) -> Sums {
    Sums {
        requests: 0,
        prompt_tokens: correction.prompt_tokens.into(),
        cached_tokens: correction.cached_tokens.into(),
        completion_tokens: correction.completion_tokens.into(),
        input_nano: correction.input_nano.into(),
        cached_input_nano: correction.cached_input_nano.into(),
        output_nano: correction.output_nano.into(),
    }
}

/// What a row adds, to whom. A correction counts for the request it corrects, whose row `usage_row` finds.
pub(crate) fn of_row(
    row: LedgerRow,
    usage_row: impl FnOnce(&str) -> Result<Option<LedgerRow>, TablesError>,
) -> Result<(Dimensions, Sums), TablesError> {
    let damaged = || TablesError::Corrupt("a row has no body, or corrects no usage".into());
    let charge = row.charge.unwrap_or_default();
    match row.body.ok_or_else(damaged)? {
        Body::Usage(record) => Ok((dimensions(&record, &charge.currency), of_usage(&record, &charge))),
        Body::Correction(correction) => {
            let row = usage_row(&correction.request_id)?.ok_or_else(damaged)?;
            let currency = row.charge.unwrap_or_default().currency;
            let Some(Body::Usage(record)) = row.body else {
                return Err(damaged());
            };
            Ok((dimensions(&record, &currency), of_correction(&correction)))
        }
    }
}

/// Start of the first minute whose sums are certainly there.
pub(crate) fn minutes_kept_from(now_ms: u64) -> u64 {
    now_ms.saturating_sub(MINUTES_KEPT_MS).next_multiple_of(MINUTE_MS)
}

/// Clears minutes that are no longer kept, at most `limit` entries.
pub(crate) fn clear_minutes(machine: &mut Machine<'_>, limit: usize) -> Result<(), TablesError> {
    let mut old = Vec::new();
    let to = keys::numbered(keys::USAGE_MINUTES, minutes_kept_from(machine.now_ms));
    machine.scan(&[keys::USAGE_MINUTES], &to, &mut |key, _| {
        old.push(key.to_vec());
        Ok(if old.len() < limit {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        })
    })?;
    for key in old {
        machine.delete(&key)?;
    }
    Ok(())
}
