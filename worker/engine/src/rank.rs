//! The order of sequences: by age, where each step of priority is worth a number of later arrivals.
//!
//! The order of two never changes, so sets can be sorted by it; and a sequence of priority `p` is passed by at most
//! `(PRIORITY_MAX - p) × PASSES_PER_PRIORITY` later ones, so none starves. That is aging without a clock: time is counted in
//! arrivals, which also makes it the same in a simulation.

use crate::step::SeqId;

/// Priorities go from `-PRIORITY_MAX` to this; others are taken as the nearest.
pub const PRIORITY_MAX: i32 = 100;
/// Later arrivals that one step of priority lets a sequence pass: about a batch of them.
pub const PASSES_PER_PRIORITY: i64 = 64;

/// Where a sequence stands; smaller goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    key: i64,
    pub id: SeqId,
}

impl Rank {
    /// Ids grow with time; higher priorities go first.
    pub fn new(id: SeqId, priority: i32) -> Self {
        let priority = i64::from(priority.clamp(-PRIORITY_MAX, PRIORITY_MAX));
        let age = i64::try_from(id.0).unwrap_or(i64::MAX);
        Rank {
            key: age.saturating_sub(priority * PASSES_PER_PRIORITY),
            id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priority_then_age_within_a_bound() {
        let rank = |id, priority| Rank::new(SeqId(id), priority);
        assert!(rank(1, 0) < rank(2, 0));
        assert!(rank(2, 1) < rank(1, 0));
        assert!(rank(1, -1) > rank(64, 0));
        assert!(rank(1, -1) < rank(66, 0), "aged");
        assert!(rank(1, i32::MIN) < rank(2, i32::MIN) && rank(9, i32::MAX) < rank(9, 99));
        assert!(rank(0, -100) < rank(2 * 100 * 64 + 1, i32::MAX));
    }
}
