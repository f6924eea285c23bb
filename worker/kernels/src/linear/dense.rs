//! Products without groups: f32, f16, bf16 and W8A8 int8. One register tile for all of them, over a small trait that says
//! what a step of `k` is.

use super::{Ahead, BLOCK_BYTES, ROW_BLOCK, STREAM_AHEAD_BYTES, Share, Sums, TILE_ROWS};
use crate::isa::Isa;
use crate::lanes::{Lanes, dispatch, prefetch};
use crate::packed::{PANEL, WeightFormat};
use std::marker::PhantomData;

/// How one step of `k` is multiplied.
trait Dense<L: Lanes> {
    /// Elements of `k` per step.
    const STEP: usize;
    /// Bytes of one column's weights per step.
    const WEIGHT_BYTES: usize;
    /// Bytes of one row's activations per step.
    const ROW_BYTES: usize;
    /// Accumulators of `L::N` columns.
    type Acc: Copy;
    /// Weights of `L::N` columns.
    type W: Copy;
    /// A row's activations, in every lane.
    type X: Copy;

    unsafe fn zero() -> Self::Acc;
    unsafe fn weights(p: *const u8) -> Self::W;
    unsafe fn row(p: *const u8) -> Self::X;
    unsafe fn step(acc: Self::Acc, w: Self::W, x: Self::X) -> Self::Acc;
    unsafe fn load(p: *const u32) -> Self::Acc;
    unsafe fn store(acc: Self::Acc, p: *mut u32);
    /// As f32, before scales and bias. `correction` as in [`crate::rows`].
    unsafe fn finish(acc: Self::Acc, correction: i32) -> L::F;
}

struct F32<L>(PhantomData<L>);
struct F16<L>(PhantomData<L>);
/// bf16 weights times f32 activations.
struct WideBf16<L>(PhantomData<L>);
/// bf16 times bf16.
struct Bf16<L>(PhantomData<L>);
struct Int8<L>(PhantomData<L>);

// SAFETY (all five): pointers come from `tile`, which stays inside the panel and the rows.
#[allow(unsafe_op_in_unsafe_fn)]
impl<L: Lanes> Dense<L> for F32<L> {
    const STEP: usize = 1;
    const WEIGHT_BYTES: usize = 4;
    const ROW_BYTES: usize = 4;
    type Acc = L::F;
    type W = L::F;
    type X = L::F;

