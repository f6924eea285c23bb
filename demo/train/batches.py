"""Tokenise conversations and pack them into training rows.

What it is for: rows of fixed length holding several conversations, with the
arrays that keep them apart (`doc`, `pos`) and the loss weights, which are 1 on
assistant text including its <|im_end|> and 0 elsewhere.

What it is not for: what the conversations say (data.py).
"""
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import data

MODEL_DIR = Path(__file__).parent.parent / "model"
_tok = None


def tokenizer() -> Tokenizer:
    global _tok
    if _tok is None:
        _tok = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    return _tok


def encode(messages: list[dict], last_only: bool = False) -> tuple[list[int], list[int]]:
    """Token ids and 0/1 marks of the tokens that the assistant has to produce
    (of the last turn only, if asked)."""
    tok = tokenizer()
    end = tok.token_to_id("<|im_end|>")
    ids = tok.encode(data.render(messages), add_special_tokens=False).ids
    start = tok.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
    marks, on, n = [0] * len(ids), False, len(start)
    for i in range(len(ids)):
        if on:
            marks[i] = 1
            on = ids[i] != end
        elif ids[max(0, i - n + 1):i + 1] == start:
            on = True
            if last_only:
                marks = [0] * len(ids)
    return ids, marks


def pack(convs, rows: int, length: int):
    """Fill a batch from an iterator of (ids, marks)."""
    ids = np.zeros((rows, length + 1), np.int32)
    mark = np.zeros((rows, length + 1), np.float32)
    doc = np.full((rows, length + 1), -1, np.int32)
    pos = np.zeros((rows, length + 1), np.int32)
    for b in range(rows):
        at, d = 0, 0
        while at < length - 24:
            c, m = next(convs)
            n = min(len(c), length + 1 - at)
            ids[b, at:at + n], mark[b, at:at + n] = c[:n], m[:n]
            doc[b, at:at + n], pos[b, at:at + n] = d, np.arange(n)
            at, d = at + n, d + 1
    # A target counts only if it continues the conversation of its input.
    weight = mark[:, 1:] * (doc[:, 1:] == doc[:, :-1])
    return ids[:, :-1], pos[:, :-1], doc[:, :-1], ids[:, 1:], weight


def make_batches(seed: int, count: int, tokens: int, lengths: list[int], probs: list[float], drill: float) -> list:
    """`count` batches, each of one row length; a pure function of its arguments."""
    r = random.Random(seed)
    out = []
    for _ in range(count):
        length = r.choices(lengths, probs)[0]

        def convs():
            while True:
                yield encode(data.conversation(r, data.sample_size(r, length), drill=r.random() < drill))

        out.append(pack(convs(), tokens // length, length))
    return out
