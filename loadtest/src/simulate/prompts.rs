//! Prompts of a trace as tokens, and how much of them any cache could have held.
//!
//! A trace tells lengths and, in Mooncake's format, names of blocks of 512 tokens whose equality means an equal prefix.
//! Token `i` of the block named `h` is `512 h + i`, so two prompts share exactly the prefixes that the trace says they
//! share. Requests without names share nothing.

use crate::trace::{HASH_BLOCK_TOKENS, Trace, TraceRequest};
use std::collections::HashMap;

/// Ids of a simulated vocabulary. Prompts use the lower half, generated tokens the upper.
pub const VOCABULARY: usize = 1 << 32;
/// First id of the upper half.
pub const GENERATED: u32 = 1 << 31;

/// Makes the prompts of a trace.
#[derive(Debug, Default)]
pub struct Prompts {
    /// Names of the trace to numbers from 0, so that tokens stay small whatever the names are.
    numbers: HashMap<u64, u32>,
    /// Numbers given out.
    next: u32,
}

impl Prompts {
    /// The prompt of a request, at least one token. Requests are asked for in the order of the trace, each once.
    pub fn tokens(&mut self, request: &TraceRequest) -> Vec<u32> {
        let len = request.input_tokens.max(1) as usize;
        let mut tokens = Vec::with_capacity(len);
        let mut names = request.hash_ids.iter();
        while tokens.len() < len {
            let number = match names.next() {
                Some(name) => *self.numbers.entry(*name).or_insert_with(|| {
                    self.next += 1;
                    self.next - 1
                }),
                None => {
                    self.next += 1;
                    self.next - 1
                }
            };
            let first = number.wrapping_mul(HASH_BLOCK_TOKENS) % GENERATED;
            let count = (len - tokens.len()).min(HASH_BLOCK_TOKENS as usize) as u32;
            tokens.extend(first..first + count);
        }
        tokens
    }
}

/// What an infinite cache shared by all workers, filled by whole prompts the moment they arrive, could save.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheBound {
    /// Prompt tokens of the trace.
    pub prompt_tokens: u64,
    /// Of those, tokens of a prefix that an earlier request had: in whole cache blocks, the last token excepted, since
    /// that is computed in any case.
    pub cached_tokens: u64,
}

impl CacheBound {
    /// The bound for the first `requests` of a trace and cache blocks of `block_size` tokens.
    pub fn of(trace: &Trace, requests: usize, block_size: usize) -> Self {
        // Tokens known of each block of the trace. A name stands for the whole prefix up to its block.
        let mut known: HashMap<u64, u32> = HashMap::new();
        let mut bound = Self::default();
        for request in trace.requests.iter().take(requests) {
            let len = request.input_tokens.max(1);
            let (mut shared, mut at, mut whole) = (0, 0, true);
            for name in &request.hash_ids {
                let here = HASH_BLOCK_TOKENS.min(len - at);
                let before = known.entry(*name).or_default();
                if whole {
                    shared += here.min(*before);
                    whole = *before == HASH_BLOCK_TOKENS;
                }
                *before = here.max(*before);
                at += here;
                if at == len {
                    break;
                }
            }
            let reusable = (len - 1).min(shared) / block_size as u32 * block_size as u32;
            bound.prompt_tokens += u64::from(len);
            bound.cached_tokens += u64::from(reusable);
        }
        bound
    }

    /// Share of prompt tokens, 0 to 1.
    pub fn rate(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::block_hash;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::time::Duration;

    fn request(input_tokens: u32, hash_ids: &[u64]) -> TraceRequest {
        TraceRequest {
            at: Duration::ZERO,
            input_tokens,
            output_tokens: 1,
            hash_ids: hash_ids.to_vec(),
        }
    }

    #[test]
    fn prompts_share_what_the_trace_says() {
        let mut prompts = Prompts::default();
        let a = prompts.tokens(&request(1300, &[7, 8, 9]));
        let b = prompts.tokens(&request(1200, &[7, 8, 1 << 60]));
        let c = prompts.tokens(&request(600, &[]));
        assert_eq!((a.len(), b.len(), c.len()), (1300, 1200, 600));
        assert_eq!(a[..1024], b[..1024]);
        let distinct: HashSet<u32> = a[1024..].iter().chain(&b[1024..]).chain(&c).copied().collect();
        assert_eq!(distinct.len(), 276 + 176 + 600);
        assert!(distinct.iter().all(|token| *token < GENERATED));
        assert_eq!(prompts.tokens(&request(0, &[])).len(), 1);
    }

    proptest! {
        /// The bound is what remembering every block-aligned prefix of tokens finds.
        #[test]
        fn the_bound_is_that_of_the_prompts(
            turns in prop::collection::vec((0usize..4, 1u32..2000), 1..20), block_size in prop::sample::select(vec![5usize, 16, 48, 512, 700]),
        ) {
            // Conversations: each turn goes on with all whole blocks of the turn before, and some new ones.
            let (mut past, mut next) = (vec![Vec::<u64>::new(); 4], 0);
            let requests = turns.iter().map(|&(who, more)| {
                let kept = past[who].clone();
                let len = kept.len() as u32 * HASH_BLOCK_TOKENS + more;
                let mut ids = kept;
                while (ids.len() as u32) * HASH_BLOCK_TOKENS < len {
                    ids.push(next);
                    next += 1;
                }
                past[who] = ids[..(len / HASH_BLOCK_TOKENS) as usize].to_vec();
                request(len, &ids)
            });
            let requests: Vec<_> = requests.collect();
            let (mut prompts, mut known) = (Prompts::default(), HashSet::new());
            let mut expected = 0;
            for request in &requests {
                let tokens = prompts.tokens(request);
                let names = block_hash::chain(b"", &tokens, block_size);
                let hits = names.iter().take_while(|name| known.contains(*name)).count();
                expected += (hits.min((tokens.len() - 1) / block_size) * block_size) as u64;
                known.extend(names);
            }
            let trace = Trace { requests: requests.into() };
            prop_assert_eq!(CacheBound::of(&trace, usize::MAX, block_size).cached_tokens, expected);
        }
    }
}
