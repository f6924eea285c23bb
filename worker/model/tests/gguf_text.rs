//! Tokenizers rebuilt from GGUF files: byte-level ones against the `tokenizer.json` they came from, SentencePiece ones
//! against SentencePiece's algorithm written down plainly.

mod common;

use baton_model::ModelConfig;
use baton_model::gguf::text_files;
use candle_core::quantized::GgmlDType;
use common::Spec;
use common::gguf::{File, Value, add_tokenizer, demo_tokenizer, model, with_tokenizer};
use proptest::prelude::*;
use serde_json::json;
use std::path::Path;

fn tokenizer(path: &Path) -> tokenizers::Tokenizer {
    let files = text_files(path).unwrap();
    let (_, text) = files.iter().find(|(name, _)| *name == "tokenizer.json").unwrap();
    tokenizers::Tokenizer::from_bytes(text).unwrap()
}

#[test]
fn a_byte_level_tokenizer_is_rebuilt() {
    let (_dir, path) = with_tokenizer("smollm");
    let rebuilt = tokenizer(&path);
    let original = tokenizers::Tokenizer::from_bytes(demo_tokenizer().to_string()).unwrap();
    let check = |text: &str| {
        let ids = |tokenizer: &tokenizers::Tokenizer| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids(&rebuilt), ids(&original), "{text:?}");
        for skip in [false, true] {
            let decode = |tokenizer: &tokenizers::Tokenizer| tokenizer.decode(&ids(tokenizer), skip).unwrap();
            assert_eq!(decode(&rebuilt), decode(&original), "{text:?}");
        }
    };
    check("<|im_start|>user\nMy code is 7341.<|im_end|>\n<|im_start|>assistant\n<|endoftext|>");
    check("  don't  12 345\t\r\n\n éèß 漢字 😀\u{0}");
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    let text = prop_oneof!["\\PC{0,40}", "([a-z' 0-9\n]|<\\|im_end\\|>){0,40}"];
    runner
        .run(&text, |text| {
            check(&text);
            Ok(())
        })
        .unwrap();
    for id in 0..1030 {
        assert_eq!(rebuilt.id_to_token(id), original.id_to_token(id));
    }
}

#[test]
fn text_files_hold_what_a_coordinator_reads() {
    let (dir, path) = with_tokenizer("qwen2");
    let files = text_files(&path).unwrap();
    let json = |wanted: &str| -> serde_json::Value {
        let (_, text) = files.iter().find(|(name, _)| *name == wanted).unwrap();
        serde_json::from_str(text).unwrap()
    };
    assert_eq!(json("config.json")["max_position_embeddings"], 512);
    // The end token of the metadata, and the control tokens spelled like one.
    assert_eq!(json("config.json")["eos_token_id"], json!([0, 2]));
    assert_eq!(ModelConfig::from_dir(&path).unwrap().eos_token_ids, [0, 2]);
    assert_eq!(json("tokenizer_config.json")["eos_token"], "<|im_end|>");
    assert_eq!(
        json("tokenizer_config.json")["chat_template"],
        "{{ messages[0].content }}"
    );
    assert_eq!(json("generation_config.json")["temperature"], json!(null));

    let mut file = model(
        &Spec {
            vocab: 1030,
            layers: 1,
            ..Spec::llama()
        },
        GgmlDType::F32,
        1,
        dir.path(),
    );
    add_tokenizer(&mut file, &demo_tokenizer(), "qwen2");
    type Change = fn(&mut File);
    let faults: &[(&str, Change)] = &[
        ("`bert`", |f| f.set("tokenizer.ggml.model", Value::Text("bert".into()))),
        ("`viking`", |f| {
            f.set("tokenizer.ggml.pre", Value::Text("viking".into()))
        }),
        ("pre` is missing", |f| f.without("tokenizer.ggml.pre")),
        ("merges` is missing", |f| f.without("tokenizer.ggml.merges")),
        ("merge 0", |f| {
            f.set("tokenizer.ggml.merges", Value::Texts(vec!["ab".into()]))
        }),
        ("tokens` is missing", |f| f.without("tokenizer.ggml.tokens")),
        ("token types", |f| {
            f.set("tokenizer.ggml.token_type", Value::I32s(vec![1; 5]))
        }),
        ("unknown type", |f| {
            f.set("tokenizer.ggml.token_type", Value::I32s(vec![-1; 1024]))
        }),
        ("chat template", |f| f.without("tokenizer.chat_template")),
        ("only 1024", |f| f.set("tokenizer.ggml.eot_token_id", Value::U32(1025))),
        ("scores` is missing", |f| {
            f.set("tokenizer.ggml.model", Value::Text("llama".into()));
            f.without("tokenizer.ggml.merges");
        }),
    ];
    for (wanted, change) in faults {
        let mut file = file.clone();
        change(&mut file);
        file.write(&path);
        let text = text_files(&path).expect_err(wanted).to_string();
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

#[test]
fn every_pre_tokenizer_loads_and_cuts_as_named() {
    for (pre, digits) in [
        ("llama-bpe", 3),
        ("qwen2", 1),
        ("tekken", 1),
        ("smollm", 1),
        ("gpt-2", 5),
    ] {
        let (_dir, path) = with_tokenizer(pre);
        let tokenizer = tokenizer(&path);
        for text in ["It's  the code:\n\n 漢字 😀.", "DON'T stop  me", "a\tb"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text, "{pre}");
        }
        // The words are cut before anything is merged.
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let mut words = PreTokenizedString::from("12345");
        tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut words).unwrap();
        let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        assert_eq!(words[0].0.len(), digits, "{pre}");
    }
}

