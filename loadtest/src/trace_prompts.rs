//! Prompts of a trace: what they share, as tokens for a simulation and as words for a live server, and how much of them
//! any cache could have held.
//!
//! A trace tells lengths and, in Mooncake's format, names of blocks of 512 tokens whose equality means an equal prefix.
//! [`pieces`] reads a request that way, and everything here is made of pieces:
//!
//! - tokens: token `i` of the block named `h` is `512 h + i`;
//! - words: those of a block are drawn from its name, those without a name from the request's number.
//!
//! So two prompts share exactly the prefixes that the trace says they share, and requests without names share nothing. In
//! words that holds to the token where the server's tokenizer makes one token of each word and its template adds none
//! ([`crate::word_model`]); elsewhere lengths and block boundaries are shifted by what it does to them.

use crate::prompt::append_words;
use crate::trace::{HASH_BLOCK_TOKENS, Trace, TraceRequest};
use std::collections::HashMap;

/// Ids of a simulated vocabulary. Prompts use the lower half, generated tokens the upper.
pub const VOCABULARY: usize = 1 << 32;
/// First id of the upper half.
pub const GENERATED: u32 = 1 << 31;

/// Streams of the words of named blocks start here, so that they never meet request numbers.
const BLOCK_STREAM: u64 = 1 << 62;

/// A stretch of a prompt: at most [`HASH_BLOCK_TOKENS`] tokens, and the name that other prompts may share it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Of the whole prefix up to its end; `None` belongs to this request alone.
    pub name: Option<u64>,
    /// Its length.
    pub tokens: u32,
}

/// A request's prompt, piece by piece; at least one token.
pub fn pieces(request: &TraceRequest) -> impl Iterator<Item = Piece> {
    let (mut left, mut names) = (request.input_tokens.max(1), request.hash_ids.iter().copied());
    std::iter::from_fn(move || {
        let tokens = left.min(HASH_BLOCK_TOKENS);
        left -= tokens;
        let name = names.next();
        (tokens > 0).then_some(Piece { name, tokens })
    })
}

/// The prompt of request `number` in words, `words_per_token` for each recorded token and at most `words_max`.
pub fn words(request: &TraceRequest, number: u64, seed: u64, words_per_token: f64, words_max: usize) -> String {
    let (mut text, mut tokens, mut words) = (String::new(), 0u64, 0usize);
    for (place, piece) in pieces(request).enumerate() {
        tokens += u64::from(piece.tokens);
        let until = ((tokens as f64 * words_per_token).round() as usize).clamp(1, words_max.max(1));
        let count = until - words;
        words = until;
        match piece.name {
            Some(name) => append_words(&mut text, seed, BLOCK_STREAM + name % BLOCK_STREAM, count),
            // One request has fewer than 2^24 pieces, and a trace fewer than 2^32 requests.
            None => append_words(&mut text, seed, number << 24 | place as u64, count),
        }
    }
    text
}

/// Makes the prompts of a trace in tokens.
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
        let mut tokens = Vec::with_capacity(request.input_tokens.max(1) as usize);
        let mut new = || {
            self.next += 1;
            self.next - 1
        };
        for piece in pieces(request) {
            let number = match piece.name {
                Some(name) => *self.numbers.entry(name).or_insert_with(&mut new),
                None => new(),
            };
            let first = number.wrapping_mul(HASH_BLOCK_TOKENS) % GENERATED;
            tokens.extend(first..first + piece.tokens);
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
            let (mut shared, mut whole) = (0, true);
            for Piece { name, tokens } in pieces(request) {
                let Some(name) = name else { break };
                let before = known.entry(name).or_default();
                if whole {
                    shared += tokens.min(*before);
                    whole = *before == HASH_BLOCK_TOKENS;
                }
                *before = tokens.max(*before);
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

    #[test]
    fn words_share_what_the_trace_says() {
        let of =
            |number, input_tokens, hash_ids: &[u64]| words(&request(input_tokens, hash_ids), number, 1, 1.0, 1 << 20);
        let (a, b, c) = (
            of(0, 1300, &[7, 8, 9]),
            of(1, 1200, &[7, 8, 1 << 60]),
            of(2, 1300, &[7]),
        );
        let split = |text: &'static str| text.split(' ').collect::<Vec<_>>();
        let [a, b, c] = [a, b, c].map(|text| split(text.leak()));
        assert_eq!((a.len(), b.len(), c.len()), (1300, 1200, 1300));
        let common = |x: &[&str], y: &[&str]| x.iter().zip(y).take_while(|(x, y)| x == y).count();
        // The words after a shared prefix are drawn anew; a few may be the same by chance.
        assert!((1024..1034).contains(&common(&a, &b)), "{}", common(&a, &b));
        assert!((512..522).contains(&common(&a, &c)), "{}", common(&a, &c));
        assert_ne!(c[512..1024], c[1024..][..276], "no piece repeats another");
        assert_ne!(of(2, 600, &[]), of(3, 600, &[]));
        assert_eq!(of(9, 0, &[]).split(' ').count(), 1);
        let capped = words(&request(1300, &[7, 8, 9]), 0, 1, 0.5, 400);
        assert_eq!(capped.split(' ').count(), 400);
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
