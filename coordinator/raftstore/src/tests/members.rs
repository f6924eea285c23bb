//! Who belongs to the group: newcomers, promotion, replacement, removal, and what is refused.

use super::net::Group;
use super::settle;
use crate::membership::{Members, MembershipChange, MembershipRefused};
use crate::{Applied, RaftStoreConfig, RaftStoreError};

fn refusal(group: &mut Group, change: MembershipChange) -> MembershipRefused {
    let leader = group.wait_for_leader();
    match group.node(leader).change_members(change) {
        Err(RaftStoreError::Membership(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_group_of_one_grows_to_three_and_moves_to_other_members() {
    let mut group = Group::new(1, 4);
    for i in 0..20 {
        group.commit(&settle(&format!("r{i}"), i));
    }
    for id in [2, 3] {
        group.join(id);
        group.run_ms(500);
        assert_eq!(group.position(id).applied_index, 0, "nobody told it anything yet");
        group.change(MembershipChange::AddLearner(id));
        group.run_ms(3000);
        group.assert_agreement(20);
        assert_eq!(group.replaced[&id], 1, "it came by a snapshot");
        assert!(!group.node(id).leads());
        group.change(MembershipChange::Promote(id));
    }
    let leader = group.wait_for_leader();
    assert_eq!(group.node(leader).members().voters, [1, 2, 3]);
    // One of the old ones is replaced in one step.
    group.join(4);
    group.change(MembershipChange::AddLearner(4));
    group.run_ms(3000);
    let old = leader % 3 + 1;
    group.change(MembershipChange::Replace { old, new: 4 });
    group.run_ms(1000);
    assert!(group.members[&old].removed, "it noticed");
    assert_eq!(group.commit(&settle("last", 1)), Applied::Settled { sequence: 21 });
    group.run_ms(500);
    group.assert_agreement(21);
    for member in group.members.values_mut() {
        if let Some(node) = &mut member.node {
            let members = node.members();
            assert!(members.voters.contains(&4) && !members.voters.contains(&old) && !members.joint());
            assert!(members.learners.is_empty());
        }
    }
    // A removed member does not come back by itself.
    assert!(matches!(group.restart(old, 1), Err(RaftStoreError::Removed)));
}

#[test]
fn the_old_leader_leaves_after_handing_over() {
    let mut group = Group::new(3, 100);
    let leader = group.wait_for_leader();
    group.commit(&settle("a", 1));
    assert_eq!(
        refusal(&mut group, MembershipChange::Remove(leader)),
        MembershipRefused::Leads { id: leader }
    );
    let to = leader % 3 + 1;
    group.node(leader).transfer(Some(to)).unwrap();
    group.run_ms(500);
    group.change(MembershipChange::Remove(leader));
    group.run_ms(500);
    assert!(group.members[&leader].removed);
    group.commit(&settle("b", 1));
    group.assert_agreement(2);
    // And down to one.
    let rest: Vec<_> = group.node(to).members().voters.clone();
    let last = *rest.iter().find(|id| **id != to).unwrap();
    group.change(MembershipChange::Remove(last));
    assert_eq!(
        refusal(&mut group, MembershipChange::Remove(to)),
        MembershipRefused::LastVoter { id: to }
    );
    group.commit(&settle("c", 1));
    group.assert_agreement(3);
}

#[test]
fn changes_that_would_hurt_are_refused() {
    let mut group = Group::new(3, 4);
    let leader = group.wait_for_leader();
    group.commit(&settle("a", 1));
    let follower = leader % 3 + 1;
    assert!(matches!(
        group.node(follower).change_members(MembershipChange::AddLearner(4)),
        Err(RaftStoreError::NotLeader { leader_id }) if leader_id == leader
    ));
    assert!(matches!(
        refusal(&mut group, MembershipChange::Promote(4)),
        MembershipRefused::NotA { id: 4, .. }
    ));
    // A learner that never comes up is not given a vote, one change at a time is made, and commits go on.
    let id = group
        .node(leader)
        .change_members(MembershipChange::AddLearner(4))
        .unwrap();
    assert!(id.is_some());
    assert_eq!(
        refusal(&mut group, MembershipChange::AddLearner(5)),
        MembershipRefused::UnderWay
    );
    for _ in 0..30 {
        // Nor before it is known to be silent, as long as the log is so short that nobody lacks much.
        group.run_ms(10);
        let refused = refusal(&mut group, MembershipChange::Promote(4));
        let waits = matches!(
            refused,
            MembershipRefused::Behind { id: 4, .. } | MembershipRefused::UnderWay
        );
        assert!(waits, "{refused:?}");
    }
    group.run_ms(3000);
    assert!(matches!(
        refusal(&mut group, MembershipChange::Promote(4)),
        MembershipRefused::Behind { id: 4, .. }
    ));
    assert!(matches!(
        refusal(&mut group, MembershipChange::Replace { old: follower, new: 4 }),
        MembershipRefused::Behind { id: 4, .. }
    ));
    group.commit(&settle("b", 1));
    // What is so already is no change.
    assert_eq!(
        group
            .node(leader)
            .change_members(MembershipChange::AddLearner(4))
            .unwrap(),
        None
    );
    assert_eq!(
        group.node(leader).change_members(MembershipChange::Remove(9)).unwrap(),
        None
    );
    group.change(MembershipChange::Remove(4));
    assert_eq!(
        *group.node(leader).members(),
        Members {
            voters: vec![1, 2, 3],
            ..Members::default()
        }
    );
    for founders in [vec![1, 2], vec![1, 1, 2], vec![1, 2, 3, 4], vec![0]] {
        let config = RaftStoreConfig::member(1, founders);
        assert!(matches!(config.check(), Err(RaftStoreError::Config(_))));
    }
}

/// The leader is lost at every step of a replacement; whatever came of it, the group ends in one of the two memberships and
/// out of the joint one.
#[test]
fn a_replacement_survives_the_loss_of_its_leader() {
    for steps in 0..8 {
        let mut group = Group::new(3, 1000).with_seed(steps + 1);
        group.commit(&settle("a", 1));
        group.join(4);
        group.change(MembershipChange::AddLearner(4));
        group.run_ms(2000);
        let leader = group.wait_for_leader();
        let old = leader % 3 + 1;
        group
            .node(leader)
            .change_members(MembershipChange::Replace { old, new: 4 })
            .unwrap();
        group.exchange(steps as usize);
        group.isolate(leader);
        group.run_ms(6000);
        group.heal();
        group.run_ms(3000);
        group.commit(&settle("b", 1));
        group.run_ms(1000);
        let now = group.wait_for_leader();
        let members = group.node(now).members().clone();
        assert!(!members.joint(), "steps {steps}");
        let mut expected: Vec<_> = (1..=4).filter(|id| *id != old).collect();
        if members.voters != expected {
            expected = vec![1, 2, 3];
        }
        assert_eq!(members.voters, expected, "steps {steps}");
        for id in members.voters {
            assert_eq!(group.position(id), group.position(now), "steps {steps}");
        }
    }
}
