//! Where the K and V of a token lie in a worker's KV arena, and the digest that says whether two workers agree on it.
//!
//! The arena is block-major: `[block][layer][k|v][slot][kv_head][head_dim]`. A block's byte offset therefore does not
//! depend on how many blocks an arena has (prefill and decode workers size theirs differently), one layer of one
//! block is one contiguous run (what the layer-by-layer transfer moves), and heads can be sliced inside a slot.
//!
//! Owns no memory and allocates no blocks: the block manager does, in `baton-engine`.

use std::ops::Range;

/// Element type of the stored K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit IEEE floats, native byte order (little-endian on every supported machine).
    F32,
}

impl KvDtype {
    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
        }
    }

    /// Stable code in the compatibility digest; never reused.
    const fn code(self) -> u64 {
        match self {
            KvDtype::F32 => 1,
        }
    }
}

/// Which half of a layer of a block: the keys come first, then the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvHalf {
    /// Keys.
    K,
    /// Values.
    V,
}

/// The shape of a KV arena, without its number of blocks.
///
/// Sizes from a validated `ModelConfig` cannot overflow the arithmetic here; for sizes from
/// elsewhere ask [`KvGeometry::is_sane`] first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: usize,
    /// Key/value heads per layer (GQA: fewer than query heads).
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvGeometry {
    /// No dimension may be zero or larger than this; far above any real model, and the product of all still fits 64 bits.
    pub const DIM_MAX: usize = 1 << 13;

    /// Whether every dimension lies in `1..=DIM_MAX`, so that no method can overflow.
    pub fn is_sane(&self) -> bool {
        [self.layers, self.kv_heads, self.head_dim, self.block_size]
            .iter()
            .all(|d| (1..=Self::DIM_MAX).contains(d))
    }

    /// Elements of one slot: the K (or V) of one token in one layer, all heads.
    pub const fn slot_elements(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of one K or V slot of one layer.
    pub const fn slot_bytes(&self) -> usize {
        self.slot_elements() * self.dtype.bytes()
    }

    /// Bytes of one layer of one block: K and V of `block_size` tokens.
    pub const fn layer_bytes(&self) -> usize {
        2 * self.block_size * self.slot_bytes()
    }

    /// Bytes of one block: all layers.
    pub const fn block_bytes(&self) -> usize {
        self.layers * self.layer_bytes()
    }

    /// Bytes of an arena of `blocks` blocks, or `None` when that does not fit the address space.
    pub fn arena_bytes(&self, blocks: u32) -> Option<usize> {
        self.block_bytes().checked_mul(blocks as usize)
    }

    /// How many blocks hold `tokens` tokens.
    pub const fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Byte range in the arena of `slots` of one half of one layer of `block`.
    ///
    /// The caller keeps `layer < layers` and `slots.end <= block_size`; debug builds check it.
    pub fn range(&self, block: u32, layer: usize, half: KvHalf, slots: Range<usize>) -> Range<usize> {
        debug_assert!(layer < self.layers && slots.start <= slots.end && slots.end <= self.block_size);
        let half_start = block as usize * self.block_bytes()
            + layer * self.layer_bytes()
            + match half {
                KvHalf::K => 0,
                KvHalf::V => self.block_size * self.slot_bytes(),
            };
        half_start + slots.start * self.slot_bytes()..half_start + slots.end * self.slot_bytes()
    }

    /// Byte range in the arena of a whole layer of `block`: keys, then values.
    pub fn layer_range(&self, block: u32, layer: usize) -> Range<usize> {
        debug_assert!(layer < self.layers);
        let start = block as usize * self.block_bytes() + layer * self.layer_bytes();
        start..start + self.layer_bytes()
    }

    /// Byte range in the arena of the whole `block`.
    pub fn block_range(&self, block: u32) -> Range<usize> {
        let start = block as usize * self.block_bytes();
        start..start + self.block_bytes()
    }

    /// Compatibility digest: two workers may exchange KV blocks only if theirs are equal. Covers the protocol
    /// version, this geometry and the model (config and weights, through `model_digest`).
    pub fn digest(&self, model_digest: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("baton 2026 kv compatibility digest");
        let dims = [self.layers, self.kv_heads, self.head_dim, self.block_size].map(|d| d as u64);
        hasher.update(&u64::from(baton_proto::PROTOCOL_VERSION).to_le_bytes());
        for dim in dims {
            hasher.update(&dim.to_le_bytes());
        }
        hasher.update(&self.dtype.code().to_le_bytes());
        hasher.update(model_digest);
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> KvGeometry {
        KvGeometry {
            layers: 3,
            kv_heads: 2,
            head_dim: 8,
            block_size: 16,
            dtype: KvDtype::F32,
        }
    }

    #[test]
    fn ranges_tile_the_arena_without_gap_or_overlap() {
        let g = geometry();
        let mut next = 0;
        for block in 0..4 {
            assert_eq!(g.block_range(block).start, next);
            for layer in 0..g.layers {
                assert_eq!(g.layer_range(block, layer).start, next);
                for half in [KvHalf::K, KvHalf::V] {
                    for slot in 0..g.block_size {
                        let range = g.range(block, layer, half, slot..slot + 1);
                        assert_eq!(range.start, next);
                        assert_eq!(range.len(), g.slot_bytes());
                        next = range.end;
                    }
                }
                assert_eq!(g.layer_range(block, layer).end, next);
            }
            assert_eq!(g.block_range(block).end, next);
        }
        assert_eq!(g.arena_bytes(4), Some(next));
    }

    #[test]
    fn digest_depends_on_every_part() {
        let base = geometry();
        let digest = base.digest(&[7; 32]);
        let others = [
            KvGeometry { layers: 4, ..base },
            KvGeometry { kv_heads: 4, ..base },
            KvGeometry { head_dim: 16, ..base },
            KvGeometry { block_size: 32, ..base },
        ];
        assert!(others.iter().all(|g| g.digest(&[7; 32]) != digest));
        assert_ne!(base.digest(&[8; 32]), digest);
        assert_eq!(base.digest(&[7; 32]), digest);
    }

    #[test]
    fn sanity_bounds_reject_zero_and_huge() {
        assert!(geometry().is_sane());
        assert!(
            !KvGeometry {
                layers: 0,
                ..geometry()
            }
            .is_sane()
        );
        assert!(
            !KvGeometry {
                head_dim: usize::MAX,
                ..geometry()
            }
            .is_sane()
        );
        assert_eq!(geometry().blocks_for(0), 0);
        assert_eq!(geometry().blocks_for(17), 2);
    }
}
