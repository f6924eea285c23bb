//! What must hold of the tables at every moment, computed anew from what is in them.

use super::oracle::{Checked, Delivered, Violation, violation};
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, charge, checkpoint, row};
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
    limits: &BTreeMap<String, u64>,
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
    periods(tables, &rows)?;
    budgets(tables, &rows, delivered, limits)
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

/// Seals verify, and say what the rows say.
fn periods(tables: &MemoryTables, rows: &[LedgerRow]) -> Checked {
    let mut last = None;
    for period in view::checkpoints_after(tables, 0, 1000)? {
        checkpoint::verify_after(&period, last.as_ref())
            .map_err(|error| Violation(format!("a seal does not verify: {error}")))?;
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

/// Budgets of these runs are for all time, so each has one window.
fn budgets(
    tables: &MemoryTables,
    rows: &[LedgerRow],
    delivered: &BTreeMap<String, Delivered>,
    limits: &BTreeMap<String, u64>,
) -> Checked {
    for (id, limit) in limits {
        let Some(window) = view::window(tables, id, 0)? else {
            continue;
        };
        let sum = window.posted_nano + window.voided_nano + window.expired_nano + window.open_nano;
        if window.reserved_nano != sum {
            return violation(format!(
                "budget {id}: reserved {} but {sum} became of it",
                window.reserved_nano
            ));
        }
        if window.posted_nano + window.open_nano > u128::from(*limit) {
            return violation(format!("budget {id} is overrun: {window:?}"));
        }
        let slices = view::slices_after(tables, id, "", 1000)?;
        let open: u128 = slices.iter().map(|slice| u128::from(slice.open_nano)).sum();
        if open != window.open_nano || slices.len() as u128 != window.slices {
            return violation(format!(
                "budget {id}: slices hold {open}, {} is set aside",
                window.open_nano
            ));
        }
        let mut billed = 0;
        let mut spent = 0;
        for row in rows {
            let Some(Body::Usage(record)) = &row.body else { continue };
            if !record.postings.iter().any(|posting| posting.budget_id == *id) {
                continue;
            }
            let amount = charge::total(row.charge.as_ref().unwrap_or(&Default::default()));
            billed += amount;
            if amount > 0 {
                spent += delivered.get(&record.request_id).map_or(0, |known| {
                    if known.budgets.contains(id) {
                        u128::from(known.nano)
                    } else {
                        0
                    }
                });
            }
        }
        if window.posted_nano != billed || billed != spent {
            return violation(format!(
                "budget {id}: posted {}, rows {billed}, delivered {spent}",
                window.posted_nano
            ));
        }
    }
    Ok(())
}
