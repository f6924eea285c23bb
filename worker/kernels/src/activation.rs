//! SwiGLU's gate: `out = silu(gate) * up`, element by element.

use crate::isa::Isa;
use crate::lanes::{Lanes, dispatch};
use crate::pool::{Pool, SharedOut};

/// Rows per task: enough work to be worth handing out.
const ROWS_PER_TASK: usize = 4;

/// Rows of `gate_up` are `[gate | up]`, each `width` long; rows of `out` are `width` long.
pub(crate) fn silu_mul(pool: &Pool, isa: Isa, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        width > 0 && out.len().is_multiple_of(width) && gate_up.len() == 2 * out.len(),
        "silu_mul: shapes"
    );
    let rows = out.len() / width;
    let shared = SharedOut::new(out);
    pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
        for row in task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK) {
            let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: `Kernels` checked the instruction set; the output row is `width` long and this task's own.
            unsafe { run_row(isa, gate, up, shared.at(row * width)) };
        }
    });
}

dispatch!(run_row = row_body(gate: &[f32], up: &[f32], out: *mut f32));

#[inline(always)]
unsafe fn row_body<L: Lanes>(gate: &[f32], up: &[f32], out: *mut f32) {
    let whole = gate.len() / L::N * L::N;
    let tail = gate.len() - whole;
    // SAFETY: `gate`, `up` and `out` have the same length.
    unsafe {
        for i in (0..whole).step_by(L::N) {
            let value = silu_times::<L>(L::load(gate.as_ptr().add(i)), L::load(up.as_ptr().add(i)));
            L::store(value, out.add(i));
        }
        if tail > 0 {
            let g = L::load_head(gate.as_ptr().add(whole), tail);
            let u = L::load_head(up.as_ptr().add(whole), tail);
            L::store_head(silu_times::<L>(g, u), out.add(whole), tail);
        }
    }
}

#[inline(always)]
unsafe fn silu_times<L: Lanes>(gate: L::F, up: L::F) -> L::F {
    // SAFETY: as the caller.
    unsafe {
        let exp = L::exp(L::sub(L::splat(0.0), gate));
        L::mul(L::div(gate, L::add(L::splat(1.0), exp)), up)
    }
}
