//! Where the KV of a run of positions lies in an arena: the byte ranges that a transfer moves for one layer, on the two
//! sides of a push. Pure arithmetic over the geometry and two block tables; moves nothing.

use std::ops::Range;

use baton_model::{KvGeometry, KvHalf};

/// One contiguous run of bytes of a layer, in two arenas of the same geometry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Bytes in the sender's arena.
    pub local: Range<usize>,
    /// Where they go in the receiver's arena.
    pub remote_offset: usize,
}

/// A block table that starts at some block of the sequence rather than at its first.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    /// Position of the first slot of `blocks[0]`, a multiple of the block size.
    pub start: usize,
    /// The blocks, in order.
    pub blocks: &'a [u32],
}

impl Table<'_> {
    /// The block that holds `position`, if the table reaches it.
    fn block(&self, position: usize, block_size: usize) -> Option<u32> {
        let index = position.checked_sub(self.start)? / block_size;
        self.blocks.get(index).copied()
    }
}

/// The pieces of one layer of `positions`: K and V of each head per block touched, or one piece where a block is whole. `None` if a
/// table does not cover the positions.
pub fn pieces(
    geometry: &KvGeometry,
    layer: usize,
    positions: Range<usize>,
    local: Table<'_>,
    remote: Table<'_>,
) -> Option<Vec<Piece>> {
    let size = geometry.block_size;
    let mut pieces = Vec::with_capacity(2 * (positions.len() / size + 2));
    let mut at = positions.start;
    while at < positions.end {
        let end = ((at / size + 1) * size).min(positions.end);
        let slots = at % size..at % size + (end - at);
        let (here, there) = (local.block(at, size)?, remote.block(at, size)?);
        if slots.len() == size {
            pieces.push(Piece {
                local: geometry.layer_range(here, layer),
                remote_offset: geometry.layer_range(there, layer).start,
            });
        } else {
            for head in 0..geometry.kv_heads {
                pieces.extend([KvHalf::K, KvHalf::V].map(|half| Piece {
                    local: geometry.range(here, layer, head, half, slots.clone()),
                    remote_offset: geometry.range(there, layer, head, half, slots.clone()).start,
                }));
            }
        }
        at = end;
    }
    Some(pieces)
}

/// The byte ranges that a window over `positions` admits, all layers: what a receiver opens. `None` as in [`pieces`].
pub fn window(geometry: &KvGeometry, positions: Range<usize>, table: Table<'_>) -> Option<Vec<Range<usize>>> {
    let size = geometry.block_size;
    if positions.start.is_multiple_of(size) && !positions.is_empty() {
        // Whole blocks, in one range each, whatever the layers.
        let whole_end = positions.end - positions.end % size;
        let mut ranges = Vec::new();
        for at in (positions.start..whole_end).step_by(size) {
            ranges.push(geometry.block_range(table.block(at, size)?));
        }
        for layer in 0..geometry.layers {
            ranges.extend(
                pieces(geometry, layer, whole_end..positions.end, table, table)?
                    .into_iter()
                    .map(|p| p.local),
            );
        }
        return Some(ranges);
    }
    let mut ranges = Vec::new();
    for layer in 0..geometry.layers {
        ranges.extend(
            pieces(geometry, layer, positions.clone(), table, table)?
                .into_iter()
                .map(|p| p.local),
        );
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_model::KvDtype;
    use proptest::prelude::*;

    const GEOMETRY: KvGeometry = KvGeometry {
        layers: 3,
        kv_heads: 2,
        head_dim: 2,
        block_size: 4,
        dtype: KvDtype::F32,
    };

    proptest! {
        /// Every slot of every position, once, at the same place within the other side's block; the window covers
        /// exactly what is sent.
        #[test]
        fn covers_each_slot_once(start in 0usize..20, len in 0usize..20, skipped in 0usize..6) {
            let local: Vec<u32> = (0..10).map(|b| (b * 7 + 3) % 10).collect();
            let remote: Vec<u32> = (0..10).map(|b| (b * 3 + 1) % 10).collect();
            let remote_start = (skipped * 4).min(start / 4 * 4);
            let remote = Table { start: remote_start, blocks: &remote[remote_start / 4..] };
            let local = Table { start: 0, blocks: &local };
            let mut sent = Vec::new();
            for layer in 0..GEOMETRY.layers {
                let got = pieces(&GEOMETRY, layer, start..start + len, local, remote).expect("covered");
                let mut expected = Vec::new();
                for p in start..start + len {
                    for (head, half) in [(0, KvHalf::K), (0, KvHalf::V), (1, KvHalf::K), (1, KvHalf::V)] {
                        let slot = p % 4..p % 4 + 1;
                        let from = GEOMETRY.range(local.blocks[p / 4], layer, head, half, slot.clone());
                        let to = GEOMETRY.range(remote.blocks[(p - remote_start) / 4], layer, head, half, slot);
                        expected.extend(from.zip(to));
                    }
                }
                let mut bytes: Vec<_> =
                    got.iter().flat_map(|p| p.local.clone().zip(p.remote_offset..)).collect();
                bytes.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(&bytes, &expected);
                sent.extend(bytes.into_iter().map(|(_, to)| to));
            }
            let mut admitted: Vec<_> =
                window(&GEOMETRY, start..start + len, remote).expect("covered").into_iter().flatten().collect();
            admitted.sort_unstable();
            sent.sort_unstable();
            prop_assert_eq!(admitted, sent);
        }
    }

    #[test]
    fn a_short_table_is_told() {
        let table = Table { start: 4, blocks: &[0] };
        assert_eq!(pieces(&GEOMETRY, 0, 0..4, table, table), None);
        assert_eq!(pieces(&GEOMETRY, 0, 4..9, table, table), None);
        assert!(pieces(&GEOMETRY, 0, 4..8, table, table).is_some());
    }
}
