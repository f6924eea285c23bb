//! The state machine against a model of a few lines, with restarts in between.

use super::disk::Disk;
use super::{lone_node, register, remove, run, settle};
use crate::database::Store;
use crate::tables::StateView;
use crate::{Applied, RaftStoreError, queries};
use baton_state::{Refused, view};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
enum Step {
    Register(u8),
    /// Removes a worker under an epoch this far below the newest.
    Remove(u8, u64),
    Settle(u8, u32),
    Reopen,
    /// Power loss instead of a clean end.
    Crash(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4).prop_map(Step::Register),
        3 => (0u8..4, 0u64..3).prop_map(|(id, below)| Step::Remove(id, below)),
        6 => (0u8..12, 0u32..3).prop_map(|(id, tokens)| Step::Settle(id, tokens)),
        1 => Just(Step::Reopen),
        1 => any::<u64>().prop_map(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let mut disk = Disk::default();
        let mut store = Store::on(disk.clone()).unwrap();
        let mut node = lone_node(&store, 0, 8).unwrap();
        let mut last_epoch = 0;
        let mut workers: BTreeMap<String, u64> = BTreeMap::new();
        let mut usage: Vec<(String, u32)> = Vec::new();
        for (life, step) in steps.iter().enumerate() {
            match step {
                Step::Register(id) => {
                    let id = format!("w{id}");
                    last_epoch += 1;
                    prop_assert_eq!(run(&mut node, &register(&id)).unwrap(), Applied::Registered { epoch: last_epoch });
                    workers.insert(id, last_epoch);
                }
                Step::Remove(id, below) => {
                    let (id, epoch) = (format!("w{id}"), last_epoch.saturating_sub(*below));
                    let removed = workers.get(&id) == Some(&epoch);
                    if removed {
                        workers.remove(&id);
                    }
                    prop_assert_eq!(run(&mut node, &remove(&id, epoch)).unwrap(), Applied::Removed { removed });
                }
                Step::Settle(id, tokens) => {
                    let id = format!("r{id}");
                    let known = usage.iter().position(|(known, _)| *known == id);
                    let answer = run(&mut node, &settle(&id, *tokens));
                    match known {
                        Some(at) if usage[at].1 != *tokens => {
                            let conflict = matches!(answer, Err(RaftStoreError::Refused(Refused::UsageConflict { sequence, .. }))
                                if sequence == at as u64 + 1);
                            prop_assert!(conflict);
                        }
                        Some(at) => prop_assert_eq!(answer.unwrap(), Applied::Settled { sequence: at as u64 + 1 }),
                        None => {
                            usage.push((id, *tokens));
                            prop_assert_eq!(answer.unwrap(), Applied::Settled { sequence: usage.len() as u64 });
                        }
                    }
                }
                Step::Reopen | Step::Crash(_) => {
                    let before = queries::position(&store).unwrap();
                    if let Step::Crash(choice) = step {
                        disk = Disk::with(disk.crash_image(*choice));
                    }
                    drop(node);
                    drop(store);
                    store = Store::on(disk.clone()).unwrap();
                    node = lone_node(&store, life as u64 + 1, 8).unwrap();
                    let after = queries::position(&store).unwrap();
                    prop_assert_eq!(before.hash, after.hash);
                    prop_assert_eq!(before.settled, after.settled);
                    prop_assert!(after.applied_index >= before.applied_index);
                }
            }
            // The log stays bounded: what is kept, what was not flushed yet, and the batch not yet deleted.
            prop_assert!(node.applied() - node.first_index() <= 8 + 2 * 8 * 8 + 8 / 4 + 2);
        }
        let found: BTreeMap<String, u64> = view::workers(&StateView::open(&store).unwrap()).unwrap().into_iter()
            .map(|record| (record.worker.unwrap().worker_id, record.epoch)).collect();
        prop_assert_eq!(found, workers);
        let found: Vec<(String, u32)> = view::usage_after(&StateView::open(&store).unwrap(), 0, 1000).unwrap().into_iter()
            .map(|settled| (settled.record.request_id, settled.record.completion_tokens)).collect();
        prop_assert_eq!(&found, &usage);
        for (at, (id, _)) in usage.iter().enumerate() {
            prop_assert_eq!(view::usage(&StateView::open(&store).unwrap(), id).unwrap().unwrap().sequence, at as u64 + 1);
        }
    }

    /// P3: the same commands give the same hash, whatever the batches; one command more or changed gives another.
    #[test]
    fn hashes_are_of_commands_only(tokens in prop::collection::vec(0u32..5, 1..20), batch in 1usize..7) {
        let play = |batch: usize, tokens: &[u32]| {
            let store = Store::on(Disk::default()).unwrap();
            let mut node = lone_node(&store, 0, 1000).unwrap();
            let commands: Vec<_> = tokens.iter().enumerate().map(|(i, t)| settle(&format!("r{i}"), *t)).collect();
            for commands in commands.chunks(batch) {
                for command in commands {
                    node.propose(prost::Message::encode_to_vec(command)).unwrap();
                }
                assert_eq!(node.process(&mut |_| {}).unwrap().answers.len(), commands.len());
            }
            queries::position(&store).unwrap()
        };
        let one = play(1, &tokens);
        prop_assert_eq!(one, play(batch, &tokens));
        let mut changed = tokens.clone();
        changed[0] += 1;
        prop_assert_ne!(one.hash, play(batch, &changed).hash);
    }
}

#[test]
fn nonsense_is_refused_and_changes_nothing_else() {
    let store = Store::on(Disk::default()).unwrap();
    let mut node = lone_node(&store, 0, 1000).unwrap();
    for command in [baton_proto::state::Command::default(), register(""), settle("", 1)] {
        if prost::Message::encoded_len(&command) == 0 {
            assert!(matches!(
                run(&mut node, &command),
                Err(RaftStoreError::Refused(Refused::Invalid(_)))
            ));
            continue;
        }
        assert!(matches!(
            run(&mut node, &command),
            Err(RaftStoreError::Refused(Refused::Invalid(_)))
        ));
    }
    let long = settle(&"x".repeat(70_000), 1);
    assert!(matches!(
        run(&mut node, &long),
        Err(RaftStoreError::Refused(Refused::Invalid(_)))
    ));
    assert!(node.propose(vec![0xff; 10]).is_ok());
    let answers = node.process(&mut |_| {}).unwrap().answers;
    assert!(matches!(answers[..], [(_, Err(Refused::Invalid(_)))]));
    assert_eq!(
        run(&mut node, &settle("r", 1)).unwrap(),
        Applied::Settled { sequence: 1 }
    );
}
