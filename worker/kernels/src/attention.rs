//! Causal attention of ragged spans over paged K and V.
//!
//! For each (token, head) the order is fixed by positions alone: scores are eight-lane dot products; the maximum is
//! exact; the exponentials are summed with position `p` in lane `p % 8`; the weighted values are added in position
//! order; the division comes last. Tokens of a span are grouped only so that a block's K and V are reused from cache.

use crate::isa::Isa;
use crate::kv::KvArena;
use crate::pool::{Pool, SharedOut};
use crate::simd::{LANES, Simd, dispatch};
use std::sync::{Mutex, PoisonError};

/// Tokens of one span that share a pass over K and V, at most.
const GROUP_TOKENS_MAX: usize = 8;

/// Scores one thread keeps at once, unless a single token of one group needs more: 512 KB, to stay in L2.
const SCORES_TARGET: usize = 128 * 1024;

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

struct Group {
    span: usize,
    token: usize,
    tokens: usize,
    kv_head: usize,
}

/// Query heads start each row of `q` (rows are `q_stride` long); `out` is `[rows, heads * head_dim]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    pool: &Pool,
    isa: Isa,
    scratch: &[Mutex<Vec<f32>>],
    q: &[f32],
    q_stride: usize,
    heads: usize,
    spans: &[AttentionSpan<'_>],
    layer: usize,
    kv: &KvArena<'_>,
    out: &mut [f32],
) {
    let layout = kv.layout();
    let dim = layout.head_dim;
    let rows = check_spans(spans, kv, layer);
    assert!(
        layout.kv_heads > 0 && heads.is_multiple_of(layout.kv_heads),
        "attention: heads per kv head"
    );
    assert!(
        q_stride >= heads * dim && q.len() == rows * q_stride,
        "attention: q shape"
    );
    assert_eq!(out.len(), rows * heads * dim, "attention: out shape");
    let group_heads = heads / layout.kv_heads;
    let mut groups = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        let positions = span.start_position + span.rows;
        let size = (SCORES_TARGET / (group_heads * positions)).clamp(1, GROUP_TOKENS_MAX);
        for token in (0..span.rows).step_by(size) {
            for kv_head in 0..layout.kv_heads {
                groups.push(Group {
                    span: index,
                    token,
                    tokens: size.min(span.rows - token),
                    kv_head,
                });
            }
        }
    }
    let shared = SharedOut::new(out);
    let scale = 1.0 / (dim as f32).sqrt();
    pool.run(groups.len(), &|worker, task| {
        let group = &groups[task];
        let span = &spans[group.span];
        let row = span.first_row + group.token;
        let head = group.kv_head * group_heads;
        let mut scores = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `Kernels` checked the instruction set; shapes and blocks were checked above; each task writes the
        // outputs of its own tokens and heads.
        unsafe {
            let work = GroupWork {
                q: q.as_ptr().add(row * q_stride + head * dim),
                q_stride,
                tokens: group.tokens,
                heads: group_heads,
                start: span.start_position + group.token,
                blocks: span.blocks,
                kv,
                layer,
                kv_head: group.kv_head,
                scale,
                out: shared.at((row * heads + head) * dim),
                out_stride: heads * dim,
            };
            run_group(isa, &work, &mut scores);
        }
    });
}

/// Consecutive tokens of a span times the query heads that share one K/V head.
struct GroupWork<'a> {
    q: *const f32,
    q_stride: usize,
    tokens: usize,
    heads: usize,
    start: usize,
    blocks: &'a [u32],
    kv: &'a KvArena<'a>,
    layer: usize,
    kv_head: usize,
    scale: f32,
    out: *mut f32,
    out_stride: usize,
}

