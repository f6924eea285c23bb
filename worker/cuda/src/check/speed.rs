//! Rows that measure: memory bandwidth and matrix products of this device, and decode and prefill of models of known shapes
//! with random weights, as fractions of those.
//!
//! The fractions are of what baton's own copy and matrix kernels reach, so they tell how much is lost around them; the
//! absolute figures are beside them, to be held against a datasheet. Weights are random, as zeros draw less power and run
//! faster. Times are medians of wall-clock, the device waited for.

use super::{CheckError, Context, Outcome, RowResult, bare_ops, options};
use crate::args::ElementType;
use crate::driver::Driver;
use crate::matrix::{self, Format};
use crate::ops::{CudaOps, KvMemory};
use baton_model::{Decoder, ForwardBatch, KvCache, ModelConfig, ModelFiles, Ops, SeqSpan};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

/// Measured runs, after two that warm up.
const REPEATS: usize = 7;

/// The median time of a call, in seconds.
fn median(mut call: impl FnMut() -> Result<(), CheckError>) -> Result<f64, CheckError> {
    let mut times = Vec::with_capacity(REPEATS);
    for run in 0..REPEATS + 2 {
        let start = Instant::now();
        call()?;
        if run >= 2 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

/// Bytes read and written per second by a copy of a quarter gigabyte, far more than any cache.
fn copy_rate<D: Driver>(context: &Context<'_, D>) -> Result<f64, CheckError> {
    let (rows, width, times) = (4096, 16384, 8);
    let mut ops = bare_ops(context, "bfloat16", 4, 2, 128, rows)?;
    let mut x = ops.rows(width)?;
    let mut out = ops.rows(width)?;
    ops.set_rows(&mut x, &vec![0x3f; 1 << 20], rows, ElementType::F32)?;
    let order: Vec<usize> = (0..rows).collect();
    let seconds = median(|| {
        for _ in 0..times {
            ops.gather(&x, &order, &mut out)?;
        }
        ops.finish()?;
        Ok(())
    })?;
    Ok((2 * times * rows * width * 4) as f64 / seconds)
}

pub fn bandwidth<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let rate = copy_rate(context)?;
    Ok(Outcome::figure(format!(
        "{:.0} GB/s, read and written by the copy kernel",
        rate / 1e9
    )))
}

/// Operations per second of `rows` by 8192 by 8192 in bf16.
fn matmul_rate<D: Driver>(context: &Context<'_, D>, rows: usize) -> Result<f64, CheckError> {
    let (k, columns, times) = (8192, 8192, 4);
    let mut ops = bare_ops(context, "bfloat16", 4, 2, 128, rows)?;
    let pool = ops
        .pool()
        .unwrap_or_else(|| std::sync::Arc::new(baton_kernels::Pool::new(1)));
    let values: Vec<f32> = (0..k + columns)
        .map(|i| (i * 7919 % 255) as f32 / 128.0 - 1.0)
        .collect();
    let row = |n: usize| matrix::encode_values(&values[n..n + k], Format::Dense, ElementType::Bf16);
    let w = matrix::upload_rows(
        ops.driver(),
        &pool,
        columns,
        k,
        None,
        Format::Dense,
        ElementType::Bf16,
        &row,
    )?;
    let mut x = ops.rows(k)?;
    let mut out = ops.rows(columns)?;
    let line = matrix::floats(&values[..k], ElementType::Bf16);
    ops.set_rows(&mut x, &line.repeat(rows), rows, ElementType::Bf16)?;
    let seconds = median(|| {
        for _ in 0..times {
            ops.linear(&x, &w, &mut out)?;
        }
        ops.finish()?;
        Ok(())
    })?;
    Ok((2 * times * rows * k * columns) as f64 / seconds)
}

pub fn matmul<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut text = String::new();
    for rows in [16, 64, 512, 4096] {
        let rate = matmul_rate(context, rows)?;
        let _ = write!(text, "{rows} rows {:.0}; ", rate / 1e12);
    }
    Ok(Outcome::figure(format!("{text}TFLOP/s, by 8192 x 8192")))
}

