//! KV on the wire in 8 bits: for links so slow that a prompt's blocks wait for bandwidth. Off unless a worker asks for it,
//! because what is restored is not what was computed, and so promise P1 does not hold for what is handed over this way.
//!
//! A row is K and V of one token in one head of one layer: two f32 scales and `head_dim` signed bytes for each. The scale is
//! the largest magnitude divided by 127, so the error of an element is at most half a scale (symmetric per-row
//! quantization, as KV caches are commonly stored). Rows lie in a staging region on both sides,
//! `[layer][position][head]`, which the push moves like any other memory; the receiver restores them into its blocks once
//! the window is complete.
//!
//! Not here: when to compress (the configuration says) and the transfer itself.

use baton_engine::spans::Table;
use baton_kvtransfer::{ALIGN, Region};
use baton_model::{KvDtype, KvGeometry, KvHalf};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How KV blocks travel between workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCompression {
    /// As they are.
    #[default]
    None,
    /// As 8-bit integers with a scale per head and token.
    Int8,
}

impl std::fmt::Display for KvCompression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Int8 => "int8",
        })
    }
}

impl std::str::FromStr for KvCompression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            other => Err(format!("`{other}` is not one of none, int8")),
        }
    }
}

/// K scale and V scale.
const SCALES_BYTES: usize = 8;

/// The rows of one prompt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    geometry: KvGeometry,
    /// First position, ...
    start: usize,
    /// ... and how many.
    count: usize,
}

impl Rows {
    pub(crate) fn new(geometry: KvGeometry, positions: Range<usize>) -> Self {
        Self {
            geometry,
            start: positions.start,
            count: positions.len(),
        }
    }

    fn row_bytes(&self) -> usize {
        (SCALES_BYTES + 2 * self.geometry.head_dim).next_multiple_of(ALIGN)
    }

    /// Size of the staging region; `None` if that does not fit the address space.
    pub(crate) fn bytes(&self) -> Option<usize> {
        let rows = self.geometry.layers.checked_mul(self.geometry.kv_heads)?;
        rows.checked_mul(self.count)?.checked_mul(self.row_bytes())
    }

    /// Where the rows of `positions` of a layer are; all of its heads.
    fn range(&self, layer: usize, positions: &Range<usize>) -> Range<usize> {
        let at =
            |position: usize| (layer * self.count + position - self.start) * self.geometry.kv_heads * self.row_bytes();
        at(positions.start)..at(positions.end)
    }

    /// Compresses `positions` of a layer from the arena into the staging region. The bytes written; `None` if the table
    /// or the rows do not cover the positions.
    pub(crate) fn encode(
        &self,
        arena: &Region,
        table: Table<'_>,
        layer: usize,
        positions: Range<usize>,
        staging: &Region,
    ) -> Option<Range<usize>> {
        self.covers(&positions)?;
        let range = self.range(layer, &positions);
        let mut rows = vec![0; range.len()];
        let mut slot = vec![0; self.geometry.slot_bytes()];
        let mut values = vec![0f32; self.geometry.head_dim];
        for (row, (position, head)) in rows.chunks_exact_mut(self.row_bytes()).zip(self.tokens(positions)) {
            let (scales, elements) = row.split_at_mut(SCALES_BYTES);
            let halves = elements.chunks_exact_mut(self.geometry.head_dim);
            for ((half, scale), out) in [KvHalf::K, KvHalf::V]
                .into_iter()
                .zip(scales.chunks_exact_mut(4))
                .zip(halves)
            {
                let from = self.slot(table, layer, head, half, position)?;
                if !arena.copy_out(from.start, &mut slot) {
                    return None;
                }
                load(self.geometry.dtype, &slot, &mut values);
                scale.copy_from_slice(&quantize(&values, out).to_le_bytes());
            }
        }
        staging.copy_in(range.start, &rows).then_some(range)
    }

