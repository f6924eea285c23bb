//! The tensors of a GGUF file under the names the loader asks for, with the rows of q and k in the order it expects.

use super::config::{ROPE_FACTORS, has_paired_rows};
use super::header::shown;
use super::parts::Parts;
use crate::config::SUPPORTED;
use crate::error::ModelError;
use crate::mapped::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// Maps a GGUF model and names its tensors as Hugging Face does.
///
/// llama.cpp's converter stores q and k of llama models with the two halves of each head interleaved, because ggml
/// rotates neighbouring rows; that is undone (see [`Tensor::paired`]).
///
/// # Errors
/// As [`config()`](super::config()); [`ModelError::Unsupported`] for tensors that the decoder would ignore.
pub(crate) fn tensors(path: &Path) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let files = Parts::open(path)?;
    let header = files.header()?;
    let metadata = &header.metadata;
    let paired = has_paired_rows(metadata)?;
    let architecture = metadata.need_text("general.architecture")?;
    let key = |rest: &str| format!("{architecture}.{rest}");
    let layers = metadata.need_per_layer(&key("block_count"))?;
    let heads = metadata.need_per_layer(&key("attention.head_count"))?;
    let kv_heads = metadata.per_layer(&key("attention.head_count_kv"))?.unwrap_or(heads);
    let mut tensors = BTreeMap::new();
    for (name, info) in &header.tensors {
        if is_derived(name) {
            continue;
        }
        let found = hugging_face_name(name, layers).ok_or_else(|| {
            let reason = format!(
                "it has a tensor `{}` that is not computed with; {SUPPORTED}",
                shown(name)
            );
            ModelError::unsupported(reason)
        })?;
        let file = files.file(info.part);
        let (range, shape) = (info.range.clone(), info.shape.clone());
        let heads = match name.rsplit('.').nth(1) {
            Some("attn_q") => Some(heads),
            Some("attn_k") => Some(kv_heads),
            _ => None,
        };
        let tensor = match heads.filter(|_| paired) {
            Some(heads) => {
                let rows = shape[0];
                let pairs = usize::try_from(heads)
                    .ok()
                    .and_then(|h| h.checked_mul(2))
                    .filter(|h| *h > 0);
                let whole = match shape.len() {
                    1 => info.kind.is_float(),
                    dims => dims == 2,
                };
                if !whole || !pairs.is_some_and(|pairs| rows.is_multiple_of(pairs)) {
                    let reason = format!(
                        "its tensor `{}` of shape {shape:?} in {} does not hold {heads} heads",
                        shown(name),
                        info.kind
                    );
                    return Err(ModelError::gguf(path, reason));
                }
                Tensor::paired(info.kind, shape, file, range, rows / heads as usize)
            }
            None => Tensor::new(info.kind, shape, file, range),
        };
        tensors.insert(found, tensor);
    }
    Ok(tensors)
}

/// Tensors that hold what the configuration says already: rotary factors (read with the configuration) and, in files
/// of 2023, the plain rotary frequencies.
fn is_derived(name: &str) -> bool {
    name == ROPE_FACTORS || name.ends_with(".attn_rot_embd.weight")
}

/// Names of a layer's modules.
const MODULES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn hugging_face_name(name: &str, layers: u64) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, part) = rest.split_once('.')?;
    let number: u64 = layer.parse().ok().filter(|n| *n < layers)?;
    // `blk.01` would collide with `blk.1`.
    let canonical = number.to_string() == layer;
    let known = canonical && matches!(part, "weight" | "bias") && !(module.ends_with("_norm") && part == "bias");
    let (_, module) = MODULES.iter().find(|(theirs, _)| known && *theirs == module)?;
    Some(format!("model.layers.{number}.{module}.{part}"))
}
