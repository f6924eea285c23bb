//! Moving KV blocks between ranks of different tensor-parallel degrees, where each rank has an arena of its own that holds
//! its heads only (GPUs): which bytes of whose arena go where. Where all ranks share one arena (CPU) the bytes lie the
//! same at any degree, and a transfer does not know the degree.
//!
//! Pure arithmetic; moves nothing.

use crate::geometry::{KvGeometry, KvHalf};
use crate::shard::{Shard, replicas};
use std::ops::Range;

/// A block of a model on `ranks` ranks: it has the same number in the arena of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankBlock {
    /// Degree of tensor parallelism.
    pub ranks: usize,
    /// The block.
    pub block: u32,
}

/// One contiguous run of bytes to move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankRun {
    /// Whose arena it lies in.
    pub source_rank: usize,
    /// Where.
    pub source: Range<usize>,
    /// Whose arena it goes to.
    pub target_rank: usize,
    /// Where.
    pub target: Range<usize>,
}

/// The runs that bring `slots` of `layer` of a block to all ranks of `target`, each byte that a target rank holds once:
/// one run per pair of ranks with heads in common if the slots are the whole block, else K and V of each head. Heads that
/// several source ranks hold are taken from different ones by different target ranks.
///
/// `model` is the geometry with all heads of the model. `None` if it cannot be divided by one of the degrees, or has no
/// such layer or slots.
pub fn reshard(
    model: &KvGeometry,
    layer: usize,
    slots: Range<usize>,
    source: RankBlock,
    target: RankBlock,
) -> Option<Vec<RankRun>> {
    if layer >= model.layers || slots.start > slots.end || slots.end > model.block_size {
        return None;
    }
    let arenas = |ranks: usize| {
        let arena = |shard: Shard| {
            let heads = shard.kv_heads(model.kv_heads)?;
            let geometry = KvGeometry {
                kv_heads: heads.len(),
                ..*model
            };
            Some((heads, geometry))
        };
        Shard::all(ranks).map(arena).collect::<Option<Vec<_>>>()
    };
    let (sources, targets) = (arenas(source.ranks)?, arenas(target.ranks)?);
    let mut runs = Vec::new();
    for (target_rank, (wanted, to)) in targets.iter().enumerate() {
        let mut head = wanted.start;
        while head < wanted.end {
            // All ranks that hold this head, if there are several, hold it alone.
            let holder = sources.iter().position(|(held, _)| held.contains(&head))?;
            let source_rank = holder + target_rank % replicas(source.ranks, model.kv_heads).unwrap_or(1);
            let (held, from) = sources.get(source_rank)?;
            let heads = head..wanted.end.min(held.end);
            let local = |heads: &Range<usize>, base: usize| heads.start - base..heads.end - base;
            let (here, there) = (local(&heads, held.start), local(&heads, wanted.start));
            let mut run = |source: Range<usize>, target: Range<usize>| {
                runs.push(RankRun {
                    source_rank,
                    source,
                    target_rank,
                    target,
                });
            };
            if slots.len() == model.block_size {
                run(
                    from.heads_range(source.block, layer, here),
                    to.heads_range(target.block, layer, there),
                );
            } else if !slots.is_empty() {
                for (here, there) in here.zip(there) {
                    for half in [KvHalf::K, KvHalf::V] {
                        run(
                            from.range(source.block, layer, here, half, slots.clone()),
                            to.range(target.block, layer, there, half, slots.clone()),
                        );
                    }
                }
            }
            head = heads.end;
        }
    }
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::KvDtype;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const LAYERS: usize = 2;
    const BLOCK: usize = 4;

    fn geometry(kv_heads: usize) -> KvGeometry {
        KvGeometry {
            layers: LAYERS,
            kv_heads,
            head_dim: 2,
            block_size: BLOCK,
            dtype: KvDtype::Bf16,
        }
    }

    /// What each byte of a rank's block means: head of the model, half, slot, byte of the slot.
    fn meaning(model: &KvGeometry, at: RankBlock, rank: usize, layer: usize) -> HashMap<usize, [usize; 4]> {
        let shard = Shard::all(at.ranks).nth(rank).unwrap();
        let heads = shard.kv_heads(model.kv_heads).unwrap();
        let own = geometry(heads.len());
        let mut bytes = HashMap::new();
        for head in heads.clone() {
            for half in [KvHalf::K, KvHalf::V] {
                for slot in 0..BLOCK {
                    let range = own.range(at.block, layer, head - heads.start, half, slot..slot + 1);
                    for (i, byte) in range.enumerate() {
                        let half = usize::from(half == KvHalf::V);
                        assert_eq!(bytes.insert(byte, [head, half, slot, i]), None);
                    }
                }
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn every_byte_arrives_once_at_each_rank_that_holds_it(
            (kv_heads, degrees) in (1usize..9).prop_flat_map(|heads| {
                let possible: Vec<usize> =
                    (1..17).filter(|n| Shard::all(*n).all(|s| s.kv_heads(heads).is_some())).collect();
                (Just(heads), proptest::array::uniform2(proptest::sample::select(possible)))
            }),
            blocks in proptest::array::uniform2(0u32..5),
            layer in 0..LAYERS,
            (start, end) in (0..=BLOCK).prop_flat_map(|start| (Just(start), start..=BLOCK)),
        ) {
            let model = geometry(kv_heads);
            let [source, target] = [0, 1].map(|i| RankBlock { ranks: degrees[i], block: blocks[i] });
            let runs = reshard(&model, layer, start..end, source, target).expect("divisible");
            for target_rank in 0..target.ranks {
                let wanted = meaning(&model, target, target_rank, layer);
                let mut arrived = HashMap::new();
                for run in runs.iter().filter(|r| r.target_rank == target_rank) {
                    let held = meaning(&model, source, run.source_rank, layer);
                    prop_assert_eq!(run.source.len(), run.target.len());
                    for (from, to) in run.source.clone().zip(run.target.clone()) {
                        prop_assert_eq!(arrived.insert(to, held[&from]), None, "twice");
                    }
                }
                let expected: HashMap<_, _> =
                    wanted.into_iter().filter(|(_, [_, _, slot, _])| (start..end).contains(slot)).collect();
                prop_assert_eq!(arrived, expected);
            }
            if end - start == BLOCK {
                // As few runs as there are pairs of ranks with heads in common, replicas counted once.
                let per_target = source.ranks.min(kv_heads).div_ceil(target.ranks.min(kv_heads));
                prop_assert!(runs.len() <= target.ranks * (per_target + 1));
            }
        }
    }

    #[test]
    fn what_cannot_be_divided_or_is_not_there_is_told() {
        let at = |ranks| RankBlock { ranks, block: 0 };
        assert_eq!(reshard(&geometry(4), 0, 0..BLOCK, at(3), at(1)), None);
        assert_eq!(reshard(&geometry(4), 0, 0..BLOCK, at(1), at(6)), None);
        assert_eq!(reshard(&geometry(4), LAYERS, 0..BLOCK, at(1), at(1)), None);
        assert_eq!(reshard(&geometry(4), 0, 0..BLOCK + 1, at(1), at(1)), None);
        let runs = reshard(&geometry(4), 0, 0..BLOCK, at(2), at(4)).unwrap();
        let pairs: Vec<_> = runs.iter().map(|r| (r.source_rank, r.target_rank)).collect();
        assert_eq!(pairs, [(0, 0), (0, 1), (1, 2), (1, 3)]);
    }
}
