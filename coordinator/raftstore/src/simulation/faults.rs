//! What goes wrong, and the operator who changes who belongs to the group meanwhile.

use super::disk::Loss;
use super::oracle::Checked;
use super::world::{Event, Flavour, World};
use crate::RaftStoreError;
use crate::membership::MembershipChange;
use crate::runner::Input;
use tokio::sync::oneshot;

/// What the operator does next, and waits for.
#[derive(Default)]
pub(super) struct Operator {
    plan: Vec<MembershipChange>,
    waiting: Option<(oneshot::Receiver<Result<(), RaftStoreError>>, u64)>,
    pub(super) made: u64,
}

impl World {
    /// Draws the plan of a run.
    pub(super) fn plan(&mut self) {
        let ms = self.random.range(300, 1500);
        self.later(ms, Event::Fault);
        let ms = self.random.range(800, 9000);
        self.later(ms, Event::Backup);
        let founders = self.members.len() as u64;
        if self.random.chance(45) {
            let new = founders + 1;
            let mut plan = vec![MembershipChange::AddLearner(new)];
            let old = self.random.range(1, founders + 1);
            match self.random.range(0, 3) {
                0 if founders > 1 => plan.push(MembershipChange::Replace { old, new }),
                1 if founders < 5 => plan.extend([MembershipChange::Promote(new), MembershipChange::Remove(old)]),
                _ if founders < 5 => plan.push(MembershipChange::Promote(new)),
                _ => plan.push(MembershipChange::Remove(new)),
            }
            plan.reverse();
            self.operator.plan = plan;
            let ms = self.random.range(1500, 6000);
            self.later(ms, Event::Operator);
        }
    }

    pub(super) fn fault(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        let ms = self.random.range(200, 1400);
        self.later(ms, Event::Fault);
        let ids = self.up_members();
        let Some(mut id) = self.random.pick(&ids) else {
            return Ok(());
        };
        if self.random.chance(40) {
            id = self.leader().unwrap_or(id);
        }
        let points = self.random.range(0, 60);
        let long = self.random.range(300, 4500);
        let kinds: &[u64] = match self.flavour {
            Flavour::All => &[],
            Flavour::Snapshots => &[0, 0, 10, 11, 13, 13, 14, 14, 16],
            Flavour::Leaders => &[0, 13, 13, 13, 13, 15, 19],
        };
        let any = self.random.range(0, 20);
        let kind = self.random.pick(kinds).unwrap_or(any);
        let odds = if self.flavour == Flavour::Leaders { 85 } else { 0 };
        if self.random.chance(odds) {
            id = self.leader().unwrap_or(id);
        }
        match kind {
            // The power goes at the next points.
            0..=7 => {
                if let Some(member) = self.members.get(&id) {
                    member.power.fail_after(points);
                    self.wake(id);
                }
            }
            // The process is killed.
            8 => self.crash(id, Loss::Nothing),
            9 => {
                for id in ids {
                    if let Some(member) = self.members.get(&id) {
                        let points = self.random.range(0, 25);
                        member.power.fail_after(points);
                    }
                }
                self.log(|| "all are to lose power".to_owned());
            }
            10 => {
                let loss = [Loss::All, Loss::Some, Loss::Nothing][self.random.range(0, 3) as usize];
                for id in ids {
                    self.crash(id, loss);
                }
            }
            11 | 12 => {
                self.log(|| format!("member {id} is paused for {long} ms"));
                if let Some(member) = self.members.get_mut(&id) {
                    member.paused_until_ms = self.now_ms + long;
                }
            }
            13 | 14 => self.isolate(id, long, true, true),
            15 => self.isolate(id, long, true, false),
            16 => self.isolate(id, long, false, true),
            17 => {
                let to = self.random.pick(&ids).unwrap_or(id);
                self.log(|| format!("{id} does not reach {to}"));
                self.cut.insert((id, to));
                self.later(long, Event::Heal(id, to));
            }
            18 => {
                self.log(|| format!("the disk of member {id} is full"));
                if let Some(member) = self.members.get(&id) {
                    member.disk.set_full(true);
                }
            }
            _ => {
                if let (Some(leader), Some(to)) = (self.leader(), self.random.pick(&ids)) {
                    self.log(|| format!("member {leader} is asked to hand over to {to}"));
                    let (sender, _) = oneshot::channel();
                    if let Some(member) = self.members.get_mut(&leader) {
                        member.inbox.push(Input::Transfer(Some(to), sender));
                    }
                    self.wake(leader);
                }
            }
        }
        Ok(())
    }

    fn isolate(&mut self, id: u64, ms: u64, outwards: bool, inwards: bool) {
        self.log(|| format!("member {id} is cut off, out {outwards}, in {inwards}, for {ms} ms"));
        if self.random.chance(35) {
            // Soon after it is back, with what it has learnt since.
            let after = self.random.range(5, 250);
            self.later(ms + after, Event::Crash(id));
        }
        let others: Vec<u64> = self.members.keys().copied().filter(|other| *other != id).collect();
        for other in others {
            for (from, to, does) in [(id, other, outwards), (other, id, inwards)] {
                if does {
                    self.cut.insert((from, to));
                    self.later(ms, Event::Heal(from, to));
                }
            }
        }
    }

    /// The operator asks whoever leads, until it is done.
    pub(super) fn operator_acts(&mut self) -> Checked {
        let Some(change) = self.operator.plan.last().copied() else {
            return Ok(());
        };
        self.later(150, Event::Operator);
        if let Some((answer, asked_ms)) = &mut self.operator.waiting {
            match answer.try_recv() {
                Ok(Ok(())) => {
                    self.operator.waiting = None;
                    self.operator.plan.pop();
                    self.operator.made += 1;
                    self.log(|| format!("{change:?} is made"));
                    return Ok(());
                }
                Err(oneshot::error::TryRecvError::Empty) if self.now_ms < *asked_ms + 3000 => return Ok(()),
                _ => self.operator.waiting = None,
            }
        }
        if let MembershipChange::AddLearner(new) = change
            && !self.members.contains_key(&new)
        {
            self.add_member(new, Vec::new());
        }
        let Some(leader) = self.leader() else { return Ok(()) };
        let leaves = match change {
            MembershipChange::Remove(id) => id == leader,
            MembershipChange::Replace { old, .. } => old == leader,
            _ => false,
        };
        let Some(member) = self.members.get_mut(&leader) else {
            return Ok(());
        };
        if leaves {
            let (sender, _) = oneshot::channel();
            member.inbox.push(Input::Transfer(None, sender));
        } else {
            let (sender, answer) = oneshot::channel();
            member.inbox.push(Input::Change(change, sender));
            self.operator.waiting = Some((answer, self.now_ms));
            // A moment of which much depends.
            if self.random.chance(20) && !self.calm {
                let points = self.random.range(0, 40);
                self.members[&leader].power.fail_after(points);
            }
        }
        self.wake(leader);
        Ok(())
    }

    /// Everything that is wrong ends.
    pub(super) fn be_calm(&mut self) {
        self.calm = true;
        self.cut.clear();
        self.network.loss_percent = 0;
        self.network.late_percent = 0;
        self.operator.plan.clear();
        self.log(|| "faults end".to_owned());
        for member in self.members.values_mut() {
            member.paused_until_ms = self.now_ms;
            if member.disk.full() {
                member.disk.set_full(false);
            }
        }
        let down: Vec<u64> = self
            .members
            .iter()
            .filter(|(_, member)| !member.up())
            .map(|(id, _)| *id)
            .collect();
        for id in down {
            self.later(10, Event::Start(id));
        }
    }
}
