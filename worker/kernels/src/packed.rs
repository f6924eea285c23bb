//! Weight matrices packed once at load into the order in which the kernels read them.
//!
//! A *panel* is [`PANEL`] output columns; the panels of a matrix lie one after the other, each a single contiguous stream
//! along `k`. In a panel, for every step of `k` (one element of f32 and f16, two of bf16, four of int8) the values of all
//! 64 columns lie side by side, so that a vector register holds the same `k` of different columns: a lane is an output,
//! and no output ever needs a sum across lanes. This is also the tile layout of AMX.
//!
//! | format | step of `k` | bytes per panel |
//! |---|---|---|
//! | [`WeightFormat::F32`] | 1 | `[k][64]` f32 |
//! | [`WeightFormat::F16`] | 1 | `[k][64]` f16 |
//! | [`WeightFormat::Bf16`] | 2 | `[k/2][64][2]` bf16 |
//! | [`WeightFormat::Int8`] | 4 | `[k/4][64][4]` u8, value + 128; one f32 scale per column |
//! | [`WeightFormat::Group8`] | 4 | per 32 of `k`: `[8][64][4]` u8, value + 128, then 64 f16 scales |
//! | [`WeightFormat::Group4`] | 8 | per 32 of `k`: `[4][64][4]` bytes, step `j` low and step `j + 4` high, value + 8; 64 f16 scales |
//! | [`WeightFormat::Group4Min`] | 8 | the same with unbiased values, 64 f16 scales and 64 f16 minima |
//!
//! Unsigned weights with a bias let VNNI and AMX multiply them by signed activations; the bias is taken back by one sum
//! over the activations, which costs nothing (see `rows`). `k` is padded with zeros to whole steps (for int8 and bf16 to
//! whole AMX tiles), columns to whole panels.

mod group;
mod memory;

pub use group::{QuantizedGroup, quantize};

use crate::pool::Pool;
use half::{bf16, f16};
use memory::Aligned;
use std::fmt;
use std::sync::Mutex;

/// Output columns of a panel: four AVX-512 registers, and four AMX tiles.
pub const PANEL: usize = 64;
/// Elements along `k` that share a scale in the group-wise formats.
pub const GROUP: usize = 32;

/// How a matrix is held and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// f32 weights and activations.
    F32,
    /// f16 weights, f32 activations.
    F16,
    /// bf16 weights; activations are rounded to bf16 where the CPU multiplies bf16, else f32.
    Bf16,
    /// W8A8: int8 weights with a scale per output column, int8 activations with a scale per token. Sums are exact.
    Int8,
    /// int8 weights and activations with a scale per 32 elements (GGUF's Q8_0).
    Group8,
    /// 4-bit weights in -8..=7 with a scale per 32 elements (GGUF's Q4_0), int8 activations likewise.
    Group4,
    /// 4-bit weights in 0..=15 with a scale and a minimum per 32 elements (GGUF's Q4_1 and Q4_K), int8 activations.
    Group4Min,
}

