//! Products of the group-wise formats: per group of 32 an exact integer sum, scaled and added in f32 in group order.

use super::{Ahead, BLOCK_BYTES, ROW_BLOCK, STREAM_AHEAD_BYTES, Share, Sums};
use crate::lanes::{Lanes, dispatch};
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
    ) {
        for step in 0..GROUP / 4 {
            // SAFETY: the group has eight steps of weights and of every row.
            unsafe {
                let w = w.add(step * STEP_BYTES);
                let mut weights = [L::load_i(w.cast()); V];
                for (v, weights) in weights.iter_mut().enumerate() {
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
    ) {
        for step in 0..GROUP / 8 {
            // SAFETY: the group has four double steps of weights and eight steps of every row.
            unsafe {
                let mask = L::splat_i(0x0f0f_0f0f);
                let w = w.add(step * STEP_BYTES);
                let (mut low, mut high) = ([mask; V], [mask; V]);
                for v in 0..V {
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

/// Integer and f32 accumulators share the registers, so tiles are half as high as dense ones.
const TILE_ROWS: usize = 3;

/// All rows, a block of them at a time; for each, the panel block by block, all register tiles on one before the next.
#[inline(always)]
unsafe fn rows<L: Lanes, G: Layout>(share: &Share<'_>, panel: usize) {
    let (groups, stride) = (share.rows.groups, share.rows.stride);
    let group_bytes = share.weights.format().group_bytes();
    let mut sums = Sums::new();
    for first in (share.first_row..share.last_row).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(share.last_row - first);
        let passes = rows.div_ceil(TILE_ROWS);
        let block = if passes == 1 { groups } else { BLOCK_BYTES / group_bytes };
        for start in (0..groups).step_by(block) {
            let len = block.min(groups - start);
            // SAFETY: the panel has `groups` groups, the rows as many groups of bytes, scales and corrections; tiles lie
            // within the block of rows, which the sums have room for.
            unsafe {
                let at = At {
                    w: share.weights.panel(panel).add(start * group_bytes),
                    group_bytes,
                    x: share.rows.data.add(first * stride + start * GROUP),
                    stride,
                    scales: share.rows.scales.add(first * groups + start),
                    corrections: share.rows.corrections.add(first * groups + start),
                    row_groups: groups,
                    groups: len,
                    first: start == 0,
                };
                let mut m = 0;
                for pass in 0.. {
                    if m == rows {
                        break;
                    }
                    let mut ahead = Ahead::of_pass(at.w, len * group_bytes, pass, passes, len);
                    if passes == 1 {
                        ahead.from = at.w.wrapping_add(STREAM_AHEAD_BYTES);
                    }
                    m += tile_of::<L, G>(&at, m, rows - m, &mut sums, &ahead);
                }
            }
        }
        for m in 0..rows {
            for n in (0..share.columns(panel)).step_by(L::N) {
                // SAFETY: the row and column exist and are this task's.
                unsafe { share.store::<L>(L::load(sums.row_ref(m).add(n).cast()), first + m, panel, n) };
            }
        }
    }
}

/// A block of groups and the rows' elements that meet it.
struct At {
    w: *const u8,
    group_bytes: usize,
    x: *const u8,
    /// Bytes from row to row.
    stride: usize,
    scales: *const f32,
    corrections: *const i32,
    /// Scales and corrections from row to row.
    row_groups: usize,
    groups: usize,
    /// Whether sums start here.
    first: bool,
}

/// One register tile over all columns of the block, for rows `m` on, of which `left` are left. Returns its rows.
#[inline(always)]
unsafe fn tile_of<L: Lanes, G: Layout>(at: &At, m: usize, left: usize, sums: &mut Sums, ahead: &Ahead) -> usize {
    // SAFETY: the caller's contract is passed on.
    unsafe {
        if L::WIDE {
            match left {
                1 => tile::<L, G, 1, 4>(at, m, sums, ahead),
                2 | 4 => tile::<L, G, 2, 4>(at, m, sums, ahead),
                _ => tile::<L, G, 3, 4>(at, m, sums, ahead),
            }
        } else {
            match left {
                1 => tile::<L, G, 1, 2>(at, m, sums, ahead),
                _ => tile::<L, G, 2, 2>(at, m, sums, ahead),
            }
        }
    }
}

/// `M` rows by all columns, `V` vectors of columns at a time. Returns `M`.
#[inline(always)]
unsafe fn tile<L: Lanes, G: Layout, const M: usize, const V: usize>(
    at: &At,
    m: usize,
    sums: &mut Sums,
    ahead: &Ahead,
) -> usize {
    for vector in (0..PANEL / L::N).step_by(V) {
        let n = vector * L::N;
        // SAFETY: the caller's contract.
        unsafe {
            let to = sums.row(m).add(n).cast::<f32>();
            let x = at.x.add(m * at.stride);
            let (scales, corrections) = (at.scales.add(m * at.row_groups), at.corrections.add(m * at.row_groups));
            let mut acc = [[L::splat(0.0); V]; M];
            if !at.first {
                for (m, row) in acc.iter_mut().enumerate() {
                    for (v, acc) in row.iter_mut().enumerate() {
                        *acc = L::load(to.add(m * PANEL + v * L::N));
                    }
                }
            }
            for g in 0..at.groups {
                if vector == 0 {
                    ahead.ask(g);
                }
                let w = at.w.add(g * at.group_bytes);
                let mut products = [[L::splat_i(0); V]; M];
                if !G::MINIMA {
                    for (i, row) in products.iter_mut().enumerate() {
                        *row = [L::splat_i(*corrections.add(i * at.row_groups + g)); V];
                    }
                }
                G::sums::<L, M, V>(&mut products, w.add(n * 4), x.add(g * GROUP), at.stride);
                let halves = w.add(G::INTEGERS + n * 2).cast::<u16>();
                let mut factors = [L::splat(0.0); V];
                for (v, factor) in factors.iter_mut().enumerate() {
                    *factor = L::load_f16(halves.add(v * L::N));
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let scale = L::splat(*scales.add(i * at.row_groups + g));
                    for v in 0..V {
                        row[v] = L::fma(L::to_f(products[i][v]), L::mul(factors[v], scale), row[v]);
                    }
                }
                if G::MINIMA {
                    for (i, row) in acc.iter_mut().enumerate() {
                        let index = i * at.row_groups + g;
                        let sum = *corrections.add(index) as f32 * *scales.add(index);
                        for (v, acc) in row.iter_mut().enumerate() {
                            let minimum = L::load_f16(halves.add(PANEL + v * L::N));
                            *acc = L::fma(minimum, L::splat(sum), *acc);
                        }
                    }
                }
            }
            for (m, row) in acc.iter().enumerate() {
                for (v, acc) in row.iter().enumerate() {
                    L::store(*acc, to.add(m * PANEL + v * L::N));
                }
            }
        }
    }
    M
}
