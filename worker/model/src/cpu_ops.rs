//! The op seam on the CPU: weights are packed when they are loaded, activations are plain vectors, every op returns when
//! it is done. The arithmetic is in `baton-kernels`.

use crate::communicator::Communicator;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::mapped::Tensor;
use crate::ops::{OpResult, Ops, StackedPart, Step};
use crate::options::Quantization;
use crate::shard::ShardSlices;
use baton_kernels::{AttentionSpan, Kernels, PackedMatrix, Pool};
use std::sync::Arc;

/// Runs ops on the CPU.
pub struct CpuOps {
    kernels: Kernels,
    quantization: Quantization,
    slices: ShardSlices,
    /// To the other ranks, if there are any.
    communicator: Option<Box<dyn Communicator>>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// This rank's logits, before they are gathered.
    logits: Vec<f32>,
}

impl CpuOps {
    /// On these kernels, for a whole model.
    pub fn new(kernels: Kernels, config: &ModelConfig, quantization: Quantization) -> Self {
        Self::with_slices(kernels, ShardSlices::whole(config), quantization, None)
    }

    /// On these kernels, for one rank's part of a model whose ranks share a KV arena.
    pub fn sharded(
        kernels: Kernels,
        slices: ShardSlices,
        quantization: Quantization,
        communicator: Box<dyn Communicator>,
    ) -> Self {
        Self::with_slices(kernels, slices, quantization, Some(communicator))
    }

    fn with_slices(
        kernels: Kernels,
        slices: ShardSlices,
        quantization: Quantization,
        communicator: Option<Box<dyn Communicator>>,
    ) -> Self {
        CpuOps {
            kernels,
            quantization,
            slices,
            communicator,
            cos: Vec::new(),
            sin: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// The kernels in use.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }
}

/// Activations: `[rows, width]`. The vector keeps its capacity from step to step, bounded by the largest batch.
#[derive(Debug, Default)]
pub struct CpuRows {
    width: usize,
    data: Vec<f32>,
}

impl CpuRows {
    fn rows(&self) -> usize {
        self.data.len() / self.width
    }

    fn resize(&mut self, rows: usize) -> &mut [f32] {
        self.data.resize(rows * self.width, 0.0);
        &mut self.data
    }
}

/// Elements `start..start + out.len()` of a tensor's row, also where `start` cuts a quantised block.
fn read_slice(tensor: &Tensor, row: usize, start: usize, out: &mut [f32]) {
    let cut = start % tensor.kind().block_elements();
    if cut == 0 {
        return tensor.read_row(row, start, out);
    }
    let mut whole = vec![0.0; cut + out.len()];
    tensor.read_row(row, start - cut, &mut whole);
    out.copy_from_slice(&whole[cut..]);
}

fn attention_spans<'a>(step: &Step<'a>) -> Vec<AttentionSpan<'a>> {
    let span = |s: &crate::ops::StepSpan<'a>| AttentionSpan {
        first_row: s.first_row,
        rows: s.rows,
        start_position: s.start_position,
        blocks: s.blocks,
    };
    step.spans.iter().map(span).collect()
}

impl Ops for CpuOps {
    type Matrix = PackedMatrix;
    type Table = Tensor;
    type Vector = Vec<f32>;
    type Rows = CpuRows;

    fn pool(&self) -> Option<Arc<Pool>> {
        Some(self.kernels.pool())
    }

    fn slices(&self) -> &ShardSlices {
        &self.slices
    }

    fn matrix(&mut self, parts: Vec<StackedPart>, head: bool) -> OpResult<PackedMatrix> {
        // Where each part's columns begin.
        let mut starts = Vec::with_capacity(parts.len());
        let mut columns = 0;
        for part in &parts {
            starts.push(columns);
            columns += part.columns.len();
        }
        let Some(first) = parts.first() else {
            return Err(ModelError::batch("a matrix of no parts"));
        };
        let (k, format) = (first.k.len(), self.quantization.format(first.weights.kind(), head));
        let bias = parts.iter().any(|p| p.bias.is_some()).then(|| {
            let values = |p: &StackedPart| p.bias.clone().unwrap_or_else(|| vec![0.0; p.columns.len()]);
            parts.iter().flat_map(values).collect()
        });
        let row = |n: usize, out: &mut [f32]| {
            let index = starts.partition_point(|s| *s <= n) - 1;
            let part = &parts[index];
            read_slice(&part.weights, part.columns.start + n - starts[index], part.k.start, out);
        };
        self.kernels
            .pack(format, columns, k, bias, &row)
            .map_err(|e| ModelError::DoesNotFit(format!("{e}; choose a smaller model or quantise it")))
    }

    fn table(&mut self, table: Tensor) -> OpResult<Tensor> {
        Ok(table)
    }

    fn vector(&mut self, values: Vec<f32>) -> OpResult<Vec<f32>> {
        Ok(values)
    }

