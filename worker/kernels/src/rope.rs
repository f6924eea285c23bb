//! Rotary position embedding of Q (in place) and K, and the write of K and V into their slots of the KV arena.

use crate::attention::{AttentionSpan, check_spans};
use crate::kv::KvArena;
use crate::pool::{Pool, SharedOut};

/// Token rows per task.
const ROWS_PER_TASK: usize = 8;

/// Rows of `qkv` are `[q heads | k heads | v heads]`. `cos` and `sin` have `head_dim / 2` values per row (rotate-half
/// convention: element `i` pairs with `i + head_dim / 2`). The rotated K and the V go to `layer` of the arena.
#[allow(clippy::too_many_arguments)]
pub(crate) fn rope_kv_write(
    pool: &Pool,
    qkv: &mut [f32],
    heads: usize,
    cos: &[f32],
    sin: &[f32],
    spans: &[AttentionSpan<'_>],
    layer: usize,
    kv: &KvArena<'_>,
) {
    let layout = kv.layout();
    let (dim, slot) = (layout.head_dim, layout.slot());
    let width = heads * dim + 2 * slot;
    let rows = check_spans(spans, kv, layer);
    assert!(dim.is_multiple_of(2), "rope: head_dim must be even");
    assert_eq!(qkv.len(), rows * width, "rope: qkv shape");
    assert!(
        cos.len() == rows * dim / 2 && sin.len() == cos.len(),
        "rope: table shape"
    );
    let shared = SharedOut::new(qkv);
    pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
        for row in task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK) {
            // Spans are sorted by `first_row`: the last one that starts at or before this row holds it.
            let span = &spans[spans.partition_point(|s| s.first_row <= row) - 1];
            let position = span.start_position + (row - span.first_row);
            let (cos, sin) = (
                &cos[row * dim / 2..(row + 1) * dim / 2],
                &sin[row * dim / 2..(row + 1) * dim / 2],
            );
            // SAFETY: the row lies inside `qkv` and is this task's own.
            let x = unsafe { std::slice::from_raw_parts_mut(shared.at(row * width), width) };
            for head in x[..heads * dim + slot].chunks_exact_mut(dim) {
                rotate(head, cos, sin);
            }
            let base = kv.layer(span.blocks[position / layout.block_size], layer);
            let at = position % layout.block_size * slot;
            // SAFETY: the slot lies inside this layer of the block, each row has its own slot (positions of a span
            // are distinct and writable blocks belong to one span), and the arena's contract makes it writable.
            unsafe {
                let (k, v) = x[heads * dim..].split_at(slot);
                std::ptr::copy_nonoverlapping(k.as_ptr(), base.add(at), slot);
                std::ptr::copy_nonoverlapping(v.as_ptr(), base.add(layout.half() + at), slot);
            }
        }
    });
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(head.len() / 2);
    for ((l, h), (c, s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        (*l, *h) = (*l * c - *h * s, *h * c + *l * s);
    }
}
