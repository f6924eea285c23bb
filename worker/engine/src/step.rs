//! The step-level seam: what a scheduler asks of whatever computes tokens.
//!
//! One step is a ragged batch of spans, prefill chunks and decodes alike. The engine writes the KV of every span into
//! its region through the block tables and samples after the spans that ask for it. It decides nothing: which
//! sequences, how long a span, which blocks, all of that is the scheduler's.
//!
//! Promise P1 at this seam: the token of a span depends only on the tokens at positions `0..start_pos + len` and its
//! sampling parameters, never on its batch mates or on how the positions before were cut into spans.

use std::fmt;

use std::sync::Arc;

use baton_kvtransfer::Region;
use baton_model::KvGeometry;

use crate::error::EngineError;
use crate::sampling::{SamplingParams, Shaping};

/// Names a sequence within one scheduler. Ids grow in order of submission and are never reused, so the smaller id is
/// the older sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seq {}", self.0)
    }
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepSeq {
    /// Whose span this is.
    pub seq: SeqId,
    /// The span's tokens, never empty.
    pub tokens: Vec<u32>,
    /// Absolute position of `tokens[0]`. KV of all positions before is in place.
    pub start_pos: usize,
    /// Block table of positions `0..start_pos + tokens.len()`, in order.
    pub blocks: Vec<u32>,
    /// When set, sample the token that follows the span; its position is `start_pos + tokens.len()`.
    pub sample: Option<SamplingParams>,
    /// With `sample`: what else to do to the logits; the sampler leaves there what is told of the token besides.
    pub shaping: Option<Arc<Shaping>>,
}

impl StepSeq {
    /// Position just past the span; also the position of the sampled token.
    pub fn end_pos(&self) -> usize {
        self.start_pos + self.tokens.len()
    }
}

/// What one engine step computes. Every sequence appears at most once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepBatch {
    /// The spans, decodes first.
    pub seqs: Vec<StepSeq>,
}

impl StepBatch {
    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }

    /// Tokens the step computes.
    pub fn tokens(&self) -> usize {
        self.seqs.iter().map(|s| s.tokens.len()).sum()
    }
}

/// Computes steps over its own KV region.
pub trait Engine: Send {
    /// Shape of a KV block.
    fn geometry(&self) -> KvGeometry;
    /// The KV arena: `total_blocks` blocks of `geometry`.
    fn region(&self) -> Arc<Region>;
    /// Whether the blocks' bytes are in the region: only then can they be handed over, taken from a peer, or kept in a tier.
    fn blocks_move(&self) -> bool {
        true
    }
    /// Blocks in the region.
    fn total_blocks(&self) -> u32;
    /// Most tokens a sequence may have, prompt and generated together.
    fn context_length(&self) -> usize;
    /// Token ids are below this.
    fn vocab_size(&self) -> usize;
    /// Computes the batch. `layer_done(l)` is called once per layer, in order, as soon as the KV of layer `l` of every
    /// span lies in the region. Answers one entry per span, in order: `Some` exactly where `sample` was set, except
    /// that a span whose logits hold no usable number also gets `None`.
    fn step(&mut self, batch: &StepBatch, layer_done: &mut dyn FnMut(usize)) -> Result<Vec<Option<u32>>, EngineError>;
}
