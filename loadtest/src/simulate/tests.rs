//! The simulated cluster against what must hold of any: nothing lost, nothing random, hits that are possible, times that
//! add up.

use super::*;
use crate::trace::{TraceRequest, parse_trace};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn request(at_ms: u64, input_tokens: u32, output_tokens: u32, hash_ids: &[u64]) -> TraceRequest {
    TraceRequest {
        at: Duration::from_millis(at_ms),
        input_tokens,
        output_tokens,
        hash_ids: hash_ids.to_vec(),
    }
}

/// Conversations that grow, several at a time.
fn conversations(requests: u64, gap_ms: u64) -> Trace {
    let mut random = SmallRng::seed_from_u64(7);
    let mut past: Vec<Vec<u64>> = vec![vec![0]; 12];
    let mut next = 1;
    let requests = (0..requests).map(|i| {
        let who = random.random_range(0..past.len());
        for _ in 0..random.random_range(1..5) {
            past[who].push(next);
            next += 1;
        }
        let ids = past[who].clone();
        if ids.len() > 40 {
            past[who] = vec![0];
        }
        let len = ids.len() as u32 * 512 - random.random_range(0..512);
        request(i * gap_ms, len, random.random_range(1..60), &ids)
    });
    Trace {
        requests: requests.collect(),
    }
}

fn run(trace: &Trace, options: &SimulationOptions, kind: PolicyKind) -> SimulationReport {
    let mut policy = kind.build(options);
    simulate(trace, options, kind.name(), &mut *policy, &mut |_, _| {}).expect("it can be simulated")
}

#[test]
fn one_roomy_worker_and_patient_clients_reach_the_bound() {
    let trace = conversations(150, 20_000);
    let options = SimulationOptions {
        workers: 1,
        ..SimulationOptions::default()
    };
    let report = run(&trace, &options, PolicyKind::RoundRobin);
    assert_eq!(report.requests_completed, 150);
    assert_eq!(report.hit_rate, report.hit_rate_bound);
    assert!((0.5..1.0).contains(&report.hit_rate), "{}", report.hit_rate);
    let tokens: u64 = trace.requests.iter().map(|r| u64::from(r.output_tokens)).sum();
    assert_eq!(report.output_tokens, tokens);
    assert_eq!(report.itl_ms.count + report.ttft_ms.count, tokens);
}

#[test]
fn one_lone_request_takes_what_its_profile_says() {
    let trace = Trace {
        requests: vec![request(5000, 1000, 3, &[])].into(),
    };
    let report = run(&trace, &SimulationOptions::default(), PolicyKind::LeastLoaded);
    let profile = MockProfile::H100X8_LLAMA3_70B;
    let prefill_us = profile.step_us as f64 + 1000.0 * 39.7 + 1000.0 * 1001.0 / 2.0 * 736e-6;
    let decode_us = (profile.step_us + profile.weights_us) as f64 + 1001.5 * 18.8e-3;
    // Histograms keep three digits.
    assert!(
        (report.ttft_ms.p50 * 1e3 / prefill_us - 1.0).abs() < 2e-3,
        "{}",
        report.ttft_ms.p50
    );
    assert!(
        (report.itl_ms.p50 * 1e3 / decode_us - 1.0).abs() < 2e-3,
        "{}",
        report.itl_ms.p50
    );
    assert_eq!(report.good_share, 1.0);
}

#[test]
fn equal_seeds_give_equal_runs_and_no_policy_beats_the_bound() {
    let trace = conversations(300, 150);
    let mut hit_rates = Vec::new();
    for kind in PolicyKind::ALL {
        let options = |seed| SimulationOptions {
            workers: 4,
            seed,
            ..SimulationOptions::default()
        };
        let report = run(&trace, &options(1), kind);
        let same = run(&trace, &options(1), kind);
        let json = |report: &SimulationReport| serde_json::to_string(report).expect("serialisable");
        assert_eq!(json(&report), json(&same), "{}", kind.name());
        assert_eq!(report.requests_completed, 300);
        assert!(report.hit_rate <= report.hit_rate_bound);
        let other = run(&trace, &options(2), kind);
        assert_eq!(
            json(&report) == json(&SimulationReport { seed: 1, ..other }),
            kind != PolicyKind::Random
        );
        hit_rates.push(report.hit_rate);
    }
    let [blind @ .., aware] = &hit_rates[..] else { panic!() };
    assert!(
        blind.iter().all(|rate| *rate > 0.05 && rate + 0.1 < *aware),
        "{hit_rates:?}"
    );
}

#[test]
fn scarce_memory_costs_hits_and_what_never_fits_is_refused() {
    let trace = conversations(200, 400);
    let with = |tokens: u64| {
        let options = SimulationOptions {
            workers: 2,
            kv_bytes: tokens * MockProfile::H100X8_LLAMA3_70B.kv_bytes_per_token,
            ..SimulationOptions::default()
        };
        run(&trace, &options, PolicyKind::RoundRobin)
    };
    let (scarce, roomy, tiny) = (with(40_000), with(2_000_000), with(8_000));
    assert!(
        scarce.hit_rate < roomy.hit_rate - 0.05,
        "{} {}",
        scarce.hit_rate,
        roomy.hit_rate
    );
    assert_eq!((scarce.requests_completed, scarce.requests_refused), (200, 0));
    assert_eq!(tiny.requests_completed + tiny.requests_refused, 200);
    assert!(tiny.requests_refused > 0);
}

#[test]
fn absurd_options_are_refused() {
    let trace = conversations(3, 1);
    for options in [
        SimulationOptions {
            workers: 0,
            ..SimulationOptions::default()
        },
        SimulationOptions {
            workers: 5000,
            ..SimulationOptions::default()
        },
        SimulationOptions {
            block_size: 0,
            ..SimulationOptions::default()
        },
        SimulationOptions {
            speed: 0.0,
            ..SimulationOptions::default()
        },
        SimulationOptions {
            batch_tokens_max: 1,
            ..SimulationOptions::default()
        },
        SimulationOptions {
            seqs_max: 0,
            ..SimulationOptions::default()
        },
    ] {
        let mut policy = PolicyKind::Random.build(&options);
        assert!(
            simulate(&trace, &options, "random", &mut *policy, &mut |_, _| {}).is_err(),
            "{options:?}"
        );
    }
}

/// The published trace, a tenth of it, where it is at hand.
#[test]
fn the_published_trace() {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/traces/mooncake_conversation.jsonl");
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("skipped: {} is not there", path.display());
        return;
    };
    let trace = parse_trace(&text).expect("it is well-formed");
    let bound = CacheBound::of(&trace, usize::MAX, 16);
    assert_eq!((trace.requests.len(), bound.prompt_tokens), (12_031, 144_793_823));
    assert!((0.35..0.375).contains(&bound.rate()), "{}", bound.rate());
    let options = SimulationOptions {
        requests_max: 300,
        ..SimulationOptions::default()
    };
    let report = run(&trace, &options, PolicyKind::RoundRobin);
    assert_eq!(report.requests_completed, 300);
    assert!(report.hit_rate <= report.hit_rate_bound);
}
