//! Backups: whole, restored under another id, and refused when anything about them is wrong.

use super::{register, settle};
use crate::snapshot::restore;
use crate::{Applied, BackupInfo, RaftStore, RaftStoreConfig, RaftStoreError, SnapshotError};

#[tokio::test]
async fn a_backup_starts_a_new_group() {
    let dir = tempfile::tempdir().unwrap();
    let store = RaftStore::open(dir.path(), &RaftStoreConfig::single()).unwrap();
    store.propose(register("w")).await.unwrap();
    for i in 0..50 {
        store.propose(settle(&format!("r{i}"), i)).await.unwrap();
    }
    let at_backup = store.position().unwrap();
    let mut file = Vec::new();
    let info = store.save(&mut file).unwrap();
    store.propose(settle("later", 1)).await.unwrap();
    assert_eq!(
        (info.applied_index, info.state_hash),
        (at_backup.applied_index, at_backup.hash)
    );
    assert_eq!(info.bytes, file.len() as u64);

    let target = tempfile::tempdir().unwrap();
    let restored = restore(&mut file.as_slice(), target.path(), 7).unwrap();
    assert_eq!((info.group.len(), restored.group.len()), (0, 16));
    let elsewhere = tempfile::tempdir().unwrap();
    let twice = restore(&mut file.as_slice(), elsewhere.path(), 7).unwrap();
    assert_ne!(twice.group, restored.group, "each restoration is a group of its own");
    let group = restored.group.clone();
    assert_eq!(
        BackupInfo {
            group: Vec::new(),
            ..restored
        },
        info
    );
    let again = restore(&mut file.as_slice(), target.path(), 7).err();
    assert!(matches!(
        again,
        Some(RaftStoreError::Snapshot(SnapshotError::NotEmpty(_)))
    ));
    let config = RaftStoreConfig::member(7, vec![7]);
    let other = RaftStore::open(target.path(), &config).unwrap();
    let position = other.position().unwrap();
    assert_eq!((position.hash, position.settled), (at_backup.hash, 50));
    assert_eq!(other.members().voters, [7]);
    assert_eq!(baton_state::view::group(&other.state().unwrap()).unwrap(), group);
    assert!(other.usage("later").unwrap().is_none());
    // Indices and epochs go on from the backup's.
    assert_eq!(
        other.propose(register("w")).await.unwrap(),
        Applied::Registered { epoch: 2 }
    );
    assert!(other.position().unwrap().applied_index > at_backup.applied_index);
    assert_eq!(
        other.propose(settle("r3", 3)).await.unwrap(),
        Applied::Settled { sequence: 4 }
    );
}

#[tokio::test]
async fn what_is_cut_or_changed_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = RaftStore::open(dir.path(), &RaftStoreConfig::single()).unwrap();
    store.propose(settle("r", 1)).await.unwrap();
    let mut file = Vec::new();
    store.save(&mut file).unwrap();
    let target = tempfile::tempdir().unwrap();
    let refused = |bytes: &[u8], what: &str| match restore(&mut &bytes[..], target.path(), 1) {
        Err(RaftStoreError::Snapshot(SnapshotError::NotABackup(_) | SnapshotError::DamagedBackup(_))) => {
            assert_eq!(std::fs::read_dir(target.path()).unwrap().count(), 0, "{what}");
        }
        other => panic!("{what}: {other:?}"),
    };
    for length in (0..file.len()).step_by(7) {
        refused(&file[..length], &format!("cut at {length}"));
    }
    for at in (0..file.len()).step_by(5) {
        let mut changed = file.clone();
        changed[at] ^= 0x40;
        refused(&changed, &format!("changed at {at}"));
    }
    refused(&[&file[..], b"more"].concat(), "longer");
    refused(b"", "empty");
    assert!(matches!(
        restore(&mut file.as_slice(), target.path(), 0),
        Err(RaftStoreError::Config(_))
    ));
    restore(&mut file.as_slice(), target.path(), 1).unwrap();
}
