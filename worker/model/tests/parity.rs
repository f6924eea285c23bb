//! Parity with candle-transformers in f32: logits within a tolerance of the largest logit, and the same greedy tokens where
//! the best two are further apart than that, for small random models of each family and for the demo model. Both sides
//! are fed the oracle's tokens.
//!
//! candle's Llama and Qwen2 know neither an explicit `head_dim` nor linear or YaRN scaling: models with their own head
//! size are compared with its Mistral, which computes the same function when no window is set; linear and YaRN
//! frequencies are tested against their formulas in `src/rope.rs`.

mod common;

use baton_model::KvDtype;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2};
use common::{Runner, Spec, argmax, prompt};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Largest difference of a logit, relative to the largest logit of its row. In f32 both sides round sums of a few hundred
/// terms in different orders over a few layers; with 16-bit K and V (and, in bf16, activations) each value carries an
/// error of 2^-11 or 2^-8 of its own.
fn tolerance(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 2e-4,
        KvDtype::F16 => 4e-3,
        KvDtype::Bf16 => 4e-2,
    }
}
/// Greedy steps compared.
const STEPS: usize = 40;

type Values = HashMap<String, (Vec<usize>, Vec<f32>)>;

enum Oracle {
    Llama(llama::Llama, llama::Config, llama::Cache),
    Qwen2(qwen2::ModelForCausalLM),
    Mistral(mistral::Model),
}

impl Oracle {
    fn new(config: &Value, weights: &Values) -> Self {
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for (name, (shape, values)) in weights {
            tensors.insert(
                name.clone(),
                Tensor::from_vec(values.clone(), shape.clone(), &Device::Cpu).unwrap(),
            );
        }
        let mut config = config.clone();
        let own_head_dim = config["head_dim"].is_u64();
        if own_head_dim && config["tie_word_embeddings"] == true {
            tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
        }
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        if own_head_dim {
            config["sliding_window"] = Value::Null;
            config["use_flash_attn"] = json!(false);
            let config: mistral::Config = serde_json::from_value(config).unwrap();
            return Oracle::Mistral(mistral::Model::new(&config, vb).unwrap());
        }
        if config["architectures"][0] == "Qwen2ForCausalLM" {
            let config: qwen2::Config = serde_json::from_value(config).unwrap();
            return Oracle::Qwen2(qwen2::ModelForCausalLM::new(&config, vb).unwrap());
        }
        let config = serde_json::from_value::<llama::LlamaConfig>(config)
            .unwrap()
            .into_config(false);
        let cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        Oracle::Llama(llama::Llama::load(vb, &config).unwrap(), config, cache)
    }

    fn reset(&mut self) {
        match self {
            Oracle::Llama(_, config, cache) => {
                *cache = llama::Cache::new(true, DType::F32, config, &Device::Cpu).unwrap();
            }
            Oracle::Qwen2(model) => model.clear_kv_cache(),
            Oracle::Mistral(model) => model.clear_kv_cache(),
        }
    }

    fn logits(&mut self, tokens: &[u32], position: usize) -> Vec<f32> {
        let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let out = match self {
            Oracle::Llama(model, _, cache) => model.forward(&ids, position, cache).unwrap(),
            Oracle::Qwen2(model) => model.forward(&ids, position).unwrap(),
            Oracle::Mistral(model) => model.forward(&ids, position).unwrap(),
        };
        out.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Logits after the prompt and after each greedy token.
    fn greedy(&mut self, prompt: &[u32], steps: usize) -> Vec<Vec<f32>> {
        self.reset();
        let mut rows = vec![self.logits(prompt, 0)];
        for step in 0..steps {
            let token = argmax(&rows[step]);
            rows.push(self.logits(&[token], prompt.len() + step));
        }
        rows
    }
}

fn assert_rows_match(dtype: KvDtype, got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max) / scale;
    let tolerance = tolerance(dtype);
    assert!(worst <= tolerance, "{what}: logits differ by {worst:e} of the largest");
    // The token the oracle would pick is at most as far behind as both errors together.
    let behind = got[argmax(got) as usize] - got[argmax(want) as usize];
    assert!(behind <= 2.0 * tolerance * scale, "{what}: greedy token");
    if dtype == KvDtype::F32 {
        assert_eq!(argmax(got), argmax(want), "{what}: greedy token");
    }
}

/// All prompts at once: prefilled in one ragged batch, then decoded together.
fn compare(dir: &Path, oracle: &mut Oracle, prompts: &[Vec<u32>], steps: usize) {
    let mut runner = Runner::open(dir, 2, 64);
    let dtype = runner.kv.geometry().dtype;
    let seqs: Vec<usize> = prompts.iter().map(|_| runner.start()).collect();
    let parts: Vec<(usize, &[u32])> = seqs.iter().copied().zip(prompts.iter().map(|p| &p[..])).collect();
    let mut rows = runner.step(&parts);
    let want: Vec<Vec<Vec<f32>>> = prompts.iter().map(|p| oracle.greedy(p, steps)).collect();
    for step in 0..=steps {
        for (seq, (row, want)) in rows.iter().zip(&want).enumerate() {
            assert_rows_match(dtype, row, &want[step], &format!("prompt {seq}, step {step}"));
        }
        let tokens: Vec<[u32; 1]> = want.iter().map(|want| [argmax(&want[step])]).collect();
        let parts: Vec<(usize, &[u32])> = seqs.iter().copied().zip(tokens.iter().map(|t| &t[..])).collect();
        rows = runner.step(&parts);
    }
}

