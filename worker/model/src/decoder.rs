//! The config-driven decoder: one forward pass of a ragged batch through all layers, over the op seam.
//!
//! Schedules nothing, samples nothing, owns no KV blocks.

use crate::batch::{ForwardBatch, Logits};
use crate::config::ModelConfig;
use crate::cpu_ops::CpuOps;
use crate::error::ModelError;
use crate::files::ModelFiles;
use crate::kv_cache::KvCache;
use crate::ops::{Ops, Step, StepSpan};
use crate::options::LoadOptions;
use crate::progress::Progress;
use crate::weights::Weights;
use baton_kernels::{Kernels, Pool};
use std::sync::Arc;

/// Activations reused from step to step; they grow to the largest batch seen.
struct Scratch<O: Ops> {
    /// The residual stream.
    x: O::Rows,
    /// Normalised input of a projection.
    normed: O::Rows,
    qkv: O::Rows,
    attended: O::Rows,
    /// Output of a sub-layer, to be added to the residual stream.
    delta: O::Rows,
    gate_up: O::Rows,
    activated: O::Rows,
    /// Of the last layer, the rows whose logits are wanted.
    last_x: O::Rows,
    last_attended: O::Rows,
    logits: Vec<f32>,
}

/// A model on a device, ready to run.
pub struct Decoder<O: Ops = CpuOps> {
    ops: O,
    config: ModelConfig,
    weights: Weights<O>,
    frequencies: Vec<f32>,
    rope_scale: f32,
    scratch: Scratch<O>,
}

impl Decoder<CpuOps> {
    /// Loads a whole model for the CPU: checks every tensor and packs the matrices into memory.
    ///
    /// # Errors
    /// [`ModelError::Weights`] if a tensor is missing or has another shape than the configuration asks for;
    /// [`ModelError::DoesNotFit`] if the system refuses the memory; [`ModelError::TensorParallel`] if more than one rank is
    /// asked for.
    pub fn load(
        files: &ModelFiles,
        config: ModelConfig,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        if options.tensor_parallel != 1 {
            let reason = "one decoder is one rank; load all of them through `TensorParallel`";
            return Err(ModelError::TensorParallel(reason.into()));
        }
        let ops = CpuOps::new(Kernels::new(options.pool()), &config, options.quantization);
        Self::with_ops(ops, files, config, progress)
    }
}

impl<O: Ops> Decoder<O> {
    /// Loads onto a device its part of a model.
    ///
    /// # Errors
    /// As [`Decoder::load`], and whatever the device refuses.
    pub fn with_ops(
        mut ops: O,
        files: &ModelFiles,
        config: ModelConfig,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        let weights = Weights::load(&mut ops, files, &config, progress)?;
        let (frequencies, rope_scale) = config.rope.frequencies(config.head_dim);
        let slices = ops.slices().clone();
        let (heads_width, inner) = (slices.heads.len() * config.head_dim, slices.inner.len());
        let scratch = Scratch {
            x: ops.rows(config.hidden_size)?,
            normed: ops.rows(config.hidden_size)?,
            qkv: ops.rows(slices.qkv_width(config.head_dim))?,
            attended: ops.rows(heads_width)?,
            delta: ops.rows(config.hidden_size)?,
            gate_up: ops.rows(2 * inner)?,
            activated: ops.rows(inner)?,
            last_x: ops.rows(config.hidden_size)?,
            last_attended: ops.rows(heads_width)?,
            logits: Vec::new(),
        };
        Ok(Decoder {
            ops,
            config,
            weights,
            frequencies,
            rope_scale,
            scratch,
        })
    }

