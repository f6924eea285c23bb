//! A tiny model directory made in the test: a byte-level vocabulary of 256 bytes and two control tokens. No weights.

use std::path::Path;

use serde_json::{Value, json};

/// The template of the ChatML family.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
    + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// GPT-2's spelling of a byte.
fn byte_spelling(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&earlier| !visible(earlier)).count() as u32;
    char::from_u32(0x100 + rank).unwrap()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "special": special, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false})
}

/// Ids 0 to 255 are the bytes; 256 `<|im_start|>`, 257 `<|im_end|>`, 258 `<think>` (ordinary text), 259 `the`.
pub fn byte_level_json() -> Value {
    let mut vocab: serde_json::Map<String, Value> = (0..=255u8)
        .map(|byte| (byte_spelling(byte).to_string(), json!(byte)))
        .collect();
    for (piece, id) in [
        ("<|im_start|>", 256),
        ("<|im_end|>", 257),
        ("<think>", 258),
        ("the", 259),
        ("th", 260),
    ] {
        vocab.insert(piece.into(), json!(id));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(256, "<|im_start|>", true), added(257, "<|im_end|>", true), added(258, "<think>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["t", "h"], ["th", "e"]]}
    })
}

/// Writes the model directory: context length 4096.
pub fn write_model(dir: &Path) {
    let write = |name: &str, value: Value| std::fs::write(dir.join(name), value.to_string()).unwrap();
    write("tokenizer.json", byte_level_json());
    write(
        "tokenizer_config.json",
        json!({"eos_token": "<|im_end|>", "chat_template": CHATML}),
    );
    write(
        "config.json",
        json!({"max_position_embeddings": 4096, "eos_token_id": 257}),
    );
}
