//! Reads that see every command answered before they were asked for: which wait for a majority, and how long a majority's
//! word holds. Time is told; raft-rs is asked by [`Node`](crate::node::Node).
//!
//! A *read-index* read takes the leader's commit index and waits until a majority has said, after the read was asked for,
//! that it still follows that leader. It needs no clock.
//!
//! A *lease* read spares that round. A member that heard the leader does not vote for another one during an election timeout
//! (check-quorum's rule), so once a majority confirmed a read asked for at `t`, no other leader exists before
//! `t + election timeout` of the members' clocks. The lease ends earlier, by one tick and a tenth, and is void
//!
//! - after a transfer of leadership was tried in this term, because such an election ignores the rule,
//! - after the membership changed, until the new majority confirmed something.
//!
//! The assumption: over an election timeout, no two members' clocks differ in speed by more than a tenth, and a member that
//! starts does not vote during its first election timeout (`Node` sees to that), because it forgot whom it heard. raft-rs'
//! own lease option rests on the leader's quorum check alone, which notices an isolation up to two timeouts late; it is not used.

use std::collections::VecDeque;

/// Names a read of this process.
pub(crate) type ReadId = u64;

#[derive(Debug)]
struct Waiting {
    id: ReadId,
    asked_ms: u64,
    /// Term in which it was asked for.
    term: u64,
    /// Last time that raft-rs was asked.
    sent_ms: u64,
    /// Known once a majority confirmed it.
    index: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Reads {
    waiting: VecDeque<Waiting>,
    next_id: ReadId,
    /// How long a confirmation holds, in milliseconds.
    lease_ms: u64,
    /// The lease: its end and its term.
    lease: (u64, u64),
    /// In this term there is no lease.
    no_lease_term: u64,
}

impl Reads {
    pub(crate) fn new(election_ticks: u64, tick_ms: u64) -> Self {
        Self {
            waiting: VecDeque::new(),
            next_id: 0,
            lease_ms: election_ticks.saturating_sub(1).saturating_mul(tick_ms) * 9 / 10,
            lease: (0, 0),
            no_lease_term: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Notes a read. `index` is known for one under a lease.
    pub(crate) fn add(&mut self, now_ms: u64, term: u64, index: Option<u64>) -> ReadId {
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back(Waiting {
            id,
            asked_ms: now_ms,
            term,
            sent_ms: now_ms,
            index,
        });
        id
    }

    /// Reads to ask raft-rs for again: the message, or the leader it went to, may be gone.
    pub(crate) fn due(&mut self, now_ms: u64, wait_ms: u64) -> Vec<ReadId> {
        let mut due = Vec::new();
        for read in &mut self.waiting {
            if read.index.is_none() && now_ms.saturating_sub(read.sent_ms) >= wait_ms {
                read.sent_ms = now_ms;
                due.push(read.id);
            }
        }
        due
    }

    /// A majority confirmed a read. `leads` in `term`: then it is a lease too.
    pub(crate) fn confirmed(&mut self, id: ReadId, index: u64, leads: bool, term: u64) {
        let Some(read) = self.waiting.iter_mut().find(|read| read.id == id) else {
            return;
        };
        read.index.get_or_insert(index);
        if leads && read.term == term && term != self.no_lease_term {
            let length = if planted!(LeaseTooLong) {
                4 * self.lease_ms
            } else {
                self.lease_ms
            };
            let end = read.asked_ms + length;
            if self.lease.1 != term || end > self.lease.0 {
                self.lease = (end, term);
            }
        }
    }

    /// Takes the reads whose index is applied.
    pub(crate) fn take(&mut self, applied: u64) -> Vec<ReadId> {
        let mut done = Vec::new();
        self.waiting.retain(|read| {
            let through = read.index.is_some_and(|index| index <= applied);
            if through {
                done.push(read.id);
            }
            !through
        });
        done
    }

    pub(crate) fn forget(&mut self, id: ReadId) {
        self.waiting.retain(|read| read.id != id);
    }

    /// Whether the leader of `term` may answer without asking anybody.
    pub(crate) fn in_lease(&self, now_ms: u64, term: u64) -> bool {
        self.lease.1 == term && now_ms < self.lease.0
    }

    /// No lease any more until a majority confirms a read that is asked for later.
    pub(crate) fn void(&mut self) {
        self.lease = (0, 0);
        for read in &mut self.waiting {
            // What was asked for before does not count.
            read.term = 0;
        }
    }

    pub(crate) fn void_for_term(&mut self, term: u64) {
        self.void();
        self.no_lease_term = term;
    }
}
