//! A model's weights by name: which tensors, or which of their columns or rows, make up which matrix of a rank, for all
//! supported families.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::{EMBEDDING, HEAD, ModelFiles};
use crate::mapped::Tensor;
use crate::ops::{Ops, StackedPart};
use crate::progress::{Progress, Stage};
use crate::shard::{ShardSlices, UNIT};
use std::ops::Range;

/// One transformer layer on a device.
pub(crate) struct LayerWeights<O: Ops> {
    pub input_norm: O::Vector,
    pub qkv: O::Matrix,
    pub output: O::Matrix,
    pub mlp_norm: O::Vector,
    pub gate_up: O::Matrix,
    pub down: O::Matrix,
}

/// A model on a device.
pub(crate) struct Weights<O: Ops> {
    pub embedding: O::Table,
    pub layers: Vec<LayerWeights<O>>,
    pub norm: O::Vector,
    pub head: O::Matrix,
}

impl<O: Ops> Weights<O> {
    pub fn load(
        ops: &mut O,
        files: &ModelFiles,
        config: &ModelConfig,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        let slices = ops.slices().clone();
        let ShardSlices {
            shard,
            heads,
            kv_heads_written,
            ..
        } = &slices;
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        let whole = || Cut::whole(hidden);
        let q = || Cut::heads(config.heads, heads, dim);
        let kv = || Cut::heads(config.kv_heads, kv_heads_written, dim);
        let inner = || Cut::new(config.intermediate_size, slices.inner.clone());
        // The bias of a sum over all ranks is added by one of them.
        let adds_bias = shard.rank() == 0;
        let mut loader = Loader {
            ops,
            files,
            progress,
            done: 0,
            total: files.weight_bytes(),
        };
        let layers = (0..config.layers).map(|index| {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let attention = |part: &str| name(&format!("self_attn.{part}_proj"));
            let mlp = |part: &str| name(&format!("mlp.{part}_proj"));
            let qkv = [(attention("q"), q()), (attention("k"), kv()), (attention("v"), kv())];
            let gate_up = [(mlp("gate"), inner()), (mlp("up"), inner())];
            Ok(LayerWeights {
                input_norm: loader.vector(&name("input_layernorm.weight"), hidden)?,
                qkv: loader.matrix(&qkv, &whole(), config.qkv_bias, false)?,
                output: loader.matrix(
                    &[(attention("o"), whole())],
                    &q(),
                    config.output_bias && adds_bias,
                    false,
                )?,
                mlp_norm: loader.vector(&name("post_attention_layernorm.weight"), hidden)?,
                gate_up: loader.matrix(&gate_up, &whole(), config.mlp_bias, false)?,
                down: loader.matrix(&[(mlp("down"), whole())], &inner(), config.mlp_bias && adds_bias, false)?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>, ModelError>>()?;
        let norm = loader.vector("model.norm.weight", hidden)?;
        let head = if config.tied_embeddings { EMBEDDING } else { HEAD };
        let head = head.trim_end_matches(".weight");
        let vocab = Cut::new(config.vocab_size, slices.vocab.clone());
        let head = loader.matrix(&[(head, vocab)], &whole(), false, true)?;
        let embedding = files.need(EMBEDDING, &[config.vocab_size, hidden])?;
        let embedding = loader.ops.table(embedding)?;
        progress.update(Stage::Load, loader.total, loader.total);
        Ok(Weights {
            embedding,
            layers,
            norm,
            head,
        })
    }
}

/// A dimension of a tensor, and the part of it that is taken.
struct Cut {
    total: usize,
    taken: Range<usize>,
}

impl Cut {
    fn new(total: usize, taken: Range<usize>) -> Self {
        Cut { total, taken }
    }

    fn whole(total: usize) -> Self {
        Cut::new(total, 0..total)
    }

    /// Some of `total` heads of `dim` elements.
    fn heads(total: usize, heads: &Range<usize>, dim: usize) -> Self {
        Cut::new(total * dim, heads.start * dim..heads.end * dim)
    }

    /// Whether no quantised group of `UNIT` elements is cut.
    fn keeps_groups(&self) -> bool {
        let ends = [self.taken.start, self.taken.end];
        ends.iter().all(|end| end.is_multiple_of(UNIT) || *end == self.total)
    }
}

struct Loader<'a, O: Ops> {
    ops: &'a mut O,
    files: &'a ModelFiles,
    progress: &'a dyn Progress,
    done: u64,
    total: u64,
}

impl<O: Ops> Loader<'_, O> {
    /// Parts stacked along the columns (one of no columns is left out), all cut alike along `k`.
    fn matrix<N: AsRef<str>>(
        &mut self,
        parts: &[(N, Cut)],
        k: &Cut,
        bias: bool,
        head: bool,
    ) -> Result<O::Matrix, ModelError> {
        let load = |(name, columns): &(N, Cut)| {
            let name = name.as_ref();
            let weights = self.files.need(&format!("{name}.weight"), &[columns.total, k.total])?;
            if !weights.kind().is_float() && !k.keeps_groups() {
                return Err(ModelError::TensorParallel(format!(
                    "a rank's part of `{name}` would cut its quantised groups of {UNIT}; choose another degree"
                )));
            }
            let bias = match bias {
                true => {
                    let all = self.files.need(&format!("{name}.bias"), &[columns.total])?.to_f32();
                    Some(all[columns.taken.clone()].to_vec())
                }
                false => None,
            };
            Ok(StackedPart {
                weights,
                columns: columns.taken.clone(),
                k: k.taken.clone(),
                bias,
            })
        };
        let parts = parts.iter().map(load).collect::<Result<Vec<_>, ModelError>>()?;
        let tensors: Vec<Tensor> = parts.iter().map(|p| p.weights.clone()).collect();
        let parts = parts.into_iter().filter(|p| !p.columns.is_empty()).collect();
        let matrix = self.ops.matrix(parts, head)?;
        for tensor in tensors {
            self.done += tensor.stored_bytes().len() as u64;
            tensor.release_pages();
        }
        self.progress.update(Stage::Load, self.done.min(self.total), self.total);
        Ok(matrix)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<O::Vector, ModelError> {
        let values = self.files.need(name, &[len])?.to_f32();
        self.ops.vector(values)
    }
}