    /// See [`Ops::pool`].
    pub fn pool(&self) -> Option<Arc<Pool>> {
        self.ops.pool()
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn ops(&self) -> &O {
        &self.ops
    }

    /// The device, to be prepared further between loading and the first batch.
    pub fn ops_mut(&mut self) -> &mut O {
        &mut self.ops
    }

    /// Computes a batch: writes K and V of every token to its slot, and returns the logits after the last token of
    /// each span that wants them.
    ///
    /// `layer_done(layer)` is called, in order, as soon as the batch's K and V of that layer are in memory; the rest
    /// of the layer and the next ones are computed afterwards, so that a transfer can overlap them.
    ///
    /// One rank of several computes its part, and only rank 0 has logits (see [`TensorParallel`](crate::TensorParallel)).
    ///
    /// Every token's K, V and logits are bit-identical whatever else is in the batch and however its sequence was
    /// cut into spans. The caller owns the blocks (see [`KvCache`]).
    ///
    /// # Errors
    /// [`ModelError::Batch`] for a batch that does not fit the model or the cache; nothing was computed then.
    /// [`ModelError::Rank`] if another rank failed.
    pub fn forward(
        &mut self,
        batch: &ForwardBatch,
        kv: &KvCache,
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<Logits<'_>, ModelError> {
        self.compute(batch, kv, layer_done)?;
        Ok(self.logits())
    }

    /// The logits of the last batch that was computed without an error.
    pub(crate) fn logits(&mut self) -> Logits<'_> {
        Logits::new(self.config.vocab_size, &mut self.scratch.logits)
    }

    /// [`Decoder::forward`], leaving the logits for [`Decoder::logits`].
    pub(crate) fn compute(
        &mut self,
        batch: &ForwardBatch,
        kv: &KvCache,
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), ModelError> {
        self.scratch.logits.clear();
        batch.check(&self.config, kv)?;
        let mut spans = Vec::with_capacity(batch.seqs.len());
        let mut wanted = Vec::new();
        let mut row = 0;
        for seq in &batch.seqs {
            let (start_position, blocks) = (seq.start_pos, &seq.blocks[..]);
            spans.push(StepSpan {
                first_row: row,
                rows: seq.len,
                start_position,
                blocks,
            });
            row += seq.len;
            if seq.logits {
                wanted.push(row - 1);
            }
        }
        let step = Step {
            tokens: &batch.tokens,
            spans,
            kv,
        };
        if step.tokens.is_empty() {
            (0..self.config.layers).for_each(layer_done);
            return Ok(());
        }
        self.run(&step, &wanted, layer_done)
    }

    fn run(&mut self, step: &Step<'_>, wanted: &[usize], layer_done: &mut dyn FnMut(usize)) -> Result<(), ModelError> {
        let Decoder {
            ops,
            config,
            weights,
            frequencies,
            rope_scale,
            scratch: s,
        } = self;
        let eps = config.rms_norm_eps;
        ops.begin(step, frequencies, *rope_scale)?;
        ops.embed(step, &weights.embedding, &mut s.x)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            match index {
                0 => ops.rms_norm(&mut s.x, &layer.input_norm, eps, &mut s.normed)?,
                _ => ops.add_rms_norm(&mut s.x, &s.delta, &layer.input_norm, eps, &mut s.normed)?,
            }
            ops.linear(&s.normed, &layer.qkv, &mut s.qkv)?;
            ops.rope_kv_write(step, index, &mut s.qkv)?;
            ops.kv_written(index)?;
            layer_done(index);

            let last = index + 1 == config.layers;
            if last && wanted.is_empty() {
                return Ok(()); // Only K and V were wanted, and the last of them are written.
            }
            ops.attention(step, index, &s.qkv, &mut s.attended)?;
            if last {
                // From here on only the rows whose logits are wanted matter.
                ops.gather(&s.x, wanted, &mut s.last_x)?;
                ops.gather(&s.attended, wanted, &mut s.last_attended)?;
                std::mem::swap(&mut s.x, &mut s.last_x);
                std::mem::swap(&mut s.attended, &mut s.last_attended);
            }
            ops.linear(&s.attended, &layer.output, &mut s.delta)?;
            ops.all_reduce(&mut s.delta)?;
            ops.add_rms_norm(&mut s.x, &s.delta, &layer.mlp_norm, eps, &mut s.normed)?;
            ops.linear(&s.normed, &layer.gate_up, &mut s.gate_up)?;
            ops.silu_mul(&s.gate_up, &mut s.activated)?;
            ops.linear(&s.activated, &layer.down, &mut s.delta)?;
            ops.all_reduce(&mut s.delta)?;
        }
        ops.add_rms_norm(&mut s.x, &s.delta, &weights.norm, eps, &mut s.normed)?;
        ops.logits(&s.normed, &weights.head, &mut s.logits)?;
        // Back in their places: a device that recognises steps by the memory they use finds this one again.
        std::mem::swap(&mut s.x, &mut s.last_x);
        std::mem::swap(&mut s.attended, &mut s.last_attended);
        Ok(())
    }
}
