//! Logarithms of probabilities of a row of logits: of one token, and of the most likely ones.
//!
//! The distribution is the softmax of the raw logits, before temperature and everything else (what vLLM calls `raw_logprobs`): what the
//! model thought, not what it was made to say. The sum is [`baton_kernels::vocab`]'s, the same to the bit on every
//! machine; equals are ordered by id.

use baton_kernels::vocab::{self, Weighed};
use baton_proto::worker::TokenLogprobs;

/// Log probabilities of `token` and of the `top` most likely ones (fewer, where there are fewer candidates). `scratch` is overwritten.
pub(super) fn of(logits: &[f32], token: u32, top: usize, scratch: &mut Weighed) -> TokenLogprobs {
    let max = vocab::largest(logits);
    vocab::weigh(logits, max, 1.0, scratch);
    let total: f64 = scratch.block_sums.iter().sum();
    let logprob = |logit: f32| (f64::from(logit.min(f32::MAX)) - f64::from(max) - total.ln()) as f32;
    let best = best(logits, top);
    TokenLogprobs {
        logprob: logits
            .get(token as usize)
            .map_or(f32::NEG_INFINITY, |logit| logprob(*logit)),
        top_logprobs: best.iter().map(|(logit, _)| logprob(*logit)).collect(),
        top_ids: best.into_iter().map(|(_, id)| id).collect(),
    }
}

/// The best `count` candidates, best first, lower ids first among equals.
fn best(logits: &[f32], count: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
    // What a candidate must exceed to enter; a NaN exceeds nothing.
    let mut bound = f32::NEG_INFINITY;
    for (id, &logit) in (0u32..).zip(logits) {
        let logit = logit.min(f32::MAX);
        if count > 0 && logit > bound {
            let at = best.partition_point(|(other, _)| *other >= logit);
            best.insert(at, (logit, id));
            best.truncate(count);
            if best.len() == count {
                bound = best[count - 1].0;
            }
        }
    }
    best
}
