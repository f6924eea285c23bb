//! `out[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n])`: weights as stored, f32 accumulation.
//!
//! Order of the reduction, the same for every output element whatever the batch: lane `j` of eight accumulates
//! `k = j, j+8, j+16, ...` in turn with multiply-add; the lanes are summed by [`Simd::sum`]; the bias comes last.
//! Everything else here (tiles of rows and columns, splitting `k` to stay in cache, widening weights once for many
//! rows) only changes *when* an element's steps happen, never their order: partial lanes are kept, not partial sums.

use crate::isa::Isa;
use crate::pool::{Pool, SharedOut};
use crate::simd::{Element, LANES, Simd, dispatch, load_head_element};
use crate::weights::Elements;
use std::sync::Mutex;

/// Output columns (weight rows) of one task: a multiple of every register tile's width and of the lanes.
pub const TILE_ROWS: usize = 24;

/// Token rows whose partial lanes are kept at once: 32 * 24 * 8 floats are 24 KB, which stays in L1/L2.
const ROW_BLOCK: usize = 32;

/// Steps of `k` between which a register tile's operands (4 + 3 rows) stay in L1. A multiple of the lanes.
const K_BLOCK: usize = 1024;

/// Up to this many token rows weights are widened in registers as they stream by; above, once into scratch.
const DIRECT_ROWS_MAX: usize = 4;

/// Some rows of a weight matrix `[n, k]`, row-major, with their biases.
#[derive(Debug, Clone, Copy)]
pub struct MatrixPart<'a> {
    /// `n * k` elements.
    pub weights: Elements<'a>,
    /// `n` biases.
    pub bias: Option<&'a [f32]>,
    /// Output columns of this part.
    pub columns: usize,
}

/// Scratch of one thread: widened weights and partial lanes; grows to `TILE_ROWS * k` floats and no further.
#[derive(Debug, Default)]
pub(crate) struct LinearScratch {
    widened: Vec<f32>,
    partial: Vec<f32>,
}

/// See [`crate::Kernels::linear`]. Parts lie side by side in the output's columns.
#[allow(clippy::too_many_arguments)]
pub(crate) fn linear(
    pool: &Pool,
    isa: Isa,
    scratch: &[Mutex<LinearScratch>],
    x: &[f32],
    rows: usize,
    k: usize,
    parts: &[MatrixPart<'_>],
    out: &mut [f32],
) {
    let width: usize = parts.iter().map(|p| p.columns).sum();
    assert_eq!(x.len(), rows * k, "linear: input shape");
    assert_eq!(out.len(), rows * width, "linear: output shape");
    for part in parts {
        assert_eq!(part.weights.len(), part.columns * k, "linear: weight shape");
        assert!(part.bias.is_none_or(|b| b.len() == part.columns), "linear: bias shape");
    }
    if rows == 0 {
        return;
    }
    let tiles: Vec<usize> = parts.iter().map(|p| p.columns.div_ceil(TILE_ROWS)).collect();
    let shared = SharedOut::new(out);
    pool.run(tiles.iter().sum(), &|worker, task| {
        let (mut tile, mut offset, mut index) = (task, 0, 0);
        while tile >= tiles[index] {
            tile -= tiles[index];
            offset += parts[index].columns;
            index += 1;
        }
        let part = &parts[index];
        let first = tile * TILE_ROWS;
        let columns = TILE_ROWS.min(part.columns - first);
        let mut scratch = scratch[worker]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let LinearScratch { widened, partial } = &mut *scratch;
        let target = Tile {
            x: x.as_ptr(),
            rows,
            k,
            columns,
            bias: part.bias.map(|b| &b[first..first + columns]),
            out: shared,
            out_start: offset + first,
            out_stride: width,
        };
        let elements = first * k..(first + columns) * k;
        // SAFETY: `Kernels` checked the instruction set; shapes were checked above; tasks write disjoint columns.
        unsafe {
            match part.weights {
                Elements::F32(w) => run_tile(isa, &target, &w[elements], widened, partial),
                Elements::Bf16(w) => run_tile(isa, &target, &w[elements], widened, partial),
                Elements::F16(w) => run_tile(isa, &target, &w[elements], widened, partial),
            }
        }
    });
}

/// The part of the output one task computes: all token rows by up to `TILE_ROWS` columns.
struct Tile<'a> {
    x: *const f32,
    rows: usize,
    k: usize,
    columns: usize,
    bias: Option<&'a [f32]>,
    out: SharedOut,
    out_start: usize,
    out_stride: usize,
}

