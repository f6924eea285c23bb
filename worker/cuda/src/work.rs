//! How a batch's attention is divided among blocks, and to what sizes a decode step is padded. Pure arithmetic.
//!
//! # Invariants
//! - Every (row, split of its keys) is computed by exactly one block, or by a block that computes all splits of the row.
//! - Which of the two changes no bit of the result (see `kernels/attention.cu`), so it is a matter of speed only: one split
//!   per block where a span has few rows, so that a long context occupies the whole device even at batch 1.
//! - Two decode steps of one bucket have launches of the same sizes, so that one graph serves both.

use crate::args::{ITEM_ROWS, NONE, SPLIT};
use baton_model::StepSpan;

/// Most rows of partial results (some hundred bytes each); what does not fit is computed by blocks that need none.
pub const PARTIAL_ROWS_MAX: usize = 1 << 16;
/// Decode steps up to this are padded to a bucket, and replayed as graphs.
pub const BUCKET_MAX: usize = 256;

/// As `Item` in `kernels/attention.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// First row in the batch.
    pub row: u32,
    /// Tokens; 0 for an item that only fills the grid.
    pub tokens: u32,
    /// Position of the first token.
    pub start: u32,
    /// Where the span's block table starts in all tables.
    pub table: u32,
    /// First split.
    pub split_first: u32,
    /// One past the last split; of a merge, how many there are.
    pub split_end: u32,
    /// First row of partial results, or `NONE`.
    pub partial: u32,
}

impl Item {
    const EMPTY: Item = Item {
        row: 0,
        tokens: 0,
        start: 0,
        table: 0,
        split_first: 0,
        split_end: 0,
        partial: NONE,
    };

    fn words(&self) -> [u32; 8] {
        let i = self;
        [
            i.row,
            i.tokens,
            i.start,
            i.table,
            i.split_first,
            i.split_end,
            i.partial,
            0,
        ]
    }
}

/// How heads are grouped, for [`Work::of`].
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads of a K/V head.
    pub group: usize,
    /// K/V heads.
    pub kv_heads: usize,
    /// Most tokens of an item; 0 where kernels take one split of all and no partial results (f32).
    pub tokens_max: usize,
    /// Whether splits may be computed apart.
    pub splits: bool,
}

/// A step's attention.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Work {
    /// Blocks' items; the launch is as many blocks wide.
    pub items: Vec<Item>,
    /// Merges of splits.
    pub merges: Vec<Item>,
    /// All spans' block tables.
    pub tables: Vec<u32>,
    /// Rows of partial results in use.
    pub partial_rows: usize,
}

impl Work {
    /// Divides a step. `pad` for a decode step: numbers of items become powers of two.
    pub fn of(spans: &[StepSpan<'_>], block_size: usize, heads: Heads, pad: bool) -> Self {
        let mut work = Work::default();
        for span in spans {
            let end = span.start_position + span.rows;
            let table = to_u32(work.tables.len());
            work.tables
                .extend(&span.blocks[..end.div_ceil(block_size).min(span.blocks.len())]);
            let rows = span.rows * heads.group;
            let splits = end.div_ceil(SPLIT);
            let partials = rows * heads.kv_heads * splits;
            let item = |token: usize, tokens: usize| Item {
                row: to_u32(span.first_row + token),
                tokens: to_u32(tokens),
                start: to_u32(span.start_position + token),
                table,
                split_first: 0,
                split_end: to_u32((span.start_position + token + tokens).div_ceil(SPLIT)),
                partial: NONE,
            };
            let few = heads.splits && splits > 1 && rows <= ITEM_ROWS && span.rows <= heads.tokens_max;
            if few && work.partial_rows + partials <= PARTIAL_ROWS_MAX {
                for split in 0..splits {
                    work.items.push(Item {
                        split_first: to_u32(split),
                        split_end: to_u32(split + 1),
                        partial: to_u32(work.partial_rows + split * rows * heads.kv_heads),
                        ..item(0, span.rows)
                    });
                }
                work.merges.push(Item {
                    partial: to_u32(work.partial_rows),
                    split_end: to_u32(splits),
                    ..item(0, span.rows)
                });
                work.partial_rows += partials;
                continue;
            }
            // Last first: later tokens have more keys, and the longest block should not be the last to start.
            for token in (0..span.rows).step_by(heads.tokens_max.max(1)).rev() {
                work.items
                    .push(item(token, heads.tokens_max.max(1).min(span.rows - token)));
            }
        }
        if pad {
            for list in [&mut work.items, &mut work.merges] {
                let size = list.len().next_power_of_two();
                list.resize(size, Item::EMPTY);
            }
        }
        work
    }

    /// The items, then the merges, as the kernels read them.
    pub fn item_words(&self) -> impl Iterator<Item = u32> + '_ {
        self.items.iter().chain(&self.merges).flat_map(Item::words)
    }
}

