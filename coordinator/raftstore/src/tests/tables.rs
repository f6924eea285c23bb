//! The state in the file, with what a transaction keeps in memory, against a map: nobody can tell them apart.

use super::disk::Disk;
use crate::database::{STATE, Store};
use crate::tables::{StateTxn, StateView};
use baton_state::{MemoryTables, Pair, Tables, TablesMut, keys};
use proptest::prelude::*;
use std::ops::ControlFlow;

#[derive(Debug, Clone)]
enum Step {
    Put(Vec<u8>, u8),
    Delete(Vec<u8>),
    Get(Vec<u8>),
    Scan(Vec<u8>, Vec<u8>),
    /// From the start of a table, as what is due is asked for.
    Due(Vec<u8>),
    Last(Vec<u8>, Vec<u8>),
    Commit,
}

/// Tables on both sides of every seam between the redb tables, kept in memory and not.
fn key() -> impl Strategy<Value = Vec<u8>> {
    let tables = [
        keys::HASH[0],
        keys::WORKERS,
        keys::ROWS,
        keys::REQUESTS,
        keys::MEMBERS,
        keys::WINDOWS,
        keys::SLICES_DUE,
        keys::USAGE_MINUTES,
        keys::USAGE_USER_DAYS,
    ];
    (
        prop::sample::select(tables.to_vec()),
        prop::collection::vec(0..3u8, 0..3),
    )
        .prop_map(|(table, rest)| [&[table], rest.as_slice()].concat())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (key(), any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
        2 => key().prop_map(Step::Delete),
        3 => key().prop_map(Step::Get),
        2 => (key(), key()).prop_map(|(from, to)| Step::Scan(from, to)),
        3 => key().prop_map(Step::Due),
        2 => (key(), key()).prop_map(|(from, to)| Step::Last(from, to)),
        1 => Just(Step::Commit),
    ]
}

fn pairs(tables: &impl Tables, from: &[u8], to: &[u8]) -> Vec<Pair> {
    let mut found = Vec::new();
    tables
        .scan(from, to, &mut |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    found
}

fn play(steps: &[Step]) {
    let store = Store::on(Disk::default()).unwrap();
    let txn = store.write_durable().unwrap();
    for table in STATE {
        txn.open_table(table).unwrap();
    }
    txn.commit().unwrap();
    let mut model = MemoryTables::default();
    for batch in steps.split_inclusive(|step| matches!(step, Step::Commit)) {
        let txn = store.write_derived().unwrap();
        let mut tables = StateTxn::open(&txn).unwrap();
        for step in batch {
            match step {
                Step::Put(key, value) => {
                    tables.put(key, &[*value]).unwrap();
                    model.put(key, &[*value]).unwrap();
                }
                Step::Delete(key) => {
                    tables.delete(key).unwrap();
                    model.delete(key).unwrap();
                }
                Step::Get(key) => assert_eq!(tables.get(key).unwrap(), model.get(key).unwrap()),
                Step::Scan(from, to) => assert_eq!(pairs(&tables, from, to), pairs(&model, from, to)),
                Step::Due(to) => assert_eq!(pairs(&tables, &to[..1], to), pairs(&model, &to[..1], to)),
                Step::Last(from, to) => assert_eq!(tables.last(from, to).unwrap(), model.last(from, to).unwrap()),
                Step::Commit => {}
            }
        }
        tables.finish().unwrap();
        txn.commit().unwrap();
        let view = StateView::open(&store).unwrap();
        assert_eq!(pairs(&view, &[], &[0xff]), pairs(&model, &[], &[0xff]));
        assert_eq!(view.len().unwrap(), model.0.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_file_is_a_map(steps in prop::collection::vec(step(), 1..80)) {
        play(&steps);
    }
}
