"""Conversation generator of the demo model.

What it is for: an endless, seeded stream of chats.  A conversation is a random
sequence of events (state a fact, change it, ask for it, repeat a list, ask
about baton, small talk, an unknown question); every assistant turn follows
from what was said before, so the target answer is always known.

What it is not for: tokenising and packing (batches.py) or the held-out set
(heldout.py), although that one reuses the same events with held-out values.
"""
import random
import re

import knowledge
import templates as T
import words as W

_GROUP = re.compile(r"\(([^()|]*(?:\|[^()|]*)+|[^()|]* )\)\??")


def expand(r: random.Random, s: str) -> str:
    """Pick one alternative of every "(a|b)" and keep or drop every "(a )?"."""
    def pick(m):
        if m.group(0).endswith("?") and "|" not in m.group(1):
            return m.group(1) if r.random() < 0.5 else ""
        return r.choice(m.group(1).split("|"))
    return _GROUP.sub(pick, s)


def style(r: random.Random, s: str, question: bool) -> str:
    """How a person may type it: case, punctuation, missing apostrophes.
    Placeholders are filled in later, so values keep their own spelling."""
    x = r.random()
    if x < 0.45:
        s = s[0].upper() + s[1:] if s[0] != "{" else s
        s = re.sub(r"(?<=[.!?] )([a-z])", lambda m: m.group(1).upper(), s)
    elif x < 0.62:
        parts = re.split(r"(\{\w+\})", s)
        s = "".join(p if p.startswith("{") else p.lower() for p in parts)
    elif x < 0.66:
        parts = re.split(r"(\{\w+\})", s)
        s = "".join(p if p.startswith("{") else p.upper() for p in parts)
    if r.random() < 0.12:
        s = s.replace("'", "")
    if r.random() < 0.025:
        s = typo(r, s)
    if question and r.random() < 0.06:
        s = r.choice(["please ", "hey, ", "so ", "ok, ", "now, ", "and ", "hey ", "baton, ", "hi, "]) + s
    if question and r.random() < 0.05:
        s += r.choice([" please", ", please"])
    y = r.random()
    if question:
        s += "?" if y < 0.6 else "." if y < 0.65 else " ?" if y < 0.67 else "??" if y < 0.68 else ""
    else:
        s += "." if y < 0.5 else "!" if y < 0.6 else ""
    return s


def typo(r: random.Random, s: str) -> str:
    """Swap or drop one letter outside the placeholders."""
    spots = [i for i in range(1, len(s) - 1) if s[i - 1:i + 2].isalpha() and s.count("{", 0, i) == s.count("}", 0, i)]
    if not spots:
        return s
    i = r.choice(spots)
    return s[:i] + s[i + 1:] if r.random() < 0.5 else s[:i] + s[i + 1] + s[i] + s[i + 2:]


def fill(s: str, **kw) -> str:
    for k, v in kw.items():
        s = s.replace("{" + k + "}", v)
    return s


def case(r: random.Random, s: str) -> str:
    x = r.random()
    return s if x < 0.72 else s.lower() if x < 0.9 else s[0].upper() + s[1:] if x < 0.98 else s.upper()


