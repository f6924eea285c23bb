//! Rows for single ops, against references in f64.

use super::{CheckError, Context, Outcome, RowResult, bare_ops, relative_error};
use crate::args::ElementType;
use crate::driver::Driver;
use crate::matrix::{self, Format, encode_values};
use crate::ops::{CudaOps, DeviceRows, KvMemory};
use baton_kernels::{Kernels, WeightFormat};
use baton_model::{KvCache, KvDtype, KvGeometry, KvHalf, Ops, Step, StepSpan};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Rows of an op's batch at most.
const ROWS_MAX: usize = 200;

fn random(rng: &mut SmallRng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Values as they are once they are stored.
fn rounded(values: &[f32], element: ElementType) -> Vec<f32> {
    let round = |v: &f32| match element {
        ElementType::F32 => *v,
        ElementType::F16 => f16::from_f32(*v).to_f32(),
        ElementType::Bf16 => bf16::from_f32(*v).to_f32(),
    };
    values.iter().map(round).collect()
}

fn decoded(bytes: &[u8], element: ElementType) -> Vec<f32> {
    match element {
        ElementType::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_ne_bytes(*b))
            .collect(),
        ElementType::F16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f16::from_ne_bytes(*b).to_f32())
            .collect(),
        ElementType::Bf16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| bf16::from_ne_bytes(*b).to_f32())
            .collect(),
    }
}

/// Rows with these values.
fn filled<D: Driver>(
    ops: &mut CudaOps<D>,
    values: &[f32],
    width: usize,
    element: ElementType,
) -> Result<DeviceRows, CheckError> {
    let mut rows = ops.rows(width)?;
    ops.set_rows(
        &mut rows,
        &matrix::floats(values, element),
        values.len() / width,
        element,
    )?;
    Ok(rows)
}

/// Rows full of NaN, to be written.
fn poisoned<D: Driver>(ops: &mut CudaOps<D>, width: usize) -> Result<DeviceRows, CheckError> {
    let mut rows = ops.rows(width)?;
    ops.set_rows(&mut rows, &vec![0xff; ROWS_MAX * width * 4], ROWS_MAX, ElementType::F32)?;
    Ok(rows)
}

fn read<D: Driver>(ops: &mut CudaOps<D>, rows: &DeviceRows) -> Result<Vec<f32>, CheckError> {
    let (bytes, element) = ops.get_rows(rows)?;
    Ok(decoded(&bytes, element))
}

/// The verdict over the largest of several errors.
fn verdict(worst: f64, tolerance: f64, what: &str) -> Outcome {
    let detail = format!("{what}; error {worst:.1e} of {tolerance:.0e}");
    Outcome::verdict(worst <= tolerance, detail)
}

/// The larger one; NaN wins.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// A step of these spans, each with blocks of its own in random order.
struct Ragged {
    lengths: Vec<(usize, usize)>,
    blocks: Vec<Vec<u32>>,
    tokens: Vec<u32>,
    kv: KvCache,
}

impl Ragged {
    fn new(
        rng: &mut SmallRng,
        geometry: KvGeometry,
        lengths: &[(usize, usize)],
        vocab: u32,
    ) -> Result<Self, CheckError> {
        let needed: Vec<usize> = lengths
            .iter()
            .map(|(start, rows)| geometry.blocks_for(start + rows))
            .collect();
        let total: usize = needed.iter().sum();
        let mut free: Vec<u32> = (0..u32::try_from(total).unwrap_or(0) + 3).collect();
        for index in (1..free.len()).rev() {
            free.swap(index, rng.random_range(0..=index));
        }
        let kv = KvCache::allocate(geometry, u32::try_from(free.len()).unwrap_or(u32::MAX))?;
        let mut free = free.into_iter();
        let blocks = needed
            .iter()
            .map(|count| free.by_ref().take(*count).collect())
            .collect();
        let rows: usize = lengths.iter().map(|(_, rows)| rows).sum();
        Ok(Ragged {
            lengths: lengths.to_vec(),
            blocks,
            tokens: (0..rows).map(|_| rng.random_range(0..vocab)).collect(),
            kv,
        })
    }

    fn step(&self) -> Step<'_> {
        let mut first_row = 0;
        let spans = self.lengths.iter().zip(&self.blocks).map(|((start, rows), blocks)| {
            let span = StepSpan {
                first_row,
                rows: *rows,
                start_position: *start,
                blocks,
            };
            first_row += rows;
            span
        });
        Step {
            spans: spans.collect(),
            tokens: &self.tokens,
            kv: &self.kv,
        }
    }

    fn slot(&self, span: usize, position: usize) -> (u32, usize) {
        let size = self.kv.geometry().block_size;
        (self.blocks[span][position / size], position % size)
    }
}

