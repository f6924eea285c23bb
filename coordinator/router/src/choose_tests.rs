//! The rules of the choice, one by one, and their soundness on random candidates.

use super::*;
use crate::cost::{Prefix, Rates};
use proptest::prelude::*;

fn candidate(id: &str, role: Role, streams: u32) -> Candidate<'_> {
    Candidate {
        id,
        role,
        kv_digest: b"d",
        prefix: Prefix::default(),
        streams,
        prefilling: 0,
        pending_prompt_tokens: 0,
        available_blocks: 10_000,
        total_blocks: 10_000,
        block_size: 16,
        kv_bytes_per_block: 16 << 10,
        rates: Rates::default(),
        full: false,
        doubtful: false,
    }
}

/// 1,000 tokens a second, 10 ms a step, and a fast wire.
fn measured(id: &str, role: Role, streams: u32) -> Candidate<'_> {
    Candidate {
        rates: Rates {
            prefill_tokens_per_s: 1000.0,
            decode_step_us: 10_000,
            transfer_bytes_per_s: 1e9,
            load_bytes_per_s: [0.0; 3],
        },
        ..candidate(id, role, streams)
    }
}

fn ask(prompt_tokens: usize) -> Ask {
    Ask {
        prompt_tokens,
        max_tokens: 100,
    }
}

