//! P1 over a real decoder: the tokens of a request do not depend on its batch, its chunks, the prefix cache, preemption or
//! the number of threads.

mod common;

use baton_engine::{EngineError, Scheduler, SchedulerConfig, SeqId, StepBatch, StepSeq};
use baton_model::{LoadOptions, Quantization};
use common::tiny_model::TinyModel;
use common::{Job, alone_on, sampled, turn};
use safetensors::tensor::Dtype;

fn jobs() -> Vec<Job> {
    (0..32u32)
        .map(|i| {
            let prompt = (0..5 + i * 3).map(|j| (j * 7 + i * j % 11 + i / 4 * 13) % 64).collect();
            Job {
                sampling: sampled(u64::from(i)),
                ..Job::new(prompt, 24)
            }
        })
        .collect()
}

#[test]
fn same_tokens_whatever_happens_around() {
    for (dtype, quantization) in [
        (Dtype::F32, Quantization::None),
        (Dtype::F16, Quantization::None),
        (Dtype::BF16, Quantization::None),
        (Dtype::BF16, Quantization::Int8),
        (Dtype::BF16, Quantization::Int4),
    ] {
        let on = |threads| LoadOptions {
            quantization,
            ..LoadOptions::threads(threads)
        };
        let what = format!("{dtype:?} as {quantization}");
        same_tokens(&TinyModel::of(1, dtype), &on(1), &on(2), &what);
    }
}

#[test]
fn same_tokens_on_two_ranks() {
    for (dtype, quantization) in [(Dtype::F32, Quantization::None), (Dtype::BF16, Quantization::Int8)] {
        let ranks = |threads| LoadOptions {
            tensor_parallel: 2,
            quantization,
            ..LoadOptions::threads(threads)
        };
        let what = format!("{dtype:?} as {quantization} on two ranks");
        same_tokens(&TinyModel::of(1, dtype), &ranks(2), &ranks(3), &what);
    }
}

fn same_tokens(model: &TinyModel, reference: &LoadOptions, other: &LoadOptions, what: &str) {
    let roomy = SchedulerConfig {
        seqs_max: 32,
        ..SchedulerConfig::new(16, 400, 1000, 64)
    };
    let mut reference = model.engine_with(&roomy, reference);
    let jobs = jobs();
    let truth: Vec<Vec<u32>> = jobs
        .iter()
        .map(|job| alone_on(&mut *reference, &roomy, job).0)
        .collect();
    let distinct: std::collections::BTreeSet<&Vec<u32>> = truth.iter().collect();
    assert!(distinct.len() > 20, "the model distinguishes prompts");
    for (chunk, total_blocks, prefix_cache) in [
        (1, 400, true),
        (16, 400, false),
        (512, 400, true),
        (512, 12, true),
        (7, 14, false),
    ] {
        let config = SchedulerConfig {
            prefill_chunk_tokens_max: chunk,
            total_blocks,
            prefix_cache,
            ..roomy.clone()
        };
        let mut scheduler = Scheduler::new(config.clone()).expect("valid");
        let mut engine = model.engine_with(&config, other);
        for round in 0..2 {
            let ids: Vec<SeqId> = jobs
                .iter()
                .map(|j| scheduler.submit(j.request(false)).expect("room"))
                .collect();
            let mut answers = vec![Vec::new(); jobs.len()];
            while !scheduler.is_idle() {
                for output in turn(&mut scheduler, &mut *engine).1 {
                    let index = ids.iter().position(|id| *id == output.seq).expect("known");
                    answers[index].extend(output.tokens);
                }
            }
            assert_eq!(
                answers, truth,
                "{what}, chunks of {chunk}, {total_blocks} blocks, round {round}"
            );
        }
        let stats = scheduler.stats();
        assert_eq!(stats.preemptions > 0, total_blocks < 20, "{stats:?}");
        // A pool for one long sequence forgets everything before it is asked for again.
        assert_eq!(
            stats.cached_tokens > 0,
            prefix_cache && total_blocks == 400,
            "{stats:?}"
        );
        assert_eq!(stats.held_blocks, 0);
    }
}

#[test]
fn layers_are_announced_and_impossible_batches_refused() {
    let model = TinyModel::new(1);
    let config = SchedulerConfig::new(16, 8, 100, 64);
    let mut engine = model.engine(&config, 1);
    let mut scheduler = Scheduler::new(config).expect("valid");
    let id = scheduler.submit(jobs()[9].request(false)).expect("room");
    let plan = scheduler.plan();
    let mut layers = Vec::new();
    let tokens = engine
        .step(&plan.batch, &mut |layer| layers.push(layer))
        .expect("valid batch");
    assert_eq!(layers, [0, 1]);
    assert_eq!(scheduler.commit(&plan.batch, &tokens)[0].seq, id);
    while !scheduler.is_idle() {
        turn(&mut scheduler, &mut *engine);
    }
    let bad = StepSeq {
        seq: SeqId(0),
        tokens: vec![1],
        start_pos: 0,
        blocks: vec![8],
        sample: None,
        shaping: None,
    };
    let result = engine.step(&StepBatch { seqs: vec![bad] }, &mut |_| {});
    assert!(matches!(result, Err(EngineError::InvalidBatch(_))));
}
