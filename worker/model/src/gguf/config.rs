//! From GGUF metadata to a model configuration: the keys are spelled as Hugging Face spells them and go through the
//! same validation. What only the tensors tell (biases, tied embeddings, llama 3's rotary factors) is read off them.

use super::header::{Header, shown};
use super::metadata::Metadata;
use super::parts::Parts;
use super::vocabulary::end_tokens;
use crate::config::{ModelConfig, SUPPORTED};
use crate::error::ModelError;
use crate::mapped::Tensor;
use crate::rope::RopeScaling;
use baton_kernels::StoredType;
use serde_json::{Map, Value as Json, json};
use std::path::Path;

/// The tensor of factors by which llama 3 divides its rotary frequencies.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The configuration of the model in a GGUF file.
///
/// # Errors
/// [`ModelError::Gguf`] for damaged files, [`ModelError::Unsupported`] for models this engine does not compute.
pub(crate) fn config(path: &Path) -> Result<ModelConfig, ModelError> {
    let files = Parts::open(path)?;
    let header = files.header()?;
    let mut config = ModelConfig::from_value(path, &config_json(&header)?)?;
    let any = |ending: &str| header.tensors.keys().any(|name| name.ends_with(ending));
    config.qkv_bias |= ["q", "k", "v"].iter().any(|part| any(&format!(".attn_{part}.bias")));
    config.output_bias = any(".attn_output.bias");
    config.mlp_bias = ["gate", "up", "down"]
        .iter()
        .any(|part| any(&format!(".ffn_{part}.bias")));
    if let Some(info) = header.tensors.get(ROPE_FACTORS) {
        let factors = Tensor::new(info.kind, info.shape.clone(), files.file(info.part), info.range.clone()).to_f32();
        if factors.len() != config.head_dim / 2 || !factors.iter().all(|f| (1e-6..=1e6).contains(f)) {
            return Err(ModelError::gguf(path, format!("its `{ROPE_FACTORS}` is not usable")));
        }
        if config.rope.scaling != RopeScaling::Plain {
            let reason = format!("it scales rotary frequencies twice, by metadata and by `{ROPE_FACTORS}`");
            return Err(ModelError::unsupported(reason));
        }
        config.rope.scaling = RopeScaling::Divided {
            factors: factors.into(),
        };
    }
    Ok(config)
}

/// The metadata as a Hugging Face `config.json`.
pub(super) fn config_json(header: &Header<'_>) -> Result<Json, ModelError> {
    let metadata = &header.metadata;
    let (architecture, name) = architecture(metadata)?;
    refuse_unsupported(metadata, name)?;
    let key = |rest: &str| format!("{name}.{rest}");
    let embedding = header.need("token_embd.weight")?;
    let [vocab, hidden] = embedding.shape[..] else {
        let reason = format!("its token embedding has {} dimensions", embedding.shape.len());
        return Err(ModelError::gguf(metadata.path, reason));
    };
    if metadata.need_per_layer(&key("embedding_length"))? != hidden as u64 {
        let reason = "its `embedding_length` is not the width of its token embedding";
        return Err(ModelError::gguf(metadata.path, reason));
    }
    let heads = metadata.need_per_layer(&key("attention.head_count"))?;
    let kv_heads = metadata.per_layer(&key("attention.head_count_kv"))?.unwrap_or(heads);
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| config.insert(key.to_owned(), value);
    // What K and V are kept in by default.
    let dtype = match embedding.kind {
        StoredType::F32 => "float32",
        StoredType::Bf16 => "bfloat16",
        _ => "float16",
    };
    set("torch_dtype", json!(dtype));
    set("architectures", json!([architecture]));
    set("model_type", json!(name));
    set("vocab_size", json!(vocab));
    set("hidden_size", json!(hidden));
    set(
        "intermediate_size",
        json!(metadata.need_per_layer(&key("feed_forward_length"))?),
    );
    set(
        "num_hidden_layers",
        json!(metadata.need_per_layer(&key("block_count"))?),
    );
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(kv_heads));
    set(
        "max_position_embeddings",
        json!(metadata.need_per_layer(&key("context_length"))?),
    );
    set(
        "tie_word_embeddings",
        json!(!header.tensors.contains_key("output.weight")),
    );
    set("eos_token_id", json!(end_tokens(metadata)?));
    let bos = metadata.unsigned("tokenizer.ggml.bos_token_id")?;
    set("bos_token_id", json!(bos.filter(|id| *id < vocab as u64)));
    let eps = metadata.number(&key("attention.layer_norm_rms_epsilon"))?;
    set("rms_norm_eps", json!(eps));
    set("rope_theta", json!(metadata.number(&key("rope.freq_base"))?));
    let head_dim = metadata.unsigned(&key("attention.key_length"))?;
    let head_dim = head_dim.or_else(|| (hidden as u64).checked_div(heads));
    for other in ["attention.value_length", "rope.dimension_count"] {
        if let Some(size) = metadata.unsigned(&key(other))?
            && Some(size) != head_dim
        {
            let reason = format!(
                "its `{}` is not the size of its attention heads; {SUPPORTED}",
                key(other)
            );
            return Err(ModelError::unsupported(reason));
        }
    }
    if metadata.get(&key("attention.key_length")).is_some() {
        set("head_dim", json!(head_dim));
    }
    if let Some(scaling) = rope_scaling(metadata, name)? {
        set("rope_scaling", scaling);
    }
    Ok(Json::Object(config))
}

