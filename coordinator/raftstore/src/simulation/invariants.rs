//! What must hold of the tables at every moment, computed anew from what is in them.

use super::admin::Admin;
use super::books::Books;
use super::oracle::{Checked, Delivered, Violation, violation};
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, checkpoint, row};
use baton_proto::state::{LedgerRow, ledger_row::Body};
use baton_state::{MemoryTables, TablesError, view};
use std::collections::{BTreeMap, BTreeSet};

impl From<TablesError> for Violation {
    fn from(error: TablesError) -> Self {
        Self(format!("the tables cannot be read: {error}"))
    }
}

pub(super) fn check(
    tables: &MemoryTables,
    delivered: &BTreeMap<String, Delivered>,
    books: &Books,
    admin: &Admin,
    verified: &mut u64,
) -> Checked {
    let mut rows = Vec::new();
    loop {
        let page = view::rows_after(tables, rows.len() as u64, 1000)?;
        if page.is_empty() {
            break;
        }
        rows.extend(page);
    }
    chain(&rows)?;
    once(&rows)?;
    periods(tables, &rows, verified)?;
    corrections(tables, &rows)?;
    admin.check(tables)?;
    books.check(tables, &rows)?;
    witnesses(&rows, delivered)
}

/// Gateway and sampler count apart: nothing is billed that was not sampled, or not delivered.
fn witnesses(rows: &[LedgerRow], delivered: &BTreeMap<String, Delivered>) -> Checked {
    for row in rows {
        let Some(Body::Usage(record)) = &row.body else { continue };
        let known = delivered.get(&record.request_id).map_or(0, |known| known.tokens);
        let (billed, sampled) = (record.completion_tokens, record.sampled_tokens);
        if billed != known || billed > sampled {
            return violation(format!(
                "request {} is billed {billed} tokens, of {sampled} sampled and {known} delivered",
                record.request_id
            ));
        }
    }
    Ok(())
}

/// Numbers without gaps, each row on the hash of the one before.
fn chain(rows: &[LedgerRow]) -> Checked {
    let mut hash = GENESIS;
    for (row, sequence) in rows.iter().zip(1..) {
        if row.sequence != sequence {
            return violation(format!("row {sequence} has number {}", row.sequence));
        }
        if row.previous_hash != hash.as_slice() {
            return violation(format!("row {sequence} does not follow the one before"));
        }
        hash = row::row_hash(row);
        let id = row.body.as_ref().map(row::body_id);
        if row.hash != hash.as_slice() || id.is_none_or(|id| row.id != id.as_slice()) {
            return violation(format!("row {sequence} was edited"));
        }
    }
    Ok(())
}

/// One row for each request, correction and idempotency key.
fn once(rows: &[LedgerRow]) -> Checked {
    let mut seen = BTreeSet::new();
    for row in rows {
        let (id, key) = match &row.body {
            Some(Body::Usage(record)) => (
                format!("request {}", record.request_id),
                record.idempotency_key_sha256.to_vec(),
            ),
            Some(Body::Correction(correction)) => (format!("correction {}", correction.correction_id), Vec::new()),
            None => return violation(format!("row {} is empty", row.sequence)),
        };
        if !seen.insert(id.clone().into_bytes()) {
            return violation(format!("{id} has two rows"));
        }
        // The ledger's day of a run is shorter than keys are remembered.
        if !key.is_empty() && !seen.insert([b"key ".as_slice(), &key].concat()) {
            return violation(format!("{id} has an idempotency key that another has"));
        }
    }
    Ok(())
}

/// Seals verify, and say what the rows say. Up to `verified` they did.
fn periods(tables: &MemoryTables, rows: &[LedgerRow], verified: &mut u64) -> Checked {
    let mut last = None;
    for period in view::checkpoints_after(tables, 0, 1000)? {
        if period.last_sequence > *verified {
            checkpoint::verify_after(&period, last.as_ref())
                .map_err(|error| Violation(format!("a seal does not verify: {error}")))?;
            *verified = period.last_sequence;
        }
        let of = &rows[period.first_sequence as usize - 1..period.last_sequence as usize];
        let mut tree = Frontier::default();
        for row in of {
            tree.push(&row::row_hash(row));
        }
        if period.merkle_root != tree.root().as_slice() || of.last().is_none_or(|row| period.last_hash != row.hash) {
            return violation(format!("the period up to {} is not its rows'", period.last_sequence));
        }
        last = Some(period);
    }
    Ok(())
}

/// The sums of corrections are those of their rows, and take away no more than there is.
fn corrections(tables: &MemoryTables, rows: &[LedgerRow]) -> Checked {
    let mut sums: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
    for row in rows {
        if let Some(Body::Correction(correction)) = &row.body {
            let sum = sums.entry(&correction.request_id).or_default();
            sum.0 += correction.completion_tokens;
            sum.1 += correction.output_nano;
        }
    }
    for (request_id, (tokens, nano)) in sums {
        let found = view::corrected(tables, request_id)?;
        if (found.completion_tokens, found.output_nano) != (tokens, nano) {
            return violation(format!(
                "request {request_id} is corrected by {found:?}, rows say {tokens}, {nano}"
            ));
        }
        let row = view::usage_row(tables, request_id)?.unwrap_or_default();
        let output_nano = row.charge.unwrap_or_default().output_nano;
        let delivered = match row.body {
            Some(Body::Usage(record)) => record.completion_tokens,
            _ => 0,
        };
        if i64::from(delivered) + tokens < 0 || output_nano.checked_add_signed(nano).is_none() {
            return violation(format!("request {request_id} is corrected below zero"));
        }
    }
    Ok(())
}
