//! The types weights are stored in, and borrowed elements of the float types. Owns nothing; bytes come from a mapped
//! file. The quantised blocks are decoded in `ggml.rs`.

use crate::ggml::{SIMPLE_ELEMENTS, SUPER_ELEMENTS};
use half::{bf16, f16};
use std::fmt;

/// Type of stored weights: plain floats, or one of ggml's quantised blocks (see [`dequantize`](crate::dequantize)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// 32-bit IEEE.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE.
    F16,
    /// Blocks of 32: a scale and 4-bit integers.
    Q4_0,
    /// Blocks of 32: a scale, a minimum and 4-bit integers.
    Q4_1,
    /// Blocks of 32: a scale and 5-bit integers.
    Q5_0,
    /// Blocks of 32: a scale, a minimum and 5-bit integers.
    Q5_1,
    /// Blocks of 32: a scale and 8-bit integers.
    Q8_0,
    /// Super-blocks of 256: 2-bit integers with quantised scales and minima of 16.
    Q2K,
    /// Super-blocks of 256: 3-bit integers with quantised scales of 16.
    Q3K,
    /// Super-blocks of 256: 4-bit integers with quantised scales and minima of 32.
    Q4K,
    /// Super-blocks of 256: 5-bit integers with quantised scales and minima of 32.
    Q5K,
    /// Super-blocks of 256: 6-bit integers with quantised scales of 16.
    Q6K,
}

impl StoredType {
    /// Elements of one block; 1 for the float types. A row is whole blocks.
    pub const fn block_elements(self) -> usize {
        match self {
            StoredType::F32 | StoredType::Bf16 | StoredType::F16 => 1,
            StoredType::Q4_0 | StoredType::Q4_1 | StoredType::Q5_0 | StoredType::Q5_1 | StoredType::Q8_0 => {
                SIMPLE_ELEMENTS
            }
            StoredType::Q2K | StoredType::Q3K | StoredType::Q4K | StoredType::Q5K | StoredType::Q6K => SUPER_ELEMENTS,
        }
    }

    /// Bytes of one block; of one element for the float types.
    pub const fn block_bytes(self) -> usize {
        match self {
            StoredType::F32 => 4,
            StoredType::Bf16 | StoredType::F16 => 2,
            StoredType::Q4_0 => 18,
            StoredType::Q4_1 => 20,
            StoredType::Q5_0 => 22,
            StoredType::Q5_1 => 24,
            StoredType::Q8_0 => 34,
            StoredType::Q2K => 84,
            StoredType::Q3K => 110,
            StoredType::Q4K => 144,
            StoredType::Q5K => 176,
            StoredType::Q6K => 210,
        }
    }

    /// Bytes of `elements` elements, or `None` if they are not whole blocks or the size does not fit the address space.
    pub const fn bytes_for(self, elements: usize) -> Option<usize> {
        match elements % self.block_elements() {
            0 => (elements / self.block_elements()).checked_mul(self.block_bytes()),
            _ => None,
        }
    }

    /// Whether [`Elements`] can view it.
    pub const fn is_float(self) -> bool {
        self.block_elements() == 1
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StoredType::F32 => "f32",
            StoredType::Bf16 => "bf16",
            StoredType::F16 => "f16",
            StoredType::Q4_0 => "q4_0",
            StoredType::Q4_1 => "q4_1",
            StoredType::Q5_0 => "q5_0",
            StoredType::Q5_1 => "q5_1",
            StoredType::Q8_0 => "q8_0",
            StoredType::Q2K => "q2_k",
            StoredType::Q3K => "q3_k",
            StoredType::Q4K => "q4_k",
            StoredType::Q5K => "q5_k",
            StoredType::Q6K => "q6_k",
        })
    }
}

/// The bytes are not aligned to, or not a whole number of, elements of the type asked for, or that type is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MisalignedBytes;

impl fmt::Display for MisalignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("weight bytes are quantised or not aligned to their element type")
    }
}

impl std::error::Error for MisalignedBytes {}

/// A run of stored elements of a float type.
#[derive(Debug, Clone, Copy)]
pub enum Elements<'a> {
    /// 32-bit IEEE.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// 16-bit IEEE.
    F16(&'a [f16]),
}

impl<'a> Elements<'a> {
    /// Views `bytes` as little-endian elements of `kind`.
    ///
    /// # Errors
    /// [`MisalignedBytes`]: copy the bytes to aligned memory first, or [`dequantize`](crate::dequantize) them.
    pub fn from_bytes(kind: StoredType, bytes: &'a [u8]) -> Result<Self, MisalignedBytes> {
        match kind {
            StoredType::F32 => bytemuck::try_cast_slice(bytes).map(Elements::F32),
            StoredType::Bf16 => bytemuck::try_cast_slice(bytes).map(Elements::Bf16),
            StoredType::F16 => bytemuck::try_cast_slice(bytes).map(Elements::F16),
            _ => return Err(MisalignedBytes),
        }
        .map_err(|_| MisalignedBytes)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(s) => s.len(),
            Elements::Bf16(s) => s.len(),
            Elements::F16(s) => s.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type they are stored in.
    pub fn kind(&self) -> StoredType {
        match self {
            Elements::F32(_) => StoredType::F32,
            Elements::Bf16(_) => StoredType::Bf16,
            Elements::F16(_) => StoredType::F16,
        }
    }

    /// All elements as f32 (exact).
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.widen_into(0, &mut out);
        out
    }

    /// Elements `start..start + out.len()` as f32 into `out`.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn widen_into(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Elements::F32(s) => out.copy_from_slice(&s[range]),
            Elements::Bf16(s) => s[range].iter().zip(out).for_each(|(e, o)| *o = e.to_f32()),
            Elements::F16(s) => s[range].iter().zip(out).for_each(|(e, o)| *o = e.to_f32()),
        }
    }
}
