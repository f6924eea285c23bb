//! The sampler against its written semantics: filters, ties, odd logits, determinism, and the shape of the draws.

use super::*;
use proptest::prelude::*;

fn params(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> SamplingParams {
    SamplingParams::new(temperature, top_k, top_p, seed).expect("in range")
}

fn sample(logits: &[f32], params: &SamplingParams, position: u64) -> Option<u32> {
    Sampler::new().sample(logits, params, position)
}

/// The documented semantics, with a full sort and libm.
fn kept_by_reference(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut all: Vec<(f32, u32)> = (0u32..)
        .zip(logits)
        .filter(|(_, l)| **l > f32::NEG_INFINITY)
        .map(|(id, l)| (l.min(f32::MAX), id))
        .collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    let max = f64::from(all[0].0);
    let weight = |c: &(f32, u32)| ((f64::from(c.0) - max) / f64::from(params.temperature)).exp();
    let total: f64 = all.iter().map(weight).sum();
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for c in &all {
        // A hair of slack: the sampler rounds to f32 and may keep one more or less at the very edge.
        if sum >= f64::from(params.top_p) * total * (1.0 + 1e-5) && !kept.is_empty() {
            break;
        }
        sum += weight(c);
        kept.push(c.1);
    }
    kept
}

#[test]
fn ranges_are_checked() {
    for bad in [f32::NAN, f32::INFINITY, -0.1, 101.0] {
        assert!(
            matches!(SamplingParams::new(bad, 0, 1.0, 0), Err(SamplingError::Temperature(_))),
            "{bad}"
        );
    }
    for bad in [f32::NAN, f32::INFINITY, 0.0, -1.0, 1.01] {
        assert!(
            matches!(SamplingParams::new(1.0, 0, bad, 0), Err(SamplingError::TopP(_))),
            "{bad}"
        );
    }
    let wire = worker::Sampling {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 7,
        seed: 11,
        ..worker::Sampling::default()
    };
    let parsed = SamplingParams::try_from(&wire).expect("in range");
    assert_eq!(worker::Sampling::from(&parsed), wire);
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_id_among_equals() {
    assert_eq!(sample(&[1.0, 3.0, 3.0, 2.0], &SamplingParams::GREEDY, 9), Some(1));
    assert_eq!(sample(&[-0.0, 0.0], &SamplingParams::GREEDY, 9), Some(0));
    assert_eq!(
        sample(&[f32::NAN, f32::NEG_INFINITY, -5.0], &SamplingParams::GREEDY, 0),
        Some(2)
    );
    assert_eq!(
        sample(
            &[1.0, f32::INFINITY, f32::NAN, f32::INFINITY],
            &SamplingParams::GREEDY,
            0
        ),
        Some(1)
    );
}

#[test]
fn without_a_candidate_there_is_no_token() {
    for p in [SamplingParams::GREEDY, params(1.0, 0, 1.0, 1), params(1.0, 5, 0.5, 1)] {
        assert_eq!(sample(&[], &p, 0), None);
        assert_eq!(sample(&[f32::NAN, f32::NEG_INFINITY], &p, 0), None);
    }
}

#[test]
fn odd_logits_never_win_a_draw() {
    let logits = [f32::NAN, 0.0, f32::NEG_INFINITY, 1.0, f32::NAN];
    for p in [
        params(1.0, 0, 1.0, 3),
        params(0.7, 3, 1.0, 3),
        params(100.0, 0, 0.99, 3),
        params(1e-30, 0, 1.0, 3),
    ] {
        for position in 0..300 {
            let token = sample(&logits, &p, position);
            assert!(matches!(token, Some(1 | 3)), "{token:?}");
        }
    }
    // An infinite logit takes everything.
    assert_eq!(sample(&[0.0, f32::INFINITY], &params(1.0, 0, 1.0, 1), 5), Some(1));
}

/// In a long flat row the draw walks the order best-first: the place of the token drawn is the number that was drawn.
#[test]
fn the_draw_walks_best_first_in_a_long_row() {
    let logits: Vec<f32> = (0..20_000u64).map(|i| (i * 7919 % 20_000) as f32 * 1e-4).collect();
    let mut order: Vec<u32> = (0..20_000).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let p = params(1.0, 15_000, 1.0, 5);
    let weights: Vec<f64> = order[..15_000]
        .iter()
        .map(|id| f64::from(logits[*id as usize]).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    for position in 0..200 {
        let token = sample(&logits, &p, position).expect("candidates");
        let place = order.iter().position(|id| *id == token).expect("present");
        let before: f64 = weights[..place].iter().sum::<f64>() / total;
        let u = rng::uniform(5, position);
        assert!(
            before <= u + 1e-5 && u < before + weights[place] / total + 1e-5,
            "{u}: {before}"
        );
    }
}

/// Frequencies over many positions follow the softmax, filtered or not: chi-square on each setting.
#[test]
fn frequencies_follow_the_distribution() {
    let logits: Vec<f32> = (0..12).map(|i| ((i * 7) % 12) as f32 * 0.3).collect();
    for (p, label) in [
        (params(1.0, 0, 1.0, 42), "all"),
        (params(0.6, 0, 1.0, 43), "cold"),
        (params(1.0, 5, 1.0, 44), "top_k"),
        (params(1.0, 0, 0.7, 45), "top_p"),
        (params(1.5, 8, 0.8, 46), "both"),
    ] {
        let kept = kept_by_reference(&logits, &p);
        let weight = |id: u32| (f64::from(logits[id as usize]) / f64::from(p.temperature)).exp();
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let draws = 40_000u64;
        let mut counts = vec![0u64; logits.len()];
        let mut sampler = Sampler::new();
        for position in 0..draws {
            counts[sampler.sample(&logits, &p, position).expect("candidates") as usize] += 1;
        }
        let mut chi = 0.0;
        for (id, &count) in counts.iter().enumerate() {
            if kept.contains(&(id as u32)) {
                let expected = weight(id as u32) / total * draws as f64;
                chi += (count as f64 - expected).powi(2) / expected;
            } else {
                assert_eq!(count, 0, "{label}: {id} was filtered");
            }
        }
        // 99.9 % quantile of chi-square with 11 degrees of freedom is 31.3.
        assert!(chi < 32.0, "{label}: chi-square {chi}");
    }
}

#[test]
fn top_k_keeps_exactly_k_with_the_lowest_ids_at_the_edge() {
    let logits = [1.0, 2.0, 2.0, 2.0, 2.0];
    let mut seen = std::collections::BTreeSet::new();
    for position in 0..500 {
        seen.insert(sample(&logits, &params(1.0, 2, 1.0, 1), position));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [Some(1), Some(2)]);
}

#[test]
fn a_flat_nucleus_larger_than_the_first_head_is_found() {
    let logits = vec![0.25f32; 5000];
    let p = params(1.0, 0, 0.5, 7);
    let mut top = 0;
    for position in 0..400 {
        top = top.max(sample(&logits, &p, position).expect("candidates"));
    }
    assert!(
        (2400..2501).contains(&top),
        "half of 5000 equals, lowest ids first: {top}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same for rows too long to be sorted as one head, flat or peaked, with many equal logits.
    #[test]
    fn long_rows_draw_from_the_kept_set(
        seed: u64, len in 1500usize..6000, spread in 0.0f32..12.0, steps in 1u64..100_000, temperature in 0.05f32..50.0,
        top_k in 0u32..5000, top_p in 0.01f32..=1.0,
    ) {
        let logits: Vec<f32> = (0..len as u64)
            .map(|i| spread * ((rng::uniform(seed, i) * steps as f64).floor() / steps as f64) as f32)
            .collect();
        let p = params(temperature, top_k, top_p, seed);
        let kept: std::collections::HashSet<u32> = kept_by_reference(&logits, &p).into_iter().collect();
        let mut sampler = Sampler::new();
        for position in 0..20 {
            let token = sampler.sample(&logits, &p, position).expect("candidates");
            prop_assert!(kept.contains(&token), "{token} of {} kept", kept.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is drawn is in the kept set, twice the same, and scratch from other calls changes nothing.
    #[test]
    fn member_of_the_kept_set_and_deterministic(
        logits in prop::collection::vec(prop_oneof![8 => -20f32..20.0, 2 => Just(3.5), 1 => Just(f32::NAN), 1 => Just(f32::INFINITY)], 1..700),
        temperature in 0.05f32..3.0, top_k in 0u32..300, top_p in 0.01f32..=1.0, seed: u64, position: u64,
    ) {
        let p = params(temperature, top_k, top_p, seed);
        let token = sample(&logits, &p, position);
        let mut used = Sampler::new();
        used.sample(&[1.0, 2.0, 3.0], &params(1.0, 2, 0.9, 1), 1);
        prop_assert_eq!(token, used.sample(&logits, &p, position));
        match token {
            Some(id) => prop_assert!(kept_by_reference(&logits, &p).contains(&id)),
            None => prop_assert!(logits.iter().all(|l| l.is_nan())),
        }
    }
}

/// What the documentation of [`shaping`] says, without any cleverness.
fn shaped_by_reference(
    logits: &[f32],
    wire: &worker::Sampling,
    prompt: &[u32],
    emitted: &[u32],
    stops: &[u32],
) -> Vec<f32> {
    let mut out = logits.to_vec();
    for (id, logit) in (0u32..).zip(out.iter_mut()) {
        for bias in wire.logit_bias.iter().filter(|bias| bias.token_id == id) {
            *logit += bias.bias;
        }
        let count = emitted.iter().filter(|token| **token == id).count();
        let repetition = if wire.repetition_penalty == 0.0 {
            1.0
        } else {
            wire.repetition_penalty
        };
        if count > 0 || (prompt.contains(&id) && repetition != 1.0) {
            *logit = if *logit > 0.0 {
                *logit / repetition
            } else {
                *logit * repetition
            };
        }
        if count > 0 {
            *logit -= wire.frequency_penalty * count as f32 + wire.presence_penalty;
        }
        if emitted.len() < wire.min_tokens as usize && stops.contains(&id) {
            *logit = f32::NEG_INFINITY;
        }
    }
    out
}

fn logprobs_by_reference(logits: &[f32], token: u32, top: usize) -> (f64, Vec<u32>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|l| (f64::from(*l) - f64::from(max)).exp()).sum();
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    ids.truncate(top);
    (f64::from(logits[token as usize]) - f64::from(max) - total.ln(), ids)
}

proptest! {
    #[test]
    fn shaping_is_what_it_says(
        logits in prop::collection::vec((-40i32..40).prop_map(|l| l as f32 / 4.0), 8..48),
        prompt in prop::collection::vec(0u32..8, 0..12),
        emitted in prop::collection::vec(0u32..8, 0..12),
        told in 0usize..12,
        presence in -8i32..8, frequency in -8i32..8, repetition in 0usize..4,
        bias in prop::collection::btree_map(0u32..8, -100i32..100, 0..4),
        min_tokens in 0u32..16, top in prop::option::of(0u32..20), min_p in 0usize..4, seed in any::<u64>(),
    ) {
        let wire = worker::Sampling {
            presence_penalty: presence as f32 / 4.0,
            frequency_penalty: frequency as f32 / 4.0,
            repetition_penalty: [0.0, 1.0, 0.5, 2.0][repetition],
            logit_bias: bias.into_iter().map(|(token_id, bias)| worker::LogitBias { token_id, bias: bias as f32 / 8.0 }).collect(),
            min_tokens,
            top_logprobs: top,
            ..worker::Sampling::default()
        };
        let stops = [1, 3];
        // Some of the emitted tokens come with the prompt, the others one by one.
        let told = told.min(emitted.len());
        let all = [&prompt[..], &emitted[..told]].concat();
        let asked = Asked {
            sampling: &wire,
            prompt: &all,
            emitted_tokens: told,
            stop_token_ids: &stops,
            vocab_size: logits.len(),
        };
        let shaping = Shaping::new(asked, None).expect("in range");
        if let Some(shaping) = &shaping {
            for token in &emitted[told..] {
                prop_assert_eq!(shaping.push(*token), Ok(None));
            }
        }
        let expected = shaped_by_reference(&logits, &wire, &prompt, &emitted, &stops);
        let params = params(0.8, 0, 1.0, seed).with_min_p([0.0, 0.05, 0.5, 1.0][min_p]).expect("in range");
        let mut sampler = Sampler::new();
        let token = sampler.sample_shaped(&logits, &params, 5, shaping.as_ref());
        match &shaping {
            Some(shaping) => {
                let mut shaped = logits.clone();
                shaping.apply(&mut shaped);
                for (got, expected) in shaped.iter().zip(&expected) {
                    prop_assert!(got == expected || (got - expected).abs() < 1e-5, "{got} {expected}");
                }
                prop_assert_eq!(token, sample(&shaped, &params, 5));
            }
            // Nothing was asked for that still matters.
            None => prop_assert_eq!(&expected, &logits),
        }
        let token = token.expect("min_tokens leaves other candidates");
        if let (Some(shaping), Some(top)) = (&shaping, top) {
            let told = shaping.push(token).expect("no grammar").expect("asked for");
            let (logprob, ids) = logprobs_by_reference(&logits, token, top as usize);
            prop_assert!((f64::from(told.logprob) - logprob).abs() < 1e-4);
            prop_assert_eq!(told.top_ids, ids);
        }
        // No candidate below min_p of the best one.
        let max = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = ((expected[token as usize] - max) / 0.8).exp();
        prop_assert!(weight >= params.min_p() - 1e-4, "{weight}");
    }
}

#[test]
fn what_is_out_of_range_is_named() {
    let check = |change: &dyn Fn(&mut worker::Sampling)| {
        let mut wire = worker::Sampling::default();
        change(&mut wire);
        let asked = Asked {
            sampling: &wire,
            prompt: &[1],
            emitted_tokens: 9,
            stop_token_ids: &[],
            vocab_size: 10,
        };
        let error = SamplingParams::new(0.0, 0, 1.0, 0)
            .and_then(|params| params.with_min_p(wire.min_p))
            .err();
        error
            .or_else(|| Shaping::new(asked, None).err())
            .map(|error| error.field())
    };
    assert_eq!(check(&|_| {}), None);
    assert_eq!(check(&|wire| wire.min_p = f32::NAN), Some("min_p"));
    assert_eq!(check(&|wire| wire.presence_penalty = 2.5), Some("presence_penalty"));
    assert_eq!(
        check(&|wire| wire.frequency_penalty = f32::NAN),
        Some("frequency_penalty")
    );
    assert_eq!(
        check(&|wire| wire.repetition_penalty = -1.0),
        Some("repetition_penalty")
    );
    assert_eq!(
        check(&|wire| wire.repetition_penalty = f32::INFINITY),
        Some("repetition_penalty")
    );
    assert_eq!(check(&|wire| wire.top_logprobs = Some(21)), Some("top_logprobs"));
    let bias = |token_id, bias| worker::LogitBias { token_id, bias };
    assert_eq!(
        check(&|wire| wire.logit_bias = vec![bias(1, f32::NAN)]),
        Some("logit_bias")
    );
    assert_eq!(check(&|wire| wire.logit_bias = vec![bias(10, 1.0)]), Some("logit_bias"));
    assert_eq!(
        check(&|wire| wire.logit_bias = vec![bias(1, 1.0); 1025]),
        Some("logit_bias")
    );
}
