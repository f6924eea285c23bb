//! The demo model that ships inside the binary, so that the first run needs no download. Made by `demo/train`.

use anyhow::Context;
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

/// Makes sure that the demo model lies under `models_dir` and returns its directory. The directory is named after the
/// content, so another version of the binary does not disturb it, and it appears whole or not at all.
pub fn extract(models_dir: &Path) -> anyhow::Result<PathBuf> {
    let target = models_dir.join(format!("{NAME}-{}", &content_hash()[..16]));
    if is_intact(&target) {
        return Ok(target);
    }
    let staged = models_dir.join(format!(".{NAME}-{}", std::process::id()));
    let write = || {
        let _ = std::fs::remove_dir_all(&staged);
        std::fs::create_dir_all(&staged)?;
        for (name, content) in FILES {
            std::fs::write(staged.join(name), content)?;
        }
        if target.exists() {
            std::fs::remove_dir_all(&target)?;
        }
        std::fs::rename(&staged, &target)
    };
    write().with_context(|| format!("cannot write the demo model to {}; is the disk full?", target.display()))?;
    Ok(target)
}

fn content_hash() -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, content) in FILES {
        hasher.update(name.as_bytes());
        hasher.update(&(content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    hasher.finalize().to_hex().to_string()
}

fn is_intact(directory: &Path) -> bool {
    FILES
        .iter()
        .all(|(name, content)| std::fs::read(directory.join(name)).is_ok_and(|found| found == *content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extracted_once_and_repaired() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let models = directory.path().join("models");
        let first = extract(&models).expect("writable");
        assert!(is_intact(&first));
        std::fs::write(first.join("config.json"), "{}").expect("writable");
        assert_eq!(extract(&models).expect("writable"), first);
        assert!(is_intact(&first), "a damaged copy is replaced");
        let left: Vec<_> = std::fs::read_dir(&models).expect("it exists").collect();
        assert_eq!(left.len(), 1, "nothing staged is left behind");
    }
}
