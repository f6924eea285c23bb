//! The products themselves: tile configuration, register blocking and the loops over `k`, as inline assembly (the
//! intrinsics are not stable, the assembler knows the instructions). Each loop is one `asm!` block, so that no tile's
//! contents have to outlive one; only the configuration does.
//!
//! **Order of the reduction.** An output is one element of one tile register. It starts at zero and takes the tiles of
//! `k` in ascending order, 64 bytes of its row of `x` at a time. What an instruction adds to it depends on that row and
//! on its own column only, neither on the other rows nor on where in the tile it stands, and MXCSR is not consulted. So
//! a bf16 output has the same bits whatever `rows` is and whichever row it lands in: decode with one row and prefill
//! with 32 are the same arithmetic, done for fewer or more rows. int8 sums are exact, so order is nothing to them.
//!
//! Sources: Intel SDM volume 2, TDPBSUD and TDPBF16PS; Intel's optimization reference manual on AMX, for the blocking.

use super::{GROUP_STEPS, ROWS_MAX, STEP_BYTES, TILE_STEPS, available};
use std::arch::asm;
use std::cell::Cell;
use std::marker::PhantomData;

/// Rows of a tile register.
const TILE_ROWS: usize = 16;

/// Bytes of a row of a tile register.
const TILE_ROW_BYTES: u16 = 64;

thread_local! {
    static IN_SESSION: Cell<bool> = const { Cell::new(false) };
}

/// A thread's use of the tile registers: configured at the first product and when the shape changes, released on drop,
/// so that switching threads costs the kernel nothing for them afterwards. Make one per task. A change of shape costs
/// tens of cycles: do all products of one shape before those of the next.
pub(crate) struct TileSession {
    configured: Option<Shape>,
    /// Tiles belong to a thread: neither `Send` nor `Sync`.
    _thread: PhantomData<*mut ()>,
}

/// What the tile configuration depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Token rows, 1 to [`ROWS_MAX`].
    rows: usize,
    /// Steps of `k` in a tile, at most [`TILE_STEPS`].
    steps: usize,
}

/// The 64 bytes that LDTILECFG reads.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The columns of one 16-column tile of the panel, `$column` bytes into each step: loads them into `$tile` and
/// prefetches the same lines of the steps 8 KiB on, which is two tiles of `k` (at the 10 to 20 GB/s of one core, longer
/// than memory takes to answer). `$lines` are the steps' offsets.
macro_rules! load_weights {
    ($tile:literal, $column:literal, $lines:literal) => {
        concat!(
            "tileloadd ",
            $tile,
            ", [{panel} + {step}*1 + ",
            $column,
            "]\n",
            ".irp line, ",
            $lines,
            "\n",
            "prefetcht0 [{panel} + 8192 + ",
            $column,
            " + \\line]\n",
            ".endr",
        )
    };
}

/// 1 to 16 rows by 64 columns: four accumulators (0 to 3) share each tile of `x` (4); the weights' tiles pass through
/// 5, 6 and 7.
macro_rules! narrow {
    ($multiply:literal, $lines:literal, $call:expr) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + {x_stride}*1]",
            load_weights!("tmm5", "0", $lines),
            concat!($multiply, " tmm0, tmm4, tmm5"),
            load_weights!("tmm6", "64", $lines),
            concat!($multiply, " tmm1, tmm4, tmm6"),
            load_weights!("tmm7", "128", $lines),
            concat!($multiply, " tmm2, tmm4, tmm7"),
            load_weights!("tmm5", "192", $lines),
            concat!($multiply, " tmm3, tmm4, tmm5"),
            "add {x}, 64",
            "add {panel}, 4096",
            "dec {tiles}",
            "jnz 2b",
            // A row of the accumulator has the 256 bytes of a step.
            "tilestored [{acc} + {step}*1], tmm0",
            "tilestored [{acc} + {step}*1 + 64], tmm1",
            "tilestored [{acc} + {step}*1 + 128], tmm2",
            "tilestored [{acc} + {step}*1 + 192], tmm3",
            x = inout(reg) $call.x => _,
            x_stride = in(reg) $call.x_stride,
            panel = inout(reg) $call.panel => _,
            step = in(reg) STEP_BYTES,
            tiles = inout(reg) $call.tiles => _,
            acc = in(reg) $call.acc,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// 17 to 32 rows by 32 columns: two by two accumulators (0 and 1 over 2 and 3), two tiles of `x` (4 over 5) and two of
