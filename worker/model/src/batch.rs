//! What one forward pass computes: ragged spans of tokens that mix prefill chunks and decodes.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::KvCache;

/// One sequence's part of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeqSpan {
    /// Position of the span's first token in its sequence; the K and V of all earlier positions are in `blocks`.
    pub start_pos: usize,
    /// Tokens of the span: one for a decode, more for a prefill chunk.
    pub len: usize,
    /// The sequence's block table from position 0 on, long enough for the span's last token.
    pub blocks: Vec<u32>,
    /// Whether the logits after the last token are wanted.
    pub logits: bool,
}

/// Tokens of all spans, one span after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForwardBatch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// How they divide into sequences.
    pub seqs: Vec<SeqSpan>,
}

impl ForwardBatch {
    /// Checks everything the kernels rely on.
    pub(crate) fn check(&self, config: &ModelConfig, kv: &KvCache) -> Result<(), ModelError> {
        let geometry = kv.geometry();
        if geometry != config.kv_geometry(geometry.block_size) {
            return Err(ModelError::batch("the KV cache has another geometry than the model"));
        }
        let mut tokens = 0usize;
        let mut written: Vec<u32> = Vec::new();
        for span in &self.seqs {
            let end = span
                .start_pos
                .checked_add(span.len)
                .filter(|end| *end <= config.context_length);
            let Some(end) = end.filter(|_| span.len > 0) else {
                return Err(ModelError::batch(format!(
                    "a span of {} tokens at position {} is empty or exceeds the context of {}",
                    span.len, span.start_pos, config.context_length
                )));
            };
            let needed = geometry.blocks_for(end);
            if span.blocks.len() < needed {
                return Err(ModelError::batch(format!(
                    "{} blocks cannot hold a sequence of {end} tokens",
                    span.blocks.len()
                )));
            }
            if let Some(block) = span.blocks.iter().find(|b| **b >= kv.blocks()) {
                return Err(ModelError::batch(format!(
                    "block {block} is outside a cache of {}",
                    kv.blocks()
                )));
            }
            written.extend(&span.blocks[span.start_pos / geometry.block_size..needed]);
            // Cannot overflow: every span is bounded by the context and there are fewer spans than addresses.
            tokens = tokens.saturating_add(span.len);
        }
        if tokens != self.tokens.len() {
            return Err(ModelError::batch(format!(
                "spans of {tokens} tokens for {} tokens",
                self.tokens.len()
            )));
        }
        if let Some(token) = self.tokens.iter().find(|t| **t as usize >= config.vocab_size) {
            return Err(ModelError::batch(format!(
                "token {token} is outside a vocabulary of {}",
                config.vocab_size
            )));
        }
        written.sort_unstable();
        if let Some(pair) = written.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ModelError::batch(format!("block {} would be written twice", pair[0])));
        }
        Ok(())
    }
}

/// Logits of a batch, one row for each span that wanted them, in the spans' order. Borrowed from the decoder's scratch.
#[derive(Debug)]
pub struct Logits<'a> {
    vocab: usize,
    data: &'a mut [f32],
}

impl<'a> Logits<'a> {
    pub(crate) fn new(vocab: usize, data: &'a mut [f32]) -> Self {
        Logits { vocab, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.vocab
    }

    /// Row `index`: one value per token of the vocabulary.
    ///
    /// # Panics
    /// If `index` is not below [`Logits::rows`].
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.vocab..(index + 1) * self.vocab]
    }

    /// Row `index`, to be changed in place by a sampler.
    ///
    /// # Panics
    /// As [`Logits::row`].
    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.data[index * self.vocab..(index + 1) * self.vocab]
    }
}
