//! Weight files: damaged, hostile, incomplete, or in another format, each refused in a sentence; and the digest.

mod common;

use baton_model::{
    Decoder, LoadOptions, MemoryNeed, ModelConfig, ModelError, ModelFiles, Progress, Quantization, Stage, resolve,
};
use common::Spec;
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::path::Path;
use std::sync::Mutex;

fn small() -> Spec {
    Spec {
        layers: 1,
        hidden: 16,
        heads: 2,
        kv_heads: 1,
        inner: 24,
        vocab: 40,
        ..Spec::llama()
    }
}

/// Why the model in `dir` cannot be loaded.
fn refusal(dir: &Path) -> String {
    let load = || {
        let config = ModelConfig::from_dir(dir)?;
        Decoder::load(&ModelFiles::open(dir)?, config, &LoadOptions::threads(1), &()).map(|_| ())
    };
    let text = load().unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

fn digest(dir: &Path) -> [u8; 32] {
    ModelFiles::open(dir)
        .unwrap()
        .digest(&ModelConfig::from_dir(dir).unwrap(), Quantization::None, &())
}

#[test]
fn shards_and_one_file_hold_the_same_model() {
    let (one, three) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small().write(one.path(), 1);
    Spec { shards: 3, ..small() }.write(three.path(), 1);
    assert_eq!(digest(one.path()), digest(three.path()));
}

#[test]
fn the_digest_tells_weights_types_and_configurations_apart() {
    let write = |spec: &Spec, seed| {
        let dir = tempfile::tempdir().unwrap();
        spec.write(dir.path(), seed);
        digest(dir.path())
    };
    let digests = [
        write(&small(), 1),
        write(&small(), 2),
        write(
            &Spec {
                dtype: Dtype::BF16,
                ..small()
            },
            1,
        ),
        write(
            &Spec {
                theta: 20_000.0,
                ..small()
            },
            1,
        ),
        write(
            &Spec {
                heads: 4,
                kv_heads: 2,
                ..small()
            },
            1,
        ),
    ];
    for (i, a) in digests.iter().enumerate() {
        assert!(digests[..i].iter().all(|b| a != b));
    }
    // What the computation does not depend on does not separate workers.
    assert_eq!(
        write(
            &Spec {
                extra: json!({"transformers_version": "9", "eos_token_id": 3}),
                ..small()
            },
            1
        ),
        digests[0]
    );
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let spec = small();
    spec.write(dir.path(), 1);
    // The configuration asks for one layer more.
    let config = Spec {
        layers: 2,
        ..spec.clone()
    }
    .config()
    .to_string();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    assert!(refusal(dir.path()).contains("`model.layers.1.input_layernorm.weight` is missing"));
    let config = Spec {
        inner: 25,
        ..spec.clone()
    }
    .config()
    .to_string();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let text = refusal(dir.path());
    assert!(
        text.contains("mlp.gate_proj.weight` has shape [24, 16] where [25, 16] is needed"),
        "{text}"
    );
    let config = Spec { tied: false, ..spec }.config().to_string();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    Spec { tied: true, ..small() }.write(dir.path(), 1);
    std::fs::write(dir.path().join("config.json"), small().config().to_string()).unwrap();
    assert!(refusal(dir.path()).contains("`lm_head.weight` is missing"));
}

#[test]
fn types_that_are_not_computed_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    small().write(dir.path(), 1);
    let bytes = [0u8; 32];
    let view = TensorView::new(Dtype::F8_E4M3, vec![4, 8], &bytes).unwrap();
    safetensors::serialize_to_file(
        [("model.norm.weight", view)],
        None,
        &dir.path().join("model.safetensors"),
    )
    .unwrap();
    let text = refusal(dir.path());
    assert!(
        text.contains("`model.norm.weight` is stored as F8_E4M3") && text.contains("supported are"),
        "{text}"
    );
}

