//! GGUF files against the same weights as safetensors: logits, configuration; and files that are damaged or
//! hostile.

mod common;

use baton_model::gguf::{gguf_file, text_files};
use baton_model::{Decoder, LoadOptions, ModelConfig, ModelError, ModelFiles, Quantization, RopeScaling, resolve};
use candle_core::quantized::GgmlDType;
use common::gguf::{File, Stored, Value, model, with_tokenizer};
use common::{Runner, Spec, prompt};
use proptest::prelude::*;
use serde_json::json;
use std::path::Path;

/// Rows of 256 elements, so that every block format fits.
fn wide(spec: Spec) -> Spec {
    Spec {
        hidden: 256,
        inner: 512,
        layers: 2,
        heads: 8,
        kv_heads: 2,
        head_dim: None,
        ..spec
    }
}

/// Small and quick, for files that are to be refused.
fn small() -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        layers: 1,
        ..Spec::llama()
    };
    let file = model(&spec, GgmlDType::F32, 1, dir.path());
    (dir, file)
}

fn logits(path: &Path) -> Vec<Vec<f32>> {
    let mut runner = Runner::open(path, 2, 16);
    let seq = runner.start();
    let tokens = prompt(40, 199, 5);
    let (first, second) = tokens.split_at(33);
    [first, second]
        .iter()
        .flat_map(|part| runner.step(&[(seq, part)]))
        .collect()
}

#[test]
fn every_format_gives_the_logits_of_its_decoded_weights() {
    let kinds = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    for kind in kinds {
        for spec in [wide(Spec::llama()), wide(Spec::qwen2())] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("model.gguf");
            model(&spec, kind, 3, dir.path()).write(&path);
            let (got, want) = (logits(&path), logits(dir.path()));
            let largest = |rows: &[Vec<f32>]| rows.iter().flatten().fold(0f32, |a, v| a.max(v.abs()));
            let differences: Vec<Vec<f32>> = std::iter::zip(&got, &want)
                .map(|(g, w)| std::iter::zip(g, w).map(|(g, w)| g - w).collect())
                .collect();
            let error = largest(&differences) / largest(&want);
            // The other side computes in f32 throughout: what remains is 16-bit K and V, and activations in bf16 or int8.
            let allowed = match kind {
                GgmlDType::F32 => 0.0,
                GgmlDType::F16 => 4e-3,
                _ => 4e-2,
            };
            assert!(error <= allowed, "{kind:?} {}: off by {error:e}", spec.architecture);
        }
    }
}

#[test]
fn heads_of_their_own_size_and_biases_are_put_back_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let spec = Spec {
        head_dim: Some(24),
        tied: true,
        extra: json!({"attention_bias": true}),
        ..Spec::llama()
    };
    let mut file = model(&spec, GgmlDType::F32, 4, dir.path());
    // The biases that llama.cpp's converter would write: those of q and k are stored in pairs, as their rows are.
    file.tensors.retain(|t| !t.name.ends_with(".bias"));
    let mut extra = Vec::new();
    for layer in 0..spec.layers {
        for (module, theirs, rows, heads) in [
            ("q", "attn_q", 8 * 24, 8),
            ("k", "attn_k", 2 * 24, 2),
            ("v", "attn_v", 2 * 24, 0),
            ("o", "attn_output", 64, 0),
        ] {
            let values: Vec<f32> = (0..rows).map(|row| (row as f32 * 0.7 + layer as f32).sin()).collect();
            let stored: Vec<f32> = match heads {
                0 => values.clone(),
                heads => {
                    let dim = rows / heads;
                    // Element `2 j + s` of a head is element `s dim / 2 + j` of the original.
                    let original = |i: usize| i / dim * dim + i % dim % 2 * (dim / 2) + i % dim / 2;
                    (0..rows).map(|i| values[original(i)]).collect()
                }
            };
            file.tensors.push(Stored {
                name: format!("blk.{layer}.{theirs}.bias"),
                dims: vec![rows as u64],
                kind: 0,
                bytes: bytemuck::cast_slice(&stored).to_vec(),
                offset: None,
            });
            extra.push((format!("model.layers.{layer}.self_attn.{module}_proj.bias"), values));
        }
    }
    file.write(&path);
    add_vectors(dir.path(), &extra);
    assert_eq!(logits(&path), logits(dir.path()));
}

/// Puts f32 vectors into a directory's safetensors, in the place of those of the same names.
fn add_vectors(dir: &Path, vectors: &[(String, Vec<f32>)]) {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let held = SafeTensors::deserialize(&bytes).unwrap();
    let mut views = held.tensors();
    views.retain(|(name, _)| vectors.iter().all(|(replaced, _)| replaced != name));
    for (name, values) in vectors {
        let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values)).unwrap();
        views.push((name.clone(), view));
    }
    let text = safetensors::serialize(views, None).unwrap();
    std::fs::write(&path, text).unwrap();
}

