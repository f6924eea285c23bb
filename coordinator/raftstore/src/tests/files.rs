//! The thread over real files: answers, restarts, copies taken while it runs, and files it must refuse.

use super::{register, remove, settle};
use crate::{Applied, RaftStore, RaftStoreConfig, RaftStoreError};
use baton_state::Refused;
use std::sync::Arc;

fn open(dir: &std::path::Path) -> Result<RaftStore, RaftStoreError> {
    RaftStore::open(dir, &RaftStoreConfig::single())
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    assert_eq!(
        store.propose(register("w")).await.unwrap(),
        Applied::Registered { epoch: 1 }
    );
    assert_eq!(
        store.propose(settle("r", 5)).await.unwrap(),
        Applied::Settled { sequence: 1 }
    );
    let before = store.position().unwrap();
    drop(store);
    let store = open(dir.path()).unwrap();
    let after = store.position().unwrap();
    assert_eq!((before.hash, before.settled), (after.hash, after.settled));
    assert_eq!(
        store.propose(settle("r", 5)).await.unwrap(),
        Applied::Settled { sequence: 1 }
    );
    assert!(matches!(
        store.propose(settle("r", 6)).await,
        Err(RaftStoreError::Refused(Refused::UsageConflict { sequence: 1, .. }))
    ));
    assert_eq!(
        store.propose(register("w")).await.unwrap(),
        Applied::Registered { epoch: 2 }
    );
    assert_eq!(
        store.propose(remove("w", 1)).await.unwrap(),
        Applied::Removed { removed: false }
    );
    assert_eq!(store.workers().unwrap()[0].epoch, 2);
    assert_eq!(
        store.propose(remove("w", 2)).await.unwrap(),
        Applied::Removed { removed: true }
    );
    assert!(store.workers().unwrap().is_empty());
    assert_eq!(store.usage("r").unwrap().unwrap().record.completion_tokens, 5);
    let status = store.status();
    assert!(status.leads && status.leader_id == 1);
}

#[tokio::test]
async fn a_closed_store_says_so_and_leaves_the_file_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let clone = store.clone();
    store.propose(settle("r", 1)).await.unwrap();
    clone.close();
    assert!(matches!(
        store.propose(settle("s", 1)).await,
        Err(RaftStoreError::Stopped(_))
    ));
    assert!(matches!(store.position(), Err(RaftStoreError::Stopped(_))));
    assert_eq!(open(dir.path()).unwrap().position().unwrap().settled, 1);
}

/// A copy of the files of a running store is what a killed process leaves.
#[tokio::test]
async fn a_copy_taken_at_any_answer_holds_all_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    for i in 0..20 {
        store.propose(settle(&format!("r{i}"), i)).await.unwrap();
        let copy = tempfile::tempdir().unwrap();
        for name in ["raft.redb", "state.redb"] {
            std::fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
        }
        let copied = open(copy.path()).unwrap();
        assert_eq!(copied.position().unwrap().settled, u64::from(i) + 1);
        assert_eq!(copied.position().unwrap().hash, store.position().unwrap().hash);
    }
}

#[tokio::test]
async fn many_callers_share_batches() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open(dir.path()).unwrap());
    let callers: Vec<_> = (0..200u32)
        .map(|i| {
            let store = store.clone();
            // Every id comes twice, with the same contents.
            tokio::spawn(async move { store.propose(settle(&format!("r{}", i / 2), i / 2)).await.unwrap() })
        })
        .collect();
    let mut sequences = Vec::new();
    for caller in callers {
        match caller.await.unwrap() {
            Applied::Settled { sequence } => sequences.push(sequence),
            other => panic!("{other:?}"),
        }
    }
    sequences.sort_unstable();
    let expected: Vec<u64> = (0..200).map(|i| i / 2 + 1).collect();
    assert_eq!(sequences, expected);
    assert_eq!(store.position().unwrap().settled, 100);
    let status = store.status();
    assert!(status.proposals_total == 200 && status.batches_total <= 200);
    assert_eq!(store.usage_after(98, 10).unwrap().len(), 2);
}