    /// Restores a layer of all positions from the staging region into the arena. `None` as above.
    pub(crate) fn decode(&self, staging: &Region, layer: usize, arena: &Region, table: Table<'_>) -> Option<()> {
        let positions = self.start..self.start + self.count;
        let range = self.range(layer, &positions);
        let mut rows = vec![0; range.len()];
        if !staging.copy_out(range.start, &mut rows) {
            return None;
        }
        let mut slot = vec![0; self.geometry.slot_bytes()];
        for (row, (position, head)) in rows.chunks_exact(self.row_bytes()).zip(self.tokens(positions)) {
            let (scales, elements) = row.split_at(SCALES_BYTES);
            let (scales, _) = scales.as_chunks::<4>();
            let halves = elements.chunks_exact(self.geometry.head_dim);
            for ((half, scale), bytes) in [KvHalf::K, KvHalf::V].into_iter().zip(scales).zip(halves) {
                store(self.geometry.dtype, f32::from_le_bytes(*scale), bytes, &mut slot);
                let to = self.slot(table, layer, head, half, position)?;
                if !arena.copy_in(to.start, &slot) {
                    return None;
                }
            }
        }
        Some(())
    }

    fn covers(&self, positions: &Range<usize>) -> Option<()> {
        (self.start <= positions.start && positions.start <= positions.end && positions.end <= self.start + self.count)
            .then_some(())
    }

    fn tokens(&self, positions: Range<usize>) -> impl Iterator<Item = (usize, usize)> + use<> {
        let heads = self.geometry.kv_heads;
        positions.flat_map(move |position| (0..heads).map(move |head| (position, head)))
    }

    fn slot(&self, table: Table<'_>, layer: usize, head: usize, half: KvHalf, position: usize) -> Option<Range<usize>> {
        let geometry = KvGeometry {
            block_size: table.block_size,
            ..self.geometry
        };
        let slot = position % table.block_size;
        Some(geometry.range(table.block(position)?, layer, head, half, slot..slot + 1))
    }
}

/// Writes `values` as signed bytes and gives their scale. Elements that are no numbers become 0; infinite ones do not
/// occur in KV, and would become the largest.
fn quantize(values: &[f32], out: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0f32, |max, v| max.max(v.abs())).min(f32::MAX);
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (value, byte) in values.iter().zip(out) {
        // The cast saturates, and makes 0 of what is no number.
        *byte = (value * inverse).round() as i8 as u8;
    }
    scale
}

