//! Time, and what happens to members. What clients do is in `clients`, what goes wrong in `faults`.

use super::backups::Backup;
use super::clients::Clients;
use super::digest::digest;
use super::disk::{Disk, Loss};
use super::member::{Member, holds_entry};
use super::network::{Network, Stream};
use super::oracle::{Checked, Oracle, Violation, violation};
use super::power::{Point, Power, Random};
use crate::database::Store;
use crate::membership::Members;
use crate::planted;
use crate::runner::{Input, contained};
use crate::tables::StateView;
use crate::{RaftStoreConfig, RaftStoreError, queries};
use baton_state::view;
use raft::eraftpb::Message;
use std::collections::{BTreeMap, BTreeSet};

/// What a seed is hardest on. Seeds take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flavour {
    /// Everything.
    All,
    /// Members that are away for long, a short log, chunks that get lost and doubled.
    Snapshots,
    /// Leaders that are cut off while clients go on, and others read from them.
    Leaders,
}

pub(super) enum Event {
    Deliver(Box<Message>),
    Tick(u64, u64),
    Turn(u64),
    Streams,
    Start(u64),
    Clients,
    Operator,
    Fault,
    Backup,
    Crash(u64),
    Heal(u64, u64),
}

pub(super) struct World {
    pub(super) seed: u64,
    pub(super) random: Random,
    pub(super) now_ms: u64,
    pub(super) members: BTreeMap<u64, Member>,
    pub(super) network: Network,
    /// Directions that are cut.
    pub(super) cut: BTreeSet<(u64, u64)>,
    pub(super) oracle: Oracle,
    pub(super) clients: Clients,
    pub(super) keep: u64,
    pub(super) flavour: Flavour,
    events: BTreeMap<(u64, u64), Event>,
    event: u64,
    pub(super) streams: Vec<Stream>,
    pub(super) backups: Vec<Backup>,
    /// Groups that were restored.
    pub(super) restored: u64,
    leaders: BTreeMap<u64, u64>,
    pub(super) trace: Option<Vec<String>>,
    pub(super) points: BTreeSet<Point>,
    pub(super) installed: u64,
    pub(super) operator: super::faults::Operator,
    /// Faults end, and everybody is to come back.
    pub(super) calm: bool,
}

impl World {
    pub(super) fn new(seed: u64, trace: bool) -> Self {
        let mut random = Random::new(seed);
        let founders = [3, 3, 3, 5, 1][random.range(0, 5) as usize];
        let voters: Vec<u64> = (1..=founders).collect();
        let members = Members {
            voters: voters.clone(),
            ..Members::default()
        };
        let mut network = Network {
            delay_ms: random.range(1, 12),
            ..Network::default()
        };
        if random.chance(60) {
            network.loss_percent = random.range(0, 12);
            network.twice_percent = random.range(0, 12);
            network.late_percent = random.range(0, 12);
        }
        let flavour = [Flavour::All, Flavour::Snapshots, Flavour::Leaders][(seed % 3) as usize];
        let mut keep = random.range(3, 40);
        if flavour == Flavour::Snapshots {
            keep = random.range(2, 6);
            network.twice_percent += 12;
            network.late_percent += 8;
        }
        let mut world = Self {
            seed,
            now_ms: 0,
            members: BTreeMap::new(),
            network,
            cut: BTreeSet::new(),
            oracle: Oracle::new(members),
            clients: Clients::new(&mut random),
            keep,
            flavour,
            events: BTreeMap::new(),
            event: 0,
            streams: Vec::new(),
            backups: Vec::new(),
            restored: 0,
            leaders: BTreeMap::new(),
            trace: trace.then(Vec::new),
            points: BTreeSet::new(),
            installed: 0,
            operator: super::faults::Operator::default(),
            calm: false,
            random,
        };
        for id in 1..=founders {
            world.add_member(id, voters.clone());
        }
        world.later(10, Event::Clients);
        world.later(50, Event::Streams);
        world
    }

    pub(super) fn add_member(&mut self, id: u64, voters: Vec<u64>) {
        let config = RaftStoreConfig {
            log_entries_keep: self.keep,
            ..RaftStoreConfig::member(id, voters)
        };
        let clock = self.random.range(970, 1030);
        self.members.insert(id, Member::new(config, clock));
        let delay = self.random.range(0, 200);
        self.later(delay, Event::Start(id));
    }

