#!/usr/bin/env python3
"""Compare the exported model with the JAX forward pass, by an independent path.

What it is for: reads the safetensors file byte by byte (no safetensors, no JAX)
and computes logits with plain numpy from config.json alone, one head at a time,
the way a server would; then compares with JAX on conversations of the held-out
set.  Fails above a small difference or on any different argmax.

What it is not for: accuracy (eval_jax.py).
"""
import json
import struct
import sys
from pathlib import Path

import numpy as np

MODEL_DIR = Path(__file__).parent.parent / "model"
sys.path.insert(0, str(Path(__file__).parent.parent / "train"))


def read_safetensors(path: Path) -> dict:
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    out = {}
    for name, info in json.loads(raw[8:8 + n]).items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16", info
        a, b = info["data_offsets"]
        half = np.frombuffer(raw[8 + n + a:8 + n + b], "<u2").astype(np.uint32)
        out[name] = (half << 16).view(np.float32).reshape(info["shape"])  # bfloat16 is the upper half of float32
    return out


def norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def rotate(x, theta):
    """RoPE on (T, D), Hugging Face's rotate-half convention."""
    t, d = x.shape
    ang = np.arange(t)[:, None] / theta ** (np.arange(0, d, 2) / d)[None]
    cos, sin = np.tile(np.cos(ang), 2), np.tile(np.sin(ang), 2)
    return x * cos + np.concatenate([-x[:, d // 2:], x[:, :d // 2]], 1) * sin


def logits(w: dict, c: dict, ids: list[int]) -> np.ndarray:
    x = w["model.embed_tokens.weight"][ids].astype(np.float64)
    t, hd, group = len(ids), c["head_dim"], c["num_attention_heads"] // c["num_key_value_heads"]
    ahead = np.triu(np.ones((t, t), bool), 1)
    for n in range(c["num_hidden_layers"]):
        p = f"model.layers.{n}."
        y = norm(x, w[p + "input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = (y @ w[p + f"self_attn.{s}_proj.weight"].T for s in "qkv")
        heads = []
        for h in range(c["num_attention_heads"]):
            g = h // group
            s = rotate(q[:, h * hd:(h + 1) * hd], c["rope_theta"]) @ rotate(k[:, g * hd:(g + 1) * hd], c["rope_theta"]).T
            s = np.where(ahead, -np.inf, s / np.sqrt(hd))
            s = np.exp(s - s.max(-1, keepdims=True))
            heads.append(s / s.sum(-1, keepdims=True) @ v[:, g * hd:(g + 1) * hd])
        x = x + np.concatenate(heads, 1) @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, w[p + "post_attention_layernorm.weight"], c["rms_norm_eps"])
        gate = y @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"], c["rms_norm_eps"]) @ w["model.embed_tokens.weight"].T


def main() -> int:
    import jax.numpy as jnp

    import batches
    import model
    from eval import load

    config, weights = json.loads((MODEL_DIR / "config.json").read_text()), read_safetensors(MODEL_DIR / "model.safetensors")
    cfg = model.Config()
    params = {k: jnp.asarray(v) for k, v in weights.items()}
    worst, tokens, differ = 0.0, 0, 0
    for case in load()[::9]:
        ids = batches.encode(case["messages"])[0]
        a = logits(weights, config, ids)
        row = jnp.asarray([ids])
        b = np.asarray(model.logits_of(params, model.forward(cfg, params, row, jnp.arange(len(ids))[None], jnp.zeros_like(row))))[0]
        # Where the two best logits are almost equal the argmax may differ.
        top = np.sort(a, -1)
        differ += int(((a.argmax(-1) != b.argmax(-1)) & (top[:, -1] - top[:, -2] > 1e-3)).sum())
        worst, tokens = max(worst, float(np.abs(a - b).max())), tokens + len(ids)
    print(f"{tokens} tokens, largest logit difference {worst:.2e}, different argmax {differ}")
    return 0 if worst < 1e-2 and differ == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
