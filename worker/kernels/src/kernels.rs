//! The kernels behind one handle: instruction set, thread pool and scratch.

use crate::attention::{self, AttentionSpan};
use crate::isa::Isa;
use crate::kv::KvArena;
use crate::packed::{OutOfMemory, PackedMatrix, WeightFormat};
use crate::pool::{Pool, PoolConfig};
use crate::rows::RowScratch;
use crate::{activation, linear, norm, rope};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Runs kernels. Scratch keeps its capacity: converted activations of the largest batch, and per thread one attention
/// group.
///
/// All methods panic on shapes that do not fit each other: that is a caller's bug, never input.
pub struct Kernels {
    isa: Isa,
    pool: Arc<Pool>,
    rows: Mutex<RowScratch>,
    attention: Vec<Mutex<Vec<f32>>>,
}

impl Kernels {
    /// The best kernels for this CPU on `threads` threads (the caller's included).
    pub fn new(threads: impl Into<PoolConfig>) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// Kernels for a given instruction set.
    ///
    /// # Panics
    /// If this CPU does not have it.
    pub fn with_isa(threads: impl Into<PoolConfig>, isa: Isa) -> Self {
        assert!(isa.available(), "this CPU cannot run the {isa} kernels");
        let pool = Arc::new(Pool::with_config(&threads.into()));
        let attention = (0..pool.threads()).map(|_| Mutex::default()).collect();
        Kernels {
            isa,
            pool,
            rows: Mutex::default(),
            attention,
        }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads, for work between forward passes that is worth sharing.
    pub fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.pool)
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; rows are as long as `weight`.
    ///
    /// With `delta`, `x += delta` first: the residual stream is updated in place.
    pub fn rms_norm(&self, x: &mut [f32], delta: Option<&[f32]>, weight: &[f32], eps: f32, out: &mut [f32]) {
        norm::rms_norm(&self.pool, self.isa, x, delta, weight, eps, out);
    }

    /// Packs a matrix of `columns` rows of `k` elements for [`Kernels::linear`]; `row(n, out)` writes row `n` and is called
    /// from all threads.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn pack(
        &self,
        format: WeightFormat,
        columns: usize,
        k: usize,
        bias: Option<Vec<f32>>,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<PackedMatrix, OutOfMemory> {
        PackedMatrix::pack(&self.pool, format, columns, k, bias, row)
    }

    /// `out = x * W^T + bias`, `x` is `[rows, k]`, `out` `[rows, columns]`.
    pub fn linear(&self, x: &[f32], rows: usize, weights: &PackedMatrix, out: &mut [f32]) {
        let mut scratch = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        linear::linear(&self.pool, self.isa, &mut scratch, x, rows, weights, out);
    }

    /// Rotates Q and K of `qkv` (rows `[q heads | k heads | v heads]`) in place by `cos`/`sin` (`head_dim / 2` values
    /// per row, rotate-half convention) and writes K and V of each row to its slot in `layer` of the arena, heads
    /// `kv_heads` of it.
    #[allow(clippy::too_many_arguments)]
    pub fn rope_kv_write(
        &self,
        qkv: &mut [f32],
        heads: usize,
        kv_heads: Range<usize>,
        cos: &[f32],
        sin: &[f32],
        spans: &[AttentionSpan<'_>],
        layer: usize,
        kv: &KvArena<'_>,
    ) {
        rope::rope_kv_write(&self.pool, qkv, heads, kv_heads, cos, sin, spans, layer, kv);
    }

    /// Causal attention over the arena; query heads start each row of `q`, rows are `q_stride` long, `out` is
    /// `[rows, heads * head_dim]`. The heads share `kv_heads` of the arena. Scores are scaled by `1 / sqrt(head_dim)`.
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &self,
        q: &[f32],
        q_stride: usize,
        heads: usize,
        kv_heads: Range<usize>,
        spans: &[AttentionSpan<'_>],
        layer: usize,
        kv: &KvArena<'_>,
        out: &mut [f32],
    ) {
        attention::attention(
            &self.pool,
            self.isa,
            &self.attention,
            q,
            q_stride,
            heads,
            kv_heads,
            spans,
            layer,
            kv,
            out,
        );
    }

    /// `out = silu(gate) * up`; rows of `gate_up` are `[gate | up]`, each `width` long.
    pub fn silu_mul(&self, gate_up: &[f32], width: usize, out: &mut [f32]) {
        activation::silu_mul(&self.pool, self.isa, gate_up, width, out);
    }
}
