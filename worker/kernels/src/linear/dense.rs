//! Products without groups: f32, f16, bf16 and W8A8 int8. One register tile for all of them, over a small trait that says
//! what a step of `k` is.

use super::{PREFETCH_BYTES, Share};
use crate::lanes::{Lanes, dispatch};
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
    unsafe fn finish(acc: L::I, correction: i32) -> L::F {
        L::to_f(L::add_i(acc, L::splat_i(correction)))
    }
}

dispatch!(run_panel_inner = panel_body(share: &Share<'_>, panel: usize));

/// Multiplies the task's rows by one panel.
///
/// # Safety
/// As [`super::linear`] sets it up.
pub(super) unsafe fn run_panel(isa: crate::isa::Isa, share: &Share<'_>, panel: usize) {
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

/// All rows, tile by tile. Wide registers: tiles of 6 rows by 64 columns; else 4 rows by two vectors.
#[inline(always)]
unsafe fn rows<L: Lanes, D: Dense<L>>(share: &Share<'_>, panel: usize) {
    let mut m = share.first_row;
    while m < share.last_row {
        let left = share.last_row - m;
        // SAFETY: the caller's contract is passed on; `m` plus the tile's rows stay within the share.
        unsafe {
            m += if L::WIDE {
                match left {
                    1 => columns::<L, D, 1, 4>(share, panel, m),
                    2 => columns::<L, D, 2, 4>(share, panel, m),
                    3 => columns::<L, D, 3, 4>(share, panel, m),
                    // Seven and eight rows go better as two even tiles than as six and a rest.
                    4 | 7 | 8 => columns::<L, D, 4, 4>(share, panel, m),
                    5 | 9 | 10 => columns::<L, D, 5, 4>(share, panel, m),
                    _ => columns::<L, D, 6, 4>(share, panel, m),
                }
            } else {
                match left {
                    1 => columns::<L, D, 1, 2>(share, panel, m),
                    2 => columns::<L, D, 2, 2>(share, panel, m),
                    3 => columns::<L, D, 3, 2>(share, panel, m),
                    _ => columns::<L, D, 4, 2>(share, panel, m),
                }
            };
        }
    }
}

/// `M` rows from `m` on times all columns of the panel, `V` vectors at a time. Returns `M`.
#[inline(always)]
unsafe fn columns<L: Lanes, D: Dense<L>, const M: usize, const V: usize>(
    share: &Share<'_>,
    panel: usize,
    m: usize,
) -> usize {
    let columns = share.columns(panel);
    let steps = share.weights.format().padded(share.weights.k()) / D::STEP;
    let scales = share.weights.scales(panel);
    // The first tile brings the panel from memory.
    let ahead = if m == share.first_row { PREFETCH_BYTES } else { 0 };
    for vector in (0..PANEL / L::N).step_by(V) {
        let n = vector * L::N;
        if n >= columns {
            break;
        }
        // SAFETY: the panel has `steps` steps of PANEL columns, the rows are `steps` steps long; outputs are checked
        // against the columns that exist.
        unsafe {
            let w = share.weights.panel(panel).add(n * D::WEIGHT_BYTES);
            let x = share.rows.data.add(m * share.rows.stride);
            let acc = tile::<L, D, M, V>(w, x, share.rows.stride, steps, ahead);
            for (i, row) in acc.iter().enumerate() {
                let (mut correction, mut scale) = (0, 1.0);
                if !scales.is_empty() {
                    correction = *share.rows.corrections.add(m + i);
                    scale = *share.rows.scales.add(m + i);
                }
                for (v, acc) in row.iter().enumerate() {
                    let n = n + v * L::N;
                    if n >= columns {
                        break;
                    }
                    let mut value = D::finish(*acc, correction);
                    if !scales.is_empty() {
                        value = L::mul(value, L::mul(L::splat(scale), L::load(scales.as_ptr().add(n))));
                    }
                    let (to, bias) = (share.out(m + i, panel, n), share.bias(panel, n));
                    if n + L::N <= columns {
                        if !bias.is_null() {
                            value = L::add(value, L::load(bias));
                        }
                        L::store(value, to);
                    } else {
                        if !bias.is_null() {
                            value = L::add(value, L::load_head(bias, columns - n));
                        }
                        L::store_head(value, to, columns - n);
                    }
                }
            }
        }
    }
    M
}

/// The register tile: `M` rows by `V` vectors of columns over all of `k`.
#[inline(always)]
unsafe fn tile<L: Lanes, D: Dense<L>, const M: usize, const V: usize>(
    w: *const u8,
    x: *const u8,
    stride: usize,
    steps: usize,
    ahead: usize,
) -> [[D::Acc; V]; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[D::zero(); V]; M];
        for step in 0..steps {
            let w = w.add(step * PANEL * D::WEIGHT_BYTES);
            let x = x.add(step * D::ROW_BYTES);
            if ahead > 0 {
                prefetch::<L, D, V>(w.wrapping_add(ahead));
            }
            let mut weights = [D::weights(w); V];
            for (v, weights) in weights.iter_mut().enumerate().skip(1) {
                *weights = D::weights(w.add(v * L::N * D::WEIGHT_BYTES));
            }
            for (m, row) in acc.iter_mut().enumerate() {
                let x = D::row(x.add(m * stride));
                for (acc, w) in row.iter_mut().zip(weights) {
                    *acc = D::step(*acc, w, x);
                }
            }
        }
        acc
    }
}

/// Asks for the cache lines that `V` vectors of weights lie in.
#[inline(always)]
fn prefetch<L: Lanes, D: Dense<L>, const V: usize>(w: *const u8) {
    for line in (0..V * L::N * D::WEIGHT_BYTES).step_by(64) {
        crate::lanes::prefetch(w.wrapping_add(line));
    }
}
