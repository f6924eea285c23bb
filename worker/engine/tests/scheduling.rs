//! The scheduler's rules, one test each, in workloads small enough to read.

mod common;

use baton_engine::{
    AdmitError, ConfigError, Engine, FinishReason, PASSES_PER_PRIORITY, PrefillRequest, SamplingParams, Scheduler,
    SchedulerConfig, SeqId, StepBatch,
};
use common::{Job, alone, engine_for, finish, sampled, turn};

fn config(block_size: usize, total_blocks: u32) -> SchedulerConfig {
    SchedulerConfig {
        seqs_max: 32,
        ..SchedulerConfig::new(block_size, total_blocks, 1000, 64)
    }
}

fn prompt(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + seed * 13 + i * i % 5) % 64).collect()
}

fn ids(batch: &StepBatch) -> Vec<(u64, usize)> {
    batch.seqs.iter().map(|s| (s.seq.0, s.tokens.len())).collect()
}

/// P1: alone, among 31 others, in chunks of 1, 16 and 512, with prefix hits, preempted and resumed.
#[test]
fn same_tokens_whatever_happens_around() {
    let job = Job {
        sampling: sampled(99),
        ..Job::new(prompt(70, 1), 40)
    };
    let roomy = config(16, 400);
    let (truth, _) = alone(&roomy, &job);
    assert_eq!(truth.len(), 40);
    for chunk in [1, 16, 512] {
        let config = SchedulerConfig {
            prefill_chunk_tokens_max: chunk,
            ..roomy.clone()
        };
        let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
        for other in 0..31 {
            let other = Job {
                sampling: sampled(u64::from(other)),
                ..Job::new(prompt(10 + other as usize * 5, other), 30)
            };
            scheduler.submit(other.request(false)).expect("room");
        }
        let id = scheduler.submit(job.request(false)).expect("room");
        assert_eq!(
            finish(&mut scheduler, &mut engine, id).0,
            truth,
            "in a batch of 32, chunks of {chunk}"
        );
        let id = scheduler.submit(job.request(false)).expect("room");
        let (tokens, _, cached) = finish(&mut scheduler, &mut engine, id);
        assert_eq!((tokens, cached), (truth.clone(), 64), "with a prefix hit");
    }
    // Seven blocks for one, eleven for both: the younger is preempted, and recomputes what it had emitted.
    let tight = SchedulerConfig {
        prefix_cache: false,
        ..config(16, 11)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(tight.clone()).expect("valid"), engine_for(&tight));
    let older = scheduler
        .submit(Job::new(prompt(64, 2), 40).request(false))
        .expect("room");
    let younger = scheduler.submit(job.request(false)).expect("room");
    let mut tokens = Vec::new();
    while !scheduler.is_idle() {
        for output in turn(&mut scheduler, &mut engine).1 {
            if output.seq == younger {
                tokens.extend(output.tokens);
            }
        }
    }
    assert_eq!(tokens, truth);
    assert!(scheduler.stats().preemptions > 0 && older < younger);
}

