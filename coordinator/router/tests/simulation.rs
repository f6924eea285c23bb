//! Workers with real prefix caches behind a faulty event stream: whatever is lost, repeated, reordered or restarted, the
//! router never claims a block that the worker did not have at its last event, and after a resync it knows all.
//!
//! `BATON_ROUTER_SEEDS=N` runs N seeds (default 6, a few seconds).

use baton_router::feed::RESYNC_PAUSE_MS;
use baton_router::{BlockUpdate, Policy, Prefixes, Router, Seat, Tier, Verdict};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// splitmix64: small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone)]
struct Message {
    seat: Seat,
    number: u64,
    reset: bool,
    tier: Tier,
    stored: Vec<Vec<u64>>,
    evicted: Vec<u64>,
    /// What the worker has in each tier after it.
    truth: BTreeMap<u64, u8>,
}

struct Worker {
    seat: Seat,
    number: u64,
    /// Tiers of each block.
    has: BTreeMap<u64, u8>,
    /// Under way to the router.
    wire: VecDeque<Message>,
    /// What it had at the last event that the router took, and whether it knows it.
    believed: Option<BTreeMap<u64, u8>>,
    told: bool,
}

/// Prompts form a tree; the name of a block is a function of the path.
fn chain(random: &mut Random) -> Vec<u64> {
    let mut name = 1u64;
    let depth = 1 + random.below(90);
    (0..depth)
        .map(|level| {
            let branches = if level % 30 == 29 { 3 } else { 1 };
            name = Random(name ^ (random.below(branches) as u64) << 32).next();
            name
        })
        .collect()
}

impl Worker {
    fn new(router: &mut Router) -> Self {
        Self {
            seat: router.join(),
            number: 0,
            has: BTreeMap::new(),
            wire: VecDeque::new(),
            believed: None,
            told: false,
        }
    }

    fn tell(&mut self, reset: bool, tier: Tier, stored: Vec<Vec<u64>>, evicted: Vec<u64>) {
        self.number += 1;
        self.wire.push_back(Message {
            seat: self.seat,
            number: self.number,
            reset,
            tier,
            stored,
            evicted,
            truth: self.has.clone(),
        });
    }

    fn tell_all(&mut self) {
        // A reset, and the other tiers after it; between the two only the first is known.
        let mut truth = BTreeMap::new();
        for tier in [Tier::Device, Tier::Host] {
            let all = self.has.iter().filter(|(_, tiers)| **tiers & bit(tier) != 0);
            let all: Vec<u64> = all.map(|(name, _)| *name).collect();
            for name in &all {
                *truth.entry(*name).or_default() |= bit(tier);
            }
            self.tell(tier == Tier::Device, tier, vec![all], vec![]);
            if let Some(last) = self.wire.back_mut() {
                last.truth = truth.clone();
            }
        }
        self.told = true;
    }

    /// The engine did something to the cache.
    fn live(&mut self, random: &mut Random) {
        let tier = if random.chance(25) { Tier::Host } else { Tier::Device };
        if random.chance(70) {
            let chain = chain(random);
            // Mostly prefixes; sometimes with a hole, as when a duplicate of a block in use was evicted.
            let from = if random.chance(10) {
                random.below(chain.len())
            } else {
                0
            };
            let new = chain[from..].to_vec();
            for name in &new {
                *self.has.entry(*name).or_default() |= bit(tier);
            }
            self.tell(false, tier, vec![new], vec![]);
        } else {
            let gone: BTreeSet<u64> = (0..random.below(40))
                .filter_map(|_| self.has.keys().nth(random.below(self.has.len().max(1))).copied())
                .collect();
            for name in &gone {
                if let Some(tiers) = self.has.get_mut(name) {
                    *tiers &= !bit(tier);
                    if *tiers == 0 {
                        self.has.remove(name);
                    }
                }
            }
            self.tell(false, tier, vec![], gone.into_iter().collect());
        }
    }
}

