//! Picks a token from logits: a pure function of (logits, parameters, position), as promise P1 asks.
//!
//! The exact semantics, in this order (vLLM's):
//! 1. A NaN or -inf logit is no candidate; +inf counts as the largest finite number.
//! 2. Temperature 0 is greedy: the largest logit, the lowest id among equals. Nothing below applies.
//! 3. Weights are `exp((logit - max) / temperature)`.
//! 4. `top_k` keeps the k best candidates by (logit descending, id ascending); 0 keeps all. Exactly k remain: among
//!    equals at the edge the lowest ids stay (vLLM would keep all of them).
//! 5. `top_p` keeps, of what `top_k` left and renormalised, the shortest best-first prefix whose weight reaches
//!    `top_p` of the total; at least one candidate. 1 keeps all.
//! 6. The draw is `u * total` with `u` from [`rng::uniform`] of `(seed, position)`, walked
//!    best-first when `top_k` or `top_p` is set and drops something, else in id order.
//!
//! The vocabulary is never sorted: `top_k` selects, `top_p` selects ever larger heads until one is heavy enough, and
//! only the selected head is sorted. `exp` is this file's own polynomial, because libm differs between platforms and
//! does not vectorise. Penalties and grammar masks are not here: they change logits before.

use baton_proto::worker;

use crate::error::SamplingError;
use crate::rng;

/// Above this every distribution is flat to within a float's precision; a larger number is a mistake.
pub const TEMPERATURE_MAX: f32 = 100.0;

/// First head that `top_p` alone sorts. A language model's nucleus is nearly always smaller.
const HEAD_FIRST: usize = 128;
/// Growth of the head while it is too light; selection is linear, so a larger step costs fewer passes.
const HEAD_GROWTH: usize = 8;

/// How to pick a token. Valid by construction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    seed: u64,
}

