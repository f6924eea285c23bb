//! Causal attention of ragged spans over paged K and V.
//!
//! Flash-style: a group of query rows (tokens of one span times the query heads that share a K/V head) passes over the
//! keys in chunks of [`CHUNK`] positions with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). K and V of
//! a chunk are prepared once per group, K transposed, so that a lane is a key and no dot product ends in a sum across
//! lanes: widened to f32 (`wide`), or in pairs of bf16 where the CPU multiplies those (`half`).
//!
//! **Order (P1).** Chunks start at multiples of [`CHUNK`] positions, whatever the block size. For each row: scores are
//! chains along the head's elements; the chunk's maximum is exact; exponentials are summed in lanes; weighted values are
//! added in position order; all of it depends on the row's own position and keys only. A row takes part in a chunk exactly
//! if it sees one of its keys, and in a chunk that it sees in part it stops at its own position.

mod half;
mod wide;

use crate::isa::Isa;
use crate::kv::{KvArena, KvDtype};
use crate::lanes::{Lanes, dispatch, prefetch};
use crate::pool::{Pool, SharedOut};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Positions per step of the online softmax.
const CHUNK: usize = 32;
/// Query rows that share a pass over K and V, unless one token has more heads per K/V head.
const ROWS_TARGET: usize = 64;
/// Up to this many rows the pass waits for memory rather than for arithmetic, and asks for the next chunk early.
const PREFETCH_ROWS_MAX: usize = 16;

/// A run of consecutive tokens of one sequence within a batch.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSpan<'a> {
    /// Row of the first token in the batch; spans lie one after the other, without gaps, from row 0.
    pub first_row: usize,
    /// Tokens.
    pub rows: usize,
    /// Position of the first token in its sequence: it attends to positions `0..=start_position`.
    pub start_position: usize,
    /// The sequence's blocks, from position 0 on. Blocks being written belong to one span only.
    pub blocks: &'a [u32],
}

/// Checks what makes the kernels' pointers safe: rows contiguous, blocks enough and in bounds. Returns the rows.
///
/// # Panics
/// On a violation: it is a caller's bug, not input.
pub(crate) fn check_spans(spans: &[AttentionSpan<'_>], kv: &KvArena<'_>, layer: usize) -> usize {
    assert!(layer < kv.layout().layers, "attention: layer out of range");
    let mut rows = 0;
    for span in spans {
        assert!(
            span.first_row == rows && span.rows > 0,
            "attention: spans must follow one another"
        );
        assert!(
            kv.covers(span.blocks, &(span.start_position..span.start_position + span.rows)),
            "attention: block table too short or a block out of bounds"
        );
        rows += span.rows;
    }
    rows
}

/// Consecutive tokens of a span times the query heads that share one K/V head.
struct Group {
    span: usize,
    token: usize,
    tokens: usize,
    kv_head: usize,
}

/// Query heads start each row of `q` (rows are `q_stride` long); `out` is `[rows, heads * head_dim]`. The heads use
/// `kv_heads` of the arena.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    pool: &Pool,
    isa: Isa,
    scratch: &[Mutex<Vec<f32>>],
    q: &[f32],
    q_stride: usize,
    heads: usize,
    kv_heads: Range<usize>,
    spans: &[AttentionSpan<'_>],
    layer: usize,
    kv: &KvArena<'_>,
    out: &mut [f32],
) {
    let layout = kv.layout();
    let dim = layout.head_dim;
    let rows = check_spans(spans, kv, layer);
    assert!(
        !kv_heads.is_empty() && kv_heads.end <= layout.kv_heads && heads.is_multiple_of(kv_heads.len()),
        "attention: heads per kv head"
    );
    assert!(
        dim.is_multiple_of(2) && q_stride >= heads * dim && q.len() == rows * q_stride,
        "attention: q shape"
    );
    assert_eq!(out.len(), rows * heads * dim, "attention: out shape");
    let group_heads = heads / kv_heads.len();
    let tokens_max = (ROWS_TARGET / group_heads).max(1);
    let mut groups = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        for token in (0..span.rows).step_by(tokens_max) {
            for kv_head in 0..kv_heads.len() {
                groups.push(Group {
                    span: index,
                    token,
                    tokens: tokens_max.min(span.rows - token),
                    kv_head,
                });
            }
        }
    }
    let shared = SharedOut::new(out);
    // Last first: later tokens of a span have more keys, and the longest task should not be the last to start.
    let last = groups.len().saturating_sub(1);
    pool.run(groups.len(), &|worker, task| {
        let group = &groups[last - task];
        let span = &spans[group.span];
        let row = span.first_row + group.token;
        let head = group.kv_head * group_heads;
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `Kernels` checked the instruction set; shapes and blocks were checked above; each task writes the
        // outputs of its own tokens and heads.
        unsafe {
            let work = Work {
                q: q.as_ptr().add(row * q_stride + head * dim),
                q_stride,
                tokens: group.tokens,
                heads: group_heads,
                start: span.start_position + group.token,
                blocks: span.blocks,
                kv,
                layer,
                kv_head: kv_heads.start + group.kv_head,
                out: shared.at((row * heads + head) * dim),
                out_stride: heads * dim,
            };
            run_group(isa, &work, &mut scratch);
        }
    });
}