dispatch!(run_group = group_body(work: &GroupWork<'_>, scores: &mut Vec<f32>));

#[inline(always)]
unsafe fn group_body<S: Simd>(w: &GroupWork<'_>, scores: &mut Vec<f32>) {
    let layout = w.kv.layout();
    let (dim, size, stride) = (layout.head_dim, layout.block_size, layout.slot());
    let positions = w.start + w.tokens;
    let row_len = positions.next_multiple_of(LANES);
    scores.resize(w.tokens * w.heads * row_len, 0.0);
    let scores = scores.as_mut_ptr();
    let blocks = &w.blocks[..positions.div_ceil(size)];
    // Keys of a block that the token sees: all, some, or none (it lies wholly in the token's future).
    let visible = |block: usize, token: usize| (w.start + token + 1).saturating_sub(block * size).min(size);

    // SAFETY: `attention` checked shapes and blocks; score rows are `row_len` long, more than any visible position.
    unsafe {
        for (index, &block) in blocks.iter().enumerate() {
            let keys = w.kv.layer(block, w.layer).add(w.kv_head * dim);
            for token in 0..w.tokens {
                let count = visible(index, token);
                for head in 0..w.heads {
                    let q = w.q.add(token * w.q_stride + head * dim);
                    let to = scores.add((token * w.heads + head) * row_len + index * size);
                    dot_keys::<S>(q, keys, stride, count, dim, w.scale, to);
                }
            }
        }
        let mut inverse_sums = [0f32; GROUP_TOKENS_MAX * 8];
        let mut spilled = Vec::new();
        let inverse_sums = if w.tokens * w.heads <= inverse_sums.len() {
            &mut inverse_sums[..]
        } else {
            spilled.resize(w.tokens * w.heads, 0.0);
            &mut spilled[..]
        };
        for token in 0..w.tokens {
            for head in 0..w.heads {
                let row = token * w.heads + head;
                let sum = exponentials::<S>(scores.add(row * row_len), w.start + token + 1);
                inverse_sums[row] = 1.0 / sum;
                std::ptr::write_bytes(w.out.add(token * w.out_stride + head * dim), 0, dim);
            }
        }
        for (index, &block) in blocks.iter().enumerate() {
            let values = w.kv.layer(block, w.layer).add(layout.half() + w.kv_head * dim);
            for token in 0..w.tokens {
                let count = visible(index, token);
                for head in 0..w.heads {
                    let from = scores.add((token * w.heads + head) * row_len + index * size);
                    let to = w.out.add(token * w.out_stride + head * dim);
                    add_values::<S>(from, values, stride, count, dim, to);
                }
            }
        }
        for token in 0..w.tokens {
            for head in 0..w.heads {
                let to = w.out.add(token * w.out_stride + head * dim);
                for i in 0..dim {
                    *to.add(i) *= inverse_sums[token * w.heads + head];
                }
            }
        }
    }
}

/// `out[i] = q . keys[i] * scale` for `count` keys `stride` apart.
#[inline(always)]
unsafe fn dot_keys<S: Simd>(
    q: *const f32,
    keys: *const f32,
    stride: usize,
    count: usize,
    dim: usize,
    scale: f32,
    out: *mut f32,
) {
    let whole = dim / LANES * LANES;
    let tail = dim - whole;
    let mut key = 0;
    // SAFETY: as `group_body`.
    unsafe {
        while key + 8 <= count {
            let base = keys.add(key * stride);
            let mut acc = [S::splat(0.0); 8];
            for i in (0..whole).step_by(LANES) {
                let qv = S::load(q.add(i));
                for (j, lane) in acc.iter_mut().enumerate() {
                    *lane = qv.mul_add(S::load(base.add(j * stride + i)), *lane);
                }
            }
            if tail > 0 {
                let qv = S::load_head(q.add(whole), tail);
                for (j, lane) in acc.iter_mut().enumerate() {
                    *lane = qv.mul_add(S::load_head(base.add(j * stride + whole), tail), *lane);
                }
            }
            S::sum8(acc).mul(S::splat(scale)).store(out.add(key));
            key += 8;
        }
        while key < count {
            let base = keys.add(key * stride);
            let mut acc = S::splat(0.0);
            for i in (0..whole).step_by(LANES) {
                acc = S::load(q.add(i)).mul_add(S::load(base.add(i)), acc);
            }
            if tail > 0 {
                acc = S::load_head(q.add(whole), tail).mul_add(S::load_head(base.add(whole), tail), acc);
            }
            *out.add(key) = acc.sum() * scale;
            key += 1;
        }
    }
}

/// Replaces `count` scores by `e^(score - max)` and returns their sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(scores: *mut f32, count: usize) -> f32 {
    let whole = count / LANES * LANES;
    let tail = count - whole;
    // SAFETY: as `group_body`.
    unsafe {
        let mut max = f32::NEG_INFINITY;
        for i in 0..count {
            max = max.max(*scores.add(i));
        }
        let minus_max = S::splat(-max);
        let mut sum = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let e = S::load(scores.add(i)).add(minus_max).exp();
            e.store(scores.add(i));
            sum = sum.add(e);
        }
        if tail > 0 {
            let e = S::load_head(scores.add(whole), tail).add(minus_max).exp();
            e.store_head(scores.add(whole), tail);
            sum = sum.add(S::load_head(scores.add(whole), tail));
        }
        sum.sum()
    }
}

/// `out += weights[i] * values[i]` for `count` values `stride` apart, in order.
#[inline(always)]
unsafe fn add_values<S: Simd>(
    weights: *const f32,
    values: *const f32,
    stride: usize,
    count: usize,
    dim: usize,
    out: *mut f32,
) {
    let mut i = 0;
    // SAFETY: as `group_body`.
    unsafe {
        while i + 8 * LANES <= dim {
            add_lanes::<S, 8>(weights, values.add(i), stride, count, out.add(i));
            i += 8 * LANES;
        }
        while i + 2 * LANES <= dim {
            add_lanes::<S, 2>(weights, values.add(i), stride, count, out.add(i));
            i += 2 * LANES;
        }
        while i + LANES <= dim {
            add_lanes::<S, 1>(weights, values.add(i), stride, count, out.add(i));
            i += LANES;
        }
        if i < dim {
            let tail = dim - i;
            let mut acc = S::load_head(out.add(i), tail);
            for key in 0..count {
                acc = S::splat(*weights.add(key)).mul_add(S::load_head(values.add(key * stride + i), tail), acc);
            }
            acc.store_head(out.add(i), tail);
        }
    }
}

#[inline(always)]
unsafe fn add_lanes<S: Simd, const N: usize>(
    weights: *const f32,
    values: *const f32,
    stride: usize,
    count: usize,
    out: *mut f32,
) {
    // SAFETY: as `group_body`; `N * LANES` elements fit from here on.
    unsafe {
        // Plain loops, no closures: a closure is not compiled for the instruction set unless it is inlined.
        let mut acc = [S::splat(0.0); N];
        for (n, lane) in acc.iter_mut().enumerate() {
            *lane = S::load(out.add(n * LANES));
        }
        for key in 0..count {
            let weight = S::splat(*weights.add(key));
            for (n, lane) in acc.iter_mut().enumerate() {
                *lane = weight.mul_add(S::load(values.add(key * stride + n * LANES)), *lane);
            }
        }
        for (n, lane) in acc.iter().enumerate() {
            lane.store(out.add(n * LANES));
        }
    }
}