class Values:
    """Random values by kind; `held` draws from the held-out lists instead."""

    def __init__(self, r: random.Random, held: bool = False, drill: float = 0.3):
        self.r, self.held, self.drill = r, held, drill

    def _of(self, train, held):
        return self.r.choice(held if self.held else train)

    def get(self, kind: str) -> str:
        r = self.r
        # Made-up values teach copying instead of a memory of the lists.
        if not self.held and r.random() < self.drill and kind in (
                "name", "given", "city", "color", "animal", "food", "drink", "hobby", "country", "thing", "project", "word", "secret"):
            s = W.pseudo(r)
            if kind in ("name", "given", "city", "country", "project"):
                s = s.capitalize()
            if r.random() < 0.1:
                s += " " + W.pseudo(r)
            return case(r, s)
        v = self._get(kind)
        return v if self.held or kind in ("digits", "code", "age", "num", "phone", "clock") else case(r, v)

    def _get(self, kind: str) -> str:
        r = self.r
        if kind in ("name", "given"):
            return self._of(W.NAMES, W.NAMES_HELD)
        if kind == "city":
            return self._of(W.CITIES, W.CITIES_HELD)
        if kind == "country":
            return self._of(W.COUNTRIES, W.COUNTRIES_HELD)
        if kind == "color":
            return self._of(W.COLORS, W.COLORS_HELD)
        if kind == "animal":
            return self._of(W.ANIMALS, W.ANIMALS_HELD)
        if kind == "food":
            return self._of(W.FOODS, W.FOODS_HELD)
        if kind == "drink":
            return self._of(W.DRINKS, W.DRINKS_HELD)
        if kind == "hobby":
            return self._of(W.HOBBIES, W.HOBBIES_HELD)
        if kind == "like":
            return self.get(r.choice(["food", "animal", "hobby", "drink"]))
        if kind == "job":
            j = W.pseudo(r) if not self.held and r.random() < self.drill * 0.6 else self._of(W.JOBS, W.JOBS_HELD)
            return ("an " if j[0] in "aeiou" else "a ") + j
        if kind in ("word", "secret", "thing"):
            w = self._of(W.WORDS, W.WORDS_HELD)
            x = r.random()
            if kind == "secret" and x < 0.15:
                w += W.digits(r, r.randint(1, 3), self.held)
            elif kind != "word" and x < 0.25:
                w += " " + self._of(W.WORDS, W.WORDS_HELD)
            elif kind == "thing" and x < 0.4:
                w = w.capitalize()
            elif kind == "thing" and x < 0.55:
                w = expand(r, "(The|A|My) ") + " ".join(self._of(W.WORDS, W.WORDS_HELD).capitalize() for _ in range(r.randint(1, 3)))
            return w
        if kind == "project":
            return self._of(W.PROJECTS, [w.capitalize() for w in W.WORDS_HELD])
        if kind == "digits":
            return W.digits(r, r.choice([3, 4, 4, 4, 4, 5, 6, 7, 8]), self.held)
        if kind == "num" and not self.held and r.random() < 0.06:
            return f"{r.randint(0, 99)}.{r.randint(0, 99)}"
        if kind == "num":
            return W.digits(r, 3, True) if self.held else W.digits(r, r.choice([1, 2, 2, 3, 3, 4]))
        if kind == "age":
            return str(r.randint(6, 99))
        if kind == "email":
            user = self._of(W.NAMES[:100], W.NAMES_HELD).lower() if r.random() < 0.6 or self.held else W.pseudo(r)
            return user + r.choice(["", W.digits(r, 2)]) + "@" + r.choice([W.pseudo(r), "example", "mail"]) + r.choice([".com", ".org", ".net"])
        if kind == "phone":
            return W.digits(r, 3, self.held) + r.choice(["-", " ", ""]) + W.digits(r, 4, self.held)
        if kind == "code":
            letters = "".join(r.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(r.randint(1, 3)))
            return letters + r.choice(["", "-"]) + W.digits(r, r.randint(2, 4), self.held)
        if kind == "clock":
            return W.clock(r, self.held)
        if kind == "date":
            return f"{r.choice(W.MONTHS)} {r.randint(1, 28)}"
        if kind == "day":
            return r.choice(W.DAYS)
        if kind == "month":
            return r.choice(W.MONTHS)
        if kind == "letter":
            return r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        if kind == "address":
            street = W.pseudo(r).capitalize() if not self.held else r.choice(W.WORDS_HELD).capitalize()
            return f"{r.randint(1, 99)} {street} {r.choice(['Street', 'Road', 'Lane'])}"
        raise KeyError(kind)

    def items(self) -> tuple[list[str], str]:
        """Items of a list and the plural noun for them."""
        r = self.r
        n = r.choice([2, 3, 3, 4, 4, 5, 5, 6, 7, 8])
        x = r.random()
        if x < 0.17:
            return [r.choice("0123456789") for _ in range(n)], r.choice(["digits", "numbers"])
        if x < 0.26:
            k = r.choice([2, 2, 3, 4])
            return [W.digits(r, k, self.held) for _ in range(n)], "numbers"
        if x < 0.36:
            alphabet = "abcdefghijklmnopqrstuvwxyz"
            alphabet = alphabet.upper() if r.random() < 0.5 else alphabet
            return [r.choice(alphabet) for _ in range(n)], "letters"
        if x < 0.44:
            return [self.get("name") for _ in range(n)], "names"
        if x < 0.50:
            return [self.get(r.choice(["food", "city", "color", "animal"])) for _ in range(n)], "words"
        if x < 0.50 + self.drill and not self.held:
            return [W.pseudo(r) for _ in range(n)], "words"
        up = r.random()
        ws = [self._of(W.WORDS, W.WORDS_HELD) for _ in range(n)]
        return [w.capitalize() if up < 0.1 else w.upper() if up < 0.12 else w for w in ws], "words"

    def list_text(self) -> tuple[list[str], str, str]:
        items, noun = self.items()
        x = self.r.random()
        if x < 0.5:
            return items, ", ".join(items), noun
        if x < 0.63:
            return items, ", ".join(items[:-1]) + " and " + items[-1], noun
        if x < 0.66:
            return items, "; ".join(items), noun
        if x < 0.69:
            return items, " - ".join(items), noun
        if len(items[0]) == 1 and x < 0.8:
            return items, "".join(items), noun
        return items, " ".join(items), noun


