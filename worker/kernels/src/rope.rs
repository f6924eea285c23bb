//! Rotary position embedding of Q (in place) and K, and the write of K and V into their slots of the KV arena.

use crate::attention::{AttentionSpan, check_spans};
use crate::kv::{KvArena, KvDtype};
use crate::pool::{Pool, SharedOut};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Token rows per task.
const ROWS_PER_TASK: usize = 8;

/// Rows of `qkv` are `[q heads | k heads | v heads]`. `cos` and `sin` have `head_dim / 2` values per row (rotate-half
/// convention: element `i` pairs with `i + head_dim / 2`). The rotated K and the V go to `layer` of the arena, from head
/// `first_head` of it on.
#[allow(clippy::too_many_arguments)]
pub(crate) fn rope_kv_write(
    pool: &Pool,
    qkv: &mut [f32],
    heads: usize,
    kv_heads: std::ops::Range<usize>,
    cos: &[f32],
    sin: &[f32],
    spans: &[AttentionSpan<'_>],
    layer: usize,
    kv: &KvArena<'_>,
) {
    let layout = kv.layout();
    let dim = layout.head_dim;
    let width = (heads + 2 * kv_heads.len()) * dim;
    let rows = check_spans(spans, kv, layer);
    assert!(dim.is_multiple_of(2), "rope: head_dim must be even");
    assert!(kv_heads.end <= layout.kv_heads, "rope: kv heads");
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
            for head in x[..(heads + kv_heads.len()) * dim].chunks_exact_mut(dim) {
                rotate(head, cos, sin);
            }
            let (keys, values) = x[heads * dim..].split_at(kv_heads.len() * dim);
            let block = span.blocks[position / layout.block_size];
            let slot = position % layout.block_size * layout.row_bytes();
            for (head, (k, v)) in kv_heads.clone().zip(keys.chunks(dim).zip(values.chunks(dim))) {
                // SAFETY: both slots lie inside this head of the block, each row has its own slot (positions of a span
                // are distinct and writable blocks belong to one span), and the arena's contract makes it writable.
                unsafe {
                    let to = kv.head(block, layer, head).add(slot);
                    store(k, layout.dtype, to);
                    store(v, layout.dtype, to.add(layout.half_bytes()));
                }
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

/// Rounds `row` to `dtype` at `to`.
///
/// # Safety
/// `to` has room for the row and nobody else uses it; it is aligned to the element type.
unsafe fn store(row: &[f32], dtype: KvDtype, to: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            KvDtype::F32 => std::ptr::copy_nonoverlapping(row.as_ptr().cast(), to, row.len() * 4),
            KvDtype::F16 => std::slice::from_raw_parts_mut(to.cast::<f16>(), row.len()).convert_from_f32_slice(row),
            KvDtype::Bf16 => {
                let out = std::slice::from_raw_parts_mut(to.cast::<u16>(), row.len());
                for (to, v) in out.iter_mut().zip(row) {
                    *to = crate::rows::bf16_bits(*v);
                }
            }
        }
    }
}