/// weights (6, 7), each loaded once per tile of `k`.
macro_rules! wide {
    ($multiply:literal, $lines:literal, $call:expr) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + {x_stride}*1]",
            load_weights!("tmm6", "0", $lines),
            concat!($multiply, " tmm0, tmm4, tmm6"),
            "tileloadd tmm5, [{x_low} + {x_stride}*1]",
            concat!($multiply, " tmm2, tmm5, tmm6"),
            load_weights!("tmm7", "64", $lines),
            concat!($multiply, " tmm1, tmm4, tmm7"),
            concat!($multiply, " tmm3, tmm5, tmm7"),
            "add {x}, 64",
            "add {x_low}, 64",
            "add {panel}, 4096",
            "dec {tiles}",
            "jnz 2b",
            "tilestored [{acc} + {step}*1], tmm0",
            "tilestored [{acc} + {step}*1 + 64], tmm1",
            "tilestored [{acc} + {step}*1 + 4096], tmm2",
            "tilestored [{acc} + {step}*1 + 4160], tmm3",
            x = inout(reg) $call.x => _,
            x_low = inout(reg) $call.x.add(TILE_ROWS * $call.x_stride) => _,
            x_stride = in(reg) $call.x_stride,
            panel = inout(reg) $call.panel => _,
            step = in(reg) STEP_BYTES,
            tiles = inout(reg) $call.tiles => _,
            acc = in(reg) $call.acc,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// All 64 columns for any number of rows: one narrow pass, or two wide ones of 32 columns.
macro_rules! product {
    ($multiply:literal, $lines:literal, $rows:expr, $call:expr) => {{
        let call: Call = $call;
        if $rows <= TILE_ROWS {
            narrow!($multiply, $lines, call);
        } else {
            let right = call.right_half();
            wide!($multiply, $lines, call);
            wide!($multiply, $lines, right);
        }
    }};
}

/// A product's operands, untyped: int8 and bf16 differ in one instruction only.
#[derive(Clone, Copy)]
struct Call {
    x: *const u8,
    /// Bytes.
    x_stride: usize,
    panel: *const u8,
    /// Tiles of `k`, at least one: the loops count down to zero.
    tiles: usize,
    acc: *mut u8,
}

impl Call {
    /// The same rows for the panel's columns from 32 on.
    fn right_half(self) -> Self {
        Call {
            panel: self.panel.wrapping_add(STEP_BYTES / 2),
            acc: self.acc.wrapping_add(STEP_BYTES / 2),
            ..self
        }
    }
}

impl TileSession {
    /// `None` where [`available`] is false.
    ///
    /// # Panics
    /// If this thread is in a session already: the end of one would pull the tiles from under the other.
    pub(crate) fn begin() -> Option<Self> {
        if !available() {
            return None;
        }
        assert!(!IN_SESSION.replace(true), "a thread has one tile session at a time");
        Some(TileSession {
            configured: None,
            _thread: PhantomData,
        })
    }

    /// `acc[m][n] = sum over k of x[m][k] * panel[k][n]` in i32: exact up to `k` = 65,792 (beyond, 128 * 255 * `k` need
    /// not fit), wrapping from there.
    ///
    /// * `x`: `rows` (1 to 32) rows of `4 * k4_steps` int8, `x_stride` int8 apart. Where that is a multiple of 4096, a
    ///   tile's rows fall into one set of the L1 cache: better add 64.
    /// * `panel`: `k4_steps` (16 or a multiple of it) times `[64 columns][4 k]` u8; fastest on a 64-byte boundary.
    /// * `acc`: `[32][64]` i32, of which the first `rows` rows are written.
    ///
    /// # Safety
    /// `x` and `panel` are readable and `acc` is writable (its first `rows` rows, at least) as said, `acc` overlaps
    /// neither, and the numbers are in their ranges. Nothing else is read: prefetches past the end touch no memory.
    pub(crate) unsafe fn tile_i8(
        &mut self,
        x: *const i8,
        x_stride: usize,
        rows: usize,
        panel: *const u8,
        k4_steps: usize,
        acc: *mut i32,
    ) {
        self.configure(Shape {
            rows,
            steps: TILE_STEPS,
        });
        let tiles = tiles_of(k4_steps);
        let call = Call {
            x: x.cast(),
            x_stride,
            panel,
            tiles,
            acc: acc.cast(),
        };
        // SAFETY: the configuration fits; the memory is as the caller promises.
        unsafe {
            product!(
                "tdpbsud",
                "0,256,512,768,1024,1280,1536,1792,2048,2304,2560,2816,3072,3328,3584,3840",
                rows,
                call
            );
        }
    }

