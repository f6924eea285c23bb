//! baton's router: the match alone, and whole decisions.

use crate::{Report, mix, names, runs, timed};
use baton_router::{
    Ask, BlockUpdate, Candidate, Choice, Namer, Policy, Prefixes, Rates, Role, Router, Seat, Tier, Verdict,
};
use std::hint::black_box;
use std::time::{Duration, Instant};

pub fn run(workers: u64, blocks: u64, event_blocks: u64, full: &mut dyn FnMut()) -> Report {
    let mut router = Router::new(Policy::default());
    let seats: Vec<Seat> = (0..workers).map(|_| router.join()).collect();
    let (mut ingest, mut pairs, mut events) = (Duration::ZERO, 0, 0);
    for (worker, seat) in (0..workers).zip(&seats) {
        let batch: Vec<Vec<u64>> = runs(worker, workers, blocks, event_blocks)
            .map(|(conversation, from, to)| names(conversation, from, to).collect())
            .collect();
        let started = Instant::now();
        for (number, run) in (1..).zip(&batch) {
            let update = BlockUpdate {
                number,
                reset: number == 1,
                tier: Tier::Device,
                evicted: &[],
                stored: [run.as_slice()],
            };
            assert_eq!(router.apply(*seat, update, 0), Verdict::Applied);
            pairs += run.len() as u64;
        }
        ingest += started.elapsed();
        events += batch.len() as u64;
    }
    full();
    let mut prefixes = Prefixes::default();
    let (matches, checksum) = timed(workers, blocks, |names| {
        router.look_up(names, 0, &mut prefixes);
        seats
            .iter()
            .map(|seat| u64::from(prefixes.of(*seat).blocks))
            .max()
            .unwrap_or(0)
    });
    let ids: Vec<String> = (0..workers).map(|worker| format!("worker-{worker:04}")).collect();
    let decide = |names: &[u64], prefixes: &mut Prefixes| {
        router.look_up(names, 0, prefixes);
        let candidates: Vec<Candidate<'_>> = (0..workers)
            .zip(ids.iter().zip(&seats))
            .map(|(worker, (id, seat))| candidate(id, worker, *seat, prefixes))
            .collect();
        let ask = Ask {
            prompt_tokens: 8193,
            max_tokens: 256,
        };
        match router.choose(&candidates, &ask) {
            Choice::Place { decode, .. } => decode as u64,
            Choice::Full | Choice::Nobody => panic!("somebody is free"),
        }
    };
    let (decisions, _) = timed(workers, blocks, |names| decide(names, &mut prefixes));
    // Prompts of 8,192 tokens, named as the coordinator does: one that nobody has sent before, and one whose first
    // 7,900 tokens came a moment ago (the turn before, an agent's instructions).
    let namer = Namer::default();
    let mut tokens: Vec<u32> = (0..8192).collect();
    let (naming, _) = timed(workers, blocks, |_| {
        tokens[0] += 1;
        namer.names(&[7; 32], b"tenant", black_box(&tokens), 16).len() as u64
    });
    let (naming_known, _) = timed(workers, blocks, |_| {
        tokens[7900] += 1;
        namer.names(&[7; 32], b"tenant", black_box(&tokens), 16).len() as u64
    });
    let (with_names, _) = timed(workers, blocks, |names| {
        tokens[0] += 1;
        black_box(namer.names(&[7; 32], b"tenant", black_box(&tokens), 16));
        decide(names, &mut prefixes)
    });
    let (with_known_names, _) = timed(workers, blocks, |names| {
        tokens[7900] += 1;
        black_box(namer.names(&[7; 32], b"tenant", black_box(&tokens), 16));
        decide(names, &mut prefixes)
    });
    // What a departing worker costs: the call that makes its blocks invisible, and each step of the sweep after it.
    let mut leaves = Vec::new();
    let mut sweeps = Vec::new();
    for seat in &seats[..seats.len().min(5)] {
        let started = Instant::now();
        router.leave(*seat);
        leaves.push(started.elapsed());
        loop {
            let started = Instant::now();
            let more = router.sweep();
            sweeps.push(started.elapsed());
            if !more {
                break;
            }
        }
    }
    Report {
        ingest,
        pairs,
        events,
        checksum,
        times: vec![
            ("match", matches),
            ("decision", decisions),
            ("naming", naming),
            ("naming_known", naming_known),
            ("decision_with_naming", with_names),
            ("decision_with_known_naming", with_known_names),
            ("leave", leaves),
            ("sweep_step", sweeps),
        ],
    }
}

/// A worker with rates and load of its own: a tenth prefill workers, the rest decode.
fn candidate<'a>(id: &'a str, worker: u64, seat: Seat, prefixes: &Prefixes) -> Candidate<'a> {
    let random = mix(worker);
    Candidate {
        id,
        role: if worker.is_multiple_of(10) {
            Role::Prefill
        } else {
            Role::Decode
        },
        kv_digest: &[7; 32],
        prefix: prefixes.of(seat),
        streams: (random % 40) as u32,
        prefilling: 0,
        pending_prompt_tokens: random % 9000,
        available_blocks: 10_000,
        total_blocks: 60_000,
        block_size: 16,
        kv_bytes_per_block: 2 << 20,
        rates: Rates {
            prefill_tokens_per_s: 5000.0 + (random % 1000) as f32,
            decode_step_us: 20_000,
            transfer_bytes_per_s: 1e10,
            load_bytes_per_s: [0.0; 3],
        },
        full: false,
        doubtful: false,
    }
}