/// Compiles and loads the kernels of every type.
pub fn load<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut name = String::new();
    for dtype in ["bfloat16", "float16", "float32"] {
        let mut ops = bare_ops(context, dtype, 4, 2, 128, 16)?;
        let device = ops.driver().device();
        let (major, minor) = device.capability;
        name = format!("{}, compute capability {major}.{minor}", device.name);
    }
    Ok(Outcome::verdict(true, format!("bf16, f16 and f32 on {name}")))
}

pub fn embed<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut ops = bare_ops(context, "bfloat16", 4, 2, 128, ROWS_MAX)?;
    let (vocab, width) = (97usize, 200);
    let mut worst = 0.0;
    for element in [ElementType::Bf16, ElementType::F16, ElementType::F32] {
        let table = rounded(&random(&mut rng, vocab * width), element);
        let lengths = [(3, 1), (0, 40), (7, 2)];
        let ragged = Ragged::new(&mut rng, ops.geometry(16), &lengths, vocab as u32)?;
        ops.allocate_arena(
            ragged.kv.geometry(),
            ragged.kv.blocks(),
            KvMemory::Device,
            ragged.kv.region(),
        )?;
        let on_device = ops.table_of(&matrix::floats(&table, element), element)?;
        let mut out = poisoned(&mut ops, width)?;
        let step = ragged.step();
        ops.begin(&step, &[0.5; 16], 1.0)?;
        ops.embed(&step, &on_device, &mut out)?;
        let row = |t: &u32| &table[*t as usize * width..][..width];
        let wanted: Vec<f64> = ragged.tokens.iter().flat_map(row).map(|v| f64::from(*v)).collect();
        worst = larger(relative_error(&read(&mut ops, &out)?, &wanted), worst);
    }
    Ok(verdict(worst, 0.0, "43 rows of three types"))
}

pub fn rms_norm<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut worst = 0.0;
    for (dtype, tolerance_scale) in [("float32", 1.0), ("bfloat16", 1e-4)] {
        for (rows, width) in [(1, 64), (3, 1000), (65, 4096)] {
            let mut ops = bare_ops(context, dtype, 4, 2, 128, ROWS_MAX)?;
            let (x, delta, weight) = (
                random(&mut rng, rows * width),
                random(&mut rng, rows * width),
                random(&mut rng, width),
            );
            let on_device = ops.vector(weight.clone())?;
            let mut x_rows = filled(&mut ops, &x, width, ElementType::F32)?;
            let delta_rows = filled(&mut ops, &delta, width, ElementType::F32)?;
            let mut out = poisoned(&mut ops, width)?;
            ops.add_rms_norm(&mut x_rows, &delta_rows, &on_device, 1e-5, &mut out)?;
            let mut wanted = Vec::new();
            let mut residual = Vec::new();
            for (x, delta) in x.chunks(width).zip(delta.chunks(width)) {
                let sums: Vec<f64> = x
                    .iter()
                    .zip(delta)
                    .map(|(a, b)| f64::from(*a) + f64::from(*b))
                    .collect();
                let mean = sums.iter().map(|v| v * v).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + 1e-5).sqrt();
                wanted.extend(sums.iter().zip(&weight).map(|(v, w)| v * scale * f64::from(*w)));
                residual.extend(sums);
            }
            // An error of bf16 counts as what is left of it once the type's own rounding is taken off.
            worst = larger(relative_error(&read(&mut ops, &out)?, &wanted) * tolerance_scale, worst);
            worst = larger(relative_error(&read(&mut ops, &x_rows)?, &residual), worst);
        }
    }
    Ok(verdict(worst, 1e-6, "with residual, 1 to 65 rows, widths 64 to 4096"))
}

pub fn silu_mul<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut worst = 0.0;
    for (rows, width) in [(1, 64), (7, 1000), (65, 300)] {
        let mut ops = bare_ops(context, "float32", 4, 2, 128, ROWS_MAX)?;
        let values: Vec<f32> = random(&mut rng, rows * width * 2).iter().map(|v| v * 20.0).collect();
        let gate_up = filled(&mut ops, &values, 2 * width, ElementType::F32)?;
        let mut out = poisoned(&mut ops, width)?;
        ops.silu_mul(&gate_up, &mut out)?;
        let row = |row: &[f32]| -> Vec<f64> {
            let one = |i: usize| (f64::from(row[i]), f64::from(row[width + i]));
            (0..width).map(one).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
        };
        let wanted: Vec<f64> = values.chunks(2 * width).flat_map(row).collect();
        worst = larger(relative_error(&read(&mut ops, &out)?, &wanted), worst);
    }
    Ok(verdict(worst, 2e-6, "1 to 65 rows"))
}

