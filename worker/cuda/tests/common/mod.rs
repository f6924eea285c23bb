//! A small random model in a folder, and one runner for any device.
#![allow(dead_code)] // each test uses its part

pub mod emulated;

use baton_cuda::{CudaOps, KvMemory, OpsOptions};
use baton_model::{Decoder, ForwardBatch, KvCache, LoadOptions, ModelConfig, ModelFiles, Ops, Quantization, SeqSpan};
use emulated::{EmulatedDriver, Shared};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::path::Path;

pub const BLOCK: usize = 16;

/// What the models of the tests have in common, and what not.
#[derive(Clone, Copy)]
pub struct Shape {
    pub dtype: Dtype,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub bias: bool,
}

impl Shape {
    /// Grouped heads, widths that are no whole tiles, biases.
    pub fn small(dtype: Dtype) -> Self {
        Shape {
            dtype,
            hidden: 120,
            inner: 200,
            layers: 2,
            heads: 6,
            kv_heads: 2,
            head_dim: 32,
            vocab: 211,
            bias: true,
        }
    }

    pub fn write(&self, dir: &Path, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (d, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab, d]),
            ("model.norm.weight".into(), vec![d]),
            ("lm_head.weight".into(), vec![self.vocab, d]),
        ];
        for layer in 0..self.layers {
            let mut add =
                |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
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
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
            .into_iter()
            .map(|(name, shape)| {
                let (mean, spread) = match () {
                    _ if name.contains("norm") => (1.0, 0.2),
                    _ if name.ends_with("bias") => (0.0, 0.5),
                    _ if name.contains("embed") => (0.0, 1.0),
                    _ => (0.0, (3.0 / shape[1] as f32).sqrt()),
                };
                let count: usize = shape.iter().product();
                let values = (0..count).map(|_| mean + spread * rng.random_range(-1.0f32..1.0));
                let bytes = match self.dtype {
                    Dtype::BF16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
                    Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                    _ => values.flat_map(f32::to_le_bytes).collect(),
                };
                (name, shape, bytes)
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| (name.clone(), TensorView::new(self.dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &dir.join("model.safetensors")).unwrap();
        let dtype = match self.dtype {
            Dtype::BF16 => "bfloat16",
            Dtype::F16 => "float16",
            _ => "float32",
        };
        let config = json!({
            "architectures": [if self.bias { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" }],
            "model_type": if self.bias { "qwen2" } else { "llama" },
            "hidden_act": "silu", "vocab_size": self.vocab, "hidden_size": d, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "torch_dtype": dtype,
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    }
}

/// A decoder on some device, its cache, and sequences with interleaved blocks.
pub struct Runner<O: Ops> {
    pub decoder: Decoder<O>,
    pub kv: KvCache,
    tables: Vec<Vec<u32>>,
    lengths: Vec<usize>,
    next_block: u32,
}

pub fn options(quantization: Quantization) -> OpsOptions {
    OpsOptions {
        quantization,
        rows_max: 512,
        threads: 1,
        graphs: true,
    }
}

pub fn cpu(dir: &Path, quantization: Quantization, blocks: u32) -> Runner<baton_model::CpuOps> {
    let config = ModelConfig::from_dir(dir).unwrap();
    let files = ModelFiles::open(dir).unwrap();
    let kv = KvCache::allocate(config.kv_geometry(BLOCK), blocks).unwrap();
    let load = LoadOptions {
        quantization,
        ..LoadOptions::threads(1)
    };
    Runner::new(Decoder::load(&files, config, &load, &()).unwrap(), kv)
}

pub fn cuda(
    dir: &Path,
    options: OpsOptions,
    blocks: u32,
    memory: KvMemory,
    (driver, record): (EmulatedDriver, Shared),
) -> (Runner<CudaOps<EmulatedDriver>>, Shared) {
    let config = ModelConfig::from_dir(dir).unwrap();
    let files = ModelFiles::open(dir).unwrap();
    let kv = KvCache::allocate(config.kv_geometry(BLOCK), blocks).unwrap();
    let ops = CudaOps::new(driver, &config, options).unwrap();
    let mut decoder = Decoder::with_ops(ops, &files, config, &()).unwrap();
    let ops = decoder.ops_mut();
    ops.allocate_arena(kv.geometry(), blocks, memory, kv.region()).unwrap();
    (Runner::new(decoder, kv), record)
}

impl<O: Ops> Runner<O> {
    fn new(decoder: Decoder<O>, kv: KvCache) -> Self {
        Runner {
            decoder,
            kv,
            tables: vec![],
            lengths: vec![],
            next_block: 0,
        }
    }

    pub fn start(&mut self) -> usize {
        self.tables.push(vec![]);
        self.lengths.push(0);
        self.tables.len() - 1
    }

    fn batch(&mut self, parts: &[(usize, &[u32])], logits: bool) -> ForwardBatch {
        let mut batch = ForwardBatch::default();
        for (seq, tokens) in parts {
            let start_pos = self.lengths[*seq];
            self.lengths[*seq] += tokens.len();
            while self.tables[*seq].len() * BLOCK < self.lengths[*seq] {
                // Backwards and interleaved, so that nothing works only because blocks happen to be adjacent.
                self.next_block += 1;
                self.tables[*seq].push(self.kv.blocks() - self.next_block);
            }
            batch.tokens.extend_from_slice(tokens);
            batch.seqs.push(SeqSpan {
                start_pos,
                len: tokens.len(),
                blocks: self.tables[*seq].clone(),
                logits,
            });
        }
        batch
    }

    /// Appends tokens to sequences in one batch; returns the logits after each one's last token.
    pub fn step(&mut self, parts: &[(usize, &[u32])]) -> Vec<Vec<f32>> {
        self.try_step(parts, true).unwrap()
    }

    pub fn try_step(
        &mut self,
        parts: &[(usize, &[u32])],
        wanted: bool,
    ) -> Result<Vec<Vec<f32>>, baton_model::ModelError> {
        let batch = self.batch(parts, wanted);
        let logits = self.decoder.forward(&batch, &self.kv, &mut |_| {})?;
        Ok((0..logits.rows()).map(|row| logits.row(row).to_vec()).collect())
    }
}

/// Deterministic prompt.
pub fn prompt(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..vocab as u32)).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Root of the mean square of the difference, in units of that of the values.
pub fn error(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let difference = square(&mut found.iter().zip(wanted).map(|(a, b)| a - b));
    (difference / square(&mut wanted.iter().copied()).max(1e-20)).sqrt()
}
