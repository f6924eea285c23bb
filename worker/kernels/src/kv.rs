//! A view of the paged KV arena: pointers to slots, bounds checked, no ownership of blocks.

use std::marker::PhantomData;
use std::ops::Range;

/// Strides of the arena `[block][layer][k|v][slot][kv_head][head_dim]`, in f32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Tokens per block.
    pub block_size: usize,
}

impl KvLayout {
    /// Elements of one K or V slot of one layer.
    pub const fn slot(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Elements of one half (K or V) of one layer of one block.
    pub const fn half(&self) -> usize {
        self.block_size * self.slot()
    }

    /// Elements of one block.
    pub const fn block(&self) -> usize {
        self.layers * 2 * self.half()
    }
}

/// The arena as the kernels see it, for the duration of a step.
#[derive(Debug, Clone, Copy)]
pub struct KvArena<'a> {
    base: *mut f32,
    blocks: u32,
    layout: KvLayout,
    memory: PhantomData<&'a [f32]>,
}

// SAFETY: the constructor's contract makes the named blocks exclusive to the step; kernels partition writes by slot.
unsafe impl Send for KvArena<'_> {}
// SAFETY: as above.
unsafe impl Sync for KvArena<'_> {}

impl KvArena<'_> {
    /// Views `blocks` blocks laid out as `layout` from `base` on.
    ///
    /// # Safety
    /// For as long as the view lives: `base` is aligned for f32 and points to `blocks * layout.block()` initialised
    /// floats (any bit pattern); nobody else writes a slot that a kernel is asked to read, or touches one that it is
    /// asked to write. Other blocks may be written by others meanwhile (a transfer landing).
    pub unsafe fn new(base: *mut f32, blocks: u32, layout: KvLayout) -> Self {
        KvArena {
            base,
            blocks,
            layout,
            memory: PhantomData,
        }
    }

    /// The strides.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Pointer to the first key of `layer` of `block`; the values follow [`KvLayout::half`] elements later.
    ///
    /// # Panics
    /// If out of bounds: one check per block is nothing beside the work on it.
    pub(crate) fn layer(&self, block: u32, layer: usize) -> *mut f32 {
        assert!(
            block < self.blocks && layer < self.layout.layers,
            "KV block {block}, layer {layer} out of bounds"
        );
        // SAFETY: just checked against what the constructor was promised.
        unsafe {
            self.base
                .add(block as usize * self.layout.block() + layer * 2 * self.layout.half())
        }
    }

    /// Whether `block_table` names enough valid blocks for `positions`.
    pub(crate) fn covers(&self, block_table: &[u32], positions: &Range<usize>) -> bool {
        positions.end.div_ceil(self.layout.block_size) <= block_table.len()
            && block_table.iter().all(|block| *block < self.blocks)
    }
}
