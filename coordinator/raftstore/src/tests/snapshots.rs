//! Snapshots on their way: whole, cut, crashed in the middle, overtaken, damaged.

use super::disk::Disk;
use super::net::Group;
use super::{lone_node, register, run, settle};
use crate::database::Store;
use crate::snapshot::{SnapshotChunk, SnapshotError, SnapshotSink, SnapshotSource, Staging};
use crate::{Applied, RaftStoreError, queries};
use raft::eraftpb::{Message, MessageType};

fn fill(group: &mut Group, away: u64, count: u32) {
    group.isolate(away);
    for i in 0..count {
        group.commit(&settle(&format!("r{i}"), i));
    }
}

#[test]
fn a_member_far_behind_gets_a_snapshot() {
    let mut group = Group::new(3, 4);
    let leader = group.wait_for_leader();
    let away = leader % 3 + 1;
    group.commit(&register("w"));
    fill(&mut group, away, 60);
    let leader = group.wait_for_leader();
    let last_seen = group.position(away).applied_index;
    assert!(
        group.node(leader).first_index() > last_seen + 1,
        "the log no longer has what the member lacks"
    );
    group.heal();
    group.run_ms(12_000);
    group.assert_agreement(60);
    assert!(group.chunks_max > 5, "it came in pieces");
    // And it goes on from there.
    assert_eq!(group.commit(&register("w")), Applied::Registered { epoch: 2 });
    group.run_ms(500);
    group.assert_agreement(60);
}

/// Writers go on while a snapshot travels; the log it ends in is kept for it.
#[test]
fn a_slow_snapshot_is_of_one_moment_and_need_not_start_over() {
    let mut group = Group::new(3, 4);
    let leader = group.wait_for_leader();
    let away = leader % 3 + 1;
    fill(&mut group, away, 60);
    group.heal();
    for i in 0..60 {
        group.commit(&settle(&format!("s{i}"), i));
    }
    group.run_ms(10_000);
    group.assert_agreement(120);
    assert_eq!((group.streams_begun, group.replaced[&away]), (1, 1));
}

#[test]
fn lost_chunks_and_cut_streams_are_sent_again() {
    for seed in 1..=4 {
        let mut group = Group::new(3, 4).with_seed(seed * 104_729);
        let leader = group.wait_for_leader();
        let away = leader % 3 + 1;
        fill(&mut group, away, 60);
        group.heal();
        group.loss_percent = 10;
        group.run_ms(20_000);
        group.loss_percent = 0;
        group.run_ms(15_000);
        group.assert_agreement(60);
        assert!(group.replaced[&away] >= 1);
    }
}

/// The receiver loses power after each number of chunks, and at the switch.
#[test]
fn a_crash_in_the_middle_leaves_the_old_state() {
    for ms in (100..4000).step_by(300) {
        let mut group = Group::new(3, 4);
        let leader = group.wait_for_leader();
        let away = leader % 3 + 1;
        fill(&mut group, away, 40);
        let before = group.position(away);
        group.heal();
        group.run_ms(ms);
        let replaced = group.replaced.get(&away).copied().unwrap_or(0);
        group.restart(away, ms).unwrap();
        let after = group.position(away);
        if replaced == 0 {
            // How far it was applied may be forgotten, what it was is not replaced.
            assert_eq!((after.hash, after.settled), (before.hash, before.settled), "{ms}");
        } else {
            assert!(after.settled == 40, "{ms}");
        }
        group.run_ms(15_000);
        group.assert_agreement(40);
    }
}