impl WeightFormat {
    /// All of them.
    pub const ALL: [WeightFormat; 7] = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Bf16,
        WeightFormat::Int8,
        WeightFormat::Group8,
        WeightFormat::Group4,
        WeightFormat::Group4Min,
    ];

    /// `k` padded to what the format needs.
    pub(crate) const fn padded(self, k: usize) -> usize {
        match self {
            WeightFormat::F32 | WeightFormat::F16 => k,
            WeightFormat::Bf16 => k.next_multiple_of(32),
            WeightFormat::Int8 => k.next_multiple_of(64),
            WeightFormat::Group8 | WeightFormat::Group4 | WeightFormat::Group4Min => k.next_multiple_of(GROUP),
        }
    }

    /// Bytes of a panel over `k`.
    const fn panel_bytes(self, k: usize) -> usize {
        let k = self.padded(k);
        match self {
            WeightFormat::F32 => k * PANEL * 4,
            WeightFormat::F16 | WeightFormat::Bf16 => k * PANEL * 2,
            WeightFormat::Int8 => k * PANEL,
            _ => k / GROUP * self.group_bytes(),
        }
    }

    /// Bytes of one group of a panel; only for the group-wise formats.
    pub(crate) const fn group_bytes(self) -> usize {
        match self {
            WeightFormat::Group8 => GROUP * PANEL + PANEL * 2,
            WeightFormat::Group4 => GROUP / 2 * PANEL + PANEL * 2,
            WeightFormat::Group4Min => GROUP / 2 * PANEL + PANEL * 4,
            _ => 0,
        }
    }

    /// Bytes that a matrix of `columns` by `k` takes when packed, or `None` if that is beyond the address space.
    pub fn bytes(self, columns: usize, k: usize) -> Option<usize> {
        // Eight bytes per element bound every format, padding included.
        (k.checked_add(PANEL)?.checked_mul(8)?).checked_mul(columns.checked_add(PANEL)?)?;
        let scales = if self == WeightFormat::Int8 { PANEL * 4 } else { 0 };
        Some(columns.div_ceil(PANEL) * (self.panel_bytes(k) + scales))
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Int8 => "int8",
            WeightFormat::Group8 => "int8 in groups of 32",
            WeightFormat::Group4 => "int4 in groups of 32",
            WeightFormat::Group4Min => "int4 with minima in groups of 32",
        })
    }
}

/// A packed matrix, `[columns, k]`, with its biases.
pub struct PackedMatrix {
    format: WeightFormat,
    k: usize,
    columns: usize,
    panels: Aligned,
    /// Of [`WeightFormat::Int8`]: one per column, padded to whole panels; else empty.
    scales: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// The system refused the memory for a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub bytes: usize,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the system refused {} bytes for packed weights", self.bytes)
    }
}

impl std::error::Error for OutOfMemory {}

impl PackedMatrix {
    /// Packs `columns` rows of `k` elements, which `row(n, out)` writes; called from the pool's threads.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    ///
    /// # Panics
    /// If `bias` has another length than `columns`: a caller's bug.
    pub fn pack(
        pool: &Pool,
        format: WeightFormat,
        columns: usize,
        k: usize,
        bias: Option<Vec<f32>>,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<Self, OutOfMemory> {
        assert!(bias.as_ref().is_none_or(|b| b.len() == columns), "pack: bias shape");
        let bytes = format.bytes(columns, k).ok_or(OutOfMemory { bytes: usize::MAX })?;
        let count = columns.div_ceil(PANEL);
        let panel_bytes = format.panel_bytes(k);
        let mut panels = Aligned::zeroed(count * panel_bytes).ok_or(OutOfMemory { bytes })?;
        let mut scales = vec![0f32; if format == WeightFormat::Int8 { count * PANEL } else { 0 }];
        let k_padded = format.padded(k);
        {
            // Tasks lock the scratch of their thread and write their own panel.
            let scratch: Vec<Mutex<Vec<f32>>> = (0..pool.threads()).map(|_| Mutex::default()).collect();
            let mut outputs: Vec<Mutex<(&mut [u8], &mut [f32])>> = Vec::with_capacity(count);
            let mut scale_chunks = scales.chunks_mut(PANEL);
            for panel in panels.bytes_mut().chunks_mut(panel_bytes.max(1)) {
                outputs.push(Mutex::new((panel, scale_chunks.next().unwrap_or_default())));
            }
            pool.run(outputs.len(), &|worker, index| {
                let mut rows = scratch[worker]
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                rows.clear();
                rows.resize(PANEL * k_padded, 0.0);
                let first = index * PANEL;
                for (n, out) in rows.chunks_mut(k_padded.max(1)).take(columns - first).enumerate() {
                    row(first + n, &mut out[..k]);
                }
                let mut output = outputs[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let (panel, scales) = &mut *output;
                pack_panel(format, &rows, k_padded, panel, scales);
            });
        }
        Ok(PackedMatrix {
            format,
            k,
            columns,
            panels,
            scales,
            bias,
        })
    }

    /// The format.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Length of the rows it multiplies.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Output columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes a product reads: what decoding streams from memory.
    pub fn bytes(&self) -> usize {
        self.panels.len() + self.scales.len() * 4
    }

    /// Panels, the last one padded.
    pub(crate) fn panels(&self) -> usize {
        self.columns.div_ceil(PANEL)
    }

    /// Start of panel `index`.
    pub(crate) fn panel(&self, index: usize) -> *const u8 {
        self.panels.bytes()[index * self.format.panel_bytes(self.k)..].as_ptr()
    }

    /// Scales of panel `index`; empty unless [`WeightFormat::Int8`].
    pub(crate) fn scales(&self, index: usize) -> &[f32] {
        self.scales.get(index * PANEL..(index + 1) * PANEL).unwrap_or_default()
    }

    pub(crate) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// What the matrix means: row `n` as f32, `k` elements. The reference that quantised kernels are tested against.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn dequantized_row(&self, n: usize) -> Vec<f32> {
        assert!(n < self.columns, "row {n} of {}", self.columns);
        let (panel, column) = (n / PANEL, n % PANEL);
        let bytes = self.format.panel_bytes(self.k);
        let data = &self.panels.bytes()[panel * bytes..][..bytes];
        let half_at = |at: usize| u16::from_le_bytes([data[at], data[at + 1]]);
        let one = |k: usize| match self.format {
            WeightFormat::F32 => {
                let at = (k * PANEL + column) * 4;
                f32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]])
            }
            WeightFormat::F16 => f16::from_bits(half_at((k * PANEL + column) * 2)).to_f32(),
            WeightFormat::Bf16 => bf16::from_bits(half_at((k / 2 * PANEL + column) * 4 + k % 2 * 2)).to_f32(),
            WeightFormat::Int8 => {
                let byte = data[(k / 4 * PANEL + column) * 4 + k % 4];
                (i32::from(byte) - 128) as f32 * self.scales(panel)[column]
            }
            _ => group::dequantized(self.format, data, column, k),
        };
        (0..self.k).map(one).collect()
    }
}

