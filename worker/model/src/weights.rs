//! A model's weights by name: which tensors make up which matrix, for all supported families.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::ModelFiles;
use crate::ops::{Ops, StackedPart};

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
    pub embedding: O::Matrix,
    pub layers: Vec<LayerWeights<O>>,
    pub norm: O::Vector,
    /// `None`: the head is the embedding.
    pub head: Option<O::Matrix>,
}

impl<O: Ops> Weights<O> {
    pub fn load(ops: &mut O, files: &ModelFiles, config: &ModelConfig) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.heads * config.head_dim;
        let kv = config.kv_heads * config.head_dim;
        let mut loader = Loader { ops, files };
        let embedding = loader.matrix(&[("model.embed_tokens", config.vocab_size)], hidden, false)?;
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
        let head = match config.tied_embeddings {
            true => None,
            false => Some(loader.matrix(&[("lm_head", config.vocab_size)], hidden, false)?),
        };
        Ok(Weights {
            embedding,
            layers,
            norm,
            head,
        })
    }

    /// The output head.
    pub fn head(&self) -> &O::Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

struct Loader<'a, O: Ops> {
    ops: &'a mut O,
    files: &'a ModelFiles,
}

impl<O: Ops> Loader<'_, O> {
    fn matrix<N: AsRef<str>>(&mut self, parts: &[(N, usize)], k: usize, bias: bool) -> Result<O::Matrix, ModelError> {
        let load = |(name, columns): &(N, usize)| {
            let name = name.as_ref();
            // The kernels take floats: quantised weights become f32 copies here, and nowhere else.
            let weights = self.files.need(&format!("{name}.weight"), &[*columns, k])?.to_float();
            let bias = match bias {
                true => Some(self.files.need(&format!("{name}.bias"), &[*columns])?.to_f32()),
                false => None,
            };
            Ok(StackedPart { weights, bias })
        };
        let parts = parts.iter().map(load).collect::<Result<Vec<_>, ModelError>>()?;
        self.ops.matrix(parts)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<O::Vector, ModelError> {
        let values = self.files.need(name, &[len])?.to_f32();
        self.ops.vector(values)
    }
}
