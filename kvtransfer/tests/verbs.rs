//! Metadata, write, read, leases, notifications and deadlines between real agents over loopback.

#![allow(clippy::single_range_in_vec_init)] // windows and exports of one range are what is meant

mod common;

use baton_kvtransfer::{
    AbortReason, Agent, AgentMetadata, DescriptorList, LeaseEnd, LeaseOptions, Memory, MemoryKind, Peer, PushError,
    PushOptions, Refusal, Region, SetupError, TransferError, TransferOptions, TransferStatus, WindowError,
};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, within};
use futures_util::StreamExt;
use std::time::{Duration, Instant};

const LEN: usize = 1 << 20;

/// Far below anything that only a timeout would end.
const SOON: Duration = Duration::from_secs(5);

fn meet(agent: &Agent, other: &Agent) -> Peer {
    let travelled = AgentMetadata::decode(&other.metadata().encode()).unwrap();
    agent.add_peer(travelled).unwrap()
}

fn lease(term: Duration) -> LeaseOptions {
    LeaseOptions {
        term,
        ..LeaseOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_fills_a_window_and_notifies() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let (source, target) = (from.register(filled(LEN, 1)), to.register(Region::new(LEN).unwrap()));
    let peer = meet(&from, &to);
    assert_eq!(peer.metadata().memories[0].kind, MemoryKind::Host);
    assert_eq!(
        (peer.metadata().memories[0].id, peer.metadata().memories[0].bytes),
        (target.id(), LEN as u64)
    );
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    // The second half first, and both swapped.
    let list: DescriptorList = [(LEN / 2..LEN, 0), (0..LEN / 2, LEN / 2)].into_iter().collect();
    let options = TransferOptions {
        notification: Some(Bytes::from_static(b"blocks are there")),
        ..TransferOptions::default()
    };
    let transfer = from.write(&peer, window.id(), &source, &list, options);
    let report = within(transfer.wait()).await.unwrap();
    assert_eq!(report.bytes, LEN as u64);
    assert_eq!(transfer.poll(), TransferStatus::Done(report));
    assert_eq!(within(window.wait()).await.unwrap(), "blocks are there");
    let mut notifications = Box::pin(to.notifications());
    let told = within(notifications.next()).await.unwrap();
    assert!(
        told.peer.starts_with("prefill-0") && told.payload == "blocks are there",
        "{told:?}"
    );
    from.notify(&peer, Bytes::from_static(b"alone")).await.unwrap();
    assert_eq!(within(notifications.next()).await.unwrap().payload, "alone");
    let (mut moved, mut all) = (vec![0; LEN], vec![0; LEN]);
    assert!(target.memory().copy_out(0, &mut moved) && source.memory().copy_out(0, &mut all));
    all.rotate_left(LEN / 2);
    assert!(moved == all);
    drop(source);
    assert!(from.metadata().memories.is_empty());
    within(to.close()).await;
    assert_eq!(within(notifications.next()).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_pulls_from_an_export_and_ends_its_lease() {
    let cluster = Cluster::new();
    let (owner, reader) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let (source, target) = (filled(LEN, 2), Region::new(LEN).unwrap());
    let options = LeaseOptions {
        reads_max: Some(1),
        ..LeaseOptions::default()
    };
    let export = owner.export(&source, vec![0..LEN / 2], options).unwrap();
    let peer = meet(&reader, &owner);
    let outside = DescriptorList::of(0..64, LEN / 2);
    let refused = reader.read(&peer, export.grant(), &target, &outside, TransferOptions::default());
    assert!(matches!(
        within(refused.wait()).await,
        Err(TransferError::Ended(Refusal::OutsideExport { .. }))
    ));
    let list: DescriptorList = (0..LEN / 2)
        .step_by(4096)
        .map(|at| (LEN - 4096 - at..LEN - at, at))
        .collect();
    let options = TransferOptions {
        notification: Some(Bytes::from_static(b"read")),
        ..TransferOptions::default()
    };
    let read = reader.read(&peer, export.grant(), &target, &list, options);
    assert_eq!(within(read.wait()).await.unwrap().bytes, LEN as u64 / 2);
    let (source, target) = (image(&source), image(&target));
    for at in (0..LEN / 2).step_by(4096) {
        assert!(target[LEN - 4096 - at..LEN - at] == source[at..at + 4096]);
    }
    assert_eq!(within(export.ended()).await, LeaseEnd::Completed);
    let told = within(Box::pin(owner.notifications()).next()).await.unwrap();
    assert!(told.peer.starts_with("decode-0") && told.payload == "read");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_lives_by_heartbeats_and_late_reads_are_refused() {
    let cluster = Cluster::new();
    let (owner, reader) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let source = filled(LEN, 3);
    let peer = meet(&reader, &owner);
    let read = |export: &baton_kvtransfer::Export| {
        let target = Region::new(LEN).unwrap();
        reader.read(
            &peer,
            export.grant(),
            &target,
            &DescriptorList::of(0..LEN, 0),
            TransferOptions::default(),
        )
    };
    let term = Duration::from_millis(600);
    let export = owner.export(&source, vec![0..LEN], lease(term)).unwrap();
    let hold = reader.hold(&peer, export.grant());
    tokio::time::sleep(term * 2).await;
    assert_eq!(export.end(), None, "heartbeats hold it");
    within(read(&export).wait()).await.unwrap();
    let released = Instant::now();
    drop(hold);
    assert_eq!(within(export.ended()).await, LeaseEnd::Released);
    assert!(released.elapsed() < SOON);
    let late = within(read(&export).wait()).await;
    assert_eq!(late, Err(TransferError::Ended(Refusal::UnknownExport)));

    let silent = owner
        .export(&source, vec![0..LEN], lease(Duration::from_millis(50)))
        .unwrap();
    assert_eq!(within(silent.ended()).await, LeaseEnd::Expired);
    let lost = reader.hold(&peer, silent.grant());
    assert_eq!(within(lost.lost()).await, PushError::Refused(Refusal::UnknownExport));
}

/// The owner drops an export in the middle of a read: its bytes are its own again at once, and the reader knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_ends_a_lease_is_not_read_any_more() {
    const LONG: usize = 64 << 20;
    let cluster = Cluster::new();
    let (owner, reader) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let (source, target) = (Region::new(LONG).unwrap(), Region::new(LONG).unwrap());
    let peer = meet(&reader, &owner);
    let export = owner.export(&source, vec![0..LONG], LeaseOptions::default()).unwrap();
    let list = DescriptorList::of(0..LONG, 0);
    let read = reader.read(&peer, export.grant(), &target, &list, TransferOptions::default());
    eventually("bytes land", || reader.stats().bytes_in > 0).await;
    let dropped = Instant::now();
    drop(export);
    // The blocks belong to someone else now.
    assert!(source.copy_in(0, &vec![9; LONG]));
    let error = within(read.wait()).await.unwrap_err();
    assert!(dropped.elapsed() < SOON);
    assert!(
        matches!(
            error,
            TransferError::Window(WindowError::Aborted(AbortReason::LeaseEnded))
                | TransferError::Ended(Refusal::UnknownExport)
        ),
        "{error:?}"
    );
    assert!(
        image(&target).iter().all(|&byte| byte == 0),
        "bytes of the next owner were read"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_gives_up_or_goes_away_frees_the_owner_at_once() {
    const LONG: usize = 64 << 20;
    let cluster = Cluster::new();
    let (owner, reader) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let source = Region::new(LONG).unwrap();
    let peer = meet(&reader, &owner);
    let export = owner
        .export(&source, vec![0..LONG], lease(Duration::from_secs(60)))
        .unwrap();
    let list = DescriptorList::of(0..LONG, 0);
    let target = filled(LONG, 4);
    let read = reader.read(&peer, export.grant(), &target, &list, TransferOptions::default());
    eventually("bytes land", || reader.stats().bytes_in > 0).await;
    read.cancel();
    let cancelled = image(&target);
    assert_eq!(within(read.wait()).await, Err(TransferError::Cancelled));
    eventually("the owner's push ends", || owner.stats().pushes_open == 0).await;
    assert!(image(&target) == cancelled, "a byte landed after the cancellation");
    assert_eq!(export.end(), None, "another read may come");

    let landed = reader.stats().bytes_in;
    let again = reader.read(&peer, export.grant(), &target, &list, TransferOptions::default());
    eventually("bytes land", || reader.stats().bytes_in > landed).await;
    let closed = Instant::now();
    within(reader.close()).await;
    assert_eq!(within(export.ended()).await, LeaseEnd::ReaderLost);
    assert!(closed.elapsed() < SOON);
    assert!(within(again.wait()).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_end_pushes_and_reads() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let target = Region::new(LEN).unwrap();
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let limit = Duration::from_millis(100);
    let options = PushOptions { deadline: Some(limit) };
    let push = from.push_with(to.local_addr(), window.id(), filled(LEN, 5), options);
    push.writer().write(0..64, 0).unwrap();
    // Never finished.
    assert_eq!(within(push.failed()).await, PushError::DeadlineExceeded { limit });
    assert_eq!(
        within(window.wait()).await,
        Err(WindowError::Aborted(AbortReason::DeadlineExceeded))
    );
    let nobody = AgentMetadata {
        addresses: vec!["127.0.0.1:9".parse().unwrap()],
        ..to.metadata()
    };
    let peer = from.add_peer(nobody).unwrap();
    let options = TransferOptions {
        deadline: Some(limit),
        notification: None,
    };
    let write = from.write(&peer, 1, filled(64, 1), &DescriptorList::of(0..64, 0), options);
    let error = within(write.wait()).await.unwrap_err();
    assert!(
        matches!(
            error,
            TransferError::Push(PushError::DeadlineExceeded { .. } | PushError::Unreachable { .. })
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn misuse_is_a_typed_error() {
    let cluster = Cluster::new();
    let agent = cluster.agent("prefill-0");
    let other = AgentMetadata {
        digest: [8; 32],
        ..agent.metadata()
    };
    assert!(matches!(agent.add_peer(other), Err(SetupError::Incompatible { .. })));
    agent.advertise(vec!["0.0.0.0:7071".parse().unwrap()]);
    assert!(matches!(
        agent.add_peer(agent.metadata()),
        Err(SetupError::NoAddress { .. })
    ));
    let memory = Memory::from(Region::new(64).unwrap());
    assert!(matches!(
        agent.export(memory.clone(), vec![0..128], LeaseOptions::default()),
        Err(SetupError::WindowRange { .. })
    ));
    let peer = agent.add_peer(cluster.agent("decode-0").metadata()).unwrap();
    let grant = agent
        .export(memory.clone(), vec![0..64], LeaseOptions::default())
        .unwrap()
        .grant();
    let nothing = agent.read(
        &peer,
        grant,
        memory.clone(),
        &DescriptorList::new(),
        TransferOptions::default(),
    );
    assert!(matches!(
        nothing.poll(),
        TransferStatus::Failed(TransferError::Setup(_))
    ));
    let outside = agent.write(
        &peer,
        1,
        memory,
        &DescriptorList::of(0..128, 0),
        TransferOptions::default(),
    );
    assert!(matches!(
        outside.poll(),
        TransferStatus::Failed(TransferError::Push(PushError::OutOfRange { .. }))
    ));
}