    /// [`Self::tile_i8`] for one group of 32 `k`: `x` has `rows` rows of 32 int8, `panel_group` eight steps. `acc` is
    /// overwritten, so that the caller can scale each group's sums before adding them up.
    ///
    /// Half a tile of `k` takes the multiplier as long as a whole one: where no scale per group asks for it, prefer
    /// `tile_i8`.
    ///
    /// # Safety
    /// As `tile_i8`.
    pub(crate) unsafe fn tile_i8_group(
        &mut self,
        x: *const i8,
        x_stride: usize,
        rows: usize,
        panel_group: *const u8,
        acc: *mut i32,
    ) {
        self.configure(Shape {
            rows,
            steps: GROUP_STEPS,
        });
        let call = Call {
            x: x.cast(),
            x_stride,
            panel: panel_group,
            tiles: 1,
            acc: acc.cast(),
        };
        // SAFETY: as in `tile_i8`.
        unsafe {
            product!("tdpbsud", "0,256,512,768,1024,1280,1536,1792", rows, call);
        }
    }

    /// `acc[m][n] = sum over k of x[m][k] * panel[k][n]` for bf16 operands (their bits as u16) and f32 sums, in the
    /// order that the module describes. Subnormal operands count as zero and subnormal results become zero.
    ///
    /// * `x`: `rows` (1 to 32) rows of `2 * k2_steps` bf16, `x_stride` bf16 apart; for the stride see `tile_i8`.
    /// * `panel`: `k2_steps` (16 or a multiple of it) times `[64 columns][2 k]` bf16; fastest on a 64-byte boundary.
    /// * `acc`: `[32][64]` f32, of which the first `rows` rows are written.
    ///
    /// # Safety
    /// As `tile_i8`.
    pub(crate) unsafe fn tile_bf16(
        &mut self,
        x: *const u16,
        x_stride: usize,
        rows: usize,
        panel: *const u16,
        k2_steps: usize,
        acc: *mut f32,
    ) {
        self.configure(Shape {
            rows,
            steps: TILE_STEPS,
        });
        let tiles = tiles_of(k2_steps);
        let x_stride = x_stride * size_of::<u16>();
        let call = Call {
            x: x.cast(),
            x_stride,
            panel: panel.cast(),
            tiles,
            acc: acc.cast(),
        };
        // SAFETY: as in `tile_i8`.
        unsafe {
            product!(
                "tdpbf16ps",
                "0,256,512,768,1024,1280,1536,1792,2048,2304,2560,2816,3072,3328,3584,3840",
                rows,
                call
            );
        }
    }

    /// Makes the tiles fit `shape`, if they do not already.
    #[inline]
    fn configure(&mut self, shape: Shape) {
        if self.configured != Some(shape) {
            self.load(shape);
        }
    }

    /// Loads a configuration: see `narrow!` and `wide!` for which register holds what.
    #[cold]
    fn load(&mut self, shape: Shape) {
        assert!(
            (1..=ROWS_MAX).contains(&shape.rows),
            "1 to 32 token rows, not {}",
            shape.rows
        );
        let top = shape.rows.min(TILE_ROWS) as u8;
        let low = shape.rows.saturating_sub(TILE_ROWS) as u8;
        let steps = shape.steps as u8;
        let (whole, part) = (TILE_ROW_BYTES, 4 * u16::from(steps));
        let mut config = TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        let (rows, row_bytes) = if low == 0 {
            (
                [top, top, top, top, top, steps, steps, steps],
                [whole, whole, whole, whole, part, whole, whole, whole],
            )
        } else {
            (
                [top, top, low, low, top, low, steps, steps],
                [whole, whole, whole, whole, part, part, whole, whole],
            )
        };
        config.rows[..8].copy_from_slice(&rows);
        config.row_bytes[..8].copy_from_slice(&row_bytes);
        // SAFETY: the session exists, so AMX does; the configuration is valid for palette 1 (8 tiles of 16 rows of 64
        // bytes). Tiles lose their contents, which no one keeps in them.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                config = in(reg) &config,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
        self.configured = Some(shape);
    }
}

impl Drop for TileSession {
    fn drop(&mut self) {
        // SAFETY: the session exists, so AMX does; nobody else on this thread has anything in the tiles.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
        IN_SESSION.set(false);
    }
}

/// Tiles of `k` in `steps`.
fn tiles_of(steps: usize) -> usize {
    assert!(
        steps > 0 && steps.is_multiple_of(TILE_STEPS),
        "steps of k: a multiple of 16, not {steps}"
    );
    steps / TILE_STEPS
}
