//! Three members, of which one loses power at each of its disk operations: what was answered anywhere stays, and all agree.

use super::net::Group;
use super::{register, settle};
use crate::Applied;
use crate::membership::MembershipChange;
use baton_state::view;
use std::io::ErrorKind;

/// A life with everything in it: commits, compaction, a newcomer with its snapshot, a replacement. Returns what was settled.
fn live(group: &mut Group, victim: u64) -> Vec<String> {
    let mut settled = Vec::new();
    let settle_some = |group: &mut Group, settled: &mut Vec<String>, count: usize| {
        for _ in 0..count {
            let name = format!("r{}", settled.len());
            for _ in 0..200 {
                revive(group, victim);
                let leader = group.wait_for_leader();
                // Ids start anew with each life.
                group.answers.clear();
                let Ok(id) = group.propose(leader, &settle(&name, 1)) else {
                    group.run_ms(100);
                    continue;
                };
                group.run_ms(200);
                let answer = group
                    .answers
                    .iter()
                    .find(|(at, found, _)| (*at, *found) == (leader, id));
                if let Some((.., outcome)) = answer {
                    let sequence = settled.len() as u64 + 1;
                    assert_eq!(*outcome, Ok(Applied::Settled { sequence }));
                    settled.push(name);
                    break;
                }
            }
        }
    };
    settle_some(group, &mut settled, 6);
    group.join(4);
    change(group, victim, MembershipChange::AddLearner(4));
    settle_some(group, &mut settled, 3);
    for _ in 0..30 {
        revive(group, victim);
        group.run_ms(100);
    }
    let leader = group.wait_for_leader();
    let old = (1..=3).find(|id| *id != leader && *id != victim).unwrap();
    change(group, victim, MembershipChange::Replace { old, new: 4 });
    settle_some(group, &mut settled, 3);
    settled
}

/// As an operator would: again, at whoever leads.
fn change(group: &mut Group, victim: u64, change: MembershipChange) {
    for _ in 0..100 {
        revive(group, victim);
        let leader = group.wait_for_leader();
        match group.node(leader).change_members(change) {
            Ok(None) => return,
            Ok(Some(_)) | Err(_) => group.run_ms(300),
        }
    }
    panic!("{change:?} was not made");
}

fn revive(group: &mut Group, victim: u64) {
    let member = &group.members[&victim];
    if member.node.is_none() && !member.removed {
        let choice = group.now_ms;
        group.restart(victim, choice).unwrap();
    }
}

#[test]
fn a_member_that_fails_at_any_disk_operation_comes_back() {
    // The leader, which is the first to time out with this seed or not, and another one.
    for victim in 1..=2 {
        let mut whole = Group::new(3, 4);
        live(&mut whole, victim);
        let operations = whole.members[&victim].disk.operations();
        assert!(operations > 60, "{operations}");
        // Creating the file is tested with a group of one.
        let from = Group::new(3, 4).members[&victim].disk.operations();
        // Every one in a soak; a sample, different for each victim, in a usual run.
        let step = if std::env::var_os("BATON_SOAK").is_some() { 1 } else { 5 };
        for at in (from + victim..operations).step_by(step) {
            let mut group = Group::new(3, 4);
            group.members[&victim].disk.fail_at(at, ErrorKind::Other);
            let settled = live(&mut group, victim);
            assert_eq!(settled.len(), 12, "victim {victim} at {at}");
            revive(&mut group, victim);
            group.run_ms(5000);
            revive(&mut group, victim);
            group.run_ms(4000);
            group.commit(&register("w"));
            group.run_ms(1000);
            group.assert_agreement(12);
            let leader = group.wait_for_leader();
            for (at, name) in settled.iter().enumerate() {
                let found = view::usage(&group.view(leader), name).unwrap().unwrap();
                assert_eq!(found.sequence, at as u64 + 1);
            }
        }
    }
}

/// All lose power at once, again and again.
#[test]
fn a_group_without_power_loses_nothing() {
    let mut group = Group::new(3, 4);
    for round in 0..10u32 {
        group.commit(&settle(&format!("r{round}"), round));
        if round % 2 == 0 {
            // In the middle of something.
            let leader = group.wait_for_leader();
            group.propose(leader, &register("w")).unwrap();
            group.exchange(round as usize / 2);
        }
        for id in 1..=3 {
            group.restart(id, u64::from(round * 3) + id).unwrap();
        }
    }
    group.commit(&register("last"));
    group.run_ms(1000);
    group.assert_agreement(10);
}
