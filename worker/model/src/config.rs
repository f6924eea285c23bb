//! A model's configuration, read from the files of the Hugging Face format: everything the decoder needs to know,
//! validated and bounded, so that no later arithmetic on it can overflow.
//!
//! Refuses, in one sentence, every architecture or feature that the decoder would compute wrongly. Reads no weights.

use crate::error::ModelError;
use crate::geometry::{KvDtype, KvGeometry};
use crate::gguf::{self, gguf_file};
use crate::json::{Object, config_error, read_bounded};
use crate::rope::RopeConfig;
use serde_json::Value;
use std::path::Path;

/// Larger than any real configuration (the largest are some kilobytes).
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// Bounds on dimensions: several times the largest published dense models, small enough that products fit 64 bits.
const VOCAB_MAX: usize = 1 << 22;
const HIDDEN_MAX: usize = 1 << 16;
const INTERMEDIATE_MAX: usize = 1 << 19;
const LAYERS_MAX: usize = 1 << 10;
const HEADS_MAX: usize = 1 << 10;
const HEAD_DIM_MAX: usize = 1 << 10;
/// Positions beyond 2^24 are not exact in f32.
const CONTEXT_MAX: usize = 1 << 24;
/// Published models list a handful of end tokens.
const EOS_IDS_MAX: usize = 64;

/// What is supported, for messages.
pub(crate) const SUPPORTED: &str = "supported are LlamaForCausalLM and Qwen2ForCausalLM with dense layers, full \
                                    attention, in f32, f16 or bf16 safetensors or in GGUF";

/// A family of decoders that this engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: as Llama, with biases on Q, K and V.
    Qwen2,
}

/// Everything the decoder needs to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub context_length: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Q, K and V have biases.
    pub qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub output_bias: bool,
    /// The feed-forward projections have biases.
    pub mlp_bias: bool,
    /// The head is the embedding.
    pub tied_embeddings: bool,
    /// Tokens that end a turn; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Element type of the KV cache. By default what the weights are stored in (`torch_dtype`), f32 if that is not said.
    pub kv_dtype: KvDtype,
}

impl ModelConfig {
    /// Reads the configuration of the model at `dir`: of a GGUF file (see [`gguf_file`]) its
    /// metadata, else `config.json` and, if there, `generation_config.json` (whose end tokens win).
    ///
    /// # Errors
    /// [`ModelError::Config`] for damaged files, [`ModelError::Unsupported`] for models this engine does not compute.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        if let Some(path) = gguf_file(dir)? {
            return gguf::config(&path);
        }
        let path = dir.join("config.json");
        let bytes = read_bounded(&path, CONFIG_BYTES_MAX)?.ok_or_else(|| ModelError::Config {
            path: path.clone(),
            reason: "the file is missing; a model directory needs config.json, tokenizer.json and safetensors".into(),
        })?;
        let mut config = Self::parse(&path, &bytes)?;
        let path = dir.join("generation_config.json");
        if let Some(bytes) = read_bounded(&path, CONFIG_BYTES_MAX)? {
            let value = parse_object(&path, &bytes)?;
            let object = as_object(&path, &value)?;
            if let Some(ids) = object.token_ids("eos_token_id", EOS_IDS_MAX, config.vocab_size)? {
                config.eos_token_ids = ids;
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        Self::parse(Path::new("config.json"), text.as_bytes())
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        Self::from_value(path, &parse_object(path, bytes)?)
    }

    /// From the JSON of a `config.json`, however it was come by; `path` is for messages.
    pub(crate) fn from_value(path: &Path, value: &Value) -> Result<Self, ModelError> {
        let object = as_object(path, value)?;
        let architecture = architecture(&object)?;
        refuse_unsupported(&object, architecture)?;

        let hidden_size = object.need_count("hidden_size", HIDDEN_MAX)?;
        let heads = object.need_count("num_attention_heads", HEADS_MAX)?;
        let kv_heads = object.count("num_key_value_heads", HEADS_MAX)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(object.error(format!(
                "`num_attention_heads` ({heads}) must be a multiple of `num_key_value_heads` ({kv_heads})"
            )));
        }
        let head_dim = match object.count("head_dim", HEAD_DIM_MAX)? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(object.error(format!(
                    "`hidden_size` ({hidden_size}) must be a multiple of `num_attention_heads` ({heads}) when \
                     `head_dim` is not given"
                )));
            }
        };
        if !head_dim.is_multiple_of(2) || head_dim > HEAD_DIM_MAX {
            return Err(object.error(format!(
                "the head size ({head_dim}) must be even and at most {HEAD_DIM_MAX}"
            )));
        }
        let context_length = object.count("max_position_embeddings", CONTEXT_MAX)?.unwrap_or(2048);
        let vocab_size = object.need_count("vocab_size", VOCAB_MAX)?;
        let attention_bias = object.flag("attention_bias")?.unwrap_or(false);
        let qwen = architecture == Architecture::Qwen2;
        let bos = object.token_ids("bos_token_id", 1, vocab_size)?.unwrap_or_default();
        Ok(ModelConfig {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: object.need_count("intermediate_size", INTERMEDIATE_MAX)?,
            layers: object.need_count("num_hidden_layers", LAYERS_MAX)?,
            heads,
            kv_heads,
            head_dim,
            context_length,
            rms_norm_eps: object.number("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6) as f32,
            rope: RopeConfig::parse(&object, context_length)?,
            qkv_bias: qwen || attention_bias,
            output_bias: !qwen && attention_bias,
            mlp_bias: !qwen && object.flag("mlp_bias")?.unwrap_or(false),
            tied_embeddings: object.flag("tie_word_embeddings")?.unwrap_or(false),
            eos_token_ids: object
                .token_ids("eos_token_id", EOS_IDS_MAX, vocab_size)?
                .unwrap_or_default(),
            bos_token_id: bos.first().copied(),
            kv_dtype: kv_dtype(&object)?,
        })
    }

    /// Shape of this model's KV arena with blocks of `block_size` tokens.
    pub fn kv_geometry(&self, block_size: usize) -> KvGeometry {
        KvGeometry {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            block_size,
            dtype: self.kv_dtype,
        }
    }

    /// Columns of the joint Q, K and V projection.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Feeds everything the computation depends on into `hasher`, in a fixed order.
    pub(crate) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        let sizes = [
            match self.architecture {
                Architecture::Llama => 1,
                Architecture::Qwen2 => 2,
            },
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            usize::from(self.qkv_bias),
            usize::from(self.output_bias),
            usize::from(self.mlp_bias),
            usize::from(self.tied_embeddings),
        ];
        for size in sizes {
            hasher.update(&(size as u64).to_le_bytes());
        }
        hasher.update(&self.rms_norm_eps.to_le_bytes());
        let (frequencies, scale) = self.rope.frequencies(self.head_dim);
        for value in frequencies.iter().chain([&scale]) {
            hasher.update(&value.to_le_bytes());
        }
    }
}

