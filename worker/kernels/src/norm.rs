//! RMSNorm, alone or after adding a residual. One row is one sequential reduction, so rows never affect each other.

use crate::isa::Isa;
use crate::lanes::{Lanes, dispatch};
use crate::pool::{Pool, SharedOut};

/// Rows per task: enough work to be worth handing out.
const ROWS_PER_TASK: usize = 8;

/// `out = x / sqrt(mean(x^2) + eps) * weight` per row; with `delta`, `x += delta` first.
pub(crate) fn rms_norm(
    pool: &Pool,
    isa: Isa,
    x: &mut [f32],
    delta: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    assert!(
        width > 0 && x.len().is_multiple_of(width) && x.len() == out.len(),
        "rms_norm: shapes"
    );
    assert!(delta.is_none_or(|d| d.len() == x.len()), "rms_norm: delta shape");
    let rows = x.len() / width;
    let (x, out) = (SharedOut::new(x), SharedOut::new(out));
    pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
        for row in task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK) {
            let delta = delta.map_or(std::ptr::null(), |d| d[row * width..].as_ptr());
            // SAFETY: `Kernels` checked the instruction set; the row lies inside all slices and is this task's own.
            unsafe { run_row(isa, x.at(row * width), delta, weight, eps, out.at(row * width)) };
        }
    });
}

dispatch!(run_row = row_body(x: *mut f32, delta: *const f32, weight: &[f32], eps: f32, out: *mut f32));

#[inline(always)]
unsafe fn row_body<L: Lanes>(x: *mut f32, delta: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    let width = weight.len();
    let whole = width / L::N * L::N;
    let tail = width - whole;
    // SAFETY: `x`, `out`, and `delta` unless null, have `width` elements.
    unsafe {
        if !delta.is_null() {
            for i in (0..whole).step_by(L::N) {
                L::store(L::add(L::load(x.add(i)), L::load(delta.add(i))), x.add(i));
            }
            for i in whole..width {
                *x.add(i) += *delta.add(i);
            }
        }
        let mut squares = L::splat(0.0);
        for i in (0..whole).step_by(L::N) {
            let v = L::load(x.add(i));
            squares = L::fma(v, v, squares);
        }
        if tail > 0 {
            let v = L::load_head(x.add(whole), tail);
            squares = L::fma(v, v, squares);
        }
        let scale = 1.0 / (L::sum(squares) / width as f32 + eps).sqrt();
        let scales = L::splat(scale);
        for i in (0..whole).step_by(L::N) {
            let v = L::mul(L::mul(L::load(x.add(i)), scales), L::load(weight.as_ptr().add(i)));
            L::store(v, out.add(i));
        }
        for (i, w) in weight.iter().enumerate().skip(whole) {
            *out.add(i) = *x.add(i) * scale * w;
        }
    }
}
