//! The arguments of the kernels, byte for byte as the structures in `kernels/*.cu` have them: 64-bit fields first, then an
//! even number of 32-bit ones, so that no compiler pads them.

/// Element types, as `TYPE_*` in `kernels/common.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ElementType {
    /// 32-bit floats.
    F32 = 0,
    /// 16-bit IEEE floats.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
}

impl ElementType {
    /// Size of one.
    pub fn bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
        }
    }
}

/// Builds a kernel's argument.
#[derive(Debug, Default)]
pub struct Args(Vec<u8>);

impl Args {
    /// The 64-bit fields: addresses and strides.
    pub fn new(wide: &[u64]) -> Self {
        Args(wide.iter().flat_map(|v| v.to_ne_bytes()).collect())
    }

    /// A 32-bit field.
    #[must_use]
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// A size that is bounded far below 2^32 by the model's configuration and the batch.
    #[must_use]
    pub fn size(self, value: usize) -> Self {
        self.u32(u32::try_from(value).unwrap_or(u32::MAX))
    }

    /// An f32 field.
    #[must_use]
    pub fn f32(self, value: f32) -> Self {
        self.u32(value.to_bits())
    }

    /// The bytes.
    pub fn bytes(self) -> Vec<u8> {
        debug_assert!(self.0.len().is_multiple_of(8), "an odd number of 32-bit fields");
        self.0
    }
}

/// `NONE` of the kernels.
pub const NONE: u32 = u32::MAX;
/// `SPLIT` of `attention.cu`: positions whose attention is computed apart.
pub const SPLIT: usize = 256;
/// `ITEM_ROWS` of `attention.cu`: query rows of a block, tokens times the heads of a K/V head.
pub const ITEM_ROWS: usize = 64;
/// Threads of a block of an attention kernel.
pub const ATTENTION_THREADS: u32 = 128;
/// Threads of a block of the other kernels, except the rotary table's.
pub const THREADS: u32 = 256;
/// Rows and columns of a tile of `linear_dense_many`.
pub const TILE: usize = 128;
/// Bytes of shared memory of `linear_dense_many`: three stages of two tiles of 64 16-bit elements.
pub const TILE_SHARED_BYTES: u32 = 3 * 2 * 128 * 64 * 2;

/// Bytes of shared memory of `attention`: two chunks of 64 keys and values, and 64 rows of merged output.
pub fn attention_shared_bytes(head_dim: usize) -> u32 {
    u32::try_from(2 * 2 * 64 * head_dim * 2 + ITEM_ROWS * head_dim * 4).unwrap_or(u32::MAX)
}
