//! Members with threads, real files and channels between them, through the public interface only.

#[path = "../examples/commits/channel.rs"]
mod channel;

use baton_proto::cluster::Register;
use baton_proto::state::{Command, RegisterWorker, UsageRecord, UsageStatus, command};
use baton_raftstore::{Applied, Consistency, Followed, MembershipChange, RaftStore, RaftStoreConfig, RaftStoreError};
use channel::Channels;
use std::time::Duration;
use tempfile::TempDir;

struct Member {
    store: RaftStore,
    dir: TempDir,
}

fn config(id: u64, founders: &[u64]) -> RaftStoreConfig {
    RaftStoreConfig {
        tick_ms: 20,
        log_entries_keep: 16,
        ..RaftStoreConfig::member(id, founders.to_vec())
    }
}

fn start(channels: &Channels, id: u64, founders: &[u64]) -> Member {
    let dir = tempfile::tempdir().unwrap();
    let store = RaftStore::open_with_peers(dir.path(), &config(id, founders), channels.peers(id)).unwrap();
    channels.connect(id, &store);
    Member { store, dir }
}

async fn leader(members: &[Member]) -> usize {
    for _ in 0..500 {
        if let Some(at) = members.iter().position(|member| member.store.status().leads) {
            return at;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("no leader within 10 s");
}

fn record(id: &str) -> UsageRecord {
    UsageRecord {
        request_id: id.into(),
        status: UsageStatus::Completed.into(),
        ..UsageRecord::default()
    }
}

/// Until it is answered, as the gateway does.
async fn settle(store: &RaftStore, id: &str) -> u64 {
    for _ in 0..100 {
        match store.settle(record(id)).await {
            Ok(sequence) => return sequence,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    panic!("{id} was not settled");
}

fn register(id: &str) -> Command {
    let worker = Register {
        worker_id: id.into(),
        ..Register::default()
    };
    Command {
        kind: Some(command::Kind::RegisterWorker(RegisterWorker {
            worker: Some(worker),
            ..RegisterWorker::default()
        })),
        ..Command::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_grows_moves_and_shrinks_under_writes() {
    let channels = Channels::default();
    let mut members: Vec<_> = (1..=3).map(|id| start(&channels, id, &[1, 2, 3])).collect();
    let first = leader(&members).await;
    let follower = (first + 1) % 3;
    // What is done at one member is seen by whoever follows another.
    let mut followed = members[follower].store.follow();
    let epoch = members[first].store.propose(register("w")).await.unwrap();
    assert_eq!(epoch, Applied::Registered { epoch: 1 });
    match tokio::time::timeout(Duration::from_secs(5), followed.recv())
        .await
        .unwrap()
        .unwrap()
    {
        Followed::Command { applied, index, .. } => {
            assert_eq!(applied, epoch);
            members[follower].store.wait_applied(index).await.unwrap();
            assert_eq!(members[follower].store.workers().unwrap().len(), 1);
        }
        other => panic!("{other:?}"),
    }
    for i in 0..60 {
        assert_eq!(settle(&members[i % 3].store, &format!("r{i}")).await, i as u64 + 1);
    }
    for consistency in [Consistency::ReadIndex, Consistency::Lease, Consistency::Lease] {
        for member in &members {
            member.store.read(consistency).await.unwrap();
            assert_eq!(member.store.position().unwrap().settled, 60);
        }
    }

    members.push(start(&channels, 4, &[]));
    let at = leader(&members).await;
    members[at]
        .store
        .change_members(MembershipChange::AddLearner(4))
        .await
        .unwrap();
    members[3]
        .store
        .wait_applied(members[at].store.status().applied_index)
        .await
        .unwrap();
    assert_eq!(members[3].store.position().unwrap().settled, 60);
    let old = (at + 1) % 3;
    let replace = MembershipChange::Replace {
        old: old as u64 + 1,
        new: 4,
    };
    for _ in 0..50 {
        match members[at].store.change_members(replace).await {
            Ok(()) => break,
            Err(RaftStoreError::Membership(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => panic!("{error}"),
        }
    }
    let wanted: Vec<u64> = (1..=4).filter(|id| *id != old as u64 + 1).collect();
    for _ in 0..100 {
        if members[at].store.members().voters == wanted {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(members[at].store.members().voters, wanted);
    // The one that left says why it stopped.
    for _ in 0..100 {
        if members[old].store.failure().is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(matches!(members[old].store.failure(), Some(RaftStoreError::Removed)));
    assert!(matches!(
        members[old].store.settle(record("x")).await,
        Err(RaftStoreError::Removed)
    ));

    let to = members[at].store.transfer(None).await.unwrap();
    assert_ne!(to, at as u64 + 1);
    assert_eq!(settle(&members[at].store, "after").await, 61);
    // A member stopped and started finds its place again.
    let config = config(4, &[]);
    channels.cut(4);
    members[3].store.close();
    let stopped = members.pop().unwrap();
    drop(stopped.store);
    let store = RaftStore::open_with_peers(stopped.dir.path(), &config, channels.peers(4)).unwrap();
    channels.connect(4, &store);
    settle(&store, "again").await;
    store.read(Consistency::ReadIndex).await.unwrap();
    assert_eq!(store.position().unwrap().settled, 62);
    channels.close();
}
