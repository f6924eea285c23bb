//! The ops themselves: which kernel, which grid, which arguments.

use super::{CudaOps, DeviceRows, DeviceTable, KvMemory, device_error};
use crate::args::{self, Args, ElementType};
use crate::driver::{Address, Driver};
use crate::matrix::{self, DeviceMatrix, Format};
use crate::work::bucket;
use baton_kernels::{Pool, StoredType};
use baton_model::{ModelError, OpResult, Ops, ShardSlices, StackedPart, Step, Tensor};
use std::sync::Arc;

/// Rows of a table that are converted at a time.
const TABLE_ROWS: usize = 1024;

impl<D: Driver> Ops for CudaOps<D> {
    type Matrix = DeviceMatrix;
    type Table = DeviceTable;
    type Vector = Address;
    type Rows = DeviceRows;

    fn slices(&self) -> &ShardSlices {
        &self.slices
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        Some(self.pool.clone())
    }

    fn kv_in_region(&self) -> bool {
        self.arena.is_some_and(|arena| arena.memory == KvMemory::Host)
    }

    fn matrix(&mut self, parts: Vec<StackedPart>, head: bool) -> OpResult<DeviceMatrix> {
        let Some(first) = parts.first() else {
            return Err(ModelError::Batch("a matrix of no parts".into()));
        };
        let format = self.options.quantization.format(first.weights.kind(), head);
        let format = Format::of(format, self.program.element);
        matrix::upload(&mut self.driver, &self.pool, &parts, format, self.program.element).map_err(device_error)
    }

    fn table(&mut self, table: Tensor) -> OpResult<DeviceTable> {
        let (rows, width) = (table.rows(), table.shape().last().copied().unwrap_or(0));
        // Rows of quantised types are decoded to f16, which their scales are in.
        let element = match table.kind() {
            StoredType::F32 => ElementType::F32,
            StoredType::Bf16 => ElementType::Bf16,
            _ => ElementType::F16,
        };
        let row_bytes = width * element.bytes();
        let address = self.driver.allocate(rows * row_bytes).map_err(device_error)?;
        let mut values = vec![0.0; width];
        for first in (0..rows).step_by(TABLE_ROWS) {
            let mut bytes = Vec::with_capacity(TABLE_ROWS * row_bytes);
            for row in first..rows.min(first + TABLE_ROWS) {
                if table.kind().is_float() {
                    bytes.extend_from_slice(table.row_bytes(row));
                } else {
                    table.read_row(row, 0, &mut values);
                    bytes.extend(matrix::floats(&values, element));
                }
            }
            let to = address + (first * row_bytes) as u64;
            self.driver.upload(to, &bytes).map_err(device_error)?;
        }
        Ok(DeviceTable { address, element })
    }

    fn vector(&mut self, values: Vec<f32>) -> OpResult<Address> {
        let bytes = matrix::floats(&values, ElementType::F32);
        let address = self.driver.allocate(bytes.len()).map_err(device_error)?;
        self.driver.upload(address, &bytes).map_err(device_error)?;
        Ok(address)
    }

    fn rows(&mut self, width: usize) -> OpResult<DeviceRows> {
        let bytes = self.options.rows_max.saturating_mul(width).saturating_mul(4);
        Ok(DeviceRows {
            address: self.driver.allocate(bytes).map_err(device_error)?,
            width,
            rows: 0,
            element: ElementType::F32,
        })
    }