/// A published model's shape.
struct Shape {
    architecture: &'static str,
    vocab: usize,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    bias: bool,
    tied: bool,
}

const LLAMA_8B: Shape = Shape {
    architecture: "LlamaForCausalLM",
    vocab: 128_256,
    hidden: 4096,
    inner: 14_336,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    layers: 32,
    bias: false,
    tied: false,
};

const QWEN_HALF_B: Shape = Shape {
    architecture: "Qwen2ForCausalLM",
    vocab: 151_936,
    hidden: 896,
    inner: 4864,
    heads: 14,
    kv_heads: 2,
    head_dim: 64,
    layers: 24,
    bias: true,
    tied: true,
};

impl Shape {
    fn tensors(&self, layers: usize) -> Vec<(String, Vec<usize>)> {
        let (d, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, d])];
        all.push(("model.norm.weight".into(), vec![d]));
        if !self.tied {
            all.push(("lm_head.weight".into(), vec![self.vocab, d]));
        }
        for layer in 0..layers {
            let mut add =
                |name: &str, shape: &[usize]| all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            add("input_layernorm.weight", &[d]);
            add("post_attention_layernorm.weight", &[d]);
            for (name, width) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{name}_proj.weight"), &[width, d]);
                if self.bias {
                    add(&format!("self_attn.{name}_proj.bias"), &[width]);
                }
            }
            add("self_attn.o_proj.weight", &[d, q]);
            add("mlp.gate_proj.weight", &[self.inner, d]);
            add("mlp.up_proj.weight", &[self.inner, d]);
            add("mlp.down_proj.weight", &[d, self.inner]);
        }
        all
    }

    /// Writes a model of this shape: random bf16 between 2^-7 and 2^-5 in size.
    fn write(&self, dir: &Path, layers: usize, seed: u64) -> std::io::Result<()> {
        let tensors = self.tensors(layers);
        let mut header = String::from("{");
        let mut at = 0usize;
        for (index, (name, shape)) in tensors.iter().enumerate() {
            let bytes = 2 * shape.iter().product::<usize>();
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(
                header,
                "{comma}\"{name}\":{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{at},{}]}}",
                at + bytes
            );
            at += bytes;
        }
        header.push('}');
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let mut file = BufWriter::with_capacity(1 << 20, File::create(dir.join("model.safetensors"))?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let mut state = seed | 1;
        let mut chunk = Vec::with_capacity(1 << 20);
        let mut left = at;
        while left > 0 {
            chunk.clear();
            while chunk.len() < left.min(1 << 20) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                for shift in [0, 16, 32, 48] {
                    let bits = (state >> shift) as u16;
                    // Sign and mantissa as they come, and one of two exponents.
                    let value = bits & 0x80ff | 0x3c00;
                    chunk.extend(value.to_le_bytes());
                }
            }
            chunk.truncate(left.min(1 << 20));
            file.write_all(&chunk)?;
            left -= chunk.len();
        }
        file.flush()?;
        let Shape {
            architecture,
            vocab,
            hidden,
            inner,
            heads,
            kv_heads,
            head_dim,
            tied,
            ..
        } = self;
        let kind = if self.bias { "qwen2" } else { "llama" };
        let config = format!(
            r#"{{"architectures":["{architecture}"],"model_type":"{kind}","hidden_act":"silu","vocab_size":{vocab},
            "hidden_size":{hidden},"intermediate_size":{inner},"num_hidden_layers":{layers},
            "num_attention_heads":{heads},"num_key_value_heads":{kv_heads},"head_dim":{head_dim},
            "max_position_embeddings":32768,"rms_norm_eps":1e-5,"rope_theta":500000.0,"tie_word_embeddings":{tied},
            "torch_dtype":"bfloat16"}}"#
        );
        std::fs::write(dir.join("config.json"), config)
    }

    /// Elements of the matrices that every token is multiplied by, the head aside.
    fn matrix_elements(&self, layers: usize) -> usize {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        layers * self.hidden * (2 * q + 2 * kv + 3 * self.inner)
    }
}