/// Rows that a decode step of `rows` is padded to; `None` if it is too large to be worth a graph.
pub fn bucket(rows: usize) -> Option<usize> {
    match rows {
        0..=8 => Some(rows.next_power_of_two()),
        9..=64 => Some(rows.next_multiple_of(8)),
        65..=BUCKET_MAX => Some(rows.next_multiple_of(32)),
        _ => None,
    }
}

fn to_u32(value: usize) -> u32 {
    // Rows, positions and table entries are bounded far below by the model's configuration.
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const HEADS: Heads = Heads {
        group: 4,
        kv_heads: 2,
        tokens_max: 16,
        splits: true,
    };

    fn span(first_row: usize, rows: usize, start_position: usize, blocks: &[u32]) -> StepSpan<'_> {
        StepSpan {
            first_row,
            rows,
            start_position,
            blocks,
        }
    }

    #[test]
    fn every_row_and_split_is_computed_once() {
        let blocks: Vec<u32> = (0..1000).collect();
        let spans = [
            span(0, 1, 2000, &blocks),
            span(1, 1, 3, &blocks),
            span(2, 40, 300, &blocks),
            span(42, 16, 511, &blocks),
            span(58, 5, 0, &blocks),
        ];
        for pad in [false, true] {
            let work = Work::of(&spans, 16, HEADS, pad);
            let mut seen: BTreeMap<(u32, u32), u32> = BTreeMap::new();
            for item in &work.items {
                assert!(item.tokens as usize * HEADS.group <= ITEM_ROWS);
                for token in 0..item.tokens {
                    for split in item.split_first..item.split_end {
                        // Splits past the token's own position are seen by none of its keys.
                        if split * SPLIT as u32 <= item.start + token {
                            *seen.entry((item.row + token, split)).or_default() += 1;
                        }
                    }
                }
            }
            let mut wanted = BTreeMap::new();
            for span in &spans {
                for token in 0..span.rows {
                    for split in 0..(span.start_position + token + 1).div_ceil(SPLIT) {
                        wanted.insert(((span.first_row + token) as u32, split as u32), 1);
                    }
                }
            }
            assert_eq!(seen, wanted);
            assert!(!pad || (work.items.len().is_power_of_two() && work.merges.len().is_power_of_two()));
        }
    }

    #[test]
    fn partial_results_do_not_overlap_and_are_bounded() {
        let blocks: Vec<u32> = (0..2000).collect();
        let spans: Vec<_> = (0..300).map(|row| span(row, 1, 20_000 + row, &blocks)).collect();
        let work = Work::of(&spans, 16, HEADS, false);
        let rows = HEADS.group * HEADS.kv_heads;
        let mut taken: Vec<u32> = work.items.iter().map(|i| i.partial).filter(|p| *p != NONE).collect();
        assert!(
            taken.len() > 1000 && work.items.iter().any(|i| i.partial == NONE),
            "some of each"
        );
        taken.sort_unstable();
        assert!(taken.windows(2).all(|w| w[1] - w[0] >= rows as u32));
        assert!(work.partial_rows <= PARTIAL_ROWS_MAX);
        assert_eq!(*taken.last().unwrap() as usize + rows, work.partial_rows);
    }

    #[test]
    fn buckets_are_few_and_never_smaller() {
        let mut sizes: Vec<usize> = (1..=BUCKET_MAX).filter_map(bucket).collect();
        assert!((1..=BUCKET_MAX).all(|rows| bucket(rows).is_some_and(|b| b >= rows && b <= BUCKET_MAX)));
        sizes.dedup();
        assert!(sizes.len() <= 20, "{sizes:?}");
        assert_eq!(bucket(BUCKET_MAX + 1), None);
    }
}
