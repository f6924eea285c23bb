//! Leases on exported bytes as a state machine: no locks, no tasks; the time is passed in.
//!
//! ```text
//!            beat / begin / progress: term starts anew
//!                 ┌──────┐
//!   grant ──► Held(reads in flight) ── term over ──────────► ended: Expired
//!                 ├── release by the reader ───────────────► ended: Released
//!                 ├── revoke by the owner ─────────────────► ended: Revoked
//!                 ├── a read finds its reader gone ────────► ended: ReaderLost
//!                 └── the last allowed read is done ───────► ended: Completed
//! ```
//!
//! Invariants: a read begins only within the term and inside the lease's ranges; a lease ends once, and its end lists
//! every read still in flight exactly once, for the shell to stop; after the end the lease is unknown, so nothing begins
//! any more; a lease that nobody renews ends within its term. What the shell does with an end (fence the reads, then
//! tell the owner) is in [`crate::export`].

use crate::Refusal;
use crate::ranges::{Descriptor, RangeSet};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// What a lease allows.
#[derive(Debug, Clone)]
pub struct LeaseOptions {
    /// How long the bytes stay held without a sign of life of the reader: a heartbeat, a read, or progress of one.
    pub term: Duration,
    /// Reads in flight at once; more are refused.
    pub reads_at_once_max: usize,
    /// The lease ends by itself after so many completed reads; `None`: it does not.
    pub reads_max: Option<u32>,
}

impl Default for LeaseOptions {
    /// Three seconds, several heartbeats on any network; eight reads at once; any number of them.
    fn default() -> Self {
        Self {
            term: Duration::from_secs(3),
            reads_at_once_max: 8,
            reads_max: None,
        }
    }
}

/// Why a lease ended. From then on nothing reads its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LeaseEnd {
    /// The reader gave it back.
    #[error("the reader released the lease")]
    Released,
    /// As many reads were completed as it allowed.
    #[error("all reads of the lease are done")]
    Completed,
    /// No sign of life within the term.
    #[error("the lease expired without a sign of life of its reader")]
    Expired,
    /// A read found that its reader is gone.
    #[error("the reader of the lease is gone")]
    ReaderLost,
    /// The owner dropped the export.
    #[error("the owner ended the lease")]
    Revoked,
}

/// How a read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadEnd {
    Done,
    /// Refused or given up; the reader lives.
    Failed,
    ReaderLost,
}

/// A lease that is over, and the reads to stop.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) export: u64,
    pub(crate) why: LeaseEnd,
    pub(crate) reads: Vec<u64>,
}

#[derive(Debug)]
struct Lease {
    ranges: RangeSet,
    options: LeaseOptions,
    expires: Instant,
    done: u32,
    /// Window ids of the reads in flight.
    reads: HashSet<u64>,
}

/// All leases an owner has granted.
#[derive(Debug, Default)]
pub(crate) struct LeaseTable {
    leases: HashMap<u64, Lease>,
}

impl LeaseTable {
    /// Leases held.
    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    /// Grants a lease. False if the id is taken.
    pub(crate) fn grant(&mut self, export: u64, ranges: RangeSet, options: LeaseOptions, now: Instant) -> bool {
        if self.leases.contains_key(&export) {
            return false;
        }
        let lease = Lease {
            ranges,
            expires: after(now, options.term),
            options,
            done: 0,
            reads: HashSet::new(),
        };
        self.leases.insert(export, lease);
        true
    }

    /// The reader lives, and still waits for the read into `window` if one is given.
    pub(crate) fn beat(&mut self, export: u64, window: Option<u64>, now: Instant) -> Result<(), Refusal> {
        let lease = self.held(export, now)?;
        lease.expires = after(now, lease.options.term);
        match window {
            Some(window) if !lease.reads.contains(&window) => Err(Refusal::UnknownExport),
            _ => Ok(()),
        }
    }

