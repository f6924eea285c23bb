//! What goes into a scheduler and what comes out of it, in plain data.

use std::ops::Range;
use std::sync::Arc;

use baton_proto::worker::{self, TokenLogprobs};

use crate::sampling::{SamplingParams, Shaping};
use crate::step::{SeqId, StepBatch};

/// Generate tokens after a prompt.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids, not empty. After a migration: the original prompt plus every token already emitted.
    pub prompt: Arc<[u32]>,
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// How to sample.
    pub sampling: SamplingParams,
    /// What else it asks of its logits, with the state of this sequence; most ask for nothing.
    pub shaping: Option<Arc<Shaping>>,
    /// Any of these ends the sequence with [`FinishReason::Stop`]. A caller that wants EOS ignored leaves it out.
    pub stop_token_ids: Vec<u32>,
    /// Separates tenants in the prefix cache.
    pub cache_salt: Vec<u8>,
    /// A prefill worker is at hand: if enough of the prompt is uncached, ask for it with a [`FillRequest`].
    pub remote_prefill: bool,
    /// Higher goes first where sequences wait, within a bound (see [`PASSES_PER_PRIORITY`](crate::PASSES_PER_PRIORITY));
    /// 0 is the usual. Never changes a token.
    pub priority: i32,
}

/// Compute a prompt for somebody else: prefill, sample one token, hold the blocks until `release`.
#[derive(Debug, Clone)]
pub struct PrefillRequest {
    /// Token ids, not empty.
    pub prompt: Arc<[u32]>,
    /// How to sample the first token.
    pub sampling: SamplingParams,
    /// As of [`Request`].
    pub shaping: Option<Arc<Shaping>>,
    /// Separates tenants in the prefix cache.
    pub cache_salt: Vec<u8>,
    /// Leading tokens the caller holds already: a multiple of the block size, less than the prompt. They are computed
    /// (or found in the cache) all the same, because later positions attend to them; they need not be pushed.
    pub skip_tokens: usize,
    /// As of [`Request`].
    pub priority: i32,
}

/// Asks the shell to have blocks of a sequence filled by a prefill worker. Emitted once per sequence. It is answered
/// by `fill_done` or `fill_failed`; until then the blocks belong to the transport.
#[derive(Debug, Clone, PartialEq)]
pub struct FillRequest {
    /// Whose blocks.
    pub seq: SeqId,
    /// The whole prompt.
    pub prompt: Arc<[u32]>,
    /// How the prefill worker shall sample the first token.
    pub sampling: SamplingParams,
    /// Leading prompt tokens found in the local prefix cache (a multiple of the block size): not to be sent.
    pub cached_tokens: usize,
    /// The blocks to fill: positions `cached_tokens..prompt.len()`, in order; the last may be partial.
    pub blocks: Vec<u32>,
}

/// KV that a sequence found in the prefix cache instead of computing it: at admission, when a load from a lower tier
/// has ended, or later when another sequence computed the same prefix first. The pusher of a prefill-only sequence sends these positions now, all layers; they
/// appear in no step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reuse {
    /// Who reuses.
    pub seq: SeqId,
    /// Positions whose KV is in place from now on. Ends at a block's end; starts where the sequence's own
    /// computing stopped, which for a prefill-only sequence is a block's start too.
    pub positions: Range<usize>,
    /// The blocks that hold the positions, in order; the first holds `positions.start`.
    pub blocks: Vec<u32>,
    /// Whether the sequence is prefill-only.
    pub prefill_only: bool,
}

/// What to do next, from `Scheduler::plan`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Compute this, then hand it to `commit` with the sampled tokens (or to `step_failed`). May be empty.
    pub batch: StepBatch,
    /// Ask prefill workers for these.
    pub fills: Vec<FillRequest>,
    /// Prefix-cache hits of this plan, in order.
    pub reused: Vec<Reuse>,
    /// Sequences that left the queue for the first time: the end of their queueing time.
    pub admitted: Vec<SeqId>,
    /// Sequences sent back to the queue because blocks ran out; they lose no token. For logs.
    pub preempted: Vec<SeqId>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token was sampled; it is the last of the tokens.
    Stop,
    /// `max_tokens`, the context length, or the whole KV pool was reached.
    Length,
    /// The caller cancelled.
    Cancelled,
    /// The engine failed; `Finish::error` says how. The request may be tried elsewhere.
    Error,
    /// Prefill-only: the KV is complete and the first token sampled; blocks are held until `release`.
    Prefilled,
}

impl From<FinishReason> for worker::FinishReason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => worker::FinishReason::Stop,
            FinishReason::Length => worker::FinishReason::Length,
            FinishReason::Cancelled => worker::FinishReason::Cancelled,
            FinishReason::Error => worker::FinishReason::Error,
            FinishReason::Prefilled => worker::FinishReason::Prefilled,
        }
    }
}

/// The end of a sequence, with what is needed to settle it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose KV this worker took from its prefix cache, lower tiers included, instead of computing or receiving it. At most all
    /// but the last one, and always 0 with the cache off. Counted over the first pass: a recomputation after
    /// preemption changes nothing. After a remote fill the shell reports `max(this, the prefill worker's own count)`:
    /// both count a prefix of the same prompt.
    pub cached_tokens: usize,
    /// Tokens emitted, a final stop token included.
    pub completion_tokens: usize,
    /// With [`FinishReason::Error`]: a sentence; otherwise empty.
    pub error: String,
    /// With [`FinishReason::Error`]: the field of the request that no worker can take as it is, if that is why.
    pub invalid_field: Option<&'static str>,
}

/// News of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Whose.
    pub seq: SeqId,
    /// Newly emitted tokens, in order. Never repeated, never taken back.
    pub tokens: Vec<u32>,
    /// One for each of them, where they are asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Set exactly once, on the last output of a sequence.
    pub finish: Option<Finish>,
}

/// Answer to `cancel`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancelled {
    /// What was emitted until now, with [`FinishReason::Cancelled`].
    pub finish: Finish,
    /// A transport may still touch the blocks: they stay held until `release`.
    pub draining: bool,
}
