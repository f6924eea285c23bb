//! The chained hash that names a full KV block by everything it depends on: tenant salt, model, and every token up to
//! its end. Equal hashes mean equal KV content, so gateways, workers and caches can speak of blocks without tokens.

/// Name of one full block: 128 bits of a BLAKE3 hash. 16 bytes keep an index small; at 2^48 blocks the chance of any
/// collision is about 2^-33.
pub type BlockHash = [u8; 16];

/// Hashes the full blocks of a token sequence, in order. The last, partial block has no hash.
///
/// `root` separates what must never share KV: callers pass model digest and tenant salt. Each hash covers its parent,
/// so block `i` names the whole prefix of `(i + 1) * block_size` tokens.
pub fn chain(root: &[u8], tokens: &[u32], block_size: usize) -> Vec<BlockHash> {
    assert!(
        block_size > 0,
        "block size is a positive constant of the model's KV geometry"
    );
    let mut parent = truncate(blake3::hash(root));
    tokens
        .chunks_exact(block_size)
        .map(|block| {
            parent = next(&parent, block);
            parent
        })
        .collect()
}

/// The hash of one full block after `parent`.
pub fn next(parent: &BlockHash, block: &[u32]) -> BlockHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(parent);
    for token in block {
        hasher.update(&token.to_le_bytes());
    }
    truncate(hasher.finalize())
}

/// The parent of the first block, for `root` (see [`chain`]).
pub fn root(root: &[u8]) -> BlockHash {
    truncate(blake3::hash(root))
}

/// What separates prefix caches: KV is shared only under one model and one salt. The argument of [`chain`] and [`root`].
pub fn cache_root(model_digest: &[u8; 32], salt: &[u8]) -> Vec<u8> {
    [model_digest.as_slice(), salt].concat()
}

/// The first eight bytes of a name, little endian: what block events and routers call a block. Hints only: whoever holds
/// blocks looks up full names.
pub fn short(hash: &BlockHash) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(first)
}

fn truncate(hash: blake3::Hash) -> BlockHash {
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn salt_separates_tenants() {
        let tokens: Vec<u32> = (0..64).collect();
        assert_ne!(chain(b"tenant-a", &tokens, 16), chain(b"tenant-b", &tokens, 16));
    }

    proptest! {
        /// A hash depends on every token before it and on none after it.
        #[test]
        fn prefix_property(tokens in prop::collection::vec(0u32..50_000, 1..200), at in 0usize..200, size in 1usize..33) {
            let hashes = chain(b"r", &tokens, size);
            prop_assert_eq!(hashes.len(), tokens.len() / size);
            let at = at % tokens.len();
            let mut changed = tokens.clone();
            changed[at] ^= 1;
            let other = chain(b"r", &changed, size);
            for (i, (a, b)) in hashes.iter().zip(&other).enumerate() {
                prop_assert_eq!(a == b, at >= (i + 1) * size);
            }
        }

        #[test]
        fn chain_is_repeated_next(tokens in prop::collection::vec(0u32..9, 0..70)) {
            let mut parent = root(b"x");
            let stepwise: Vec<_> = tokens.chunks_exact(8).map(|b| { parent = next(&parent, b); parent }).collect();
            prop_assert_eq!(chain(b"x", &tokens, 8), stepwise);
        }
    }
}
