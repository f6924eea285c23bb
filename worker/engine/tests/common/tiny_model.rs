//! A small Llama with random weights, written as a real model directory, for tests of the engine over a real decoder.

use std::collections::BTreeMap;

use baton_engine::{Engine, ModelEngine, SchedulerConfig};
use baton_model::{LoadOptions, ModelConfig, ModelFiles};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

const VOCAB: usize = 64;
const HIDDEN: usize = 32;
const INNER: usize = 48;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// The directory lives as long as this.
pub struct TinyModel {
    _dir: tempfile::TempDir,
    files: ModelFiles,
    config: ModelConfig,
}

impl TinyModel {
    pub fn new(seed: u64) -> Self {
        Self::of(seed, Dtype::F32)
    }

    /// Stored as `dtype`: f32, f16 or bf16.
    pub fn of(seed: u64, dtype: Dtype) -> Self {
        let name = match dtype {
            Dtype::BF16 => "bfloat16",
            Dtype::F16 => "float16",
            _ => "float32",
        };
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": true, "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": name,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
        let mut rng = SmallRng::seed_from_u64(seed);
        let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes()
            .into_iter()
            .map(|(name, shape)| {
                let (mean, spread) = match shape[..] {
                    [_] => (1.0, 0.2),
                    [.., width] => (0.0, (3.0 / width as f32).sqrt()),
                    [] => (0.0, 0.0),
                };
                let count = shape.iter().product();
                let values = (0..count).map(|_| mean + spread * rng.random_range(-1.0f32..1.0));
                let bytes = match dtype {
                    Dtype::BF16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
                    Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                    _ => values.flat_map(f32::to_le_bytes).collect(),
                };
                (name, (shape, bytes))
            })
            .collect();
        let views = tensors.iter().map(|(name, (shape, bytes))| {
            (
                name.as_str(),
                TensorView::new(dtype, shape.clone(), bytes).expect("consistent"),
            )
        });
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &dir.path().join("model.safetensors"))
            .expect("written");
        TinyModel {
            files: ModelFiles::open(dir.path()).expect("readable"),
            config: ModelConfig::from_dir(dir.path()).expect("supported"),
            _dir: dir,
        }
    }

    /// An engine as large as the scheduler believes.
    pub fn engine(&self, config: &SchedulerConfig, threads: usize) -> Box<dyn Engine> {
        self.engine_with(config, &LoadOptions::threads(threads))
    }

    pub fn engine_with(&self, config: &SchedulerConfig, options: &LoadOptions) -> Box<dyn Engine> {
        let engine = ModelEngine::load(
            &self.files,
            self.config.clone(),
            config.block_size,
            config.total_blocks,
            options,
            &(),
        );
        Box::new(engine.expect("loads"))
    }
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let kv = HIDDEN / HEADS * KV_HEADS;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm.weight", vec![HIDDEN]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("self_attn.q_proj.weight", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.v_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.o_proj.weight", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.up_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.down_proj.weight", vec![HIDDEN, INNER]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    shapes
}
