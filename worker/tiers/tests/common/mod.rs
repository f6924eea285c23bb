//! Blocks for tests: one chain, whose bytes are a function of their names.

use baton_proto::block_hash::{BlockHash, short};
use baton_tiers::{Block, Pool};

/// Of a block.
pub const BYTES: usize = 16;

pub fn name(n: u32) -> BlockHash {
    let mut name = [0x5a; 16];
    name[..4].copy_from_slice(&n.to_le_bytes());
    name
}

/// The short name of the block before it: all of them are one chain.
pub fn parent(n: u32) -> u64 {
    short(&name(n.wrapping_sub(1)))
}

/// The block of that name; `None` without a buffer.
pub fn bytes(pool: &Pool, name: &BlockHash) -> Option<Block> {
    pool.fill(|bytes| {
        bytes.copy_from_slice(name);
        bytes.reverse();
        true
    })
}
