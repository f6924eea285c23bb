//! The Merkle tree over the row hashes of a period, as RFC 6962 (section 2.1) shapes it, with BLAKE3 for its hash:
//!
//! ```text
//! leaf   = BLAKE3(0x00 ‖ row hash)
//! parent = BLAKE3(0x01 ‖ left ‖ right)        the left subtree is the largest full one that leaves something
//! ```
//!
//! [`Frontier`] takes leaves one by one and keeps the roots of the full subtrees only: O(log n) of memory, so that the
//! state machine can carry it along. [`Prover`] makes the audit path of one leaf from a single pass over a period's
//! leaves, in O(log n) of memory too. [`root_of_path`] is what a verifier needs, nothing else.

use crate::Hash;

/// Most subtrees a frontier of 2⁶⁴ leaves can hold, and longest audit path.
const DEPTH_MAX: usize = 64;

fn leaf_hash(row_hash: &Hash) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[0]).update(row_hash);
    *hasher.finalize().as_bytes()
}

fn parent_hash(left: &Hash, right: &Hash) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[1]).update(left).update(right);
    *hasher.finalize().as_bytes()
}

/// Why bytes are no frontier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes are not a Merkle frontier; the state they come from is damaged")]
pub struct NotAFrontier(usize);

/// The right edge of a growing tree.
///
/// Invariant: `roots` has one entry for each bit set in `leaves`, largest subtree first; entry of bit k is the root of a
/// full subtree of 2ᵏ leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frontier {
    leaves: u64,
    roots: Vec<Hash>,
}

impl Frontier {
    /// A tree without leaves.
    pub const fn new() -> Self {
        Self {
            leaves: 0,
            roots: Vec::new(),
        }
    }

    /// Leaves so far.
    pub const fn len(&self) -> u64 {
        self.leaves
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.leaves == 0
    }

    /// Takes the next row's hash. O(1) on average, O(log n) at most.
    pub fn push(&mut self, row_hash: &Hash) {
        let mut root = leaf_hash(row_hash);
        // Like adding one to a binary number: every one at its end is carried.
        for _ in 0..self.leaves.trailing_ones() {
            if let Some(left) = self.roots.pop() {
                root = parent_hash(&left, &root);
            }
        }
        self.roots.push(root);
        self.leaves += 1;
    }

    /// Root of the tree so far. That of no leaves is BLAKE3 of nothing.
    pub fn root(&self) -> Hash {
        let folded = self
            .roots
            .iter()
            .rev()
            .copied()
            .reduce(|right, left| parent_hash(&left, &right));
        folded.unwrap_or_else(|| *blake3::hash(b"").as_bytes())
    }

    /// Eight bytes for the number of leaves, then the roots: at most 2,056 bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.leaves.to_le_bytes().to_vec();
        bytes.extend(self.roots.iter().flatten());
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`NotAFrontier`] for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NotAFrontier> {
        let wrong = NotAFrontier(bytes.len());
        let (count, roots) = bytes.split_first_chunk::<8>().ok_or(wrong)?;
        let leaves = u64::from_le_bytes(*count);
        let (roots, rest) = roots.as_chunks::<32>();
        let whole = rest.is_empty() && u32::try_from(roots.len()) == Ok(leaves.count_ones());
        if whole {
            Ok(Self {
                leaves,
                roots: roots.to_vec(),
            })
        } else {
            Err(wrong)
        }
    }
}

/// Makes the audit path of one leaf while the leaves of its period stream by.
#[derive(Debug)]
pub struct Prover {
    index: u64,
    seen: u64,
    /// The subtrees beside the way from the leaf to the root: first leaf, one past the last, what has come of it. From the
    /// leaf up.
    beside: Vec<(u64, u64, Frontier)>,
}

impl Prover {
    /// For the leaf `index` (from 0) of a tree with `leaves`; nothing if the tree has no such leaf.
    pub fn new(index: u64, leaves: u64) -> Option<Self> {
        if index >= leaves {
            return None;
        }
        let (mut first, mut end) = (0, leaves);
        let mut beside = Vec::new();
        while end - first > 1 {
            // The largest power of two below the number of leaves.
            let split = first + (1 << (63 - (end - first - 1).leading_zeros()));
            if index < split {
                beside.push((split, end, Frontier::new()));
                end = split;
            } else {
                beside.push((first, split, Frontier::new()));
                first = split;
            }
        }
        beside.reverse();
        Some(Self { index, seen: 0, beside })
    }

    /// Takes the next row's hash, from leaf 0 on.
    pub fn push(&mut self, row_hash: &Hash) {
        let leaf = self.seen;
        if leaf != self.index
            && let Some((_, _, frontier)) = self
                .beside
                .iter_mut()
                .find(|(first, end, _)| (*first..*end).contains(&leaf))
        {
            frontier.push(row_hash);
        }
        self.seen += 1;
    }

    /// The audit path, from the leaf up; nothing if leaves are missing.
    pub fn finish(self) -> Option<Vec<Hash>> {
        let whole = self
            .beside
            .iter()
            .all(|(first, end, frontier)| frontier.len() == end - first);
        whole.then(|| self.beside.iter().map(|(_, _, frontier)| frontier.root()).collect())
    }
}

