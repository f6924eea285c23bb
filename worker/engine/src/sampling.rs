//! Picks a token from logits: a pure function of (logits, parameters, position), as promise P1 asks.
//!
//! Bias, penalties, `min_tokens` and grammars change the logits before, where a request asks for them, and log
//! probabilities are of the logits as they were: see [`shaping`]. Then, in this order (vLLM's):
//! 1. A NaN or -inf logit is no candidate; +inf counts as the largest finite number.
//! 2. Temperature 0 is greedy: the largest logit, the lowest id among equals. Nothing below applies.
//! 3. Weights are `exp((logit - max) / temperature)`.
//!    `min_p` drops those below `min_p` of the largest; 0 drops none.
//! 4. `top_k` keeps the k best candidates by (logit descending, id ascending); 0 keeps all. Exactly k remain: among
//!    equals at the edge the lowest ids stay (vLLM would keep all of them).
//! 5. `top_p` keeps, of what `top_k` left and renormalised, the shortest best-first prefix whose weight reaches
//!    `top_p` of the total; at least one candidate. 1 keeps all.
//! 6. The draw is `u * total` with `u` from [`rng::uniform`] of `(seed, position)`, walked
//!    best-first when `top_k` or `top_p` is set and drops something, else in id order.
//!
//! The vocabulary is never sorted, however flat the distribution: see `ranking`. The passes over all logits are
//! [`baton_kernels::vocab`]'s, which agree to the bit on every machine.

use baton_kernels::vocab::{self, BLOCK, Weighed};
use baton_proto::worker;

use crate::error::SamplingError;
use crate::rng;

mod logprobs;
mod ranking;
pub mod shaping;

use ranking::Ranking;
pub use shaping::{Asked, Shaping};

/// Above this every distribution is flat to within a float's precision; a larger number is a mistake.
pub const TEMPERATURE_MAX: f32 = 100.0;

/// How to pick a token. Valid by construction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: u64,
}

impl SamplingParams {
    /// The most likely token, always.
    pub const GREEDY: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
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
            min_p: 0.0,
            seed,
        })
    }

    /// The same with `min_p`, which must be in `[0, 1]`.
    pub fn with_min_p(self, min_p: f32) -> Result<Self, SamplingError> {
        if !(0.0..=1.0).contains(&min_p) {
            return Err(SamplingError::MinP(min_p));
        }
        Ok(SamplingParams { min_p, ..self })
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

    /// Share of the largest weight that a candidate needs; 0 keeps all.
    pub fn min_p(&self) -> f32 {
        self.min_p
    }

    /// Key of the random numbers.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

impl TryFrom<&worker::Sampling> for SamplingParams {
    type Error = SamplingError;

    fn try_from(wire: &worker::Sampling) -> Result<Self, SamplingError> {
        SamplingParams::new(wire.temperature, wire.top_k, wire.top_p, wire.seed)?.with_min_p(wire.min_p)
    }
}

impl From<&SamplingParams> for worker::Sampling {
    fn from(params: &SamplingParams) -> Self {
        worker::Sampling {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            seed: params.seed,
            ..worker::Sampling::default()
        }
    }
}

/// Samples tokens; holds nothing but scratch memory, so that a step allocates nothing per token.
#[derive(Default)]
pub struct Sampler {
    weighed: Weighed,
    ranking: Ranking,
    shaped: Vec<f32>,
}

impl Sampler {
    /// A sampler with empty scratch.
    pub fn new() -> Self {
        Self::default()
    }

    /// The token of a sequence that may ask for more than its parameters say. What is told of the token besides is left in
    /// its [`Shaping`].
    pub fn sample_shaped(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        position: u64,
        shaping: Option<&Shaping>,
    ) -> Option<u32> {
        let Some(shaping) = shaping else {
            return self.sample(logits, params, position);
        };
        let token = if shaping.changes_logits() {
            let mut shaped = std::mem::take(&mut self.shaped);
            shaped.clear();
            shaped.extend_from_slice(logits);
            shaping.apply(&mut shaped);
            let token = self.sample(&shaped, params, position);
            self.shaped = shaped;
            token
        } else {
            self.sample(logits, params, position)
        };
        if let (Some(token), Some(top)) = (token, shaping.top_logprobs()) {
            let told = logprobs::of(logits, token, top as usize, &mut self.weighed);
            shaping.tell_logprobs(Some(told));
        }
        token
    }

    /// The token for `position` (its absolute index in the sequence), or `None` when no logit is a candidate.
    pub fn sample(&mut self, logits: &[f32], params: &SamplingParams, position: u64) -> Option<u32> {
        let max = vocab::largest(logits);
        if max == f32::NEG_INFINITY {
            return None;
        }
        let best = || vocab::first_at_least(logits, max).map(|id| id as u32);
        if params.temperature == 0.0 {
            return best();
        }
        vocab::weigh(logits, max, params.temperature, &mut self.weighed);
        if params.min_p > 0.0 {
            drop_unlikely(&mut self.weighed, params.min_p);
        }
        let u = rng::uniform(params.seed, position);
        let top_k = match params.top_k as usize {
            0 => logits.len(),
            k => k.min(logits.len()),
        };
        let drawn = if top_k == logits.len() && params.top_p >= 1.0 {
            draw_from_all(&self.weighed, u)
        } else {
            self.ranking.draw(logits, &self.weighed, top_k, params.top_p, u)
        };
        drawn.or_else(best)
    }
}

/// Takes the weight of every candidate below `min_p` of the largest, which weighs 1.
fn drop_unlikely(weighed: &mut Weighed, min_p: f32) {
    let Weighed {
        exponents,
        weights,
        block_sums,
    } = weighed;
    for (exponent, weight) in exponents.iter_mut().zip(weights.iter_mut()) {
        if *weight < min_p {
            (*exponent, *weight) = (f32::NEG_INFINITY, 0.0);
        }
    }
    for (block, sum) in weights.chunks(BLOCK).zip(block_sums) {
        *sum = block.iter().map(|weight| f64::from(*weight)).sum();
    }
}

/// The first id whose cumulated weight exceeds `u` of the total; rounding past the end takes the last that weighs anything.
fn draw_from_all(weighed: &Weighed, u: f64) -> Option<u32> {
    let target = u * weighed.block_sums.iter().sum::<f64>();
    let mut before = 0.0;
    let blocks = weighed.weights.chunks(BLOCK).zip(&weighed.block_sums);
    let mut last = None;
    for (start, (block, sum)) in (0u32..).step_by(BLOCK).zip(blocks) {
        if before + sum > target {
            let mut sum = before;
            for (id, &weight) in (start..).zip(block).filter(|(_, w)| **w > 0.0) {
                sum += f64::from(weight);
                last = Some(id);
                if sum > target {
                    break;
                }
            }
            return last;
        }
        if let Some(at) = block.iter().rposition(|w| *w > 0.0).filter(|_| *sum > 0.0) {
            last = Some(start + at as u32);
        }
        before += sum;
    }
    last
}

#[cfg(test)]
mod tests;
