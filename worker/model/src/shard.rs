//! Tensor parallelism: which part of a model each rank holds and computes. Pure arithmetic, the same for every device.
//!
//! # Design
//!
//! After Megatron-LM (Shoeybi et al. 2019). Of each layer, a rank holds
//!
//! | matrix | cut | a rank's output |
//! |---|---|---|
//! | Q, K, V | by columns: whole heads | its own heads |
//! | attention output | by `k`: the elements of its heads | a partial sum, to be all-reduced |
//! | gate, up | by columns | its own part of the feed-forward width |
//! | down | by `k`: the same part | a partial sum, to be all-reduced |
//! | output head | by columns: a part of the vocabulary | its own logits, gathered by rank 0 |
//!
//! Norms, the residual stream and the embedding table are whole on every rank; rank 0 alone adds the bias of a matrix
//! that is cut by `k`. There are two all-reduces a layer and one gather a step.
//!
//! With fewer K/V heads than ranks, several ranks need the same K and V. Where ranks share one arena (CPU), the first of
//! them computes and writes K and V and all of them read; where each has its own (GPUs), all of them compute the
//! same bytes.
//!
//! # Invariants
//!
//! - The parts of a dimension tile it in rank order: every weight is used by exactly one rank, replicated K/V heads aside.
//! - The residual stream has the same bits on all ranks: every rank adds the same all-reduced sums in the same order.
//! - Whatever a rank computes, all-reduce included, is row by row (promise P1), so P1 holds at any degree. Degrees differ
//!   from each other by rounding: sums of parts are rounded where one sum was not, and int8 activations get a scale per
//!   part.
//! - The arena's bytes mean the same at any degree, so workers of different degrees may exchange blocks, and the
//!   compatibility digest does not cover the degree. But a request's tokens are the same on two workers only if their
//!   degrees are.
//! - The feed-forward width is cut at multiples of [`UNIT`], so that no quantisation group is.

use crate::config::ModelConfig;
use crate::error::ModelError;
use std::ops::Range;

/// Elements that stay together where a dimension is cut that may be quantised: a group of every weight format, a block of
/// GGUF's simple types, and a part with its own scale of its super-blocks.
pub const UNIT: usize = baton_kernels::packed::GROUP;

/// One of `size` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    rank: usize,
    size: usize,
}

impl Shard {
    /// The only rank of a model that is not sharded.
    pub const WHOLE: Shard = Shard { rank: 0, size: 1 };

    /// All ranks of a group, in order.
    pub fn all(size: usize) -> impl Iterator<Item = Shard> {
        (0..size).map(move |rank| Shard { rank, size })
    }

    /// This rank's number, below [`Shard::size`].
    pub fn rank(self) -> usize {
        self.rank
    }

    /// Ranks in the group: the degree of tensor parallelism.
    pub fn size(self) -> usize {
        self.size
    }

    /// This rank's share of `total` elements in multiples of `unit` (the last rank's may end in less), as even as that
    /// allows.
    fn split(self, total: usize, unit: usize) -> Range<usize> {
        let units = total.div_ceil(unit);
        let bound = |rank: usize| (units * rank / self.size * unit).min(total);
        bound(self.rank)..bound(self.rank + 1)
    }

    /// The K/V heads that this rank's query heads use, of a model's `kv_heads`: its even share, or one head that it has in
    /// common with other ranks. `None` if neither number divides the other.
    pub fn kv_heads(self, kv_heads: usize) -> Option<Range<usize>> {
        if kv_heads == 0 {
            return None;
        }
        if kv_heads.is_multiple_of(self.size) {
            return Some(self.split(kv_heads, 1));
        }
        let replicas = replicas(self.size, kv_heads)?;
        let head = self.rank / replicas;
        Some(head..head + 1)
    }

    /// Of [`Shard::kv_heads`], those that this rank writes where all ranks share an arena: each head has one writer.
    fn kv_heads_written(self, kv_heads: usize) -> Option<Range<usize>> {
        let heads = self.kv_heads(kv_heads)?;
        match replicas(self.size, kv_heads) {
            Some(replicas) if !self.rank.is_multiple_of(replicas) => Some(heads.end..heads.end),
            _ => Some(heads),
        }
    }
}

/// How many of `size` ranks have each K/V head in common, if there are fewer heads than ranks and they divide them.
pub(crate) fn replicas(size: usize, kv_heads: usize) -> Option<usize> {
    (size > kv_heads && size.is_multiple_of(kv_heads)).then(|| size / kv_heads)
}

/// The part of a model that a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSlices {
    /// Which rank's.
    pub shard: Shard,
    /// Query heads.
    pub heads: Range<usize>,
    /// K/V heads that its attention reads.
    pub kv_heads: Range<usize>,
    /// K/V heads that it computes and writes; none where another rank does it for this one.
    pub kv_heads_written: Range<usize>,
    /// Of the feed-forward width.
    pub inner: Range<usize>,
    /// Of the vocabulary: the logits it computes.
    pub vocab: Range<usize>,
    /// The whole vocabulary.
    pub vocab_size: usize,
}