#[test]
fn unaligned_tensors_are_copied_not_refused() {
    // A header whose length is no multiple of four puts f32 data at odd addresses, as old writers did.
    let dir = tempfile::tempdir().unwrap();
    small().write(dir.path(), 1);
    let path = dir.path().join("model.safetensors");
    let before = digest(dir.path());
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap();
    while text.len().is_multiple_of(2) {
        text.push(' ');
    }
    let mut odd = (text.len() as u64).to_le_bytes().to_vec();
    odd.extend(text.as_bytes());
    odd.extend(&bytes[8 + header..]);
    std::fs::write(&path, odd).unwrap();
    assert_eq!(digest(dir.path()), before);
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    Decoder::load(
        &ModelFiles::open(dir.path()).unwrap(),
        config,
        &LoadOptions::threads(1),
        &(),
    )
    .unwrap();
}

#[test]
fn hostile_indexes_do_not_leave_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    small().write(dir.path(), 1);
    let names = [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "x\0y",
    ];
    for name in names {
        let index = json!({"weight_map": {"model.norm.weight": name}}).to_string();
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let text = refusal(dir.path());
        assert!(text.contains("must be a plain file name"), "{name:?}: {text}");
    }
    let wrong = [
        json!([]),
        json!({"weight_map": []}),
        json!({"weight_map": {"a": 1}}),
        json!({"weight_map": {}}),
        json!({"weight_map": {"a": "missing.safetensors"}}),
        json!({"weight_map": {"no such tensor": "model.safetensors"}}),
    ];
    for index in wrong {
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        assert!(ModelFiles::open(dir.path()).is_err(), "{index}");
    }
}

#[test]
fn other_formats_and_other_paths_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    small().write(dir.path(), 1);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert!(refusal(dir.path()).contains("no safetensors file"));
    std::fs::write(dir.path().join("pytorch_model.bin"), b"").unwrap();
    assert!(refusal(dir.path()).contains("safetensors version"));
    for (spec, wanted) in [
        ("missing.gguf", "does not exist"),
        (dir.path().join("config.json").to_str().unwrap(), "is a file"),
        ("./no/such/directory", "neither a directory"),
        ("/no/such", "neither a directory"),
        ("no-slash", "neither a directory"),
        ("org/../name", "neither a directory"),
        ("org/name@../../x", "neither a directory"),
        ("", "neither a directory"),
    ] {
        let text = resolve(spec, &()).unwrap_err().to_string();
        assert!(text.contains(wanted), "{spec}: {text}");
    }
    assert_eq!(resolve(dir.path().to_str().unwrap(), &()).unwrap(), dir.path());
}

#[test]
fn progress_ends_at_the_total() {
    let dir = tempfile::tempdir().unwrap();
    small().write(dir.path(), 1);
    let files = ModelFiles::open(dir.path()).unwrap();
    let seen = Mutex::new(Vec::new());
    let progress = |stage: Stage<'_>, done, total| seen.lock().unwrap().push((stage.to_string(), done, total));
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    files.digest(&config, Quantization::None, &progress as &dyn Progress);
    Decoder::load(&files, config.clone(), &LoadOptions::threads(1), &progress).unwrap();
    let seen = seen.into_inner().unwrap();
    for stage in ["checking weights", "loading weights"] {
        let last = seen.iter().rev().find(|s| s.0 == stage).unwrap();
        assert_eq!((last.1, last.2), (files.weight_bytes(), files.weight_bytes()));
    }
    let need = MemoryNeed::estimate(&config, files.weight_bytes(), 1 << 20, 256, 8);
    assert!(need.check(1 << 30).is_ok());
    assert!(matches!(need.check(1 << 20), Err(ModelError::DoesNotFit(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_files_never_panic(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>(), header in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        small().write(dir.path(), 1);
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let header_len = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        if header {
            let i = at.index(header_len);
            bytes[i] = byte;
        } else {
            let len = cut.index(bytes.len());
            bytes.truncate(len);
        }
        std::fs::write(&path, bytes).unwrap();
        let config = ModelConfig::from_dir(dir.path()).unwrap();
        if let Ok(files) = ModelFiles::open(dir.path()) {
            let _ = Decoder::load(&files, config, &LoadOptions::threads(1), &()).map(|_| ());
        }
    }
}
