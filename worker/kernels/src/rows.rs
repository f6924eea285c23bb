//! Activations in the form in which a weight format multiplies them: f32 as they are, rounded to bf16, or quantised to
//! int8 with a scale per token or per group of 32.
//!
//! Each row is converted on its own, so a row's numbers never depend on its batch mates.
//!
//! Quantisation: `scale = largest magnitude / 127`, `q = round_to_even(x / scale)`. As weights are stored biased by
//! +128 (or +8), a product sums `(w + bias) * q`; the row's `correction = -bias * sum(q)` takes the bias back, exactly.

use crate::isa::Isa;
use crate::lanes::{Lanes, dispatch};
use crate::packed::{GROUP, WeightFormat};
use crate::pool::{Pool, SharedOut};
use half::bf16;

/// Rows per task: enough work to be worth handing out.
const ROWS_PER_TASK: usize = 16;

/// Buffers that keep their capacity from product to product, bounded by the largest batch.
#[derive(Debug, Default)]
pub(crate) struct RowScratch {
    /// f32 words, so that rows are aligned for every use.
    data: Vec<f32>,
    scales: Vec<f32>,
    corrections: Vec<i32>,
}

/// Rows ready to be multiplied.
#[derive(Clone, Copy)]
pub(crate) struct PreparedRows {
    pub data: *const u8,
    /// Bytes from row to row.
    pub stride: usize,
    /// One per row, or per row and group; null where the format has none.
    pub scales: *const f32,
    /// As `scales`: bias corrections.
    pub corrections: *const i32,
    /// Entries of `scales` and `corrections` per row.
    pub groups: usize,
}

// SAFETY: points into slices that outlive the product and are only read.
unsafe impl Send for PreparedRows {}
// SAFETY: as above.
unsafe impl Sync for PreparedRows {}

/// Whether bf16 weights are multiplied by bf16 activations on this instruction set.
pub(crate) fn multiplies_bf16(isa: Isa) -> bool {
    isa >= Isa::Avx512Bf16
}

/// Converts `x`, `[rows, k]`, for `format`. The result points into `x` or `scratch`.
pub(crate) fn prepare(
    pool: &Pool,
    isa: Isa,
    format: WeightFormat,
    x: &[f32],
    rows: usize,
    k: usize,
    scratch: &mut RowScratch,
) -> PreparedRows {
    let padded = format.padded(k);
    let plain = |data: *const f32, stride: usize| PreparedRows {
        data: data.cast(),
        stride,
        scales: std::ptr::null(),
        corrections: std::ptr::null(),
        groups: 0,
    };
    match format {
        WeightFormat::F32 | WeightFormat::F16 => plain(x.as_ptr(), k * 4),
        WeightFormat::Bf16 if !multiplies_bf16(isa) => {
            if k == padded {
                return plain(x.as_ptr(), k * 4);
            }
            scratch.data.clear();
            scratch.data.resize(rows * padded, 0.0);
            for (to, from) in scratch.data.chunks_mut(padded).zip(x.chunks(k)) {
                to[..k].copy_from_slice(from);
            }
            plain(scratch.data.as_ptr(), padded * 4)
        }
        WeightFormat::Bf16 => {
            scratch.data.resize(rows * padded / 2, 0.0);
            let out = SharedOut::new(&mut scratch.data);
            pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
                for row in task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK) {
                    // SAFETY: the row is this task's own, `padded` bf16 long; the instruction set was checked.
                    unsafe { run_bf16(isa, &x[row * k..][..k], out.at(row * padded / 2).cast(), padded) };
                }
            });
            plain(scratch.data.as_ptr(), padded * 2)
        }
        _ => {
            let groups = if format == WeightFormat::Int8 {
                1
            } else {
                padded / GROUP
            };
            scratch.data.resize(rows * padded / 4, 0.0);
            scratch.scales.resize(rows * groups, 0.0);
            scratch.corrections.resize(rows * groups, 0);
            let out = SharedOut::new(&mut scratch.data);
            let scales = SharedOut::new(&mut scratch.scales);
            let corrections = SharedOut::new(bytemuck::cast_slice_mut(&mut scratch.corrections));
            let bias = match format {
                WeightFormat::Int8 | WeightFormat::Group8 => -128,
                WeightFormat::Group4 => -8,
                _ => 1,
            };
            pool.run(rows.div_ceil(ROWS_PER_TASK), &|_, task| {
                for row in task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK) {
                    let x = &x[row * k..][..k];
                    // SAFETY: the row of each output is this task's own; the instruction set was checked.
                    unsafe {
                        let (q, s) = (out.at(row * padded / 4).cast::<i8>(), scales.at(row * groups));
                        let c = corrections.at(row * groups).cast::<i32>();
                        run_int8(isa, x, q, s, c, padded, padded / groups, bias);
                    }
                }
            });
            PreparedRows {
                data: scratch.data.as_ptr().cast(),
                stride: padded,
                scales: scratch.scales.as_ptr(),
                corrections: scratch.corrections.as_ptr(),
                groups,
            }
        }
    }
}

