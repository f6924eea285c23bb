"""Optimiser of the demo model: Muon for matrices, Adam for the rest.

What it is for: the matrices of the layers take momentum steps that are
orthogonalised by a few Newton-Schulz iterations (Muon), which needs fewer
tokens than Adam; embeddings and norm weights take Adam steps.

What it is not for: the learning-rate schedule (train.py).
"""
import jax
import jax.numpy as jnp


def is_matrix(name: str, v) -> bool:
    return v.ndim == 2 and "embed" not in name


def orthogonalise(g, steps: int = 5):
    """Approximate U V^T of g = U S V^T (quintic Newton-Schulz iteration)."""
    flip = g.shape[0] > g.shape[1]
    x = g.T if flip else g
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.T if flip else x


def init(params: dict) -> dict:
    zeros = {k: jnp.zeros_like(v) for k, v in params.items()}
    second = {k: jnp.zeros_like(v) for k, v in params.items() if not is_matrix(k, v)}
    return {"m": zeros, "v": second, "t": jnp.zeros((), jnp.float32)}


def update(params: dict, grads: dict, state: dict, lr, clip: float = 1.0, decay: float = 0.02):
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
    scale = jnp.minimum(1.0, clip / (norm + 1e-9))
    t = state["t"] + 1
    m, v, new = {}, {}, {}
    for k, p in params.items():
        g = grads[k] * scale
        if is_matrix(k, p):
            m[k] = 0.95 * state["m"][k] + g
            u = orthogonalise(g + 0.95 * m[k])
            # 0.2 sqrt(n) gives the step the size that an Adam step would have.
            new[k] = p * (1 - lr * decay) - lr * 0.2 * max(p.shape) ** 0.5 * u
        else:
            m[k] = 0.9 * state["m"][k] + 0.1 * g
            v[k] = 0.98 * state["v"][k] + 0.02 * g * g
            new[k] = p - lr * (m[k] / (1 - 0.9**t)) / (jnp.sqrt(v[k] / (1 - 0.98**t)) + 1e-9)
    return new, {"m": m, "v": v, "t": t}
