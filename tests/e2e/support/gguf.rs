//! The bundled demo model as a GGUF file, written as llama.cpp's converter writes it.

use serde_json::Value;
use std::path::Path;

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 32;
/// ggml's number of bfloat16, which the demo model is stored in, and its size.
const BF16: (u32, usize) = (30, 2);

/// llama.cpp's name of a Hugging Face tensor.
fn name(hugging_face: &str) -> String {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    names
        .iter()
        .fold(hugging_face.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Rows of a matrix in ggml's rotary order: the two halves of each head interleaved.
fn interleaved(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, half) = (bytes.len() / rows, rows / heads / 2);
    let order = (0..rows).map(|i| (i / (2 * half) * 2 + i % 2) * half + i % (2 * half) / 2);
    order
        .flat_map(|row| bytes[row * row_bytes..][..row_bytes].iter().copied())
        .collect()
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The key-value section.
#[derive(Default)]
struct Keys {
    count: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.count += 1;
        string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        &mut self.bytes
    }

    fn number(&mut self, key: &str, value: &Value) {
        let value = value.as_u64().expect("a number") as u32;
        self.key(key, 4).extend(value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: &Value) {
        let value = value.as_f64().expect("a number") as f32;
        self.key(key, 6).extend(value.to_le_bytes());
    }

    fn text(&mut self, key: &str, text: &str) {
        string(self.key(key, 8), text);
    }

    fn list<T>(&mut self, key: &str, kind: u32, items: &[T], write: impl Fn(&mut Vec<u8>, &T)) {
        let out = self.key(key, 9);
        out.extend(kind.to_le_bytes());
        out.extend((items.len() as u64).to_le_bytes());
        items.iter().for_each(|item| write(out, item));
    }
}

/// Writes the demo model to `path`.
pub fn write_demo(path: &Path) {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
    let read = |name: &str| std::fs::read(demo.join(name)).expect("the demo model is in the repository");
    let json = |name: &str| -> Value { serde_json::from_slice(&read(name)).expect("JSON") };
    let (config, tokenizer) = (json("config.json"), json("tokenizer.json"));

    let mut keys = Keys::default();
    keys.text("general.architecture", "llama");
    for (theirs, ours) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
    ] {
        keys.number(&format!("llama.{theirs}"), &config[ours]);
    }
    keys.float("llama.attention.layer_norm_rms_epsilon", &config["rms_norm_eps"]);
    keys.float("llama.rope.freq_base", &config["rope_theta"]);
    let vocab = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
    let mut tokens = vec![("", 1u32); vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().expect("an id") as usize].0 = token;
    }
    for added in tokenizer["added_tokens"].as_array().expect("a list") {
        tokens[added["id"].as_u64().expect("an id") as usize].1 = 3;
    }
    let merges = tokenizer["model"]["merges"].as_array().expect("a list");
    keys.text("tokenizer.ggml.model", "gpt2");
    keys.text("tokenizer.ggml.pre", "smollm");
    keys.list("tokenizer.ggml.tokens", 8, &tokens, |out, token| string(out, token.0));
    keys.list("tokenizer.ggml.token_type", 5, &tokens, |out, token| {
        out.extend(token.1.to_le_bytes())
    });
    keys.list("tokenizer.ggml.merges", 8, merges, |out, merge| {
        let half = |i: usize| merge[i].as_str().expect("text").to_owned();
        string(out, &(half(0) + " " + &half(1)));
    });
    keys.number("tokenizer.ggml.eos_token_id", &config["eos_token_id"]);
    let template = json("tokenizer_config.json")["chat_template"].clone();
    keys.text("tokenizer.chat_template", template.as_str().expect("text"));

    // A safetensors file: the length of its header, the header in JSON, the tensors.
    let weights = read("model.safetensors");
    let header_len = u64::from_le_bytes(weights[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&weights[8..8 + header_len]).expect("JSON");
    let (mut infos, mut data) = (Vec::new(), Vec::new());
    let mut count = 0u64;
    for (hugging_face, info) in header.as_object().expect("an object") {
        if hugging_face == "__metadata__" {
            continue;
        }
        assert_eq!(info["dtype"], "BF16");
        let number = |value: &Value| value.as_u64().expect("a number") as usize;
        let shape: Vec<usize> = info["shape"].as_array().expect("a list").iter().map(number).collect();
        let at = |i: usize| 8 + header_len + number(&info["data_offsets"][i]);
        let bytes = &weights[at(0)..at(1)];
        let heads = match hugging_face.rsplit('.').nth(1) {
            Some("q_proj") => Some(number(&config["num_attention_heads"])),
            Some("k_proj") => Some(number(&config["num_key_value_heads"])),
            _ => None,
        };
        assert_eq!(bytes.len(), shape.iter().product::<usize>() * BF16.1);
        string(&mut infos, &name(hugging_face));
        infos.extend((shape.len() as u32).to_le_bytes());
        shape
            .iter()
            .rev()
            .for_each(|dim| infos.extend((*dim as u64).to_le_bytes()));
        infos.extend(BF16.0.to_le_bytes());
        infos.extend((data.len() as u64).to_le_bytes());
        match heads {
            Some(heads) => data.extend(interleaved(bytes, shape[0], heads)),
            None => data.extend(bytes),
        }
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        count += 1;
    }
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(count.to_le_bytes());
    file.extend(keys.count.to_le_bytes());
    file.extend(keys.bytes);
    file.extend(infos);
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend(data);
    std::fs::write(path, file).expect("writable");
}