#[test]
fn decodes_come_first_and_short_prompts_pass_long_ones() {
    let config = SchedulerConfig {
        batch_tokens_max: 64,
        ..config(16, 400)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    scheduler
        .submit(Job::new(prompt(5, 1), 50).request(false))
        .expect("room");
    turn(&mut scheduler, &mut engine);
    for (len, seed) in [(500, 2), (400, 3), (20, 4)] {
        scheduler
            .submit(Job::new(prompt(len, seed), 5).request(false))
            .expect("room");
    }
    let (batch, outputs) = turn(&mut scheduler, &mut engine);
    // One decode; of the 63 left 32 to the oldest prompt, all 20 to the shortest, the rest to the next shortest.
    assert_eq!(ids(&batch), [(0, 1), (1, 32), (2, 11), (3, 20)]);
    assert_eq!(outputs.iter().map(|o| o.seq.0).collect::<Vec<_>>(), [0, 3]);
}

#[test]
fn a_burst_with_one_prefix_computes_it_once() {
    let config = SchedulerConfig {
        batch_tokens_max: 64,
        ..config(16, 400)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    let jobs: Vec<Job> = (0..16)
        .map(|i| {
            let mut tokens = prompt(320, 5);
            tokens.extend(prompt(10, 100 + i));
            Job::new(tokens, 4)
        })
        .collect();
    for job in &jobs {
        scheduler.submit(job.request(false)).expect("room");
    }
    let mut answers = vec![Vec::new(); jobs.len()];
    while !scheduler.is_idle() {
        for output in turn(&mut scheduler, &mut engine).1 {
            answers[output.seq.0 as usize].extend(output.tokens);
            if let Some(finish) = output.finish {
                assert!(output.seq.0 == 0 || finish.cached_tokens > 0);
            }
        }
    }
    for (job, answer) in jobs.iter().zip(answers) {
        assert_eq!(answer, alone(&config, job).0);
    }
    let stats = scheduler.stats();
    assert_eq!(stats.prompt_tokens, 16 * 330);
    assert_eq!(
        stats.prompt_tokens - stats.cached_tokens,
        320 + 16 * 10,
        "the prefix once, each question once"
    );
}

#[test]
fn cached_tokens_are_whole_blocks_short_of_the_last_token_and_never_cross_salts() {
    let config = config(16, 100);
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    let mut run = |tokens: Vec<u32>, salt: &[u8]| {
        let job = Job {
            salt: salt.to_vec(),
            ..Job::new(tokens, 3)
        };
        let id = scheduler.submit(job.request(false)).expect("room");
        let (answer, _, cached) = finish(&mut scheduler, &mut engine, id);
        assert_eq!(answer, alone(&config, &job).0);
        cached
    };
    assert_eq!(run(prompt(64, 1), b"a"), 0);
    assert_eq!(
        run(prompt(64, 1), b"a"),
        48,
        "the block of the last token is computed again"
    );
    assert_eq!(run(prompt(65, 1), b"a"), 64);
    assert_eq!(run(prompt(40, 1), b"a"), 32);
    assert_eq!(run(prompt(64, 1), b"b"), 0, "another tenant");
    assert_eq!(run(prompt(64, 2), b"a"), 0, "another prompt");
}

/// The next turn of a conversation finds the answer of the previous one, not only its prompt.
#[test]
fn generated_tokens_are_cached_too() {
    let config = config(4, 100);
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    let first = scheduler
        .submit(Job::new(prompt(10, 1), 20).request(false))
        .expect("room");
    let (answer, ..) = finish(&mut scheduler, &mut engine, first);
    let mut next = prompt(10, 1);
    next.extend(answer);
    next.extend(prompt(5, 3));
    let second = scheduler.submit(Job::new(next, 3).request(false)).expect("room");
    // KV of 29 tokens was computed: the last sampled token's never was.
    assert_eq!(finish(&mut scheduler, &mut engine, second).2, 28);
}

#[test]
fn what_can_never_run_is_refused_with_a_sentence() {
    let config = SchedulerConfig {
        context_length: 100,
        waiting_max: 2,
        ..config(16, 4)
    };
    let mut scheduler = Scheduler::new(config).expect("valid");
    let mut refuse = |job: Job| scheduler.submit(job.request(false)).expect_err("refused");
    assert_eq!(refuse(Job::new(vec![], 1)), AdmitError::EmptyPrompt);
    assert_eq!(refuse(Job::new(vec![1], 0)), AdmitError::NoTokensAsked);
    assert!(matches!(
        refuse(Job::new(prompt(100, 1), 1)),
        AdmitError::TooLong { prompt_tokens: 100, .. }
    ));
    let never = refuse(Job::new(prompt(65, 1), 1));
    assert_eq!(never, AdmitError::NeverFits { needed: 5, total: 4 });
    assert!(never.to_string().contains("needs 5 KV blocks, but this worker has 4"));
    assert!(matches!(
        refuse(Job::new(vec![64], 1)),
        AdmitError::UnknownToken { token: 64, .. }
    ));
    assert!(matches!(
        refuse(Job {
            stop_token_ids: vec![1; 65],
            ..Job::new(vec![1], 1)
        }),
        AdmitError::TooManyStops { count: 65, .. }
    ));
    let skip = |skip_tokens| PrefillRequest {
        prompt: prompt(32, 1).into(),
        sampling: SamplingParams::GREEDY,
        shaping: None,
        cache_salt: Vec::new(),
        skip_tokens,
        priority: 0,
    };
    for bad in [5, 32, 48] {
        assert!(
            matches!(scheduler.submit_prefill(skip(bad)), Err(AdmitError::BadSkip { .. })),
            "{bad}"
        );
    }
    scheduler.submit_prefill(skip(16)).expect("room");
    scheduler
        .submit(Job::new(prompt(64, 1), usize::MAX).request(false))
        .expect("room");
    let full = scheduler.submit(Job::new(vec![1], 1).request(false)).expect_err("full");
    assert_eq!(
        (full.retryable(), full),
        (true, AdmitError::QueueFull { waiting_max: 2 })
    );
    let bad = SchedulerConfig {
        batch_tokens_max: 32,
        ..SchedulerConfig::new(16, 4, 100, 64)
    };
    assert!(matches!(
        Scheduler::new(SchedulerConfig { seqs_max: 32, ..bad }),
        Err(ConfigError::BatchTooSmall { .. })
    ));
}

/// `max_tokens` beyond the pool: the end is LENGTH when the pool is exhausted, at the same place with mates or without.
#[test]
fn a_sequence_that_outgrows_the_pool_ends_by_length() {
    let config = config(4, 5);
    let job = Job {
        sampling: sampled(3),
        ..Job::new(prompt(6, 1), usize::MAX)
    };
    let (truth, reason) = alone(&config, &job);
    assert_eq!(
        (truth.len(), reason),
        (15, FinishReason::Length),
        "20 slots and a token that needs none"
    );
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    for _ in 0..3 {
        scheduler.submit(job.request(false)).expect("room");
    }
    let mut answers = vec![Vec::new(); 3];
    while !scheduler.is_idle() {
        for output in turn(&mut scheduler, &mut engine).1 {
            answers[output.seq.0 as usize].extend(output.tokens);
            assert!(output.finish.is_none_or(|f| f.reason == FinishReason::Length));
        }
    }
    assert_eq!(answers, vec![truth; 3]);
    // The context ends it just as well.
    let short = SchedulerConfig {
        context_length: 10,
        ..config
    };
    assert_eq!(alone(&short, &job).0.len(), 4);
}

#[test]
fn a_stop_token_ends_and_is_reported_last() {
    let config = config(16, 100);
    let job = Job::new(prompt(20, 4), 30);
    let (free, _) = alone(&config, &job);
    let stop = free[7];
    let cut = free.iter().position(|t| *t == stop).expect("present") + 1;
    let (tokens, reason) = alone(
        &config,
        &Job {
            stop_token_ids: vec![stop],
            ..job
        },
    );
    assert_eq!((tokens.as_slice(), reason), (&free[..cut], FinishReason::Stop));
}

#[test]
fn a_failed_step_ends_its_sequences_and_leaks_nothing() {
    let config = config(16, 100);
    let mut scheduler = Scheduler::new(config).expect("valid");
    let generate = scheduler
        .submit(Job::new(prompt(20, 1), 5).request(false))
        .expect("room");
    let prefill = scheduler
        .submit_prefill(PrefillRequest {
            prompt: prompt(20, 2).into(),
            sampling: SamplingParams::GREEDY,
            shaping: None,
            cache_salt: Vec::new(),
            skip_tokens: 0,
            priority: 0,
        })
        .expect("room");
    let plan = scheduler.plan();
    let outputs = scheduler.step_failed(&plan.batch, "the device is gone");
    let ends: Vec<_> = outputs
        .iter()
        .map(|o| (o.seq, o.finish.as_ref().map(|f| (f.reason, f.error.as_str()))))
        .collect();
    let error = Some((FinishReason::Error, "the device is gone"));
    assert_eq!(ends, [(generate, error), (prefill, error)]);
    assert_eq!((scheduler.stats().draining, scheduler.stats().held_blocks), (1, 2));
    assert!(scheduler.release(prefill));
    assert!(scheduler.is_idle() && scheduler.stats().held_blocks == 0);
    scheduler.check().expect("invariants");
    // No usable logits: an error for that sequence, not a made-up token.
    let id = scheduler
        .submit(Job::new(prompt(3, 1), 5).request(false))
        .expect("room");
    let plan = scheduler.plan();
    let outputs = scheduler.commit(&plan.batch, &[None]);
    assert_eq!(outputs[0].seq, id);
    assert_eq!(outputs[0].finish.as_ref().map(|f| f.reason), Some(FinishReason::Error));
}

#[test]
fn a_fill_is_asked_for_only_when_enough_is_uncached() {
    let config = SchedulerConfig {
        remote_prefill_min_tokens: 20,
        ..config(16, 100)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    let short = scheduler
        .submit(Job::new(prompt(19, 1), 1).request(true))
        .expect("room");
    assert!(scheduler.plan().fills.is_empty());
    assert!(scheduler.cancel(short).is_some_and(|c| !c.draining));
    scheduler.commit(&StepBatch::default(), &[]);
    let warm = scheduler
        .submit(Job::new(prompt(33, 1), 1).request(false))
        .expect("room");
    finish(&mut scheduler, &mut engine, warm);
    let hit = scheduler
        .submit(Job::new(prompt(51, 1), 1).request(true))
        .expect("room");
    let miss = scheduler
        .submit(Job::new(prompt(52, 1), 1).request(true))
        .expect("room");
    let plan = scheduler.plan();
    assert_eq!(plan.batch.seqs.iter().map(|s| s.seq).collect::<Vec<_>>(), [hit]);
    let fill = &plan.fills[0];
    assert_eq!((fill.seq, fill.cached_tokens, fill.blocks.len()), (miss, 32, 2));
    // A first token from another vocabulary is no token: prefill here instead.
    assert_eq!(scheduler.fill_done(miss, 64), None);
    assert_eq!(scheduler.stats().running, 2);
    assert_eq!(scheduler.fill_done(SeqId(77), 1), None);
    assert!(
        !scheduler.fill_failed(SeqId(77)) && !scheduler.release(SeqId(77)) && scheduler.cancel(SeqId(77)).is_none()
    );
    let region_blocks = engine.total_blocks();
    assert_eq!(scheduler.stats().total_blocks, region_blocks as usize);
}

/// A decode that finds no block waits for a younger prefill-only sequence instead of taking the blocks a transport reads.
#[test]
fn prefill_only_sequences_are_never_preempted() {
    let config = SchedulerConfig {
        prefill_chunk_tokens_max: 4,
        ..config(4, 10)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    let job = Job::new(prompt(7, 1), 12);
    let older = scheduler.submit(job.request(false)).expect("room");
    let mut tokens = Vec::new();
    let mut take = |outputs: Vec<baton_engine::Output>| {
        tokens.extend(outputs.into_iter().filter(|o| o.seq == older).flat_map(|o| o.tokens));
    };
    take(turn(&mut scheduler, &mut engine).1);
    let prefill = scheduler
        .submit_prefill(PrefillRequest {
            prompt: prompt(28, 2).into(),
            sampling: SamplingParams::GREEDY,
            shaping: None,
            cache_salt: Vec::new(),
            skip_tokens: 0,
            priority: 0,
        })
        .expect("room");
    // Two blocks and seven are held; the decode gets the tenth, and then stalls while the push goes on.
    let mut stalled = 0;
    for _ in 0..20 {
        let (batch, outputs) = turn(&mut scheduler, &mut engine);
        stalled += usize::from(batch.seqs.iter().all(|span| span.seq != older));
        take(outputs);
    }
    let stats = scheduler.stats();
    assert_eq!(
        (stats.pushing, stats.running, stats.preemptions),
        (1, 1, 0),
        "{stats:?}"
    );
    assert!(stalled > 0);
    assert!(scheduler.release(prefill));
    while !scheduler.is_idle() {
        take(turn(&mut scheduler, &mut engine).1);
    }
    assert_eq!(tokens, alone(&config, &job).0);
}

/// At the door by priority, then age; on the way out by the same, the other way round.
#[test]
fn priority_decides_at_the_door_and_who_is_preempted() {
    let config = SchedulerConfig {
        seqs_max: 1,
        ..config(16, 100)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    let mut submit = |priority| {
        let job = Job {
            priority,
            ..Job::new(prompt(20, 1), 1)
        };
        scheduler.submit(job.request(false)).expect("room").0
    };
    let ids: Vec<u64> = [0, -1, 0, 7, 7, -1].map(&mut submit).to_vec();
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        order.extend(turn(&mut scheduler, &mut engine).1.iter().map(|output| output.seq.0));
    }
    assert_eq!(order, [3, 4, 0, 2, 1, 5].map(|at| ids[at]));

    // Seven blocks for each in the end, eleven in all: the one of low priority gives way, although it is older.
    let tight = SchedulerConfig {
        prefix_cache: false,
        ..self::config(16, 11)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(tight.clone()).expect("valid"), engine_for(&tight));
    let low = Job {
        priority: -1,
        ..Job::new(prompt(64, 2), 40)
    };
    let older = scheduler.submit(low.request(false)).expect("room");
    let younger = scheduler
        .submit(Job::new(prompt(64, 3), 40).request(false))
        .expect("room");
    let (mut tokens, mut ended) = (Vec::new(), Vec::new());
    while !scheduler.is_idle() {
        for output in turn(&mut scheduler, &mut engine).1 {
            if output.seq == older {
                tokens.extend(output.tokens);
            }
            ended.extend(output.finish.map(|_| output.seq));
        }
    }
    assert_eq!(ended, [younger, older]);
    assert!(scheduler.stats().preemptions > 0);
    assert_eq!(tokens, alone(&tight, &low).0, "priority changes no token");
}

/// Under a flood of the usual priority a low one is passed by as many later arrivals as its priority says, and no more.
#[test]
fn a_low_priority_does_not_starve() {
    let config = SchedulerConfig {
        seqs_max: 2,
        ..config(16, 100)
    };
    let (mut scheduler, mut engine) = (Scheduler::new(config.clone()).expect("valid"), engine_for(&config));
    for _ in 0..3 {
        scheduler
            .submit(Job::new(prompt(5, 1), 1).request(false))
            .expect("room");
    }
    let low = Job {
        priority: -2,
        ..Job::new(prompt(5, 1), 1)
    };
    let low = scheduler.submit(low.request(false)).expect("room");
    let mut passed = 0;
    'flood: loop {
        for _ in 0..3 {
            scheduler
                .submit(Job::new(prompt(5, 1), 1).request(false))
                .expect("room");
        }
        for output in turn(&mut scheduler, &mut engine).1 {
            if output.seq == low {
                break 'flood;
            }
            passed += i64::from(output.seq > low);
        }
    }
    let bound = 2 * PASSES_PER_PRIORITY;
    assert!(
        passed <= bound && passed > bound / 2,
        "{passed} later ones went before, the bound is {bound}"
    );
}
