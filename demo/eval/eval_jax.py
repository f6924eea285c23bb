#!/usr/bin/env python3
"""Run the held-out set, or a chat on the terminal, with the JAX model directly.

What it is for: the accuracy of the shipped bfloat16 weights without a server
(`eval_jax.py`), and trying the model by hand (`eval_jax.py --chat`).

What it is not for: speed; it decodes one conversation at a time.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import data
import model
from eval import load, report, summarise

MODEL_DIR = Path(__file__).parent.parent / "model"
WINDOW = 64  # prompts are fed in windows of this size: few shapes to compile


class Runner:
    """Greedy decoding with a KV cache."""

    def __init__(self, weights: Path, folder: Path = MODEL_DIR, room: int = 1536):
        fields = model.Config.__dataclass_fields__
        self.cfg = model.Config(**{k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k in fields})
        self.tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Rounded to bfloat16, as shipped, whatever the file holds; computed in float32.
        self.params = {k: jnp.asarray(v, jnp.bfloat16).astype(jnp.float32) for k, v in load_file(weights).items()}
        self.room, self.end = room, self.tok.token_to_id("<|im_end|>")

    @partial(jax.jit, static_argnums=0)
    def feed(self, params, cache, ids, at):
        """Run ids (1, n) from position `at`; returns logits of every one."""
        n = ids.shape[1]
        pos = at + jnp.arange(n)[None]
        mask = jnp.arange(self.room)[None, None] <= pos[..., None]
        x, new = params["model.embed_tokens.weight"][ids], []
        for i in range(self.cfg.num_hidden_layers):
            x, c = model.block(self.cfg, params, i, x, pos, mask, cache[i], at)
            new.append(c)
        return model.logits_of(params, model.rms_norm(x, params["model.norm.weight"], self.cfg.rms_norm_eps))[0], new

    def complete(self, messages: list[dict], max_tokens: int = 80) -> str:
        ids = self.tok.encode(data.render(messages) + "<|im_start|>assistant\n", add_special_tokens=False).ids
        shape = (1, self.room, self.cfg.num_key_value_heads, self.cfg.head_dim)
        cache = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.cfg.num_hidden_layers)]
        for at in range(0, len(ids), WINDOW):
            part = ids[at:at + WINDOW]
            # Padding of the last window is overwritten by the tokens that follow.
            logits, cache = self.feed(self.params, cache, jnp.asarray([part + [0] * (WINDOW - len(part))]), at)
        best, out, at = int(logits[len(part) - 1].argmax()), [], len(ids)
        while best != self.end and len(out) < max_tokens:
            out.append(best)
            logits, cache = self.feed(self.params, cache, jnp.asarray([[best]]), at)
            best, at = int(logits[0].argmax()), at + 1
        return self.tok.decode(out)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--weights", default=str(MODEL_DIR / "model.safetensors"))
    ap.add_argument("--chat", action="store_true", help="chat on the terminal; an empty line starts afresh")
    ap.add_argument("--min", type=float, default=0.9)
    ap.add_argument("--json", action="store_true")
    args = ap.parse_args()
    run = Runner(Path(args.weights))
    if args.chat:
        messages = []
        for line in sys.stdin:
            if not line.strip():
                messages = []
                print("--")
                continue
            messages.append({"role": "user", "content": line.strip()})
            messages.append({"role": "assistant", "content": run.complete(messages)})
            print(f"> {line.strip()}\n  {messages[-1]['content']}", flush=True)
        return 0
    cases = load()
    result = summarise(cases, [run.complete(c["messages"]) for c in cases])
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else report(result))
    return 0 if result["share"] >= args.min else 1


if __name__ == "__main__":
    sys.exit(main())
