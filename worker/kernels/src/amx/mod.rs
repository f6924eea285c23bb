//! Matrix products on Intel's AMX tiles (Sapphire Rapids and later): up to 32 token rows against one panel of 64
//! output columns, in int8 with exact i32 sums or in bf16 with f32 sums. Weights come packed in panels, accumulators
//! go out raw: scales, the correction of the weights' bias, and everything else around the product are the caller's.
//! No AVX-512 is needed or used here.
//!
//! Elsewhere than on x86-64 Linux, and on CPUs without AMX, [`TileSession::begin`] returns `None`.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod absent;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod detect;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) use absent::{TileSession, available};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use {detect::available, tiles::TileSession};

/// Token rows of one call: two tiles' height.
pub(crate) const ROWS_MAX: usize = 32;

/// Output columns of a panel and of the accumulator's rows: four tiles' width.
pub(crate) const PANEL_COLUMNS: usize = 64;

/// Steps of a panel (four int8 or two bf16 of `k` each) in a tile: what `steps` must be a multiple of.
pub(crate) const TILE_STEPS: usize = 16;

/// Steps of a group of 32 int8.
pub(crate) const GROUP_STEPS: usize = 8;

/// Bytes of one step of a panel: 64 columns of four int8 or two bf16.
pub(crate) const STEP_BYTES: usize = 4 * PANEL_COLUMNS;
