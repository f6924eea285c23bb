//! Prefill on one scheduler and engine, decode on another, KV bytes copied between their regions layer by layer as each is
//! computed: the answers equal those of one worker that does everything (the in-process half of "disaggregated equals
//! monolithic"; the worker's tests add the wire).

mod common;

use std::collections::HashMap;

use baton_engine::spans::{Table, pieces, window};
use baton_engine::{Engine, FillRequest, FinishReason, Output, PrefillRequest, Scheduler, SchedulerConfig, SeqId};
use common::tiny_model::TinyModel;
use common::{Job, alone_on, copy, engine_for, sampled};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

struct Worker {
    scheduler: Scheduler,
    engine: Box<dyn Engine>,
}

impl Worker {
    fn new(config: &SchedulerConfig, engine: Box<dyn Engine>) -> Self {
        Worker {
            scheduler: Scheduler::new(config.clone()).expect("valid"),
            engine,
        }
    }
}

/// One prefill step; every finished layer of every span goes to the decode worker at once. Answers who is complete.
fn prefill_step(prefill: &mut Worker, decode: &Worker, fills: &HashMap<SeqId, FillRequest>) -> Vec<Output> {
    let (geometry, target) = (prefill.engine.geometry(), decode.engine.geometry());
    let (here, there) = (prefill.engine.region(), decode.engine.region());
    let push = |fill: &FillRequest, layer, positions: std::ops::Range<usize>, local: Table<'_>| {
        let positions = positions.start.max(fill.cached_tokens)..positions.end.max(fill.cached_tokens);
        let remote = Table {
            start: fill.cached_tokens,
            block_size: target.block_size,
            blocks: &fill.blocks,
        };
        let admitted = window(&target, fill.cached_tokens..fill.prompt.len(), remote).expect("covered");
        for piece in pieces(&geometry, layer, positions, local, remote).expect("covered") {
            let target = piece.remote_offset..piece.remote_offset + piece.local.len();
            assert!(
                admitted.iter().any(|r| r.start <= target.start && target.end <= r.end),
                "outside the window"
            );
            copy(&here, piece.local, &there, piece.remote_offset);
        }
    };
    let plan = prefill.scheduler.plan();
    for reuse in &plan.reused {
        let start = reuse.positions.start / geometry.block_size * geometry.block_size;
        for layer in 0..geometry.layers {
            push(
                &fills[&reuse.seq],
                layer,
                reuse.positions.clone(),
                Table {
                    start,
                    block_size: geometry.block_size,
                    blocks: &reuse.blocks,
                },
            );
        }
    }
    let mut layer_done = |layer| {
        for span in &plan.batch.seqs {
            let local = Table {
                start: 0,
                block_size: geometry.block_size,
                blocks: &span.blocks,
            };
            push(&fills[&span.seq], layer, span.start_pos..span.end_pos(), local);
        }
    };
    let tokens = prefill.engine.step(&plan.batch, &mut layer_done).expect("valid batch");
    prefill.scheduler.commit(&plan.batch, &tokens)
}

/// Makes an engine of as many blocks as the configuration says.
type Make<'a> = &'a dyn Fn(&SchedulerConfig) -> Box<dyn Engine>;

fn mock(config: &SchedulerConfig) -> Box<dyn Engine> {
    Box::new(engine_for(config))
}