    pub(super) fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>6} {}", self.now_ms, line()));
        }
    }

    pub(super) fn later(&mut self, ms: u64, event: Event) {
        self.event += 1;
        self.events.insert((self.now_ms + ms, self.event), event);
    }

    /// Runs until a time.
    pub(super) fn run_until(&mut self, end_ms: u64) -> Checked {
        while let Some((&(at, number), _)) = self.events.first_key_value() {
            if at > end_ms {
                break;
            }
            let event = self.events.remove(&(at, number));
            self.now_ms = at;
            if let Some(event) = event {
                self.happen(event)?;
            }
        }
        self.now_ms = end_ms;
        Ok(())
    }

    fn happen(&mut self, event: Event) -> Checked {
        match event {
            Event::Deliver(message) => {
                let to = message.to;
                if let Some(member) = self.members.get_mut(&to)
                    && member.up()
                    && member.inbox.len() < 4096
                {
                    member.inbox.push(Input::Message(message));
                    self.wake(to);
                }
                Ok(())
            }
            Event::Tick(id, life) => {
                let member = &self.members[&id];
                if member.up() && member.lives == life {
                    self.later(100, Event::Tick(id, life));
                    self.wake(id);
                }
                Ok(())
            }
            Event::Turn(id) => self.turn(id),
            Event::Streams => {
                self.later(25, Event::Streams);
                for stream in std::mem::take(&mut self.streams) {
                    self.move_stream(stream)?;
                }
                self.move_backups()
            }
            Event::Start(id) => self.start(id),
            Event::Clients => {
                let ms = self.random.range(15, 60);
                self.later(ms, Event::Clients);
                self.clients_act()
            }
            Event::Operator => self.operator_acts(),
            Event::Fault => self.fault(),
            Event::Backup => self.begin_backup(),
            Event::Crash(id) => {
                if !self.calm && self.members[&id].up() {
                    self.crash(id, Loss::Some);
                }
                Ok(())
            }
            Event::Heal(from, to) => {
                self.cut.remove(&(from, to));
                Ok(())
            }
        }
    }

    pub(super) fn wake(&mut self, id: u64) {
        let delay = self.random.range(0, 3);
        if let Some(member) = self.members.get_mut(&id)
            && member.turn_at.is_none()
        {
            let at = (self.now_ms + delay).max(member.paused_until_ms);
            member.turn_at = Some(at);
            self.later(at - self.now_ms, Event::Turn(id));
        }
    }

    pub(super) fn start(&mut self, id: u64) -> Checked {
        let calm = self.calm;
        let odds = self.random.chance(8);
        let points = self.random.range(0, 40);
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(());
        };
        if member.up() || member.removed || member.gone {
            return Ok(());
        }
        if odds && !calm {
            member.power.fail_after(points);
        }
        let life = Random::new(self.seed ^ (id << 32) ^ (member.lives << 40)).next();
        let opened = member.open(life, self.now_ms);
        let off = member.power.off();
        let betrayed = member.betrayed;
        let seen = planted::take_witnessed();
        if off {
            self.crash(id, Loss::Some);
            return Ok(());
        }
        for seen in seen {
            self.oracle.witness(seen)?;
        }
        match opened {
            Ok(()) => {}
            Err(RaftStoreError::Removed) => {
                self.log(|| format!("member {id} finds that it was removed"));
                self.member_left(id);
                return Ok(());
            }
            Err(error) if betrayed => {
                self.log(|| format!("member {id} does not open its disk: {error}"));
                self.member_gone(id);
                return Ok(());
            }
            Err(error) => return violation(format!("member {id} does not start: {error}")),
        }
        let member = &self.members[&id];
        let change = self.oracle.last_change(member.promise.commit);
        let broken = member
            .broken_promise(change)
            .map_err(|error| Violation(error.to_string()))?;
        if let Some(broken) = broken
            && !betrayed
        {
            return violation(format!("member {id} forgot: {broken}"));
        }
        let lives = member.lives;
        self.log(|| format!("member {id} starts"));
        self.later(100, Event::Tick(id, lives));
        self.look_at(id, true)
    }

    /// One turn of a member's loop: the real one.
    fn turn(&mut self, id: u64) -> Checked {
        let now_ms = self.now_ms;
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(());
        };
        member.turn_at = None;
        if now_ms < member.paused_until_ms {
            self.wake(id);
            return Ok(());
        }
        let own_time = member.own_time(now_ms);
        let Some(life) = &mut member.life else { return Ok(()) };
        let inputs = std::mem::take(&mut member.inbox);
        let applied = life.runner.node.applied();
        let result = contained(|| life.runner.turn(own_time, inputs));
        self.oracle.counted(life.runner.node.committed(), applied);
        let sent = std::mem::take(&mut *life.outbox.lock().unwrap());
        for seen in planted::take_witnessed() {
            self.oracle.witness(seen)?;
        }
        for sent in sent {
            self.send(id, sent);
        }
        self.poll_answers(id)?;
        let member = &self.members[&id];
        if member.power.off() {
            self.crash(id, Loss::Some);
            return Ok(());
        }
        match result {
            Ok(_) => self.look_at(id, false),
            Err(RaftStoreError::Removed) => {
                self.log(|| format!("member {id} was removed"));
                self.member_left(id);
                Ok(())
            }
            Err(RaftStoreError::DiskFull | RaftStoreError::Disk(_)) if member.disk.refused() => {
                self.log(|| format!("member {id} stops, its disk is full"));
                self.crash(id, Loss::Nothing);
                Ok(())
            }
            Err(error) if member.betrayed => {
                self.log(|| format!("member {id} stops: {error}"));
                self.member_gone(id);
                Ok(())
            }
            Err(error) => violation(format!("member {id} stopped: {error}")),
        }
    }

    /// What can be seen of a member that runs.
    pub(super) fn look_at(&mut self, id: u64, thorough: bool) -> Checked {
        let thorough = thorough || self.random.chance(8);
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(());
        };
        let Some(life) = &member.life else { return Ok(()) };
        let node = &life.runner.node;
        let (applied, leads, term) = (node.applied(), node.leads(), node.term());
        if leads {
            let leader = *self.leaders.entry(term).or_insert(id);
            if leader != id {
                return violation(format!("members {leader} and {id} lead term {term}"));
            }
        }
        if member.looked_at == applied && !thorough {
            return Ok(());
        }
        member.looked_at = applied;
        if applied == 0 {
            return Ok(());
        }
        self.oracle.check_members(id, applied, node.members())?;
        let Some(expected) = self.oracle.at(applied) else {
            return violation(format!("member {id} says it applied {applied}, and nobody did"));
        };
        let failed = |error: RaftStoreError| Violation(format!("member {id} cannot be read: {error}"));
        let position = queries::position(&life.store).map_err(failed)?;
        if position.applied_index != applied {
            return violation(format!(
                "member {id} applied {applied}, and its store says {}",
                position.applied_index
            ));
        }
        if position.hash != expected.hash {
            return violation(format!("member {id} has another hash at {applied}"));
        }
        if thorough {
            let tables = StateView::open(&life.store).map_err(failed)?;
            if digest(&tables) != Some(expected.digest) {
                return violation(format!("member {id} has other tables at {applied}"));
            }
        }
        Ok(())
    }

    /// A member's process is gone, and starts again after a while.
    pub(super) fn crash(&mut self, id: u64, loss: Loss) {
        self.stop(id, loss);
        let delay = match self.random.range(0, 4) {
            0 => self.random.range(1500, 4000),
            _ => self.random.range(20, 800),
        };
        self.later(delay, Event::Start(id));
    }

    pub(super) fn stop(&mut self, id: u64, loss: Loss) {
        self.streams.retain(|stream| stream.from != id && stream.to != id);
        self.backups.retain(|backup| backup.member != id);
        self.clients.forget_calls(id);
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        let at = member.power.went_off_at();
        self.points.extend(at);
        member.power.cut();
        member.inbox.clear();
        member.life = None;
        let mut image = member.disk.image_after(loss, &mut self.random);
        if member.lives == 0 {
            // A store is created under another name and renamed.
            image = Default::default();
        }
        let full = member.disk.full();
        member.power = Power::default();
        member.disk = Disk::with(image, member.power.clone());
        member.disk.set_full(full);
        self.log(|| format!("member {id} loses its process at {at:?}, and of its disk {loss:?}"));
        if full && let Some(member) = self.members.get_mut(&id) {
            // Somebody made room.
            member.disk.set_full(false);
        }
    }

    /// A bit of a stopped member's log changes. Whether that is noticed depends on where. In the state's file nobody would notice: it is
    /// not walked at a start.
    pub(super) fn flip_bit(&mut self, id: u64) {
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        let mut image = member.disk.image_after(Loss::All, &mut self.random);
        let log = &mut image[0];
        let at = self.random.range(0, log.len() as u64) as usize;
        let bit = self.random.range(0, 8);
        log[at] ^= 1 << bit;
        member.disk = Disk::with(image, member.power.clone());
        member.betrayed = true;
        self.log(|| format!("bit {bit} of byte {at} of the log's file of member {id} changes"));
    }

    fn member_left(&mut self, id: u64) {
        self.stop(id, Loss::Nothing);
        if let Some(member) = self.members.get_mut(&id) {
            member.removed = true;
        }
    }

    fn member_gone(&mut self, id: u64) {
        self.stop(id, Loss::Nothing);
        if let Some(member) = self.members.get_mut(&id) {
            member.gone = true;
        }
    }

    pub(super) fn leader(&self) -> Option<u64> {
        let leaders = self.members.iter().filter_map(|(id, member)| {
            let node = &member.life.as_ref()?.runner.node;
            node.leads().then(|| (node.term(), *id))
        });
        leaders.max().map(|(_, id)| id)
    }

    /// All that think that they lead.
    pub(super) fn leading(&self) -> Vec<u64> {
        let leads = |member: &Member| member.life.as_ref().is_some_and(|life| life.runner.node.leads());
        self.members
            .iter()
            .filter(|(_, member)| leads(member))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The entry at `index` was answered: it must be on the disks of a majority as they would be after a loss of power. Of
    /// which majority: a change of the members counts once the leader has applied it, so one of those in force since what the
    /// leader had applied when it counted.
    pub(super) fn check_durable(&mut self, index: u64) -> Checked {
        // A majority that counts on a disk that lies is none.
        if self.members.values().any(|member| member.betrayed) {
            return Ok(());
        }
        let Some(majorities) = self.oracle.members_since(self.oracle.counted_at(index)) else {
            return Ok(());
        };
        let mut random = Random::new(0);
        let mut holding = BTreeSet::new();
        for (id, member) in &self.members {
            let voter = |members: &&Members| members.voters.contains(id) || members.voters_outgoing.contains(id);
            let image = member.disk.image_after(Loss::All, &mut random);
            if image[0].is_empty() || !majorities.iter().any(voter) {
                continue;
            }
            let held = contained(|| {
                let store = Store::on(Disk::with(image, Power::default()))?;
                holds_entry(&store, index)
            });
            if held.unwrap_or(false) {
                holding.insert(*id);
            }
        }
        let most = |of: &[u64]| of.iter().filter(|id| holding.contains(id)).count() * 2 > of.len();
        let counted =
            |members: &&Members| most(&members.voters) && (!members.joint() || most(&members.voters_outgoing));
        if majorities.iter().any(counted) {
            return Ok(());
        }
        let voters = majorities.iter().map(|members| &members.voters);
        violation(format!(
            "entry {index} was answered and is on the disks of {holding:?} of the voters {:?}",
            voters.collect::<Vec<_>>()
        ))
    }

    /// The rows of the ledger as a member has them, after one.
    pub(super) fn rows_after(&self, id: u64, sequence: u64) -> Option<Vec<baton_proto::state::LedgerRow>> {
        let life = self.members.get(&id)?.life.as_ref()?;
        view::rows_after(&StateView::open(&life.store).ok()?, sequence, 7).ok()
    }

    pub(super) fn up_members(&self) -> Vec<u64> {
        let up = self.members.iter().filter(|(_, member)| member.up());
        up.map(|(id, _)| *id).collect()
    }
}