    #[inline(always)]
    unsafe fn zero() -> L::F {
        L::splat(0.0)
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> L::F {
        L::load(p.cast())
    }
    #[inline(always)]
    unsafe fn row(p: *const u8) -> L::F {
        L::splat(p.cast::<f32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn step(acc: L::F, w: L::F, x: L::F) -> L::F {
        L::fma(w, x, acc)
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> L::F {
        L::load(p.cast())
    }
    #[inline(always)]
    unsafe fn store(acc: L::F, p: *mut u32) {
        L::store(acc, p.cast());
    }
    #[inline(always)]
    unsafe fn finish(acc: L::F, _: i32) -> L::F {
        acc
    }
}

#[allow(unsafe_op_in_unsafe_fn)]
impl<L: Lanes> Dense<L> for F16<L> {
    const STEP: usize = 1;
    const WEIGHT_BYTES: usize = 2;
    const ROW_BYTES: usize = 4;
    type Acc = L::F;
    type W = L::F;
    type X = L::F;

    #[inline(always)]
    unsafe fn zero() -> L::F {
        L::splat(0.0)
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> L::F {
        L::load_f16(p.cast())
    }
    #[inline(always)]
    unsafe fn row(p: *const u8) -> L::F {
        L::splat(p.cast::<f32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn step(acc: L::F, w: L::F, x: L::F) -> L::F {
        L::fma(w, x, acc)
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> L::F {
        L::load(p.cast())
    }
    #[inline(always)]
    unsafe fn store(acc: L::F, p: *mut u32) {
        L::store(acc, p.cast());
    }
    #[inline(always)]
    unsafe fn finish(acc: L::F, _: i32) -> L::F {
        acc
    }
}

#[allow(unsafe_op_in_unsafe_fn)]
impl<L: Lanes> Dense<L> for WideBf16<L> {
    const STEP: usize = 2;
    const WEIGHT_BYTES: usize = 4;
    const ROW_BYTES: usize = 8;
    type Acc = L::F;
    type W = (L::F, L::F);
    type X = (L::F, L::F);

    #[inline(always)]
    unsafe fn zero() -> L::F {
        L::splat(0.0)
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> (L::F, L::F) {
        let pairs = L::load_i(p.cast());
        (L::even_bf16(pairs), L::odd_bf16(pairs))
    }
    #[inline(always)]
    unsafe fn row(p: *const u8) -> (L::F, L::F) {
        let p = p.cast::<f32>();
        (L::splat(p.read_unaligned()), L::splat(p.add(1).read_unaligned()))
    }
    #[inline(always)]
    unsafe fn step(acc: L::F, w: (L::F, L::F), x: (L::F, L::F)) -> L::F {
        L::fma(w.1, x.1, L::fma(w.0, x.0, acc))
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> L::F {
        L::load(p.cast())
    }
    #[inline(always)]
    unsafe fn store(acc: L::F, p: *mut u32) {
        L::store(acc, p.cast());
    }
    #[inline(always)]
    unsafe fn finish(acc: L::F, _: i32) -> L::F {
        acc
    }
}

#[allow(unsafe_op_in_unsafe_fn)]
impl<L: Lanes> Dense<L> for Bf16<L> {
    const STEP: usize = 2;
    const WEIGHT_BYTES: usize = 4;
    const ROW_BYTES: usize = 4;
    type Acc = L::F;
    type W = L::I;
    type X = L::I;

    #[inline(always)]
    unsafe fn zero() -> L::F {
        L::splat(0.0)
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> L::I {
        L::load_i(p.cast())
    }
    #[inline(always)]
    unsafe fn row(p: *const u8) -> L::I {
        L::splat_i(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn step(acc: L::F, w: L::I, x: L::I) -> L::F {
        L::dot_bf16(acc, w, x)
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> L::F {
        L::load(p.cast())
    }
    #[inline(always)]
    unsafe fn store(acc: L::F, p: *mut u32) {
        L::store(acc, p.cast());
    }
    #[inline(always)]
    unsafe fn finish(acc: L::F, _: i32) -> L::F {
        acc
    }
}

#[allow(unsafe_op_in_unsafe_fn)]
impl<L: Lanes> Dense<L> for Int8<L> {
    const STEP: usize = 4;
    const WEIGHT_BYTES: usize = 4;
    const ROW_BYTES: usize = 4;
    type Acc = L::I;
    type W = L::I;
    type X = L::I;

    #[inline(always)]
    unsafe fn zero() -> L::I {
        L::splat_i(0)
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> L::I {
        L::load_i(p.cast())
    }
    #[inline(always)]
    unsafe fn row(p: *const u8) -> L::I {
        L::splat_i(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn step(acc: L::I, w: L::I, x: L::I) -> L::I {
        L::dot_u8_s8(acc, w, x)
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> L::I {
        L::load_i(p.cast())
    }
    #[inline(always)]
    unsafe fn store(acc: L::I, p: *mut u32) {
        L::store_i(acc, p.cast());
    }
    #[inline(always)]
    unsafe fn finish(acc: L::I, correction: i32) -> L::F {
        L::to_f(L::add_i(acc, L::splat_i(correction)))
    }
}

dispatch!(run_panel_inner = panel_body(share: &Share<'_>, panel: usize));

/// Multiplies the task's rows by one panel.
///
/// # Safety
/// As [`super::linear`] sets it up.
pub(super) unsafe fn run_panel(isa: Isa, share: &Share<'_>, panel: usize) {
    // SAFETY: the caller's.
    unsafe { run_panel_inner(isa, share, panel) }
}

#[inline(always)]
unsafe fn panel_body<L: Lanes>(share: &Share<'_>, panel: usize) {
    // SAFETY: the caller's contract is passed on.
    unsafe {
        match share.weights.format() {
            WeightFormat::F32 => rows::<L, F32<L>>(share, panel),
            WeightFormat::F16 => rows::<L, F16<L>>(share, panel),
            WeightFormat::Int8 => rows::<L, Int8<L>>(share, panel),
            WeightFormat::Bf16 if L::BF16 => rows::<L, Bf16<L>>(share, panel),
            _ => rows::<L, WideBf16<L>>(share, panel),
        }
    }
}

/// All rows, a block of them at a time; for each, the panel block by block, all register tiles on one before the next.
#[inline(always)]
unsafe fn rows<L: Lanes, D: Dense<L>>(share: &Share<'_>, panel: usize) {
    let steps = share.weights.format().padded(share.weights.k()) / D::STEP;
    let step_bytes = PANEL * D::WEIGHT_BYTES;
    let mut sums = Sums::new();
    for first in (share.first_row..share.last_row).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(share.last_row - first);
        let passes = rows.div_ceil(TILE_ROWS);
        let block = if passes == 1 { steps } else { BLOCK_BYTES / step_bytes };
        for start in (0..steps).step_by(block) {
            let len = block.min(steps - start);
            // SAFETY: the panel has `steps` steps of PANEL columns and the rows are `steps` steps long; tiles lie
            // within the block of rows, which the sums have room for.
            unsafe {
                let at = At {
                    w: share.weights.panel(panel).add(start * step_bytes),
                    x: share.rows.data.add(first * share.rows.stride + start * D::ROW_BYTES),
                    stride: share.rows.stride,
                    steps: len,
                    first: start == 0,
                };
                let mut m = 0;
                for pass in 0.. {
                    if m == rows {
                        break;
                    }
                    let ahead = Ahead::of_pass(at.w, len * step_bytes, pass, passes, len / STRIDE);
                    m += match passes {
                        1 => tile_of::<L, D, true>(&at, m, rows - m, &mut sums, &ahead),
                        _ => tile_of::<L, D, false>(&at, m, rows - m, &mut sums, &ahead),
                    };
                }
            }
        }
        // SAFETY: the rows and columns exist and are this task's.
        unsafe { finish::<L, D>(share, panel, first, rows, &sums) };
    }
}

/// Steps between two requests of several tiles to the memory.
const STRIDE: usize = 16;

/// A block of weights and the rows' elements that meet it.
struct At {
    w: *const u8,
    x: *const u8,
    /// Bytes from row to row.
    stride: usize,
    steps: usize,
    /// Whether sums start here.
    first: bool,
}

/// One register tile over all columns of the block, for rows `m` on, of which `left` are left. Returns its rows. Wide
/// registers: up to 6 rows by 64 columns; else up to 4 rows by two vectors.
#[inline(always)]
unsafe fn tile_of<L: Lanes, D: Dense<L>, const LONE: bool>(
    at: &At,
    m: usize,
    left: usize,
    sums: &mut Sums,
    ahead: &Ahead,
) -> usize {
    // SAFETY: the caller's contract is passed on.
    unsafe {
        if L::WIDE {
            match left {
                1 => tile::<L, D, 1, 4, LONE>(at, m, sums, ahead),
                2 => tile::<L, D, 2, 4, LONE>(at, m, sums, ahead),
                3 => tile::<L, D, 3, 4, LONE>(at, m, sums, ahead),
                // Seven and eight rows go better as two even tiles than as six and a rest.
                4 | 7 | 8 => tile::<L, D, 4, 4, LONE>(at, m, sums, ahead),
                5 | 9 | 10 => tile::<L, D, 5, 4, LONE>(at, m, sums, ahead),
                _ => tile::<L, D, 6, 4, LONE>(at, m, sums, ahead),
            }
        } else {
            match left {
                1 => tile::<L, D, 1, 2, LONE>(at, m, sums, ahead),
                2 => tile::<L, D, 2, 2, LONE>(at, m, sums, ahead),
                3 => tile::<L, D, 3, 2, LONE>(at, m, sums, ahead),
                _ => tile::<L, D, 4, 2, LONE>(at, m, sums, ahead),
            }
        }
    }
}

/// `M` rows by all columns, `V` vectors of columns at a time. Returns `M`. `LONE`: no other tile passes over the block, so
/// this one asks for its own weights.
#[inline(always)]
unsafe fn tile<L: Lanes, D: Dense<L>, const M: usize, const V: usize, const LONE: bool>(
    at: &At,
    m: usize,
    sums: &mut Sums,
    ahead: &Ahead,
) -> usize {
    for vector in (0..PANEL / L::N).step_by(V) {
        let n = vector * L::N;
        // SAFETY: the caller's contract.
        unsafe {
            let to = sums.row(m).add(n);
            let mut acc = [[D::zero(); V]; M];
            if !at.first {
                for (m, row) in acc.iter_mut().enumerate() {
                    for (v, acc) in row.iter_mut().enumerate() {
                        *acc = D::load(to.add(m * PANEL + v * L::N));
                    }
                }
            }
            let (w, x) = (at.w.add(n * D::WEIGHT_BYTES), at.x.add(m * at.stride));
            for start in (0..at.steps).step_by(STRIDE) {
                if !LONE && vector == 0 {
                    ahead.ask(start / STRIDE);
                }
                for step in start..at.steps.min(start + STRIDE) {
                    let w = w.add(step * PANEL * D::WEIGHT_BYTES);
                    let x = x.add(step * D::ROW_BYTES);
                    if LONE {
                        for line in (0..V * L::N * D::WEIGHT_BYTES).step_by(64) {
                            prefetch(w.wrapping_add(STREAM_AHEAD_BYTES + line));
                        }
                    }
                    let mut weights = [D::weights(w); V];
                    for (v, weights) in weights.iter_mut().enumerate().skip(1) {
                        *weights = D::weights(w.add(v * L::N * D::WEIGHT_BYTES));
                    }
                    for (m, row) in acc.iter_mut().enumerate() {
                        let x = D::row(x.add(m * at.stride));
                        for (acc, w) in row.iter_mut().zip(weights) {
                            *acc = D::step(*acc, w, x);
                        }
                    }
                }
            }
            for (m, row) in acc.iter().enumerate() {
                for (v, acc) in row.iter().enumerate() {
                    D::store(*acc, to.add(m * PANEL + v * L::N));
                }
            }
        }
    }
    M
}

dispatch!(finish_int8_inner = finish_int8_body(share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums));
dispatch!(finish_f32_inner = finish_f32_body(share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums));

#[inline(always)]
unsafe fn finish_int8_body<L: Lanes>(share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums) {
    // SAFETY: the caller's contract is passed on.
    unsafe { finish::<L, Int8<L>>(share, panel, first, rows, sums) }
}

#[inline(always)]
unsafe fn finish_f32_body<L: Lanes>(share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums) {
    // SAFETY: the caller's contract is passed on.
    unsafe { finish::<L, F32<L>>(share, panel, first, rows, sums) }
}

/// The end of an int8 product whose sums were computed elsewhere.
///
/// # Safety
/// The rows and the panel exist and are this task's; so are the sums of `rows` rows.
pub(super) unsafe fn finish_int8(isa: Isa, share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums) {
    // SAFETY: the caller's.
    unsafe { finish_int8_inner(isa, share, panel, first, rows, sums) }
}

/// The same for sums in f32.
///
/// # Safety
/// As [`finish_int8`].
pub(super) unsafe fn finish_f32(isa: Isa, share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums) {
    // SAFETY: the caller's.
    unsafe { finish_f32_inner(isa, share, panel, first, rows, sums) }
}

/// Scales, adds the bias and writes the outputs of `rows` rows from `first` on.
#[inline(always)]
unsafe fn finish<L: Lanes, D: Dense<L>>(share: &Share<'_>, panel: usize, first: usize, rows: usize, sums: &Sums) {
    let scales = share.weights.scales(panel);
    for m in 0..rows {
        // SAFETY: the rows exist; `store` checks columns.
        unsafe {
            let (mut correction, mut scale) = (0, 1.0);
            if !scales.is_empty() {
                correction = *share.rows.corrections.add(first + m);
                scale = *share.rows.scales.add(first + m);
            }
            for n in (0..share.columns(panel)).step_by(L::N) {
                let mut value = D::finish(D::load(sums.row_ref(m).add(n)), correction);
                if !scales.is_empty() {
                    value = L::mul(value, L::mul(L::splat(scale), L::load(scales.as_ptr().add(n))));
                }
                share.store::<L>(value, first + m, panel, n);
            }
        }
    }
}