/// The receiver's disk fails at each operation from the first chunk to the switch and after; then it loses power.
#[test]
fn a_failing_disk_in_the_middle_leaves_the_old_state_or_the_new() {
    let mut after = 0;
    loop {
        let mut group = Group::new(3, 4);
        let leader = group.wait_for_leader();
        let away = leader % 3 + 1;
        fill(&mut group, away, 40);
        group.heal();
        let disk = group.members[&away].disk.clone();
        disk.fail_at(disk.operations() + after, std::io::ErrorKind::Other);
        group.run_ms(5000);
        // Enough operations went through for all of it.
        let whole = group.members[&away].node.is_some() && group.position(away).settled == 40;
        group.restart(away, after).unwrap();
        let settled = group.position(away).settled;
        assert!(settled == 0 || settled == 40, "{settled} after {after}");
        group.run_ms(8000);
        group.assert_agreement(40);
        if whole {
            assert!(after > 10, "{after}");
            return;
        }
        after += 3;
    }
}

fn filled() -> (Store, Vec<SnapshotChunk>, u64) {
    let store = Store::on(Disk::default()).unwrap();
    let mut node = lone_node(&store, 0, 100).unwrap();
    for i in 0..20 {
        run(&mut node, &settle(&format!("r{i}"), i)).unwrap();
    }
    let mut source = SnapshotSource::open(&store).unwrap();
    source.chunk_bytes = 100;
    // It is of the moment it was opened.
    run(&mut node, &settle("later", 1)).unwrap();
    let mut chunks = Vec::new();
    while let Some(chunk) = source.next_chunk().unwrap() {
        chunks.push(chunk);
    }
    assert_eq!(source.progress().0, source.progress().1);
    (store, chunks, source.index())
}

fn header(index: u64) -> Message {
    let mut message = Message::default();
    message.set_msg_type(MessageType::MsgSnapshot);
    message.mut_snapshot().mut_metadata().index = index;
    message
}

fn begin(staging: &Staging, index: u64) -> SnapshotSink {
    SnapshotSink::begin(staging, header(index), Box::new(|_, _| Ok(()))).unwrap()
}

#[test]
fn what_is_damaged_out_of_order_or_cut_is_refused() {
    let (_, chunks, index) = filled();
    assert!(chunks.len() > 5);
    let target = Store::on(Disk::default()).unwrap();
    let _node = lone_node(&target, 0, 100).unwrap();
    let before = queries::position(&target).unwrap();
    let staging = Staging::open(target.clone()).unwrap();
    let damaged = |result: Result<(), RaftStoreError>| {
        assert!(
            matches!(result, Err(RaftStoreError::Snapshot(SnapshotError::Damaged(_)))),
            "{result:?}"
        );
    };
    let mut sink = begin(&staging, index);
    sink.chunk(&chunks[0]).unwrap();
    damaged(sink.chunk(&chunks[0]));
    let mut sink = begin(&staging, index);
    damaged(sink.chunk(&chunks[1]));
    let mut sink = begin(&staging, index);
    let mut changed = chunks[0].clone();
    changed.pairs[0].value.push(1);
    damaged(sink.chunk(&changed));
    // The state of another index is another stream.
    damaged(begin(&staging, index + 1).chunk(&chunks[0]));
    let mut sink = begin(&staging, index);
    sink.chunk(&chunks[0]).unwrap();
    damaged(sink.finish());
    // A newer stream takes over; a complete one holds its place until it is installed or dropped.
    let mut older = begin(&staging, index);
    let mut newer = begin(&staging, index);
    assert!(matches!(
        older.chunk(&chunks[0]),
        Err(RaftStoreError::Snapshot(SnapshotError::Superseded))
    ));
    for chunk in &chunks {
        newer.chunk(chunk).unwrap();
    }
    damaged(newer.chunk(&chunks[0]));
    let (_, staged) = {
        let mut whole = begin(&staging, index);
        for chunk in &chunks {
            whole.chunk(chunk).unwrap();
        }
        whole.into_staged().unwrap()
    };
    let busy = SnapshotSink::begin(&staging, header(index), Box::new(|_, _| Ok(())));
    assert!(matches!(
        busy.err(),
        Some(RaftStoreError::Snapshot(SnapshotError::Busy))
    ));
    drop(staged);
    drop(begin(&staging, index));
    assert_eq!(queries::position(&target).unwrap(), before);
}
