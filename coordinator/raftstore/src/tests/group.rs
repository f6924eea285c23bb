//! Agreement: a lost leader, followers that pass on, partitions, a lossy network, handing over.

use super::net::Group;
use super::{register, settle};
use crate::node::Outgoing;
use crate::{Applied, MembershipRefused, RaftStoreError};
use baton_state::view;

#[test]
fn members_agree_and_a_lost_leader_is_replaced() {
    let mut group = Group::new(3, 1000);
    let leader = group.wait_for_leader();
    group.propose(leader, &register("w")).unwrap();
    group.propose(leader, &settle("a", 1)).unwrap();
    // A follower passes a proposal on, and answers it.
    let follower = leader % 3 + 1;
    let passed = group.propose(follower, &settle("b", 2)).unwrap();
    group.run_ms(1000);
    assert_eq!(group.answers.len(), 3);
    assert!(group.answers.iter().any(|(at, id, _)| (*at, *id) == (follower, passed)));
    group.assert_agreement(2);

    group.isolate(leader);
    // The old leader still takes it, and can not commit it.
    let lost = group.propose(leader, &settle("lost", 9)).unwrap();
    group.run_ms(4000);
    assert!(group.orphans.contains(&(leader, lost)), "its caller is told");
    assert!(matches!(
        group.propose(leader, &settle("lost", 9)),
        Err(RaftStoreError::NoLeader)
    ));
    assert_ne!(group.wait_for_leader(), leader);
    group.commit(&settle("c", 3));
    group.heal();
    group.run_ms(3000);
    group.assert_agreement(3);
    for id in 1..=3 {
        assert!(view::usage(&group.view(id), "lost").unwrap().is_none());
    }
}

/// A follower's caller learns that its proposal went down with the leader.
#[test]
fn a_proposal_passed_to_a_lost_leader_is_an_orphan() {
    let mut group = Group::new(3, 1000);
    let leader = group.wait_for_leader();
    let follower = leader % 3 + 1;
    group.isolate(leader);
    let passed = group.propose(follower, &settle("a", 1)).unwrap();
    group.run_ms(6000);
    assert!(group.orphans.contains(&(follower, passed)));
    assert!(group.answers.is_empty());
}

/// Half a group can do nothing; the other half goes on, and one-way cuts confuse nobody for long.
#[test]
fn partitions_of_five_keep_one_history() {
    let mut group = Group::new(5, 1000);
    let leader = group.wait_for_leader();
    let friend = leader % 5 + 1;
    for one in 1..=5 {
        for other in 1..=5 {
            if [leader, friend].contains(&one) != [leader, friend].contains(&other) {
                group.cut.insert((one, other));
            }
        }
    }
    let lost = group.propose(leader, &settle("minority", 1)).unwrap();
    group.run_ms(5000);
    assert!(group.orphans.contains(&(leader, lost)));
    assert_eq!(group.commit(&settle("majority", 2)), Applied::Settled { sequence: 1 });
    group.heal();
    group.run_ms(3000);
    group.assert_agreement(1);
    // The leader hears all and is heard by none: others elect one that is heard.
    let deaf = group.wait_for_leader();
    for other in 1..=5 {
        group.cut.insert((deaf, other));
    }
    group.run_ms(5000);
    assert_ne!(group.wait_for_leader(), deaf);
    group.commit(&settle("next", 3));
    group.heal();
    group.run_ms(3000);
    group.assert_agreement(2);
}

#[test]
fn a_lossy_network_only_costs_time() {
    for seed in 1..=5 {
        let mut group = Group::new(3, 8).with_seed(seed * 7919);
        group.loss_percent = 20;
        let mut wanted = 0;
        for i in 0..20 {
            let name = format!("r{i}");
            // As a caller would: again, elsewhere, until it is answered.
            for attempt in 0..200 {
                let at = (i + attempt) % 3 + 1;
                let Ok(id) = group.propose(at, &settle(&name, 1)) else {
                    group.run_ms(100);
                    continue;
                };
                group.run_ms(600);
                if group.answers.iter().any(|(on, found, _)| (*on, *found) == (at, id)) {
                    wanted += 1;
                    break;
                }
            }
        }
        assert_eq!(wanted, 20, "seed {seed}");
        group.loss_percent = 0;
        group.run_ms(8000);
        group.assert_agreement(20);
    }
}

#[test]
fn leadership_is_handed_over() {
    let mut group = Group::new(3, 1000);
    let leader = group.wait_for_leader();
    let (to, other) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    assert!(matches!(
        group.node(to).transfer(Some(other)),
        Err(RaftStoreError::NotLeader { leader_id }) if leader_id == leader
    ));
    assert!(matches!(
        group.node(leader).transfer(Some(9)),
        Err(RaftStoreError::Membership(_))
    ));
    group.commit(&settle("a", 1));
    let before_ms = group.now_ms;
    group.node(leader).transfer(Some(to)).unwrap();
    group.run_ms(200);
    assert_eq!(group.leader(), Some(to));
    assert!(group.now_ms - before_ms < 1000, "no election timeout was needed");
    group.commit(&settle("b", 1));
    group.assert_agreement(2);
    // To a member that is away it fails, and the leader goes on.
    group.isolate(other);
    group.node(to).transfer(Some(other)).unwrap();
    assert!(matches!(
        group.propose(to, &settle("c", 1)),
        Err(RaftStoreError::NoLeader)
    ));
    group.run_ms(2500);
    assert_eq!(group.commit(&settle("c", 1)), Applied::Settled { sequence: 3 });
    // Nobody named: the one that is there.
    assert_eq!(group.node(to).transfer(None).unwrap(), leader);
    group.run_ms(200);
    assert_eq!(group.leader(), Some(leader));
    let mut alone = Group::new(1, 100);
    let one = alone.wait_for_leader();
    assert!(matches!(
        alone.node(one).transfer(None),
        Err(RaftStoreError::Membership(MembershipRefused::NoSuccessor))
    ));
}

/// A batch costs one fsync on each member, a second one if the file grows, and leaves the leader before its own.
#[test]
fn a_batch_shares_one_sync_and_is_sent_before_it() {
    let mut group = Group::new(3, 1000);
    let leader = group.wait_for_leader();
    group.commit(&settle("first", 1));
    group.run_ms(1000);
    let syncs = |group: &Group| -> Vec<u64> { group.members.values().map(|member| member.disk.syncs()).collect() };
    let before = syncs(&group);
    for i in 0..100 {
        group.propose(leader, &settle(&format!("r{i}"), i)).unwrap();
    }
    let disk = group.members[&leader].disk.clone();
    let mut sent = Vec::new();
    let mut entries_sent = 0;
    let progress = group.node(leader).process(&mut |outgoing| {
        if let Outgoing::Message(message) = &outgoing {
            entries_sent += message.get_entries().len();
            assert_eq!(disk.syncs(), before[leader as usize - 1], "sent before it is written");
        }
        sent.push(outgoing);
    });
    assert!(progress.unwrap().answers.is_empty(), "no majority has it");
    assert_eq!(entries_sent, 200, "to two members");
    assert!((1..=2).contains(&(disk.syncs() - before[leader as usize - 1])));
    group.answers.clear();
    group.send(sent);
    group.exchange(6);
    assert_eq!(group.answers.len(), 100);
    let after = syncs(&group);
    for (before, after) in before.iter().zip(&after) {
        assert!((1..=2).contains(&(after - before)), "{}", after - before);
    }
    group.assert_agreement(101);
}
