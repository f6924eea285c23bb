//! The errors of this crate, one enum per thing that can go wrong for a different reader: an operator's
//! configuration, a caller's request, the engine at run time. Messages say what happened and what to do.

use thiserror::Error;

/// A scheduler or pool configuration that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// A size that must be positive is zero.
    #[error("{0} is 0; give it a positive value")]
    Zero(&'static str),
    /// A context that holds no prompt token and generated token.
    #[error("a context length of {0} tokens holds no prompt and answer; it must be at least 2")]
    ContextTooShort(usize),
    /// Every running sequence may decode in one step, and a prefill must get at least one token beside them.
    #[error(
        "batch_tokens_max ({batch_tokens_max}) must exceed seqs_max ({seqs_max}), or prefill could never run beside a full decode batch; raise the first or lower the second"
    )]
    BatchTooSmall {
        /// The configured token budget of a step.
        batch_tokens_max: usize,
        /// The configured number of sequences in flight.
        seqs_max: usize,
    },
    /// The byte budget of the KV pool does not hold one block.
    #[error("a KV budget of {bytes} bytes holds no block of {block_bytes} bytes; raise it to at least that")]
    KvBudgetTooSmall {
        /// The configured budget in bytes.
        bytes: usize,
        /// Size of one block of this model in bytes.
        block_bytes: usize,
    },
}

/// Why a request was not taken. Nothing was allocated for it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AdmitError {
    /// The prompt has no tokens.
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt,
    /// `max_tokens` is zero.
    #[error("max_tokens is 0; ask for at least one token")]
    NoTokensAsked,
    /// The prompt leaves no room for a generated token in the model's context.
    #[error(
        "the prompt has {prompt_tokens} tokens, but the context of this model holds {context_length} including at least one generated token; shorten the prompt"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// The model's context length in tokens.
        context_length: usize,
    },
    /// The prompt needs more KV blocks than this worker has in all, so waiting would never help.
    #[error(
        "the prompt needs {needed} KV blocks, but this worker has {total} in all; shorten the prompt or give the worker more KV memory"
    )]
    NeverFits {
        /// Blocks the prompt needs.
        needed: usize,
        /// Blocks of the whole pool.
        total: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}; the prompt was made with another tokenizer")]
    UnknownToken {
        /// The offending id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// Tokens the caller says it holds already are not a whole number of blocks, or more than the prompt.
    #[error(
        "skip_tokens is {skip_tokens}; it must be a multiple of the block size {block_size} and less than the prompt's {prompt_tokens} tokens"
    )]
    BadSkip {
        /// What the caller sent.
        skip_tokens: usize,
        /// Tokens per block.
        block_size: usize,
        /// Tokens of the prompt.
        prompt_tokens: usize,
    },
    /// More stop token ids than a request may carry.
    #[error("{count} stop token ids; at most {max} are allowed")]
    TooManyStops {
        /// What the caller sent.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// The waiting queue is full; another worker, or a retry later, may do better.
    #[error("the waiting queue is full ({waiting_max} requests); retry later or on another worker")]
    QueueFull {
        /// The queue's limit.
        waiting_max: usize,
    },
}

impl AdmitError {
    /// Whether the same request may succeed later or elsewhere.
    pub fn retryable(&self) -> bool {
        matches!(self, AdmitError::QueueFull { .. } | AdmitError::NeverFits { .. })
    }
}

/// Sampling parameters outside their ranges.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum SamplingError {
    /// Not a number in `0..=TEMPERATURE_MAX`.
    #[error("temperature is {0}; it must be a finite number from 0 to {max}", max = crate::sampling::TEMPERATURE_MAX)]
    Temperature(f32),
    /// Not a number in `(0, 1]`.
    #[error("top_p is {0}; it must be greater than 0 and at most 1")]
    TopP(f32),
    /// Not a number in `[0, 1]`.
    #[error("min_p is {0}; it must be from 0 to 1")]
    MinP(f32),
    /// An additive penalty that is not a number in its range.
    #[error("{name} is {value}; it must be from -{max} to {max}", max = crate::sampling::shaping::PENALTY_ABS_MAX)]
    Penalty {
        /// Which.
        name: &'static str,
        /// What was sent.
        value: f32,
    },
    /// Not a number in `[0, REPETITION_PENALTY_MAX]`.
    #[error("repetition_penalty is {0}; it must be greater than 0 and at most {max}", max = crate::sampling::shaping::REPETITION_PENALTY_MAX)]
    RepetitionPenalty(f32),
    /// A bias that is not a number in its range.
    #[error("a logit_bias is {0}; it must be from -{max} to {max}", max = crate::sampling::shaping::LOGIT_BIAS_ABS_MAX)]
    Bias(f32),
    /// A bias of a token that the model does not have.
    #[error("logit_bias names token {token}, but the model's ids are below {vocab_size}")]
    BiasToken {
        /// The offending id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// More biases than are taken.
    #[error("logit_bias has {0} tokens; at most {max} are taken", max = baton_proto::limits::LOGIT_BIAS_MAX)]
    TooManyBiases(usize),
    /// More likely tokens than are told.
    #[error("top_logprobs is {0}; at most {max} are told", max = baton_proto::limits::TOP_LOGPROBS_MAX)]
    TopLogprobs(u32),
}

impl SamplingError {
    /// The field of the wire's `Sampling` at fault.
    pub fn field(&self) -> &'static str {
        match self {
            SamplingError::Temperature(_) => "temperature",
            SamplingError::TopP(_) => "top_p",
            SamplingError::MinP(_) => "min_p",
            SamplingError::Penalty { name, .. } => name,
            SamplingError::RepetitionPenalty(_) => "repetition_penalty",
            SamplingError::Bias(_) | SamplingError::BiasToken { .. } | SamplingError::TooManyBiases(_) => "logit_bias",
            SamplingError::TopLogprobs(_) => "top_logprobs",
        }
    }
}

/// A step that could not be computed. None of its tokens count; the KV of its spans is undefined.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The batch contradicts the engine's limits: a scheduler and an engine that were not made for each other.
    #[error("the step's batch is invalid: {0}; this is a bug in the scheduler or its configuration")]
    InvalidBatch(String),
    /// The model failed.
    #[error("the model failed to compute a step: {0}")]
    Model(String),
    /// The engine can compute no further step, and its KV region must not be used again.
    #[error("the engine is lost: {0}")]
    Lost(String),
}
