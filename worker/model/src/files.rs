//! The weight files of a model: found, mapped, validated, and digested. Nothing is converted: weights stay as stored
//! until a kernel reads them. What GGUF files look like is known to `gguf/`.

use crate::error::ModelError;
use crate::gguf::{self, gguf_file};
use crate::json::read_bounded;
use crate::mapped::{MappedFile, Tensor};
use crate::options::Quantization;
use crate::progress::{Progress, Stage};
use crate::{ModelConfig, config::SUPPORTED};
use baton_kernels::StoredType;
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// The index of the largest published models is some hundred kilobytes.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Largest published models have fewer than two hundred shards.
const SHARDS_MAX: usize = 4096;
/// Tensors of one model; the largest dense ones have some thousand.
const TENSORS_MAX: usize = 1 << 20;
/// Up to this many bytes of weights the digest covers all of them; beyond, a sample (see [`ModelFiles::digest`]).
const FULL_DIGEST_BYTES_MAX: u64 = 256 << 20;
/// Bytes of one sampled window, and windows per tensor.
const SAMPLE_BYTES: usize = 16 << 10;
const SAMPLES_PER_TENSOR: usize = 16;

/// The tensors of a model directory.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    dir: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

/// The embedding table's tensor.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output head's, unless it is the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

impl ModelFiles {
    /// Maps and validates the weights at `dir`: a GGUF file (see [`gguf_file`]), or of a directory
    /// `model.safetensors.index.json` and its shards, or `model.safetensors`, or a lone `*.safetensors`.
    ///
    /// # Errors
    /// [`ModelError::Weights`] if files are missing or damaged, [`ModelError::UnsupportedFormat`] if the weights are
    /// there in another format only.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let tensors = match gguf_file(dir)? {
            Some(path) => gguf::tensors(&path)?,
            None => open_safetensors(dir)?,
        };
        if tensors.is_empty() || tensors.len() > TENSORS_MAX {
            return Err(ModelError::weights(dir, format!("it has {} tensors", tensors.len())));
        }
        Ok(ModelFiles {
            dir: dir.to_owned(),
            tensors,
        })
    }

    /// The directory, or the GGUF file.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensor `name`, if there.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The tensor `name`, which must have this shape.
    ///
    /// # Errors
    /// [`ModelError::Weights`] naming the tensor.
    pub fn need(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let tensor = self.tensor(name).ok_or_else(|| {
            ModelError::weights(
                &self.dir,
                format!("the tensor `{name}` is missing; the download may be incomplete"),
            )
        })?;
        if tensor.shape() != shape {
            let reason = format!(
                "the tensor `{name}` has shape {:?} where {shape:?} is needed",
                tensor.shape()
            );
            return Err(ModelError::weights(&self.dir, reason));
        }
        Ok(tensor.clone())
    }

    /// Bytes of all tensors, as stored.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.stored_bytes().len() as u64).sum()
    }

    /// Bytes of memory the weights take once loaded: matrices packed in their formats, and the embedding table as stored.
    pub fn packed_bytes(&self, config: &ModelConfig, quantization: Quantization) -> u64 {
        let packed = |name: &str, tensor: &Tensor| match *tensor.shape() {
            [columns, k] => {
                let embedding = name == EMBEDDING;
                let head = name == HEAD || (embedding && config.tied_embeddings);
                let format = quantization.format(tensor.kind(), head);
                let packed = format.bytes(columns, k).map_or(u64::MAX, |b| b as u64);
                match embedding && !config.tied_embeddings {
                    true => tensor.stored_bytes().len() as u64,
                    false => packed,
                }
            }
            _ => tensor.stored_bytes().len() as u64,
        };
        let sizes = self.tensors.iter().map(|(name, tensor)| packed(name, tensor));
        sizes.fold(0, u64::saturating_add)
    }

    /// What two workers must have in common to exchange KV blocks: blake3 over the configuration, the quantisation, all tensor names,
    /// types and shapes, and their contents. Above 256 MiB of weights the contents are sampled: of each tensor, 16
    /// windows of 16 KiB, evenly spaced from its first to its last byte (all of it if it is smaller); so weights that
    /// differ only between the windows are not told apart.
    pub fn digest(&self, config: &ModelConfig, quantization: Quantization, progress: &dyn Progress) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("baton 2026 model digest");
        config.hash_into(&mut hasher);
        hasher.update(quantization.to_string().as_bytes());
        let total = self.weight_bytes();
        let full = total <= FULL_DIGEST_BYTES_MAX;
        let mut done = 0;
        for (name, tensor) in &self.tensors {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(tensor.kind().to_string().as_bytes());
            if tensor.is_reordered() {
                hasher.update(b" reordered");
            }
            for dim in tensor.shape() {
                hasher.update(&(*dim as u64).to_le_bytes());
            }
            let bytes = tensor.stored_bytes();
            if full || bytes.len() <= SAMPLES_PER_TENSOR * SAMPLE_BYTES {
                hasher.update(bytes);
            } else {
                for sample in 0..SAMPLES_PER_TENSOR {
                    let start = (bytes.len() - SAMPLE_BYTES) / (SAMPLES_PER_TENSOR - 1) * sample;
                    hasher.update(&bytes[start..start + SAMPLE_BYTES]);
                }
                hasher.update(&bytes[bytes.len() - SAMPLE_BYTES..]);
            }
            done += bytes.len() as u64;
            progress.update(Stage::Digest, done, total);
        }
        *hasher.finalize().as_bytes()
    }
}