/// A group with its inputs and outputs.
struct Work<'a> {
    q: *const f32,
    q_stride: usize,
    tokens: usize,
    heads: usize,
    start: usize,
    blocks: &'a [u32],
    kv: &'a KvArena<'a>,
    layer: usize,
    kv_head: usize,
    out: *mut f32,
    out_stride: usize,
}

impl Work<'_> {
    fn rows(&self) -> usize {
        self.tokens * self.heads
    }

    /// Keys of the chunk at `base` that row `row` sees.
    fn visible(&self, row: usize, base: usize) -> usize {
        (self.start + row / self.heads + 1).saturating_sub(base).min(CHUNK)
    }

    /// Where the key of `position` lies; its value follows half a head later.
    fn key(&self, position: usize) -> *const u8 {
        let layout = self.kv.layout();
        let head = self
            .kv
            .head(self.blocks[position / layout.block_size], self.layer, self.kv_head);
        // SAFETY: the slot lies inside the head's half block.
        unsafe { head.add(position % layout.block_size * layout.row_bytes()) }
    }
}

/// Parts of a thread's scratch, all f32; bounded by the group's rows and the head's size.
struct Scratch {
    /// `[rows][dim]`: scaled queries.
    q: *mut f32,
    /// `[rows][dim padded]`: unnormalised output.
    out: *mut f32,
    /// `[rows][CHUNK]`: scores, then exponentials.
    scores: *mut f32,
    /// `[dim][CHUNK]`.
    keys: *mut f32,
    /// `[CHUNK][dim padded]`.
    values: *mut f32,
    /// `[rows]`: running maximum.
    maximum: *mut f32,
    /// `[rows]`: running sum of exponentials.
    sum: *mut f32,
    /// `[rows]`: what the output so far is multiplied by in this chunk.
    decay: *mut f32,
    dim: usize,
    /// `dim` rounded up to whole vectors of any instruction set.
    padded: usize,
}

impl Scratch {
    fn carve(memory: &mut Vec<f32>, rows: usize, dim: usize) -> Self {
        let padded = dim.next_multiple_of(16);
        let sizes = [
            rows * dim,
            rows * padded,
            rows * CHUNK,
            dim * CHUNK,
            CHUNK * padded,
            rows,
            rows,
            rows,
        ];
        let total: usize = sizes.iter().map(|s| s.next_multiple_of(16)).sum();
        if memory.len() < total {
            memory.resize(total, 0.0);
        }
        let mut next = memory.as_mut_ptr();
        let mut take = |size: usize| {
            let part = next;
            // SAFETY: the parts lie one after the other within `total`.
            next = unsafe { next.add(size.next_multiple_of(16)) };
            part
        };
        Scratch {
            q: take(sizes[0]),
            out: take(sizes[1]),
            scores: take(sizes[2]),
            keys: take(sizes[3]),
            values: take(sizes[4]),
            maximum: take(sizes[5]),
            sum: take(sizes[6]),
            decay: take(sizes[7]),
            dim,
            padded,
        }
    }
}

