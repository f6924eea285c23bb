//! Who belongs to the group, and which changes of that are allowed. Only the rules: no log, no messages.
//!
//! A newcomer becomes a *learner* first: it receives the log without a vote, so that a member that has nothing yet
//! cannot make a majority harder to reach. Once it has caught up it is promoted, or takes another's place in one step.
//! Changes of one voter need no joint configuration (their majorities overlap); a replacement changes two and goes through
//! one, which the leader leaves by itself (Ongaro's thesis, chapter 4). One change at a time.

use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState};

/// Voters of a group. More only make commits slower: five survive two failures.
pub const VOTERS_MAX: usize = 5;
/// Members of a group, learners included: room to replace all voters at once, and little else to send snapshots to.
pub const MEMBERS_MAX: usize = 2 * VOTERS_MAX;
/// A learner that lacks at most this many entries counts as caught up: less than a second's worth under load.
const CAUGHT_UP_ENTRIES: u64 = 1024;

/// A change of who belongs to the group. Takes effect when answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MembershipChange {
    /// A new member that gets the log and has no vote. Start it with [`RaftStoreConfig::join`](crate::RaftStoreConfig::join).
    AddLearner(u64),
    /// A learner that has caught up gets a vote.
    Promote(u64),
    /// A member leaves. The leader hands over first: see [`transfer`](crate::RaftStore::transfer).
    Remove(u64),
    /// A learner that has caught up takes a voter's place, in one step.
    Replace {
        /// The voter that leaves.
        old: u64,
        /// The learner that takes its place.
        new: u64,
    },
}

/// Why a change of the membership was not begun. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipRefused {
    /// Another change is not through yet, or this leader is new.
    #[error("another change of the membership is under way; try again when it is through")]
    UnderWay,
    /// There is no such member, or not in that role.
    #[error("member {id} is not a {role} of the group")]
    NotA {
        /// The member.
        id: u64,
        /// What it would have to be.
        role: &'static str,
    },
    /// The learner lacks too much of the log to be given a vote.
    #[error("member {id} is {entries} log entries behind or not connected; wait until it has caught up")]
    Behind {
        /// The learner.
        id: u64,
        /// Entries it lacks.
        entries: u64,
    },
    /// The leader cannot leave as such.
    #[error("member {id} leads the group; transfer the leadership to another member first")]
    Leads {
        /// The leader.
        id: u64,
    },
    /// There is nobody to lead instead.
    #[error("no other voter is connected that could lead")]
    NoSuccessor,
    /// No voter would be left.
    #[error("member {id} is the only voter; add another one first")]
    LastVoter {
        /// The voter.
        id: u64,
    },
    /// The group is as large as it may be.
    #[error("the group has {limit} members of that kind already, which is the limit; remove one first")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// 0 is no member's id.
    #[error("0 is not a member id; ids start at 1")]
    Zero,
}

/// Who belongs to the group, by the last applied entry. Sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// Have a vote.
    pub voters: Vec<u64>,
    /// The voters before a change that is under way; empty otherwise. Both majorities are needed as long.
    pub voters_outgoing: Vec<u64>,
    /// Receive the log and have no vote.
    pub learners: Vec<u64>,
}

impl Members {
    pub(crate) fn of(conf: &ConfState) -> Self {
        let sorted = |ids: &[u64]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        let mut learners = sorted(conf.get_learners());
        learners.extend_from_slice(conf.get_learners_next());
        learners.sort_unstable();
        Self {
            voters: sorted(conf.get_voters()),
            voters_outgoing: sorted(conf.get_voters_outgoing()),
            learners,
        }
    }

    /// Whether `id` belongs to the group in any role.
    pub fn contains(&self, id: u64) -> bool {
        self.voters.contains(&id) || self.voters_outgoing.contains(&id) || self.learners.contains(&id)
    }

    /// Whether a change is under way that needs both majorities.
    pub fn joint(&self) -> bool {
        !self.voters_outgoing.is_empty()
    }
}