fn decide(workers: &[Candidate<'_>], tokens: usize) -> Option<(usize, Option<usize>, Estimate)> {
    let policy = Policy {
        prefill_threshold_tokens: 100,
        ..Policy::default()
    };
    match choose(workers, &ask(tokens), &policy, &Overheads::default()) {
        Choice::Place {
            decode,
            prefill,
            estimate,
        } => Some((decode, prefill, estimate)),
        Choice::Full | Choice::Nobody => None,
    }
}

fn placed(workers: &[Candidate<'_>], tokens: usize) -> (usize, Option<usize>) {
    let (decode, prefill, _) = decide(workers, tokens).expect("a place");
    (decode, prefill)
}

fn warm(mut candidate: Candidate<'_>, blocks: u32) -> Candidate<'_> {
    candidate.prefix.blocks = blocks;
    candidate
}

#[test]
fn unmeasured_the_threshold_decides_on_the_uncached_suffix() {
    let mut workers = [
        candidate("d0", Role::Decode, 3),
        candidate("d1", Role::Decode, 2),
        candidate("p0", Role::Prefill, 1),
        candidate("p1", Role::Prefill, 0),
    ];
    assert_eq!(placed(&workers, 100), (1, None));
    assert_eq!(placed(&workers, 101), (1, Some(3)));
    workers[1].prefix.blocks = 4;
    assert_eq!(placed(&workers, 164), (1, None), "64 tokens are cached");
    assert_eq!(placed(&workers, 165), (1, Some(3)));
}

#[test]
fn one_kind_of_worker_serves_everything() {
    for role in [Role::Prefill, Role::Decode, Role::Combined] {
        let workers = [candidate("a", role, 1), candidate("b", role, 0)];
        assert_eq!(placed(&workers, 1000), (1, None), "{role:?}");
        let workers = [measured("a", role, 1), measured("b", role, 0)];
        assert_eq!(placed(&workers, 1000), (1, None), "{role:?}");
    }
    let none = choose(&[], &ask(1), &Policy::default(), &Overheads::default());
    assert_eq!(none, Choice::Nobody);
}

#[test]
fn another_model_or_geometry_does_not_help() {
    let mut other = candidate("p", Role::Prefill, 0);
    other.kv_digest = b"other";
    assert_eq!(placed(&[candidate("d", Role::Decode, 0), other], 1000), (0, None));
}

#[test]
fn ties_go_to_available_blocks_and_then_the_id() {
    let mut workers = [candidate("b", Role::Decode, 1), candidate("a", Role::Decode, 1)];
    assert_eq!(placed(&workers, 1), (1, None));
    workers[0].available_blocks += 1;
    assert_eq!(placed(&workers, 1), (0, None));
    workers[0].doubtful = true;
    assert_eq!(placed(&workers, 1), (1, None));
    workers[1].full = true;
    assert_eq!(placed(&workers, 1), (0, None));
    workers[0].full = true;
    let full = choose(&workers, &ask(1), &Policy::default(), &Overheads::default());
    assert_eq!(full, Choice::Full);
}

/// A warm worker keeps its sessions until the work ahead of it passes (1 + stay) times what its cache saves.
#[test]
fn stays_with_the_warm_worker_up_to_the_limit_and_then_goes_by_load() {
    let mut workers = [
        warm(measured("warm", Role::Combined, 0), 100),
        measured("cold", Role::Combined, 0),
    ];
    // 1,600 of 2,000 tokens are cached: 1.6 s saved, so the limit is 3.2 s, or 3,200 tokens.
    for (pending, expected) in [(0, 0), (3199, 0), (3201, 1)] {
        workers[0].pending_prompt_tokens = pending;
        assert_eq!(placed(&workers, 2000).0, expected, "{pending} tokens pending");
    }
    // A small cached prefix holds a request only a little.
    workers[0].prefix.blocks = 2;
    for (pending, expected) in [(63, 0), (65, 1)] {
        workers[0].pending_prompt_tokens = pending;
        assert_eq!(placed(&workers, 2000).0, expected, "{pending} tokens pending");
    }
    // Both equally warm: the less loaded.
    workers[0].pending_prompt_tokens = 10;
    workers[1].prefix.blocks = 2;
    assert_eq!(placed(&workers, 2000).0, 1);
}

#[test]
fn slow_workers_and_many_streams_are_dearer() {
    let mut workers = [measured("a", Role::Combined, 0), measured("b", Role::Combined, 0)];
    workers[0].rates.prefill_tokens_per_s = 500.0;
    assert_eq!(placed(&workers, 1000).0, 1);
    workers[1].streams = 60;
    assert_eq!(placed(&workers, 100).0, 0, "60 steps of 10 ms against 0.2 s of work");
    workers[1].rates.decode_step_us = 100;
    assert_eq!(placed(&workers, 100).0, 1);
}

#[test]
fn a_prompt_goes_where_its_blocks_fit() {
    let mut workers = [measured("a", Role::Combined, 0), measured("b", Role::Combined, 20)];
    workers[0].available_blocks = 10;
    assert_eq!(placed(&workers, 1600).0, 1, "90 blocks are missing");
    workers[0].total_blocks = 50;
    workers[1].doubtful = true;
    workers[0].doubtful = true;
    workers[1].pending_prompt_tokens = 100_000;
    assert_eq!(placed(&workers, 1600).0, 1, "it can never fit in 50 blocks");
    // What is cached in the arena needs no new blocks.
    let workers = [warm(
        Candidate {
            available_blocks: 3,
            ..measured("a", Role::Combined, 0)
        },
        98,
    )];
    let (_, _, estimate) = decide(&workers, 1600).unwrap();
    assert!(estimate.ttft_s < 0.1, "{estimate:?}");
}

/// Measured rates, not the threshold, say whether a transfer pays.
#[test]
fn a_prefill_goes_remote_when_the_rates_say_so() {
    let mut workers = [measured("d", Role::Decode, 4), measured("p", Role::Prefill, 0)];
    assert_eq!(placed(&workers, 2000), (0, Some(1)));
    // Two tokens are not worth a hand-over of 3 ms.
    assert_eq!(placed(&workers, 2), (0, None));
    // A slow wire: 2,000 tokens of 1 KiB take 20 s.
    workers[1].rates.transfer_bytes_per_s = 1e5;
    assert_eq!(placed(&workers, 2000), (0, None));
    // The decode worker has nearly all of it: little to send, but nothing to compute either.
    workers[0].prefix.blocks = 124;
    assert_eq!(placed(&workers, 2000), (0, None));
    workers[0].prefix.blocks = 0;
    // A wire of 1 MB/s takes as long as computing it here, but here it would hold up the streams.
    workers[1].rates.transfer_bytes_per_s = 1e6;
    assert_eq!(placed(&workers, 2000), (0, Some(1)));
    // A queue at the prefill worker.
    workers[1].rates.transfer_bytes_per_s = 1e9;
    workers[1].pending_prompt_tokens = 1500;
    assert_eq!(placed(&workers, 2000), (0, None));
    // It has the prompt in its cache, so it is quick all the same.
    workers[1].prefix.blocks = 120;
    assert_eq!(placed(&workers, 2000), (0, Some(1)));
}

/// A combined worker helps itself, unless a prefill worker is really quicker.
#[test]
fn a_combined_worker_hands_over_only_for_gain() {
    let mut workers = [measured("c", Role::Combined, 0), measured("p", Role::Prefill, 0)];
    assert_eq!(placed(&workers, 2000), (0, None));
    workers[1].rates.prefill_tokens_per_s = 4000.0;
    assert_eq!(placed(&workers, 2000), (0, Some(1)));
    // And its equals do not help it.
    workers[1].role = Role::Combined;
    assert_eq!(placed(&workers, 2000), (1, None), "the quicker one takes it whole");
}

#[test]
fn prefill_workers_stream_only_if_the_others_are_full_or_busy() {
    let mut workers = [measured("d", Role::Decode, 50), measured("p", Role::Prefill, 0)];
    assert_eq!(placed(&workers, 10).0, 0);
    workers[0].pending_prompt_tokens = 4000;
    assert_eq!(placed(&workers, 10).0, 0, "4 s are not busy yet");
    // Its backlog is its own, but a remote prefill goes round it; full blocks cannot be gone round.
    workers[0].available_blocks = 0;
    workers[0].pending_prompt_tokens = 0;
    assert_eq!(placed(&workers, 100).0, 0);
    workers[0].total_blocks = 2;
    assert_eq!(placed(&workers, 32 * 8).0, 1, "it does not fit");
    workers[0].total_blocks = 10_000;
    workers[0].pending_prompt_tokens = 400_000;
    workers[1].kv_digest = b"other";
    assert_eq!(placed(&workers, 100).0, 1, "400 s are busy");
    workers[1].full = true;
    assert_eq!(placed(&workers, 100).0, 0);
}

#[test]
fn lower_tiers_count_by_their_load_rate() {
    let mut on_disk = warm(measured("disk", Role::Combined, 0), 100);
    on_disk.prefix.lower = [0, 100, 0];
    let workers = [on_disk.clone(), warm(measured("arena", Role::Combined, 0), 30)];
    // Never measured: as disks are, which beats computing.
    assert_eq!(placed(&workers, 1700).0, 0);
    // Ten blocks a second, where computing one takes 16 ms: as good as not cached.
    on_disk.rates.load_bytes_per_s[1] = on_disk.kv_bytes_per_block as f32 * 10.0;
    let workers = [on_disk.clone(), warm(measured("arena", Role::Combined, 0), 30)];
    assert_eq!(placed(&workers, 1700).0, 1);
    // What others have measured stands in for what this one has not.
    let slow = Candidate {
        id: "slow",
        full: true,
        ..on_disk.clone()
    };
    on_disk.rates.load_bytes_per_s[1] = 0.0;
    let workers = [on_disk.clone(), warm(measured("arena", Role::Combined, 0), 30), slow];
    assert_eq!(placed(&workers, 1700).0, 1);
    on_disk.rates.load_bytes_per_s[1] = on_disk.kv_bytes_per_block as f32 * 1000.0;
    let workers = [on_disk, warm(measured("arena", Role::Combined, 0), 30)];
    assert_eq!(placed(&workers, 1700).0, 0);
}

#[test]
fn an_estimate_says_what_would_have_to_be_read_and_whether_there_is_time() {
    let mut worker = warm(measured("w", Role::Combined, 0), 100);
    worker.prefix.lower = [20, 30, 40];
    let estimate = |worker: &Candidate<'_>| match choose(
        std::slice::from_ref(worker),
        &ask(1700),
        &Policy::default(),
        &Overheads::default(),
    ) {
        Choice::Place { estimate, .. } => estimate,
        other => panic!("{other:?}"),
    };
    assert_eq!((estimate(&worker).read_blocks, estimate(&worker).waits), (70, false));
    worker.streams = 1;
    assert!(estimate(&worker).waits);
}

#[test]
fn threshold_zero_sends_every_prompt() {
    let workers = [measured("d", Role::Decode, 0), measured("p", Role::Prefill, 0)];
    let policy = Policy {
        prefill_threshold_tokens: 0,
        ..Policy::default()
    };
    let choice = choose(&workers, &ask(1), &policy, &Overheads::default());
    assert!(matches!(choice, Choice::Place { prefill: Some(1), .. }), "{choice:?}");
}

#[test]
fn predictions_are_corrected_by_what_they_were_wrong_by() {
    let workers = [measured("c", Role::Combined, 0)];
    let mut overheads = Overheads::default();
    let predict = |overheads: &Overheads| match choose(&workers, &ask(1000), &Policy::default(), overheads) {
        Choice::Place { estimate, .. } => estimate,
        other => panic!("{other:?}"),
    };
    assert!((predict(&overheads).ttft_s - 1.01).abs() < 1e-6);
    for _ in 0..100 {
        overheads.observe(false, predict(&overheads).modelled_s, 1.51);
    }
    assert!((predict(&overheads).ttft_s - 1.51).abs() < 1e-6);
}

prop_compose! {
    fn any_candidate()(
        role in 0usize..3, digest in 0usize..2, streams in 0u32..5, prefilling in 0u32..3, available in 0u32..20,
        full in prop::bool::weighted(0.2), doubtful in prop::bool::weighted(0.2), blocks in 0u32..15, pending in 0u64..300,
        rates in (prop::sample::select(vec![0.0f32, 50.0, 1e4, f32::NAN, f32::INFINITY, 1e-30]), 0u32..3, prop::sample::select(vec![0.0f32, 1e3, 1e9])),
    ) -> Candidate<'static> {
        Candidate {
            role: [Role::Prefill, Role::Decode, Role::Combined][role],
            kv_digest: [b"x", b"y"][digest],
            prefix: Prefix { blocks, lower: [blocks / 3, 0, 0], recent_blocks: 0 },
            prefilling,
            pending_prompt_tokens: pending,
            available_blocks: available,
            total_blocks: 20,
            rates: Rates { prefill_tokens_per_s: rates.0, decode_step_us: rates.1 * 1000, transfer_bytes_per_s: rates.2, load_bytes_per_s: [0.0; 3] },
            full,
            doubtful,
            ..candidate("", Role::Decode, streams)
        }
    }
}

proptest! {
    #[test]
    fn choices_are_sound_and_do_not_depend_on_order(
        seeds in prop::collection::vec(any_candidate(), 0..12), tokens in 1usize..300, rotate in 0usize..12, remote_s in 0.0f64..1.0,
    ) {
        let ids: Vec<String> = (0..seeds.len()).map(|i| format!("w{i}")).collect();
        let workers: Vec<Candidate<'_>> =
            seeds.iter().zip(&ids).map(|(seed, id)| Candidate { id, ..seed.clone() }).collect();
        let mut overheads = Overheads::default();
        overheads.observe(true, 0.0, remote_s);
        let choice = choose(&workers, &ask(tokens), &Policy::default(), &overheads);
        match choice {
            Choice::Nobody => prop_assert!(workers.is_empty()),
            Choice::Full => prop_assert!(workers.iter().all(|worker| worker.full)),
            Choice::Place { decode, prefill, estimate } => {
                let chosen = &workers[decode];
                prop_assert!(!chosen.full);
                prop_assert!(!chosen.doubtful || workers.iter().all(|worker| worker.full || worker.doubtful));
                prop_assert!(estimate.ttft_s.is_finite() && estimate.ttft_s >= 0.0);
                prop_assert!(estimate.uncached_tokens >= 1 && estimate.uncached_tokens + estimate.cached_tokens == tokens);
                if let Some(prefill) = prefill {
                    prop_assert!(prefill != decode && helps(&workers[prefill], chosen));
                }
                // More cache on the chosen worker, all else equal, never sends the request away from it.
                if prefill.is_none() && chosen.role != Role::Prefill {
                    let mut warmer = workers.clone();
                    warmer[decode].prefix.blocks += 1;
                    let again = choose(&warmer, &ask(tokens), &Policy::default(), &overheads);
                    prop_assert!(matches!(again, Choice::Place { decode: still, .. } if still == decode), "{again:?}");
                }
            }
        }
        let mut turned = workers.clone();
        if !turned.is_empty() {
            turned.rotate_left(rotate % seeds.len());
        }
        let named = |workers: &[Candidate<'_>], choice| match choice {
            Choice::Place { decode, prefill, .. } => {
                (Some(workers[decode].id.to_owned()), prefill.map(|p: usize| workers[p].id.to_owned()))
            }
            _ => (None, None),
        };
        let again = choose(&turned, &ask(tokens), &Policy::default(), &overheads);
        prop_assert_eq!(named(&workers, choice), named(&turned, again));
    }
}
