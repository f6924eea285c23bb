//! Model directories that baton writes itself: the demo model, and the text side of a GGUF file.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

/// Makes sure that a directory with exactly these files lies under `models_dir` and returns it. It is called after `name`
/// and the content, so that other versions do not disturb it, and it appears whole or not at all.
pub fn place(models_dir: &Path, name: &str, files: &[(&str, &[u8])]) -> anyhow::Result<PathBuf> {
    let target = models_dir.join(format!("{name}-{}", &content_hash(files)[..16]));
    if is_intact(&target, files) {
        return Ok(target);
    }
    let staged = models_dir.join(format!(".{name}-{}", std::process::id()));
    let write = || {
        let _ = std::fs::remove_dir_all(&staged);
        std::fs::create_dir_all(&staged)?;
        for (name, content) in files {
            std::fs::write(staged.join(name), content)?;
        }
        if target.exists() {
            std::fs::remove_dir_all(&target)?;
        }
        std::fs::rename(&staged, &target)
    };
    write().with_context(|| format!("cannot write {}; is the disk full?", target.display()))?;
    Ok(target)
}

fn content_hash(files: &[(&str, &[u8])]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, content) in files {
        hasher.update(name.as_bytes());
        hasher.update(&(content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    hasher.finalize().to_hex().to_string()
}

fn is_intact(directory: &Path, files: &[(&str, &[u8])]) -> bool {
    files
        .iter()
        .all(|(name, content)| std::fs::read(directory.join(name)).is_ok_and(|found| found == *content))
}

/// The text side of the GGUF file `path`, which is what a coordinator reads, as a directory under `models_dir`.
pub fn place_gguf_text(path: &Path, models_dir: &Path) -> anyhow::Result<PathBuf> {
    let files = baton_model::gguf::text_files(path)?;
    let files = files.each_ref().map(|(name, text)| (*name, text.as_bytes()));
    // Only for people who look into the directory; long names would not fit a file system.
    let stem = path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
    let name: String = stem
        .chars()
        .take(60)
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    place(models_dir, &format!("gguf-{name}"), &files)
}

/// `baton convert-tokenizer`: writes the text side of a GGUF file to `directory`, where nothing of it may lie yet.
pub fn convert_tokenizer(path: &Path, directory: &Path) -> anyhow::Result<()> {
    let files = baton_model::gguf::text_files(path)?;
    let there = files
        .iter()
        .map(|(name, _)| directory.join(name))
        .find(|file| file.exists());
    if let Some(file) = there {
        bail!("{} is there already; give a new directory", file.display());
    }
    let write = || {
        std::fs::create_dir_all(directory)?;
        files
            .iter()
            .try_for_each(|(name, text)| std::fs::write(directory.join(name), text))
    };
    write().with_context(|| format!("cannot write to {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placed_once_and_repaired() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let models = directory.path().join("models");
        let files: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("tokenizer.json", b"[]")];
        let first = place(&models, "m", &files).expect("writable");
        assert!(is_intact(&first, &files));
        std::fs::write(first.join("config.json"), "").expect("writable");
        assert_eq!(place(&models, "m", &files).expect("writable"), first);
        assert!(is_intact(&first, &files), "a damaged copy is replaced");
        assert_ne!(place(&models, "m", &files[..1]).expect("writable"), first);
        let left: Vec<_> = std::fs::read_dir(&models).expect("it exists").collect();
        assert_eq!(left.len(), 2, "nothing staged is left behind");
    }

    #[test]
    fn nothing_is_overwritten() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let refused = convert_tokenizer(&directory.path().join("no.gguf"), directory.path());
        assert!(refused.expect_err("there is none").to_string().contains("no.gguf"));
    }
}