pub fn gather<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut worst = 0.0;
    for element in [ElementType::F32, ElementType::Bf16] {
        let mut ops = bare_ops(context, "bfloat16", 4, 2, 128, ROWS_MAX)?;
        let values = rounded(&random(&mut rng, 50 * 72), element);
        let x = filled(&mut ops, &values, 72, element)?;
        let mut out = poisoned(&mut ops, 72)?;
        let rows: Vec<usize> = (0..9).map(|_| rng.random_range(0..50)).collect();
        ops.gather(&x, &rows, &mut out)?;
        let wanted: Vec<f64> = rows
            .iter()
            .flat_map(|r| &values[r * 72..][..72])
            .map(|v| f64::from(*v))
            .collect();
        worst = larger(relative_error(&read(&mut ops, &out)?, &wanted), worst);
    }
    Ok(verdict(worst, 0.0, "9 of 50 rows of two types"))
}

/// Products of many shapes, and that a row's bits depend on no other row.
fn linear<D: Driver>(context: &Context<'_, D>, format: Option<WeightFormat>, element: ElementType) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let dtype = match element {
        ElementType::F32 => "float32",
        ElementType::F16 => "float16",
        ElementType::Bf16 => "bfloat16",
    };
    let on_device = format.map_or(Format::Dense, Format::Quantized);
    let kernels = Kernels::new(1);
    let mut ops = bare_ops(context, dtype, 4, 2, 128, ROWS_MAX)?;
    let (mut worst, mut differ) = (0.0, 0);
    for (k, columns) in [(64, 8), (8, 33), (200, 130), (1056, 65)] {
        let weights = random(&mut rng, columns * k);
        let bias = random(&mut rng, columns);
        let row = |n: usize| encode_values(&weights[n * k..][..k], on_device, element);
        let pool = ops.pool().unwrap_or_else(|| kernels.pool());
        let w = matrix::upload_rows(ops.driver(), &pool, columns, k, Some(&bias), on_device, element, &row)?;
        // What the device holds, exactly.
        let meant: Vec<f32> = match format {
            None => rounded(&weights, element),
            Some(format) => {
                let packed = kernels
                    .pack(format, columns, k, None, &|n, out| {
                        out.copy_from_slice(&weights[n * k..][..k])
                    })
                    .map_err(|error| baton_model::ModelError::DoesNotFit(error.to_string()))?;
                (0..columns).flat_map(|n| packed.dequantized_row(n)).collect()
            }
        };
        let x = rounded(&random(&mut rng, ROWS_MAX * k), element);
        let one = |r: usize, n: usize| -> f64 {
            let pairs = x[r * k..][..k].iter().zip(&meant[n * k..][..k]);
            pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() + f64::from(bias[n])
        };
        let wanted: Vec<f64> = (0..ROWS_MAX * columns).map(|i| one(i / columns, i % columns)).collect();
        let mut single: Vec<u32> = Vec::new();
        for rows in [1, 5, 16, 17, 64, 65, ROWS_MAX] {
            let x_rows = filled(&mut ops, &x[..rows * k], k, element)?;
            let mut out = poisoned(&mut ops, columns)?;
            ops.linear(&x_rows, &w, &mut out)?;
            let found = read(&mut ops, &out)?;
            worst = larger(relative_error(&found, &wanted[..rows * columns]), worst);
            let bits: Vec<u32> = found.iter().take(columns).map(|v| v.to_bits()).collect();
            if rows == 1 {
                single = bits;
            } else if bits != single {
                differ += 1;
            }
            ops.free_rows(x_rows);
            ops.free_rows(out);
        }
    }
    let detail = format!(
        "4 shapes, 1 to {ROWS_MAX} rows; error {worst:.1e} of 5e-6; first row differs in {differ} of 24 batches"
    );
    Ok(Outcome::verdict(worst <= 5e-6 && differ == 0, detail))
}

pub fn linear_f32<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, None, ElementType::F32)
}

pub fn linear_bf16<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, None, ElementType::Bf16)
}

pub fn linear_f16<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, None, ElementType::F16)
}