/// `rows` is `[PANEL][k]`, `k` padded.
fn pack_panel(format: WeightFormat, rows: &[f32], k: usize, panel: &mut [u8], scales: &mut [f32]) {
    match format {
        WeightFormat::F32 => scatter(rows, k, panel, 1, |v| v.to_le_bytes()),
        WeightFormat::F16 => scatter(rows, k, panel, 1, |v| f16::from_f32(v).to_le_bytes()),
        WeightFormat::Bf16 => scatter(rows, k, panel, 2, |v| bf16::from_f32(v).to_le_bytes()),
        WeightFormat::Int8 => {
            for (row, scale) in rows.chunks(k.max(1)).zip(scales.iter_mut()) {
                *scale = row.iter().fold(0f32, |a, v| a.max(v.abs())) / 127.0;
            }
            let mut inverse = [0f32; PANEL];
            for (to, scale) in inverse.iter_mut().zip(scales.iter()) {
                *to = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
            }
            for (n, row) in rows.chunks(k.max(1)).enumerate() {
                for (at, v) in row.iter().enumerate() {
                    let q = (v * inverse[n]).round_ties_even().clamp(-127.0, 127.0);
                    panel[(at / 4 * PANEL + n) * 4 + at % 4] = (q as i32 + 128) as u8;
                }
            }
        }
        _ => group::pack(format, rows, k, panel),
    }
}

/// Elements of `N` bytes, `step` of `k` side by side per column.
fn scatter<const N: usize>(rows: &[f32], k: usize, panel: &mut [u8], step: usize, bytes: impl Fn(f32) -> [u8; N]) {
    for (n, row) in rows.chunks(k.max(1)).enumerate() {
        for (at, v) in row.iter().enumerate() {
            let to = ((at / step * PANEL + n) * step + at % step) * N;
            panel[to..to + N].copy_from_slice(&bytes(*v));
        }
    }
}
