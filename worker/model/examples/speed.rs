//! Measures the decoder on random weights of the Qwen2.5-0.5B shape: prefill and decode tokens per second.
//!
//! `cargo run --release -p baton-model --example speed [threads] [layers] [f32|bf16|f16] [none|int8|int4] [ranks]`;
//! `ranks` is a tensor-parallel degree, or several to be compared, such as `1,2`

use baton_kernels::StoredType;
use baton_model::{
    ForwardBatch, KvCache, LoadOptions, ModelConfig, ModelError, ModelFiles, Quantization, SeqSpan, TensorParallel,
};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use std::time::Instant;

/// Turns per measurement.
const ROUNDS: usize = 11;
const VOCAB: usize = 151_936;
const HIDDEN: usize = 896;
const INNER: usize = 4864;
const HEADS: usize = 14;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let threads: usize = args.next().map_or(Ok(2), |a| a.parse())?;
    let layers: usize = args.next().map_or(Ok(24), |a| a.parse())?;
    let kind = match args.next().as_deref() {
        Some("f32") => StoredType::F32,
        Some("f16") => StoredType::F16,
        _ => StoredType::Bf16,
    };
    let quantization = args.next().map_or(Ok(Quantization::None), |a| a.parse())?;
    let ranks: Vec<usize> = args
        .next()
        .unwrap_or_else(|| "1".into())
        .split(',')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let dir = tempfile::tempdir()?;
    write(dir.path(), layers, kind)?;
    let files = ModelFiles::open(dir.path())?;
    let config = ModelConfig::from_dir(dir.path())?;
    let kv = KvCache::allocate(config.kv_geometry(16), 1024)?;
    let weight_bytes = files.packed_bytes(&config, quantization);
    let mut models = Vec::new();
    for &tensor_parallel in &ranks {
        let options = LoadOptions {
            quantization,
            tensor_parallel,
            ..LoadOptions::threads(threads)
        };
        models.push(TensorParallel::load(&files, config.clone(), &options, &())?);
    }
    println!(
        "{threads} threads, {}, {layers} layers in {kind}, {} MiB of weights; medians of {ROUNDS} turns",
        models[0].ops().kernels().isa(),
        weight_bytes >> 20
    );
    for (prompt, chunk) in [(512, 512), (2048, 512)] {
        let blocks: Vec<u32> = (0..(prompt as u32 + 64) / 16).collect();
        let turn = |model: &mut TensorParallel| {
            for at in (0..prompt).step_by(chunk) {
                let tokens = (at..at + chunk).map(|t| (t * 37 % VOCAB) as u32).collect();
                let logits = at + chunk == prompt;
                let seqs = vec![SeqSpan {
                    start_pos: at,
                    len: chunk,
                    blocks: blocks.clone(),
                    logits,
                }];
                model.forward(&ForwardBatch { tokens, seqs }, &kv, &mut |_| {})?;
            }
            Ok(())
        };
        for (ranks, seconds) in ranks.iter().zip(medians(&mut models, turn)?) {
            println!(
                "{ranks} ranks: prefill {prompt:5} in chunks of {chunk}: {:8.1} tokens/s",
                prompt as f64 / seconds
            );
        }
    }
    for (batch, depth) in [(1, 64), (1, 4096), (16, 64), (32, 64)] {
        let steps = 8;
        let span = |i: u32, at: usize| SeqSpan {
            start_pos: at,
            len: 1,
            blocks: (i * 8..i * 8 + (at as u32 / 16) + 1).collect(),
            logits: true,
        };
        let turn = |model: &mut TensorParallel| {
            for step in 0..steps {
                let seqs = (0..batch).map(|i| span(i, depth + step)).collect();
                let tokens = (0..batch).collect();
                model.forward(&ForwardBatch { tokens, seqs }, &kv, &mut |_| {})?;
            }
            Ok(())
        };
        for (ranks, seconds) in ranks.iter().zip(medians(&mut models, turn)?) {
            let per_step = seconds / steps as f64;
            println!(
                "{ranks} ranks: decode batch {batch:3} at depth {depth:5}: {:8.1} tokens/s, {:5.1} GB/s of weights",
                f64::from(batch) / per_step,
                weight_bytes as f64 / per_step / 1e9
            );
        }
    }
    Ok(())
}

/// Median seconds of a turn of each model. They take turns, so that what else the machine does slows them down alike.
fn medians(
    models: &mut [TensorParallel],
    turn: impl Fn(&mut TensorParallel) -> Result<(), ModelError>,
) -> Result<Vec<f64>, ModelError> {
    let mut seconds = vec![Vec::new(); models.len()];
    for _ in 0..ROUNDS {
        for (model, seconds) in models.iter_mut().zip(&mut seconds) {
            let start = Instant::now();
            turn(model)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Ok(seconds.into_iter().map(median).collect())
}

/// Random small weights: their values do not matter to speed, only that they are normal numbers.
fn write(dir: &std::path::Path, layers: usize, kind: StoredType) -> Result<(), Box<dyn std::error::Error>> {
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768, "torch_dtype": if kind == StoredType::F32 { "float32" } else { "bfloat16" }, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
        "use_sliding_window": false, "hidden_act": "silu",
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN])];
    shapes.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm.weight", vec![HIDDEN]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("self_attn.q_proj.weight", vec![q, HIDDEN]),
            ("self_attn.k_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.v_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.q_proj.bias", vec![q]),
            ("self_attn.k_proj.bias", vec![kv]),
            ("self_attn.v_proj.bias", vec![kv]),
            ("self_attn.o_proj.weight", vec![HIDDEN, q]),
            ("mlp.gate_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.up_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.down_proj.weight", vec![HIDDEN, INNER]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let mut rng = SmallRng::seed_from_u64(1);
    let (dtype, exponent) = match kind {
        StoredType::F32 => (Dtype::F32, 0x3c80_0000u32),
        StoredType::Bf16 => (Dtype::BF16, 0x3c80),
        _ => (Dtype::F16, 0x2400),
    };
    let stored: Vec<_> = shapes
        .into_iter()
        .map(|(name, shape)| {
            // A sign and some mantissa bits around 1/64.
            let n: usize = shape.iter().product();
            let bytes: Vec<u8> = match kind {
                StoredType::F32 => {
                    let one = |r: u32| (exponent | (r & 0x8000_0000) | (r & 0x7f_ffff)).to_le_bytes();
                    (0..n).flat_map(|_| one(rng.next_u32())).collect()
                }
                _ => {
                    let one = |r: u32| ((exponent | (r & 0x8000) | (r & 0x7f)) as u16).to_le_bytes();
                    (0..n).flat_map(|_| one(rng.next_u32())).collect()
                }
            };
            (name, shape, bytes)
        })
        .collect();
    let views = stored
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors"))?;
    Ok(())
}
