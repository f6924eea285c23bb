//! Products of the group-wise formats: per group of 32 an exact integer sum, scaled and added in f32 in group order.

use super::{PREFETCH_BYTES, Share};
use crate::lanes::{Lanes, dispatch, prefetch};
use crate::packed::{GROUP, PANEL, WeightFormat};

/// Bytes of one step of four elements, all columns.
const STEP_BYTES: usize = PANEL * 4;

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
            WeightFormat::Group8 => rows::<L, Eight>(share, panel),
            WeightFormat::Group4 => rows::<L, Four<false>>(share, panel),
            _ => rows::<L, Four<true>>(share, panel),
        }
    }
}

/// How a group's integers are laid out.
trait Layout {
    /// Bytes of the integers of a group, all columns.
    const INTEGERS: usize;
    /// Whether minima follow the scales.
    const MINIMA: bool;

    /// Adds the products of a group: `V` vectors of columns from `w`, `M` rows from `x`, `stride` bytes apart.
    unsafe fn sums<L: Lanes, const M: usize, const V: usize>(
        acc: &mut [[L::I; V]; M],
        w: *const u8,
        x: *const u8,
        stride: usize,
        ahead: usize,
    );
}

struct Eight;
struct Four<const MINIMA: bool>;

impl Layout for Eight {
    const INTEGERS: usize = GROUP * PANEL;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn sums<L: Lanes, const M: usize, const V: usize>(
        acc: &mut [[L::I; V]; M],
        w: *const u8,
        x: *const u8,
        stride: usize,
        ahead: usize,
    ) {
        for step in 0..GROUP / 4 {
            // SAFETY: the group has eight steps of weights and of every row.
            unsafe {
                let w = w.add(step * STEP_BYTES);
                let mut weights = [L::load_i(w.cast()); V];
                for (v, weights) in weights.iter_mut().enumerate() {
                    if ahead > 0 && v * L::N % 16 == 0 {
                        prefetch(w.wrapping_add(ahead + v * L::N * 4));
                    }
                    *weights = L::load_i(w.add(v * L::N * 4).cast());
                }
                for (m, row) in acc.iter_mut().enumerate() {
                    let x = L::splat_i(x.add(m * stride + step * 4).cast::<i32>().read_unaligned());
                    for (acc, w) in row.iter_mut().zip(weights) {
                        *acc = L::dot_u8_s8(*acc, w, x);
                    }
                }
            }
        }
    }
}

impl<const MINIMA: bool> Layout for Four<MINIMA> {
    const INTEGERS: usize = GROUP / 2 * PANEL;
    const MINIMA: bool = MINIMA;

    #[inline(always)]
    unsafe fn sums<L: Lanes, const M: usize, const V: usize>(
        acc: &mut [[L::I; V]; M],
        w: *const u8,
        x: *const u8,
        stride: usize,
        ahead: usize,
    ) {
        for step in 0..GROUP / 8 {
            // SAFETY: the group has four double steps of weights and eight steps of every row.
            unsafe {
                let mask = L::splat_i(0x0f0f_0f0f);
                let w = w.add(step * STEP_BYTES);
                let (mut low, mut high) = ([mask; V], [mask; V]);
                for v in 0..V {
                    if ahead > 0 && v * L::N % 16 == 0 {
                        prefetch(w.wrapping_add(ahead + v * L::N * 4));
                    }
                    let both = L::load_i(w.add(v * L::N * 4).cast());
                    low[v] = L::and_i(both, mask);
                    high[v] = L::and_i(L::shift_right_4(both), mask);
                }
                for (m, row) in acc.iter_mut().enumerate() {
                    let x = x.add(m * stride + step * 4);
                    let x_low = L::splat_i(x.cast::<i32>().read_unaligned());
                    let x_high = L::splat_i(x.add(GROUP / 2).cast::<i32>().read_unaligned());
                    for v in 0..V {
                        row[v] = L::dot_u8_s8(L::dot_u8_s8(row[v], low[v], x_low), high[v], x_high);
                    }
                }
            }
        }
    }
}