    /// A read into the reader's `window` begins.
    pub(crate) fn begin(
        &mut self,
        export: u64,
        window: u64,
        pieces: &[Descriptor],
        now: Instant,
    ) -> Result<(), Refusal> {
        let lease = self.held(export, now)?;
        for piece in pieces {
            let outside = Refusal::OutsideExport {
                offset: piece.local as u64,
                len: piece.len as u64,
            };
            let end = piece.local.checked_add(piece.len).ok_or(outside)?;
            if piece.len == 0 || !lease.ranges.covers(&(piece.local..end)) {
                return Err(outside);
            }
        }
        let max = lease.options.reads_at_once_max;
        if lease.reads.len() >= max {
            return Err(Refusal::Busy { max: max as u64 });
        }
        if !lease.reads.insert(window) {
            return Err(Refusal::WindowTaken);
        }
        lease.expires = after(now, lease.options.term);
        Ok(())
    }

    /// A read ended. The lease's end, if this was it.
    pub(crate) fn end_read(&mut self, export: u64, window: u64, how: ReadEnd) -> Option<Ended> {
        let lease = self.leases.get_mut(&export)?;
        if !lease.reads.remove(&window) {
            return None;
        }
        match how {
            ReadEnd::Failed => None,
            ReadEnd::ReaderLost => self.end(export, LeaseEnd::ReaderLost),
            ReadEnd::Done => {
                lease.done = lease.done.saturating_add(1);
                let last = lease.options.reads_max.is_some_and(|max| lease.done >= max);
                last.then(|| self.end(export, LeaseEnd::Completed)).flatten()
            }
        }
    }

    /// Ends a lease; nothing if it is over already.
    pub(crate) fn end(&mut self, export: u64, why: LeaseEnd) -> Option<Ended> {
        let lease = self.leases.remove(&export)?;
        Some(Ended {
            export,
            why,
            reads: lease.reads.into_iter().collect(),
        })
    }

    /// Ends the leases whose term is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Ended> {
        let over = self.leases.iter().filter(|(_, lease)| lease.expires <= now);
        let over: Vec<u64> = over.map(|(&export, _)| export).collect();
        over.into_iter()
            .filter_map(|export| self.end(export, LeaseEnd::Expired))
            .collect()
    }

    /// When [`LeaseTable::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.expires).min()
    }

    /// Whoever comes late is refused even if the expiry has not been noticed yet.
    fn held(&mut self, export: u64, now: Instant) -> Result<&mut Lease, Refusal> {
        self.leases
            .get_mut(&export)
            .filter(|lease| now < lease.expires)
            .ok_or(Refusal::UnknownExport)
    }
}

