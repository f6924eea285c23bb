//! A model's weights by name: which tensors make up which matrix, for all supported families.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::{EMBEDDING, HEAD, ModelFiles};
use crate::mapped::Tensor;
use crate::ops::{Ops, StackedPart};
use crate::progress::{Progress, Stage};

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
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.heads * config.head_dim;
        let kv = config.kv_heads * config.head_dim;
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
            let qkv = [(attention("q"), q), (attention("k"), kv), (attention("v"), kv)];
            Ok(LayerWeights {
                input_norm: loader.vector(&name("input_layernorm.weight"), hidden)?,
                qkv: loader.matrix(&qkv, hidden, config.qkv_bias)?,
                output: loader.matrix(&[(attention("o"), hidden)], q, config.output_bias)?,
                mlp_norm: loader.vector(&name("post_attention_layernorm.weight"), hidden)?,
                gate_up: loader.matrix(&[(mlp("gate"), inner), (mlp("up"), inner)], hidden, config.mlp_bias)?,
                down: loader.matrix(&[(mlp("down"), hidden)], inner, config.mlp_bias)?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>, ModelError>>()?;
        let norm = loader.vector("model.norm.weight", hidden)?;
        let head = if config.tied_embeddings { EMBEDDING } else { HEAD };
        let head = head.trim_end_matches(".weight");
        let head = loader.load_matrix(&[(head, config.vocab_size)], hidden, false, true)?;
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

struct Loader<'a, O: Ops> {
    ops: &'a mut O,
    files: &'a ModelFiles,
    progress: &'a dyn Progress,
    done: u64,
    total: u64,
}

impl<O: Ops> Loader<'_, O> {
    fn matrix<N: AsRef<str>>(&mut self, parts: &[(N, usize)], k: usize, bias: bool) -> Result<O::Matrix, ModelError> {
        self.load_matrix(parts, k, bias, false)
    }

    fn load_matrix<N: AsRef<str>>(
        &mut self,
        parts: &[(N, usize)],
        k: usize,
        bias: bool,
        head: bool,
    ) -> Result<O::Matrix, ModelError> {
        let load = |(name, columns): &(N, usize)| {
            let name = name.as_ref();
            let weights = self.files.need(&format!("{name}.weight"), &[*columns, k])?;
            let bias = match bias {
                true => Some(self.files.need(&format!("{name}.bias"), &[*columns])?.to_f32()),
                false => None,
            };
            Ok(StackedPart {
                weights,
                columns: 0..*columns,
                k: 0..k,
                bias,
            })
        };
        let parts = parts.iter().map(load).collect::<Result<Vec<_>, ModelError>>()?;
        let tensors: Vec<Tensor> = parts.iter().map(|p| p.weights.clone()).collect();
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
