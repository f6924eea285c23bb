//! What only a leader does: changes of the membership, and handing over.

use super::{Node, ProposalId};
use crate::RaftStoreError;
use crate::membership::{MemberProgress, Members, MembershipChange, MembershipRefused, Situation, plan};
use raft::ProgressState;

impl Node {
    /// Begins a change of the membership. `None` if the group is that way already; otherwise the proposal is in
    /// [`Progress::changed`](super::Progress::changed) once the change has taken effect.
    pub(crate) fn change_members(&mut self, change: MembershipChange) -> Result<Option<ProposalId>, RaftStoreError> {
        if !self.leads() {
            return Err(self.not_leader());
        }
        if self.raw.raft.has_pending_conf() || self.members.joint() || self.changing.is_some() {
            return Err(MembershipRefused::UnderWay.into());
        }
        let situation = Situation {
            members: &self.members,
            progress: &self.members_progress(),
            leader_id: self.raw.raft.id,
            last_index: self.raw.raft.raft_log.last_index(),
        };
        let Some(entry) = plan(change, &situation)? else {
            return Ok(None);
        };
        // In the order in which they were asked for.
        self.propose_queued();
        let id = self.next_id;
        self.raw
            .propose_conf_change(self.context(id), entry)
            .map_err(|error| self.dropped_because(&error, self.open.len()))?;
        self.next_id += 1;
        self.open.insert(id, self.raw.raft.term);
        Ok(Some(id))
    }

    /// Begins to hand the leadership to a voter, `None`: to the one that has most of the log; returns whom. Nothing tells the
    /// end but [`leader_id`](Self::leader_id); a try ends after an election timeout.
    pub(crate) fn transfer(&mut self, to: Option<u64>) -> Result<u64, RaftStoreError> {
        if !self.leads() {
            return Err(self.not_leader());
        }
        let to = to.or_else(|| self.successor()).ok_or(MembershipRefused::NoSuccessor)?;
        if !self.members.voters.contains(&to) {
            return Err(MembershipRefused::NotA { id: to, role: "voter" }.into());
        }
        if to != self.raw.raft.id {
            self.propose_queued();
            self.reads.void_for_term(self.raw.raft.term);
            self.raw.transfer_leader(to);
        }
        Ok(to)
    }

    /// The voter to which a leader that leaves should hand over.
    fn successor(&self) -> Option<u64> {
        let own_id = self.raw.raft.id;
        let members = self.members_progress();
        let others = members
            .iter()
            .filter(|member| self.members.voters.contains(&member.id) && member.id != own_id && member.active);
        others
            .max_by_key(|member| (member.matched_index, std::cmp::Reverse(member.id)))
            .map(|member| member.id)
    }

    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    /// How far each member is, by id; empty unless this member leads.
    pub(crate) fn members_progress(&self) -> Vec<MemberProgress> {
        if !self.leads() {
            return Vec::new();
        }
        let raft = &self.raw.raft;
        let mut members: Vec<_> = raft
            .prs()
            .iter()
            .map(|(&id, member)| MemberProgress {
                id,
                voter: raft.prs().conf().voters().contains(id),
                matched_index: member.matched,
                active: member.recent_active || id == raft.id,
                snapshot: member.state == ProgressState::Snapshot,
            })
            .collect();
        members.sort_unstable_by_key(|member| member.id);
        members
    }

    fn not_leader(&self) -> RaftStoreError {
        RaftStoreError::NotLeader {
            leader_id: self.leader_id(),
        }
    }
}
