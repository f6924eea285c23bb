//! Tokenizers for the unit tests.

use serde_json::json;
use tokenizers::Tokenizer;

#[path = "../tests/support/model_files.rs"]
mod model_files;

#[path = "../tests/support/route_list.rs"]
pub(crate) mod route_list;

pub(crate) use model_files::{CHATML, byte_level_json, write_model};

pub(crate) fn byte_level_tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(byte_level_json().to_string()).unwrap()
}

/// SentencePiece's way: words begin with `▁`, unknown characters fall back to bytes, the first space is the tokenizer's.
pub(crate) fn sentencepiece_tokenizer() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let pieces = ["<unk>".to_owned(), "<|im_start|>".to_owned(), "<|im_end|>".to_owned()]
        .into_iter()
        .chain((0..=255u8).map(|byte| format!("<0x{byte:02X}>")))
        .chain(["▁".to_owned()])
        .chain(('a'..='z').map(String::from));
    for (id, piece) in pieces.enumerate() {
        vocab.insert(piece, json!(id));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<|im_start|>"), special(2, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}
    });
    Tokenizer::from_bytes(tokenizer.to_string()).unwrap()
}