fn run(make: Make, prefill_config: &SchedulerConfig, decode_config: &SchedulerConfig, jobs: &[Job]) {
    let mut prefill = Worker::new(prefill_config, make(prefill_config));
    let mut decode = Worker::new(decode_config, make(decode_config));
    let mut answers: HashMap<SeqId, (usize, Vec<u32>)> = HashMap::new();
    let mut fills: HashMap<SeqId, FillRequest> = HashMap::new();
    let mut finished = 0;
    let mut waiting = jobs.iter().enumerate();
    let mut rng = SmallRng::seed_from_u64(5);
    for _ in 0..20_000 {
        for (index, job) in waiting.by_ref().take(rng.random_range(0..3)) {
            let id = decode.scheduler.submit(job.request(true)).expect("room");
            answers.insert(id, (index, Vec::new()));
        }
        let plan = decode.scheduler.plan();
        for fill in plan.fills {
            let request = PrefillRequest {
                prompt: fill.prompt.clone(),
                sampling: fill.sampling,
                shaping: None,
                cache_salt: jobs[answers[&fill.seq].0].salt.clone(),
                skip_tokens: fill.cached_tokens / prefill_config.block_size * prefill_config.block_size,
                priority: jobs[answers[&fill.seq].0].priority,
            };
            let id = prefill.scheduler.submit_prefill(request).expect("room");
            fills.insert(id, fill);
        }
        let tokens = decode.engine.step(&plan.batch, &mut |_| {}).expect("valid batch");
        let mut outputs = decode.scheduler.commit(&plan.batch, &tokens);
        for done in prefill_step(&mut prefill, &decode, &fills) {
            let fill = fills.remove(&done.seq).expect("asked for");
            assert_eq!(done.finish.map(|f| f.reason), Some(FinishReason::Prefilled));
            assert!(prefill.scheduler.release(done.seq));
            outputs.extend(decode.scheduler.fill_done(fill.seq, done.tokens[0]));
        }
        for output in outputs {
            let answer = answers.get_mut(&output.seq).expect("known");
            answer.1.extend(output.tokens);
            finished += usize::from(output.finish.is_some());
        }
        prefill.scheduler.check().expect("invariants of the prefill worker");
        decode.scheduler.check().expect("invariants of the decode worker");
        if finished == jobs.len() {
            break;
        }
    }
    assert_eq!(finished, jobs.len(), "every request ends");
    let mut reference = make(decode_config);
    for (index, answer) in answers.into_values() {
        assert_eq!(
            answer,
            alone_on(&mut *reference, decode_config, &jobs[index]).0,
            "{:?}",
            jobs[index]
        );
    }
    for worker in [&prefill, &decode] {
        assert!(worker.scheduler.is_idle());
        assert_eq!(worker.scheduler.stats().held_blocks, 0);
    }
    assert!(decode.scheduler.stats().cached_tokens > 0 && prefill.scheduler.stats().cached_tokens > 0);
}

fn jobs(count: usize, longest: usize) -> Vec<Job> {
    let mut rng = SmallRng::seed_from_u64(11);
    let stem: Vec<u32> = (0..longest).map(|_| rng.random_range(0..64)).collect();
    (0..count)
        .map(|i| {
            let len = rng.random_range(1..=longest);
            let shared = rng.random_range(0..=len);
            let mut prompt = stem[..shared].to_vec();
            prompt.extend((shared..len).map(|_| rng.random_range(0..64)));
            Job {
                sampling: sampled(i as u64),
                ..Job::new(prompt, rng.random_range(1..40))
            }
        })
        .collect()
}

#[test]
fn equals_monolithic() {
    let base = SchedulerConfig {
        waiting_max: 1000,
        remote_prefill_min_tokens: 10,
        ..SchedulerConfig::new(16, 200, 400, 64)
    };
    let prefill = SchedulerConfig {
        batch_tokens_max: 80,
        ..base.clone()
    };
    run(&mock, &prefill, &base, &jobs(200, 150));
}

/// Both pools too small for the load: preemption on the decode side, queueing on both.
#[test]
fn equals_monolithic_on_small_pools() {
    let base = SchedulerConfig {
        waiting_max: 1000,
        seqs_max: 8,
        batch_tokens_max: 40,
        ..SchedulerConfig::new(4, 30, 200, 64)
    };
    run(
        &mock,
        &SchedulerConfig {
            total_blocks: 22,
            ..base.clone()
        },
        &base,
        &jobs(120, 80),
    );
}

/// With a real decoder: the same bits in the KV, so the same tokens, to the last one.
#[test]
fn equals_monolithic_with_a_real_model() {
    let model = TinyModel::new(3);
    let base = SchedulerConfig {
        waiting_max: 1000,
        seqs_max: 12,
        remote_prefill_min_tokens: 10,
        ..SchedulerConfig::new(16, 60, 400, 64)
    };
    let prefill = SchedulerConfig {
        batch_tokens_max: 50,
        total_blocks: 45,
        ..base.clone()
    };
    run(&|config| model.engine(config, 2), &prefill, &base, &jobs(80, 150));
    // Blocks of other sizes hold the same bits.
    for (block_size, total_blocks) in [(8, 90), (32, 24), (12, 60)] {
        let prefill = SchedulerConfig {
            block_size,
            total_blocks,
            ..prefill.clone()
        };
        run(&|config| model.engine(config, 2), &prefill, &base, &jobs(40, 150));
    }
}

#[test]
fn equals_monolithic_with_blocks_of_other_sizes() {
    let base = SchedulerConfig {
        waiting_max: 1000,
        remote_prefill_min_tokens: 10,
        ..SchedulerConfig::new(16, 200, 400, 64)
    };
    for (block_size, total_blocks) in [(4, 800), (64, 50), (24, 130)] {
        let prefill = SchedulerConfig {
            block_size,
            total_blocks,
            batch_tokens_max: 80,
            ..base.clone()
        };
        run(&mock, &prefill, &base, &jobs(100, 150));
    }
}
