//! Read-only memory maps of weight files, and tensors that lie in them. The only place where files become memory.

use crate::error::ModelError;
use baton_kernels::{Elements, StoredType, dequantize};
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

    /// All elements, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        dequantize(self.kind, self.bytes(), &mut out);
        out
    }

    /// Elements `start..start + out.len()` of `row` (of the outermost dimension), widened to f32. Rows of quantised types
    /// are decoded block by block.
    ///
    /// # Panics
    /// If they lie outside, or `start` cuts a block: shapes were checked when the model was loaded.
    pub fn read_row(&self, row: usize, start: usize, out: &mut [f32]) {
        let width: usize = self.shape.iter().skip(1).product();
        assert!(start + out.len() <= width, "a row has {width} elements");
        if self.kind.is_float() {
            return self.elements().widen_into(row * width + start, out);
        }
        let block = self.kind.block_elements();
        assert!(
            width.is_multiple_of(block) && start.is_multiple_of(block),
            "cuts a block"
        );
        let row_bytes = width / block * self.kind.block_bytes();
        let bytes = &self.bytes()[row * row_bytes + start / block * self.kind.block_bytes()..];
        let whole = out.len() / block * block;
        let whole_bytes = whole / block * self.kind.block_bytes();
        let (head, tail) = out.split_at_mut(whole);
        dequantize(self.kind, &bytes[..whole_bytes], head);
        if !tail.is_empty() {
            let mut last = vec![0.0; block];
            dequantize(
                self.kind,
                &bytes[whole_bytes..whole_bytes + self.kind.block_bytes()],
                &mut last,
            );
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }

    /// Gives the pages of the mapped file back to the system; they are read again when needed.
    #[allow(unsafe_code)]
    pub fn release_pages(&self) {
        #[cfg(unix)]
        if let Storage::Mapped(file, range) = &self.storage {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is file-backed, private and read-only: dropped pages come back with the same contents.
            let _ = unsafe { file.0.unchecked_advise_range(advice, range.start, range.len()) };
        }
    }
}