/// All rows, tile by tile: integer and f32 accumulators share the registers, so tiles are half as high as dense ones.
#[inline(always)]
unsafe fn rows<L: Lanes, G: Layout>(share: &Share<'_>, panel: usize) {
    let mut m = share.first_row;
    while m < share.last_row {
        let left = share.last_row - m;
        // SAFETY: the caller's contract is passed on; `m` plus the tile's rows stay within the share.
        unsafe {
            m += if L::WIDE {
                match left {
                    1 => columns::<L, G, 1, 4>(share, panel, m),
                    2 | 4 => columns::<L, G, 2, 4>(share, panel, m),
                    _ => columns::<L, G, 3, 4>(share, panel, m),
                }
            } else {
                match left {
                    1 => columns::<L, G, 1, 2>(share, panel, m),
                    _ => columns::<L, G, 2, 2>(share, panel, m),
                }
            };
        }
    }
}

/// `M` rows from `m` on times all columns of the panel, `V` vectors at a time. Returns `M`.
#[inline(always)]
unsafe fn columns<L: Lanes, G: Layout, const M: usize, const V: usize>(
    share: &Share<'_>,
    panel: usize,
    m: usize,
) -> usize {
    let columns = share.columns(panel);
    let (groups, stride) = (share.rows.groups, share.rows.stride);
    let group_bytes = share.weights.format().group_bytes();
    // The first tile brings the panel from memory.
    let ahead = if m == share.first_row { PREFETCH_BYTES } else { 0 };
    for vector in (0..PANEL / L::N).step_by(V) {
        let n = vector * L::N;
        if n >= columns {
            break;
        }
        // SAFETY: the panel has `groups` groups, the rows as many groups of bytes, scales and corrections; outputs are
        // checked against the columns that exist.
        unsafe {
            let (x, scales, corrections) = (
                share.rows.data.add(m * stride),
                share.rows.scales.add(m * groups),
                share.rows.corrections.add(m * groups),
            );
            let mut acc = [[L::splat(0.0); V]; M];
            for g in 0..groups {
                let w = share.weights.panel(panel).add(g * group_bytes);
                let mut sums = [[L::splat_i(0); V]; M];
                if !G::MINIMA {
                    for (i, row) in sums.iter_mut().enumerate() {
                        *row = [L::splat_i(*corrections.add(i * groups + g)); V];
                    }
                }
                G::sums::<L, M, V>(&mut sums, w.add(n * 4), x.add(g * GROUP), stride, ahead);
                let halves = w.add(G::INTEGERS + n * 2).cast::<u16>();
                if ahead > 0 {
                    prefetch(halves.cast::<u8>().wrapping_add(ahead));
                }
                let mut factors = [L::splat(0.0); V];
                for (v, factor) in factors.iter_mut().enumerate() {
                    *factor = L::load_f16(halves.add(v * L::N));
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let scale = L::splat(*scales.add(i * groups + g));
                    for v in 0..V {
                        row[v] = L::fma(L::to_f(sums[i][v]), L::mul(factors[v], scale), row[v]);
                    }
                }
                if G::MINIMA {
                    for (i, row) in acc.iter_mut().enumerate() {
                        let sum = *corrections.add(i * groups + g) as f32 * *scales.add(i * groups + g);
                        for (v, acc) in row.iter_mut().enumerate() {
                            let minimum = L::load_f16(halves.add(PANEL + v * L::N));
                            *acc = L::fma(minimum, L::splat(sum), *acc);
                        }
                    }
                }
            }
            for (i, row) in acc.iter().enumerate() {
                for (v, value) in row.iter().enumerate() {
                    let (n, mut value) = (n + v * L::N, *value);
                    if n >= columns {
                        break;
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