/// A term beyond what the clock can express is as good as a century.
fn after(now: Instant, term: Duration) -> Instant {
    now.checked_add(term)
        .unwrap_or_else(|| now + Duration::from_secs(100 * 365 * 86_400))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // leases on one range are what is meant
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TERM: Duration = Duration::from_secs(1);

    fn piece(local: usize, len: usize) -> Descriptor {
        Descriptor { local, remote: 0, len }
    }

    fn table(reads_max: Option<u32>, now: Instant) -> LeaseTable {
        let mut table = LeaseTable::default();
        let ranges = RangeSet::new(vec![64..128], 256, 4).unwrap();
        let options = LeaseOptions {
            term: TERM,
            reads_at_once_max: 2,
            reads_max,
        };
        assert!(table.grant(1, ranges.clone(), options.clone(), now));
        assert!(!table.grant(1, ranges, options, now));
        table
    }

    #[test]
    fn a_silent_reader_loses_its_lease_and_late_reads_are_refused() {
        let now = Instant::now();
        let mut table = table(None, now);
        table.begin(1, 7, &[piece(64, 64)], now).unwrap();
        table.beat(1, Some(7), now + TERM / 2).unwrap();
        assert_eq!(table.expire(now + TERM), vec![]);
        assert_eq!(table.deadline(), Some(now + TERM * 3 / 2));
        let late = now + TERM * 3 / 2;
        assert_eq!(
            table.beat(1, None, late),
            Err(Refusal::UnknownExport),
            "before anybody noticed"
        );
        assert_eq!(table.begin(1, 8, &[piece(64, 8)], late), Err(Refusal::UnknownExport));
        let ended = Ended {
            export: 1,
            why: LeaseEnd::Expired,
            reads: vec![7],
        };
        assert_eq!(table.expire(late), vec![ended]);
        assert_eq!((table.len(), table.deadline()), (0, None));
        assert_eq!(table.end_read(1, 7, ReadEnd::Done), None);
    }

    #[test]
    fn reads_stay_inside_and_are_bounded() {
        let now = Instant::now();
        let mut table = table(Some(2), now);
        for bad in [piece(56, 16), piece(120, 16), piece(64, 0), piece(usize::MAX, 8)] {
            assert!(matches!(
                table.begin(1, 7, &[bad], now),
                Err(Refusal::OutsideExport { .. })
            ));
        }
        table.begin(1, 7, &[piece(64, 8)], now).unwrap();
        assert_eq!(table.begin(1, 7, &[piece(64, 8)], now), Err(Refusal::WindowTaken));
        table.begin(1, 8, &[piece(64, 8)], now).unwrap();
        assert_eq!(table.begin(1, 9, &[piece(64, 8)], now), Err(Refusal::Busy { max: 2 }));
        assert_eq!(table.beat(1, Some(9), now), Err(Refusal::UnknownExport), "no such read");
        assert_eq!(table.end_read(1, 7, ReadEnd::Done), None);
        assert_eq!(
            table.end_read(1, 8, ReadEnd::Failed),
            None,
            "a failed read does not count"
        );
        table.begin(1, 9, &[piece(64, 8)], now).unwrap();
        let ended = table.end_read(1, 9, ReadEnd::Done).unwrap();
        assert_eq!((ended.why, ended.reads), (LeaseEnd::Completed, vec![]));
    }

    #[test]
    fn a_lost_reader_frees_everything_at_once() {
        let now = Instant::now();
        let mut table = table(None, now);
        table.begin(1, 7, &[piece(64, 8)], now).unwrap();
        table.begin(1, 8, &[piece(64, 8)], now).unwrap();
        let ended = table.end_read(1, 7, ReadEnd::ReaderLost).unwrap();
        assert_eq!((ended.why, ended.reads), (LeaseEnd::ReaderLost, vec![8]));
    }

    proptest! {
        /// Whatever happens, a lease ends once, every read begun is either ended or listed at the end exactly once, and
        /// with silence the lease is gone within its term.
        #[test]
        fn ends_are_exact(ops in prop::collection::vec((0u8..7, 0u64..4, 0u64..700), 0..60)) {
            let start = Instant::now();
            let mut now = start;
            let mut table = table(Some(3), now);
            let mut open = HashSet::new();
            let mut ended = Vec::new();
            for (op, window, wait) in ops {
                let before = ended.len();
                match op {
                    0 | 1 => if table.begin(1, window, &[piece(64, 8)], now).is_ok() {
                        prop_assert!(open.insert(window) && before == 0);
                    },
                    2 => { let _ = table.beat(1, Some(window), now); }
                    3 => {
                        ended.extend(table.end_read(1, window, ReadEnd::Done));
                        open.remove(&window);
                    }
                    4 => {
                        ended.extend(table.end_read(1, window, ReadEnd::Failed));
                        open.remove(&window);
                    }
                    5 => if window == 0 { ended.extend(table.end(1, LeaseEnd::Revoked)); },
                    _ => {
                        now += Duration::from_millis(wait);
                        ended.extend(table.expire(now));
                    }
                }
                if ended.len() > before {
                    let reads: HashSet<u64> = ended[before].reads.iter().copied().collect();
                    prop_assert_eq!(&reads, &open);
                    open.clear();
                }
                prop_assert!(ended.len() <= 1);
            }
            ended.extend(table.expire(now + TERM));
            prop_assert_eq!(ended.len(), 1);
        }
    }
}
