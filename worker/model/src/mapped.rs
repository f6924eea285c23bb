//! Read-only memory maps of weight files, and tensors that lie in them. The only place where files become memory.

use crate::error::ModelError;
use baton_kernels::{StoredType, dequantize};
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
    /// In a file, with the rows of each head in ggml's rotary order.
    Paired(Arc<PairedRows>),
}

/// Rows of heads of `head_rows` rows each, stored pair by pair: rows `i` and `i + head_rows / 2` of a head, which the
/// rotary embedding turns together, lie next to each other.
#[derive(Debug)]
struct PairedRows {
    file: MappedFile,
    range: Range<usize>,
    head_rows: usize,
    row_bytes: usize,
}

impl PairedRows {
    fn row(&self, row: usize) -> &[u8] {
        let (head, row) = (row / self.head_rows, row % self.head_rows);
        let half = self.head_rows / 2;
        let stored = head * self.head_rows + 2 * (row % half) + row / half;
        &self.file.bytes()[self.range.clone()][stored * self.row_bytes..][..self.row_bytes]
    }
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
        let storage = Storage::Mapped(file.clone(), range);
        Tensor { kind, shape, storage }
    }

    /// A matrix, or a vector of floats, over `range` of a mapped file whose rows (the vector's elements), in heads of
    /// `head_rows`, lie pair by pair: `i` and `i + head_rows / 2` of a head are neighbours. The caller has checked that the
    /// range fits the shape and the file, that heads are whole and that `head_rows` is even and not zero.
    pub(crate) fn paired(
        kind: StoredType,
        shape: Vec<usize>,
        file: &MappedFile,
        range: Range<usize>,
        head_rows: usize,
    ) -> Self {
        let storage = Storage::Paired(Arc::new(PairedRows {
            file: file.clone(),
            head_rows,
            row_bytes: range.len() / shape[0],
            range,
        }));
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

    /// Whether the file has the rows in another order than [`Tensor::row_bytes`].
    pub(crate) fn is_reordered(&self) -> bool {
        matches!(self.storage, Storage::Paired(_))
    }

    /// All bytes, in the order of the file.
    pub fn stored_bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Mapped(file, range) => &file.bytes()[range.clone()],
            Storage::Paired(rows) => &rows.file.bytes()[rows.range.clone()],
        }
    }

    /// Number of rows, which run along the innermost dimension; a vector is one row.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The bytes of one row; whole blocks, if the type has any. Copies nothing.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        match &self.storage {
            Storage::Paired(rows) if self.shape.len() == 2 => rows.row(row),
            _ => {
                let bytes = self.stored_bytes();
                let len = bytes.len() / self.rows();
                &bytes[row * len..][..len]
            }
        }
    }

    /// All elements as f32: exact for the float types, decoded for the quantised ones.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        if values.is_empty() {
            return values;
        }
        // Of a reordered vector every element is a row of its own.
        let rows = if self.is_reordered() {
            self.shape[0]
        } else {
            self.rows()
        };
        let row_len = values.len() / rows;
        for (row, out) in values.chunks_exact_mut(row_len).enumerate() {
            match &self.storage {
                Storage::Paired(paired) => dequantize(self.kind, paired.row(row), out),
                Storage::Mapped(..) => dequantize(self.kind, self.row_bytes(row), out),
            }
        }
        values
    }

    /// Elements `start..start + out.len()` of `row`, widened to f32. Of quantised types `start` is a whole number of blocks.
    ///
    /// # Panics
    /// If they lie outside, or `start` cuts a block: shapes were checked when the model was loaded.
    pub fn read_row(&self, row: usize, start: usize, out: &mut [f32]) {
        let (block, block_bytes) = (self.kind.block_elements(), self.kind.block_bytes());
        assert!(start.is_multiple_of(block), "cuts a block");
        let bytes = &self.row_bytes(row)[start / block * block_bytes..];
        let (whole, tail) = out.split_at_mut(out.len() / block * block);
        let (whole_bytes, rest) = bytes.split_at(whole.len() / block * block_bytes);
        dequantize(self.kind, whole_bytes, whole);
        if !tail.is_empty() {
            let mut last = vec![0.0; block];
            dequantize(self.kind, &rest[..block_bytes], &mut last);
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }

    /// Gives the pages of the mapped file back to the system; they are read again when needed.
    #[allow(unsafe_code)]
    pub fn release_pages(&self) {
        #[cfg(unix)]
        {
            let (file, range) = match &self.storage {
                Storage::Mapped(file, range) => (file, range),
                Storage::Paired(rows) => (&rows.file, &rows.range),
            };
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is file-backed, private and read-only: dropped pages come back with the same contents.
            let _ = unsafe { file.0.unchecked_advise_range(advice, range.start, range.len()) };
        }
    }
}
