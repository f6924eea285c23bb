//! The demo model that ships inside the binary, so that the first run needs no download. Made by `demo/train`.

use crate::model_dir;
use std::path::{Path, PathBuf};

/// `--prefill-threshold` for the demo model: one KV block. Its prompts are short, and whoever tries baton for the first
/// time is to see the hand-over at work, not the shortcut that a large model's router would take.
pub const PREFILL_THRESHOLD_TOKENS: u32 = 16;

/// Name under which the demo model is served.
pub const NAME: &str = "baton-demo";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../demo/model/", $name)).as_slice())),*]
    };
}

/// Everything a model directory needs.
const FILES: [(&str, &[u8]); 5] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Makes sure that the demo model lies under `models_dir` and returns its directory.
pub fn extract(models_dir: &Path) -> anyhow::Result<PathBuf> {
    model_dir::place(models_dir, NAME, &FILES)
}