#[test]
fn the_configuration_is_that_of_the_safetensors() {
    for spec in [Spec::llama(), Spec::qwen2()] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let mut file = model(&spec, GgmlDType::F32, 1, dir.path());
        file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
        file.set("tokenizer.ggml.bos_token_id", Value::I32(1));
        file.write(&path);
        assert_eq!(
            ModelConfig::from_dir(&path).unwrap(),
            ModelConfig::from_dir(dir.path()).unwrap()
        );
        // One number for each layer is as good as one for all, if they agree.
        let name = if spec.tied { "qwen2" } else { "llama" };
        file.set(&format!("{name}.attention.head_count_kv"), Value::I32s(vec![2, 2, 2]));
        file.write(&path);
        assert_eq!(ModelConfig::from_dir(&path).unwrap().kv_heads, 2);
        file.set(&format!("{name}.attention.head_count_kv"), Value::I32s(vec![2, 4, 2]));
        file.write(&path);
        assert!(error(&path).contains("head_count_kv"));
    }
}

#[test]
fn rotary_scaling_is_read_from_metadata_or_factors() {
    let (dir, file) = small();
    let path = dir.path().join("model.gguf");
    let rope = |file: &File| {
        file.write(&path);
        ModelConfig::from_dir(&path).map(|config| config.rope)
    };
    let mut linear = file.clone();
    linear.set("llama.rope.scaling.type", Value::Text("linear".into()));
    linear.set("llama.rope.scaling.factor", Value::F32(4.0));
    assert_eq!(rope(&linear).unwrap().scaling, RopeScaling::Linear { factor: 4.0 });
    let mut yarn = linear.clone();
    yarn.set("llama.rope.scaling.type", Value::Text("yarn".into()));
    yarn.set("llama.rope.scaling.original_context_length", Value::U32(128));
    let RopeScaling::Yarn {
        factor,
        original_context,
        attention_factor,
        ..
    } = rope(&yarn).unwrap().scaling
    else {
        panic!("it says yarn");
    };
    assert_eq!((factor, original_context), (4.0, 128.0));
    assert!((attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    let mut other = linear.clone();
    other.set("llama.rope.scaling.type", Value::Text("longrope".into()));
    assert!(rope(&other).unwrap_err().to_string().contains("longrope"));

    // Llama 3.1's parameters, and the factors that llama.cpp's converter makes of them.
    let config = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256});
    let mut hugging_face = Spec::llama().config();
    hugging_face["rope_scaling"] = config;
    let hugging_face = ModelConfig::from_json(&hugging_face.to_string()).unwrap();
    let (wanted, _) = hugging_face.rope.frequencies(8);
    let (plain, _) = rope(&file).unwrap().frequencies(8);
    let factors: Vec<f32> = plain
        .iter()
        .zip(&wanted)
        .map(|(plain, scaled)| plain / scaled)
        .collect();
    assert!(factors.iter().any(|f| *f > 1.1));
    let mut llama3 = file.clone();
    llama3.tensors.push(Stored {
        name: "rope_freqs.weight".into(),
        dims: vec![4],
        kind: 0,
        bytes: bytemuck::cast_slice(&factors).to_vec(),
        offset: None,
    });
    let (found, scale) = rope(&llama3).unwrap().frequencies(8);
    assert_eq!(scale, 1.0);
    assert!(
        found.iter().zip(&wanted).all(|(a, b)| (a / b - 1.0).abs() < 1e-6),
        "{found:?} {wanted:?}"
    );
    ModelFiles::open(&path).unwrap();
    llama3.tensor("rope_freqs.weight").bytes[3] = 0xff;
    assert!(rope(&llama3).unwrap_err().to_string().contains("rope_freqs"));
}

#[test]
fn a_path_means_a_file_or_a_directory_with_one() {
    let (dir, file) = small();
    let path = dir.path().join("model.gguf");
    file.write(&path);
    let spec = |path: &Path| path.to_str().unwrap().to_owned();
    assert_eq!(resolve(&spec(&path), &()).unwrap(), path);
    // Safetensors are what their maker published; the other file is somebody's conversion.
    assert_eq!(gguf_file(dir.path()).unwrap(), None);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_eq!(gguf_file(dir.path()).unwrap(), Some(path.clone()));
    assert_eq!(
        ModelFiles::open(dir.path()).unwrap().weight_bytes(),
        ModelFiles::open(&path).unwrap().weight_bytes()
    );
    file.write(&dir.path().join("other.gguf"));
    assert!(error(dir.path()).contains("2 GGUF files"));
}

