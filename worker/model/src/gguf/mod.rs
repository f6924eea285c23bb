//! GGUF files, the one-file format of llama.cpp: header, configuration, tensors, tokenizer. Layout after the format's
//! specification (`docs/gguf.md` in the ggml repository), versions 2 and 3, little-endian.
//!
//! A GGUF file is turned into what the rest of baton reads anyway: its metadata into a Hugging Face configuration, its
//! tensors into Hugging Face names and row order, its vocabulary into a `tokenizer.json`. Weights stay mapped and
//! quantised; nothing is computed here.
//!
//! The header is parsed by hand, over the mapped bytes, and not by candle's reader: that one turns every metadata value
//! into an owned, tagged value (tens of bytes for each element of a token list) before anybody knows which are wanted,
//! repairs bad UTF-8 silently, and checks neither that tensors lie apart nor that names are unique. Here strings and
//! arrays are views of the map, and memory grows only with the number of keys and tensors, both bounded.

mod config;
mod cursor;
mod header;
mod metadata;
mod parts;
mod tensors;
mod text_files;
mod tokenizer;
mod vocabulary;

pub(crate) use config::config;
pub(crate) use tensors::tensors;
pub use text_files::text_files;

use crate::error::ModelError;
use std::path::{Path, PathBuf};

/// Entries of a directory looked at for weights.
const ENTRIES_MAX: usize = 10_000;

/// The GGUF file that a model path means: the path itself if it is a `.gguf` file, or the only one of a directory that
/// has no safetensors; of a model in parts (`-00001-of-00003.gguf`) the first. `None`: the path is something else.
///
/// # Errors
/// [`ModelError::UnsupportedFormat`] if a directory has several of them and no safetensors.
pub fn gguf_file(path: &Path) -> Result<Option<PathBuf>, ModelError> {
    let has_extension = |path: &Path, wanted: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(wanted));
    if !path.is_dir() {
        return Ok((has_extension(path, "gguf") && path.is_file()).then(|| path.to_owned()));
    }
    let entries = std::fs::read_dir(path).map_err(|e| ModelError::io(path, e))?;
    let mut found = Vec::new();
    for entry in entries.take(ENTRIES_MAX) {
        let entry = entry.map_err(|e| ModelError::io(path, e))?.path();
        if has_extension(&entry, "safetensors") {
            return Ok(None);
        }
        if has_extension(&entry, "gguf") {
            found.push(entry);
        }
    }
    found.retain(|file| parts::part_name(file).is_none_or(|(_, number, _)| number == 1));
    match found.len() {
        0 => Ok(None),
        1 => Ok(found.pop()),
        several => Err(ModelError::UnsupportedFormat {
            path: path.to_owned(),
            reason: format!("holds {several} GGUF files; give the path of the one to serve"),
        }),
    }
}
