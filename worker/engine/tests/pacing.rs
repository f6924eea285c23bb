//! Fairness and pace in virtual time: a machine with a cost per step and per token in place of an engine, clients in
//! place of a network. What is asserted are bounds that a scheduler's rules promise on any such machine, not speeds.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_engine::{Request, SamplingParams, Scheduler, SchedulerConfig, SeqId};

/// What a step costs, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Machine {
    base: f64,
    decode: f64,
    prefill: f64,
}

/// Half a billion parameters in int8, and a billion in bf16, on two cores.
const QUICK: Machine = Machine {
    base: 20.0,
    decode: 0.5,
    prefill: 0.45,
};
const SLOW: Machine = Machine {
    base: 100.0,
    decode: 1.0,
    prefill: 4.0,
};

/// One request, in virtual milliseconds.
#[derive(Debug, Clone, Default)]
struct Timing {
    submitted: f64,
    tokens: Vec<f64>,
    finished: bool,
}

impl Timing {
    fn ttft(&self) -> f64 {
        self.tokens[0] - self.submitted
    }
}

struct World {
    scheduler: Scheduler,
    machine: Machine,
    now: f64,
    requests: BTreeMap<SeqId, Timing>,
    next_prompt: u32,
}

impl World {
    fn new(machine: Machine, config: SchedulerConfig) -> Self {
        World {
            scheduler: Scheduler::new(config).expect("valid"),
            machine,
            now: 0.0,
            requests: BTreeMap::new(),
            next_prompt: 0,
        }
    }

    /// A prompt like no other, so that nothing is cached.
    fn submit(&mut self, prompt_tokens: usize, max_tokens: usize) -> SeqId {
        self.next_prompt += 1;
        let prompt: Vec<u32> = std::iter::once(self.next_prompt)
            .chain((1..prompt_tokens as u32).map(|i| i % 1000))
            .collect();
        let request = Request {
            prompt: prompt.into(),
            max_tokens,
            sampling: SamplingParams::GREEDY,
            shaping: None,
            stop_token_ids: Vec::new(),
            cache_salt: Vec::new(),
            remote_prefill: false,
            priority: 0,
        };
        let id = self.scheduler.submit(request).expect("room in the queue");
        let timing = Timing {
            submitted: self.now,
            ..Timing::default()
        };
        self.requests.insert(id, timing);
        id
    }

    fn burst(&mut self, requests: usize, prompt_tokens: usize, max_tokens: usize) {
        for _ in 0..requests {
            self.submit(prompt_tokens, max_tokens);
        }
    }

    /// One step; answers who ended.
    fn step(&mut self) -> Vec<SeqId> {
        let plan = self.scheduler.plan();
        assert!(!plan.batch.is_empty(), "there is work");
        let decodes = plan.batch.seqs.iter().filter(|s| s.tokens.len() == 1).count();
        let prefill = plan.batch.tokens() - decodes;
        let Machine {
            base,
            decode,
            prefill: token,
        } = self.machine;
        let took = base + decode * decodes as f64 + token * prefill as f64;
        self.now += took;
        self.scheduler
            .observe_step(&plan.batch, Duration::from_secs_f64(took / 1e3));
        let sampled: Vec<_> = plan.batch.seqs.iter().map(|s| s.sample.map(|_| 7)).collect();
        let outputs = self.scheduler.commit(&plan.batch, &sampled);
        self.scheduler.check().expect("invariants");
        let mut ended = Vec::new();
        for output in outputs {
            let timing = self.requests.get_mut(&output.seq).expect("known");
            timing.tokens.extend(output.tokens.iter().map(|_| self.now));
            if output.finish.is_some() {
                timing.finished = true;
                ended.push(output.seq);
            }
        }
        ended
    }

    fn drain(&mut self) {
        while self.scheduler.has_work() {
            self.step();
        }
    }
}

fn roomy() -> SchedulerConfig {
    SchedulerConfig::new(16, 8000, 40_000, 2000)
}

fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share) as usize]
}

/// Sixteen clients that each ask again as soon as they are answered: 264 tokens in, 64 out.
fn closed_loop(machine: Machine, config: SchedulerConfig) -> World {
    let mut world = World::new(machine, config);
    world.burst(16, 264, 64);
    while world.requests.len() < 200 {
        for _ in world.step() {
            world.submit(264, 64);
        }
    }
    world.drain();
    world
}

