//! A KV arena: registered memory of a known geometry. Which block belongs to whom is the block manager's business.

use crate::error::ModelError;
use crate::geometry::KvGeometry;
use baton_kernels::KvArena;
use baton_kvtransfer::Region;
use std::sync::Arc;

/// Memory for `blocks` KV blocks, shared with the transports.
#[derive(Debug, Clone)]
pub struct KvCache {
    region: Arc<Region>,
    geometry: KvGeometry,
    blocks: u32,
}

impl KvCache {
    /// Maps zeroed memory for `blocks` blocks; the system hands out pages on first use.
    ///
    /// # Errors
    /// [`ModelError::DoesNotFit`] if the system refuses.
    pub fn allocate(geometry: KvGeometry, blocks: u32) -> Result<Self, ModelError> {
        let does_not_fit = |reason: String| {
            ModelError::DoesNotFit(format!(
                "cannot reserve memory for {blocks} KV blocks: {reason}; ask for fewer"
            ))
        };
        let bytes = Some(geometry)
            .filter(KvGeometry::is_sane)
            .and_then(|g| g.arena_bytes(blocks))
            .ok_or_else(|| does_not_fit("more than the address space".into()))?;
        let region = Region::new(bytes).map_err(|e| does_not_fit(e.to_string()))?;
        Ok(KvCache {
            region,
            geometry,
            blocks,
        })
    }

    /// The memory.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Its shape.
    pub fn geometry(&self) -> KvGeometry {
        self.geometry
    }

    /// Blocks in it.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The arena as the kernels see it.
    #[allow(unsafe_code)]
    pub(crate) fn arena(&self) -> KvArena<'_> {
        // SAFETY: an empty slice claims no byte; only its address is used. The region is page-aligned, initialised,
        // has room for `blocks` blocks (see `allocate`) and outlives the view. The block manager gives a batch only
        // blocks that its sequences own, and opens no window over blocks that a batch writes; `Decoder::forward`
        // refuses batches whose spans would write the same block.
        unsafe {
            KvArena::new(
                self.region.slice_mut(0..0).as_mut_ptr(),
                self.blocks,
                self.geometry.layout(),
            )
        }
    }
}
