//! How the prefill tokens of one step are shared out: a pure function.
//!
//! Half goes to the oldest, so that every prompt, however long, comes to its turn and ends in bounded time; the rest goes to
//! the shortest remaining prompts, so that a short one never waits behind the whole of a long one. What nobody
//! shorter wants goes on down the line, so no token of the budget is wasted.

/// A prompt that could use a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    /// Smaller is older.
    pub age: u64,
    /// Tokens it has left, at least 1.
    pub remaining: usize,
}

/// Grants to each want (by index), together at most `budget`, each at most `chunk_max`. The first want gets
/// its half before the others; the caller puts the oldest there. O(n log n).
pub(crate) fn share_out(wants: &[Want], budget: usize, chunk_max: usize) -> Vec<usize> {
    let mut grants = vec![0; wants.len()];
    let mut left = budget;
    let mut give = |index: usize, most: usize| {
        let grant = (wants[index].remaining.min(chunk_max) - grants[index])
            .min(most)
            .min(left);
        grants[index] += grant;
        left -= grant;
    };
    if !wants.is_empty() {
        give(0, budget.div_ceil(2));
    }
    let mut order: Vec<usize> = (0..wants.len()).collect();
    order.sort_unstable_by_key(|&i| (wants[i].remaining, wants[i].age));
    for index in order {
        give(index, usize::MAX);
    }
    grants
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn want(age: u64, remaining: usize) -> Want {
        Want { age, remaining }
    }

    #[test]
    fn a_short_prompt_passes_a_long_one() {
        assert_eq!(share_out(&[want(1, 10_000), want(2, 100)], 512, 512), [412, 100]);
        assert_eq!(
            share_out(&[want(1, 10_000), want(2, 9_000), want(3, 300)], 512, 512),
            [256, 0, 256]
        );
    }

    #[test]
    fn alone_it_gets_all() {
        assert_eq!(share_out(&[want(1, 10_000)], 512, 4096), [512]);
        assert_eq!(share_out(&[want(1, 10_000)], 512, 16), [16]);
        assert!(share_out(&[], 512, 16).is_empty());
    }

    proptest! {
        #[test]
        fn bounded_useful_and_the_favoured_progresses(
            remaining in prop::collection::vec(1usize..2000, 1..20), budget in 1usize..600, chunk_max in 1usize..600,
        ) {
            let wants: Vec<Want> = remaining.iter().enumerate().map(|(i, &r)| want(i as u64, r)).collect();
            let grants = share_out(&wants, budget, chunk_max);
            let given: usize = grants.iter().sum();
            let usable: usize = remaining.iter().map(|r| r.min(&chunk_max)).sum();
            prop_assert_eq!(given, budget.min(usable));
            prop_assert!(grants.iter().zip(&remaining).all(|(g, r)| g <= r && *g <= chunk_max));
            prop_assert!(grants[0] > 0);
        }
    }
}
