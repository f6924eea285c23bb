//! What must hold of the tables at every moment, computed anew from all that is in them.

use crate::aggregates::{dimensions, minutes_kept_from};
use crate::calendar::{DAY_MS, HOUR_MS, MINUTE_MS};
use crate::keys::{self, Parts};
use crate::rows::head;
use crate::sums::KeyDimensions;
use crate::{Dimensions, MemoryTables, Sums, Tables, Window, view};
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, charge, checkpoint, row};
use baton_proto::state::{
    Checkpoint, Corrected, IdempotencyRecord, LedgerRow, Slice, UsageRecord, UsageStatus, ledger_row::Body,
};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

fn entries(tables: &MemoryTables, table: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found = Vec::new();
    let (from, to) = keys::whole(table);
    tables
        .scan(&from, &to, &mut |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    found
}

fn messages<M: Message + Default>(tables: &MemoryTables, table: u8) -> Vec<(Vec<u8>, M)> {
    let decoded = entries(tables, table).into_iter();
    decoded
        .map(|(key, value)| (key, M::decode(value.as_slice()).unwrap()))
        .collect()
}

/// Checks every invariant of `lib.rs` that one version of the tables can show.
pub(crate) fn check(tables: &MemoryTables) {
    let rows = rows(tables);
    periods(tables, &rows);
    requests(tables, &rows);
    budgets(tables, &rows);
    sums(tables, &rows);
    let audit = view::audit_after(tables, 0, 1000).unwrap();
    assert!(audit.iter().zip(1..).all(|(row, at)| row.sequence == at));
    let due: BTreeSet<_> = entries(tables, keys::CLAIMS_DUE)
        .into_iter()
        .map(|(key, _)| key[1..].to_vec())
        .collect();
    let claims = messages::<baton_proto::state::IdempotencyClaim>(tables, keys::CLAIMS).into_iter();
    let kept: BTreeSet<_> = claims
        .map(|(key, claim)| [&claim.expires_unix_ms.to_be_bytes()[..], &key[1..]].concat())
        .collect();
    assert_eq!(due, kept, "each claim ends at its time");
    for (_, key) in messages::<baton_proto::state::ApiKey>(tables, keys::API_KEYS) {
        assert_eq!(view::key_by_hash(tables, &key.sha256).unwrap().unwrap().id, key.id);
    }
    let hashes = entries(tables, keys::API_KEY_HASHES).len();
    assert_eq!(hashes, entries(tables, keys::API_KEYS).len());
}

fn rows(tables: &MemoryTables) -> Vec<LedgerRow> {
    let rows: Vec<LedgerRow> = messages(tables, keys::ROWS).into_iter().map(|(_, row)| row).collect();
    let (mut hash, mut index, mut at) = (GENESIS, 0, 0);
    for (row, sequence) in rows.iter().zip(1..) {
        assert_eq!(row.sequence, sequence);
        assert!(row.raft_index > index && row.at_unix_ms >= at);
        assert_eq!(row.previous_hash, hash.as_slice());
        assert_eq!(row.id, row::body_id(row.body.as_ref().unwrap()).as_slice());
        hash = row::row_hash(row);
        assert_eq!(row.hash, hash.as_slice());
        (index, at) = (row.raft_index, row.at_unix_ms);
        if let Some(Body::Usage(record)) = &row.body {
            assert!(record.completion_tokens <= record.sampled_tokens && record.cached_tokens <= record.prompt_tokens);
            let price = view::price(tables, &record.price_id).unwrap();
            assert_eq!(
                charge::of_record(record, price.as_ref()).as_ref(),
                Ok(row.charge.as_ref().unwrap())
            );
        }
    }
    let head = head(tables).unwrap();
    assert_eq!((head.sequence, head.hash), (rows.len() as u64, hash));
    assert_eq!(view::settled(tables).unwrap(), rows.len() as u64);
    rows
}

fn periods(tables: &MemoryTables, rows: &[LedgerRow]) {
    let root = |period: &[LedgerRow]| {
        let mut frontier = Frontier::default();
        for row in period {
            frontier.push(&row::row_hash(row));
        }
        frontier
    };
    let of = |period: &Checkpoint| &rows[period.first_sequence as usize - 1..period.last_sequence as usize];
    let mut last: Option<Checkpoint> = None;
    for (_, period) in messages::<Checkpoint>(tables, keys::CHECKPOINTS) {
        checkpoint::verify_after(&period, last.as_ref()).unwrap();
        assert_eq!(period.merkle_root, root(of(&period)).root().as_slice());
        assert_eq!(period.last_hash, of(&period).last().unwrap().hash);
        last = Some(period);
    }
    let mut first = last.map_or(1, |period| period.last_sequence + 1);
    if let Some(closed) = view::closed_period(tables).unwrap() {
        assert_eq!(closed.first_sequence, first);
        assert_eq!(closed.merkle_root, root(of(&closed)).root().as_slice());
        first = closed.last_sequence + 1;
    }
    assert_eq!(head(tables).unwrap().frontier, root(&rows[first as usize - 1..]));
}

fn requests(tables: &MemoryTables, rows: &[LedgerRow]) {
    let mut usage = 0;
    let mut corrected: BTreeMap<&str, (i128, i128)> = BTreeMap::new();
    for row in rows {
        match row.body.as_ref().unwrap() {
            Body::Usage(record) => {
                usage += 1;
                let found = view::usage_row(tables, &record.request_id).unwrap().unwrap();
                assert_eq!(found.sequence, row.sequence);
            }
            Body::Correction(correction) => {
                let (sequence, id) = view::correction(tables, &correction.correction_id).unwrap().unwrap();
                assert_eq!((sequence, id.as_slice()), (row.sequence, row.id.as_ref()));
                let sum = corrected.entry(&correction.request_id).or_default();
                sum.0 += i128::from(correction.completion_tokens);
                sum.1 += i128::from(correction.output_nano);
            }
        }
    }
    assert_eq!(entries(tables, keys::REQUESTS).len(), usage);
    assert_eq!(entries(tables, keys::CORRECTIONS).len(), rows.len() - usage);
    for (key, sum) in messages::<Corrected>(tables, keys::CORRECTED) {
        let request = std::str::from_utf8(&key[1..]).unwrap();
        let (tokens, nano) = corrected.remove(request).unwrap();
        assert_eq!((tokens, nano), (sum.completion_tokens.into(), sum.output_nano.into()));
        let row = view::usage_row(tables, request).unwrap().unwrap();
        let Some(Body::Usage(record)) = &row.body else { panic!() };
        assert!(i128::from(record.completion_tokens) + tokens >= 0);
        assert!(i128::from(row.charge.unwrap().output_nano) + nano >= 0);
    }
    assert!(corrected.is_empty());
    let due: BTreeSet<_> = entries(tables, keys::IDEMPOTENCY_DUE)
        .into_iter()
        .map(|(key, _)| key[9..].to_vec())
        .collect();
    let kept: BTreeSet<_> = messages::<IdempotencyRecord>(tables, keys::IDEMPOTENCY)
        .into_iter()
        .map(|(key, _)| key[1..].to_vec())
        .collect();
    assert_eq!(due, kept);
}

fn budgets(tables: &MemoryTables, rows: &[LedgerRow]) {
    let mut open: BTreeMap<(String, u64), (u128, u128)> = BTreeMap::new();
    let slices = messages::<Slice>(tables, keys::SLICES);
    for (_, slice) in &slices {
        let sum = open
            .entry((slice.budget_id.clone(), slice.period_start_unix_ms))
            .or_default();
        sum.0 += u128::from(slice.open_nano);
        sum.1 += 1;
        let due = slice.expires_unix_ms + crate::SLICE_GRACE_MS;
        let mut due_key = keys::Key::of(keys::SLICES_DUE)
            .number(due)
            .text(&slice.budget_id)
            .done();
        due_key.extend_from_slice(slice.slice_id.as_bytes());
        assert!(tables.0.contains_key(&due_key));
    }
    assert_eq!(entries(tables, keys::SLICES_DUE).len(), slices.len());
    let mut posted: BTreeMap<String, u128> = BTreeMap::new();
    for (key, value) in entries(tables, keys::WINDOWS) {
        let mut parts = Parts::of(&key);
        let id = (parts.text().unwrap().to_owned(), parts.number().unwrap());
        let window = Window::decode(&value).unwrap();
        let Window {
            reserved_nano,
            posted_nano,
            voided_nano,
            expired_nano,
            open_nano,
            ..
        } = window;
        assert_eq!(
            reserved_nano,
            posted_nano + voided_nano + expired_nano + open_nano,
            "{id:?}"
        );
        assert!(
            !window.hard || posted_nano + open_nano <= window.limit_nano.into(),
            "{id:?} {window:?}"
        );
        assert_eq!(
            open.remove(&id).unwrap_or_default(),
            (open_nano, window.slices),
            "{id:?}"
        );
        *posted.entry(id.0).or_default() += posted_nano;
    }
    assert!(open.is_empty());
    // What budgets say is posted is what the rows cost.
    let mut charged: BTreeMap<String, u128> = BTreeMap::new();
    for row in rows {
        let Some(Body::Usage(UsageRecord { postings, status, .. })) = &row.body else {
            continue;
        };
        let amount = charge::total(row.charge.as_ref().unwrap());
        assert!(*status != i32::from(UsageStatus::Expired) || amount == 0);
        for posting in postings {
            *charged.entry(posting.budget_id.clone()).or_default() += amount;
        }
    }
    charged.retain(|_, amount| *amount > 0);
    posted.retain(|_, amount| *amount > 0);
    assert_eq!(posted, charged);
}

fn sums(tables: &MemoryTables, rows: &[LedgerRow]) {
    let now = view::time(tables).unwrap();
    for (table, width, with_user, from) in [
        (keys::USAGE_DAYS, DAY_MS, false, 0),
        (keys::USAGE_HOURS, HOUR_MS, false, 0),
        (keys::USAGE_USER_HOURS, HOUR_MS, true, 0),
        (keys::USAGE_USER_DAYS, DAY_MS, true, 0),
        (keys::USAGE_MINUTES, MINUTE_MS, false, minutes_kept_from(now)),
    ] {
        let mut expected: BTreeMap<(u64, Dimensions), Sums> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.at_unix_ms >= from) {
            let usage = |row: &LedgerRow| match &row.body {
                Some(Body::Usage(record)) => (record.clone(), row.charge.clone().unwrap()),
                other => panic!("{other:?}"),
            };
            let (record, sums) = match row.body.as_ref().unwrap() {
                Body::Usage(record) => {
                    let charge = row.charge.as_ref().unwrap();
                    let sums = Sums {
                        requests: 1,
                        prompt_tokens: record.prompt_tokens.into(),
                        cached_tokens: record.cached_tokens.into(),
                        completion_tokens: record.completion_tokens.into(),
                        input_nano: charge.input_nano.into(),
                        cached_input_nano: charge.cached_input_nano.into(),
                        output_nano: charge.output_nano.into(),
                    };
                    (usage(row), sums)
                }
                Body::Correction(correction) => {
                    let sums = Sums {
                        prompt_tokens: correction.prompt_tokens.into(),
                        cached_tokens: correction.cached_tokens.into(),
                        completion_tokens: correction.completion_tokens.into(),
                        input_nano: correction.input_nano.into(),
                        cached_input_nano: correction.cached_input_nano.into(),
                        output_nano: correction.output_nano.into(),
                        ..Sums::default()
                    };
                    (usage(&rows[correction.sequence as usize - 1]), sums)
                }
            };
            let mut whose = dimensions(&record.0, &record.1.currency);
            if !with_user {
                whose.user.clear();
            }
            let start = row.at_unix_ms - row.at_unix_ms % width;
            expected.entry((start, whose)).or_default().add(&sums);
        }
        let found: BTreeMap<(u64, Dimensions), Sums> = entries(tables, table)
            .into_iter()
            .map(|(key, value)| {
                let (at, dimensions) = KeyDimensions::of_key(&key).unwrap();
                ((at, dimensions.to_owned()), Sums::decode(&value).unwrap())
            })
            .filter(|((start, _), _)| *start >= from)
            .collect();
        assert_eq!(found, expected, "table {table:#x}");
    }
}
