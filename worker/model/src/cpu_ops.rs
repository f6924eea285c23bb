//! The op seam on the CPU: weights are packed when they are loaded, activations are plain vectors, every op returns when
//! it is done. The arithmetic is in `baton-kernels`.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::mapped::Tensor;
use crate::ops::{OpResult, Ops, StackedPart, Step};
use crate::options::Quantization;
use baton_kernels::{AttentionSpan, Kernels, PackedMatrix, Pool};
use std::ops::Range;
use std::sync::Arc;

/// Runs ops on the CPU.
pub struct CpuOps {
    kernels: Kernels,
    quantization: Quantization,
    heads: usize,
    kv_heads: Range<usize>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl CpuOps {
    /// On these kernels, for all heads of a model.
    pub fn new(kernels: Kernels, config: &ModelConfig, quantization: Quantization) -> Self {
        CpuOps {
            kernels,
            quantization,
            heads: config.heads,
            kv_heads: 0..config.kv_heads,
            cos: Vec::new(),
            sin: Vec::new(),
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
            part.weights
                .read_row(part.columns.start + n - starts[index], part.k.start, out);
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
        let (heads, kv_heads) = (self.heads, self.kv_heads.clone());
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
        Ok(())
    }

    fn attention(&mut self, step: &Step<'_>, layer: usize, qkv: &CpuRows, out: &mut CpuRows) -> OpResult {
        let (spans, arena) = (attention_spans(step), step.kv.arena());
        let out = out.resize(qkv.rows());
        let (heads, kv_heads) = (self.heads, self.kv_heads.clone());
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

    fn logits(&mut self, x: &CpuRows, head: &PackedMatrix, out: &mut Vec<f32>) -> OpResult {
        out.resize(x.rows() * head.columns(), 0.0);
        self.kernels.linear(&x.data, x.rows(), head, out);
        Ok(())
    }
}