fn check(spec: &Spec, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let weights = spec.write(dir.path(), seed);
    let mut oracle = Oracle::new(&spec.config(), &weights);
    // One token, less than a block, exactly two blocks, several blocks and a bit.
    let prompts: Vec<Vec<u32>> = [1, 7, 32, 75]
        .iter()
        .enumerate()
        .map(|(i, n)| prompt(*n, spec.vocab, seed + i as u64))
        .collect();
    compare(dir.path(), &mut oracle, &prompts, STEPS);
}

#[test]
fn llama_untied_with_grouped_heads() {
    check(&Spec::llama(), 1);
}

#[test]
fn llama_tied_with_one_kv_head_per_head() {
    check(
        &Spec {
            tied: true,
            heads: 4,
            kv_heads: 4,
            ..Spec::llama()
        },
        2,
    );
}

#[test]
fn llama_with_llama3_rope_scaling() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    check(
        &Spec {
            extra: json!({"rope_scaling": scaling}),
            ..Spec::llama()
        },
        3,
    );
}

#[test]
fn llama_with_its_own_head_size() {
    check(
        &Spec {
            head_dim: Some(20),
            heads: 4,
            kv_heads: 2,
            tied: true,
            ..Spec::llama()
        },
        4,
    );
}

#[test]
fn llama_stored_in_bf16_in_three_shards() {
    check(
        &Spec {
            dtype: Dtype::BF16,
            shards: 3,
            ..Spec::llama()
        },
        5,
    );
}

#[test]
fn qwen2_tied_with_biases() {
    check(&Spec::qwen2(), 6);
}

#[test]
fn qwen2_untied_stored_in_f16() {
    check(
        &Spec {
            tied: false,
            dtype: Dtype::F16,
            ..Spec::qwen2()
        },
        7,
    );
}

#[test]
fn qwen2_stored_in_bf16() {
    check(
        &Spec {
            dtype: Dtype::BF16,
            heads: 9,
            kv_heads: 3,
            ..Spec::qwen2()
        },
        8,
    );
}

#[test]
fn prefill_chunks_mixed_with_decodes_match() {
    let spec = Spec::qwen2();
    let dir = tempfile::tempdir().unwrap();
    let weights = spec.write(dir.path(), 9);
    let mut oracle = Oracle::new(&spec.config(), &weights);
    let (short, long) = (prompt(5, spec.vocab, 1), prompt(83, spec.vocab, 2));
    let (want_short, want_long) = (oracle.greedy(&short, 12), oracle.greedy(&long, 8));
    let mut runner = Runner::open(dir.path(), 2, 64);
    let (a, b) = (runner.start(), runner.start());
    let mut last_short = runner.step(&[(a, &short)]).remove(0);
    let mut last_long = Vec::new();
    // While the long prompt arrives in uneven chunks, the short sequence decodes in the same batches.
    let mut at = 0;
    for (step, size) in [16, 3, 30, 1, 33].into_iter().enumerate() {
        assert_rows_match(
            KvDtype::F32,
            &last_short,
            &want_short[step],
            "decoding beside a prefill",
        );
        let rows = runner.step(&[(b, &long[at..at + size]), (a, &[argmax(&last_short)])]);
        at += size;
        [last_long, last_short] = <[Vec<f32>; 2]>::try_from(rows).unwrap();
    }
    assert_eq!(at, long.len());
    for want in &want_long[..8] {
        assert_rows_match(KvDtype::F32, &last_long, want, "after a chunked prefill");
        last_long = runner.step(&[(b, &[argmax(&last_long)])]).remove(0);
    }
}

#[test]
fn the_demo_model_matches() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model");
    if !dir.join("model.safetensors").is_file() {
        eprintln!("skipped: no demo model at {}", dir.display());
        return;
    }
    let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let widen = |view: safetensors::tensor::TensorView<'_>| -> Vec<f32> {
        let pairs = || view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match view.dtype() {
            Dtype::BF16 => pairs().map(|b| half::bf16::from_bits(b).to_f32()).collect(),
            Dtype::F16 => pairs().map(|b| half::f16::from_bits(b).to_f32()).collect(),
            Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            other => panic!("demo model stored as {other:?}"),
        }
    };
    let weights: Values = parsed
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), widen(view))))
        .collect();
    let mut oracle = Oracle::new(&config, &weights);
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    let mut prompts: Vec<Vec<u32>> = (0..3).map(|i| prompt([3, 21, 130][i], vocab, i as u64)).collect();
    // A real conversation, so that a trained model is compared where its logits are peaked.
    if let Ok(tokenizer) = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")) {
        let chat = "<|im_start|>user\nMy code is 7341. What is my code?<|im_end|>\n<|im_start|>assistant\n";
        prompts.push(tokenizer.encode(chat, false).unwrap().get_ids().to_vec());
    }
    compare(&dir, &mut oracle, &prompts, STEPS);
}
