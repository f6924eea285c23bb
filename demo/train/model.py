"""The demo model: a plain Llama-architecture transformer in JAX.

What it is for: one definition of the forward pass, used by training, export
checks and the JAX evaluation.  Parameters live in a flat dict under their
Hugging Face names in Hugging Face layout ([out, in]), so exporting is a dump.

What it is not for: serving; the cache in `block` only exists to evaluate
checkpoints with greedy decoding.
"""
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Config:
    vocab_size: int = 1024
    hidden_size: int = 160
    intermediate_size: int = 432
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048


def init_params(cfg: Config, seed: int) -> dict:
    """Random parameters; residual outputs are scaled down by depth."""
    rng = np.random.default_rng(seed)
    d, ff = cfg.hidden_size, cfg.intermediate_size
    q = cfg.num_attention_heads * cfg.head_dim
    kv = cfg.num_key_value_heads * cfg.head_dim
    depth_scale = (2 * cfg.num_hidden_layers) ** -0.5

    def mat(out, inp, scale=1.0):
        return (rng.standard_normal((out, inp)) * (0.7 * scale * inp**-0.5)).astype(np.float32)

    p = {"model.embed_tokens.weight": (rng.standard_normal((cfg.vocab_size, d)) * 0.04).astype(np.float32)}
    for n in range(cfg.num_hidden_layers):
        b = f"model.layers.{n}."
        p[b + "input_layernorm.weight"] = np.ones(d, np.float32)
        p[b + "self_attn.q_proj.weight"] = mat(q, d)
        p[b + "self_attn.k_proj.weight"] = mat(kv, d)
        p[b + "self_attn.v_proj.weight"] = mat(kv, d)
        p[b + "self_attn.o_proj.weight"] = mat(d, q, depth_scale)
        p[b + "post_attention_layernorm.weight"] = np.ones(d, np.float32)
        p[b + "mlp.gate_proj.weight"] = mat(ff, d)
        p[b + "mlp.up_proj.weight"] = mat(ff, d)
        p[b + "mlp.down_proj.weight"] = mat(d, ff, depth_scale)
    p["model.norm.weight"] = np.ones(d, np.float32)
    return {k: jnp.asarray(v) for k, v in p.items()}


def rms_norm(x, w, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rope(x, pos, theta):
    """Rotate-half RoPE (Hugging Face convention). x: [B, T, H, D], pos: [B, T]."""
    half = x.shape[-1] // 2
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    ang = pos[..., None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(ang)[:, :, None, :], jnp.sin(ang)[:, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q, k, v, mask, chunk=256):
    """Grouped-query attention. q: [B,T,H,D]; k,v: [B,S,K,D]; mask: [B,T,S] bool.

    Queries of one KV head are folded into the rows of one matrix product, and
    long rows are cut into query chunks that skip the keys after them: both only
    for speed on a CPU (about 2x). The skipping needs T == S and a causal mask."""
    bsz, t, h, d = q.shape
    s, kvh = k.shape[1], k.shape[2]
    g = h // kvh
    q = (q * d**-0.5).reshape(bsz, t, kvh, g, d).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    outs = []
    for c in range(0, t, chunk):
        e = min(c + chunk, t)
        keys = e if t == s else s
        w = q[:, :, :, c:e].reshape(bsz, kvh, g * (e - c), d) @ k[..., :keys]
        m = jnp.broadcast_to(mask[:, None, None, c:e, :keys], (bsz, 1, g, e - c, keys)).reshape(bsz, 1, g * (e - c), keys)
        w = jnp.where(m, w, -1e30)
        w = jnp.exp(w - jax.lax.stop_gradient(w.max(-1, keepdims=True)))
        w = w / w.sum(-1, keepdims=True)
        outs.append((w @ v[:, :, :keys]).reshape(bsz, kvh, g, e - c, d))
    return jnp.concatenate(outs, 3).transpose(0, 3, 1, 2, 4).reshape(bsz, t, h * d)


def block(cfg, p, n, x, pos, mask, cache=None, at=None):
    """One transformer layer; with `cache` the new K/V are written at index `at`."""
    b = f"model.layers.{n}."
    bsz, t, _ = x.shape
    y = rms_norm(x, p[b + "input_layernorm.weight"], cfg.rms_norm_eps)
    q = (y @ p[b + "self_attn.q_proj.weight"].T).reshape(bsz, t, cfg.num_attention_heads, cfg.head_dim)
    k = (y @ p[b + "self_attn.k_proj.weight"].T).reshape(bsz, t, cfg.num_key_value_heads, cfg.head_dim)
    v = (y @ p[b + "self_attn.v_proj.weight"].T).reshape(bsz, t, cfg.num_key_value_heads, cfg.head_dim)
    q, k = rope(q, pos, cfg.rope_theta), rope(k, pos, cfg.rope_theta)
    if cache is not None:
        k = jax.lax.dynamic_update_slice(cache[0], k, (0, at, 0, 0))
        v = jax.lax.dynamic_update_slice(cache[1], v, (0, at, 0, 0))
        cache = (k, v)
    x = x + attend(q, k, v, mask) @ p[b + "self_attn.o_proj.weight"].T
    y = rms_norm(x, p[b + "post_attention_layernorm.weight"], cfg.rms_norm_eps)
    y = jax.nn.silu(y @ p[b + "mlp.gate_proj.weight"].T) * (y @ p[b + "mlp.up_proj.weight"].T)
    return x + y @ p[b + "mlp.down_proj.weight"].T, cache


def forward(cfg, p, ids, pos, doc):
    """Hidden states of packed rows. `doc` numbers the conversation of each token
    (attention stays inside one conversation), `pos` restarts at 0 in each."""
    t = ids.shape[1]
    causal = jnp.tril(jnp.ones((t, t), bool))
    mask = causal[None] & (doc[:, :, None] == doc[:, None, :])
    x = p["model.embed_tokens.weight"][ids]
    for n in range(cfg.num_hidden_layers):
        x, _ = block(cfg, p, n, x, pos, mask)
    return rms_norm(x, p["model.norm.weight"], cfg.rms_norm_eps)


def logits_of(p, hidden):
    return hidden @ p["model.embed_tokens.weight"].T


def loss_fn(cfg, p, ids, pos, doc, target, weight):
    """Mean cross-entropy over supervised tokens, and their accuracy."""
    lg = logits_of(p, forward(cfg, p, ids, pos, doc))
    lse = jax.nn.logsumexp(lg, axis=-1)
    hit = jnp.take_along_axis(lg, target[..., None], axis=-1)[..., 0]
    total = jnp.maximum(weight.sum(), 1.0)
    acc = ((hit >= lg.max(-1)) * weight).sum() / total
    return ((lse - hit) * weight).sum() / total, acc
