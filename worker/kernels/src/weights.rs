//! Borrowed weight elements in the type they are stored in. Owns nothing; bytes come from a mapped file.

use half::{bf16, f16};
use std::fmt;

/// Element type of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// 32-bit IEEE.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE.
    F16,
}

impl StoredType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            StoredType::F32 => 4,
            StoredType::Bf16 | StoredType::F16 => 2,
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StoredType::F32 => "f32",
            StoredType::Bf16 => "bf16",
            StoredType::F16 => "f16",
        })
    }
}

/// The bytes are not aligned to, or not a whole number of, elements of the type asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MisalignedBytes;

impl fmt::Display for MisalignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("weight bytes are not aligned to their element type")
    }
}

impl std::error::Error for MisalignedBytes {}

/// A run of stored elements.
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
    /// [`MisalignedBytes`]: copy the bytes to aligned memory first.
    pub fn from_bytes(kind: StoredType, bytes: &'a [u8]) -> Result<Self, MisalignedBytes> {
        match kind {
            StoredType::F32 => bytemuck::try_cast_slice(bytes).map(Elements::F32),
            StoredType::Bf16 => bytemuck::try_cast_slice(bytes).map(Elements::Bf16),
            StoredType::F16 => bytemuck::try_cast_slice(bytes).map(Elements::F16),
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
