//! Limits of a scheduler, and the size of a KV pool from a byte budget.

use std::time::Duration;

use baton_model::KvGeometry;

use crate::error::ConfigError;

/// Default of [`SchedulerConfig::step_target`]. A step is what streams wait for between two tokens: half of the 300 ms
/// that still read as fluent, because a step's time is only estimated before.
pub const STEP_TARGET_DEFAULT: Duration = Duration::from_millis(150);

/// Limits and sizes of a scheduler. Start from [`SchedulerConfig::new`] and change fields.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Tokens per KV block.
    pub block_size: usize,
    /// Blocks of the pool.
    pub total_blocks: u32,
    /// Most tokens of a sequence, prompt and generated together.
    pub context_length: usize,
    /// Token ids of prompts must be below this.
    pub vocab_size: usize,
    /// Most tokens in one step: decodes take one each, prefill chunks share the rest. Larger steps prefill faster and
    /// make running streams wait longer for their next token. Must exceed `seqs_max`.
    pub batch_tokens_max: usize,
    /// How long a step that carries running streams shall take: prefill chunks are cut to fit, by the step times told to
    /// [`Scheduler::observe_step`](crate::Scheduler::observe_step). Zero sets no such limit.
    pub step_target: Duration,
    /// Longest prefill chunk of one sequence in one step.
    pub prefill_chunk_tokens_max: usize,
    /// Most sequences that hold blocks at once: running, filling, pushing and draining.
    pub seqs_max: usize,
    /// Length of the waiting queue from which `submit` refuses. Preempted sequences go back whatever its length (there
    /// are at most `seqs_max`), and count.
    pub waiting_max: usize,
    /// Uncached prompt tokens from which a remote prefill is asked for when the request allows one.
    pub remote_prefill_min_tokens: usize,
    /// Reuse KV of equal prefixes.
    pub prefix_cache: bool,
    /// Digest of the model, the first half of every prefix cache root.
    pub model_digest: [u8; 32],
}

impl SchedulerConfig {
    /// Sensible limits for a pool. `batch_tokens_max` 512 keeps a CPU step short; 64 sequences and 1024 waiting are
    /// beyond what one CPU worker serves in the seconds a client is ready to wait.
    pub fn new(block_size: usize, total_blocks: u32, context_length: usize, vocab_size: usize) -> Self {
        SchedulerConfig {
            block_size,
            total_blocks,
            context_length,
            vocab_size,
            batch_tokens_max: 512,
            step_target: STEP_TARGET_DEFAULT,
            prefill_chunk_tokens_max: 512,
            seqs_max: 64,
            waiting_max: 1024,
            remote_prefill_min_tokens: 1,
            prefix_cache: true,
            model_digest: [0; 32],
        }
    }

    /// Says which limit makes no sense, if one does.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("block_size", self.block_size),
            ("total_blocks", self.total_blocks as usize),
            ("vocab_size", self.vocab_size),
            ("prefill_chunk_tokens_max", self.prefill_chunk_tokens_max),
            ("seqs_max", self.seqs_max),
            ("waiting_max", self.waiting_max),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if self.context_length < 2 {
            return Err(ConfigError::ContextTooShort(self.context_length));
        }
        if self.batch_tokens_max <= self.seqs_max {
            return Err(ConfigError::BatchTooSmall {
                batch_tokens_max: self.batch_tokens_max,
                seqs_max: self.seqs_max,
            });
        }
        Ok(())
    }

    /// Most tokens a sequence can reach here: the context, or what the whole pool holds plus one sampled token whose
    /// KV nobody needs. It depends on nothing but the configuration, so where a sequence is cut does not depend on
    /// its batch mates (P1).
    pub fn length_max(&self) -> usize {
        let pool_tokens = self.block_size.saturating_mul(self.total_blocks as usize);
        self.context_length.min(pool_tokens.saturating_add(1))
    }
}

/// How many blocks of `geometry` a budget of `bytes` holds.
pub fn blocks_for_bytes(geometry: &KvGeometry, bytes: usize) -> Result<u32, ConfigError> {
    let block_bytes = geometry.block_bytes();
    match bytes / block_bytes.max(1) {
        0 => Err(ConfigError::KvBudgetTooSmall { bytes, block_bytes }),
        blocks => Ok(u32::try_from(blocks).unwrap_or(u32::MAX)),
    }
}