#[test]
fn a_model_in_parts_is_put_together() {
    let dir = tempfile::tempdir().unwrap();
    let whole = model(&Spec::llama(), GgmlDType::F32, 6, dir.path());
    let parts = tempfile::tempdir().unwrap();
    let path = |number: usize| parts.path().join(format!("m-{number:05}-of-00003.gguf"));
    let write = |number: usize, said: u32, tensors: &[Stored]| {
        let mut file = File {
            keys: if number == 1 { whole.keys.clone() } else { vec![] },
            tensors: tensors.to_vec(),
        };
        file.set("split.count", Value::U32(3));
        file.set("split.no", Value::U32(said));
        file.write(&path(number));
    };
    // As `gguf-split` may do, the first part has no tensors.
    write(1, 0, &[]);
    write(2, 1, &whole.tensors[..10]);
    write(3, 2, &whole.tensors[10..]);
    let wanted = logits(dir.path());
    for spec in [parts.path().to_owned(), path(1), path(3)] {
        assert_eq!(logits(&spec), wanted, "{}", spec.display());
    }
    write(3, 1, &whole.tensors[10..]);
    assert!(error(&path(1)).contains("not the part"));
    write(3, 2, &whole.tensors[9..]);
    assert!(error(&path(1)).contains("of another part"));
    write(3, 2, &whole.tensors[11..]);
    assert!(error(&path(1)).contains("is missing"));
    std::fs::remove_file(path(3)).unwrap();
    assert!(error(&path(1)).contains("m-00003-of-00003.gguf"));
}

#[test]
fn packed_memory_is_counted_by_the_stored_type() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let spec = wide(Spec::qwen2());
    let elements: u64 = spec
        .shapes()
        .values()
        .filter(|s| s.len() == 2)
        .map(|s| s.iter().map(|n| n.next_multiple_of(64) as u64).product::<u64>())
        .sum();
    let packed = |path: &Path| {
        let config = ModelConfig::from_dir(path).unwrap();
        ModelFiles::open(path)
            .unwrap()
            .packed_bytes(&config, Quantization::None)
    };
    model(&spec, GgmlDType::Q8_0, 1, dir.path()).write(&path);
    assert!(
        (elements..elements * 5 / 4).contains(&packed(&path)),
        "a byte each, and scales"
    );
    assert!((4 * elements..5 * elements).contains(&packed(dir.path())), "f32");
}

fn error(path: &Path) -> String {
    let load = || -> Result<(), ModelError> {
        let config = ModelConfig::from_dir(path)?;
        let files = ModelFiles::open(path)?;
        Decoder::load(&files, config, &LoadOptions::threads(1), &()).map(|_| ())
    };
    load()
        .err()
        .map_or_else(|| "nothing was refused".to_owned(), |error| error.to_string())
}

