//! What one step of a model has to read and to compute, from its configuration: the yardstick for fractions of the
//! machine's limits. Counts what is unavoidable, not what an implementation happens to do.

use baton_kernels::WeightFormat;
use baton_kernels::limits::Arithmetic;
use baton_model::{KvGeometry, ModelConfig, ModelFiles, Quantization};

/// Costs of a model in one weight format.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Bytes of the weights every decode step reads: all matrices, without an embedding of its own.
    pub weight_bytes: u64,
    /// Bytes of K and V of one token, all layers.
    pub kv_bytes_per_token: u64,
    /// Weights that multiply every token: all matrices of the layers.
    pub layer_weights: u64,
    /// Weights of the head, which multiply sampled tokens only.
    pub head_weights: u64,
    /// Multiply-adds of one query with one key and value, all heads and layers.
    pub attention_pair: u64,
    /// Arithmetic the format can be multiplied with; the fastest that the CPU has is its limit.
    pub arithmetic: Vec<Arithmetic>,
}

impl Costs {
    /// Costs of a model loaded with this quantisation.
    pub fn of(config: &ModelConfig, files: &ModelFiles, geometry: &KvGeometry, quantization: Quantization) -> Self {
        let embedding = files.tensor("model.embed_tokens.weight");
        let lookup_bytes = match config.tied_embeddings {
            true => 0,
            false => embedding.map_or(0, |table| table.stored_bytes().len() as u64),
        };
        let layer = files.tensor("model.layers.0.mlp.up_proj.weight");
        let arithmetic = match layer.map(|matrix| quantization.format(matrix.kind(), false)) {
            Some(WeightFormat::Bf16) => vec![Arithmetic::Bf16Dot, Arithmetic::F32Fma],
            Some(WeightFormat::F32 | WeightFormat::F16) | None => vec![Arithmetic::F32Fma],
            Some(_) => vec![Arithmetic::Int8Dot],
        };
        let [hidden, inner, layers, vocab] = [
            config.hidden_size,
            config.intermediate_size,
            config.layers,
            config.vocab_size,
        ]
        .map(|dim| dim as u64);
        let heads_width = (config.heads * config.head_dim) as u64;
        Costs {
            weight_bytes: files.packed_bytes(config, quantization) - lookup_bytes,
            kv_bytes_per_token: (geometry.block_bytes() / geometry.block_size) as u64,
            layer_weights: layers * hidden * (config.qkv_width() as u64 + heads_width + 3 * inner),
            head_weights: hidden * vocab,
            attention_pair: 2 * layers * heads_width,
            arithmetic,
        }
    }

    /// Operations (a multiply-add is two) of `tokens` tokens that attend to `pairs` positions in all, `sampled` of which
    /// are sampled from.
    pub fn operations(&self, tokens: u64, pairs: u64, sampled: u64) -> f64 {
        let linear = tokens as f64 * self.layer_weights as f64 + sampled as f64 * self.head_weights as f64;
        2.0 * (linear + pairs as f64 * self.attention_pair as f64)
    }
}
