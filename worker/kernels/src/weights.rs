//! The types weights are stored in. Owns nothing; bytes come from a mapped file and are decoded in `ggml.rs`.

use crate::ggml::{SIMPLE_ELEMENTS, SUPER_ELEMENTS};
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

    /// Whether it is a plain float.
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
