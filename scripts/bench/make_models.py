#!/usr/bin/env python3
"""Makes models with random weights of real shapes, to measure engines on: the speed of a dense decoder does not depend
on what its weights say.

Per shape a Hugging Face directory in bf16 and GGUF files (BF16, Q8_0, Q4_0) of the same weights, each with a working
tokenizer of the shape's vocabulary size. The same seed makes the same files. Tensors are made and written one by one.

    pip install gguf numpy
    scripts/bench/make_models.py --out models                    # both shapes, all formats
    scripts/bench/make_models.py --out models --shape qwen2.5-0.5b --format hf,q8_0

As llama-quantize does for a model whose head is its embedding, the Q4_0 file keeps the embedding in 8 bits.
"""

import argparse
import json
import math
import re
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

# The split of text before BPE that each family uses; GGUF names it instead ("pre").
DIGITS = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass
class Shape:
    """What a model is, apart from its weights."""

    arch: str  # of GGUF
    hf_class: str
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    eps: float
    context: int
    qkv_bias: bool
    pre: str
    eos: str
    bos: str
    template: str
    specials: dict = field(default_factory=dict)
    llama3_scaling: dict = field(default_factory=dict)


SHAPES = {
    "qwen2.5-0.5b": Shape(
        arch="qwen2", hf_class="Qwen2ForCausalLM", vocab=151936, hidden=896, inner=4864, layers=24, heads=14,
        kv_heads=2, head_dim=64, theta=1e6, eps=1e-6, context=32768, qkv_bias=True, pre="qwen2", eos="<|im_end|>",
        bos="<|endoftext|>", template=CHATML,
        specials={151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
    ),
    "llama-3.2-1b": Shape(
        arch="llama", hf_class="LlamaForCausalLM", vocab=128256, hidden=2048, inner=8192, layers=16, heads=32,
        kv_heads=8, head_dim=64, theta=5e5, eps=1e-5, context=131072, qkv_bias=False, pre="llama-bpe",
        eos="<|eot_id|>", bos="<|begin_of_text|>", template=LLAMA3,
        specials={
            128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128006: "<|start_header_id|>",
            128007: "<|end_header_id|>", 128009: "<|eot_id|>",
        },
        llama3_scaling={
            "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    ),
    # Small enough to try the scripts in seconds.
    "tiny": Shape(
        arch="qwen2", hf_class="Qwen2ForCausalLM", vocab=4096, hidden=128, inner=256, layers=2, heads=4, kv_heads=2,
        head_dim=32, theta=1e6, eps=1e-6, context=8192, qkv_bias=True, pre="qwen2", eos="<|im_end|>",
        bos="<|endoftext|>", template=CHATML,
        specials={4000: "<|endoftext|>", 4001: "<|im_start|>", 4002: "<|im_end|>"},
    ),
}

QUANT = gguf.GGMLQuantizationType
GGUF_FORMATS = {
    "bf16": (QUANT.BF16, QUANT.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (QUANT.Q8_0, QUANT.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (QUANT.Q4_0, QUANT.Q8_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


@dataclass
class Spec:
    """A tensor: its names in both worlds and what it is filled with."""

    hf: str
    gguf: str
    shape: tuple
    kind: str  # matrix, embedding, bias, norm
    permuted_heads: int = 0  # rows that GGUF's llama wants in another order


def tensors(s):
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    out = [Spec("model.embed_tokens.weight", "token_embd.weight", (s.vocab, s.hidden), "embedding")]
    q_perm, k_perm = (s.heads, s.kv_heads) if s.arch == "llama" else (0, 0)
    for i in range(s.layers):
        hf, gg = f"model.layers.{i}.", f"blk.{i}."
        out += [
            Spec(hf + "input_layernorm.weight", gg + "attn_norm.weight", (s.hidden,), "norm"),
            Spec(hf + "self_attn.q_proj.weight", gg + "attn_q.weight", (q, s.hidden), "matrix", q_perm),
            Spec(hf + "self_attn.k_proj.weight", gg + "attn_k.weight", (kv, s.hidden), "matrix", k_perm),
            Spec(hf + "self_attn.v_proj.weight", gg + "attn_v.weight", (kv, s.hidden), "matrix"),
        ]
        if s.qkv_bias:
            out += [
                Spec(hf + "self_attn.q_proj.bias", gg + "attn_q.bias", (q,), "bias"),
                Spec(hf + "self_attn.k_proj.bias", gg + "attn_k.bias", (kv,), "bias"),
                Spec(hf + "self_attn.v_proj.bias", gg + "attn_v.bias", (kv,), "bias"),
            ]
        out += [
            Spec(hf + "self_attn.o_proj.weight", gg + "attn_output.weight", (s.hidden, q), "matrix"),
            Spec(hf + "post_attention_layernorm.weight", gg + "ffn_norm.weight", (s.hidden,), "norm"),
            Spec(hf + "mlp.gate_proj.weight", gg + "ffn_gate.weight", (s.inner, s.hidden), "matrix"),
            Spec(hf + "mlp.up_proj.weight", gg + "ffn_up.weight", (s.inner, s.hidden), "matrix"),
            Spec(hf + "mlp.down_proj.weight", gg + "ffn_down.weight", (s.hidden, s.inner), "matrix"),
        ]
    return out + [Spec("model.norm.weight", "output_norm.weight", (s.hidden,), "norm")]


def values(spec, seed, index, std):
    """The tensor as f32 numbers that bf16 holds exactly. Every tensor has its own random stream."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    noise = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(std)
    if spec.kind == "norm":
        noise += np.float32(1.0)
    bits = noise.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # round to nearest, ties to even
    bits &= 0xFFFF0000
    return noise


def permute(rows, heads):
    """The two halves of a head, interleaved: the layout of GGUF's llama architecture."""
    head_rows = rows.shape[0] // heads
    return np.ascontiguousarray(
        rows.reshape(heads, 2, head_rows // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    )


def byte_alphabet():
    """Byte-level BPE's character for each byte: printable ones are themselves, the rest follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    chars = {b: chr(b) for b in plain}
    return chars | {b: chr(0x100 + n) for n, b in enumerate(others)}


def bench_words():
    """The words that `baton bench` makes prompts of, so that each is one token."""
    source = Path(__file__).resolve().parents[2] / "loadtest/src/prompt.rs"
    listed = re.search(r"const WORDS.*?=\s*\[(.*?)\];", source.read_text(), re.S)
    return re.findall(r'"(\w+)"', listed[1]) if listed else []


def vocabulary(s):
    """Tokens by id, and merges: bytes, the words of `baton bench` behind a space, fillers, special tokens."""
    alphabet = byte_alphabet()
    tokens, merges = [alphabet[b] for b in range(256)], []
    known, space = set(tokens), alphabet[0x20]
    for word in bench_words():
        prefix = space
        for letter in word:
            if prefix + letter not in known:
                merges.append((prefix, letter))
                tokens.append(prefix + letter)
                known.add(prefix + letter)
            prefix += letter
    fillers = (f"{space}w{n}" for n in range(s.vocab))
    while len(tokens) < s.vocab:
        tokens.append(s.specials.get(len(tokens)) or next(fillers))
    return tokens, merges


def tokenizer_json(s, tokens, merges):
    split = {"type": "Split", "pattern": {"Regex": SPLIT % DIGITS[s.pre]}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, **special} for i, text in s.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            # Special tokens too: added tokens that the vocabulary lacks are renumbered from its end on.
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def id_of(s, text):
    return next(i for i, t in s.specials.items() if t == text)


def write_hf_config(s, directory, tokens, merges):
    config = {
        "architectures": [s.hf_class], "model_type": s.arch, "vocab_size": s.vocab, "hidden_size": s.hidden,
        "intermediate_size": s.inner, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "max_position_embeddings": s.context,
        "rms_norm_eps": s.eps, "rope_theta": s.theta, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_dropout": 0.0, "torch_dtype": "bfloat16", "bos_token_id": id_of(s, s.bos),
        "eos_token_id": id_of(s, s.eos),
    }
    if s.llama3_scaling:
        config["rope_scaling"] = s.llama3_scaling
    if s.arch == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer_json(s, tokens, merges),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": s.context, "bos_token": s.bos,
            "eos_token": s.eos, "chat_template": s.template, "add_bos_token": False,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))


class Safetensors:
    """Writes one bf16 safetensors file, tensor by tensor in the order of `specs`."""

    def __init__(self, path, specs):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for spec in specs:
            end = offset + 2 * math.prod(spec.shape)
            header[spec.hf] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.file = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)

    def write(self, _spec, data):
        (data.view(np.uint32) >> 16).astype("<u2").tofile(self.file)

    def close(self):
        self.file.close()


class Gguf:
    """Writes one GGUF file, tensor by tensor in the order of `specs`."""

    def __init__(self, path, name, s, specs, fmt, tokens, merges):
        self.matrix, self.embedding, file_type = GGUF_FORMATS[fmt]
        w = self.writer = gguf.GGUFWriter(path, s.arch)
        w.add_name(f"{name} shape, random weights")
        w.add_file_type(file_type)
        w.add_quantization_version(gguf.GGML_QUANT_VERSION)
        w.add_vocab_size(s.vocab)
        w.add_context_length(s.context)
        w.add_embedding_length(s.hidden)
        w.add_feed_forward_length(s.inner)
        w.add_block_count(s.layers)
        w.add_head_count(s.heads)
        w.add_head_count_kv(s.kv_heads)
        w.add_key_length(s.head_dim)
        w.add_value_length(s.head_dim)
        w.add_rope_dimension_count(s.head_dim)
        w.add_rope_freq_base(s.theta)
        w.add_layer_norm_rms_eps(s.eps)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(s.pre)
        w.add_token_list(tokens)
        control = gguf.TokenType.CONTROL
        w.add_token_types([control if i in s.specials else gguf.TokenType.NORMAL for i in range(s.vocab)])
        w.add_token_merges([" ".join(pair) for pair in merges])
        w.add_bos_token_id(id_of(s, s.bos))
        w.add_eos_token_id(id_of(s, s.eos))
        w.add_add_bos_token(False)
        w.add_chat_template(s.template)
        self.rope_factors = llama3_factors(s) if s.llama3_scaling else None
        if self.rope_factors is not None:
            w.add_tensor_info("rope_freqs.weight", self.rope_factors.shape, np.dtype(np.float32), self.rope_factors.nbytes)
        for spec in specs:
            kind = self.type_of(spec)
            if kind is None:
                w.add_tensor_info(spec.gguf, spec.shape, np.dtype(np.float32), 4 * math.prod(spec.shape))
            else:
                block, size = gguf.GGML_QUANT_SIZES[kind]
                row_bytes = spec.shape[-1] // block * size
                shape = (*spec.shape[:-1], row_bytes)
                w.add_tensor_info(spec.gguf, shape, np.dtype(np.uint8), math.prod(shape), kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        if self.rope_factors is not None:
            w.write_tensor_data(self.rope_factors)

    def type_of(self, spec):
        return {"matrix": self.matrix, "embedding": self.embedding}.get(spec.kind)

    def write(self, spec, data):
        kind = self.type_of(spec)
        if spec.permuted_heads:
            data = permute(data, spec.permuted_heads)
        self.writer.write_tensor_data(data if kind is None else gguf.quants.quantize(data, kind))

    def close(self):
        self.writer.close()


def llama3_factors(s):
    """Divisors of the rotary frequencies (llama3 scaling), as GGUF stores them."""
    p = s.llama3_scaling
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    factors = []
    for i in range(0, s.head_dim, 2):
        wavelength = 2 * math.pi * s.theta ** (i / s.head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


class ProgressLine:
    """One line that changes on a terminal, a line every few seconds elsewhere."""

    def __init__(self, what, total):
        self.what, self.total, self.start, self.shown = what, total, time.monotonic(), 0.0

    def update(self, done):
        now, last = time.monotonic(), done == self.total
        live = sys.stderr.isatty()
        if not last and now - self.shown < (0.1 if live else 5):
            return
        self.shown = now
        line = f"{self.what}: {100 * done // self.total:3d} % of {self.total / 1e6:.0f} M weights, {now - self.start:.0f} s"
        sys.stderr.write(f"\r{line}" + ("\n" if last else "") if live else line + "\n")
        sys.stderr.flush()


def make(name, out, formats, seed, std):
    s = SHAPES[name]
    specs = tensors(s)
    tokens, merges = vocabulary(s)
    writers = []
    if "hf" in formats:
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        write_hf_config(s, directory, tokens, merges)
        writers.append(Safetensors(directory / "model.safetensors", specs))
    for fmt in [f for f in formats if f in GGUF_FORMATS]:
        path = out / f"{name}-{fmt}.gguf"
        writers.append(Gguf(path, name, s, specs, fmt, tokens, merges))
    progress = ProgressLine(name, sum(math.prod(spec.shape) for spec in specs))
    done = 0
    for index, spec in enumerate(specs):
        data = values(spec, seed, index, std)
        for writer in writers:
            writer.write(spec, data)
        done += data.size
        progress.update(done)
    for writer in writers:
        writer.close()


def main():
    formats = ["hf", *GGUF_FORMATS]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="directory to write to")
    p.add_argument("--shape", default="qwen2.5-0.5b,llama-3.2-1b", help=f"of {', '.join(SHAPES)} (default: %(default)s)")
    p.add_argument("--format", default=",".join(formats), help="default: %(default)s")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights (default: %(default)s)")
    args = p.parse_args()
    shapes, wanted = args.shape.split(","), args.format.split(",")
    for given, known in [(shapes, SHAPES), (wanted, formats)]:
        for item in given:
            if item not in known:
                p.error(f"unknown: {item}; known are {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in shapes:
        make(name, args.out, wanted, args.seed, args.std)


if __name__ == "__main__":
    main()
