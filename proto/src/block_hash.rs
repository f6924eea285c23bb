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

/// The hash of one full block after `parent`: BLAKE3 keyed by the parent, over the tokens in little-endian order. A block
/// of 16 tokens is one compression that way; the parent as part of the message would make it two.
pub fn next(parent: &BlockHash, block: &[u32]) -> BlockHash {
    let mut key = [0; 32];
    key[..16].copy_from_slice(parent);
    key[16..].copy_from_slice(BLOCK_KEY);
    let hash = keyed(&key, block);
    let mut out = [0; 16];
    out.copy_from_slice(&hash[..16]);
    out
}

/// The second half of a block's key: no other use of BLAKE3 here has it.
const BLOCK_KEY: &[u8; 16] = b"baton kv block 2";

/// BLAKE3 of tokens, in little-endian order, under a key. Some thousand tokens at once are hashed several times faster per
/// token than block by block, because BLAKE3 reads 1 KiB chunks in parallel.
pub fn keyed(key: &[u8; 32], tokens: &[u32]) -> [u8; 32] {
    /// A block of 16 tokens.
    const ONE: usize = 16;
    /// As many chunks as AVX2 reads at once.
    const MANY: usize = 2048;
    if tokens.len() <= ONE {
        return *blake3::keyed_hash(key, bytes(tokens, &mut [0; 4 * ONE])).as_bytes();
    }
    let mut hasher = blake3::Hasher::new_keyed(key);
    let mut buffer = [0; 4 * MANY];
    for tokens in tokens.chunks(MANY) {
        hasher.update(bytes(tokens, &mut buffer));
    }
    *hasher.finalize().as_bytes()
}

/// The tokens' bytes, in a buffer that has room for them.
fn bytes<'b>(tokens: &[u32], buffer: &'b mut [u8]) -> &'b [u8] {
    let out = &mut buffer[..4 * tokens.len()];
    for (bytes, token) in out.chunks_exact_mut(4).zip(tokens) {
        bytes.copy_from_slice(&token.to_le_bytes());
    }
    out
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

        /// Long messages are hashed in pieces; the result is that of the whole.
        #[test]
        fn a_keyed_hash_is_blake3_of_the_bytes(tokens in prop::collection::vec(any::<u32>(), 0..5000)) {
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            prop_assert_eq!(keyed(&[7; 32], &tokens), *blake3::keyed_hash(&[7; 32], &bytes).as_bytes());
        }

        #[test]
        fn chain_is_repeated_next(tokens in prop::collection::vec(0u32..9, 0..70)) {
            let mut parent = root(b"x");
            let stepwise: Vec<_> = tokens.chunks_exact(8).map(|b| { parent = next(&parent, b); parent }).collect();
            prop_assert_eq!(chain(b"x", &tokens, 8), stepwise);
        }
    }
}
