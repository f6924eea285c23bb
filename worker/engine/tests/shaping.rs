//! Promise P1 with everything that changes logits: the same tokens and the same log probabilities in company, in chunks, after
//! a preemption, and when another worker goes on after any token.
//!
//! The hand-over is in `simulation.rs`, where half of the requests ask for these things.

mod common;

use baton_engine::{FinishReason, MockConfig, MockEngine, Scheduler, SchedulerConfig};
use common::{GRAMMAR_VOCAB, Job, alone_told, engine_for, finish_told, sampled, shaped, turn};

fn job(seed: u64) -> Job {
    Job {
        sampling: sampled(seed),
        extras: Some(shaped(seed)),
        stop_token_ids: vec![seed as u32 * 7 % 64, GRAMMAR_VOCAB as u32 - 1],
        ..Job::new(
            (0..9 + seed as u32 % 20)
                .map(|at| (at * 13 + seed as u32) % 64)
                .collect(),
            24,
        )
    }
}

fn config() -> SchedulerConfig {
    SchedulerConfig::new(4, 200, 160, GRAMMAR_VOCAB)
}

#[test]
fn another_worker_goes_on_after_any_token() {
    let config = config();
    for seed in 0..60 {
        let job = job(seed);
        let (tokens, told, reason) = alone_told(&config, &job);
        for cut in 1..tokens.len() {
            let emitted = &tokens[..cut];
            let rest = Job {
                prompt: [&job.prompt, emitted].concat(),
                max_tokens: job.max_tokens - cut,
                ..job.clone()
            };
            let mut request = rest.request(false);
            request.shaping = job.shaping(emitted);
            let mut scheduler = Scheduler::new(config.clone()).expect("valid");
            let id = scheduler.submit(request).expect("admissible");
            let (more, more_told, more_reason, _) = finish_told(&mut scheduler, &mut engine_for(&config), id);
            assert_eq!(
                (&more[..], more_reason),
                (&tokens[cut..], reason),
                "seed {seed}, cut {cut}"
            );
            assert_eq!(more_told, told[cut.min(told.len())..], "seed {seed}, cut {cut}");
        }
    }
}

#[test]
fn company_chunks_and_preemption_change_nothing() {
    let small = SchedulerConfig {
        batch_tokens_max: 12,
        prefill_chunk_tokens_max: 5,
        seqs_max: 6,
        total_blocks: 24,
        ..config()
    };
    let mut engine = engine_for(&small);
    let mut scheduler = Scheduler::new(small.clone()).expect("valid");
    let jobs: Vec<Job> = (0..24).map(job).collect();
    let ids: Vec<_> = jobs
        .iter()
        .map(|job| scheduler.submit(job.request(false)).expect("admissible"))
        .collect();
    let mut got = vec![(Vec::new(), Vec::new(), None); jobs.len()];
    while !scheduler.is_idle() {
        for output in turn(&mut scheduler, &mut engine).1 {
            let at = ids.iter().position(|id| *id == output.seq).expect("known");
            got[at].0.extend(output.tokens);
            got[at].1.extend(output.logprobs);
            got[at].2 = output.finish.map(|finish| finish.reason);
        }
    }
    assert!(scheduler.stats().preemptions > 0, "the pool is too large to test this");
    for (job, (tokens, told, reason)) in jobs.iter().zip(got) {
        let alone = alone_told(&small, job);
        assert_eq!((tokens, told, reason), (alone.0, alone.1, Some(alone.2)), "{job:?}");
    }
}

#[test]
fn what_is_asked_for_happens() {
    let config = config();
    let mut minimal = 0;
    for seed in 0..60 {
        let job = job(seed);
        let extras = job.extras.clone().expect("set");
        let (tokens, told, reason) = alone_told(&config, &job);
        let over = extras.grammar.is_some() && tokens.contains(&(GRAMMAR_VOCAB as u32 - 1));
        if reason == FinishReason::Stop && !over {
            assert!(tokens.len() > extras.min_tokens as usize, "{job:?}");
            minimal += usize::from(extras.min_tokens > 0);
        }
        if let Some(top) = extras.top_logprobs {
            assert_eq!(told.len(), tokens.len());
            for of in &told {
                assert_eq!(of.top_ids.len(), top as usize);
                assert!(of.top_logprobs.is_sorted_by(|a, b| a >= b) && of.logprob <= 0.0);
                assert!(of.top_logprobs.first().is_none_or(|best| *best >= of.logprob));
            }
        }
    }
    assert!(minimal > 0, "no case had a minimum");
}

/// A request without any of this must not be told of it, and its tokens are as before: frozen, because a change here is
/// a change of every client's answers.
#[test]
fn a_plain_request_is_untouched() {
    let config = config();
    let plain = Job { extras: None, ..job(3) };
    assert!(plain.shaping(&[]).is_none());
    let nothing = Job {
        extras: Some(Default::default()),
        ..job(3)
    };
    assert!(nothing.shaping(&[]).is_none());
    assert_eq!(alone_told(&config, &plain), alone_told(&config, &nothing));
}

/// An engine that answers what no grammar admits ends the request with the grammar's name.
#[test]
fn a_token_against_the_grammar_is_refused_and_named() {
    let config = config();
    let mut cheap = MockEngine::new(MockConfig {
        answer: baton_engine::MockAnswer::Cheap { first: 40, count: 1 },
        block_size: config.block_size,
        total_blocks: config.total_blocks,
        context_length: config.context_length,
        vocab_size: config.vocab_size,
        ..MockConfig::default()
    })
    .expect("valid");
    // Digits only: id 40 is two letters.
    let mut extras = shaped(2);
    extras.grammar = Some(baton_proto::worker::Grammar {
        kind: Some(baton_proto::worker::grammar::Kind::Regex("[0-9]+".to_owned())),
    });
    let job = Job {
        extras: Some(extras),
        ..job(2)
    };
    let mut scheduler = Scheduler::new(config).expect("valid");
    scheduler.submit(job.request(false)).expect("admissible");
    let finish = loop {
        let (_, outputs) = turn(&mut scheduler, &mut cheap);
        if let Some(finish) = outputs.into_iter().find_map(|output| output.finish) {
            break finish;
        }
    };
    assert_eq!(
        (finish.reason, finish.invalid_field),
        (FinishReason::Error, Some("grammar"))
    );
    assert_eq!(finish.completion_tokens, 0);
    assert!(scheduler.is_idle());
}
