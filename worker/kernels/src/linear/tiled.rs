//! Products on AMX tiles: up to 32 rows by a panel at a time, for int8, int8 in groups, and bf16.
//!
//! int8 sums are exact, so few rows stay with VNNI, which streams as fast. bf16 products of every number of rows are
//! computed here, because tiles and vectors add in different orders (P1).

use super::{ROW_BLOCK, Share, Sums, dense};
use crate::amx::{ROWS_MAX, TileSession};
use crate::isa::Isa;
use crate::lanes::{Lanes, dispatch};
use crate::packed::{GROUP, PANEL, WeightFormat};
use std::ops::Range;

/// Fewer rows than this of int8 are not worth a tile.
const INT8_ROWS_MIN: usize = 8;

/// Whether the tiles take this product.
pub(super) fn takes(isa: Isa, format: WeightFormat, rows: usize) -> bool {
    isa == Isa::Amx
        && match format {
            WeightFormat::Bf16 => true,
            WeightFormat::Int8 | WeightFormat::Group8 => rows >= INT8_ROWS_MIN,
            _ => false,
        }
}

/// Multiplies the task's rows by `panels`.
///
/// # Safety
/// As [`super::linear`] sets it up, for a product that [`takes`] agreed to.
pub(super) unsafe fn run_panels(share: &Share<'_>, panels: Range<usize>) {
    const { assert!(ROW_BLOCK >= ROWS_MAX) };
    // `Kernels` checked that there are tiles.
    let Some(mut tiles) = TileSession::begin() else {
        unreachable!("the instruction set was checked");
    };
    let weights = share.weights;
    let k = weights.format().padded(weights.k());
    let (mut sums, mut products) = (Sums::new(), Sums::new());
    for panel in panels {
        for first in (share.first_row..share.last_row).step_by(ROWS_MAX) {
            let rows = ROWS_MAX.min(share.last_row - first);
            // SAFETY: the panel is `k` long, which is whole tiles (whole groups in groups), the rows likewise; `sums` and
            // `products` have more rows than a tile session writes.
            unsafe {
                let x = share.rows.data.add(first * share.rows.stride);
                let w = weights.panel(panel);
                match weights.format() {
                    WeightFormat::Int8 => {
                        tiles.tile_i8(x.cast(), share.rows.stride, rows, w, k / 4, sums.row(0).cast());
                        dense::finish_int8(Isa::Amx, share, panel, first, rows, &sums);
                    }
                    WeightFormat::Bf16 => {
                        let stride = share.rows.stride / 2;
                        tiles.tile_bf16(x.cast(), stride, rows, w.cast(), k / 2, sums.row(0).cast());
                        dense::finish_f32(Isa::Amx, share, panel, first, rows, &sums);
                    }
                    _ => {
                        let bytes = weights.format().group_bytes();
                        for group in 0..k / GROUP {
                            let (x, w) = (x.add(group * GROUP), w.add(group * bytes));
                            tiles.tile_i8_group(x.cast(), share.rows.stride, rows, w, products.row(0).cast());
                            let scales = w.add(GROUP * PANEL).cast();
                            add_group(Isa::Amx, share, first, rows, group, scales, &products, &mut sums);
                        }
                        dense::finish_f32(Isa::Amx, share, panel, first, rows, &sums);
                    }
                }
            }
        }
    }
}

dispatch!(add_group = add_group_body(
    share: &Share<'_>, first: usize, rows: usize, group: usize, scales: *const u16, products: &Sums, sums: &mut Sums,
));

/// `sums = products * scales + sums` of one group, in the order and with the roundings of [`super::grouped`].
#[inline(always)]
unsafe fn add_group_body<L: Lanes>(
    share: &Share<'_>,
    first: usize,
    rows: usize,
    group: usize,
    scales: *const u16,
    products: &Sums,
    sums: &mut Sums,
) {
    for m in 0..rows {
        // SAFETY: the rows exist, with a scale and a correction per group; there are PANEL scales.
        unsafe {
            let index = (first + m) * share.rows.groups + group;
            let correction = L::splat_i(*share.rows.corrections.add(index));
            let scale = L::splat(*share.rows.scales.add(index));
            for n in (0..PANEL).step_by(L::N) {
                let product = L::to_f(L::add_i(L::load_i(products.row_ref(m).add(n).cast()), correction));
                let factor = L::mul(L::load_f16(scales.add(n)), scale);
                let to = sums.row(m).add(n).cast::<f32>();
                let before = if group == 0 { L::splat(0.0) } else { L::load(to) };
                L::store(L::fma(product, factor, before), to);
            }
        }
    }
}
