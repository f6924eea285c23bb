//! Shared by the model tests: small random models written as a real model directory, and sequences run over a cache.
#![allow(dead_code)]

pub mod gguf;

use baton_model::{ForwardBatch, KvCache, LoadOptions, ModelConfig, ModelFiles, Quantization, SeqSpan, TensorParallel};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Tokens per KV block in all tests, as in production.
pub const BLOCK: usize = 16;

/// A random model.
#[derive(Clone)]
pub struct Spec {
    pub architecture: &'static str,
    pub vocab: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: Option<usize>,
    pub theta: f64,
    pub tied: bool,
    pub dtype: Dtype,
    pub shards: usize,
    /// Merged into config.json.
    pub extra: Value,
}

impl Spec {
    pub fn llama() -> Self {
        Spec {
            architecture: "LlamaForCausalLM",
            vocab: 199,
            hidden: 64,
            inner: 150,
            layers: 3,
            heads: 8,
            kv_heads: 2,
            head_dim: None,
            theta: 10_000.0,
            tied: false,
            dtype: Dtype::F32,
            shards: 1,
            extra: json!({}),
        }
    }

    pub fn qwen2() -> Self {
        Spec {
            architecture: "Qwen2ForCausalLM",
            heads: 6,
            kv_heads: 2,
            hidden: 72,
            theta: 1_000_000.0,
            tied: true,
            extra: json!({"use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 3}),
            ..Spec::llama()
        }
    }

    pub fn dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden / self.heads)
    }

    pub fn config(&self) -> Value {
        let dtype = match self.dtype {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        };
        let mut config = json!({
            "architectures": [self.architecture],
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": self.theta, "tie_word_embeddings": self.tied, "hidden_act": "silu",
            "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": dtype,
        });
        if let Some(dim) = self.head_dim {
            config["head_dim"] = json!(dim);
        }
        for (key, value) in self.extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Names and shapes of all tensors.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let (d, q, kv) = (self.hidden, self.heads * self.dim(), self.kv_heads * self.dim());
        let mut shapes = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| shapes.insert(name, shape.to_vec());
        add("model.embed_tokens.weight".into(), &[self.vocab, d]);
        add("model.norm.weight".into(), &[d]);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, d]);
        }
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}"), shape);
            add("input_layernorm.weight", &[d]);
            add("post_attention_layernorm.weight", &[d]);
            for (name, width) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{name}_proj.weight"), &[width, d]);
                if self.architecture == "Qwen2ForCausalLM" || self.extra["attention_bias"] == true {
                    add(&format!("self_attn.{name}_proj.bias"), &[width]);
                }
            }
            add("self_attn.o_proj.weight", &[d, q]);
            if self.extra["attention_bias"] == true {
                add("self_attn.o_proj.bias", &[d]);
            }
            if self.extra["mlp_bias"] == true {
                for (name, width) in [("gate", self.inner), ("up", self.inner), ("down", d)] {
                    add(&format!("mlp.{name}_proj.bias"), &[width]);
                }
            }
            add("mlp.gate_proj.weight", &[self.inner, d]);
            add("mlp.up_proj.weight", &[self.inner, d]);
            add("mlp.down_proj.weight", &[d, self.inner]);
        }
        shapes
    }

    /// Writes the model to `dir` and returns its weights as stored, widened.
    pub fn write(&self, dir: &Path, seed: u64) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut widened = HashMap::new();
        let mut stored = Vec::new();
        for (name, shape) in self.shapes() {
            let n: usize = shape.iter().product();
            let (mean, spread) = match () {
                _ if name.contains("norm") => (1.0, 0.2),
                _ if name.ends_with("bias") => (0.0, 0.5),
                _ if name.contains("embed") => (0.0, 1.0),
                _ => (0.0, (3.0 / shape[1] as f32).sqrt()),
            };
            let values: Vec<f32> = (0..n).map(|_| mean + spread * rng.random_range(-1.0f32..1.0)).collect();
            let (bytes, values): (Vec<u8>, Vec<f32>) = match self.dtype {
                Dtype::BF16 => {
                    let v: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                    (
                        bytemuck::cast_slice(&v).to_vec(),
                        v.iter().map(|v| v.to_f32()).collect(),
                    )
                }
                Dtype::F16 => {
                    let v: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
                    (
                        bytemuck::cast_slice(&v).to_vec(),
                        v.iter().map(|v| v.to_f32()).collect(),
                    )
                }
                _ => (bytemuck::cast_slice(&values).to_vec(), values),
            };
            stored.push((name.clone(), shape.clone(), bytes));
            widened.insert(name, (shape, values));
        }
        std::fs::write(dir.join("config.json"), self.config().to_string()).unwrap();
        let mut index = serde_json::Map::new();
        for shard in 0..self.shards {
            let file = match self.shards {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", shard + 1),
            };
            let held: Vec<_> = stored.iter().skip(shard).step_by(self.shards).collect();
            let views = held.iter().map(|(name, shape, bytes)| {
                index.insert(name.clone(), json!(file));
                (name.clone(), TensorView::new(self.dtype, shape.clone(), bytes).unwrap())
            });
            safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &dir.join(&file)).unwrap();
        }
        if self.shards > 1 {
            let text = json!({"metadata": {}, "weight_map": index}).to_string();
            std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
        }
        widened
    }
}

/// A model, its cache, and sequences with interleaved blocks.
pub struct Runner {
    pub model: TensorParallel,
    pub kv: KvCache,
    pub tables: Vec<Vec<u32>>,
    pub lengths: Vec<usize>,
    next_block: u32,
}

impl Runner {
    pub fn open(dir: &Path, threads: usize, blocks: u32) -> Self {
        Self::quantized(dir, threads, blocks, Quantization::None)
    }

    pub fn quantized(dir: &Path, threads: usize, blocks: u32, quantization: Quantization) -> Self {
        Self::with_options(
            dir,
            blocks,
            &LoadOptions {
                quantization,
                ..LoadOptions::threads(threads)
            },
        )
    }

    pub fn with_options(dir: &Path, blocks: u32, options: &LoadOptions) -> Self {
        let config = ModelConfig::from_dir(dir).unwrap();
        let files = ModelFiles::open(dir).unwrap();
        let kv = KvCache::allocate(config.kv_geometry(BLOCK), blocks).unwrap();
        let model = TensorParallel::load(&files, config, options, &()).unwrap();
        Runner {
            model,
            kv,
            tables: vec![],
            lengths: vec![],
            next_block: 0,
        }
    }

    /// Starts a sequence.
    pub fn start(&mut self) -> usize {
        self.tables.push(vec![]);
        self.lengths.push(0);
        self.tables.len() - 1
    }

    /// Appends tokens to sequences in one batch; returns the logits after each one's last token.
    pub fn step(&mut self, parts: &[(usize, &[u32])]) -> Vec<Vec<f32>> {
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
            let blocks = self.tables[*seq].clone();
            batch.seqs.push(SeqSpan {
                start_pos,
                len: tokens.len(),
                blocks,
                logits: true,
            });
        }
        let logits = self.model.forward(&batch, &self.kv, &mut |_| {}).unwrap();
        (0..logits.rows()).map(|row| logits.row(row).to_vec()).collect()
    }
}

/// Deterministic prompt.
pub fn prompt(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..vocab as u32)).collect()
}

/// Index of the largest value.
pub fn argmax(values: &[f32]) -> u32 {
    let best = |best: usize, i: usize| if values[i] > values[best] { i } else { best };
    (0..values.len()).reduce(best).unwrap() as u32
}

/// Bits of floats, to compare exactly.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