#[test]
fn streams_keep_their_pace_beside_prompts() {
    // The target is 150 ms; where a step without prompts takes 100, prompts add one and a half times that.
    for (machine, step_ms) in [(QUICK, 150.0), (SLOW, 265.0)] {
        let world = closed_loop(machine, roomy());
        let gaps: Vec<f64> = world
            .requests
            .values()
            .flat_map(|r| r.tokens.windows(2).map(|w| w[1] - w[0]))
            .collect();
        let (p99, longest) = (percentile(gaps.clone(), 0.99), percentile(gaps, 1.0));
        assert!(p99 <= 1.1 * step_ms, "{machine:?}: {p99} ms between tokens");
        assert!(
            longest <= 1.3 * step_ms,
            "{machine:?}: at most {longest} ms between tokens"
        );
        let free = closed_loop(
            machine,
            SchedulerConfig {
                step_target: Duration::ZERO,
                ..roomy()
            },
        );
        assert!(
            world.now <= free.now * 1.25,
            "the pace costs too much: {} against {}",
            world.now,
            free.now
        );
    }
}

#[test]
fn prompts_that_arrive_together_end_one_by_one() {
    let mut world = World::new(QUICK, roomy());
    let count = 16;
    world.burst(count, 264, 64);
    world.drain();
    let ttfts: Vec<f64> = world.requests.values().map(Timing::ttft).collect();
    assert!(ttfts.is_sorted(), "in order of arrival: {ttfts:?}");
    let (last, mean) = (ttfts[count - 1], ttfts.iter().sum::<f64>() / count as f64);
    // Strictly one after the other the mean is 17/32 of the last; all together it would be the last.
    assert!(mean <= 0.65 * last, "mean {mean}, last {last}");
}

/// A stream of short prompts behind a very long one, for as long as that is prefilling: neither waits for the other.
#[test]
fn a_long_prompt_and_short_ones_share() {
    let (long_tokens, short_tokens, every_ms) = (30_000, 100, 400.0);
    let mut world = World::new(QUICK, roomy());
    let long = world.submit(long_tokens, 1);
    let (mut shorts, mut due) = (Vec::new(), every_ms);
    while !world.requests[&long].finished {
        if world.now >= due {
            shorts.push(world.submit(short_tokens, 4));
            due += every_ms;
        }
        world.step();
    }
    world.drain();
    assert!(shorts.len() > 20);
    for id in &shorts {
        // The step under way when it came, and its own; four targets each when nobody streams.
        let ttft = world.requests[id].ttft();
        assert!(ttft <= 2.0 * 600.0 + 100.0, "a short prompt waited {ttft} ms");
    }
    let work = (long_tokens + short_tokens * shorts.len()) as f64 * QUICK.prefill;
    let took = world.requests[&long].ttft();
    assert!(
        took <= 1.5 * work,
        "the long prompt took {took} ms, all prompts are {work} ms of work"
    );
}

/// Under endless short prompts that would fill every step, the long one still gets its half.
#[test]
fn short_prompts_do_not_starve_a_long_one() {
    let mut world = World::new(QUICK, roomy());
    let long = world.submit(8000, 1);
    world.burst(12, 200, 1);
    while !world.requests[&long].finished {
        for _ in world.step() {
            world.submit(200, 1);
        }
    }
    let alone = 8000.0 * QUICK.prefill;
    let took = world.requests[&long].ttft();
    assert!(took <= 2.5 * alone, "{took} ms, alone {alone}");
}

/// A pool that holds one long prompt and a bit, and that one streams for a while. Short prompts pass the long one that
/// waits, but not for ever, though there is always one more.
#[test]
fn a_full_pool_lets_short_prompts_pass_and_the_long_one_in() {
    let mut world = World::new(QUICK, SchedulerConfig::new(16, 300, 5000, 2000));
    world.submit(4000, 400);
    world.step();
    let long = world.submit(4000, 1);
    let mut shorts = Vec::new();
    for step in 0.. {
        assert!(step < 3000, "the long prompt starves");
        if world.requests[&long].finished {
            break;
        }
        if shorts.iter().filter(|id| world.requests[*id].tokens.is_empty()).count() < 2 {
            shorts.push(world.submit(64, 20));
        }
        world.step();
    }
    let passed = shorts
        .iter()
        .filter(|id| world.requests[*id].tokens.first() < world.requests[&long].tokens.first())
        .filter(|id| !world.requests[*id].tokens.is_empty())
        .count();
    // Four blocks each, up to the 250 that the long one needs; and some that share its steps once it is in.
    assert!((20..=90).contains(&passed), "{passed} short prompts passed");
}