/// SentencePiece's BPE, plainly: join the neighbours whose union has the best score until none has one.
fn sentencepiece(pieces: &[(String, f32)], text: &str) -> Vec<String> {
    let mut parts: Vec<String> = format!("▁{}", text.replace(' ', "▁"))
        .chars()
        .map(String::from)
        .collect();
    loop {
        let score = |i: usize| {
            let joined = format!("{}{}", parts[i], parts[i + 1]);
            pieces
                .iter()
                .find(|(piece, _)| *piece == joined)
                .map(|(_, score)| *score)
        };
        let mut best: Option<(usize, f32)> = None;
        for i in 0..parts.len().saturating_sub(1) {
            if let Some(found) = score(i).filter(|s| best.is_none_or(|(_, b)| *s > b)) {
                best = Some((i, found));
            }
        }
        let Some((at, _)) = best else { break };
        let joined = parts[at].clone() + &parts.remove(at + 1);
        parts[at] = joined;
    }
    let known = |part: &String| pieces.iter().any(|(piece, _)| piece == part);
    let spelled = |part: String| match known(&part) {
        true => vec![part],
        false => part.bytes().map(|byte| format!("<0x{byte:02X}>")).collect(),
    };
    parts.into_iter().flat_map(spelled).collect()
}

#[test]
fn a_sentencepiece_tokenizer_is_rebuilt() {
    // Single characters, and pieces that overlap in every which way, each with its own score.
    let mut pieces: Vec<String> = "▁abcd".chars().map(String::from).collect();
    let joined = [
        "ab", "▁a", "bc", "abc", "▁ab", "cd", "▁abcd", "▁▁", "ca", "bb", "abb", "▁b", "dd", "cdd", "bcdd",
    ];
    pieces.extend(joined.map(String::from));
    let scored: Vec<(String, f32)> = pieces
        .into_iter()
        .enumerate()
        .map(|(i, p)| (p, -(i as f32 * 7.0 % 23.0)))
        .collect();
    let mut tokens = vec![
        ("<unk>".to_owned(), 2, 0.0),
        ("<s>".into(), 3, 0.0),
        ("</s>".into(), 3, 0.0),
    ];
    tokens.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0)));
    tokens.extend(scored.iter().map(|(piece, score)| (piece.clone(), 1, *score)));
    tokens.push(("<tool>".into(), 4, -1000.0));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut file = model(
        &Spec {
            vocab: 300,
            layers: 1,
            ..Spec::llama()
        },
        GgmlDType::F32,
        1,
        dir.path(),
    );
    file.set("tokenizer.ggml.model", Value::Text("llama".into()));
    file.set("tokenizer.ggml.pre", Value::Text("default".into()));
    file.set(
        "tokenizer.ggml.tokens",
        Value::Texts(tokens.iter().map(|t| t.0.clone()).collect()),
    );
    file.set(
        "tokenizer.ggml.token_type",
        Value::I32s(tokens.iter().map(|t| t.1).collect()),
    );
    file.set(
        "tokenizer.ggml.scores",
        Value::F32s(tokens.iter().map(|t| t.2).collect()),
    );
    file.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    file.set("tokenizer.chat_template", Value::Text("x".into()));
    file.write(&path);
    let rebuilt = tokenizer(&path);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(500));
    runner
        .run(&"[abcd é😀]{1,24}", |text| {
            let encoding = rebuilt.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(encoding.get_tokens(), sentencepiece(&scored, &text));
            prop_assert_eq!(rebuilt.decode(encoding.get_ids(), true).unwrap(), text);
            Ok(())
        })
        .unwrap();
    let ids = rebuilt.encode("<s>ab<tool></s>", false).unwrap().get_ids().to_vec();
    assert_eq!(
        (ids[0], ids[ids.len() - 2], ids[ids.len() - 1]),
        (1, tokens.len() as u32 - 1, 2)
    );
    assert_eq!(rebuilt.decode(&ids, true).unwrap(), "ab<tool>");
}
