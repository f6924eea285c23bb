//! A block as bytes that can be trusted later: a header of [`HEADER_BYTES`], then the block.
//!
//! ```text
//! 0  magic "batonKV1"      8   format version, u32 LE    12  reserved, 0
//! 16 block name, 16 bytes  32  KV digest, 32 bytes       64  length of the block, u64 LE
//! 72 stamp, u64 LE         80  parent, u64 LE            88  reserved, 0            96  checksum, 32 bytes
//! ```
//!
//! The checksum is BLAKE3 over the first 96 bytes and the block. It is not there against attackers (whoever can write
//! the store can also compute it: guard the bucket) but so that no torn, stale or flipped byte passes: with 32 bits
//! one in four billion would, and BLAKE3 is here anyway and quicker than a disk. The stamp only orders blocks by age.
//! The parent is the short name of the block before this one in its chain, so that whoever opens a disk can tell chains to
//! routers; it is 0 in records of releases that did not write it, and nothing but those tellings depends on it, so
//! either release reads the other's records.

use baton_proto::block_hash::BlockHash;

/// Bytes before the block.
pub const HEADER_BYTES: usize = 128;
/// Raise it when the layout changes; other versions are foreign.
pub const FORMAT_VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"batonKV1";
/// What the checksum covers of the header.
const COVERED_BYTES: usize = 96;

/// What makes a record ours: only blocks of one shape under one digest are ever compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Model, geometry and dtype; see the worker's `KvGeometry::digest`.
    pub kv_digest: [u8; 32],
    /// Bytes of a block.
    pub block_bytes: usize,
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The block's name.
    pub name: BlockHash,
    /// The short name of the block before it in its chain, or the root's; 0 where that is not known.
    pub parent: u64,
    /// Larger is younger.
    pub stamp: u64,
}

impl Shape {
    /// The header of `block` under `name`.
    pub fn header(&self, entry: Entry, block: &[u8]) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        header[16..32].copy_from_slice(&entry.name);
        header[32..64].copy_from_slice(&self.kv_digest);
        header[64..72].copy_from_slice(&(block.len() as u64).to_le_bytes());
        header[72..80].copy_from_slice(&entry.stamp.to_le_bytes());
        header[80..88].copy_from_slice(&entry.parent.to_le_bytes());
        let sum = checksum(&header, block);
        header[COVERED_BYTES..].copy_from_slice(&sum);
        header
    }

    /// What a header claims, if it is of this shape at all. Proves nothing about the block: that is
    /// [`verify`](Self::verify)'s part.
    pub fn peek(&self, header: &[u8; HEADER_BYTES]) -> Option<Entry> {
        let word = |at: usize| u64::from_le_bytes(*header[at..].first_chunk().unwrap_or(&[0; 8]));
        let ours = header[..8] == MAGIC[..]
            && header[8..12] == FORMAT_VERSION.to_le_bytes()
            && header[32..64] == self.kv_digest
            && word(64) == self.block_bytes as u64;
        let name = *header[16..].first_chunk()?;
        let (stamp, parent) = (word(72), word(80));
        ours.then_some(Entry { name, parent, stamp })
    }

    /// Whether header and block belong together, and are what `name` names.
    pub fn verify(&self, name: &BlockHash, header: &[u8; HEADER_BYTES], block: &[u8]) -> bool {
        self.peek(header).is_some_and(|entry| entry.name == *name)
            && block.len() == self.block_bytes
            && header[COVERED_BYTES..] == checksum(header, block)
    }
}

fn checksum(header: &[u8; HEADER_BYTES], block: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..COVERED_BYTES]);
    hasher.update(block);
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape {
        kv_digest: [9; 32],
        block_bytes: 100,
    };

    proptest! {
        /// Any single changed byte, anywhere, is noticed; so are another name, model or length.
        #[test]
        fn nothing_broken_passes(name: [u8; 16], parent: u64, stamp: u64, fill: u8, at in 0usize..HEADER_BYTES + 100, flip in 1u8..) {
            let mut block = [fill; 100];
            let entry = Entry { name, parent, stamp };
            let mut header = SHAPE.header(entry, &block);
            prop_assert_eq!(SHAPE.peek(&header), Some(entry));
            prop_assert!(SHAPE.verify(&name, &header, &block));
            let mut other = name;
            other[3] ^= 1;
            prop_assert!(!SHAPE.verify(&other, &header, &block));
            prop_assert!(!SHAPE.verify(&name, &header, &block[..99]));
            let foreign = Shape { kv_digest: [8; 32], ..SHAPE };
            prop_assert!(foreign.peek(&header).is_none() && !foreign.verify(&name, &header, &block));
            match at.checked_sub(HEADER_BYTES) {
                Some(at) => block[at] ^= flip,
                None => header[at] ^= flip,
            }
            prop_assert!(!SHAPE.verify(&name, &header, &block));
        }
    }
}
