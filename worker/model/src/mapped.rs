//! Read-only memory maps of weight files, and tensors that lie in them. The only place where files become memory.

use crate::error::ModelError;
use baton_kernels::{Elements, StoredType, dequantize};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

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
    /// A copy, for tensors that the file does not align to their elements (old writers), and for converted ones.
    Copied(Arc<Vec<u32>>, usize),
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
    /// All rows in order, made when somebody asks for them in one piece.
    ordered: OnceLock<Vec<u32>>,
}

impl PairedRows {
    fn row(&self, row: usize) -> &[u8] {
        let (head, row) = (row / self.head_rows, row % self.head_rows);
        let half = self.head_rows / 2;
        let stored = head * self.head_rows + 2 * (row % half) + row / half;
        &self.file.bytes()[self.range.clone()][stored * self.row_bytes..][..self.row_bytes]
    }

    fn ordered(&self) -> &[u8] {
        let words = self.ordered.get_or_init(|| {
            let mut words = vec![0u32; self.range.len().div_ceil(4)];
            let bytes = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..self.range.len()];
            for (row, to) in bytes.chunks_exact_mut(self.row_bytes).enumerate() {
                to.copy_from_slice(self.row(row));
            }
            words
        });
        &bytemuck::cast_slice(words)[..self.range.len()]
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
        let bytes = &file.bytes()[range.clone()];
        let storage = if !kind.is_float() || Elements::from_bytes(kind, bytes).is_ok() {
            Storage::Mapped(file.clone(), range)
        } else {
            // Whole words, so that the copy is aligned for every element type.
            let mut words = vec![0u32; bytes.len().div_ceil(4)];
            bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
            Storage::Copied(Arc::new(words), bytes.len())
        };
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
            ordered: OnceLock::new(),
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

    /// All rows in one piece. Copies rows that the file has in another order, and keeps the copy: take
    /// [`Tensor::row_bytes`] where rows will do.
    pub fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Mapped(file, range) => &file.bytes()[range.clone()],
            Storage::Copied(words, len) => &bytemuck::cast_slice(words)[..*len],
            Storage::Paired(rows) => rows.ordered(),
        }
    }

    /// Whether the file has the rows in another order than [`Tensor::bytes`].
    pub(crate) fn is_reordered(&self) -> bool {
        matches!(self.storage, Storage::Paired(_))
    }

    /// The same bytes in the order of the file.
    pub(crate) fn stored_bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Paired(rows) => &rows.file.bytes()[rows.range.clone()],
            _ => self.bytes(),
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
                let bytes = self.bytes();
                let len = bytes.len() / self.rows();
                &bytes[row * len..][..len]
            }
        }
    }

    /// The elements as stored; empty for a quantised tensor, whose blocks have no elements to point at.
    pub fn elements(&self) -> Elements<'_> {
        // Alignment was checked, or made, in `new`; an empty tensor stands in for the impossible.
        Elements::from_bytes(self.kind, self.bytes()).unwrap_or(Elements::F32(&[]))
    }

    /// All elements as f32: exact for the float types, decoded for the quantised ones.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        if !values.is_empty() {
            let row_len = values.len() / self.rows();
            for (row, out) in values.chunks_exact_mut(row_len).enumerate() {
                dequantize(self.kind, self.row_bytes(row), out);
            }
        }
        values
    }

    /// This tensor with elements that can be computed on: itself, or an f32 copy of a quantised one.
    pub fn to_float(&self) -> Tensor {
        if self.kind.is_float() {
            return self.clone();
        }
        let words: Vec<u32> = self.to_f32().into_iter().map(f32::to_bits).collect();
        let len = 4 * words.len();
        Tensor {
            kind: StoredType::F32,
            shape: self.shape.clone(),
            storage: Storage::Copied(Arc::new(words), len),
        }
    }

    /// Bytes of the copy that computing on this tensor takes (see [`Tensor::to_float`] and [`Tensor::bytes`]).
    pub(crate) fn copied_bytes(&self) -> u64 {
        match &self.storage {
            _ if !self.kind.is_float() => 4 * self.shape.iter().product::<usize>() as u64,
            Storage::Paired(rows) => rows.range.len() as u64,
            Storage::Copied(_, len) => *len as u64,
            Storage::Mapped(..) => 0,
        }
    }
}