fn bit(tier: Tier) -> u8 {
    1 << tier as u8
}

fn depth(has: &BTreeMap<u64, u8>, names: &[u64]) -> usize {
    names.iter().take_while(|name| has.contains_key(name)).count()
}

fn run(seed: u64) {
    let random = &mut Random(seed);
    let mut router = Router::new(Policy::default());
    let mut workers: Vec<Worker> = (0..4 + random.below(200)).map(|_| Worker::new(&mut router)).collect();
    let mut prefixes = Prefixes::default();
    let mut now_ms = 0;
    for _ in 0..1500 {
        now_ms += 20;
        let at = random.below(workers.len());
        let worker = &mut workers[at];
        if !worker.told {
            worker.tell_all();
        }
        worker.live(random);
        match random.below(100) {
            // Lost, repeated, swapped.
            0..6 => drop(worker.wire.pop_front()),
            6..9 => worker
                .wire
                .front()
                .cloned()
                .into_iter()
                .for_each(|m| worker.wire.push_front(m)),
            9..12 if worker.wire.len() > 1 => worker.wire.swap(0, 1),
            // The process restarts with an empty cache; or only its registration is new. What is under way may still come.
            12..15 => {
                router.leave(worker.seat);
                let late = std::mem::take(&mut worker.wire);
                *worker = Worker {
                    has: if random.chance(50) {
                        BTreeMap::new()
                    } else {
                        std::mem::take(&mut worker.has)
                    },
                    wire: late,
                    ..Worker::new(&mut router)
                };
            }
            _ => {}
        }
        for _ in 0..1 + random.below(3) {
            let Some(message) = worker.wire.pop_front() else { break };
            let update = BlockUpdate {
                number: message.number,
                reset: message.reset,
                tier: message.tier,
                evicted: &message.evicted,
                stored: message.stored.iter().map(Vec::as_slice),
            };
            match router.apply(message.seat, update, now_ms) {
                Verdict::Applied => worker.believed = Some(message.truth),
                Verdict::Ignored => assert!(worker.believed.is_none() || message.seat != worker.seat),
                Verdict::Resync => {
                    worker.believed = None;
                    // The order may be lost as well; it is repeated after a while.
                    if random.chance(80) {
                        worker.tell_all();
                    }
                }
            }
        }
        for _ in 0..random.below(200) {
            router.sweep();
        }

        let names = chain(random);
        router.look_up(&names, now_ms, &mut prefixes);
        for (at, worker) in workers.iter().enumerate() {
            let prefix = prefixes.of(worker.seat);
            // Exactly what was told, no more and no less: also what is behind a hole does not count.
            let expected = worker.believed.as_ref().map_or(0, |has| depth(has, &names));
            assert_eq!(prefix.blocks as usize, expected, "seed {seed}, worker {at}");
            assert_eq!(
                router.is_synchronised(worker.seat),
                worker.believed.is_some(),
                "seed {seed}, worker {at}"
            );
            let host = |has: &BTreeMap<u64, u8>| {
                names[..expected]
                    .iter()
                    .filter(|name| has[name] == bit(Tier::Host))
                    .count()
            };
            let lower = prefix.lower[0] as usize;
            assert!(
                lower == 0 || lower == worker.believed.as_ref().map_or(0, host),
                "seed {seed}, worker {at}"
            );
        }
    }
    // Everything settles: all are told, all are known.
    now_ms += RESYNC_PAUSE_MS;
    for worker in &mut workers {
        worker.wire.clear();
        worker.tell_all();
        for message in worker.wire.drain(..) {
            let update = BlockUpdate {
                number: message.number,
                reset: message.reset,
                tier: message.tier,
                evicted: &message.evicted,
                stored: message.stored.iter().map(Vec::as_slice),
            };
            assert_eq!(router.apply(message.seat, update, now_ms), Verdict::Applied);
        }
    }
    let names = chain(random);
    router.look_up(&names, now_ms, &mut prefixes);
    for worker in &workers {
        assert_eq!(
            prefixes.of(worker.seat).blocks as usize,
            depth(&worker.has, &names),
            "seed {seed}"
        );
    }
    let blocks: usize = workers.iter().map(|worker| worker.has.len()).sum();
    assert_eq!(router.stats().index.pairs, blocks as u64, "seed {seed}");
    while router.sweep() {}
    for worker in &workers {
        router.leave(worker.seat);
        assert_eq!(
            prefixes.of(worker.seat).blocks as usize,
            depth(&worker.has, &names),
            "a snapshot stands"
        );
    }
    router.look_up(&names, now_ms, &mut prefixes);
    assert!(
        workers.iter().all(|worker| prefixes.of(worker.seat).blocks == 0),
        "seed {seed}"
    );
    while router.sweep() {}
    let stats = router.stats().index;
    assert_eq!((stats.blocks, stats.pairs, stats.dead_slots), (0, 0, 0), "seed {seed}");
}