impl ShardSlices {
    /// The whole model.
    pub fn whole(config: &ModelConfig) -> Self {
        ShardSlices {
            shard: Shard::WHOLE,
            heads: 0..config.heads,
            kv_heads: 0..config.kv_heads,
            kv_heads_written: 0..config.kv_heads,
            inner: 0..config.intermediate_size,
            vocab: 0..config.vocab_size,
            vocab_size: config.vocab_size,
        }
    }

    /// The parts of `size` ranks that share a KV arena, in rank order.
    ///
    /// # Errors
    /// [`ModelError::TensorParallel`], naming degrees that do divide the model.
    pub fn of_shared_arena(config: &ModelConfig, size: usize) -> Result<Vec<Self>, ModelError> {
        if !divides(config, size) {
            let possible: Vec<String> = (1..=config.heads)
                .filter(|n| divides(config, *n))
                .map(|n| n.to_string())
                .collect();
            return Err(ModelError::TensorParallel(format!(
                "a model of {} query heads, {} key/value heads and a feed-forward width of {} cannot be divided among {size} \
                 ranks; possible are {}",
                config.heads,
                config.kv_heads,
                config.intermediate_size,
                possible.join(", ")
            )));
        }
        let slices = |shard: Shard| {
            Some(ShardSlices {
                shard,
                heads: shard.split(config.heads, 1),
                kv_heads: shard.kv_heads(config.kv_heads)?,
                kv_heads_written: shard.kv_heads_written(config.kv_heads)?,
                inner: shard.split(config.intermediate_size, UNIT),
                vocab: shard.split(config.vocab_size, 1),
                vocab_size: config.vocab_size,
            })
        };
        let all: Option<Vec<Self>> = Shard::all(size).map(slices).collect();
        all.ok_or_else(|| ModelError::TensorParallel(format!("a model cannot be divided among {size} ranks")))
    }

    /// Columns of the joint Q, K and V projection.
    pub(crate) fn qkv_width(&self, head_dim: usize) -> usize {
        (self.heads.len() + 2 * self.kv_heads_written.len()) * head_dim
    }
}

/// Whether every rank of `size` gets a part of every dimension that is cut, and heads are whole.
fn divides(config: &ModelConfig, size: usize) -> bool {
    size > 0
        && config.heads.is_multiple_of(size)
        && Shard { rank: 0, size }.kv_heads(config.kv_heads).is_some()
        && config.intermediate_size.div_ceil(UNIT) >= size
        && config.vocab_size >= size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, kv_heads: usize, inner: usize) -> ModelConfig {
        let json = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 199, "hidden_size": 64, "intermediate_size": {inner},
            "num_hidden_layers": 1, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": 8}}"#
        );
        ModelConfig::from_json(&json).unwrap()
    }

    #[test]
    fn parts_tile_every_dimension() {
        for (heads, kv_heads, inner, size) in [
            (14, 2, 4864, 2),
            (14, 2, 4864, 7),
            (8, 8, 432, 4),
            (8, 1, 432, 2),
            (8, 2, 150, 4),
            (32, 8, 97, 4),
        ] {
            let config = config(heads, kv_heads, inner);
            if size == 7 {
                let error = ShardSlices::of_shared_arena(&config, size).unwrap_err().to_string();
                assert!(error.contains("possible are 1, 2, 14"), "{error}");
                continue;
            }
            let all = ShardSlices::of_shared_arena(&config, size).unwrap();
            assert_eq!(all.len(), size);
            let covers = |total: usize, part: fn(&ShardSlices) -> Range<usize>| {
                let covered: Vec<usize> = all.iter().flat_map(part).collect();
                assert_eq!(covered, (0..total).collect::<Vec<_>>());
            };
            covers(heads, |s| s.heads.clone());
            covers(kv_heads, |s| s.kv_heads_written.clone());
            covers(inner, |s| s.inner.clone());
            covers(199, |s| s.vocab.clone());
            for slices in &all {
                assert!(!slices.heads.is_empty() && !slices.inner.is_empty() && !slices.kv_heads.is_empty());
                assert!(slices.inner.start.is_multiple_of(UNIT));
                // The K/V head that a query head uses is among those this rank reads.
                let group = heads / kv_heads;
                assert_eq!(slices.heads.start / group, slices.kv_heads.start);
                assert_eq!((slices.heads.end - 1) / group, slices.kv_heads.end - 1);
            }
        }
    }

    #[test]
    fn what_does_not_divide_is_refused() {
        for (config, size) in [
            (config(8, 2, 432), 3),
            (config(8, 2, 432), 0),
            (config(12, 4, 432), 6),
            (config(8, 8, 48), 4),
            (config(8, 2, 432), 4096),
        ] {
            let error = ShardSlices::of_shared_arena(&config, size).unwrap_err();
            assert!(matches!(error, ModelError::TensorParallel(_)), "{error}");
        }
    }
}