dispatch!(run_tile = tile_body<E: Element>(
    tile: &Tile<'_>, w: &[E], widened: &mut Vec<f32>, partial: &mut Vec<f32>
));

#[inline(always)]
unsafe fn tile_body<S: Simd, E: Element>(tile: &Tile<'_>, w: &[E], widened: &mut Vec<f32>, partial: &mut Vec<f32>) {
    partial.resize(ROW_BLOCK * TILE_ROWS * LANES, 0.0);
    // SAFETY: `w` has `columns * k` elements and `x` `rows * k`, so every pointer below stays inside; see `linear`.
    unsafe {
        if E::IS_F32 || tile.rows <= DIRECT_ROWS_MAX {
            row_blocks::<S, E>(tile, w.as_ptr(), partial);
        } else {
            widened.resize(w.len(), 0.0);
            let whole = w.len() / LANES * LANES;
            for i in (0..whole).step_by(LANES) {
                E::load8::<S>(w.as_ptr().add(i)).store(widened.as_mut_ptr().add(i));
            }
            for i in whole..w.len() {
                widened[i] = w[i].widen();
            }
            row_blocks::<S, f32>(tile, widened.as_ptr(), partial);
        }
    }
}

#[inline(always)]
unsafe fn row_blocks<S: Simd, E: Element>(tile: &Tile<'_>, w: *const E, partial: &mut [f32]) {
    let (k, columns) = (tile.k, tile.columns);
    for row in (0..tile.rows).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(tile.rows - row);
        // SAFETY: as `tile_body`; `partial` holds ROW_BLOCK * TILE_ROWS vectors.
        unsafe {
            let x = tile.x.add(row * k);
            let acc = partial.as_mut_ptr();
            let mut at = 0;
            loop {
                let len = K_BLOCK.min(k - at);
                k_block::<S, E>(x.add(at), w.add(at), k, rows, columns, len, at == 0, acc);
                at += len;
                if at == k {
                    break;
                }
            }
            finish::<S>(tile, row, rows, acc);
        }
    }
}

/// Adds `len` steps of `k` to the partial lanes of `rows` by `columns` outputs.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn k_block<S: Simd, E: Element>(
    x: *const f32,
    w: *const E,
    k: usize,
    rows: usize,
    columns: usize,
    len: usize,
    first: bool,
    acc: *mut f32,
) {
    let mut m = 0;
    while m < rows {
        let height = (rows - m).min(4);
        let mut n = 0;
        while n < columns {
            let left = columns - n;
            // SAFETY: as `tile_body`.
            unsafe {
                let (x, w) = (x.add(m * k), w.add(n * k));
                let acc = acc.add((m * TILE_ROWS + n) * LANES);
                // Twelve accumulators at most: with the operands they fill the sixteen registers.
                n += match (height, left) {
                    (4, 3..) => register_tile::<S, E, 4, 3>(x, w, k, len, first, acc),
                    (3, 4..) => register_tile::<S, E, 3, 4>(x, w, k, len, first, acc),
                    (2, 6..) => register_tile::<S, E, 2, 6>(x, w, k, len, first, acc),
                    (1, 6..) => register_tile::<S, E, 1, 6>(x, w, k, len, first, acc),
                    (4, _) => register_tile::<S, E, 4, 1>(x, w, k, len, first, acc),
                    (3, _) => register_tile::<S, E, 3, 1>(x, w, k, len, first, acc),
                    (2, _) => register_tile::<S, E, 2, 1>(x, w, k, len, first, acc),
                    _ => register_tile::<S, E, 1, 1>(x, w, k, len, first, acc),
                };
            }
        }
        m += height;
    }
}