#[test]
fn never_a_wrong_hit_whatever_happens_to_the_events() {
    let seeds = std::env::var("BATON_ROUTER_SEEDS")
        .ok()
        .and_then(|seeds| seeds.parse().ok())
        .unwrap_or(6);
    (0..seeds).for_each(run);
}

/// A burst of one prefix stays together before any event has come, and the guess expires.
#[test]
fn what_was_just_placed_counts_until_it_expires() {
    let mut router = Router::new(Policy::default());
    let (a, b) = (router.join(), router.join());
    let names: Vec<u64> = (1..=70).map(|i| Random(i).next()).collect();
    router.placed(a, &names, 0.5, 1000);
    let mut prefixes = Prefixes::default();
    router.look_up(&names, 1100, &mut prefixes);
    assert_eq!(
        (
            prefixes.of(a).blocks,
            prefixes.of(a).recent_blocks,
            prefixes.of(b).blocks
        ),
        (64, 64, 0)
    );
    // The events say more.
    let update = BlockUpdate {
        number: 1,
        reset: true,
        tier: Tier::Device,
        evicted: &[],
        stored: [names.as_slice()],
    };
    assert_eq!(router.apply(a, update, 1150), Verdict::Applied);
    router.look_up(&names, 1200, &mut prefixes);
    assert_eq!((prefixes.of(a).blocks, prefixes.of(a).recent_blocks), (70, 0));
    // Another life of the same seat number has neither.
    router.leave(a);
    let again = router.join();
    router.look_up(&names, 1300, &mut prefixes);
    assert_eq!((prefixes.of(a).blocks, prefixes.of(again).blocks), (0, 0));
    router.placed(again, &names, 0.5, 1300);
    router.look_up(&names, 1300 + 2000 + 1000, &mut prefixes);
    assert_eq!(prefixes.of(again).blocks, 0, "expired");
}

/// More resyncs than there are slots: workers go cold, and come back when the sweep has made room.
#[test]
fn a_storm_of_resyncs_runs_out_of_slots_and_recovers() {
    let mut router = Router::new(Policy::default());
    let seat = router.join();
    let mut cold = 0;
    let tell = |router: &mut Router, now_ms| {
        let stored = [[7u64].as_slice()];
        router.apply(
            seat,
            BlockUpdate {
                number: 1,
                reset: true,
                tier: Tier::Device,
                evicted: &[],
                stored,
            },
            now_ms,
        )
    };
    for i in 0..5000 {
        cold += usize::from(tell(&mut router, i) != Verdict::Applied);
    }
    assert!(cold > 0 && !router.is_synchronised(seat));
    while router.sweep() {}
    assert_eq!(tell(&mut router, 100_000), Verdict::Applied);
    assert!(router.is_synchronised(seat));
}
