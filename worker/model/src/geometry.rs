//! Where the K and V of a token lie in a worker's KV arena, and the digest that says whether two workers agree on it.
//!
//! The arena is block-major: `[block][layer][kv_head][k|v][slot][head_dim]`. A block's byte offset therefore does not
//! depend on how many blocks an arena has (prefill and decode workers size theirs differently), one layer of one
//! block is one contiguous run (what the layer-by-layer transfer moves), and the heads of one tensor-parallel rank are one
//! contiguous run of that, so that a transfer between different degrees is a list of such runs.
//!
//! The digest does not cover the tensor-parallel degree: the bytes lie the same at any. They are rounded differently, so a
//! request answered by workers of different degrees is answered right, but not bit for bit as by workers of one.
//!
//! Owns no memory and allocates no blocks: the block manager does, in `baton-engine`.

pub use baton_kernels::KvDtype;
use baton_kernels::KvLayout;
use std::ops::Range;

/// Which half of a head of a layer of a block: the keys come first, then the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvHalf {
    /// Keys.
    K,
    /// Values.
    V,
}

/// Order of the dimensions, part of the digest.
const LAYOUT: &str = "block layer kv_head half slot head_dim";

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

    /// Bytes of one slot: the K (or V) of one token in one layer, one head.
    pub const fn slot_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one head of one layer of one block: K and V of `block_size` tokens.
    pub const fn head_bytes(&self) -> usize {
        2 * self.block_size * self.slot_bytes()
    }

    /// Bytes of one layer of one block: all heads.
    pub const fn layer_bytes(&self) -> usize {
        self.kv_heads * self.head_bytes()
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

    /// Byte range in the arena of `slots` of one half of one head of one layer of `block`.
    ///
    /// The caller keeps `layer < layers`, `head < kv_heads` and `slots.end <= block_size`; debug builds check it.
    pub fn range(&self, block: u32, layer: usize, head: usize, half: KvHalf, slots: Range<usize>) -> Range<usize> {
        debug_assert!(layer < self.layers && head < self.kv_heads);
        debug_assert!(slots.start <= slots.end && slots.end <= self.block_size);
        let half_start = self.heads_range(block, layer, head..head + 1).start
            + match half {
                KvHalf::K => 0,
                KvHalf::V => self.block_size * self.slot_bytes(),
            };
        half_start + slots.start * self.slot_bytes()..half_start + slots.end * self.slot_bytes()
    }

    /// Byte range in the arena of some heads of a layer of `block`: what one tensor-parallel rank computes.
    pub fn heads_range(&self, block: u32, layer: usize, heads: Range<usize>) -> Range<usize> {
        debug_assert!(heads.start <= heads.end && heads.end <= self.kv_heads);
        let start = self.layer_range(block, layer).start;
        start + heads.start * self.head_bytes()..start + heads.end * self.head_bytes()
    }

    /// Byte range in the arena of a whole layer of `block`, all heads.
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

    /// The same shape as the kernels see it.
    pub(crate) fn layout(&self) -> KvLayout {
        KvLayout {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            block_size: self.block_size,
            dtype: self.dtype,
        }
    }

    /// Compatibility digest: two workers may exchange KV blocks only if theirs are equal. Covers the protocol
    /// version, the model (config and weights, through `model_digest`) and this geometry, but not the tokens per block: a
    /// transfer cuts its runs where either side's blocks end.
    pub fn digest(&self, model_digest: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("baton 2026 kv compatibility digest");
        let dims = [self.layers, self.kv_heads, self.head_dim].map(|d| d as u64);
        hasher.update(&u64::from(baton_proto::PROTOCOL_VERSION).to_le_bytes());
        for dim in dims {
            hasher.update(&dim.to_le_bytes());
        }
        hasher.update(LAYOUT.as_bytes());
        hasher.update(self.dtype.to_string().as_bytes());
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
                for head in 0..g.kv_heads {
                    assert_eq!(g.heads_range(block, layer, head..g.kv_heads).start, next);
                    for half in [KvHalf::K, KvHalf::V] {
                        for slot in 0..g.block_size {
                            let range = g.range(block, layer, head, half, slot..slot + 1);
                            assert_eq!(range.start, next);
                            assert_eq!(range.len(), g.slot_bytes());
                            next = range.end;
                        }
                    }
                    assert_eq!(g.heads_range(block, layer, 0..head + 1).end, next);
                }
                assert_eq!(g.layer_range(block, layer).end, next);
            }
            assert_eq!(g.block_range(block).end, next);
        }
        assert_eq!(g.arena_bytes(4), Some(next));
    }

    #[test]
    fn digest_depends_on_every_part_but_the_block_size() {
        let base = geometry();
        let digest = base.digest(&[7; 32]);
        let others = [
            KvGeometry { layers: 4, ..base },
            KvGeometry { kv_heads: 4, ..base },
            KvGeometry { head_dim: 16, ..base },
            KvGeometry {
                dtype: KvDtype::Bf16,
                ..base
            },
        ];
        assert!(others.iter().all(|g| g.digest(&[7; 32]) != digest));
        assert_ne!(base.digest(&[8; 32]), digest);
        let larger_blocks = KvGeometry { block_size: 32, ..base };
        assert_eq!(larger_blocks.digest(&[7; 32]), digest);
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
