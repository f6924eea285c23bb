//! From committed entries to the tables: commands, changes of the membership, and snapshots.
//!
//! One batch holds what entries did and the applied index, and becomes visible at once, in memory. A change of the membership ends its
//! batch, because what follows it is judged by the new membership, and is flushed: nobody will tell a member again that it was
//! removed, and who was removed is told when this is on the disk.

use super::{AppliedEntry, Node, Progress, ProposalId, stopped};
use crate::RaftStoreError;
use crate::membership::Members;
use crate::overlay::BATCH_ENTRIES_MAX;
use crate::tables::Writer;
use baton_state::Applied;
use protobuf::Message as _;
use raft::Changer;
use raft::eraftpb::{ConfChange, ConfChangeV2, ConfState, Entry, EntryType, Snapshot};

impl Node {
    pub(super) fn apply(&mut self, committed: Vec<Entry>, progress: &mut Progress) -> Result<(), RaftStoreError> {
        let mut rest = committed.as_slice();
        while !rest.is_empty() && !self.removed {
            let change = rest.iter().position(changes_members);
            let end = change.map_or(rest.len(), |at| at + 1);
            let (run, after) = rest.split_at(end.min(BATCH_ENTRIES_MAX));
            self.apply_run(run, progress)?;
            rest = after;
        }
        Ok(())
    }

    /// Applies entries of which only the last may change the membership.
    fn apply_run(&mut self, run: &[Entry], progress: &mut Progress) -> Result<(), RaftStoreError> {
        let Some(last) = run.last() else { return Ok(()) };
        let change = if changes_members(last) {
            self.read_change(last)?
        } else {
            None
        };
        let own_id = self.raw.raft.id;
        let leaves = change
            .as_ref()
            .is_some_and(|(_, conf)| !Members::of(conf).contains(own_id));
        let hard_state = self.raw.raft.hard_state();
        let store = self.raw.store().store.clone();
        let mut tables = self.writer.begin(&store, store.overlay())?;
        let mut answers = Vec::new();
        for entry in run {
            #[cfg(test)]
            crate::planted::witness(own_id, entry);
            // An election leaves an empty entry.
            if entry.get_entry_type() != EntryType::EntryNormal || entry.data.is_empty() {
                continue;
            }
            let outcome = apply_command(&mut tables, entry.index, &entry.data)?;
            if let Ok(applied) = &outcome
                && worth_following(applied)
            {
                progress.followed.push(AppliedEntry {
                    index: entry.index,
                    command: entry.data.to_vec(),
                    applied: applied.clone(),
                });
            }
            if let Some(id) = own_proposal(self.life, entry) {
                answers.push((id, outcome));
            }
        }
        tables.finish((last.index, last.term));
        let conf_state = change
            .as_ref()
            .map(|(_, conf)| conf)
            .filter(|_| !planted!(MembershipNotSaved));
        self.raw.mut_store().applied(hard_state, conf_state.cloned());
        if change.is_some() {
            self.flush()?;
        }
        if let Some((change, conf_state)) = change {
            self.raw.apply_conf_change(&change).map_err(stopped)?;
            self.members = Members::of(&conf_state);
            #[cfg(test)]
            crate::planted::note_members(&self.members);
            self.removed = leaves;
            self.reads.void();
        }
        self.applied = last.index;
        self.raw.advance_apply_to(last.index);
        for (id, outcome) in answers {
            if self.open.remove(&id).is_some() {
                progress.answers.push((id, outcome));
            }
        }
        self.answer_change(last, progress);
        self.orphan_older(last.term, progress);
        Ok(())
    }

    /// A change is through when one majority suffices again.
    fn answer_change(&mut self, last: &Entry, progress: &mut Progress) {
        if !changes_members(last) {
            return;
        }
        if let Some(id) = self.own_proposal(last)
            && self.open.remove(&id).is_some()
        {
            self.changing = Some(id);
        }
        if !self.members.joint() {
            progress.changed.extend(self.changing.take());
        }
    }

    /// Once an entry of a later term is applied, a proposal made before is hardly under way any more.
    fn orphan_older(&mut self, term: u64, progress: &mut Progress) {
        if term <= self.applied_term {
            return;
        }
        self.applied_term = term;
        self.open.retain(|id, made_in| {
            let older = *made_in < term;
            if older {
                progress.orphans.push(*id);
            }
            !older
        });
    }

