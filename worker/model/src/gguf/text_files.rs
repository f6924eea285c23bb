//! The text side of a GGUF file as the files of a Hugging Face model directory: what a coordinator reads of a model.

use super::config::config_json;
use super::parts::Parts;
use super::tokenizer::tokenizer_json;
use super::vocabulary::Vocabulary;
use crate::config::SUPPORTED;
use crate::error::ModelError;
use serde_json::{Map, Value as Json, json};
use std::path::Path;

/// What a coordinator reads of the model's configuration. The rest stays out: it is complete only with the tensors.
const CONFIG_KEYS: [&str; 6] = [
    "architectures",
    "model_type",
    "vocab_size",
    "max_position_embeddings",
    "eos_token_id",
    "bos_token_id",
];

/// Names and contents of `config.json`, `generation_config.json`, `tokenizer.json` and `tokenizer_config.json` (with the
/// chat template) for the model in the GGUF file `path`. The same file always gives the same text.
///
/// # Errors
/// [`ModelError::Gguf`] for damaged files, [`ModelError::Unsupported`] for models and tokenizers that baton cannot serve,
/// or that have no chat template.
pub fn text_files(path: &Path) -> Result<[(&'static str, String); 4], ModelError> {
    let files = Parts::open(path)?;
    let header = files.header()?;
    let metadata = &header.metadata;
    let mut config = config_json(&header)?;
    if let Some(keys) = config.as_object_mut() {
        keys.retain(|key, _| CONFIG_KEYS.contains(&key.as_str()));
    }
    let rows = header.need("token_embd.weight")?.shape[0];
    let vocabulary = Vocabulary::read(metadata, rows)?;
    let template = metadata.text("tokenizer.chat_template")?.ok_or_else(|| {
        let reason = format!("it has no chat template (`tokenizer.chat_template`), so it cannot chat; {SUPPORTED}");
        ModelError::unsupported(reason)
    })?;
    let mut tokenizer_config = Map::new();
    for name in ["bos", "eos", "unk", "pad"] {
        tokenizer_config.insert(format!("{name}_token"), json!(vocabulary.special(metadata, name)?));
    }
    tokenizer_config.insert("chat_template".into(), json!(template));
    // The maker's recommendations, where the converter kept them.
    let generation_config = json!({
        "temperature": metadata.number("general.sampling.temp")?,
        "top_p": metadata.number("general.sampling.top_p")?,
        "top_k": metadata.unsigned("general.sampling.top_k")?,
    });
    let text = |value: &Json| format!("{value:#}\n");
    Ok([
        ("config.json", text(&config)),
        ("generation_config.json", text(&generation_config)),
        ("tokenizer.json", text(&tokenizer_json(metadata, &vocabulary)?)),
        ("tokenizer_config.json", text(&Json::Object(tokenizer_config))),
    ])
}