fn load(dtype: KvDtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        KvDtype::F32 => read(bytes, values, f32::from_le_bytes),
        KvDtype::F16 => read(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
        KvDtype::Bf16 => read(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
    }
}

fn read<const N: usize>(bytes: &[u8], values: &mut [f32], from: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (value, element) in values.iter_mut().zip(elements) {
        *value = from(*element);
    }
}

fn store(dtype: KvDtype, scale: f32, elements: &[u8], slot: &mut [u8]) {
    match dtype {
        KvDtype::F32 => write(scale, elements, slot, f32::to_le_bytes),
        KvDtype::F16 => write(scale, elements, slot, |v| f16::from_f32(v).to_le_bytes()),
        KvDtype::Bf16 => write(scale, elements, slot, |v| bf16::from_f32(v).to_le_bytes()),
    }
}

fn write<const N: usize>(scale: f32, elements: &[u8], slot: &mut [u8], to: impl Fn(f32) -> [u8; N]) {
    let (places, _) = slot.as_chunks_mut::<N>();
    for (place, byte) in places.iter_mut().zip(elements) {
        *place = to(f32::from(*byte as i8) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dtype() -> impl Strategy<Value = KvDtype> {
        prop_oneof![Just(KvDtype::F32), Just(KvDtype::F16), Just(KvDtype::Bf16)]
    }

    proptest! {
        /// Between arenas of different block sizes, chunk by chunk: every element comes back within half a scale (and
        /// the dtype's own rounding), and nothing else is touched.
        #[test]
        fn restores_what_was_sent(
            dtype in dtype(), here in 1usize..9, there in 1usize..9, skip_blocks in 0usize..3, len in 1usize..20,
            cut in 0usize..20, seed in any::<u32>(),
        ) {
            let geometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 5, block_size: here, dtype };
            let target_geometry = KvGeometry { block_size: there, ..geometry };
            let start = skip_blocks * there;
            let positions = start..start + len;
            let source = Region::new(geometry.arena_bytes(64).unwrap()).unwrap();
            let target = Region::new(target_geometry.arena_bytes(64).unwrap()).unwrap();
            let from_blocks: Vec<u32> = (0..64).map(|b| (b * 5 + 1) % 64).collect();
            let to_blocks: Vec<u32> = (0..64).map(|b| (b * 11 + 7) % 64).collect();
            let from = Table { start: 0, block_size: here, blocks: &from_blocks };
            let to = Table { start, block_size: there, blocks: &to_blocks };
            let rows = Rows::new(geometry, positions.clone());
            let staging = Region::new(rows.bytes().unwrap()).unwrap();

            let value = |layer: usize, head: usize, half: KvHalf, position: usize, at: usize| {
                let mixed = (seed as usize + layer * 7 + head * 31 + position * 101 + at * 13 + half as usize * 3) % 257;
                (mixed as f32 - 128.0) * 0.37
            };
            let mut slot = vec![0; geometry.slot_bytes()];
            let each = || positions.clone().flat_map(|p| {
                (0..2).flat_map(move |l| (0..2).flat_map(move |h| [KvHalf::K, KvHalf::V].map(|half| (p, l, h, half))))
            });
            for (position, layer, head, half) in each() {
                // A scale of 1 stores the elements as they are, up to the dtype.
                let values: Vec<f32> = (0..5).map(|at| value(layer, head, half, position, at)).collect();
                match dtype {
                    KvDtype::F32 => values.iter().zip(slot.chunks_exact_mut(4)).for_each(|(v, b)| b.copy_from_slice(&v.to_le_bytes())),
                    KvDtype::F16 => values.iter().zip(slot.chunks_exact_mut(2)).for_each(|(v, b)| b.copy_from_slice(&f16::from_f32(*v).to_le_bytes())),
                    KvDtype::Bf16 => values.iter().zip(slot.chunks_exact_mut(2)).for_each(|(v, b)| b.copy_from_slice(&bf16::from_f32(*v).to_le_bytes())),
                }
                let place = rows.slot(from, layer, head, half, position).unwrap();
                prop_assert!(source.copy_in(place.start, &slot));
            }
            let middle = (start + cut).min(positions.end);
            for layer in 0..2 {
                for part in [start..middle, middle..positions.end] {
                    let written = rows.encode(&source, from, layer, part, &staging).expect("covered");
                    prop_assert!(written.end <= staging.len() && written.start.is_multiple_of(ALIGN));
                }
            }
            for layer in 0..2 {
                rows.decode(&staging, layer, &target, to).expect("covered");
            }
            let mut touched = 0;
            for (position, layer, head, half) in each() {
                let place = rows.slot(to, layer, head, half, position).unwrap();
                touched += place.len();
                prop_assert!(target.copy_out(place.start, &mut slot));
                let mut got = [0f32; 5];
                load(dtype, &slot, &mut got);
                let wanted: Vec<f32> = (0..5).map(|at| value(layer, head, half, position, at)).collect();
                let largest = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
                let bound = largest / 127.0 / 2.0 + largest * if dtype == KvDtype::Bf16 { 0.01 } else { 0.001 };
                for (got, wanted) in got.iter().zip(&wanted) {
                    prop_assert!((got - wanted).abs() <= bound, "{got} for {wanted}");
                }
            }
            // What no position owns is still zero.
            let mut all = vec![0; target.len()];
            prop_assert!(target.copy_out(0, &mut all));
            prop_assert!(all.iter().filter(|b| **b != 0).count() <= touched);
            prop_assert!(rows.encode(&source, from, 0, start..positions.end + 1, &staging).is_none());
        }
    }

    #[test]
    fn odd_values_do_no_harm() {
        let mut out = [9; 4];
        assert_eq!(quantize(&[0.0; 4], &mut out), 0.0);
        assert_eq!(out, [0; 4]);
        let scale = quantize(&[f32::NAN, 1.0, -2.0, 0.0], &mut out);
        assert_eq!((scale, out[0], out[2] as i8), (2.0 / 127.0, 0, -127));
        assert!(quantize(&[f32::INFINITY, 1.0, 0.0, 0.0], &mut out).is_finite());
    }
}
