//! The state in the file, in the layers over it and in a batch, against a map: nobody can tell them apart, however long he reads.

use super::disk::Disk;
use crate::RaftStoreConfig;
use crate::database::Store;
use crate::founding::{Founding, found};
use crate::overlay::flush::Flusher;
use crate::tables::{StateView, Writer};
use baton_state::{MemoryTables, Pair, Tables, TablesMut, keys};
use proptest::prelude::*;
use raft::eraftpb::ConfState;
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
    /// Also ends a batch. What is read then must stay as it is.
    Hold,
    Release,
    Flush,
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
        2 => Just(Step::Commit),
        2 => Just(Step::Hold),
        1 => Just(Step::Release),
        2 => Just(Step::Flush),
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
    let disk = Disk::default();
    let store = Store::on(disk.clone()).unwrap();
    let founding = Founding::of(&RaftStoreConfig::single());
    found(&store, &founding, 1).unwrap();
    store.overlay().start(founding.at);
    let (mut writer, mut flusher) = (Writer::default(), Flusher::new(store.clone(), 1));
    let conf_state = ConfState::default();
    let mut model = MemoryTables::default();
    let mut held: Vec<(StateView, MemoryTables)> = Vec::new();
    let is_end = |step: &Step| matches!(step, Step::Commit | Step::Hold | Step::Release | Step::Flush);
    for (batch, index) in steps.split_inclusive(is_end).zip(2..) {
        let mut tables = writer.begin(&store, store.overlay()).unwrap();
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
                Step::Commit | Step::Hold | Step::Release | Step::Flush => {}
            }
        }
        tables.finish((index, 1));
        let view = StateView::open(&store).unwrap();
        same(&view, &model);
        assert_eq!(
            (view.len().unwrap(), view.applied()),
            (model.0.len() as u64, (index, 1))
        );
        match batch.last() {
            Some(Step::Hold) => held.push((view, model.clone())),
            Some(Step::Release) if !held.is_empty() => drop(held.remove(held.len() / 2)),
            // What was begun by one is written by the next.
            Some(Step::Flush) => flusher.turn(index, &conf_state).unwrap(),
            _ => {}
        }
        for (view, model) in &held {
            same(view, model);
        }
    }
    flusher.flush(&conf_state).unwrap();
    for (view, model) in &held {
        same(view, model);
    }
    same(&StateView::open(&store).unwrap(), &model);
    // The file has it all.
    drop((held, writer, flusher, store));
    same(&StateView::open(&Store::on(disk).unwrap()).unwrap(), &model);
}

fn same(view: &StateView, model: &MemoryTables) {
    assert_eq!(pairs(view, &[], &[0xff]), pairs(model, &[], &[0xff]));
    for to in [keys::MEMBERS, keys::ROWS, keys::USAGE_MINUTES] {
        assert_eq!(view.last(&[0], &[to]).unwrap(), model.last(&[0], &[to]).unwrap());
    }
    for key in model.0.keys() {
        assert_eq!(view.get(key).unwrap(), model.get(key).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn layers_and_file_are_a_map(steps in prop::collection::vec(step(), 1..120)) {
        play(&steps);
    }
}

/// More readers, each of another moment, than there may be layers.
#[test]
fn many_readers_see_each_their_moment() {
    let put = |n: u8| {
        [
            Step::Put(vec![keys::WORKERS, n % 7], n),
            Step::Put(vec![keys::ROWS, n], n),
            Step::Hold,
        ]
    };
    let mut steps: Vec<Step> = (0..60).flat_map(put).collect();
    steps.insert(90, Step::Flush);
    steps.extend(std::iter::repeat_n(Step::Release, 30));
    steps.extend((60..90).flat_map(put));
    play(&steps);
}