/// The root of the tree of `leaves` in which `row_hash` is leaf `index` (from 0) with this audit path. A proof holds if it
/// is the root that was signed. Nothing if no tree of that size has such a path.
///
/// The algorithm of RFC 9162, section 2.1.3.2.
pub fn root_of_path(row_hash: &Hash, index: u64, leaves: u64, path: &[Hash]) -> Option<Hash> {
    if index >= leaves || path.len() > DEPTH_MAX {
        return None;
    }
    let (mut node, mut last) = (index, leaves - 1);
    let mut root = leaf_hash(row_hash);
    for sibling in path {
        if last == 0 {
            return None;
        }
        if node % 2 == 1 || node == last {
            root = parent_hash(sibling, &root);
            while node.is_multiple_of(2) && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            root = parent_hash(&root, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    (last == 0).then_some(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hashes(count: u64) -> Vec<Hash> {
        (0..count).map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes()).collect()
    }

    /// The definition of RFC 6962, word for word.
    fn root_by_definition(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => *blake3::hash(b"").as_bytes(),
            [one] => leaf_hash(one),
            many => {
                let split = many.len().next_power_of_two() / 2;
                parent_hash(&root_by_definition(&many[..split]), &root_by_definition(&many[split..]))
            }
        }
    }

    fn frontier(leaves: &[Hash]) -> Frontier {
        let mut frontier = Frontier::new();
        leaves.iter().for_each(|leaf| frontier.push(leaf));
        frontier
    }

    fn path(leaves: &[Hash], index: u64) -> Vec<Hash> {
        let mut prover = Prover::new(index, leaves.len() as u64).expect("the leaf exists");
        leaves.iter().for_each(|leaf| prover.push(leaf));
        prover.finish().expect("all leaves came")
    }

    #[test]
    fn the_frontier_follows_the_definition() {
        let all = hashes(70);
        for count in 0..=all.len() {
            let frontier = frontier(&all[..count]);
            assert_eq!(frontier.root(), root_by_definition(&all[..count]), "{count} leaves");
            assert_eq!(Frontier::from_bytes(&frontier.to_bytes()), Ok(frontier));
        }
    }

    #[test]
    fn every_leaf_of_every_small_tree_is_proved_and_no_other() {
        let all = hashes(33);
        for count in 1..=all.len() {
            let leaves = &all[..count];
            let (root, size) = (root_by_definition(leaves), count as u64);
            for index in 0..size {
                let leaf = &leaves[usize::try_from(index).expect("small")];
                let path = path(leaves, index);
                assert_eq!(root_of_path(leaf, index, size, &path), Some(root), "{index} of {count}");
                for other in 0..size {
                    if other != index {
                        assert_ne!(
                            root_of_path(leaf, other, size, &path),
                            Some(root),
                            "{index} as {other} of {count}"
                        );
                    }
                }
                assert_ne!(root_of_path(&[7; 32], index, size, &path), Some(root));
                let longer = [path.as_slice(), &[[0; 32]]].concat();
                assert_eq!(root_of_path(leaf, index, size, &longer), None);
                if let Some((_, shorter)) = path.split_last() {
                    assert_eq!(root_of_path(leaf, index, size, shorter), None);
                }
            }
        }
    }

    #[test]
    fn a_prover_wants_all_leaves_and_an_index_inside() {
        assert!(Prover::new(3, 3).is_none());
        assert!(Prover::new(0, 0).is_none());
        let mut prover = Prover::new(1, 3).expect("inside");
        hashes(2).iter().for_each(|leaf| prover.push(leaf));
        assert_eq!(prover.finish(), None);
        assert!(Prover::new(u64::MAX - 1, u64::MAX).is_some());
        assert_eq!(root_of_path(&[0; 32], 1, 1, &[]), None);
    }

    #[test]
    fn damaged_frontiers_are_refused() {
        let bytes = frontier(&hashes(5)).to_bytes();
        assert!(Frontier::from_bytes(&bytes[..bytes.len() - 1]).is_err());
        assert!(Frontier::from_bytes(&bytes[..bytes.len() - 32]).is_err());
        assert!(Frontier::from_bytes(&[]).is_err());
        assert!(Frontier::from_bytes(&[bytes.as_slice(), &[0; 32]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn a_changed_path_proves_nothing(count in 2u64..200, at in any::<(u64, u64, u8)>()) {
            let leaves = hashes(count);
            let index = at.0 % count;
            let mut path = path(&leaves, index);
            let root = root_by_definition(&leaves);
            let leaf = &leaves[usize::try_from(index).expect("small")];
            prop_assert_eq!(root_of_path(leaf, index, count, &path), Some(root));
            let step = usize::try_from(at.1 % path.len() as u64).expect("small");
            path[step][usize::from(at.2 % 32)] ^= 1 + at.2 / 32;
            prop_assert_ne!(root_of_path(leaf, index, count, &path), Some(root));
        }

        #[test]
        fn nothing_panics(index in any::<u64>(), leaves in any::<u64>(), path in prop::collection::vec(any::<Hash>(), 0..70)) {
            let _ = root_of_path(&[0; 32], index, leaves, &path);
        }
    }
}
