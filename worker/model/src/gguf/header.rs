//! The header of a GGUF file: magic, version, metadata, and where each tensor lies. Everything is checked here, once,
//! so that later slices of the file cannot be out of range.

use super::cursor::{Cursor, Truncated};
use super::metadata::{BadValue, Metadata, Value};
use crate::error::ModelError;
use baton_kernels::StoredType;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Keys of published files are some dozen.
const KEYS_MAX: usize = 1 << 16;
/// The largest dense models have some thousand tensors.
const TENSORS_MAX: usize = 1 << 20;
/// The format's limit on names, for keys.
const KEY_BYTES_MAX: usize = 65_535;
/// Tensor names are at most 63 bytes in ggml; some slack.
const NAME_BYTES_MAX: usize = 1024;
/// ggml's `GGML_MAX_DIMS`.
const DIMS_MAX: usize = 4;
/// Header of the largest vocabularies (260k tokens with merges and scores) is about 20 MB.
const HEADER_BYTES_MAX: usize = 256 << 20;
/// Used where `general.alignment` is missing.
const ALIGNMENT_DEFAULT: u64 = 32;
/// Far above any page size.
const ALIGNMENT_MAX: u64 = 1 << 24;

/// A parsed header, borrowing from the file's bytes.
#[derive(Debug)]
pub(crate) struct Header<'a> {
    pub metadata: Metadata<'a>,
    pub tensors: BTreeMap<&'a str, TensorInfo>,
}

/// One tensor: what it is and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    pub kind: StoredType,
    /// Dimensions, outermost first (the file has them innermost first); at least one, none of them zero.
    pub shape: Vec<usize>,
    /// Which of the model's files it is in.
    pub part: usize,
    /// Bytes in the file; inside it, and apart from those of all other tensors.
    pub range: Range<usize>,
}

impl<'a> Header<'a> {
    /// Parses the header of the file `path` with these `bytes`, the model's file number `part`.
    ///
    /// # Errors
    /// [`ModelError::Gguf`] for anything damaged, [`ModelError::Unsupported`] for versions and weights not read here.
    pub fn parse(path: &'a Path, bytes: &'a [u8], part: usize) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::gguf(path, reason);
        let truncated = |_: Truncated| bad("its header is not whole".into());
        let mut cursor = Cursor::new(&bytes[..bytes.len().min(HEADER_BYTES_MAX)]);
        if cursor.take(4) != Ok(b"GGUF") {
            return Err(bad("it does not begin with `GGUF`".into()));
        }
        match cursor.u32().map_err(truncated)? {
            2 | 3 => {}
            1 => {
                return Err(unsupported(
                    path,
                    "is GGUF version 1, from 2023; get a newer conversion",
                ));
            }
            version if version & 0xffff == 0 => {
                return Err(unsupported(
                    path,
                    "is a big-endian GGUF file; get the usual little-endian one",
                ));
            }
            version => {
                let reason = format!("is GGUF version {version}; versions 2 and 3 are read");
                return Err(unsupported(path, &reason));
            }
        }
        // Sizes of the smallest tensor entry and of the smallest pair.
        let tensor_count = cursor.u64().map_err(truncated)?;
        let key_count = cursor.count(13).map_err(truncated)?;
        if key_count > KEYS_MAX || tensor_count > TENSORS_MAX as u64 {
            let reason = format!("it claims {key_count} keys and {tensor_count} tensors");
            return Err(bad(reason));
        }
        let metadata = read_metadata(path, &mut cursor, key_count)?;
        let alignment = metadata.unsigned("general.alignment")?.unwrap_or(ALIGNMENT_DEFAULT);
        if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
            return Err(bad(format!("its alignment is {alignment}")));
        }
        let mut raw = Vec::new();
        for _ in 0..tensor_count {
            raw.push(RawTensor::read(path, &mut cursor)?);
        }
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for tensor in raw {
            let range = tensor.range(path, bytes.len(), data_start, alignment)?;
            let info = TensorInfo {
                kind: tensor.kind,
                shape: tensor.shape,
                part,
                range,
            };
            if tensors.insert(tensor.name, info).is_some() {
                return Err(bad(format!("it has the tensor `{}` twice", shown(tensor.name))));
            }
        }
        let mut ranges: Vec<_> = tensors
            .iter()
            .map(|(name, t)| (t.range.start, t.range.end, name))
            .collect();
        ranges.sort_unstable();
        if let Some([first, second]) = ranges.array_windows().find(|[a, b]| a.1 > b.0) {
            let (first, second) = (shown(first.2), shown(second.2));
            return Err(bad(format!("its tensors `{first}` and `{second}` overlap")));
        }
        Ok(Header { metadata, tensors })
    }

    /// The tensor `name`.
    pub fn need(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        let missing = || ModelError::gguf(self.metadata.path, format!("its tensor `{name}` is missing"));
        self.tensors.get(name).ok_or_else(missing)
    }
}