    fn begin(&mut self, step: &Step<'_>, frequencies: &[f32], scale: f32) -> OpResult {
        self.run()?;
        let arena = self.arena()?;
        if step.kv.blocks() != arena.blocks || step.kv.geometry() != arena.geometry {
            return Err(ModelError::Batch("the KV cache is not the one on the device".into()));
        }
        let decode = step.spans.iter().all(|span| span.rows == 1);
        let padded = if decode { bucket(step.tokens.len()) } else { None };
        let rows = padded
            .filter(|rows| *rows <= self.options.rows_max)
            .unwrap_or(step.tokens.len());
        if rows > self.options.rows_max {
            return Err(ModelError::Batch(format!(
                "a step of {rows} tokens on a GPU prepared for {}",
                self.options.rows_max
            )));
        }
        self.plan = self.on_device(|this| this.upload_step(step, rows, &arena, padded.is_some()))?;
        if self.frequencies_known != frequencies {
            let bytes = matrix::floats(frequencies, ElementType::F32);
            self.on_device(|this| {
                let to = Self::grow(&mut this.driver, &mut this.frequencies, bytes.len())?;
                this.driver.upload(to, &bytes)
            })?;
            self.frequencies_known = frequencies.to_vec();
        }
        let args = Args::new(&[
            self.plan.positions,
            self.frequencies.address,
            self.cos.address,
            self.sin.address,
        ]);
        let args = args.f32(scale).size(frequencies.len());
        self.note("rope_table", [rows, 1], 128, 0, args)
    }

    fn embed(&mut self, _step: &Step<'_>, table: &DeviceTable, out: &mut DeviceRows) -> OpResult {
        out.rows = self.plan.rows;
        out.element = ElementType::F32;
        let args = Args::new(&[table.address, self.plan.tokens, out.address]);
        let args = args.size(out.width).u32(table.element as u32);
        self.note("embed", [out.rows, 1], args::THREADS, 0, args)
    }

    fn rms_norm(&mut self, x: &mut DeviceRows, weight: &Address, eps: f32, out: &mut DeviceRows) -> OpResult {
        self.rms(x, 0, *weight, eps, out)
    }

    fn add_rms_norm(
        &mut self,
        x: &mut DeviceRows,
        delta: &DeviceRows,
        weight: &Address,
        eps: f32,
        out: &mut DeviceRows,
    ) -> OpResult {
        self.rms(x, delta.address, *weight, eps, out)
    }

    fn linear(&mut self, x: &DeviceRows, weights: &DeviceMatrix, out: &mut DeviceRows) -> OpResult {
        out.rows = x.rows;
        out.element = ElementType::F32;
        self.multiply(x, weights, out.address)
    }

    fn rope_kv_write(&mut self, _step: &Step<'_>, layer: usize, qkv: &mut DeviceRows) -> OpResult {
        let arena = self.arena()?;
        let (g, written) = (arena.geometry, self.slices.kv_heads_written.clone());
        let first = arena.address + g.heads_range(0, layer, written.clone()).start as u64;
        let plan = &self.plan;
        let args = Args::new(&[
            qkv.address,
            self.cos.address,
            self.sin.address,
            plan.slots,
            first,
            g.block_bytes() as u64,
            g.head_bytes() as u64,
            (g.head_bytes() / 2) as u64,
        ]);
        let args = args
            .size(self.slices.heads.len())
            .size(written.len())
            .size(g.block_size)
            .u32(0);
        self.note("rope_kv_write", [qkv.rows, 1], args::THREADS, 0, args)
    }

    fn kv_written(&mut self, layer: usize) -> OpResult {
        if self.arena()?.memory == KvMemory::Host {
            self.run()?;
            return self.on_device(|this| this.driver.synchronize());
        }
        // A step may end here. A decode step always wants logits, and stays in one piece for its graph.
        if layer + 1 == self.layers && !self.plan.decode {
            self.run()?;
        }
        Ok(())
    }

