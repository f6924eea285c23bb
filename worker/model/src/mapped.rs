//! Read-only memory maps of weight files, and tensors that lie in them. The only place where files become memory.

use crate::error::ModelError;
use baton_kernels::{Elements, StoredType};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A mapped file.
#[derive(Debug, Clone)]
pub(crate) struct MappedFile(Arc<memmap2::Mmap>);

impl MappedFile {
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = std::fs::File::open(path).map_err(|e| ModelError::io(path, e))?;
        let metadata = file.metadata().map_err(|e| ModelError::io(path, e))?;
        if !metadata.is_file() {
            return Err(ModelError::weights(path, "it is not a regular file"));
        }
        // SAFETY: the map is private and read-only. Whoever owns the model directory must not truncate or rewrite a
        // file in place while a worker serves it (replacing it by rename is fine); that is documented for operators.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| ModelError::io(path, e))?;
        Ok(MappedFile(Arc::new(map)))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Where a tensor's elements lie.
#[derive(Debug, Clone)]
enum Storage {
    Mapped(MappedFile, Range<usize>),
    /// A copy, for tensors that the file does not align to their elements (old writers).
    Copied(Arc<Vec<u32>>, usize),
}

/// A stored tensor: type, shape and elements, kept alive by reference counting.
#[derive(Debug, Clone)]
pub struct Tensor {
    kind: StoredType,
    shape: Vec<usize>,
    storage: Storage,
}

impl Tensor {
    /// A tensor over `range` of a mapped file; the caller has checked that it fits the shape and the file.
    pub(crate) fn new(kind: StoredType, shape: Vec<usize>, file: &MappedFile, range: Range<usize>) -> Self {
        let bytes = &file.bytes()[range.clone()];
        let storage = if Elements::from_bytes(kind, bytes).is_ok() {
            Storage::Mapped(file.clone(), range)
        } else {
            // Whole words, so that the copy is aligned for every element type.
            let mut words = vec![0u32; bytes.len().div_ceil(4)];
            bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
            Storage::Copied(Arc::new(words), bytes.len())
        };
        Tensor { kind, shape, storage }
    }

    /// Element type.
    pub fn kind(&self) -> StoredType {
        self.kind
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes as stored.
    pub fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Mapped(file, range) => &file.bytes()[range.clone()],
            Storage::Copied(words, len) => &bytemuck::cast_slice(words)[..*len],
        }
    }

    /// The elements as stored.
    pub fn elements(&self) -> Elements<'_> {
        // Alignment was checked, or made, in `new`; an empty tensor stands in for the impossible.
        Elements::from_bytes(self.kind, self.bytes()).unwrap_or(Elements::F32(&[]))
    }
}