fn unsupported(path: &Path, reason: &str) -> ModelError {
    ModelError::UnsupportedFormat {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

/// A name from the file, short enough for a message.
pub(super) fn shown(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(80).collect()
}

fn name<'a>(path: &Path, bytes: &'a [u8], bytes_max: usize) -> Result<&'a str, ModelError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.is_empty() && bytes.len() <= bytes_max => Ok(name),
        _ => Err(ModelError::gguf(
            path,
            "one of its names is empty, too long or not UTF-8",
        )),
    }
}

fn read_metadata<'a>(path: &'a Path, cursor: &mut Cursor<'a>, count: usize) -> Result<Metadata<'a>, ModelError> {
    let bad = |reason: String| ModelError::gguf(path, reason);
    let truncated = |_: Truncated| bad("its metadata is not whole".into());
    let mut values = BTreeMap::new();
    for _ in 0..count {
        let key = name(path, cursor.string().map_err(truncated)?, KEY_BYTES_MAX)?;
        let kind = cursor.u32().map_err(truncated)?;
        let value = Value::read(cursor, kind).map_err(|problem| {
            let key = shown(key);
            bad(match problem {
                BadValue::Truncated => format!("its `{key}` is not whole"),
                BadValue::UnknownType(kind) => format!("its `{key}` is of the unknown type {kind}"),
                BadValue::NotBool(byte) => format!("its `{key}` holds {byte} where true or false belongs"),
                BadValue::TooDeep => format!("its `{key}` is lists of lists too deep"),
            })
        })?;
        if values.insert(key, value).is_some() {
            return Err(bad(format!("it has the key `{}` twice", shown(key))));
        }
    }
    Ok(Metadata { path, values })
}

/// An entry of the tensor list.
struct RawTensor<'a> {
    name: &'a str,
    kind: StoredType,
    shape: Vec<usize>,
    offset: u64,
}

impl<'a> RawTensor<'a> {
    fn read(path: &Path, cursor: &mut Cursor<'a>) -> Result<Self, ModelError> {
        let truncated = |_: Truncated| ModelError::gguf(path, "its list of tensors is not whole");
        let name = name(path, cursor.string().map_err(truncated)?, NAME_BYTES_MAX)?;
        let bad = |reason: String| ModelError::gguf(path, format!("its tensor `{}` {reason}", shown(name)));
        let dims = cursor.u32().map_err(truncated)? as usize;
        if !(1..=DIMS_MAX).contains(&dims) {
            return Err(bad(format!("has {dims} dimensions")));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            match usize::try_from(cursor.u64().map_err(truncated)?) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => return Err(bad("has a dimension of impossible size".into())),
            }
        }
        shape.reverse();
        let kind = cursor.u32().map_err(truncated)?;
        let kind = stored_type(kind).ok_or_else(|| {
            ModelError::unsupported(format!(
                "its tensor `{}` is stored as ggml type {kind}; of the types in GGUF files, F32, F16, BF16, Q8_0, Q4_0, \
                 Q4_1, Q5_0, Q5_1 and Q2_K to Q6_K are supported",
                shown(name)
            ))
        })?;
        let offset = cursor.u64().map_err(truncated)?;
        Ok(RawTensor {
            name,
            kind,
            shape,
            offset,
        })
    }

    fn range(&self, path: &Path, file_bytes: usize, start: u64, alignment: u64) -> Result<Range<usize>, ModelError> {
        let bad = |reason: &str| ModelError::gguf(path, format!("its tensor `{}` {reason}", shown(self.name)));
        // A row is whole blocks, so the tensor is.
        let row = self.shape.last().and_then(|dim| self.kind.bytes_for(*dim));
        let row = row.ok_or_else(|| bad("has rows that are not whole blocks of its type"))?;
        let (_, outer) = self.shape.split_last().unwrap_or((&0, &[]));
        let bytes = outer.iter().try_fold(row, |bytes, dim| bytes.checked_mul(*dim));
        if !self.offset.is_multiple_of(alignment) {
            return Err(bad("is not aligned as the file says"));
        }
        let range = || {
            let start = usize::try_from(start.checked_add(self.offset)?).ok()?;
            let end = start.checked_add(bytes?)?;
            (end <= file_bytes).then_some(start..end)
        };
        range().ok_or_else(|| bad("lies beyond the end of the file"))
    }
}

/// Numbers of ggml's `ggml_type`.
fn stored_type(kind: u32) -> Option<StoredType> {
    Some(match kind {
        0 => StoredType::F32,
        1 => StoredType::F16,
        2 => StoredType::Q4_0,
        3 => StoredType::Q4_1,
        6 => StoredType::Q5_0,
        7 => StoredType::Q5_1,
        8 => StoredType::Q8_0,
        10 => StoredType::Q2K,
        11 => StoredType::Q3K,
        12 => StoredType::Q4K,
        13 => StoredType::Q5K,
        14 => StoredType::Q6K,
        30 => StoredType::Bf16,
        _ => return None,
    })
}
