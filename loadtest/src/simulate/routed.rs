//! baton's own router, in any of its modes, driven as a coordinator drives it: block events into its index, heartbeats and placements into its
//! candidates, measured first tokens into its calibration.

use super::SimulationOptions;
use super::policy::{Ask, Placement, Policy, WorkerLoad, WorkerView};
use baton_engine::{BlockEvent, BlockEvents};
use baton_proto::block_hash::BlockHash;
use baton_router::{BlockUpdate, Candidate, Choice, Mode, Prefixes, Rates, Role, Router, Seat, Tier, Verdict};
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// One worker as the coordinator knows it.
struct Known {
    id: String,
    seat: Seat,
    /// Number of the next message of block events.
    number: u64,
    load: WorkerLoad,
    /// Uncached prompt tokens placed there whose first token has not come.
    pending_tokens: u64,
}

/// A request that was placed.
struct Waiting {
    worker: usize,
    uncached_tokens: u64,
    placed: Duration,
    /// What the model said of its first token.
    modelled_s: f64,
}

/// See the module.
pub struct Routed {
    router: Router,
    workers: Vec<Known>,
    total_blocks: u32,
    block_size: u32,
    kv_bytes_per_block: u64,
    prefixes: Prefixes,
    names: Vec<u64>,
    /// Requests without a first token.
    waiting: HashMap<usize, Waiting>,
}

/// The first eight bytes of a block's name, as on the wire.
fn name(hash: &BlockHash) -> u64 {
    let (first, _) = hash.as_chunks::<8>();
    u64::from_le_bytes(first[0])
}

