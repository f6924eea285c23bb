//! The kernels behind one handle: instruction set, thread pool and scratch.

use crate::attention::{self, AttentionSpan};
use crate::isa::Isa;
use crate::kv::KvArena;
use crate::linear::{self, LinearScratch, MatrixPart};
use crate::pool::{Pool, PoolConfig};
use crate::weights::Elements;
use crate::{activation, norm, rope};
use std::sync::{Arc, Mutex};

/// Runs kernels. Scratch is kept per thread and bounded by one weight tile and one score tile.
///
/// All methods panic on shapes that do not fit each other: that is a caller's bug, never input.
pub struct Kernels {
    isa: Isa,
    pool: Arc<Pool>,
    linear: Vec<Mutex<LinearScratch>>,
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
        let linear = (0..pool.threads()).map(|_| Mutex::default()).collect();
        let attention = (0..pool.threads()).map(|_| Mutex::default()).collect();
        Kernels {
            isa,
            pool,
            linear,
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

    /// `out[i] = table[ids[i]]`, rows of `width` elements.
    pub fn embed(&self, table: Elements<'_>, width: usize, ids: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * width, "embed: shapes");
        for (id, row) in ids.iter().zip(out.chunks_exact_mut(width)) {
            table.widen_into(*id as usize * width, row);
        }
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; rows are as long as `weight`.
    ///
    /// With `delta`, `x += delta` first: the residual stream is updated in place.
    pub fn rms_norm(&self, x: &mut [f32], delta: Option<&[f32]>, weight: &[f32], eps: f32, out: &mut [f32]) {
        norm::rms_norm(&self.pool, self.isa, x, delta, weight, eps, out);
    }

    /// `out = x * W^T + bias`, `x` is `[rows, k]`, `out` `[rows, columns of all parts]`.
    pub fn linear(&self, x: &[f32], rows: usize, k: usize, parts: &[MatrixPart<'_>], out: &mut [f32]) {
        linear::linear(&self.pool, self.isa, &self.linear, x, rows, k, parts, out);
    }

    /// Rotates Q and K of `qkv` (rows `[q heads | k heads | v heads]`) in place by `cos`/`sin` (`head_dim / 2` values
    /// per row, rotate-half convention) and writes K and V of each row to its slot in `layer` of the arena.
    #[allow(clippy::too_many_arguments)]
    pub fn rope_kv_write(
        &self,
        qkv: &mut [f32],
        heads: usize,
        cos: &[f32],
        sin: &[f32],
        spans: &[AttentionSpan<'_>],
        layer: usize,
        kv: &KvArena<'_>,
    ) {
        rope::rope_kv_write(&self.pool, qkv, heads, cos, sin, spans, layer, kv);
    }

    /// Causal attention over the arena; query heads start each row of `q`, rows are `q_stride` long, `out` is
    /// `[rows, heads * head_dim]`. Scores are scaled by `1 / sqrt(head_dim)`.
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &self,
        q: &[f32],
        q_stride: usize,
        heads: usize,
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