    fn attention(&mut self, _step: &Step<'_>, layer: usize, qkv: &DeviceRows, out: &mut DeviceRows) -> OpResult {
        let arena = self.arena()?;
        let (g, kv_heads) = (arena.geometry, self.slices.kv_heads.clone());
        let (heads, element) = (self.slices.heads.len(), self.program.element);
        let group = heads / kv_heads.len().max(1);
        out.rows = qkv.rows;
        out.element = element;
        let first = arena.address + g.heads_range(0, layer, kv_heads.clone()).start as u64;
        let scale = std::f32::consts::LOG2_E / (g.head_dim as f32).sqrt();
        let (plan, partials) = (&self.plan, self.partials.address);
        let (items, merges, merge_items) = (plan.item_count, plan.merge_count, plan.merge_items);
        let args = Args::new(&[
            qkv.address,
            out.address,
            first,
            plan.items,
            plan.tables,
            partials,
            g.block_bytes() as u64,
            g.head_bytes() as u64,
            (g.head_bytes() / 2) as u64,
        ]);
        let args = args.size(qkv.width).size(group).size(kv_heads.len()).size(g.block_size);
        let args = args.u32(element as u32).f32(scale);
        if element == ElementType::F32 {
            return self.note("attention_f32", [items, heads], args::ATTENTION_THREADS, 0, args);
        }
        let shared = args::attention_shared_bytes(g.head_dim);
        self.note(
            "attention",
            [items, kv_heads.len()],
            args::ATTENTION_THREADS,
            shared,
            args,
        )?;
        let args = Args::new(&[merge_items, partials, out.address]);
        let args = args.size(group).size(kv_heads.len()).u32(element as u32).u32(0);
        self.note("attention_merge", [merges, heads], args::ATTENTION_THREADS, 0, args)
    }

    fn silu_mul(&mut self, gate_up: &DeviceRows, out: &mut DeviceRows) -> OpResult {
        out.rows = gate_up.rows;
        out.element = self.program.element;
        let args = Args::new(&[gate_up.address, out.address]);
        let args = args.size(out.width).u32(out.element as u32);
        let grid = [out.width.div_ceil(args::THREADS as usize), out.rows];
        self.note("silu_mul", grid, args::THREADS, 0, args)
    }

    fn gather(&mut self, x: &DeviceRows, rows: &[usize], out: &mut DeviceRows) -> OpResult {
        // Padded like the step, with row 0.
        let padded = if self.plan.decode { bucket(rows.len()) } else { None };
        let padded = padded.unwrap_or(rows.len()).min(self.options.rows_max);
        if self.plan.wanted == 0 {
            let mut bytes: Vec<u8> = Vec::with_capacity(padded * 4);
            bytes.extend(
                rows.iter()
                    .flat_map(|row| u32::try_from(*row).unwrap_or(0).to_ne_bytes()),
            );
            bytes.resize(padded * 4, 0);
            self.plan.wanted = rows.len();
            self.on_device(|this| {
                let to = Self::grow(&mut this.driver, &mut this.gather, bytes.len())?;
                this.driver.upload(to, &bytes)
            })?;
        } else if self.plan.wanted != rows.len() {
            return Err(ModelError::Batch("two different gathers in a step".into()));
        }
        out.rows = padded;
        out.element = x.element;
        let args = Args::new(&[x.address, self.gather.address, out.address]);
        let args = args.size(x.width * x.element.bytes() / 4).u32(0);
        self.note("gather_rows", [padded, 1], args::THREADS, 0, args)
    }

    fn all_reduce(&mut self, _x: &mut DeviceRows) -> OpResult {
        Ok(()) // One rank.
    }

    fn logits(&mut self, x: &DeviceRows, head: &DeviceMatrix, out: &mut Vec<f32>) -> OpResult {
        let bytes = x.rows * head.columns * 4;
        let address = self.on_device(|this| Self::grow(&mut this.driver, &mut this.logits, bytes))?;
        self.multiply(x, head, address)?;
        self.run()?;
        out.clear();
        out.resize(self.plan.wanted * head.columns, 0.0);
        self.on_device(|this| this.driver.download(address, bytemuck::cast_slice_mut(out)))?;
        Ok(())
    }

    fn abort(&self, _reason: &str) {}
}
