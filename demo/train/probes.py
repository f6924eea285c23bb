"""Checks with a known answer, drawn with held-out values.

What it is for: conversations whose last assistant turn tests one skill; train.py
scores them while training and eval/make_heldout.py draws the shipped set from
them.  Nothing here is trained on: values come from the held-out lists.

What it is not for: grading a running server (eval/eval.py).
"""
import random

from data import EVENTS, Chat, Values

FILLER = [(n, w) for n, w in EVENTS if n not in ("list_tell", "again")]
CATEGORIES = ["recall", "update", "missing", "two", "repeat", "list", "know", "unknown"]


def probe(category: str, r: random.Random, size: int, held: bool = True, system: bool = False) -> Chat:
    """A chat of about `size` tokens ending in an exchange of the category.
    chat.target is (slot, value) or (items, text) where there is one."""
    c = Chat(r, Values(r, held))
    c.target = None
    if system:
        c.messages.append({"role": "system", "content": "You are a helpful assistant."})
    slot = None
    if category in ("recall", "update"):
        for _ in range(r.choice([0, 0, 1, 2])):
            c.tell()
        before = set(c.facts)
        while not set(c.facts) - before:
            c.tell()
        slot = (set(c.facts) - before).pop()
    elif category == "two":
        c.facts.clear()
        while sum(s[0] == "name" or s[0] == "is" and s[2] == "my" for s in c.facts) < 2:
            c.tell()
    elif category == "list":
        c.list_tell()
    names, weights = zip(*FILLER)

    def fill(limit):
        while sum(12 + len(m["content"]) // 3 for m in c.messages) < limit:
            e = r.choices(names, weights)[0]
            getattr(c, "ask" if e == "tell" and len(c.facts) >= 8 else e)()

    if category == "update":
        fill(size * r.random())
        old = c.facts[slot]
        for _ in range(9):
            v = c.v.get(slot[3])
            if v.lower() != old.lower():
                break
        c.facts.pop(slot)
        c.facts[slot] = v
        c.say(c.pattern(slot, "update", v), c.pattern(slot, "upack", v))
        c.old = old
    fill(size)
    n = len(c.messages)
    while len(c.messages) == n:
        if category in ("recall", "update"):
            c.ask(slot)
            c.target = (slot, c.facts[slot])
        elif category == "list":
            c.list_ask()
            c.target = c.list
        else:
            getattr(c, {"missing": "ask_missing", "two": "ask_two"}.get(category, category))()
    return c