/// The families computed here, by GGUF's and by Hugging Face's name.
fn architecture(metadata: &Metadata<'_>) -> Result<(&'static str, &'static str), ModelError> {
    match metadata.need_text("general.architecture")? {
        "llama" => Ok(("LlamaForCausalLM", "llama")),
        "qwen2" => Ok(("Qwen2ForCausalLM", "qwen2")),
        other => {
            let reason = format!("its architecture is `{}`; {SUPPORTED}", shown(other));
            Err(ModelError::unsupported(reason))
        }
    }
}

/// Whether q and k rows are stored in ggml's rotary order, pair by pair (`llama` only).
pub(super) fn has_paired_rows(metadata: &Metadata<'_>) -> Result<bool, ModelError> {
    Ok(architecture(metadata)?.1 == "llama")
}

/// Names the first feature in use that the decoder does not compute.
fn refuse_unsupported(metadata: &Metadata<'_>, name: &str) -> Result<(), ModelError> {
    // Key, and the value that changes nothing.
    for (key, neutral) in [
        ("expert_count", 0.0),
        ("expert_used_count", 0.0),
        ("attention.sliding_window", 0.0),
        ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0),
        ("attention.scale", 0.0),
        ("attention.temperature_length", 0.0),
        ("logit_scale", 1.0),
        ("residual_scale", 1.0),
        ("embedding_scale", 1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
    ] {
        let key = format!("{name}.{key}");
        // Zero means "not used" in all of them.
        if metadata.number(&key)?.is_some_and(|n| n != neutral && n != 0.0) {
            return Err(ModelError::unsupported(format!("it uses `{key}`; {SUPPORTED}")));
        }
    }
    if metadata.flag(&format!("{name}.attention.causal"))? == Some(false) {
        return Err(ModelError::unsupported(format!(
            "its attention is not causal; {SUPPORTED}"
        )));
    }
    Ok(())
}

/// Hugging Face's `rope_scaling`.
fn rope_scaling(metadata: &Metadata<'_>, name: &str) -> Result<Option<Json>, ModelError> {
    let number = |rest: &str| metadata.number(&format!("{name}.rope.{rest}"));
    let kind = metadata.text(&format!("{name}.rope.scaling.type"))?;
    let factor = number("scaling.factor")?;
    // Files of 2023 have only this.
    let old = number("scale_linear")?.filter(|factor| *factor != 1.0);
    Ok(match (kind, old) {
        (Some("none"), _) | (None, None) => None,
        (None, Some(factor)) => Some(json!({"rope_type": "linear", "factor": factor})),
        (Some("yarn"), _) => Some(json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": number("scaling.original_context_length")?,
            // Converters copy Hugging Face's `attention_factor` here.
            "attention_factor": number("scaling.yarn_attn_factor")?,
            "beta_fast": number("scaling.yarn_beta_fast")?,
            "beta_slow": number("scaling.yarn_beta_slow")?,
        })),
        (Some(kind), _) => Some(json!({"rope_type": shown(kind), "factor": factor})),
    })
}
