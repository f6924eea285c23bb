//! `out[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n])` over packed weights.
//!
//! The order of every reduction is fixed per output element, whatever the batch, the tile or the thread count (P1): an
//! output is one lane of one register that runs through `k` from the first step to the last. Integer sums are exact in
//! any order; group-wise formats add the exact sum of each group, scaled, in group order. The bias comes last.
//!
//! A task is a run of panels (see [`crate::packed`]). Rows are taken in blocks of up to eight register tiles; all tiles of a
//! block of rows meet a block of weights before the next block of weights comes, their sums waiting in a buffer, and
//! between them ask the memory for that next block while they compute.

mod dense;
mod grouped;
mod tiled;

use crate::isa::Isa;
use crate::lanes::Lanes;
use crate::packed::{PANEL, PackedMatrix, WeightFormat};
use crate::pool::{Pool, SharedOut};
use crate::rows::{self, PreparedRows, RowScratch};
use std::ops::Range;

/// Up to this many rows a product waits for the memory, and each thread reads one long run of it.
const STREAM_ROWS_MAX: usize = 32;
/// Rows per task where one panel is shared between tasks: enough that its weights are used many times from cache.
const TASK_ROWS: usize = 96;
/// Token rows of the highest register tile.
const TILE_ROWS: usize = 6;
/// Rows whose sums are kept while a panel passes by: eight tiles.
const ROW_BLOCK: usize = 48;
/// Weights that all tiles of a block of rows use before the next ones, so that they are read from the nearest cache.
const BLOCK_BYTES: usize = 64 * 1024;
/// How far ahead of its use a lone tile asks for weights.
const STREAM_AHEAD_BYTES: usize = 4096;

/// Sums of a block of rows, one word per output of a panel: i32 or f32.
#[repr(align(64))]
struct Sums([u32; ROW_BLOCK * PANEL]);

impl Sums {
    fn new() -> Self {
        Sums([0; ROW_BLOCK * PANEL])
    }

    /// Sums of row `m`.
    ///
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    unsafe fn row(&mut self, m: usize) -> *mut u32 {
        // SAFETY: the caller's.
        unsafe { self.0.as_mut_ptr().add(m * PANEL) }
    }

    /// As [`Sums::row`], to read.
    ///
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    unsafe fn row_ref(&self, m: usize) -> *const u32 {
        // SAFETY: the caller's.
        unsafe { self.0.as_ptr().add(m * PANEL) }
    }
}

/// Which weights a tile's pass over a block asks the memory for, so that they are near when they are needed: a lone tile
/// what it needs itself in a moment, several tiles together what follows the block, each its part.
struct Ahead {
    from: *const u8,
    /// Cache lines to ask for each time.
    lines: usize,
}

impl Ahead {
    /// For pass `pass` of `passes`, of `times` requests each, over the block of `bytes` at `w`.
    #[inline(always)]
    fn of_pass(w: *const u8, bytes: usize, pass: usize, passes: usize, times: usize) -> Self {
        let lines = bytes.div_ceil(64 * passes * times.max(1));
        Ahead {
            from: w.wrapping_add(bytes + pass * times * lines * 64),
            lines,
        }
    }

    /// The request number `index` of the pass.
    #[inline(always)]
    fn ask(&self, index: usize) {
        for line in index * self.lines..(index + 1) * self.lines {
            crate::lanes::prefetch(self.from.wrapping_add(line * 64));
        }
    }
}

/// One task's share.
pub(crate) struct Share<'a> {
    weights: &'a PackedMatrix,
    rows: PreparedRows,
    out: SharedOut,
    first_row: usize,
    last_row: usize,
}

/// See [`crate::Kernels::linear`].
pub(crate) fn linear(
    pool: &Pool,
    isa: Isa,
    scratch: &mut RowScratch,
    x: &[f32],
    rows: usize,
    weights: &PackedMatrix,
    out: &mut [f32],
) {
    let (k, columns) = (weights.k(), weights.columns());
    assert_eq!(x.len(), rows * k, "linear: input shape");
    assert_eq!(out.len(), rows * columns, "linear: output shape");
    if rows == 0 || columns == 0 {
        return;
    }
    let prepared = rows::prepare(pool, isa, weights.format(), x, rows, k, scratch);
    let panels = weights.panels();
    let out = SharedOut::new(out);
    let multiply = |first_row: usize, last_row: usize, range: Range<usize>| {
        let share = Share {
            weights,
            rows: prepared,
            out,
            first_row,
            last_row,
        };
        if tiled::takes(isa, weights.format(), rows) {
            // SAFETY: as below, and the tiles take it.
            return unsafe { tiled::run_panels(&share, range) };
        }
        for panel in range {
            // SAFETY: `Kernels` checked the instruction set; shapes were checked above and the packing made panels of
            // the format's size; tasks write disjoint rows and columns.
            unsafe {
                match weights.format() {
                    WeightFormat::Group8 | WeightFormat::Group4 | WeightFormat::Group4Min => {
                        grouped::run_panel(isa, &share, panel);
                    }
                    _ => dense::run_panel(isa, &share, panel),
                }
            }
        }
    };
    if rows <= STREAM_ROWS_MAX {
        // One contiguous run of weights per thread.
        pool.run_ranges(panels, 1, &|_, range| multiply(0, rows, range));
        return;
    }
    // Few panels: divide the rows as well, so that no thread is left without work.
    let row_tasks = if panels < 8 * pool.threads() {
        rows.div_ceil(TASK_ROWS)
    } else {
        1
    };
    let rows_per_task = rows.div_ceil(row_tasks);
    pool.run(panels * row_tasks, &|_, task| {
        let (panel, row_task) = (task / row_tasks, task % row_tasks);
        let (first, last) = (row_task * rows_per_task, rows.min((row_task + 1) * rows_per_task));
        multiply(first, last, panel..panel + 1);
    });
}

impl Share<'_> {
    /// Columns of `panel` that exist.
    fn columns(&self, panel: usize) -> usize {
        PANEL.min(self.weights.columns() - panel * PANEL)
    }

    /// Adds the bias to a vector of outputs, row `m` from column `n` of `panel` on, and writes those that exist.
    ///
    /// # Safety
    /// The row and at least one column exist, and belong to this task.
    #[inline(always)]
    unsafe fn store<L: Lanes>(&self, value: L::F, m: usize, panel: usize, n: usize) {
        let (left, n) = (self.columns(panel) - n, panel * PANEL + n);
        // SAFETY: the caller's; what lies past the last column is neither read nor written.
        unsafe {
            let to = self.out.at(m * self.weights.columns() + n);
            let bias = self.weights.bias().map(|b| b[n..].as_ptr());
            if left >= L::N {
                let value = bias.map_or(value, |b| L::add(value, L::load(b)));
                L::store(value, to);
            } else {
                let value = bias.map_or(value, |b| L::add(value, L::load_head(b, left)));
                L::store_head(value, to, left);
            }
        }
    }
}