fn open_safetensors(dir: &Path) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let index = dir.join("model.safetensors.index.json");
    match read_bounded(&index, INDEX_BYTES_MAX)? {
        Some(bytes) => open_sharded(dir, &index, &bytes),
        None => open_file(&single_file(dir)?),
    }
}

/// The one weights file of a directory without an index.
fn single_file(dir: &Path) -> Result<PathBuf, ModelError> {
    let usual = dir.join("model.safetensors");
    if usual.is_file() {
        return Ok(usual);
    }
    let entries = std::fs::read_dir(dir).map_err(|e| ModelError::io(dir, e))?;
    let names: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).take(10_000).collect();
    let with = |wanted: &str| {
        names
            .iter()
            .filter(|p| p.extension().is_some_and(|e| e == wanted))
            .collect::<Vec<_>>()
    };
    match with("safetensors")[..] {
        [only] => return Ok(only.clone()),
        [] => {}
        _ => {
            let reason = "it has several safetensors files but no model.safetensors.index.json to say how they fit \
                          together; the download may be incomplete";
            return Err(ModelError::weights(dir, reason));
        }
    }
    if let Some(file) = with("bin").first() {
        return Err(ModelError::UnsupportedFormat {
            path: (*file).clone(),
            reason: "holds weights as PyTorch pickles, which can run code; use the model's safetensors version".into(),
        });
    }
    Err(ModelError::weights(
        dir,
        "it has no safetensors file; the download may be incomplete",
    ))
}

/// Opens the shards that the index names and takes from each the tensors it is said to hold.
fn open_sharded(dir: &Path, index: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|e| ModelError::weights(index, format!("it is not valid JSON ({e})")))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| ModelError::weights(index, "`weight_map` is missing or not an object"))?;
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| is_plain_name(f)).ok_or_else(|| {
            ModelError::weights(
                index,
                format!("the shard of tensor `{tensor}` must be a plain file name"),
            )
        })?;
        shards.entry(file).or_default().insert(tensor);
    }
    if shards.len() > SHARDS_MAX {
        return Err(ModelError::weights(
            index,
            format!("it names {} shards, more than {SHARDS_MAX}", shards.len()),
        ));
    }
    let mut tensors = BTreeMap::new();
    for (file, wanted) in shards {
        let path = dir.join(file);
        let mut held = open_file(&path)?;
        for name in wanted {
            let tensor = held
                .remove(name)
                .ok_or_else(|| ModelError::weights(&path, format!("the index places tensor `{name}` here")))?;
            tensors.insert(name.to_owned(), tensor);
        }
    }
    Ok(tensors)
}

/// Whether a name from an index or a listing is one normal path component: no directories, no way out.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) && !name.contains(['/', '\\', '\0'])
}

fn open_file(path: &Path) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let file = MappedFile::open(path)?;
    let bytes = file.bytes();
    // Checks that the header is sane and that tensors fill the file without gap or overlap.
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| {
        ModelError::weights(
            path,
            format!("it is not a valid safetensors file ({e}); the download may be incomplete"),
        )
    })?;
    let mut tensors = BTreeMap::new();
    for (name, view) in parsed.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => StoredType::F32,
            Dtype::F16 => StoredType::F16,
            Dtype::BF16 => StoredType::Bf16,
            // Integer tensors (position ids of old checkpoints) are not weights.
            Dtype::I64 | Dtype::I32 | Dtype::BOOL => continue,
            other => {
                return Err(ModelError::unsupported(format!(
                    "its tensor `{name}` is stored as {other:?}; {SUPPORTED}"
                )));
            }
        };
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let range = start..start + view.data().len();
        tensors.insert(name.to_owned(), Tensor::new(kind, view.shape().to_vec(), &file, range));
    }
    Ok(tensors)
}