/// `M` token rows by `N` columns in registers. Returns `N`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices say which row and column meet
unsafe fn register_tile<S: Simd, E: Element, const M: usize, const N: usize>(
    x: *const f32,
    w: *const E,
    k: usize,
    len: usize,
    first: bool,
    partial: *mut f32,
) -> usize {
    // SAFETY: rows of `x` and `w` are `k` long with at least `len` elements from here on; `partial` has a vector for
    // each output of the tile.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        if !first {
            for (m, row) in acc.iter_mut().enumerate() {
                for (n, lane) in row.iter_mut().enumerate() {
                    *lane = S::load(partial.add((m * TILE_ROWS + n) * LANES));
                }
            }
        }
        let whole = len / LANES * LANES;
        let mut i = 0;
        while i < whole {
            // Plain loops, no closures: a closure is not compiled for the instruction set unless it is inlined. The
            // smaller side of operands is held, so that they and the accumulators fit sixteen registers.
            if M > N {
                let mut wv = [S::splat(0.0); N];
                for (n, lanes) in wv.iter_mut().enumerate() {
                    *lanes = E::load8::<S>(w.add(n * k + i));
                }
                for (m, row) in acc.iter_mut().enumerate() {
                    let xv = S::load(x.add(m * k + i));
                    for n in 0..N {
                        row[n] = xv.mul_add(wv[n], row[n]);
                    }
                }
            } else {
                let mut xv = [S::splat(0.0); M];
                for (m, lanes) in xv.iter_mut().enumerate() {
                    *lanes = S::load(x.add(m * k + i));
                }
                for n in 0..N {
                    let wv = E::load8::<S>(w.add(n * k + i));
                    for m in 0..M {
                        acc[m][n] = xv[m].mul_add(wv, acc[m][n]);
                    }
                }
            }
            i += LANES;
        }
        if whole < len {
            let tail = len - whole;
            for (m, row) in acc.iter_mut().enumerate() {
                let xv = S::load_head(x.add(m * k + whole), tail);
                for (n, lane) in row.iter_mut().enumerate() {
                    *lane = xv.mul_add(load_head_element::<S, E>(w.add(n * k + whole), tail), *lane);
                }
            }
        }
        for (m, row) in acc.iter().enumerate() {
            for (n, lane) in row.iter().enumerate() {
                lane.store(partial.add((m * TILE_ROWS + n) * LANES));
            }
        }
    }
    N
}

/// Sums the lanes, adds the bias and writes the outputs of `rows` token rows from `row` on.
#[inline(always)]
unsafe fn finish<S: Simd>(tile: &Tile<'_>, row: usize, rows: usize, partial: *const f32) {
    for m in 0..rows {
        let mut n = 0;
        while n < tile.columns {
            let width = LANES.min(tile.columns - n);
            // SAFETY: `partial` has TILE_ROWS (a multiple of 8) vectors per row, the surplus ones stale but finite
            // or not, never written out; the output columns are this task's own.
            unsafe {
                let from = partial.add((m * TILE_ROWS + n) * LANES);
                let mut lanes = [S::splat(0.0); LANES];
                for (i, lane) in lanes.iter_mut().enumerate() {
                    *lane = S::load(from.add(i * LANES));
                }
                let mut sums = S::sum8(lanes);
                let to = tile.out.at((row + m) * tile.out_stride + tile.out_start + n);
                if width == LANES {
                    if let Some(bias) = tile.bias {
                        sums = sums.add(S::load(bias.as_ptr().add(n)));
                    }
                    sums.store(to);
                } else {
                    if let Some(bias) = tile.bias {
                        sums = sums.add(S::load_head(bias.as_ptr().add(n), width));
                    }
                    sums.store_head(to, width);
                }
            }
            n += LANES;
        }
    }
}