fn millis(now: Duration) -> u64 {
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl Routed {
    /// A router of workers that are all there and all cold.
    pub fn new(options: &SimulationOptions, mode: Mode) -> Self {
        let mut router = Router::new(baton_router::Policy {
            mode,
            stay: options.stay,
            ..baton_router::Policy::default()
        });
        let workers = (0..options.workers).map(|index| Known {
            id: format!("{index:04}"),
            seat: router.join(),
            number: 1,
            load: WorkerLoad::default(),
            pending_tokens: 0,
        });
        let workers = workers.collect();
        let total_blocks = options.profile.blocks(options.kv_bytes, options.block_size);
        Self {
            router,
            workers,
            total_blocks,
            block_size: options.block_size as u32,
            kv_bytes_per_block: options.profile.kv_bytes_per_token * options.block_size as u64,
            prefixes: Prefixes::default(),
            names: Vec::new(),
            waiting: HashMap::new(),
        }
    }
}

impl Policy for Routed {
    fn choose(&mut self, ask: &Ask<'_>, workers: &[WorkerView]) -> Placement {
        self.names.clear();
        self.names.extend(ask.hashes.iter().map(name));
        let now_ms = millis(ask.now);
        self.router.look_up(&self.names, now_ms, &mut self.prefixes);
        let candidates: Vec<Candidate<'_>> = self
            .workers
            .iter()
            .zip(workers)
            .map(|(known, view)| Candidate {
                id: &known.id,
                role: Role::Combined,
                kv_digest: &[],
                prefix: self.prefixes.of(known.seat),
                streams: u32::try_from(view.requests).unwrap_or(u32::MAX),
                prefilling: 0,
                pending_prompt_tokens: known.load.pending_prompt_tokens.max(known.pending_tokens),
                available_blocks: known.load.available_blocks.min(self.total_blocks),
                total_blocks: self.total_blocks,
                block_size: self.block_size,
                kv_bytes_per_block: self.kv_bytes_per_block,
                rates: Rates {
                    prefill_tokens_per_s: known.load.prefill_tokens_per_s,
                    decode_step_us: known.load.decode_step_us,
                    ..Rates::default()
                },
                full: false,
                doubtful: false,
            })
            .collect();
        let router_ask = baton_router::Ask {
            prompt_tokens: ask.prompt_tokens,
            max_tokens: ask.output_tokens,
        };
        let Choice::Place { decode, estimate, .. } = self.router.choose(&candidates, &router_ask) else {
            // Nobody is ever full here.
            return Placement {
                worker: 0,
                uncached_tokens: ask.prompt_tokens,
            };
        };
        self.router
            .placed(self.workers[decode].seat, &self.names, estimate.ttft_s, now_ms);
        let uncached_tokens = estimate.uncached_tokens as u64;
        self.workers[decode].pending_tokens += uncached_tokens;
        let waiting = Waiting {
            worker: decode,
            uncached_tokens,
            placed: ask.now,
            modelled_s: estimate.modelled_s,
        };
        self.waiting.insert(ask.request, waiting);
        Placement {
            worker: decode,
            uncached_tokens: estimate.uncached_tokens,
        }
    }

    fn block_events(&mut self, worker: usize, events: &BlockEvents, now: Duration) {
        let known = &mut self.workers[worker];
        let told = Told::of(&events.events);
        let update = BlockUpdate {
            number: known.number,
            reset: events.reset,
            tier: Tier::Device,
            evicted: &told.evicted,
            stored: told.runs(),
        };
        known.number += 1;
        let verdict = self.router.apply(known.seat, update, millis(now));
        debug_assert_eq!(verdict, Verdict::Applied, "the simulated stream loses nothing");
        self.router.sweep();
    }

    fn load(&mut self, worker: usize, load: WorkerLoad) {
        self.workers[worker].load = load;
    }

    fn first_token(&mut self, request: usize, now: Duration) {
        if let Some(waiting) = self.waiting.remove(&request) {
            self.workers[waiting.worker].pending_tokens -= waiting.uncached_tokens;
            let measured_s = (now - waiting.placed).as_secs_f64();
            self.router.first_token(false, waiting.modelled_s, measured_s);
        }
    }
}

/// Events as a message tells them: what went, then runs of what came and stayed.
struct Told {
    evicted: Vec<u64>,
    stored: Vec<u64>,
    /// Ends of the runs in `stored`.
    ends: Vec<usize>,
}

impl Told {
    fn of(events: &[BlockEvent]) -> Self {
        let mut told = Told {
            evicted: Vec::new(),
            stored: Vec::new(),
            ends: Vec::new(),
        };
        // From behind, so that a block that went after it came is known to be gone.
        let (mut decided, mut kept) = (HashSet::new(), Vec::new());
        for event in events.iter().rev() {
            match event {
                BlockEvent::Stored { parent, hash, .. } if decided.insert(*hash) => kept.push((parent, hash)),
                BlockEvent::Evicted { hash, .. } => {
                    decided.insert(*hash);
                    told.evicted.push(name(hash));
                }
                BlockEvent::Stored { .. } => {}
            }
        }
        let mut last = None;
        for (parent, hash) in kept.into_iter().rev() {
            if last.is_some() && last != Some(parent) {
                told.ends.push(told.stored.len());
            }
            told.stored.push(name(hash));
            last = Some(hash);
        }
        told.ends.push(told.stored.len());
        told
    }

    fn runs(&self) -> impl Iterator<Item = &[u64]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.stored[start..*end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        [n; 16]
    }

    fn stored(parent: u8, n: u8) -> BlockEvent {
        BlockEvent::Stored {
            parent: hash(parent),
            hash: hash(n),
            block: 0,
        }
    }

    #[test]
    fn events_become_what_is_true_after_them() {
        let gone = |n| BlockEvent::Evicted {
            parent: [0; 16],
            hash: hash(n),
            block: 0,
        };
        let told = Told::of(&[
            stored(0, 1),
            stored(1, 2),
            stored(2, 3),
            gone(3),
            gone(9),
            stored(8, 9),
            stored(9, 10),
        ]);
        let runs: Vec<Vec<u64>> = told.runs().map(<[u64]>::to_vec).collect();
        let names = |list: &[u8]| list.iter().map(|n| name(&hash(*n))).collect::<Vec<_>>();
        assert_eq!(runs, [names(&[1, 2]), names(&[9, 10])]);
        assert_eq!(told.evicted, names(&[9, 3]));
        assert!(Told::of(&[]).runs().all(<[u64]>::is_empty));
    }
}
