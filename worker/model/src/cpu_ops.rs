//! The op seam on the CPU: weights stay where they are mapped, activations are plain vectors, every op returns when it
//! is done. The arithmetic is in `baton-kernels`.

use crate::ops::{OpResult, Ops, StackedPart, Step};
use baton_kernels::{AttentionSpan, Kernels, MatrixPart, Pool, PoolConfig};
use std::sync::Arc;

/// Runs ops on the CPU.
pub struct CpuOps {
    kernels: Kernels,
    heads: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl CpuOps {
    /// On `threads` threads (the caller's included), for a model with this many query heads.
    pub fn new(threads: impl Into<PoolConfig>, heads: usize) -> Self {
        Self::with_kernels(Kernels::new(threads), heads)
    }

    /// On these kernels.
    pub fn with_kernels(kernels: Kernels, heads: usize) -> Self {
        CpuOps {
            kernels,
            heads,
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

/// A matrix where it is mapped.
#[derive(Debug)]
pub struct CpuMatrix {
    k: usize,
    parts: Vec<StackedPart>,
}

impl CpuMatrix {
    fn parts(&self) -> Vec<MatrixPart<'_>> {
        fn view(part: &StackedPart) -> MatrixPart<'_> {
            let columns = part.weights.shape().first().copied().unwrap_or(0);
            MatrixPart {
                weights: part.weights.elements(),
                bias: part.bias.as_deref(),
                columns,
            }
        }
        self.parts.iter().map(view).collect()
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
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type Rows = CpuRows;

    fn pool(&self) -> Option<Arc<Pool>> {
        Some(self.kernels.pool())
    }

    fn matrix(&mut self, parts: Vec<StackedPart>) -> OpResult<CpuMatrix> {
        let k = parts
            .first()
            .and_then(|p| p.weights.shape().get(1).copied())
            .unwrap_or(0);
        Ok(CpuMatrix { k, parts })
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

    fn embed(&mut self, step: &Step<'_>, table: &CpuMatrix, out: &mut CpuRows) -> OpResult {
        let out = out.resize(step.tokens.len());
        self.kernels
            .embed(table.parts[0].weights.elements(), table.k, step.tokens, out);
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

    fn linear(&mut self, x: &CpuRows, weights: &CpuMatrix, out: &mut CpuRows) -> OpResult {
        let rows = x.rows();
        self.kernels
            .linear(&x.data, rows, weights.k, &weights.parts(), out.resize(rows));
        Ok(())
    }

    fn rope_kv_write(&mut self, step: &Step<'_>, layer: usize, qkv: &mut CpuRows) -> OpResult {
        let (spans, arena) = (attention_spans(step), step.kv.arena());
        self.kernels
            .rope_kv_write(&mut qkv.data, self.heads, &self.cos, &self.sin, &spans, layer, &arena);
        Ok(())
    }

    fn kv_written(&mut self, _layer: usize) -> OpResult {
        Ok(())
    }

    fn attention(&mut self, step: &Step<'_>, layer: usize, qkv: &CpuRows, out: &mut CpuRows) -> OpResult {
        let (spans, arena) = (attention_spans(step), step.kv.arena());
        let out = out.resize(qkv.rows());
        self.kernels
            .attention(&qkv.data, qkv.width, self.heads, &spans, layer, &arena, out);
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

    fn logits(&mut self, x: &CpuRows, head: &CpuMatrix, out: &mut Vec<f32>) -> OpResult {
        let parts = head.parts();
        out.resize(x.rows() * parts.iter().map(|p| p.columns).sum::<usize>(), 0.0);
        self.kernels.linear(&x.data, x.rows(), head.k, &parts, out);
        Ok(())
    }
}