#[tokio::test]
async fn a_file_in_use_or_damaged_is_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    store.propose(settle("r", 1)).await.unwrap();
    assert!(matches!(open(dir.path()).err(), Some(RaftStoreError::Locked { .. })));
    drop(store);

    let other = RaftStoreConfig::member(2, vec![1, 2, 3]);
    let refused = RaftStore::open(dir.path(), &other).err();
    assert!(matches!(
        refused,
        Some(RaftStoreError::OtherMember {
            found: 1,
            expected: 2,
            ..
        })
    ));

    for name in ["raft.redb", "state.redb"] {
        let path = dir.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, b"this is a text file").unwrap();
        assert!(matches!(open(dir.path()).err(), Some(RaftStoreError::Corrupt { .. })));
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(open(dir.path()).is_err());
        // Damage anywhere is an error or is harmless; it never brings the process down.
        let copy = tempfile::tempdir().unwrap();
        for at in (0..whole.len()).step_by(whole.len() / 40) {
            for name in ["raft.redb", "state.redb"] {
                std::fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
            }
            let mut damaged = whole.clone();
            damaged[at..(at + 64).min(whole.len())].fill(0xa5);
            std::fs::write(copy.path().join(name), &damaged).unwrap();
            if let Ok(store) = open(copy.path()) {
                let _ = store.propose(settle("s", 1)).await;
            }
        }
        // One without the other is not a store, and no reason to begin a new one.
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(open(dir.path()).err(), Some(RaftStoreError::Corrupt { .. })));
        assert!(!path.exists());
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(open(dir.path()).unwrap().position().unwrap().settled, 1);
    }
}

#[tokio::test]
async fn files_of_two_stores_are_not_one() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for dir in &dirs {
        drop(open(dir.path()).unwrap());
    }
    std::fs::copy(dirs[0].path().join("state.redb"), dirs[1].path().join("state.redb")).unwrap();
    assert!(matches!(
        open(dirs[1].path()).err(),
        Some(RaftStoreError::Corrupt { .. })
    ));
}

/// Up to format 4 everything was in one file.
#[test]
fn an_older_file_is_refused_by_its_format() {
    use crate::database::{META, meta};
    let dir = tempfile::tempdir().unwrap();
    let older = redb::Database::create(dir.path().join("raft.redb")).unwrap();
    let txn = older.begin_write().unwrap();
    let format = 4u64.to_le_bytes();
    txn.open_table(META)
        .unwrap()
        .insert(meta::FORMAT, format.as_slice())
        .unwrap();
    txn.commit().unwrap();
    drop(older);
    let refused = open(dir.path()).err();
    assert!(
        matches!(
            refused,
            Some(RaftStoreError::Format {
                found: 4,
                expected: 5,
                ..
            })
        ),
        "{refused:?}"
    );
}

/// More than one flush's worth, written by the thread; what came after the last one is applied again.
#[tokio::test]
async fn what_a_thread_flushed_is_found_by_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let config = RaftStoreConfig {
        log_entries_keep: 8,
        ..RaftStoreConfig::single()
    };
    let store = RaftStore::open(dir.path(), &config).unwrap();
    let old = store.state().unwrap();
    for i in 0..150 {
        store.propose(settle(&format!("r{i}"), i)).await.unwrap();
    }
    assert!(store.status().first_index > 20, "{:?}", store.status());
    assert_eq!(baton_state::view::settled(&old).unwrap(), 0);
    assert_eq!(store.usage_after(0, 1000).unwrap().len(), 150);
    let copy = tempfile::tempdir().unwrap();
    for name in ["raft.redb", "state.redb"] {
        std::fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
    }
    let copied = RaftStore::open(copy.path(), &config).unwrap();
    assert_eq!(copied.position().unwrap().hash, store.position().unwrap().hash);
    assert_eq!(copied.usage_after(0, 1000).unwrap().len(), 150);
    for i in 0..150 {
        let sequence = u64::from(i) + 1;
        assert_eq!(
            copied.propose(settle(&format!("r{i}"), i)).await.unwrap(),
            Applied::Settled { sequence }
        );
    }
}
