//! Everything of the backend that can be compared with the CPU, as rows of a table: each op, whole models, promise P1,
//! leaks, and how fast it is. `baton gpu-check` runs every row in a process of its own, so that one that crashes, hangs or
//! breaks the device says so and the others still run.
//!
//! Inputs are ragged and random, from a seed that is printed; outputs are poisoned with NaN before; references are computed
//! in f64 from the very values that the device is given, so that tolerances are small and a wrong index cannot hide.

mod model;
mod ops;
mod speed;

use crate::driver::{DeviceError, Driver};
use crate::ops::{CudaOps, OpsOptions};
use baton_model::{ModelConfig, ModelError, Quantization};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What a row needs.
pub struct Context<'a, D: Driver> {
    /// Opens the device anew.
    pub open: &'a dyn Fn() -> Result<D, DeviceError>,
    /// Of everything random.
    pub seed: u64,
    /// A small real model, for rows that compare whole models.
    pub model: PathBuf,
    /// A folder for gigabytes of random weights, which is left empty.
    pub scratch: PathBuf,
    /// Layers of the models whose speed is measured; 32 is all of Llama-3.1-8B.
    pub layers: usize,
    /// Tokens that the greedy row generates.
    pub greedy_tokens: usize,
}

/// How a row ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether everything was as it must be; `None` for a figure that is only told.
    pub passed: Option<bool>,
    /// What was compared, or measured.
    pub detail: String,
}

impl Outcome {
    fn figure(detail: String) -> Self {
        Outcome { passed: None, detail }
    }

    fn verdict(passed: bool, detail: String) -> Self {
        Outcome {
            passed: Some(passed),
            detail,
        }
    }
}

/// Why a row could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The device's.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model's, or the device's through the op seam.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file of the random model.
    #[error("cannot write the random model: {0}")]
    Io(#[from] std::io::Error),
    /// No such row.
    #[error("there is no row {0:?}")]
    Unknown(String),
}

type RowResult = Result<Outcome, CheckError>;
type RowFn<D> = fn(&Context<'_, D>) -> RowResult;

/// All rows, the quickest and most telling first: name, and whether it measures speed.
fn rows<D: Driver>() -> Vec<(&'static str, bool, RowFn<D>)> {
    vec![
        ("kernels load", false, ops::load),
        ("embed", false, ops::embed),
        ("rms_norm", false, ops::rms_norm),
        ("silu_mul", false, ops::silu_mul),
        ("gather", false, ops::gather),
        ("linear f32", false, ops::linear_f32),
        ("linear bf16", false, ops::linear_bf16),
        ("linear f16", false, ops::linear_f16),
        ("linear int8", false, ops::linear_int8),
        ("linear int8 groups", false, ops::linear_group8),
        ("linear int4 groups", false, ops::linear_group4),
        ("linear int4 minima", false, ops::linear_group4_min),
        ("rope and kv bf16", false, ops::rope_bf16),
        ("rope and kv f32", false, ops::rope_f32),
        ("attention bf16 128", false, ops::attention_bf16_128),
        ("attention f16 64", false, ops::attention_f16_64),
        ("attention f32 96", false, ops::attention_f32_96),
        ("model logits", false, model::logits),
        ("model logits int8", false, model::logits_int8),
        ("model logits int4", false, model::logits_int4),
        ("greedy tokens", false, model::greedy),
        ("P1 batch and chunk", false, model::same_bits),
        ("P1 graph", false, model::same_bits_as_graph),
        ("kv in host memory", false, model::host_kv),
        ("leak", false, model::leak),
        ("memory bandwidth", true, speed::bandwidth),
        ("bf16 matmul", true, speed::matmul),
        ("llama-8b shape", true, speed::llama_8b),
        ("qwen-0.5b shape", true, speed::qwen_half_b),
    ]
}

/// Names of the rows in order, and whether each measures speed.
pub fn names() -> Vec<(&'static str, bool)> {
    rows::<crate::CudaDriver>()
        .into_iter()
        .map(|(name, speed, _)| (name, speed))
        .collect()
}

/// Runs one row.
///
/// # Errors
/// What kept it from being finished; the row has failed.
pub fn run<D: Driver>(name: &str, context: &Context<'_, D>) -> RowResult {
    let row = rows::<D>().into_iter().find(|(row, ..)| *row == name);
    let (.., run) = row.ok_or_else(|| CheckError::Unknown(name.into()))?;
    run(context)
}

fn options(rows_max: usize) -> OpsOptions {
    OpsOptions {
        quantization: Quantization::None,
        rows_max,
        threads: std::thread::available_parallelism().map_or(1, usize::from).min(16),
        graphs: true,
    }
}

/// Ops for a model of these heads, for rows that test ops alone.
fn bare_ops<D: Driver>(
    context: &Context<'_, D>,
    dtype: &str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rows_max: usize,
) -> Result<CudaOps<D>, CheckError> {
    let config = format!(
        r#"{{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_act":"silu","vocab_size":64,
        "hidden_size":64,"intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":{heads},
        "num_key_value_heads":{kv_heads},"head_dim":{head_dim},"max_position_embeddings":65536,"rms_norm_eps":1e-5,
        "rope_theta":10000.0,"tie_word_embeddings":true,"torch_dtype":"{dtype}"}}"#
    );
    let config = ModelConfig::from_json(&config)?;
    Ok(CudaOps::new((context.open)()?, &config, options(rows_max))?)
}

/// Root of the mean square of the differences, in units of that of what is wanted. NaN fails every comparison.
fn relative_error(found: &[f32], wanted: &[f64]) -> f64 {
    if found.len() != wanted.len() {
        return f64::NAN;
    }
    let difference: f64 = found.iter().zip(wanted).map(|(f, w)| (f64::from(*f) - w).powi(2)).sum();
    let size: f64 = wanted.iter().map(|w| w * w).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}