    fn own_proposal(&self, entry: &Entry) -> Option<ProposalId> {
        own_proposal(self.life, entry)
    }

    /// The change that an entry makes, and the membership after it; `None` if it cannot be made, which every member finds.
    fn read_change(&self, entry: &Entry) -> Result<Option<(ConfChangeV2, ConfState)>, RaftStoreError> {
        let undecodable = |error| RaftStoreError::Stopped(format!("a membership change cannot be read: {error}"));
        let change = if entry.get_entry_type() == EntryType::EntryConfChange {
            use raft::eraftpb::ConfChangeSingle;
            let old = ConfChange::parse_from_bytes(&entry.data).map_err(undecodable)?;
            let mut step = ConfChangeSingle {
                node_id: old.node_id,
                ..ConfChangeSingle::default()
            };
            step.set_change_type(old.get_change_type());
            let mut change = ConfChangeV2::default();
            change.mut_changes().push(step);
            change
        } else {
            ConfChangeV2::parse_from_bytes(&entry.data).map_err(undecodable)?
        };
        let mut changer = Changer::new(self.raw.raft.prs());
        let changed = if change.leave_joint() {
            changer.leave_joint()
        } else if let Some(auto_leave) = change.enter_joint() {
            changer.enter_joint(auto_leave, change.get_changes())
        } else {
            changer.simple(change.get_changes())
        };
        match changed {
            Ok((configuration, _)) => Ok(Some((change, sorted(configuration.to_conf_state())))),
            Err(error) => {
                tracing::warn!(%error, index = entry.index, "a membership change was not made");
                Ok(None)
            }
        }
    }

    pub(super) fn install(&mut self, snapshot: &Snapshot, progress: &mut Progress) -> Result<(), RaftStoreError> {
        // Whole, and not only if it changed: the snapshot must not end up beyond the commit index.
        let hard_state = self.raw.raft.hard_state();
        let staged = self.staged.take();
        let staged = staged.ok_or_else(|| RaftStoreError::Stopped("a snapshot came without its state".into()))?;
        self.flusher.finish()?;
        self.writer = Writer::default();
        self.raw.mut_store().install(snapshot, &staged, &hard_state)?;
        let at = snapshot.get_metadata();
        self.applied = at.index;
        self.members = Members::of(at.get_conf_state());
        progress.replaced = true;
        // What it replaced is not to be told any more.
        progress.followed.clear();
        self.orphan_older(at.term, progress);
        Ok(())
    }
}

/// The id of a proposal that was made in this life.
fn own_proposal(own_life: u64, entry: &Entry) -> Option<ProposalId> {
    let (life, id) = entry.context.split_at_checked(8)?;
    (life == own_life.to_le_bytes() || planted!(AnswersOtherLives)).then(|| crate::database::number(id))?
}

#[cfg(not(test))]
use baton_state::apply as apply_command;

#[cfg(test)]
use crate::planted::apply as apply_command;

fn changes_members(entry: &Entry) -> bool {
    entry.get_entry_type() != EntryType::EntryNormal
}

/// Settlements come by the thousand and are read by their numbers; everything else is rare.
fn worth_following(applied: &Applied) -> bool {
    !matches!(applied, Applied::Settled { .. })
}

/// In one order on every member: raft-rs keeps sets.
fn sorted(mut conf: ConfState) -> ConfState {
    for ids in [
        &mut conf.voters,
        &mut conf.learners,
        &mut conf.voters_outgoing,
        &mut conf.learners_next,
    ] {
        ids.sort_unstable();
    }
    conf
}

#[cfg(test)]
impl Node {
    /// The planted bug: tells the outcome that a command would have now.
    pub(super) fn reply_early(&mut self, entries: &[Entry], progress: &mut Progress) -> Result<(), RaftStoreError> {
        if !self.leads() {
            return Ok(());
        }
        let store = self.raw.store().store.clone();
        let scratch = store.overlay().scratch();
        let mut writer = Writer::default();
        let mut tables = writer.begin(&store, &scratch)?;
        for entry in entries {
            if let Some(id) = self.own_proposal(entry)
                && !changes_members(entry)
                && self.open.remove(&id).is_some()
            {
                let outcome = baton_state::apply(&mut tables, entry.index, &entry.data)?;
                progress.answers.push((id, outcome));
            }
        }
        Ok(())
    }
}