class Chat:
    """One conversation under construction and the facts stated in it."""

    def __init__(self, r: random.Random, values: Values):
        self.r, self.v = r, values
        self.messages: list[dict] = []
        self.facts: dict[tuple, str] = {}
        self.list: tuple | None = None

    def say(self, user: str, answer: str):
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    # -- facts --------------------------------------------------------------
    def new_slot(self) -> tuple:
        """A slot is (family, key, owner, kind of value)."""
        r = self.r
        x = r.random()
        if x < 0.16:
            return ("name", "", "", "name")
        if x < 0.40:
            f = r.choice(["city", "job", "age", "origin", "like", "called", "called", "called", "when", "when", "city"])
            k = r.choice(T.RELATIONS) if f == "called" else r.choice(T.EVENTS) if f == "when" else ""
            return (f, k, "", T.SPECIAL[f]["kind"])
        if x < 0.62:
            k = r.choice(["code", "code", "password", "secret word", "pin", "lucky number"]) if r.random() < 0.3 else r.choice(list(T.MY_KEYS))
            return ("is", k, "my", T.MY_KEYS[k])
        if x < 0.76:
            k = r.choice(["color", "colour", "food", "number"]) if r.random() < 0.3 else r.choice(list(T.FAVOURITES))
            return ("is", "favorite " + k, "my", T.FAVOURITES[k])
        if x < 0.84:
            k = r.choice(list(T.THE_KEYS))
            return ("is", k, "the", T.THE_KEYS[k])
        if x < 0.90:
            k = r.choice(["code", "number", "favorite color", "city", "password", "birthday", "favorite food", "job"])
            kind = {"code": "digits", "number": "num", "favorite color": "color", "city": "city", "password": "secret", "birthday": "date",
                    "favorite food": "food", "job": "hobby"}[k]
            return ("is", k, r.choice(W.NAMES) + "'s", kind)
        # Any noun, real or made up, so that the key is matched and not known.
        k = r.choice(W.WORDS) if r.random() < 0.5 else W.pseudo(r)
        return ("is", k, r.choice(["my", "my", "the"]), r.choice(["digits", "secret", "given", "color", "num", "code", "thing", "word", "hobby", "city"]))

    def pattern(self, slot: tuple, form: str, v: str = "") -> str:
        """One sentence about a slot; form is tell/ask/update, or an answer form."""
        family, key, owner, _ = slot
        r = self.r
        if family == "is":
            pool = {"tell": T.TELL, "ask": T.ASK, "update": T.UPDATE, "ack": T.TELL_ACK, "upack": T.UPDATE_ACK, "answer": [T.ANSWER], "missing": [T.MISSING]}[form]
        else:
            pool = T.SPECIAL[family][form]
            pool = pool if isinstance(pool, list) else [pool]
        user = form in ("tell", "ask", "update")
        s = expand(r, r.choice(pool))
        if user and key.startswith("favorite ") and family == "is":
            if form == "ask" and owner == "my" and r.random() < 0.12:
                s = expand(r, "(what|which) " + key[9:] + " do I like (best|most|the most)")
            if r.random() < 0.4:
                s = s.replace("{k}", key.replace("favorite", "favourite"))
        if user and owner not in ("my", "the", "") and "{k} did I" in s:
            s = "what is {D} {k}"
        if user:
            s = style(r, s, form == "ask")
        s = fill(s, k=key, D=owner, A="your" if owner == "my" else owner, v=v)
        if not user or (r.random() < 0.45 and owner and s.startswith(owner)):
            s = s[0].upper() + s[1:]
        return s

    def same(self, slot):
        """Slots that a question could confuse with this one block each other."""
        family, key, owner, _ = slot
        key = key.replace("colour", "color")
        taken = [(f, k.replace("colour", "color"), o) for f, k, o, _ in self.facts]
        if (family, key, owner) in taken or (family == "is" and any(f == "is" and k == key and {o, owner} == {"my", "the"} for f, k, o in taken)):
            return True
        # "I am 30", "my fish is Rex" and "my city is" would be ambiguous otherwise.
        return family == "is" and owner == "my" and (key in ("city", "job", "name", "country", "age") or key in T.RELATIONS or key in T.EVENTS)

    def sibling(self) -> tuple:
        """A slot that is easily confused with one already stated."""
        r = self.r
        family, key, owner, kind = r.choice(list(self.facts))
        if family == "called":
            return (family, r.choice(T.RELATIONS), "", kind)
        if family == "when":
            return (family, r.choice(T.EVENTS), "", kind)
        alike = [k for k in T.MY_KEYS if k.split()[-1:] == key.split()[-1:] or T.MY_KEYS[k] == kind]
        if family == "is" and owner == "my" and key.startswith("favorite "):
            k = r.choice(list(T.FAVOURITES))
            return ("is", "favorite " + k, "my", T.FAVOURITES[k])
        if family == "is" and owner == "my" and alike:
            k = r.choice(alike)
            return ("is", k, "my", T.MY_KEYS[k])
        return self.new_slot()

    def tell(self, slot=None):
        for _ in range(20):
            s = slot or (self.sibling() if self.facts and self.r.random() < 0.3 else self.new_slot())
            if not self.same(s):
                break
        else:
            return
        v = self.v.get(s[3])
        self.facts[s] = v
        self.say(self.pattern(s, "tell", v), self.pattern(s, "ack", v))

    def tell_ask(self):
        """A fact and a question about it in one message."""
        s = self.new_slot()
        if self.same(s):
            return
        v = self.facts[s] = self.v.get(s[3])
        pool = T.TELL if s[0] == "is" else T.SPECIAL[s[0]]["tell"]
        tell = fill(expand(self.r, self.r.choice(pool)), k=s[1], D=s[2], v=v)
        tell = tell[0].upper() + tell[1:] if self.r.random() < 0.5 else tell
        self.say(tell + self.r.choice([". ", ". ", ", ", "! "]) + self.pattern(s, "ask"), self.pattern(s, "answer", v))

    def tell_many(self):
        """Several facts in one message, acknowledged without repeating them."""
        r, parts = self.r, []
        for _ in range(r.choice([2, 2, 3, 3, 4])):
            s = self.new_slot()
            if self.same(s):
                continue
            v = self.v.get(s[3])
            self.facts[s] = v
            if s[0] == "is":
                parts.append(fill("{D} {k} is {v}", D=s[2], k=s[1], v=v))
            else:
                pool = [p for p in T.SPECIAL[s[0]]["tell"] if not re.search("hi|hello|hey|remember|note|way|[.!:]", p)]
                parts.append(fill(expand(r, r.choice(pool)), k=s[1], v=v))
        if len(parts) < 2:
            return
        x = r.random()
        if x < 0.5:
            s = ", ".join(parts[:-1]) + " and " + parts[-1]
        elif x < 0.8:
            s = ". ".join(p[0].upper() + p[1:] for p in parts)
        else:
            s = ", ".join(parts)
        s = r.choice(["", "", "", "hi, ", "hello, ", "remember: ", "please remember: ", "remember that "]) + s
        s = s[0].upper() + s[1:] if r.random() < 0.5 else s
        self.say(s + r.choice([".", "", "."]), "Thank you, I will remember all of that.")

    def update(self):
        if not self.facts:
            return self.tell()
        s = self.r.choice(list(self.facts))
        v = self.v.get(s[3])
        if v.lower() == self.facts[s].lower():
            return
        # Re-inserting keeps the facts in the order in which they were last said.
        self.facts.pop(s)
        self.facts[s] = v
        self.say(self.pattern(s, "update", v), self.pattern(s, "upack", v))

    def ask(self, slot=None):
        if not self.facts:
            return self.tell()
        keys = list(self.facts)
        s = slot or (keys[0] if self.r.random() < 0.2 else self.r.choice(keys))
        self.say(self.pattern(s, "ask"), self.pattern(s, "answer", self.facts[s]))

    def ask_two(self):
        mine = [s for s in self.facts if s[0] == "is" and s[2] == "my" or s[0] == "name"]
        if len(mine) < 2:
            return self.tell()
        a, b = self.r.sample(mine, 2)
        ka, kb = a[1] or "name", b[1] or "name"
        q = fill(self.r.choice(["what is my {a} and what is my {b}", "what are my {a} and my {b}", "tell me my {a} and my {b}", "what is my {a} and my {b}"]), a=ka, b=kb)
        self.say(style(self.r, q, True), self.pattern(a, "answer", self.facts[a]) + " " + self.pattern(b, "answer", self.facts[b]))

    def ask_missing(self):
        for _ in range(20):
            s = self.new_slot()
            if not self.same(s) and s[1] not in [k for _, k, _, _ in self.facts]:
                self.say(self.pattern(s, "ask"), self.pattern(s, "missing"))
                return

    def about_me(self):
        q = style(self.r, self.r.choice(T.ABOUT_ME), True)
        if not self.facts:
            self.say(q, T.ABOUT_ME_MISSING)
        elif len(self.facts) <= 4:
            self.say(q, " ".join(self.pattern(s, "answer", v) for s, v in self.facts.items()))

    # -- lists --------------------------------------------------------------
    def listed(self, pattern: str, text: str, noun: str) -> str:
        s = style(self.r, expand(self.r, pattern), False)
        if text[-1].isalnum() and s.endswith("{l}!"):
            s = s[:-1]
        s = fill(s, W=noun if self.r.random() < 0.8 else "items", L=self.r.choice(T.LIST_NAMES))
        quote = "{l}" in s and self.r.random() < 0.04
        return s.replace("{l}", f'"{text}"' if quote else text)

    def repeat(self):
        r = self.r
        _, text, noun = self.v.list_text()
        if r.random() < 0.12:
            text, noun = r.choice(T.SENTENCES), "words"
            while "{w}" in text:
                text = text.replace("{w}", self.v.get("word"), 1)
            text = text.replace("{v}", self.v.get(r.choice(["name", "digits"])))
            text = text[0].upper() + text[1:] if r.random() < 0.3 else text
        self.say(self.listed(self.r.choice(T.REPEAT), text, noun), T.REPEAT_ANSWER.replace("{l}", text))

    def list_tell(self):
        items, text, noun = self.v.list_text()
        self.list = (items, text, noun)
        self.say(self.listed(self.r.choice(T.LIST_TELL), text, noun), T.LIST_ACK)

    def list_ask(self):
        r = self.r
        if self.list is None and r.random() < 0.7:
            return self.list_tell()
        if self.list is None:
            q = fill(expand(r, r.choice([p for p in T.LIST_ASK if "list" in p or "{L}" in p])), W="words", L=r.choice(T.LIST_NAMES))
            return self.say(style(r, q, True), T.LIST_MISSING)
        items, text, noun = self.list
        if r.random() < 0.2 and " and " not in text:
            first = r.random() < 0.5
            q = fill(expand(r, r.choice(T.LIST_FIRST if first else T.LIST_LAST)), w=noun[:-1])
            return self.say(style(r, q, True), f"The {'first' if first else 'last'} {noun[:-1]} is {items[0 if first else -1]}.")
        q = fill(expand(r, r.choice(T.LIST_ASK)), W=noun, L=r.choice(T.LIST_NAMES))
        self.say(style(r, q, True), T.LIST_ANSWER.replace("{l}", text))

    def again(self):
        if self.messages:
            self.say(style(self.r, self.r.choice(T.AGAIN), True), self.messages[-1]["content"])

    # -- fixed answers --------------------------------------------------------
    def know(self):
        r = self.r
        topic, qs, answers = r.choice(knowledge.TOPICS)
        q = r.choice(qs)
        if topic in knowledge.NOUNS and r.random() < 0.5:
            q = r.choice(knowledge.ASK_NOUN).replace("{x}", r.choice(knowledge.NOUNS[topic]))
        self.say(style(r, expand(r, q), True), r.choice(answers))

    def chat(self):
        r = self.r
        _, qs, answers = r.choice([t for t in knowledge.TOPICS[:11]])
        self.say(style(r, expand(r, r.choice(qs)), r.random() < 0.3), r.choice(answers))

    def unknown(self):
        r = self.r
        q = r.choice(knowledge.UNKNOWN)
        for mark, kind in (("{w}", "word"), ("{c}", "city"), ("{C}", "country"), ("{f}", "food"), ("{N}", "name"), ("{h}", "hobby")):
            while mark in q:
                q = q.replace(mark, self.v.get(kind), 1)
        q = q.replace("{j}", r.choice(W.JOBS))
        while "{n}" in q:
            q = q.replace("{n}", str(r.randint(2, 99)), 1)
        while "{p}" in q:
            q = q.replace("{p}", W.pseudo(r), 1)
        self.say(style(r, q, True), r.choice(knowledge.FALLBACK))