/// How far a member is, as the leader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberProgress {
    /// The member.
    pub id: u64,
    /// It has a vote.
    pub voter: bool,
    /// Log index up to which it is known to have the leader's log.
    pub matched_index: u64,
    /// It was heard within about two election timeouts.
    pub active: bool,
    /// It gets, or waits for, a snapshot.
    pub snapshot: bool,
}

/// What the leader knows when a change is asked for.
pub(crate) struct Situation<'a> {
    pub(crate) members: &'a Members,
    pub(crate) progress: &'a [MemberProgress],
    pub(crate) leader_id: u64,
    pub(crate) last_index: u64,
}

/// The log entry for a change, or `None` if the group is that way already.
pub(crate) fn plan(change: MembershipChange, now: &Situation<'_>) -> Result<Option<ConfChangeV2>, MembershipRefused> {
    let members = now.members;
    let (steps, joint) = match change {
        MembershipChange::AddLearner(0) => return Err(MembershipRefused::Zero),
        MembershipChange::AddLearner(id) if members.contains(id) => return Ok(None),
        MembershipChange::AddLearner(id) => {
            if members.voters.len() + members.learners.len() >= MEMBERS_MAX {
                return Err(MembershipRefused::Full { limit: MEMBERS_MAX });
            }
            (vec![(ConfChangeType::AddLearnerNode, id)], false)
        }
        MembershipChange::Promote(id) if members.voters.contains(&id) => return Ok(None),
        MembershipChange::Promote(id) => {
            if members.voters.len() >= VOTERS_MAX {
                return Err(MembershipRefused::Full { limit: VOTERS_MAX });
            }
            caught_up(id, now)?;
            (vec![(ConfChangeType::AddNode, id)], false)
        }
        MembershipChange::Remove(id) if !members.contains(id) => return Ok(None),
        MembershipChange::Remove(id) => {
            if members.voters == [id] {
                return Err(MembershipRefused::LastVoter { id });
            }
            stays_led(id, now)?;
            (vec![(ConfChangeType::RemoveNode, id)], false)
        }
        MembershipChange::Replace { old, new } if !members.contains(old) && members.voters.contains(&new) => {
            return Ok(None);
        }
        MembershipChange::Replace { old, new } => {
            if !members.voters.contains(&old) {
                return Err(MembershipRefused::NotA { id: old, role: "voter" });
            }
            caught_up(new, now)?;
            stays_led(old, now)?;
            let steps = vec![(ConfChangeType::AddNode, new), (ConfChangeType::RemoveNode, old)];
            (steps, true)
        }
    };
    let mut entry = ConfChangeV2::default();
    for (kind, id) in steps {
        let mut step = ConfChangeSingle {
            node_id: id,
            ..ConfChangeSingle::default()
        };
        step.set_change_type(kind);
        entry.mut_changes().push(step);
    }
    if joint {
        entry.set_transition(ConfChangeTransition::Implicit);
    }
    Ok(Some(entry))
}

fn caught_up(id: u64, now: &Situation<'_>) -> Result<(), MembershipRefused> {
    let not_a = MembershipRefused::NotA { id, role: "learner" };
    if !now.members.learners.contains(&id) {
        return Err(not_a);
    }
    let member = now.progress.iter().find(|member| member.id == id).ok_or(not_a)?;
    let entries = now.last_index.saturating_sub(member.matched_index);
    // Raft takes a new member for active until it has been silent for a while: that it has anything is what it said itself. In a
    // young group nobody lacks much, and one that does not exist would take the quorum.
    if !member.active || member.matched_index == 0 || member.snapshot || entries > CAUGHT_UP_ENTRIES {
        return Err(MembershipRefused::Behind { id, entries });
    }
    Ok(())
}

fn stays_led(id: u64, now: &Situation<'_>) -> Result<(), MembershipRefused> {
    if id == now.leader_id {
        return Err(MembershipRefused::Leads { id });
    }
    Ok(())
}