dispatch!(run_bf16 = bf16_body(x: &[f32], out: *mut u16, padded: usize));

#[inline(always)]
unsafe fn bf16_body<L: Lanes>(x: &[f32], out: *mut u16, padded: usize) {
    // SAFETY: `out` has `padded >= x.len()` elements.
    let out = unsafe { std::slice::from_raw_parts_mut(out, padded) };
    for (to, v) in out.iter_mut().zip(x) {
        *to = bf16_bits(*v);
    }
    out[x.len()..].fill(0);
}

/// Rounds to the nearest bf16, ties to even. Vectorises, unlike the general conversion.
#[inline(always)]
pub(crate) fn bf16_bits(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // A NaN must not round up to infinity.
    if v.is_nan() {
        bf16::NAN.to_bits()
    } else {
        (rounded >> 16) as u16
    }
}

dispatch!(run_int8 = int8_body(
    x: &[f32], out: *mut i8, scales: *mut f32, corrections: *mut i32, padded: usize, group: usize, bias: i32,
));

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn int8_body<L: Lanes>(
    x: &[f32],
    out: *mut i8,
    scales: *mut f32,
    corrections: *mut i32,
    padded: usize,
    group: usize,
    bias: i32,
) {
    let mut tail = [0f32; GROUP];
    for g in 0..padded / group {
        let start = g * group;
        let len = group.min(x.len().saturating_sub(start));
        let whole = len / L::N * L::N;
        // SAFETY: reads stay below `x.len()`: whole vectors of it, and the tail through a copy; writes below `padded`.
        unsafe {
            let from = x.as_ptr().add(start);
            tail[..len - whole].copy_from_slice(&x[start + whole..start + len]);
            tail[len - whole..].fill(0.0);
            let mut largest = L::abs(L::load(tail.as_ptr()));
            for i in (0..whole).step_by(L::N) {
                largest = L::max(largest, L::abs(L::load(from.add(i))));
            }
            let largest = L::largest(largest);
            let scale = largest / 127.0;
            let inverse = L::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            let mut sum = L::splat_i(0);
            for i in (0..whole).step_by(L::N) {
                let q = L::round(L::mul(L::load(from.add(i)), inverse));
                sum = L::add_i(sum, q);
                L::store_bytes(q, out.add(start + i));
            }
            let mut at = start + whole;
            if at < start + group {
                let q = L::round(L::mul(L::load(tail.as_ptr()), inverse));
                sum = L::add_i(sum, q);
                // A vector may reach past the group; its surplus bytes are zeros that the next group overwrites, and
                // at the row's end goes through a copy.
                let mut bytes = [0i8; 16];
                L::store_bytes(q, bytes.as_mut_ptr());
                let count = L::N.min(start + group - at);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.add(at), count);
                at += count;
                std::ptr::write_bytes(out.add(at), 0, start + group - at);
            }
            let mut sums = [0i32; 16];
            L::store_i(sum, sums.as_mut_ptr());
            *scales.add(g) = scale;
            *corrections.add(g) = bias * sums.iter().sum::<i32>();
        }
    }
}
