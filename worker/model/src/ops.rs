//! The op seam: what a device must be able to do for the decoder. Coarse, batched, in place; a device keeps weights
//! and activations in its own types and may run asynchronously until [`Ops::kv_written`] or [`Ops::logits`].
//!
//! A device computes one rank's part of a model ([`Ops::slices`]); a whole model is the part of a single rank. Ranks differ
//! only in their parts: the decoder's program is the same on all of them, and they meet in [`Ops::kv_written`],
//! [`Ops::all_reduce`] and [`Ops::logits`].
//!
//! Contract for every op (promise P1): an output row depends only on its own inputs, bit for bit, whatever the other
//! rows of the batch.

use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::mapped::Tensor;
use crate::shard::ShardSlices;
use baton_kernels::Pool;
use std::ops::Range;
use std::sync::Arc;

/// One stored tensor of a stacked matrix, or a slice of it, with its bias.
#[derive(Debug, Clone)]
pub struct StackedPart {
    /// The weights as stored, `[columns, k]`.
    pub weights: Tensor,
    /// The columns taken.
    pub columns: Range<usize>,
    /// The elements taken of each column's row.
    pub k: Range<usize>,
    /// One value per column taken.
    pub bias: Option<Vec<f32>>,
}

/// One sequence's rows in a step.
#[derive(Debug, Clone, Copy)]
pub struct StepSpan<'a> {
    /// Its first row in the batch.
    pub first_row: usize,
    /// Its rows.
    pub rows: usize,
    /// Position of its first row.
    pub start_position: usize,
    /// Its block table, from position 0 on.
    pub blocks: &'a [u32],
}

/// A checked batch, as the ops see it.
#[derive(Debug)]
pub struct Step<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Spans in row order, covering all rows.
    pub spans: Vec<StepSpan<'a>>,
    /// The KV arena.
    pub kv: &'a KvCache,
}

/// What ops return.
pub type OpResult<T = ()> = Result<T, ModelError>;

/// A device. `Rows` are activations, `[rows, width]` f32; an op sets its output's number of rows.
pub trait Ops: Send + 'static {
    /// A weight matrix on the device: parts stacked along the output columns.
    type Matrix: Send;
    /// An embedding table on the device.
    type Table: Send;
    /// A vector of f32 on the device.
    type Vector: Send;
    /// Activations on the device.
    type Rows: Send;

    /// The part of the model that this device holds.
    fn slices(&self) -> &ShardSlices;
    /// Host threads that idle between forward passes, if there are any.
    fn pool(&self) -> Option<Arc<Pool>> {
        None
    }
    /// Whether K and V lie in the arena's own memory, where transports reach them, and not in a device's.
    fn kv_in_region(&self) -> bool {
        true
    }
    /// Takes over a weight matrix (and may pack it); `head` for the output head.
    fn matrix(&mut self, parts: Vec<StackedPart>, head: bool) -> OpResult<Self::Matrix>;
    /// Takes over an embedding table, `[vocabulary, hidden]`.
    fn table(&mut self, table: Tensor) -> OpResult<Self::Table>;
    /// Takes over a vector.
    fn vector(&mut self, values: Vec<f32>) -> OpResult<Self::Vector>;
    /// Empty activations, `width` wide.
    fn rows(&mut self, width: usize) -> OpResult<Self::Rows>;

    /// Begins a step: uploads tokens and block tables, computes the rotary table of its positions. `frequencies` are
    /// angles per position of each pair of a head's elements, `scale` multiplies cosines and sines.
    fn begin(&mut self, step: &Step<'_>, frequencies: &[f32], scale: f32) -> OpResult;
    /// `out = table[tokens]`.
    fn embed(&mut self, step: &Step<'_>, table: &Self::Table, out: &mut Self::Rows) -> OpResult;
    /// `out = rms_norm(x) * weight`.
    fn rms_norm(&mut self, x: &mut Self::Rows, weight: &Self::Vector, eps: f32, out: &mut Self::Rows) -> OpResult;
    /// `x += delta; out = rms_norm(x) * weight`.
    fn add_rms_norm(
        &mut self,
        x: &mut Self::Rows,
        delta: &Self::Rows,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Rows,
    ) -> OpResult;
    /// `out = x * W^T + bias`.
    fn linear(&mut self, x: &Self::Rows, weights: &Self::Matrix, out: &mut Self::Rows) -> OpResult;
    /// Rotates Q and K of `qkv` (rows `[q | k | v]`: the rank's query heads, and the K/V heads that it writes) and writes K
    /// and V to `layer` of the arena.
    fn rope_kv_write(&mut self, step: &Step<'_>, layer: usize, qkv: &mut Self::Rows) -> OpResult;
    /// Returns when `layer`'s K and V of all ranks are in the arena's memory, where a transport, and attention of other
    /// ranks, may read them.
    fn kv_written(&mut self, layer: usize) -> OpResult;
    /// Causal attention of the Q in `qkv` over the arena.
    fn attention(&mut self, step: &Step<'_>, layer: usize, qkv: &Self::Rows, out: &mut Self::Rows) -> OpResult;
    /// `out = silu(gate) * up` of rows `[gate | up]`.
    fn silu_mul(&mut self, gate_up: &Self::Rows, out: &mut Self::Rows) -> OpResult;
    /// `out[i] = x[rows[i]]`.
    fn gather(&mut self, x: &Self::Rows, rows: &[usize], out: &mut Self::Rows) -> OpResult;
    /// Replaces `x`, this rank's part of a sum, by the sum over all ranks: the same bits on each.
    fn all_reduce(&mut self, x: &mut Self::Rows) -> OpResult;
    /// `x * head^T` of all ranks to rank 0's host memory, row by row; other ranks' `out` is left empty.
    fn logits(&mut self, x: &Self::Rows, head: &Self::Matrix, out: &mut Vec<f32>) -> OpResult;
    /// Makes the meetings of all ranks fail, now and later: this one cannot go on.
    fn abort(&self, reason: &str);
}