pub fn linear_int8<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, Some(WeightFormat::Int8), ElementType::Bf16)
}

pub fn linear_group8<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, Some(WeightFormat::Group8), ElementType::Bf16)
}

pub fn linear_group4<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, Some(WeightFormat::Group4), ElementType::F16)
}

pub fn linear_group4_min<D: Driver>(context: &Context<'_, D>) -> RowResult {
    linear(context, Some(WeightFormat::Group4Min), ElementType::Bf16)
}

fn element_of(dtype: KvDtype) -> ElementType {
    match dtype {
        KvDtype::F32 => ElementType::F32,
        KvDtype::F16 => ElementType::F16,
        KvDtype::Bf16 => ElementType::Bf16,
    }
}

/// Elements of a slot in the region.
fn slot(kv: &KvCache, at: (u32, usize), layer: usize, head: usize, half: KvHalf) -> Vec<f32> {
    let g = kv.geometry();
    let range = g.range(at.0, layer, head, half, at.1..at.1 + 1);
    let mut bytes = vec![0; range.len()];
    if !kv.region().copy_out(range.start, &mut bytes) {
        return Vec::new();
    }
    decoded(&bytes, element_of(g.dtype))
}

/// Rotation of Q and K, and K and V in their slots; no other byte of the arena may change.
fn rope<D: Driver>(context: &Context<'_, D>, dtype: &str) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let (heads, kv_heads, dim) = (6, 2, 128);
    let mut ops = bare_ops(context, dtype, heads, kv_heads, dim, ROWS_MAX)?;
    let ragged = Ragged::new(&mut rng, ops.geometry(16), &[(0, 20), (4000, 1), (33, 7)], 64)?;
    let g = ragged.kv.geometry();
    let poison = vec![0xff; g.arena_bytes(ragged.kv.blocks()).unwrap_or(0)];
    let filled_region = ragged.kv.region().copy_in(0, &poison);
    ops.allocate_arena(g, ragged.kv.blocks(), KvMemory::Host, ragged.kv.region())?;
    let width = (heads + 2 * kv_heads) * dim;
    let rows = ragged.tokens.len();
    let values = random(&mut rng, rows * width);
    let frequencies: Vec<f32> = (0..dim / 2)
        .map(|i| 1e4f32.powf(-(2.0 * i as f32) / dim as f32))
        .collect();
    let mut qkv = filled(&mut ops, &values, width, ElementType::F32)?;
    let step = ragged.step();
    ops.begin(&step, &frequencies, 1.25)?;
    ops.rope_kv_write(&step, 1, &mut qkv)?;
    ops.kv_written(1)?;
    let found = read(&mut ops, &qkv)?;
    let mut wanted: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
    let (mut stored, mut stored_wanted, mut written) = (Vec::new(), Vec::new(), 0usize);
    let mut row = 0;
    for (span, (start, count)) in ragged.lengths.iter().enumerate() {
        for position in *start..start + count {
            let x = &mut wanted[row * width..][..width];
            for head in x[..(heads + kv_heads) * dim].chunks_mut(dim) {
                for i in 0..dim / 2 {
                    // The angle is a product in f32, as everywhere.
                    let angle = f64::from(position as f32 * frequencies[i]);
                    let (c, s) = (angle.cos() * 1.25, angle.sin() * 1.25);
                    (head[i], head[i + dim / 2]) =
                        (head[i] * c - head[i + dim / 2] * s, head[i + dim / 2] * c + head[i] * s);
                }
            }
            let at = ragged.slot(span, position);
            for head in 0..kv_heads {
                for (half, offset) in [(KvHalf::K, heads), (KvHalf::V, heads + kv_heads)] {
                    stored.extend(slot(&ragged.kv, at, 1, head, half));
                    stored_wanted.extend_from_slice(&x[(offset + head) * dim..][..dim]);
                    written += g.slot_bytes();
                }
            }
            row += 1;
        }
    }
    let mut bytes = vec![0; poison.len()];
    let read_region = ragged.kv.region().copy_out(0, &mut bytes);
    let changed = bytes.iter().filter(|b| **b != 0xff).count();
    let (rotation, storage) = (relative_error(&found, &wanted), relative_error(&stored, &stored_wanted));
    let tolerance = if g.dtype == KvDtype::F32 { 1e-6 } else { 4e-3 };
    let detail = format!(
        "28 rows of 3 sequences; rotation error {rotation:.1e} of 1e-6, stored {storage:.1e} of {tolerance:.0e}; {changed} \
         bytes changed of {written} asked for"
    );
    let passed = filled_region && read_region && rotation <= 1e-6 && storage <= tolerance && changed <= written;
    Ok(Outcome::verdict(passed, detail))
}

