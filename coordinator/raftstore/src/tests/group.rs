//! Three members over a fake network: agreement, a member that was away, and a snapshot.

use super::disk::Disk;
use super::{register, settle};
use crate::database::Store;
use crate::node::Node;
use crate::queries::{self, Position};
use crate::tables::StateView;
use crate::{Applied, RaftStoreConfig};
use baton_state::view;
use prost::Message as _;
use raft::eraftpb::Message;
use std::collections::VecDeque;

struct Group {
    stores: Vec<Store>,
    nodes: Vec<Node>,
    /// Members cut off from all others.
    cut: Vec<bool>,
    wire: VecDeque<Message>,
    now_ms: u64,
    answers: Vec<Applied>,
}

impl Group {
    fn new(keep: u64) -> Self {
        let stores: Vec<_> = (0..3).map(|_| Store::on(Disk::default()).unwrap()).collect();
        let nodes = stores.iter().zip(1..).map(|(store, id)| {
            let config = RaftStoreConfig {
                log_entries_keep: keep,
                ..RaftStoreConfig::member(id, vec![1, 2, 3])
            };
            Node::open(store.clone(), &config, id).unwrap()
        });
        Self {
            nodes: nodes.collect(),
            stores,
            cut: vec![false; 3],
            wire: VecDeque::new(),
            now_ms: 0,
            answers: Vec::new(),
        }
    }

    /// Drives all members for a while of virtual time.
    fn run_ms(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now_ms += 100;
            for node in &mut self.nodes {
                node.advance_to(self.now_ms);
            }
            loop {
                for (i, node) in self.nodes.iter_mut().enumerate() {
                    let progress = node.process().unwrap();
                    self.answers
                        .extend(progress.answers.into_iter().map(|(_, outcome)| outcome.unwrap()));
                    if !self.cut[i] {
                        self.wire.extend(progress.messages);
                    }
                }
                let Some(message) = self.wire.pop_front() else { break };
                let to = message.to as usize - 1;
                if !self.cut[to] {
                    self.nodes[to].step(message);
                }
            }
        }
    }

    fn leader(&self) -> Option<usize> {
        (0..3).find(|i| !self.cut[*i] && self.nodes[*i].leads())
    }

    fn wait_for_leader(&mut self) -> usize {
        for _ in 0..50 {
            self.run_ms(200);
            if let Some(leader) = self.leader() {
                return leader;
            }
        }
        panic!("no leader within 10 s of virtual time");
    }

    fn positions(&self) -> Vec<Position> {
        self.stores
            .iter()
            .map(|store| queries::position(store).unwrap())
            .collect()
    }
}

#[test]
fn members_agree_and_a_lost_leader_is_replaced() {
    let mut group = Group::new(1000);
    let leader = group.wait_for_leader();
    group.nodes[leader].propose(register("w").encode_to_vec()).unwrap();
    group.nodes[leader].propose(settle("a", 1).encode_to_vec()).unwrap();
    // A follower passes a proposal on, and answers it.
    let follower = (leader + 1) % 3;
    group.nodes[follower].propose(settle("b", 2).encode_to_vec()).unwrap();
    group.run_ms(1000);
    assert_eq!(group.answers.len(), 3);
    let positions = group.positions();
    assert!(
        positions
            .iter()
            .all(|position| *position == positions[0] && position.settled == 2)
    );

    group.cut[leader] = true;
    // The old leader still takes it, and can not commit it.
    group.nodes[leader].propose(settle("lost", 9).encode_to_vec()).unwrap();
    let next = group.wait_for_leader();
    assert_ne!(next, leader);
    group.nodes[next].propose(settle("c", 3).encode_to_vec()).unwrap();
    group.run_ms(1000);
    group.cut[leader] = false;
    group.run_ms(3000);
    let positions = group.positions();
    assert!(
        positions
            .iter()
            .all(|position| *position == positions[0] && position.settled == 3)
    );
    assert!(
        group
            .stores
            .iter()
            .all(|store| view::usage(&StateView::open(store).unwrap(), "lost").unwrap().is_none())
    );
}

#[test]
fn a_member_far_behind_gets_a_snapshot() {
    let mut group = Group::new(4);
    let leader = group.wait_for_leader();
    let away = (leader + 1) % 3;
    group.cut[away] = true;
    group.nodes[leader].propose(register("w").encode_to_vec()).unwrap();
    for i in 0..30 {
        group.nodes[leader]
            .propose(settle(&format!("r{i}"), i).encode_to_vec())
            .unwrap();
        group.run_ms(100);
    }
    let last_seen = queries::position(&group.stores[away]).unwrap().applied_index;
    assert!(
        group.nodes[leader].first_index() > last_seen + 1,
        "the log no longer has what the member lacks"
    );
    group.cut[away] = false;
    group.run_ms(5000);
    let positions = group.positions();
    assert!(
        positions
            .iter()
            .all(|position| *position == positions[0] && position.settled == 30),
        "{positions:?}"
    );
    // And it goes on from there.
    let leader = group.leader().unwrap();
    group.nodes[leader].propose(register("w").encode_to_vec()).unwrap();
    group.run_ms(1000);
    assert_eq!(group.answers.last(), Some(&Applied::Registered { epoch: 2 }));
    let positions = group.positions();
    assert!(positions.iter().all(|position| *position == positions[0]));
}
