//! Descriptors: which bytes go where. A [`RangeSet`] is what a window may be written in, a [`Descriptor`] is one piece
//! of a push. Both know arithmetic only; no memory and no wire.

use crate::SetupError;
use crate::memory::ALIGN;
use std::ops::Range;

/// Sorted, disjoint, merged, non-empty ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RangeSet {
    ranges: Vec<Range<usize>>,
}

impl RangeSet {
    /// Checks and normalises the ranges of a window in a region of `region_len` bytes.
    pub(crate) fn new(mut ranges: Vec<Range<usize>>, region_len: usize, count_max: usize) -> Result<Self, SetupError> {
        if ranges.is_empty() {
            return Err(SetupError::WindowEmpty);
        }
        if ranges.len() > count_max {
            return Err(SetupError::WindowRanges {
                count: ranges.len(),
                max: count_max,
            });
        }
        for range in &ranges {
            if range.start >= range.end || range.end > region_len {
                return Err(SetupError::WindowRange {
                    range: range.clone(),
                    region_len,
                });
            }
            if !aligned(range.start) || !aligned(range.end) {
                return Err(SetupError::WindowAlignment { range: range.clone() });
            }
        }
        ranges.sort_unstable_by_key(|range| range.start);
        let mut merged: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start < last.end => return Err(SetupError::WindowOverlap { range }),
                Some(last) if range.start == last.end => last.end = range.end,
                _ => merged.push(range),
            }
        }
        Ok(Self { ranges: merged })
    }

    /// Bytes covered.
    pub(crate) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len() as u64).sum()
    }

    /// Whether all of `range` is covered.
    pub(crate) fn covers(&self, range: &Range<usize>) -> bool {
        let after = self.ranges.partition_point(|candidate| candidate.start <= range.start);
        after
            .checked_sub(1)
            .is_some_and(|index| range.end <= self.ranges[index].end)
    }

    /// A byte range that both sets cover, if there is one.
    pub(crate) fn intersection(&self, other: &Self) -> Option<Range<usize>> {
        let (mut ours, mut theirs) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        while let (Some(a), Some(b)) = (ours.peek(), theirs.peek()) {
            let common = a.start.max(b.start)..a.end.min(b.end);
            if common.start < common.end {
                return Some(common);
            }
            if a.end <= b.end {
                ours.next()
            } else {
                theirs.next()
            };
        }
        None
    }
}

/// Whether an offset may end a transfer range.
pub(crate) fn aligned(offset: usize) -> bool {
    offset.is_multiple_of(ALIGN)
}

/// One contiguous piece of a transfer: `len` bytes between `local` in this agent's memory and `remote` in the peer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Byte offset in this agent's memory.
    pub local: usize,
    /// Byte offset in the peer's memory.
    pub remote: usize,
    /// Bytes.
    pub len: usize,
}

impl Descriptor {
    /// Appends `next` if it continues this piece on both sides.
    pub(crate) fn absorb(&mut self, next: &Self) -> bool {
        let continues = self.local.checked_add(self.len) == Some(next.local)
            && self.remote.checked_add(self.len) == Some(next.remote);
        match self.len.checked_add(next.len).filter(|_| continues) {
            Some(len) => self.len = len,
            None => return false,
        }
        true
    }

    /// Takes at most `len_max` bytes off the front; the piece must be longer than that or is taken whole.
    pub(crate) fn split_front(&mut self, len_max: usize) -> Self {
        let front = Self {
            len: self.len.min(len_max),
            ..*self
        };
        self.local += front.len;
        self.remote += front.len;
        self.len -= front.len;
        front
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(ranges: Vec<Range<usize>>) -> Result<RangeSet, SetupError> {
        RangeSet::new(ranges, 1024, 16)
    }

    #[test]
    fn misuse_is_a_typed_error() {
        assert!(matches!(set(vec![]), Err(SetupError::WindowEmpty)));
        assert!(matches!(set(vec![8..8]), Err(SetupError::WindowRange { .. })));
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = set(vec![16..8]);
        assert!(matches!(reversed, Err(SetupError::WindowRange { .. })));
        assert!(matches!(set(vec![1016..1032]), Err(SetupError::WindowRange { .. })));
        assert!(matches!(set(vec![0..12]), Err(SetupError::WindowAlignment { .. })));
        assert!(matches!(set(vec![0..16, 8..24]), Err(SetupError::WindowOverlap { .. })));
        assert!(matches!(set(vec![0..8; 17]), Err(SetupError::WindowRanges { .. })));
    }

    #[test]
    fn adjacent_ranges_become_one() {
        let merged = set(vec![16..32, 0..16, 64..72]).unwrap();
        assert!(merged.covers(&(8..24)));
        assert!(!merged.covers(&(24..40)));
        assert!(!merged.covers(&(32..33)));
        assert!(merged.covers(&(64..72)));
        assert!(!merged.covers(&(64..73)));
    }

    proptest! {
        #[test]
        fn covering_and_intersecting_agree_with_a_byte_map(
            a in prop::collection::vec(any::<bool>(), 16), b in prop::collection::vec(any::<bool>(), 16),
            start in 0usize..130, len in 1usize..40,
        ) {
            let ranges = |bits: &[bool]| -> Vec<Range<usize>> {
                bits.iter().enumerate().filter(|(_, on)| **on).map(|(at, _)| at * 8..at * 8 + 8).collect()
            };
            let (Ok(one), Ok(two)) = (set(ranges(&a)), set(ranges(&b))) else { return Ok(()) };
            let expected = (start..start + len).all(|byte| a.get(byte / 8) == Some(&true));
            prop_assert_eq!(one.covers(&(start..start + len)), expected);
            let common = a.iter().zip(&b).any(|(x, y)| *x && *y);
            prop_assert_eq!(one.intersection(&two).is_some(), common);
        }
    }
}
