//! Where the KV of a run of positions lies in an arena: the byte ranges that a transfer moves for one layer, on the two
//! sides of a push. Pure arithmetic over the geometry and two block tables; moves nothing.

use std::ops::Range;

use baton_model::{KvGeometry, KvHalf};

/// One contiguous run of bytes of a layer, in two arenas that agree on everything but the tokens per block.
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
    /// Tokens per block of the arena that the blocks are in.
    pub block_size: usize,
    /// The blocks, in order.
    pub blocks: &'a [u32],
}

impl Table<'_> {
    /// The block that holds `position`, if the table reaches it.
    pub fn block(&self, position: usize) -> Option<u32> {
        let index = position.checked_sub(self.start)? / self.block_size;
        self.blocks.get(index).copied()
    }

    /// Where the block of `position` ends.
    fn block_end(&self, position: usize) -> usize {
        (position / self.block_size + 1) * self.block_size
    }
}

/// The pieces of one layer of `positions`: K and V of each head per pair of blocks touched, or one piece where whole
/// blocks of one size meet. `None` if a table does not cover the positions. The block size of `geometry` is not looked
/// at: each table has its own.
pub fn pieces(
    geometry: &KvGeometry,
    layer: usize,
    positions: Range<usize>,
    local: Table<'_>,
    remote: Table<'_>,
) -> Option<Vec<Piece>> {
    let [here_geometry, there_geometry] = [local, remote].map(|table| KvGeometry {
        block_size: table.block_size,
        ..*geometry
    });
    let mut pieces = Vec::with_capacity(2 * (positions.len() / local.block_size + 2));
    let mut at = positions.start;
    while at < positions.end {
        let end = local.block_end(at).min(remote.block_end(at)).min(positions.end);
        let [from, to] = [local, remote].map(|table| at % table.block_size..at % table.block_size + (end - at));
        let (here, there) = (local.block(at)?, remote.block(at)?);
        if from.len() == local.block_size && local.block_size == remote.block_size {
            pieces.push(Piece {
                local: here_geometry.layer_range(here, layer),
                remote_offset: there_geometry.layer_range(there, layer).start,
            });
        } else {
            for head in 0..geometry.kv_heads {
                pieces.extend([KvHalf::K, KvHalf::V].map(|half| Piece {
                    local: here_geometry.range(here, layer, head, half, from.clone()),
                    remote_offset: there_geometry.range(there, layer, head, half, to.clone()).start,
                }));
            }
        }
        at = end;
    }
    Some(pieces)
}

/// The byte ranges that a window over `positions` admits, all layers: what a receiver opens over blocks of its own, so
/// of the size of `geometry`. `None` as in [`pieces`].
pub fn window(geometry: &KvGeometry, positions: Range<usize>, table: Table<'_>) -> Option<Vec<Range<usize>>> {
    let size = geometry.block_size;
    debug_assert_eq!(size, table.block_size, "a window lies in the opener's own arena");
    if positions.start.is_multiple_of(size) && !positions.is_empty() {
        // Whole blocks, in one range each, whatever the layers.
        let whole_end = positions.end - positions.end % size;
        let mut ranges = Vec::new();
        for at in (positions.start..whole_end).step_by(size) {
            ranges.push(geometry.block_range(table.block(at)?));
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
        /// Every slot of every position, once, at its place on the other side, whatever the two block sizes; the window
        /// covers exactly what is sent.
        #[test]
        fn covers_each_slot_once(
            start in 0usize..20, len in 0usize..20, skipped in 0usize..6,
            (here_size, there_size) in prop_oneof![Just((4, 4)), (1usize..9, 1usize..9)],
        ) {
            let local_blocks: Vec<u32> = (0..40).map(|b| (b * 7 + 3) % 40).collect();
            let remote_blocks: Vec<u32> = (0..40).map(|b| (b * 3 + 1) % 40).collect();
            let remote_start = (skipped * there_size).min(start / there_size * there_size);
            let remote = Table {
                start: remote_start,
                block_size: there_size,
                blocks: &remote_blocks[remote_start / there_size..],
            };
            let local = Table { start: 0, block_size: here_size, blocks: &local_blocks };
            let here = KvGeometry { block_size: here_size, ..GEOMETRY };
            let there = KvGeometry { block_size: there_size, ..GEOMETRY };
            let mut sent = Vec::new();
            for layer in 0..GEOMETRY.layers {
                let got = pieces(&GEOMETRY, layer, start..start + len, local, remote).expect("covered");
                let mut expected = Vec::new();
                for p in start..start + len {
                    for (head, half) in [(0, KvHalf::K), (0, KvHalf::V), (1, KvHalf::K), (1, KvHalf::V)] {
                        let (from, to) = (p % here_size, p % there_size);
                        let block = remote.blocks[(p - remote_start) / there_size];
                        let from = here.range(local.blocks[p / here_size], layer, head, half, from..from + 1);
                        let to = there.range(block, layer, head, half, to..to + 1);
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
                window(&there, start..start + len, remote).expect("covered").into_iter().flatten().collect();
            admitted.sort_unstable();
            sent.sort_unstable();
            prop_assert_eq!(admitted, sent);
        }
    }

    #[test]
    fn a_short_table_is_told() {
        let table = Table {
            start: 4,
            block_size: 4,
            blocks: &[0],
        };
        assert_eq!(pieces(&GEOMETRY, 0, 0..4, table, table), None);
        assert_eq!(pieces(&GEOMETRY, 0, 4..9, table, table), None);
        assert!(pieces(&GEOMETRY, 0, 4..8, table, table).is_some());
    }
}
