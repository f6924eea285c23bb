//! A small writer of GGUF files, and random models written as GGUF beside the same weights as safetensors.
#![allow(dead_code)]

use super::Spec;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;

/// A metadata value.
#[derive(Debug, Clone)]
pub enum Value {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Any type, as its number and its bytes.
    Raw(u32, Vec<u8>),
}

/// A tensor to be written: dimensions innermost first, as in the file.
#[derive(Debug, Clone)]
pub struct Stored {
    pub name: String,
    pub dims: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Where it is said to lie, if not where it does.
    pub offset: Option<u64>,
}

/// A GGUF file in the making.
#[derive(Debug, Clone, Default)]
pub struct File {
    pub keys: Vec<(String, Value)>,
    pub tensors: Vec<Stored>,
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array<T>(out: &mut Vec<u8>, kind: u32, items: &[T], write: impl Fn(&mut Vec<u8>, &T)) {
    out.extend(kind.to_le_bytes());
    out.extend((items.len() as u64).to_le_bytes());
    items.iter().for_each(|item| write(out, item));
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let (kind, bytes) = match self {
            Value::U32(v) => (4, v.to_le_bytes().to_vec()),
            Value::I32(v) => (5, v.to_le_bytes().to_vec()),
            Value::F32(v) => (6, v.to_le_bytes().to_vec()),
            Value::Bool(v) => (7, vec![u8::from(*v)]),
            Value::U64(v) => (10, v.to_le_bytes().to_vec()),
            Value::Text(_) => (8, vec![]),
            Value::Texts(_) | Value::I32s(_) | Value::F32s(_) => (9, vec![]),
            Value::Raw(kind, bytes) => (*kind, bytes.clone()),
        };
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
        match self {
            Value::Text(text) => string(out, text),
            Value::Texts(texts) => array(out, 8, texts, |out, t| string(out, t)),
            Value::I32s(values) => array(out, 5, values, |out, v| out.extend(v.to_le_bytes())),
            Value::F32s(values) => array(out, 6, values, |out, v| out.extend(v.to_le_bytes())),
            _ => {}
        }
    }
}

impl File {
    pub fn set(&mut self, key: &str, value: Value) {
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.to_owned(), value));
    }

    pub fn without(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key);
    }

    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        const ALIGNMENT: usize = 32;
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            string(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(ALIGNMENT);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend(&tensor.bytes);
        }
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }
}

/// ggml's number of a type.
pub fn ggml_type(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::BF16 => 30,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        other => panic!("{other:?} is not tested"),
    }
}

/// llama.cpp's name of a Hugging Face tensor.
fn name(hugging_face: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs
        .iter()
        .fold(hugging_face.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Rows in ggml's rotary order, as llama.cpp's converter makes it: `[heads, 2, half] -> [heads, half, 2]`.
fn interleave(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (width, half) = (values.len() / rows, rows / heads / 2);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for pair in 0..half {
            for side in 0..2 {
                let row = (head * 2 + side) * half + pair;
                out.extend_from_slice(&values[row * width..][..width]);
            }
        }
    }
    out
}

/// A random model as the GGUF file, with matrices of the type `kind`, and in the directory `reference` as f32
/// safetensors with exactly the values that the GGUF file's blocks decode to.
pub fn model(spec: &Spec, kind: GgmlDType, seed: u64, reference: &Path) -> File {
    let values: BTreeMap<_, _> = spec.write(reference, seed).into_iter().collect();
    let architecture = match spec.architecture {
        "LlamaForCausalLM" => "llama",
        _ => "qwen2",
    };
    let mut file = File::default();
    let number = |n: usize| Value::U32(n as u32);
    file.set("general.architecture", Value::Text(architecture.into()));
    let mut set = |key: &str, value: Value| file.set(&format!("{architecture}.{key}"), value);
    set("context_length", Value::U32(512));
    set("embedding_length", number(spec.hidden));
    set("block_count", number(spec.layers));
    set("feed_forward_length", number(spec.inner));
    set("attention.head_count", number(spec.heads));
    set("attention.head_count_kv", number(spec.kv_heads));
    set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    set("rope.freq_base", Value::F32(spec.theta as f32));
    if let Some(dim) = spec.head_dim {
        set("attention.key_length", number(dim));
        set("attention.value_length", number(dim));
        set("rope.dimension_count", number(dim));
    }
    let mut decoded: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (hugging_face, (shape, values)) in values {
        let heads = match hugging_face.rsplit('.').nth(1) {
            Some("q_proj") if architecture == "llama" => Some(spec.heads),
            Some("k_proj") if architecture == "llama" => Some(spec.kv_heads),
            _ => None,
        };
        let kind = if shape.len() == 1 { GgmlDType::F32 } else { kind };
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape.clone(), &Device::Cpu).unwrap();
        // Blocks run along rows, so that reordering rows and quantising them commute.
        let plain = QTensor::quantize(&tensor(values.clone()), kind).unwrap();
        let stored = match heads {
            Some(heads) => QTensor::quantize(&tensor(interleave(&values, shape[0], heads)), kind).unwrap(),
            None => QTensor::quantize(&tensor(values), kind).unwrap(),
        };
        let values = plain
            .dequantize(&Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        file.tensors.push(Stored {
            name: name(&hugging_face),
            dims: shape.iter().rev().map(|dim| *dim as u64).collect(),
            kind: ggml_type(kind),
            bytes: stored.data().unwrap().to_vec(),
            offset: None,
        });
        decoded.push((hugging_face, shape, values));
    }
    let bytes: Vec<Vec<u8>> = decoded
        .iter()
        .map(|(_, _, v)| bytemuck::cast_slice(v).to_vec())
        .collect();
    let views = decoded.iter().zip(&bytes);
    let views =
        views.map(|((name, shape, _), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &reference.join("model.safetensors")).unwrap();
    file
}

/// Adds a byte-level vocabulary like that of `tokenizer`, the `tokenizer.json` of a Hugging Face model.
pub fn add_tokenizer(file: &mut File, tokenizer: &serde_json::Value, pre: &str) {
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![(String::new(), 5); vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = (token.clone(), 1);
    }
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        let kind = if added["special"] == true { 3 } else { 4 };
        tokens[added["id"].as_u64().unwrap() as usize] = (added["content"].as_str().unwrap().to_owned(), kind);
    }
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()));
    file.set("tokenizer.ggml.model", Value::Text("gpt2".into()));
    file.set("tokenizer.ggml.pre", Value::Text(pre.into()));
    file.set("tokenizer.ggml.merges", Value::Texts(merges.collect()));
    file.set(
        "tokenizer.ggml.token_type",
        Value::I32s(tokens.iter().map(|t| t.1).collect()),
    );
    file.set(
        "tokenizer.ggml.tokens",
        Value::Texts(tokens.into_iter().map(|t| t.0).collect()),
    );
    file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    file.set(
        "tokenizer.chat_template",
        Value::Text("{{ messages[0].content }}".into()),
    );
}

/// The demo model's `tokenizer.json`.
pub fn demo_tokenizer() -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model/tokenizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A model a little larger than the demo model's vocabulary, with that vocabulary.
pub fn with_tokenizer(pre: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        vocab: 1030,
        layers: 1,
        ..Spec::llama()
    };
    let mut file = model(&spec, GgmlDType::F32, 1, dir.path());
    add_tokenizer(&mut file, &demo_tokenizer(), pre);
    let path = dir.path().join("model.gguf");
    file.write(&path);
    (dir, path)
}
