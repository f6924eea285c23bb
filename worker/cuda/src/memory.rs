//! How many KV blocks a device has room for. Pure arithmetic over what the driver says is free.

use crate::driver::DeviceError;
use baton_model::KvGeometry;

/// Share of the free memory that is left alone, in 1/16: the driver's own needs, graphs, and the scratch of attention.
const RESERVE_SIXTEENTHS: u64 = 1;
/// Left alone at least.
const RESERVE_BYTES_MIN: u64 = 256 << 20;

/// Blocks for a device with `free` bytes once the weights are there: all that fits, or as much as `asked` bytes hold.
///
/// # Errors
/// [`DeviceError::OutOfMemory`] if what was asked for does not fit, or not one block does.
pub fn arena_blocks(geometry: &KvGeometry, free: u64, asked: Option<u64>) -> Result<u32, DeviceError> {
    let reserve = (free / 16 * RESERVE_SIXTEENTHS).max(RESERVE_BYTES_MIN);
    let usable = free.saturating_sub(reserve);
    let bytes = asked.unwrap_or(usable);
    let block = geometry.block_bytes() as u64;
    let blocks = bytes / block;
    if bytes > usable || blocks == 0 {
        return Err(DeviceError::OutOfMemory {
            bytes: usize::try_from(bytes.max(block)).unwrap_or(usize::MAX),
        });
    }
    // Block numbers are 32-bit; the last value means "none" to the kernels, and so must every slot be.
    let slots_max = u64::from(u32::MAX - 1) / geometry.block_size.max(1) as u64;
    Ok(u32::try_from(blocks.min(slots_max)).unwrap_or(u32::MAX - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_model::KvDtype;

    const GEOMETRY: KvGeometry = KvGeometry {
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        block_size: 16,
        dtype: KvDtype::Bf16,
    };

    #[test]
    fn leaves_a_reserve_and_refuses_what_does_not_fit() {
        let block = GEOMETRY.block_bytes() as u64;
        let free = 60u64 << 30;
        let all = u64::from(arena_blocks(&GEOMETRY, free, None).unwrap()) * block;
        assert!(all < free / 16 * 15 + block && all > free / 16 * 15 - block);
        assert_eq!(arena_blocks(&GEOMETRY, free, Some(10 * block + 1)), Ok(10));
        assert!(arena_blocks(&GEOMETRY, free, Some(free)).is_err());
        assert!(arena_blocks(&GEOMETRY, free, Some(block - 1)).is_err());
        assert!(arena_blocks(&GEOMETRY, 1 << 20, None).is_err());
        assert!(arena_blocks(&GEOMETRY, 0, None).is_err());
    }
}