impl SamplingParams {
    /// The most likely token, always.
    pub const GREEDY: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        seed: 0,
    };

    /// Checks the ranges: temperature finite in `0..=`[`TEMPERATURE_MAX`], `top_p` in `(0, 1]`; `top_k` 0 keeps all.
    pub fn new(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Result<Self, SamplingError> {
        if !(0.0..=TEMPERATURE_MAX).contains(&temperature) {
            return Err(SamplingError::Temperature(temperature));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(SamplingError::TopP(top_p));
        }
        Ok(SamplingParams {
            temperature,
            top_k,
            top_p,
            seed,
        })
    }

    /// 0 is greedy.
    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    /// Candidates to keep; 0 keeps all.
    pub fn top_k(&self) -> u32 {
        self.top_k
    }

    /// Share of the weight to keep; 1 keeps all.
    pub fn top_p(&self) -> f32 {
        self.top_p
    }

    /// Key of the random numbers.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

impl TryFrom<&worker::Sampling> for SamplingParams {
    type Error = SamplingError;

    fn try_from(wire: &worker::Sampling) -> Result<Self, SamplingError> {
        SamplingParams::new(wire.temperature, wire.top_k, wire.top_p, wire.seed)
    }
}

impl From<&SamplingParams> for worker::Sampling {
    fn from(params: &SamplingParams) -> Self {
        worker::Sampling {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            seed: params.seed,
        }
    }
}

/// A candidate of a filtered draw.
#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// Samples tokens; holds nothing but scratch memory, so that a step allocates nothing per token.
#[derive(Default)]
pub struct Sampler {
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
}

impl Sampler {
    /// A sampler with empty scratch.
    pub fn new() -> Self {
        Self::default()
    }

    /// The token for `position` (its absolute index in the sequence), or `None` when no logit is a candidate.
    pub fn sample(&mut self, logits: &[f32], params: &SamplingParams, position: u64) -> Option<u32> {
        let (best, max) = argmax(logits)?;
        if params.temperature == 0.0 {
            return Some(best);
        }
        let u = rng::uniform(params.seed, position);
        let scale = Scale {
            max,
            temperature: params.temperature,
        };
        let top_k = match params.top_k as usize {
            0 => logits.len(),
            k => k.min(logits.len()),
        };
        if top_k == logits.len() && params.top_p >= 1.0 {
            return Some(self.draw_from_all(logits, scale, u).unwrap_or(best));
        }
        Some(
            self.draw_from_head(logits, scale, top_k, params.top_p, u)
                .unwrap_or(best),
        )
    }

    fn draw_from_all(&mut self, logits: &[f32], scale: Scale, u: f64) -> Option<u32> {
        self.weights.clear();
        self.weights.extend(logits.iter().map(|&logit| scale.weight(logit)));
        let total: f64 = self.weights.iter().map(|&w| f64::from(w)).sum();
        draw(
            self.weights.iter().enumerate().map(|(id, &w)| (id as u32, w)),
            u * total,
        )
    }

    fn draw_from_head(&mut self, logits: &[f32], scale: Scale, top_k: usize, top_p: f32, u: f64) -> Option<u32> {
        let all = &mut self.candidates;
        all.clear();
        all.extend(logits.iter().enumerate().filter_map(|(id, &logit)| {
            (logit > f32::NEG_INFINITY).then_some(Candidate {
                logit: logit.min(f32::MAX),
                id: id as u32,
            })
        }));
        let ranked = top_k < all.len();
        if ranked {
            all.select_nth_unstable_by(top_k - 1, best_first);
            all.truncate(top_k);
            all.sort_unstable_by(best_first);
        }
        if top_p >= 1.0 {
            return draw_from(all, scale, u);
        }
        // In id order or best-first, as it stands: an order that depends on the logits alone.
        let total: f64 = all.iter().map(|c| f64::from(scale.weight(c.logit))).sum();
        let enough = f64::from(top_p) * total;
        let mut head = HEAD_FIRST;
        while head < all.len() {
            if !ranked {
                all.select_nth_unstable_by(head - 1, best_first);
                all[..head].sort_unstable_by(best_first);
            }
            if let Some(kept) = nucleus(&all[..head], scale, enough) {
                return draw_from(&all[..kept], scale, u);
            }
            head *= HEAD_GROWTH;
        }
        if !ranked {
            all.sort_unstable_by(best_first);
        }
        // Rounding can leave the whole a hair under its own total.
        let kept = nucleus(all, scale, enough).unwrap_or(all.len());
        draw_from(&all[..kept], scale, u)
    }
}

fn best_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Length of the shortest prefix of `sorted` that weighs `enough`, if it does.
fn nucleus(sorted: &[Candidate], scale: Scale, enough: f64) -> Option<usize> {
    let mut sum = 0.0;
    sorted
        .iter()
        .position(|c| {
            sum += f64::from(scale.weight(c.logit));
            sum >= enough
        })
        .map(|i| i + 1)
}

fn draw_from(kept: &[Candidate], scale: Scale, u: f64) -> Option<u32> {
    let total: f64 = kept.iter().map(|c| f64::from(scale.weight(c.logit))).sum();
    draw(kept.iter().map(|c| (c.id, scale.weight(c.logit))), u * total)
}

/// The first id whose cumulated weight exceeds `target`; rounding past the end takes the last that weighs anything.
fn draw(weights: impl Iterator<Item = (u32, f32)>, target: f64) -> Option<u32> {
    let (mut sum, mut last) = (0.0, None);
    for (id, weight) in weights {
        if weight > 0.0 {
            sum += f64::from(weight);
            last = Some(id);
            if sum > target {
                break;
            }
        }
    }
    last
}

/// Lowest id of the largest candidate, and its value.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let (mut best, mut max) = (None, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        // False for NaN, and for equals: the lowest id stays.
        if logit.min(f32::MAX) > max && !logit.is_nan() {
            (best, max) = (Some(id as u32), logit.min(f32::MAX));
        }
    }
    best.map(|id| (id, max))
}

/// From logit to weight.
#[derive(Clone, Copy)]
struct Scale {
    max: f32,
    temperature: f32,
}

impl Scale {
    /// In `0..=1`; 0 for what is no candidate.
    #[inline]
    fn weight(self, logit: f32) -> f32 {
        let x = (logit.min(f32::MAX) - self.max) / self.temperature;
        // `f32::min` drops NaN, so a NaN logit came out as f32::MAX above: tell it apart here.
        if logit.is_nan() { 0.0 } else { exp_nonpositive(x) }
    }
}

/// `exp(x)` for `x <= 0` within 3 ulp, 0 below -87: range reduction to `2^n * 2^f` and a polynomial for `2^f`.
/// Only IEEE adds and multiplies, in a fixed order, so every machine agrees to the bit.
#[inline]
fn exp_nonpositive(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that `x - n * ln 2` keeps its low bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0);
    let n = (clamped * LOG2_E + 0.5).floor();
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    // Taylor coefficients suffice on |r| <= ln 2 / 2.
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (0.166_666_67
                    + r * (0.041_666_668 + r * (8.333_334e-3 + r * (1.388_888_9e-3 + r * 1.984_127e-4))))));
    let scale = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

#[cfg(test)]
mod tests;