pub fn rope_bf16<D: Driver>(context: &Context<'_, D>) -> RowResult {
    rope(context, "bfloat16")
}

pub fn rope_f32<D: Driver>(context: &Context<'_, D>) -> RowResult {
    rope(context, "float32")
}

/// Ragged attention over an arena whose unused slots are NaN.
fn attention<D: Driver>(context: &Context<'_, D>, dtype: &str, heads: usize, kv_heads: usize, dim: usize) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut ops = bare_ops(context, dtype, heads, kv_heads, dim, ROWS_MAX)?;
    let lengths = [(0, 70), (700, 1), (255, 2), (250, 30), (0, 1), (511, 1), (512, 1)];
    let ragged = Ragged::new(&mut rng, ops.geometry(16), &lengths, 64)?;
    let g = ragged.kv.geometry();
    let element = element_of(g.dtype);
    let poison = vec![0xff; g.arena_bytes(ragged.kv.blocks()).unwrap_or(0)];
    let mut copied = ragged.kv.region().copy_in(0, &poison);
    // [span][position][head]: key and value.
    let mut stored: Vec<Vec<Vec<[Vec<f32>; 2]>>> = Vec::new();
    for (span, (start, rows)) in lengths.iter().enumerate() {
        let mut positions = Vec::new();
        for position in 0..start + rows {
            let (block, at) = ragged.slot(span, position);
            let mut of_heads = Vec::new();
            for head in 0..kv_heads {
                let pair = [KvHalf::K, KvHalf::V].map(|half| {
                    let values = rounded(&random(&mut rng, dim), element);
                    let range = g.range(block, 1, head, half, at..at + 1);
                    copied &= ragged
                        .kv
                        .region()
                        .copy_in(range.start, &matrix::floats(&values, element));
                    values
                });
                of_heads.push(pair);
            }
            positions.push(of_heads);
        }
        stored.push(positions);
    }
    ops.allocate_arena(g, ragged.kv.blocks(), KvMemory::Host, ragged.kv.region())?;
    let rows = ragged.tokens.len();
    let width = (heads + 2 * kv_heads) * dim;
    // Larger queries, so that some keys matter much more than others.
    let q: Vec<f32> = random(&mut rng, rows * width).iter().map(|v| v * 3.0).collect();
    let q = rounded(&q, element);
    let qkv = filled(&mut ops, &q, width, ElementType::F32)?;
    let mut out = poisoned(&mut ops, heads * dim)?;
    let step = ragged.step();
    ops.begin(&step, &[0.5; 8], 1.0)?;
    ops.attention(&step, 1, &qkv, &mut out)?;
    let found = read(&mut ops, &out)?;
    let mut wanted = Vec::with_capacity(rows * heads * dim);
    let mut row = 0;
    for (span, (start, count)) in lengths.iter().enumerate() {
        for token in 0..*count {
            for head in 0..heads {
                let query = &q[row * width + head * dim..][..dim];
                let kv_head = head / (heads / kv_heads);
                let seen = &stored[span][..start + token + 1];
                let score = |kv: &Vec<[Vec<f32>; 2]>| -> f64 {
                    let pairs = query.iter().zip(&kv[kv_head][0]);
                    pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = seen.iter().map(score).collect();
                let largest = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let values = seen.iter().zip(&weights);
                    wanted.push(values.map(|(kv, w)| f64::from(kv[kv_head][1][d]) * w).sum::<f64>() / total);
                }
            }
            row += 1;
        }
    }
    let tolerance = match element {
        ElementType::F32 => 1e-5,
        ElementType::F16 => 1.5e-3,
        ElementType::Bf16 => 8e-3,
    };
    let error = relative_error(&found, &wanted);
    let detail = format!("{rows} rows of 7 sequences up to 713 tokens; error {error:.1e} of {tolerance:.0e}");
    Ok(Outcome::verdict(copied && error <= tolerance, detail))
}

pub fn attention_bf16_128<D: Driver>(context: &Context<'_, D>) -> RowResult {
    attention(context, "bfloat16", 8, 2, 128)
}

pub fn attention_f16_64<D: Driver>(context: &Context<'_, D>) -> RowResult {
    attention(context, "float16", 14, 2, 64)
}

pub fn attention_f32_96<D: Driver>(context: &Context<'_, D>) -> RowResult {
    attention(context, "float32", 4, 4, 96)
}
