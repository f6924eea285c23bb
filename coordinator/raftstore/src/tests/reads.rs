//! Reads that must see what was answered before: read-index at any member, leases of the leader, and when there is none.

use super::net::Group;
use super::settle;
use crate::RaftStoreError;
use crate::reads::Reads;

/// Asks at a member and waits for at most `ms`.
fn read_within(group: &mut Group, at: u64, lease: bool, ms: u64) -> bool {
    let now_ms = group.now_ms;
    let Ok(id) = group.node(at).read(lease, now_ms) else {
        return false;
    };
    for _ in 0..=ms / 100 {
        group.run_ms(100);
        if group.reads.contains(&(at, id)) {
            return true;
        }
    }
    false
}

#[test]
fn a_read_anywhere_sees_what_was_answered_anywhere() {
    let mut group = Group::new(3, 1000);
    group.wait_for_leader();
    for i in 0..10u32 {
        group.commit(&settle(&format!("r{i}"), 1));
        let at = u64::from(i) % 3 + 1;
        assert!(read_within(&mut group, at, false, 500));
        assert_eq!(group.position(at).settled, u64::from(i) + 1);
    }
    // Lost questions and answers are repeated.
    group.loss_percent = 30;
    for at in 1..=3 {
        assert!(read_within(&mut group, at, false, 8000));
    }
    group.loss_percent = 0;
    group.run_ms(2000);
    let leader_now = group.wait_for_leader();
    // Who is cut off answers nothing, and says so once it knows.
    group.isolate(leader_now);
    assert!(!read_within(&mut group, leader_now, false, 4000));
    let now_ms = group.now_ms;
    assert!(matches!(
        group.node(leader_now).read(false, now_ms),
        Err(RaftStoreError::NoLeader)
    ));
}

/// The rule a lease must keep: while it holds, there is no other leader.
#[test]
fn a_lease_ends_before_another_leader_can_exist() {
    for seed in 1..=10 {
        let mut group = Group::new(3, 1000).with_seed(seed * 31_337);
        let leader = group.wait_for_leader();
        group.commit(&settle("a", 1));
        let follower = leader % 3 + 1;
        assert!(read_within(&mut group, leader, true, 500), "by a majority");
        let now_ms = group.now_ms;
        assert!(group.node(leader).in_lease(now_ms));
        assert!(!group.node(follower).in_lease(now_ms));
        group.isolate(leader);
        // A follower forgets whom it heard.
        group.restart(follower, seed).unwrap();
        let mut held_ms = 0;
        for _ in 0..60 {
            group.run_ms(100);
            let now_ms = group.now_ms;
            let other = (1..=3).any(|id| id != leader && group.node(id).leads());
            let held = group.node(leader).in_lease(now_ms);
            assert!(!(held && other), "seed {seed}");
            held_ms += if held { 100 } else { 0 };
        }
        assert!((500..=900).contains(&held_ms), "{held_ms}");
        assert_ne!(group.wait_for_leader(), leader);
    }
}

/// An election on a leader's order does not respect its lease, however late the order comes.
#[test]
fn a_transfer_ends_the_lease_for_the_term() {
    let mut group = Group::new(3, 1000);
    let leader = group.wait_for_leader();
    group.commit(&settle("a", 1));
    assert!(read_within(&mut group, leader, true, 500));
    let away = leader % 3 + 1;
    group.isolate(away);
    group.node(leader).transfer(Some(away)).unwrap();
    let now_ms = group.now_ms;
    assert!(!group.node(leader).in_lease(now_ms));
    group.run_ms(3000);
    assert!(read_within(&mut group, leader, true, 500), "a majority still answers");
    let now_ms = group.now_ms;
    assert!(!group.node(leader).in_lease(now_ms));
}

#[test]
fn what_was_asked_before_a_change_gives_no_lease() {
    let mut reads = Reads::new(10, 100);
    let read = reads.add(1000, 5, None);
    reads.void();
    reads.confirmed(read, 7, true, 5);
    assert!(!reads.in_lease(1000, 5));
    assert!(reads.take(6).is_empty());
    assert_eq!(reads.take(7), [read]);
    let read = reads.add(2000, 5, None);
    assert!(reads.due(2399, 400).is_empty());
    assert_eq!(reads.due(2400, 400), [read]);
    reads.confirmed(read, 8, true, 5);
    // From when it was asked for, not from when the answer came; and in that term only.
    assert!(reads.in_lease(2809, 5) && !reads.in_lease(2810, 5) && !reads.in_lease(2100, 6));
}