    fn rows(&mut self, width: usize) -> OpResult<CpuRows> {
        Ok(CpuRows {
            width,
            data: Vec::new(),
        })
    }

    fn begin(&mut self, step: &Step<'_>, frequencies: &[f32], scale: f32) -> OpResult {
        self.cos.clear();
        self.sin.clear();
        for span in &step.spans {
            for position in span.start_position..span.start_position + span.rows {
                for frequency in frequencies {
                    // Positions are below 2^24, so exact in f32.
                    let (sin, cos) = (position as f32 * frequency).sin_cos();
                    self.cos.push(cos * scale);
                    self.sin.push(sin * scale);
                }
            }
        }
        Ok(())
    }

    fn embed(&mut self, step: &Step<'_>, table: &Tensor, out: &mut CpuRows) -> OpResult {
        let width = out.width;
        for (id, row) in step
            .tokens
            .iter()
            .zip(out.resize(step.tokens.len()).chunks_exact_mut(width))
        {
            table.read_row(*id as usize, 0, row);
        }
        Ok(())
    }

    fn rms_norm(&mut self, x: &mut CpuRows, weight: &Vec<f32>, eps: f32, out: &mut CpuRows) -> OpResult {
        let out = out.resize(x.rows());
        self.kernels.rms_norm(&mut x.data, None, weight, eps, out);
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        x: &mut CpuRows,
        delta: &CpuRows,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut CpuRows,
    ) -> OpResult {
        let out = out.resize(x.rows());
        self.kernels.rms_norm(&mut x.data, Some(&delta.data), weight, eps, out);
        Ok(())
    }

    fn linear(&mut self, x: &CpuRows, weights: &PackedMatrix, out: &mut CpuRows) -> OpResult {
        let rows = x.rows();
        self.kernels.linear(&x.data, rows, weights, out.resize(rows));
        Ok(())
    }

    fn rope_kv_write(&mut self, step: &Step<'_>, layer: usize, qkv: &mut CpuRows) -> OpResult {
        let (spans, arena) = (attention_spans(step), step.kv.arena());
        let (heads, kv_heads) = (self.slices.heads.len(), self.slices.kv_heads_written.clone());
        self.kernels.rope_kv_write(
            &mut qkv.data,
            heads,
            kv_heads,
            &self.cos,
            &self.sin,
            &spans,
            layer,
            &arena,
        );
        Ok(())
    }

    fn kv_written(&mut self, _layer: usize) -> OpResult {
        match &mut self.communicator {
            Some(communicator) => communicator.barrier(),
            None => Ok(()),
        }
    }

    fn attention(&mut self, step: &Step<'_>, layer: usize, qkv: &CpuRows, out: &mut CpuRows) -> OpResult {
        let (spans, arena) = (attention_spans(step), step.kv.arena());
        let out = out.resize(qkv.rows());
        let (heads, kv_heads) = (self.slices.heads.len(), self.slices.kv_heads.clone());
        self.kernels
            .attention(&qkv.data, qkv.width, heads, kv_heads, &spans, layer, &arena, out);
        Ok(())
    }

    fn silu_mul(&mut self, gate_up: &CpuRows, out: &mut CpuRows) -> OpResult {
        let width = out.width;
        self.kernels.silu_mul(&gate_up.data, width, out.resize(gate_up.rows()));
        Ok(())
    }

    fn gather(&mut self, x: &CpuRows, rows: &[usize], out: &mut CpuRows) -> OpResult {
        let width = x.width;
        for (to, row) in out.resize(rows.len()).chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(&x.data[row * width..(row + 1) * width]);
        }
        Ok(())
    }

    fn all_reduce(&mut self, x: &mut CpuRows) -> OpResult {
        match &mut self.communicator {
            Some(communicator) => communicator.all_reduce(&mut x.data),
            None => Ok(()),
        }
    }

    fn logits(&mut self, x: &CpuRows, head: &PackedMatrix, out: &mut Vec<f32>) -> OpResult {
        let rows = x.rows();
        let Some(communicator) = &mut self.communicator else {
            out.resize(rows * head.columns(), 0.0);
            self.kernels.linear(&x.data, rows, head, out);
            return Ok(());
        };
        self.logits.resize(rows * head.columns(), 0.0);
        self.kernels.linear(&x.data, rows, head, &mut self.logits);
        // Ranks' parts of the vocabulary follow one another in rank order.
        let vocab = self.slices.vocab_size;
        let mut column = 0;
        communicator.gather(&self.logits, &mut |_, part| {
            out.resize(rows * vocab, 0.0);
            let width = part.len() / rows;
            for (to, from) in out.chunks_exact_mut(vocab).zip(part.chunks_exact(width)) {
                to[column..column + width].copy_from_slice(from);
            }
            column += width;
        })
    }

    fn abort(&self, reason: &str) {
        if let Some(communicator) = &self.communicator {
            communicator.abort(reason);
        }
    }
}
