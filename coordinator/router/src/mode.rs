//! Ways to choose the worker that streams. One looks at caches, rates and load ([`mod@crate::choose`]); the others are what it
//! is compared with, live and simulated, and what an operator falls back to. Only *who streams* differs: whether
//! and where the prompt is computed for that worker is decided by the same rules in every mode.
//!
//! Full workers are out in every mode; doubtful workers and prefill workers take part only where there is no other.

use crate::cost::{Candidate, Role};

/// How the worker that streams is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// By cached blocks, load and measured rates.
    #[default]
    CacheAware,
    /// The one with the fewest streams.
    LeastLoaded,
    /// One after another.
    RoundRobin,
    /// Any.
    Random {
        /// Equal seeds choose equally.
        seed: u64,
    },
}

impl Mode {
    /// Who streams the request of this number, as an index; `None` where that is not for this mode to say
    /// ([`Mode::CacheAware`]) or all are full.
    pub(crate) fn pick(self, candidates: &[Candidate<'_>], turn: u64) -> Option<usize> {
        if self == Self::CacheAware {
            return None;
        }
        let rank = |c: &Candidate<'_>| (c.doubtful, c.role == Role::Prefill);
        let best = candidates.iter().filter(|c| !c.full).map(rank).min()?;
        let mut able: Vec<usize> = (0..candidates.len())
            .filter(|at| !candidates[*at].full && rank(&candidates[*at]) == best)
            .collect();
        // Whatever order they come in.
        able.sort_unstable_by_key(|at| candidates[*at].id);
        let nth = |number: u64| able[(number % able.len() as u64) as usize];
        match self {
            Self::CacheAware => None,
            Self::LeastLoaded => able.into_iter().min_by_key(|at| candidates[*at].streams),
            Self::RoundRobin => Some(nth(turn)),
            Self::Random { seed } => Some(nth(mix(seed ^ mix(turn)))),
        }
    }
}

/// SplitMix64's finaliser.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Prefix, Rates};

    fn candidate(id: &str, role: Role, streams: u32) -> Candidate<'_> {
        Candidate {
            id,
            role,
            kv_digest: b"d",
            prefix: Prefix::default(),
            streams,
            prefilling: 0,
            pending_prompt_tokens: 0,
            available_blocks: 100,
            total_blocks: 100,
            block_size: 16,
            kv_bytes_per_block: 16,
            rates: Rates::default(),
            full: false,
            doubtful: false,
        }
    }

    #[test]
    fn each_mode_takes_whom_it_should() {
        let mut workers = [
            candidate("c", Role::Combined, 1),
            candidate("p", Role::Prefill, 0),
            candidate("a", Role::Decode, 5),
            candidate("b", Role::Decode, 3),
        ];
        let picks = |workers: &[Candidate<'_>], mode: Mode| -> Vec<Option<usize>> {
            (0..6).map(|turn| mode.pick(workers, turn)).collect()
        };
        assert_eq!(picks(&workers, Mode::CacheAware), [None; 6]);
        assert_eq!(picks(&workers, Mode::LeastLoaded), [Some(0); 6]);
        assert_eq!(picks(&workers, Mode::RoundRobin), [2, 3, 0, 2, 3, 0].map(Some));
        let counts = (0..3000).fold([0; 4], |mut counts, turn| {
            counts[Mode::Random { seed: 1 }.pick(&workers, turn).expect("there are some")] += 1;
            counts
        });
        assert!(
            counts[1] == 0 && [0, 2, 3].iter().all(|at| counts[*at] > 850),
            "{counts:?}"
        );
        assert_ne!(
            picks(&workers, Mode::Random { seed: 1 }),
            picks(&workers, Mode::Random { seed: 2 })
        );

        workers[0].full = true;
        workers[2].doubtful = true;
        assert_eq!(
            picks(&workers, Mode::RoundRobin),
            [Some(3); 6],
            "neither full nor doubtful"
        );
        workers[3].full = true;
        assert_eq!(
            picks(&workers, Mode::LeastLoaded),
            [Some(1); 6],
            "sooner a prefill worker than a doubtful one"
        );
        workers[1].full = true;
        assert_eq!(picks(&workers, Mode::RoundRobin), [Some(2); 6]);
        workers[2].full = true;
        assert_eq!(picks(&workers, Mode::RoundRobin), [None; 6]);
    }
}
