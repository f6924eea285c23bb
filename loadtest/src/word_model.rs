//! A model directory without a model, for load tests: each word of the prompts made here is one token, the chat template adds
//! none, and the context is a million tokens. So a replayed prompt has exactly the tokens that its trace records, and shares
//! whole KV blocks with others where the trace says so. Only for mock workers, which read no weights.

use crate::prompt::WORDS;
use serde_json::{Value, json};

/// Ids of the vocabulary: the words, and fillers for mock answers, which come from its middle.
const VOCABULARY: usize = 4096;
/// Longest sequence: what the wire takes.
const CONTEXT_TOKENS: usize = baton_proto::limits::PROMPT_TOKENS_MAX;
/// Ends a turn; no prompt of ours has it.
const END: &str = "<|end|>";

/// The directory's files, by name.
pub fn files() -> [(&'static str, String); 3] {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "eos_token_id": 0,
    });
    let tokenizer_config = json!({
        "eos_token": END,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    });
    [
        ("config.json", config.to_string()),
        ("tokenizer.json", tokenizer().to_string()),
        ("tokenizer_config.json", tokenizer_config.to_string()),
    ]
}

/// Whole words behind a space, in the bytes-as-characters scheme of GPT-2, where a space is `Ġ`.
fn tokenizer() -> Value {
    let words = WORDS.iter().map(|word| format!("Ġ{word}"));
    let fillers = (0..).map(|number| format!("Ġw{number}"));
    let special = [END.to_owned(), "<|unknown|>".to_owned()].into_iter();
    let vocabulary: serde_json::Map<String, Value> = special
        .chain(words)
        .chain(fillers)
        .take(VOCABULARY)
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let added = |id: usize, content: &str| {
        json!({"id": id, "content": content, "special": true, "normalized": false, "lstrip": false, "rstrip": false,
               "single_word": false})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added(0, END), added(1, "<|unknown|>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|unknown|>"},
    })
}