EVENTS = [("tell", 19), ("ask", 26), ("update", 8), ("tell_many", 8), ("tell_ask", 2), ("ask_two", 5), ("ask_missing", 8), ("about_me", 2),
          ("repeat", 13), ("list_tell", 4), ("list_ask", 12), ("again", 1), ("know", 13), ("chat", 4), ("unknown", 6)]
DRILL = [("tell", 22), ("ask", 32), ("update", 7), ("tell_many", 6), ("ask_two", 3), ("ask_missing", 5), ("repeat", 20), ("list_tell", 3), ("list_ask", 9)]


def conversation(r: random.Random, size: int, drill: bool = False, held: bool = False) -> list[dict]:
    """A chat of roughly `size` tokens. `drill` is the copying-only mixture with
    mostly made-up values that is used heavily at the start of training."""
    c = Chat(r, Values(r, held, 0.6 if drill else 0.3))
    if r.random() < 0.25:
        c.messages.append({"role": "system", "content": r.choice(T.SYSTEM).replace("{p}", W.pseudo(r)).replace("{w}", c.v.get("word"))})
    names, weights = zip(*(DRILL if drill else EVENTS))
    cost = 0
    while cost < size:
        e = r.choices(names, weights)[0]
        if e == "tell" and len(c.facts) >= 8:
            e = "ask"
        n = len(c.messages)
        getattr(c, e)()
        cost += sum(12 + len(m["content"]) // 3 for m in c.messages[n:])
    return c.messages


def sample_size(r: random.Random, limit: int) -> int:
    """Aim for conversation lengths from one exchange to the whole row."""
    x = r.random()
    return int(min(limit * 0.9, r.choice([30, 60, 120]) if x < 0.3 else r.uniform(100, 256) if x < 0.5 else r.uniform(0.4, 0.9) * limit))


def render(messages: list[dict]) -> str:
    """The chat template, as in tokenizer_config.json."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


if __name__ == "__main__":
    import sys
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for _ in range(6):
        print(render(conversation(rng, 250, drill=rng.random() < 0.25)), end="\n-----\n")
