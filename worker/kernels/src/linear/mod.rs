//! `out[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n])` over packed weights.
//!
//! The order of every reduction is fixed per output element, whatever the batch, the tile or the thread count (P1): an
//! output is one lane of one register that runs through `k` from the first step to the last. Integer sums are exact in
//! any order; group-wise formats add the exact sum of each group, scaled, in group order. The bias comes last.
//!
//! A task is a run of panels (see [`crate::packed`]); within a panel, register tiles of up to six token rows pass over it
//! one after the other, the first from memory, the next ones from cache.

mod dense;
mod grouped;

use crate::isa::Isa;
use crate::packed::{PANEL, PackedMatrix, WeightFormat};
use crate::pool::{Pool, SharedOut};
use crate::rows::{self, PreparedRows, RowScratch};
use std::ops::Range;

/// Up to this many rows a product waits for the memory, and each thread reads one long run of it.
const STREAM_ROWS_MAX: usize = 32;
/// Rows per task where one panel is shared between tasks: enough that its weights are used many times from cache.
const TASK_ROWS: usize = 96;
/// How far ahead of its use weights are asked of the memory.
const PREFETCH_BYTES: usize = 4096;

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

    /// Where row `m`, column `n` of `panel` goes.
    ///
    /// # Safety
    /// Both exist, and belong to this task.
    #[inline(always)]
    unsafe fn out(&self, m: usize, panel: usize, n: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.out.at(m * self.weights.columns() + panel * PANEL + n) }
    }

    /// Biases of `panel` from column `n` on, or null.
    fn bias(&self, panel: usize, n: usize) -> *const f32 {
        self.weights
            .bias()
            .map_or(std::ptr::null(), |b| b[panel * PANEL + n..].as_ptr())
    }
}
