//! What became present in a tier and what left it, for whoever tells routers: a bounded log, off until it is enabled. A
//! reader that does not come in time finds nothing but the word that it must look at all of it
//! ([`Shelf::present`](crate::shelf::Shelf::present)), so nothing is ever silently missing.
//!
//! Not here: who reads it (the worker's block feed), and what a router makes of it.

use baton_proto::block_hash::{BlockHash, short};

/// Changes kept between two readings, 24 bytes each: several times what the queues of one engine step can bring about.
const CHANGES_MAX: usize = 8192;

/// A change, in the short names of block events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The block can be found in the tier from now on.
    Stored {
        /// The block before it in its chain, or the root's name; 0 where that is not known.
        parent: u64,
        /// Its name.
        name: u64,
    },
    /// It can be found there no more.
    Evicted {
        /// Its name.
        name: u64,
    },
}

impl Change {
    pub(crate) fn stored(name: &BlockHash, parent: u64) -> Self {
        Change::Stored {
            parent,
            name: short(name),
        }
    }

    pub(crate) fn evicted(name: &BlockHash) -> Self {
        Change::Evicted { name: short(name) }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ChangeLog {
    enabled: bool,
    lost: bool,
    changes: Vec<Change>,
}

impl ChangeLog {
    /// Records from now on. The first reading finds changes lost: there was something before.
    pub(crate) fn enable(&mut self) {
        (self.enabled, self.lost) = (true, true);
    }

    pub(crate) fn push(&mut self, change: Change) {
        if !self.enabled || self.lost {
            return;
        }
        if self.changes.len() >= CHANGES_MAX {
            self.lost = true;
            self.changes = Vec::new();
            return;
        }
        self.changes.push(change);
    }

    /// The reader knows what is present now.
    pub(crate) fn begin(&mut self) {
        self.lost = false;
        self.changes = Vec::new();
    }

    /// Changes since the last reading; `None` if some were lost.
    pub(crate) fn take(&mut self) -> Option<Vec<Change>> {
        (!self.lost).then(|| std::mem::take(&mut self.changes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_does_not_come_is_told_so() {
        let mut log = ChangeLog::default();
        log.push(Change::Evicted { name: 1 });
        assert_eq!(log.take(), Some(vec![]), "off");
        log.enable();
        log.push(Change::Evicted { name: 1 });
        assert_eq!(log.take(), None, "something may have been there before");
        log.begin();
        (0..CHANGES_MAX as u64).for_each(|name| log.push(Change::Evicted { name }));
        assert_eq!(log.take().map(|changes| changes.len()), Some(CHANGES_MAX));
        (0..=CHANGES_MAX as u64).for_each(|name| log.push(Change::Evicted { name }));
        assert_eq!(log.take(), None);
        assert_eq!(log.take(), None, "until it has begun anew");
    }
}
