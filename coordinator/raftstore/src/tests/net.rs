//! A group over a network in memory: virtual time, cuts in either direction, loss and reordering by a seed, snapshot
//! streams that move a chunk at a time, disks that fail.

use super::disk::Disk;
use crate::database::Store;
use crate::membership::MembershipChange;
use crate::node::{Node, Outgoing, ProposalId};
use crate::queries::{self, Position};
use crate::snapshot::{SnapshotSink, SnapshotSource, Staging};
use crate::tables::StateView;
use crate::{Applied, RaftStoreConfig, RaftStoreError};
use baton_proto::state::Command;
use baton_state::Outcome;
use prost::Message as _;
use raft::eraftpb::Message;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub(super) struct Member {
    pub(super) disk: Disk,
    pub(super) store: Store,
    staging: Staging,
    /// None once it failed or was removed.
    pub(super) node: Option<Node>,
    pub(super) error: Option<RaftStoreError>,
    pub(super) removed: bool,
}

struct Stream {
    message: Message,
    source: Box<SnapshotSource>,
    sink: Option<SnapshotSink>,
}

pub(super) struct Group {
    pub(super) members: BTreeMap<u64, Member>,
    keep: u64,
    /// Directions that are cut.
    pub(super) cut: BTreeSet<(u64, u64)>,
    /// Messages lost, in percent; chunks too.
    pub(super) loss_percent: u64,
    random: u64,
    wire: VecDeque<Message>,
    streams: Vec<Stream>,
    pub(super) streams_begun: usize,
    pub(super) streams_failed: usize,
    pub(super) chunks_max: u64,
    pub(super) now_ms: u64,
    lives: u64,
    pub(super) answers: Vec<(u64, ProposalId, Outcome)>,
    pub(super) orphans: Vec<(u64, ProposalId)>,
    pub(super) changed: Vec<(u64, ProposalId)>,
    pub(super) reads: Vec<(u64, u64)>,
    pub(super) replaced: BTreeMap<u64, usize>,
}

impl Group {
    pub(super) fn new(founders: u64, keep: u64) -> Self {
        let mut group = Self {
            members: BTreeMap::new(),
            keep,
            cut: BTreeSet::new(),
            loss_percent: 0,
            random: 1,
            wire: VecDeque::new(),
            streams: Vec::new(),
            streams_begun: 0,
            streams_failed: 0,
            chunks_max: 0,
            now_ms: 0,
            lives: 0,
            answers: Vec::new(),
            orphans: Vec::new(),
            changed: Vec::new(),
            reads: Vec::new(),
            replaced: BTreeMap::new(),
        };
        for id in 1..=founders {
            group.start(id, (1..=founders).collect(), Disk::default()).unwrap();
        }
        group
    }

    pub(super) fn with_seed(mut self, seed: u64) -> Self {
        self.random = seed;
        self
    }

    fn start(&mut self, id: u64, voters: Vec<u64>, disk: Disk) -> Result<(), RaftStoreError> {
        let store = Store::on(disk.clone())?;
        let config = RaftStoreConfig {
            log_entries_keep: self.keep,
            ..RaftStoreConfig::member(id, voters)
        };
        self.lives += 1;
        let staging = Staging::open(store.clone())?;
        let node = Node::open(store.clone(), &config, self.lives, self.now_ms)?;
        let member = Member {
            disk,
            store,
            staging,
            node: Some(node),
            error: None,
            removed: false,
        };
        self.members.insert(id, member);
        Ok(())
    }

    /// A new member with an empty disk.
    pub(super) fn join(&mut self, id: u64) {
        self.start(id, Vec::new(), Disk::default()).unwrap();
    }

    /// Power loss and start of a member. `choice` picks which unsynced writes survive.
    pub(super) fn restart(&mut self, id: u64, choice: u64) -> Result<(), RaftStoreError> {
        let member = self.members.remove(&id).unwrap();
        let image = member.disk.crash_image(choice);
        // The other ends of its streams find them broken.
        for stream in std::mem::take(&mut self.streams) {
            if stream.message.to == id {
                if let Some(Member { node: Some(node), .. }) = self.members.get_mut(&stream.message.from) {
                    node.report_snapshot(id, false);
                }
            } else if stream.message.from != id {
                self.streams.push(stream);
            }
        }
        drop(member);
        self.start(id, Vec::new(), Disk::with(image))
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 100 < percent
    }