/// Removed when dropped.
struct Folder<'a>(&'a Path);

impl Drop for Folder<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0);
    }
}

fn model<D: Driver>(context: &Context<'_, D>, shape: &Shape, name: &str) -> RowResult {
    const BLOCK: usize = 16;
    const ROWS_MAX: usize = 4096;
    let layers = context.layers.clamp(1, shape.layers);
    let folder = context.scratch.join(format!("baton-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let _removed = Folder(&folder);
    shape.write(&folder, layers, context.seed)?;
    let (copied, multiplied) = (copy_rate(context)?, matmul_rate(context, 4096)?);
    let config = ModelConfig::from_dir(&folder)?;
    let files = ModelFiles::open(&folder)?;
    // 256 sequences of 1024 positions, or one of 4096 and more.
    let blocks = 256 * 1024 / BLOCK as u32;
    let kv = KvCache::allocate(config.kv_geometry(BLOCK), blocks)?;
    let start = Instant::now();
    let ops = CudaOps::new((context.open)()?, &config, options(ROWS_MAX))?;
    let mut decoder = Decoder::with_ops(ops, &files, config, &())?;
    let loading = start.elapsed().as_secs_f64();
    decoder
        .ops_mut()
        .allocate_arena(kv.geometry(), blocks, KvMemory::Device, kv.region())?;
    let mut text = format!("{layers} of {} layers, loaded in {loading:.1} s", shape.layers);
    let head = shape.vocab * shape.hidden;
    for batch in [1usize, 8, 64, 256] {
        let depth = 512;
        let seconds = median(|| forward(&mut decoder, &kv, batch, depth, 1, BLOCK))?;
        let kv_bytes = batch * depth * kv.geometry().block_bytes() / BLOCK;
        let bytes = 2 * (shape.matrix_elements(layers) + head) + kv_bytes;
        let share = bytes as f64 / seconds / copied;
        let _ = write!(
            text,
            "; decode {batch}: {:.2} ms, {:.0} % of bandwidth",
            seconds * 1e3,
            share * 100.0
        );
    }
    for tokens in [512usize, 4096] {
        let seconds = median(|| forward(&mut decoder, &kv, 1, 0, tokens, BLOCK))?;
        let attention = 2 * layers * shape.heads * shape.head_dim * tokens * tokens;
        let operations = 2 * tokens * shape.matrix_elements(layers) + attention + 2 * head;
        let rate = operations as f64 / seconds;
        let _ = write!(
            text,
            "; prefill {tokens}: {:.1} ms, {:.0} TFLOP/s, {:.0} % of the matmul",
            seconds * 1e3,
            rate / 1e12,
            rate / multiplied * 100.0
        );
    }
    Ok(Outcome::figure(text))
}

/// One step: `batch` sequences at position `start`, `tokens` each.
fn forward<D: Driver>(
    decoder: &mut Decoder<CudaOps<D>>,
    kv: &KvCache,
    batch: usize,
    start: usize,
    tokens: usize,
    block: usize,
) -> Result<(), CheckError> {
    let per_seq = (start + tokens).div_ceil(block);
    let seqs = (0..batch).map(|seq| SeqSpan {
        start_pos: start,
        len: tokens,
        blocks: (0..per_seq)
            .map(|b| u32::try_from(seq * per_seq + b).unwrap_or(0))
            .collect(),
        logits: true,
    });
    let forward = ForwardBatch {
        tokens: (0..batch * tokens)
            .map(|t| u32::try_from(t % 1000).unwrap_or(0))
            .collect(),
        seqs: seqs.collect(),
    };
    decoder.forward(&forward, kv, &mut |_| {})?;
    Ok(())
}

pub fn llama_8b<D: Driver>(context: &Context<'_, D>) -> RowResult {
    model(context, &LLAMA_8B, "llama-8b")
}

pub fn qwen_half_b<D: Driver>(context: &Context<'_, D>) -> RowResult {
    model(context, &QWEN_HALF_B, "qwen-0.5b")
}