/// The type the model says it is stored in. Newer files call it `dtype`.
fn kv_dtype(object: &Object<'_>) -> Result<KvDtype, ModelError> {
    let name = match object.text("torch_dtype")? {
        Some(name) => Some(name),
        None => object.text("dtype")?,
    };
    Ok(match name {
        Some("bfloat16") => KvDtype::Bf16,
        Some("float16" | "half") => KvDtype::F16,
        _ => KvDtype::F32,
    })
}

fn parse_object(path: &Path, bytes: &[u8]) -> Result<Value, ModelError> {
    serde_json::from_slice(bytes).map_err(|e| config_error(path, format!("not valid JSON ({e})")))
}

fn as_object<'a>(path: &'a Path, value: &'a Value) -> Result<Object<'a>, ModelError> {
    let map = value
        .as_object()
        .ok_or_else(|| config_error(path, "it must be a JSON object"))?;
    Ok(Object { path, map })
}

fn architecture(object: &Object<'_>) -> Result<Architecture, ModelError> {
    let listed = object
        .get("architectures")
        .and_then(|v| v.get(0))
        .and_then(Value::as_str);
    let name = match (listed, object.text("model_type")?) {
        (Some(name), _) => name,
        (None, Some("llama")) => "LlamaForCausalLM",
        (None, Some("qwen2")) => "Qwen2ForCausalLM",
        (None, Some(other)) => other,
        (None, None) => return Err(object.error("it names neither `architectures` nor `model_type`")),
    };
    match name {
        "LlamaForCausalLM" => Ok(Architecture::Llama),
        "Qwen2ForCausalLM" => Ok(Architecture::Qwen2),
        other => {
            let shown: String = other.chars().take(80).collect();
            Err(ModelError::unsupported(format!(
                "its architecture is {shown}; {SUPPORTED}"
            )))
        }
    }
}

/// Names the first feature in use that the decoder does not compute.
fn refuse_unsupported(object: &Object<'_>, architecture: Architecture) -> Result<(), ModelError> {
    let refuse = |what: String| Err(ModelError::unsupported(format!("{what}; {SUPPORTED}")));
    if let Some(quantization) = object.get("quantization_config") {
        let method = quantization
            .get("quant_method")
            .and_then(Value::as_str)
            .unwrap_or("an unnamed method");
        let shown: String = method.chars().take(40).collect();
        return refuse(format!("its weights are quantized ({shown})"));
    }
    for key in [
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "num_experts_per_tok",
    ] {
        if object.get(key).and_then(Value::as_u64).is_some_and(|n| n > 0) {
            return refuse(format!("it is a mixture of experts (`{key}`)"));
        }
    }
    // Qwen2 configurations carry a window that is switched off; others have it in use when it is there.
    let windowed = object
        .flag("use_sliding_window")?
        .unwrap_or(architecture == Architecture::Llama);
    let context = object.count("max_position_embeddings", CONTEXT_MAX)?.unwrap_or(0);
    if windowed
        && object
            .get("sliding_window")
            .and_then(Value::as_u64)
            .is_some_and(|w| w < context as u64)
    {
        return refuse("it uses sliding-window attention (`sliding_window`)".into());
    }
    if let Some(Value::Array(kinds)) = object.get("layer_types")
        && kinds.iter().any(|k| k.as_str() != Some("full_attention"))
    {
        return refuse("some of its layers do not use full attention (`layer_types`)".into());
    }
    if let Some(act) = object.text("hidden_act")?
        && !matches!(act, "silu" | "swish")
    {
        let shown: String = act.chars().take(40).collect();
        return refuse(format!("its activation is `{shown}` where only silu is computed"));
    }
    for key in [
        "partial_rotary_factor",
        "attention_multiplier",
        "embedding_multiplier",
        "residual_multiplier",
    ] {
        if object.get(key).and_then(Value::as_f64).is_some_and(|f| f != 1.0) {
            return refuse(format!("it uses `{key}`"));
        }
    }
    Ok(())
}