    pub(super) fn isolate(&mut self, id: u64) {
        for &other in self.members.keys() {
            self.cut.insert((id, other));
            self.cut.insert((other, id));
        }
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
    }

    /// Drives all members for a while of virtual time.
    pub(super) fn run_ms(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now_ms += 100;
            for member in self.members.values_mut() {
                if let Some(node) = &mut member.node {
                    node.advance_to(self.now_ms);
                }
            }
            for _ in 0..200 {
                let busy = self.process_all();
                if !busy && self.wire.is_empty() {
                    break;
                }
                while let Some(message) = self.wire.pop_front() {
                    self.deliver(message);
                }
            }
            self.move_streams();
        }
    }

    /// Everybody acts once and gets what was sent, so many times: no time passes.
    pub(super) fn exchange(&mut self, times: usize) {
        for _ in 0..times {
            self.process_all();
            for message in std::mem::take(&mut self.wire) {
                self.deliver(message);
            }
        }
    }

    fn deliver(&mut self, message: Message) {
        if self.cut.contains(&(message.from, message.to)) || self.chance(self.loss_percent) {
            return;
        }
        if let Some(Member { node: Some(node), .. }) = self.members.get_mut(&message.to) {
            node.step(message);
        }
    }

    /// True if anything was sent.
    fn process_all(&mut self) -> bool {
        let mut sent = Vec::new();
        for (&id, member) in &mut self.members {
            let Some(node) = &mut member.node else { continue };
            let progress = match node.process(&mut |outgoing| sent.push(outgoing)) {
                Ok(progress) => progress,
                Err(error) => {
                    member.error = Some(error);
                    member.node = None;
                    continue;
                }
            };
            self.answers.extend(
                progress
                    .answers
                    .into_iter()
                    .map(|(proposal, outcome)| (id, proposal, outcome)),
            );
            self.orphans
                .extend(progress.orphans.into_iter().map(|proposal| (id, proposal)));
            self.changed
                .extend(progress.changed.into_iter().map(|proposal| (id, proposal)));
            self.reads.extend(progress.reads.into_iter().map(|read| (id, read)));
            *self.replaced.entry(id).or_default() += usize::from(progress.replaced);
            if progress.removed {
                member.removed = true;
                member.node = None;
            }
        }
        let busy = !sent.is_empty();
        self.send(sent);
        busy
    }

    pub(super) fn send(&mut self, sent: Vec<Outgoing>) {
        for outgoing in sent {
            match outgoing {
                Outgoing::Message(message) if self.chance(self.loss_percent / 2) => self.wire.push_front(message),
                Outgoing::Message(message) => self.wire.push_back(message),
                Outgoing::Snapshot(message, mut source) => {
                    self.streams_begun += 1;
                    source.chunk_bytes = 1000;
                    self.streams.push(Stream {
                        message,
                        source,
                        sink: None,
                    });
                }
            }
        }
    }

    /// Every stream moves by one chunk.
    fn move_streams(&mut self) {
        for mut stream in std::mem::take(&mut self.streams) {
            let (from, to) = (stream.message.from, stream.message.to);
            let lost = self.cut.contains(&(from, to)) || self.chance(self.loss_percent);
            let through = if lost {
                Some(false)
            } else {
                self.move_stream(&mut stream)
            };
            match through {
                None => self.streams.push(stream),
                Some(delivered) => {
                    self.streams_failed += usize::from(!delivered);
                    if let Some(Member { node: Some(node), .. }) = self.members.get_mut(&from) {
                        node.report_snapshot(to, delivered);
                    }
                }
            }
        }
    }

    /// `None` while it goes on.
    fn move_stream(&mut self, stream: &mut Stream) -> Option<bool> {
        let member = self.members.get_mut(&stream.message.to)?;
        let Some(node) = &mut member.node else {
            return Some(false);
        };
        if stream.sink.is_none() {
            let unused = Box::new(|_, _| Ok(()));
            match SnapshotSink::begin(&member.staging, stream.message.clone(), unused) {
                Ok(sink) => stream.sink = Some(sink),
                Err(_) => return Some(false),
            }
        }
        match stream.source.next_chunk().unwrap() {
            Some(chunk) => {
                self.chunks_max = self.chunks_max.max(chunk.number);
                let taken = stream.sink.as_mut().unwrap().chunk(&chunk);
                taken.is_err().then_some(false)
            }
            None => match stream.sink.take().unwrap().into_staged() {
                Ok((message, staged)) => Some(node.step_snapshot(message, staged).is_ok()),
                Err(_) => Some(false),
            },
        }
    }

    pub(super) fn node(&mut self, id: u64) -> &mut Node {
        self.members.get_mut(&id).unwrap().node.as_mut().unwrap()
    }

    pub(super) fn propose(&mut self, id: u64, command: &Command) -> Result<ProposalId, RaftStoreError> {
        self.node(id).propose(command.encode_to_vec())
    }

    /// Proposes at the leader and expects the answer.
    pub(super) fn commit(&mut self, command: &Command) -> Applied {
        let leader = self.wait_for_leader();
        // Ids start anew with each life.
        self.answers.clear();
        let id = self.propose(leader, command).unwrap();
        for _ in 0..30 {
            self.run_ms(100);
            if let Some((.., outcome)) = self.answers.iter().find(|(at, found, _)| (*at, *found) == (leader, id)) {
                return outcome.clone().unwrap();
            }
        }
        panic!("no answer within 3 s of virtual time");
    }

    /// Changes the membership at the leader, and waits for it.
    pub(super) fn change(&mut self, change: MembershipChange) {
        for _ in 0..100 {
            let leader = self.wait_for_leader();
            match self.node(leader).change_members(change) {
                Ok(None) => return,
                Ok(Some(id)) => {
                    for _ in 0..50 {
                        self.run_ms(100);
                        if self.changed.contains(&(leader, id)) {
                            return;
                        }
                    }
                }
                Err(_) => self.run_ms(100),
            }
        }
        panic!("the change was not made within the time");
    }

    pub(super) fn leader(&self) -> Option<u64> {
        let mut leaders: Vec<_> = self
            .members
            .iter()
            .filter_map(|(&id, member)| {
                let node = member.node.as_ref().filter(|node| node.leads())?;
                Some((node.term(), id))
            })
            .collect();
        leaders.sort_unstable();
        leaders.last().map(|(_, id)| *id)
    }

    /// A leader that is not cut off from a majority.
    pub(super) fn wait_for_leader(&mut self) -> u64 {
        for _ in 0..100 {
            if let Some(leader) = self.leader() {
                let voters = &self.members[&leader].node.as_ref().unwrap().members().voters;
                let reached = voters.iter().filter(|&&to| !self.cut.contains(&(leader, to)));
                if reached.count() * 2 > voters.len() {
                    return leader;
                }
            }
            self.run_ms(100);
        }
        panic!("no leader within 10 s of virtual time");
    }

    pub(super) fn position(&self, id: u64) -> Position {
        queries::position(&self.members[&id].store).unwrap()
    }

    pub(super) fn view(&self, id: u64) -> StateView {
        StateView::open(&self.members[&id].store).unwrap()
    }

    /// All that run, by id.
    pub(super) fn positions(&self) -> Vec<Position> {
        let running = self.members.iter().filter(|(_, member)| member.node.is_some());
        running.map(|(&id, _)| self.position(id)).collect()
    }

    pub(super) fn assert_agreement(&self, settled: u64) {
        let positions = self.positions();
        assert!(
            positions
                .iter()
                .all(|position| *position == positions[0] && position.settled == settled),
            "{positions:?}"
        );
    }
}
