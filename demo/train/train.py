"""Train the demo model on generated conversations.

What it is for: one run from random weights to a checkpoint, on a CPU, with
progress lines on the terminal and in a log file, and a checkpoint every few
minutes so that it can be stopped at any time.

What it is not for: writing the shipped files (export.py).

The schedule follows the share of the budget that is used up.  With --steps the
run is reproducible; with --minutes it fits a wall clock instead.
"""
import argparse
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import batches
import model
import optimizer
import probes

LENGTHS = [256, 512, 1024]


def mixture(x: float) -> tuple[list[float], float]:
    """Row-length probabilities and share of copying drills at progress x.
    Short drills first, so that the copying circuits form early and cheaply."""
    if x < 0.10:
        return [1.0, 0.0, 0.0], 0.8
    if x < 0.35:
        return [0.70, 0.25, 0.05], 0.35
    if x < 0.75:
        return [0.55, 0.30, 0.15], 0.3
    return [0.45, 0.30, 0.25], 0.2


def learning_rate(x: float, peak: float) -> float:
    warm = 0.006
    if x < warm:
        return peak * max(x, 1e-4) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (x - warm) / (1 - warm)))))


def probe_batches(seed: int):
    """Held-out probes as (category, size class, arrays), packed one per row."""
    out = []
    for category in probes.CATEGORIES:
        for size, count, length in ((110, 24, 256), (620, 5, 1024)):
            r, rows = random.Random(f"{seed} {category} {size}"), []
            while len(rows) < count:
                ids, marks = batches.encode(probes.probe(category, r, size).messages, last_only=True)
                if len(ids) <= length:
                    rows.append((ids, marks))
            ids = np.zeros((count, length + 1), np.int32)
            mark = np.zeros((count, length + 1), np.float32)
            for b, (i, m) in enumerate(rows):
                ids[b, :len(i)], mark[b, :len(i)] = i, m
            pos = np.tile(np.arange(length, dtype=np.int32), (count, 1))
            out.append((category, length, (ids[:, :-1], pos, np.zeros_like(pos), ids[:, 1:], mark[:, 1:])))
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--minutes", type=float, default=0)
    ap.add_argument("--steps", type=int, default=0)
    ap.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--out", default="run", help="folder for checkpoint and log")
    ap.add_argument("--eval-every", type=int, default=250)
    ap.add_argument("--init", help="checkpoint to start from instead of random weights")
    ap.add_argument("--start", type=float, default=0.0, help="progress to start the schedule at (with --init)")
    args = ap.parse_args()
    assert args.minutes or args.steps
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    log_file = open(out / "train.log", "a", buffering=1)

    def log(s):
        print(s, flush=True)
        log_file.write(s + "\n")

    cfg = model.Config()
    params = {k: jnp.asarray(v) for k, v in load_file(args.init).items()} if args.init else model.init_params(cfg, args.seed)
    # With several (virtual) devices the rows of a batch are divided among them;
    # on a CPU this uses the cores better than threads inside one operation do.
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    everywhere, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    params = jax.device_put(params, everywhere)
    state = jax.device_put(optimizer.init(params), everywhere)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, lr, batch):
        (loss, acc), g = jax.value_and_grad(lambda p: model.loss_fn(cfg, p, *batch), has_aux=True)(params)
        new, state = optimizer.update(params, g, state, lr)
        return new, state, loss, acc

    @jax.jit
    def exact(params, batch):
        """Rows whose every supervised token is the argmax: greedy decoding would
        give exactly this answer."""
        ids, pos, doc, target, weight = batch
        best = model.logits_of(params, model.forward(cfg, params, ids, pos, doc)).argmax(-1)
        return ((best == target) | (weight == 0)).all(-1).mean()

    def evaluate(tag):
        scores = {}
        for category, length, batch in probe_set:
            scores.setdefault(length, []).append((category, float(exact(params, batch))))
        for length, row in scores.items():
            log(f"eval {tag} T={length} " + " ".join(f"{c}={s:.2f}" for c, s in row))

    def save():
        save_file({k: np.asarray(v) for k, v in params.items()}, out / "last.tmp")
        (out / "last.tmp").rename(out / "last.safetensors")

    log(f"# {args} params={sum(v.size for v in params.values())} {cfg}")
    probe_set = probe_batches(99)
    chunk = 10  # batches per request to the generator process
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        def request(n, x):
            probs, drill = mixture(x)
            return pool.submit(batches.make_batches, args.seed * 1_000_003 + n, chunk, args.tokens, LENGTHS, probs, drill)

        began, n, seen, x, losses = time.time(), 0, 0, args.start, []
        pending = [request(0, x), request(1, x)]
        requested = 2
        while x < 1.0:
            for batch in pending.pop(0).result():
                x = args.start + (1 - args.start) * (n / args.steps if args.steps else (time.time() - began) / 60 / args.minutes)
                # A short ramp lets the moment estimates settle, also when resuming.
                lr = learning_rate(x, args.lr) * min(1.0, (n + 1) / 30)
                params, state, loss, acc = step(params, state, lr, jax.device_put(batch, by_row))
                losses.append((loss, acc))
                n += 1
                seen += args.tokens
                if n % 25 == 0:
                    l, a = (sum(float(v[i]) for v in losses) / len(losses) for i in (0, 1))
                    losses = []
                    dt = time.time() - began
                    log(f"step {n} progress {x:.3f} loss {l:.4f} acc {a:.4f} lr {lr:.2e} tokens {seen/1e6:.2f}M {dt:.0f}s {seen/dt:.0f} tok/s")
                if n % args.eval_every == 0:
                    evaluate(f"step {n}")
                if n % 50 == 0:
                    save()
            pending.append(request(requested, x))
            requested += 1
    save()
    evaluate("final")
    log(f"# done: {n} steps, {seen/1e6:.2f}M tokens, {(time.time() - began)/60:.1f} minutes")


if __name__ == "__main__":
    main()