dispatch!(run_group = group_body(work: &Work<'_>, memory: &mut Vec<f32>));

/// How keys are compared with queries, and values weighted.
trait Arithmetic<L: Lanes> {
    /// Keeps a scaled query: `from` has `dim` elements.
    unsafe fn keep_query(s: &Scratch, row: usize, from: *const f32, scale: f32);
    /// Brings the chunk at `base` into the form in which it is used; what lies beyond `count` positions becomes zero.
    unsafe fn load_chunk(w: &Work<'_>, s: &Scratch, base: usize, count: usize);
    /// Scores of `M` rows against `V` vectors of keys at a time. Returns `M`.
    unsafe fn score<const M: usize, const V: usize>(s: &Scratch, row: usize) -> usize;
    /// The row's exponentials are final.
    unsafe fn keep_weights(s: &Scratch, row: usize);
    /// `out = out * decay + the first `count` values, weighted` for `M` rows and `V` vectors of elements from `at` on.
    unsafe fn weigh<const M: usize, const V: usize>(s: &Scratch, row: usize, count: usize, at: usize);
}

#[inline(always)]
unsafe fn group_body<L: Lanes>(w: &Work<'_>, memory: &mut Vec<f32>) {
    let layout = w.kv.layout();
    // SAFETY: the caller's contract is passed on.
    unsafe {
        if L::BF16 && layout.dtype == KvDtype::Bf16 && layout.head_dim <= half::DIM_MAX {
            pass::<L, half::Half<L>>(w, memory);
        } else {
            pass::<L, wide::Wide<L>>(w, memory);
        }
    }
}

#[inline(always)]
unsafe fn pass<L: Lanes, A: Arithmetic<L>>(w: &Work<'_>, memory: &mut Vec<f32>) {
    let dim = w.kv.layout().head_dim;
    let rows = w.rows();
    let s = Scratch::carve(memory, rows, dim);
    let scale = 1.0 / (dim as f32).sqrt();
    let positions = w.start + w.tokens;
    // SAFETY: `attention` checked shapes and blocks, `carve` sized the scratch; see the parts' comments there.
    unsafe {
        for row in 0..rows {
            let from = w.q.add(row / w.heads * w.q_stride + row % w.heads * dim);
            A::keep_query(&s, row, from, scale);
            *s.maximum.add(row) = f32::NEG_INFINITY;
            *s.sum.add(row) = 0.0;
        }
        std::ptr::write_bytes(s.out, 0, rows * s.padded);
        for base in (0..positions).step_by(CHUNK) {
            let count = CHUNK.min(positions - base);
            if rows <= PREFETCH_ROWS_MAX {
                ask_for(w, base + CHUNK, positions);
            }
            A::load_chunk(w, &s, base, count);
            // Rows are in order of position: those before `first` see nothing of this chunk, those from `whole` on all.
            let first = (0..rows).find(|r| w.visible(*r, base) > 0).unwrap_or(rows);
            let whole = (first..rows).find(|r| w.visible(*r, base) == CHUNK).unwrap_or(rows);
            score_rows::<L, A>(&s, first, rows);
            for row in first..rows {
                soften::<L>(&s, row, w.visible(row, base));
                A::keep_weights(&s, row);
            }
            for row in first..whole {
                add_values::<L, A, 1>(&s, row, w.visible(row, base));
            }
            let mut row = whole;
            while row < rows {
                row += match rows - row {
                    1 => add_values::<L, A, 1>(&s, row, CHUNK),
                    2 => add_values::<L, A, 2>(&s, row, CHUNK),
                    3 => add_values::<L, A, 3>(&s, row, CHUNK),
                    _ => add_values::<L, A, 4>(&s, row, CHUNK),
                };
            }
        }
        for row in 0..rows {
            let to = w.out.add(row / w.heads * w.out_stride + row % w.heads * dim);
            let inverse = 1.0 / *s.sum.add(row);
            for i in 0..dim {
                *to.add(i) = *s.out.add(row * s.padded + i) * inverse;
            }
        }
    }
}

/// Asks the memory for the K and V of the chunk at `base`.
#[inline(always)]
fn ask_for(w: &Work<'_>, base: usize, positions: usize) {
    let layout = w.kv.layout();
    let (row, half) = (layout.row_bytes(), layout.half_bytes());
    let mut at = base;
    while at < positions.min(base + CHUNK) {
        // To the end of the block or of the chunk: one run each of keys and values.
        let run = (layout.block_size - at % layout.block_size).min(base + CHUNK - at);
        let key = w.key(at);
        for line in (0..run * row).step_by(64) {
            prefetch(key.wrapping_add(line));
            prefetch(key.wrapping_add(half + line));
        }
        at += run;
    }
}

/// Scores of `rows` against the chunk's keys.
#[inline(always)]
unsafe fn score_rows<L: Lanes, A: Arithmetic<L>>(s: &Scratch, first: usize, rows: usize) {
    let mut row = first;
    while row < rows {
        // SAFETY: the caller's contract is passed on.
        unsafe {
            row += if L::WIDE {
                match rows - row {
                    1 => A::score::<1, 2>(s, row),
                    2 => A::score::<2, 2>(s, row),
                    3 => A::score::<3, 2>(s, row),
                    4 => A::score::<4, 2>(s, row),
                    5 | 9 | 10 => A::score::<5, 2>(s, row),
                    6 | 11 | 12 => A::score::<6, 2>(s, row),
                    7 => A::score::<7, 2>(s, row),
                    _ => A::score::<8, 2>(s, row),
                }
            } else {
                match rows - row {
                    1 => A::score::<1, 2>(s, row),
                    2 => A::score::<2, 2>(s, row),
                    3 => A::score::<3, 2>(s, row),
                    _ => A::score::<4, 2>(s, row),
                }
            };
        }
    }
}

/// One step of the online softmax: scores of `row` become exponentials, of which the first `visible` count.
#[inline(always)]
unsafe fn soften<L: Lanes>(s: &Scratch, row: usize, visible: usize) {
    // SAFETY: the row has CHUNK scores.
    unsafe {
        let scores = s.scores.add(row * CHUNK);
        for i in visible..CHUNK {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut largest = L::load(scores);
        for i in (L::N..CHUNK).step_by(L::N) {
            largest = L::max(largest, L::load(scores.add(i)));
        }
        let before = *s.maximum.add(row);
        let now = L::largest(largest);
        let now = if now > before { now } else { before };
        let maximum = L::splat(now);
        for i in (0..CHUNK).step_by(L::N) {
            L::store(L::exp(L::sub(L::load(scores.add(i)), maximum)), scores.add(i));
        }
        // `exp` never reaches zero.
        for i in visible..CHUNK {
            *scores.add(i) = 0.0;
        }
        let mut sum = L::load(scores);
        for i in (L::N..CHUNK).step_by(L::N) {
            sum = L::add(sum, L::load(scores.add(i)));
        }
        let mut lanes = [0f32; 16];
        L::store(L::exp(L::splat(before - now)), lanes.as_mut_ptr());
        let decay = lanes[0];
        *s.maximum.add(row) = now;
        *s.sum.add(row) = *s.sum.add(row) * decay + L::sum(sum);
        *s.decay.add(row) = decay;
    }
}

/// `out = out * decay + sum of the first `count` values, weighted` for `M` rows. Returns `M`.
#[inline(always)]
unsafe fn add_values<L: Lanes, A: Arithmetic<L>, const M: usize>(s: &Scratch, row: usize, count: usize) -> usize {
    let mut at = 0;
    // SAFETY: rows of values and outputs are `padded` long, a multiple of every vector.
    unsafe {
        while at + 4 * L::N <= s.padded {
            A::weigh::<M, 4>(s, row, count, at);
            at += 4 * L::N;
        }
        while at < s.padded {
            A::weigh::<M, 1>(s, row, count, at);
            at += L::N;
        }
    }
    M
}
