//! A view of the paged KV arena: pointers to runs of slots, bounds checked, no ownership of blocks.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// Element type of stored K and V, in native byte order (little-endian on every supported machine).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit IEEE floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// bfloat16.
    Bf16,
}

impl KvDtype {
    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::Bf16 => 2,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::Bf16 => "bf16",
        })
    }
}

/// Shape of the arena `[block][layer][kv_head][k|v][slot][head_dim]`.
///
/// Head-major within a block, so that the heads of one tensor-parallel rank are one contiguous run of a block's layer,
/// and attention reads each head's keys, then its values, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one head's K (or V) of one token.
    pub const fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one head's K (or V) of one block.
    pub const fn half_bytes(&self) -> usize {
        self.block_size * self.row_bytes()
    }

    /// Bytes of one layer of one block.
    pub const fn layer_bytes(&self) -> usize {
        self.kv_heads * 2 * self.half_bytes()
    }

    /// Bytes of one block.
    pub const fn block_bytes(&self) -> usize {
        self.layers * self.layer_bytes()
    }
}

/// The arena as the kernels see it, for the duration of a step.
#[derive(Debug, Clone, Copy)]
pub struct KvArena<'a> {
    base: *mut u8,
    blocks: u32,
    layout: KvLayout,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: the constructor's contract makes the named blocks exclusive to the step; kernels partition writes by slot.
unsafe impl Send for KvArena<'_> {}
// SAFETY: as above.
unsafe impl Sync for KvArena<'_> {}

impl KvArena<'_> {
    /// Views `blocks` blocks laid out as `layout` from `base` on.
    ///
    /// # Safety
    /// For as long as the view lives: `base` is aligned to four bytes and points to `blocks * layout.block_bytes()`
    /// initialised bytes (any bit pattern); nobody else writes a slot that a kernel is asked to read, or touches one that
    /// it is asked to write. Other blocks may be written by others meanwhile (a transfer landing).
    pub unsafe fn new(base: *mut u8, blocks: u32, layout: KvLayout) -> Self {
        KvArena {
            base,
            blocks,
            layout,
            memory: PhantomData,
        }
    }

    /// The shape.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Pointer to the first key of `head` in `layer` of `block`; its values follow [`KvLayout::half_bytes`] later.
    ///
    /// # Panics
    /// If out of bounds: one check per block is nothing beside the work on it.
    #[inline(always)]
    pub(crate) fn head(&self, block: u32, layer: usize, head: usize) -> *mut u8 {
        let layout = &self.layout;
        assert!(
            block < self.blocks && layer < layout.layers && head < layout.kv_heads,
            "KV block {block}, layer {layer}, head {head} out of bounds"
        );
        // SAFETY: just checked against what the constructor was promised.
        unsafe {
            self.base.add(
                block as usize * layout.block_bytes() + layer * layout.layer_bytes() + head * 2 * layout.half_bytes(),
            )
        }
    }

    /// Whether `block_table` names enough valid blocks for `positions`.
    pub(crate) fn covers(&self, block_table: &[u32], positions: &Range<usize>) -> bool {
        positions.end.div_ceil(self.layout.block_size) <= block_table.len()
            && block_table.iter().all(|block| *block < self.blocks)
    }
}
