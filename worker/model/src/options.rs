//! How a model is to be loaded: threads, and what its weights become in memory.

use baton_kernels::{PoolConfig, StoredType, WeightFormat};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What the weight matrices become when they are loaded. The embedding table stays as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As stored: floats stay floats, GGUF's quantised types stay as exact as they are.
    #[default]
    None,
    /// W8A8: int8 weights with a scale per output channel, int8 activations with a scale per token; the output head gets
    /// a scale per 32 elements instead, as logits are read by everyone.
    Int8,
    /// 4-bit weights with a scale per 32 elements and int8 activations; the head as for int8.
    Int4,
}

impl Quantization {
    /// The format of a matrix stored as `kind`; `head` for the output head.
    pub fn format(self, kind: StoredType, head: bool) -> WeightFormat {
        match (self, kind) {
            (Quantization::Int8 | Quantization::Int4, _) if head => WeightFormat::Group8,
            (Quantization::Int8, _) => WeightFormat::Int8,
            (Quantization::Int4, _) => WeightFormat::Group4,
            (Quantization::None, StoredType::F32) => WeightFormat::F32,
            (Quantization::None, StoredType::F16) => WeightFormat::F16,
            (Quantization::None, StoredType::Bf16) => WeightFormat::Bf16,
            (Quantization::None, StoredType::Q4_0) => WeightFormat::Group4,
            (Quantization::None, StoredType::Q4_1 | StoredType::Q4K) => WeightFormat::Group4Min,
            // Q8_0 exactly. The others have fewer bits; eight per element add an error far below their own.
            (Quantization::None, _) => WeightFormat::Group8,
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quantization::None => "none",
            Quantization::Int8 => "int8",
            Quantization::Int4 => "int4",
        })
    }
}

impl std::str::FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Quantization::None),
            "int8" => Ok(Quantization::Int8),
            "int4" => Ok(Quantization::Int4),
            other => Err(format!("`{other}` is not one of none, int8, int4")),
        }
    }
}

/// How to load a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    /// Compute threads of all ranks together, the one that calls `forward` included.
    pub threads: usize,
    /// Whether threads may spin between jobs (see [`PoolConfig::spin`]).
    pub spin: bool,
    /// What the weights become.
    pub quantization: Quantization,
    /// Ranks the model is divided among (see [`TensorParallel`](crate::TensorParallel)); 1 for a whole model.
    pub tensor_parallel: usize,
}

impl LoadOptions {
    /// A whole model, weights as stored, on this many threads.
    pub fn threads(threads: usize) -> Self {
        LoadOptions {
            threads,
            spin: true,
            quantization: Quantization::None,
            tensor_parallel: 1,
        }
    }

    /// The kernels' thread pool.
    pub(crate) fn pool(&self) -> PoolConfig {
        PoolConfig {
            spin: self.spin,
            ..self.threads.into()
        }
    }
}