#[test]
fn each_fault_is_one_clear_sentence() {
    type Change = fn(&mut File);
    let faults: &[(&str, Change)] = &[
        ("`falcon`", |f| {
            f.set("general.architecture", Value::Text("falcon".into()))
        }),
        ("general.architecture` is missing", |f| {
            f.without("general.architecture")
        }),
        ("general.architecture` is not text", |f| {
            f.set("general.architecture", Value::U32(1))
        }),
        ("general.architecture` is not text", |f| {
            let text = [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
            f.set("general.architecture", Value::Raw(8, text));
        }),
        ("block_count` is missing", |f| f.without("llama.block_count")),
        ("mixture", |f| f.set("llama.expert_count", Value::U32(8))),
        ("sliding_window", |f| {
            f.set("llama.attention.sliding_window", Value::U32(64))
        }),
        ("rope.dimension_count", |f| {
            f.set("llama.rope.dimension_count", Value::U32(4))
        }),
        ("not causal", |f| f.set("llama.attention.causal", Value::Bool(false))),
        ("must end like", |f| f.set("split.count", Value::U32(3))),
        ("2000 parts", |f| f.set("split.count", Value::U32(2000))),
        ("embedding_length", |f| f.set("llama.embedding_length", Value::U32(65))),
        ("num_attention_heads", |f| {
            f.set("llama.attention.head_count", Value::U32(0))
        }),
        ("hold 7 heads", |f| {
            f.set("llama.attention.head_count", Value::U32(7));
            f.set("llama.attention.head_count_kv", Value::U32(1));
            f.set("llama.attention.key_length", Value::U32(8));
        }),
        ("num_hidden_layers", |f| {
            f.set("llama.block_count", Value::U64(u64::MAX))
        }),
        ("is missing", |f| f.set("llama.block_count", Value::U32(2))),
        ("finite number", |f| {
            f.set("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN))
        }),
        ("alignment", |f| f.set("general.alignment", Value::U32(3))),
        ("alignment", |f| f.set("general.alignment", Value::U32(0))),
        ("twice", |f| f.keys.push(f.keys[0].clone())),
        ("twice", |f| f.tensors.push(f.tensors[0].clone())),
        ("unknown type 99", |f| f.set("x", Value::Raw(99, vec![]))),
        ("unknown type 99", |f| {
            f.set(
                "x",
                Value::Raw(9, [&99u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat()),
            )
        }),
        ("true or false", |f| f.set("x", Value::Raw(7, vec![2]))),
        // A list that claims more than there is, and one that claims more than can be.
        ("not whole", |f| {
            f.set(
                "x",
                Value::Raw(9, [&8u32.to_le_bytes()[..], &(1u64 << 40).to_le_bytes()].concat()),
            )
        }),
        ("not whole", |f| {
            f.set(
                "x",
                Value::Raw(9, [&12u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()),
            )
        }),
        ("not whole", |f| {
            f.set("x", Value::Raw(8, u64::MAX.to_le_bytes().to_vec()))
        }),
        ("too deep", |f| {
            let level = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
            f.set("x", Value::Raw(9, [level.repeat(100_000), vec![0; 12]].concat()));
        }),
        ("ggml type 18", |f| f.tensor("output.weight").kind = 18),
        ("whole blocks", |f| f.tensor("output.weight").kind = 12),
        ("dimension of impossible size", |f| {
            f.tensor("output.weight").dims[1] = 0
        }),
        ("0 dimensions", |f| f.tensor("output.weight").dims.clear()),
        ("5 dimensions", |f| f.tensor("output.weight").dims = vec![1; 5]),
        ("beyond the end", |f| f.tensor("output.weight").dims = vec![64, 1 << 40]),
        ("beyond the end", |f| {
            f.tensor("output.weight").dims = vec![1 << 60, 1 << 60]
        }),
        ("beyond the end", |f| f.tensor("output.weight").offset = Some(1 << 40)),
        ("beyond the end", |f| {
            f.tensor("output.weight").offset = Some(0u64.wrapping_sub(32))
        }),
        ("not aligned", |f| f.tensor("output.weight").offset = Some(7)),
        // The first one begins at 0.
        ("overlap", |f| f.tensors[1].offset = Some(0)),
        ("has shape", |f| f.tensor("output.weight").dims = vec![199, 64]),
        ("not computed with", |f| {
            f.tensor("output.weight").name = "blk.0.attn_q_norm.weight".into()
        }),
        ("not computed with", |f| {
            f.tensor("output.weight").name = "blk.1.ffn_up.weight".into()
        }),
        ("token_embd.weight` is missing", |f| {
            f.tensor("token_embd.weight").name = "output_norm.bias".into()
        }),
        ("names is empty", |f| f.tensor("output.weight").name = String::new()),
    ];
    let (dir, file) = small();
    let path = dir.path().join("model.gguf");
    for (wanted, change) in faults {
        let mut file = file.clone();
        change(&mut file);
        file.write(&path);
        let text = error(&path);
        let text = if *wanted == "mixture" {
            text.replace("expert_count", "mixture")
        } else {
            text
        };
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    // Headers.
    let good = file.bytes();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, file).unwrap();
        error(&path)
    };
    assert!(with(0, b"GGML").contains("begin with"));
    assert!(with(4, &1u32.to_le_bytes()).contains("version 1"));
    assert!(with(4, &3u32.to_be_bytes()).contains("big-endian"));
    assert!(with(4, &9u32.to_le_bytes()).contains("version 9"));
    assert!(with(8, &u64::MAX.to_le_bytes()).contains("claims"));
    assert!(with(16, &u64::MAX.to_le_bytes()).contains("not whole"));
    std::fs::write(&path, &good[..good.len() - 1]).unwrap();
    assert!(error(&path).contains("beyond the end"));
    std::fs::write(&path, b"").unwrap();
    assert!(!error(&path).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        header in any::<bool>(),
    ) {
        thread_local! {
            static GOOD: Vec<u8> = {
                let (_dir, path) = with_tokenizer("llama-bpe");
                std::fs::read(path).unwrap()
            };
        }
        let mut bytes = GOOD.with(Clone::clone);
        // The list of tensors and the numbers before the token list are where structure is.
        let tokens = bytes.windows(20).position(|w| w == b"tokenizer.ggml.model").unwrap();
        let tensors = bytes.windows(8).position(|w| w == b"blk.0.at").unwrap();
        let structure = |i: &prop::sample::Index| match i.index(tokens + 700) {
            early if early < tokens => early,
            late => tensors + late - tokens - 16,
        };
        for (index, byte) in changes {
            let at = if header { structure(&index) } else { index.index(bytes.len()) };
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            let len = cut.index(bytes.len());
            bytes.truncate(len);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        if let (Ok(config), Ok(files)) = (ModelConfig::from_dir(&path), ModelFiles::open(&path)) {
            let _ = Decoder::load(&files, config, &LoadOptions::threads(1), &()).map(|_| ());
        }
        let _ = text_files(&path);
    }
}
