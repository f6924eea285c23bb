//! What has landed of a window, or been written by a push: a set of byte positions, kept as merged ranges. Adding
//! bytes twice changes nothing, which is what makes duplicates harmless. Arithmetic only; no memory and no wire.

use crate::limits::COVERAGE_FRAGMENTS_MAX;
use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, merged, non-adjacent ranges by their start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Coverage {
    ends: BTreeMap<usize, usize>,
    bytes: u64,
}

/// The set would fall into more than [`COVERAGE_FRAGMENTS_MAX`] pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooScattered;

impl Coverage {
    /// Bytes in the set, each counted once.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a range; an empty one changes nothing.
    pub(crate) fn insert(&mut self, range: Range<usize>) -> Result<(), TooScattered> {
        if range.is_empty() {
            return Ok(());
        }
        let (mut start, mut end) = (range.start, range.end);
        // Ranges are disjoint, so their ends are in the order of their starts: from the last one that begins at or
        // before our end, backwards while they touch us.
        while let Some((&from, &to)) = self.ends.range(..=end).next_back().filter(|&(_, &to)| to >= start) {
            if from <= start && to >= end {
                return Ok(());
            }
            self.ends.remove(&from);
            self.bytes -= (to - from) as u64;
            (start, end) = (start.min(from), end.max(to));
        }
        if self.ends.len() >= COVERAGE_FRAGMENTS_MAX {
            return Err(TooScattered);
        }
        self.ends.insert(start, end);
        self.bytes += (end - start) as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_agrees_with_a_byte_map(ranges in prop::collection::vec((0usize..200, 0usize..40), 0..40)) {
            let (mut set, mut map) = (Coverage::default(), vec![false; 240]);
            for (start, len) in ranges {
                set.insert(start..start + len).unwrap();
                map[start..start + len].fill(true);
                prop_assert_eq!(set.bytes(), map.iter().filter(|on| **on).count() as u64);
                let runs = map.split(|on| !on).filter(|run| !run.is_empty()).count();
                prop_assert_eq!(set.ends.len(), runs, "touching ranges are one");
            }
        }
    }

    #[test]
    fn fragments_are_bounded() {
        let mut set = Coverage::default();
        for at in 0..COVERAGE_FRAGMENTS_MAX {
            set.insert(at * 16..at * 16 + 8).unwrap();
        }
        let beyond = COVERAGE_FRAGMENTS_MAX * 16;
        assert_eq!(set.insert(beyond..beyond + 8), Err(TooScattered));
        set.insert(8..16).expect("what joins pieces is taken");
    }
}
