//! Names of a prompt's blocks, without hashing again what was hashed a moment ago: agents and conversations send the same
//! beginning over and over.
//!
//! A prompt is cut into *groups* of 1,024 tokens (`GROUP_TOKENS`), or one block where blocks are larger. A group's *key* is the
//! BLAKE3 hash of its tokens, keyed by the key before it; the first is keyed by all else that names depend on (model,
//! tenant, block size). So a key stands for everything up to its group's end, as a name does, and names found under it
//! are those that would be computed: bit by bit, for nobody can make two prefixes meet. Keys are cheap, because BLAKE3
//! reads a group's chunks in parallel, where the chain of names is one compression after another.
//!
//! What is less than a group is always hashed. Tenants share nothing, so that how quickly a prompt is named tells nobody
//! what another tenant has sent.
//!
//! Not here: what names are ([`baton_proto::block_hash`]), and who holds which.

use baton_proto::block_hash::{self, BlockHash};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// Tokens of a group. Long enough to be hashed in parallel, short enough that the rest of a prompt is named in a few
/// microseconds.
const GROUP_TOKENS: usize = 1024;
/// Memory for names: some six million tokens in blocks of 16.
const CACHE_BYTES_MAX: u64 = 4 << 20;
/// What a group costs beside its names.
const GROUP_BYTES: u64 = 160;
/// Groups expected, for the size of the table; not a limit.
const GROUPS: usize = 1024;

type Key = [u8; 32];

struct Group {
    names: Box<[u64]>,
    /// The whole name of the last block, which those after it build on.
    last: BlockHash,
}

#[derive(Clone)]
struct Weight;

impl Weighter<Key, Arc<Group>> for Weight {
    fn weight(&self, _: &Key, group: &Arc<Group>) -> u64 {
        GROUP_BYTES + 8 * group.names.len() as u64
    }
}

/// Names prompts. See the module.
pub struct Namer {
    groups: Cache<Key, Arc<Group>, Weight>,
}

impl Default for Namer {
    fn default() -> Self {
        Self {
            groups: Cache::with_weighter(GROUPS, CACHE_BYTES_MAX, Weight),
        }
    }
}

impl Namer {
    /// The short names of the full blocks of `tokens`: [`block_hash::short`] of [`block_hash::chain`] over
    /// [`block_hash::cache_root`]. None for a block size of 0.
    pub fn names(&self, model_digest: &[u8; 32], salt: &[u8], tokens: &[u32], block_size: u32) -> Arc<[u64]> {
        let size = block_size as usize;
        if size == 0 {
            return Arc::from([]);
        }
        let root = block_hash::cache_root(model_digest, salt);
        let mut parent = block_hash::root(&root);
        let mut names = Vec::with_capacity(tokens.len() / size);
        let mut groups = tokens.chunks_exact((GROUP_TOKENS / size).max(1) * size);
        if groups.len() > 0 {
            let mut key = first_key(&root, block_size);
            for tokens in &mut groups {
                key = block_hash::keyed(&key, tokens);
                let group = self.groups.get(&key).unwrap_or_else(|| {
                    let group = Arc::new(Group::compute(parent, tokens, size));
                    self.groups.insert(key, group.clone());
                    group
                });
                names.extend_from_slice(&group.names);
                parent = group.last;
            }
        }
        for block in groups.remainder().chunks_exact(size) {
            parent = block_hash::next(&parent, block);
            names.push(block_hash::short(&parent));
        }
        names.into()
    }
}

impl Group {
    fn compute(parent: BlockHash, tokens: &[u32], size: usize) -> Self {
        let mut last = parent;
        let names = tokens.chunks_exact(size).map(|block| {
            last = block_hash::next(&last, block);
            block_hash::short(&last)
        });
        let names = names.collect();
        Self { names, last }
    }
}

fn first_key(root: &[u8], block_size: u32) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&block_size.to_le_bytes());
    hasher.update(root);
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(digest: &[u8; 32], salt: &[u8], tokens: &[u32], size: u32) -> Vec<u64> {
        let root = block_hash::cache_root(digest, salt);
        let chain = block_hash::chain(&root, tokens, size as usize);
        chain.iter().map(block_hash::short).collect()
    }

    proptest! {
        /// Prompts that share beginnings, are cut anywhere and change anywhere, of several tenants, models and block sizes,
        /// in any order through one cache.
        #[test]
        fn names_are_those_computed_from_scratch(
            steps in prop::collection::vec((0u8..2, 0u8..3, 0usize..6, 0usize..5000, prop::option::of(0usize..5000)), 1..12),
        ) {
            let namer = Namer::default();
            let whole: Vec<u32> = (0..5000).collect();
            for (digest, salt, size, length, change) in steps {
                let (digest, salt) = ([digest; 32], vec![b's'; usize::from(salt)]);
                let size = [1, 3, 16, 32, 1024, 3000][size];
                let mut prompt = whole[..length].to_vec();
                if let Some(token) = change.and_then(|at| prompt.get_mut(at)) {
                    *token ^= 1;
                }
                let names = namer.names(&digest, &salt, &prompt, size);
                prop_assert_eq!(names.to_vec(), plain(&digest, &salt, &prompt, size));
            }
        }
    }

    #[test]
    fn a_known_prefix_is_kept_for_its_tenant_model_and_block_size_alone() {
        let namer = Namer::default();
        let prompt: Vec<u32> = (0..2 * GROUP_TOKENS as u32 + 40).collect();
        namer.names(&[1; 32], b"a", &prompt, 16);
        assert_eq!(namer.groups.len(), 2);
        namer.names(&[1; 32], b"a", &prompt[..GROUP_TOKENS + 7], 16);
        namer.names(&[1; 32], b"a", &prompt, 16);
        assert_eq!(namer.groups.len(), 2, "known");
        namer.names(&[1; 32], b"b", &prompt, 16);
        namer.names(&[2; 32], b"a", &prompt, 16);
        namer.names(&[1; 32], b"a", &prompt, 32);
        assert_eq!(namer.groups.len(), 8, "each of its own");
        assert!(namer.names(&[1; 32], b"a", &prompt, 0).is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let namer = Namer::default();
        for salt in 0..20u32 {
            let prompt: Vec<u32> = (0..32 * GROUP_TOKENS as u32).map(|i| i ^ (salt << 20)).collect();
            namer.names(&[1; 32], b"", &prompt, 1);
            assert!(namer.groups.weight() <= CACHE_BYTES_MAX);
        }
        assert!(namer.groups.len() > 100);
    }
}
