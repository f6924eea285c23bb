#!/usr/bin/env python3
"""Write heldout.jsonl, the shipped evaluation set.

What it is for: prompts whose values (names, cities, words, digit strings) never
occur in training data.  About half are written by hand below as a first-time
user would type them; the rest come from the generator with held-out values, in
multi-turn chats of up to about 900 tokens.

What it is not for: training; nothing in here is read by demo/train.
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
import batches
import probes
import words

A, U = "assistant", "user"


def said(*turns: str) -> list[dict]:
    """Turns alternate user, assistant, user, ..."""
    return [{"role": U if i % 2 == 0 else A, "content": t} for i, t in enumerate(turns)]


OK = "Okay, I will remember that your {} is {}."
# (category, messages, expect, forbid)
HAND = [
    ("recall", said("my name is Margot", "Nice to meet you, Margot.", "what's my name?"), ["Margot"], []),
    ("recall", said("Hi! I'm Tobias.", "Nice to meet you, Tobias.", "What is baton?", "Baton is an LLM inference cluster written in Rust. It runs prefill and decode on separate workers and hands the KV cache from one to the other.", "What is my name?"), ["Tobias"], []),
    ("recall", said("remember that my code is {D4a}", OK.format("code", "{D4a}"), "thanks!", "You are welcome!", "what is my code?"), ["{D4a}"], []),
    ("recall", said("My name is Freya and my code is {D4b}.", "Thank you, I will remember all of that.", "Hello", "Hello! How can I help you?", "what was my code?"), ["{D4b}"], []),
    ("recall", said("My name is Stella and my code is {D4c}.", "Thank you, I will remember all of that.", "what is TTFT?", "TTFT is the time to first token: how long a user waits until the answer starts.", "Who am I?"), ["Stella"], []),
    ("recall", said("I live in Bergen", "Okay, I will remember that you live in Bergen.", "my favourite colour is turquoise", OK.format("favorite colour", "turquoise"), "Where do I live?"), ["Bergen"], ["turquoise"]),
    ("recall", said("I live in Osaka.", "Okay, I will remember that you live in Osaka.", "My favorite color is indigo.", OK.format("favorite color", "indigo"), "what's my favorite color"), ["indigo"], ["Osaka"]),
    ("recall", said("my dog is called Milo", "Okay, I will remember that your dog is called Milo.", "my friend's name is Thea", "Okay, I will remember that your friend is called Thea.", "what is my dog's name?"), ["Milo"], ["Thea"]),
    ("recall", said("my dog is called Milo", "Okay, I will remember that your dog is called Milo.", "my friend's name is Thea", "Okay, I will remember that your friend is called Thea.", "What is my friend's name?"), ["Thea"], ["Milo"]),
    ("recall", said("The meeting is at 14:20.", "Okay, I will remember that your meeting is at 14:20.", "repeat: walnut, harbor, velvet", "Here you go: walnut, harbor, velvet", "When is the meeting?"), ["14:20"], []),
    ("recall", said("the password is lantern", "Okay, I will remember that the password is lantern.", "who made you?", "I was trained from scratch by the baton project on text that the project generated itself.", "what is the password?"), ["lantern"], []),
    ("recall", said("Remember: my secret word is saffron!", OK.format("secret word", "saffron"), "What is the weather in Turin?", "I am a very small demo model, so I do not know that. I can remember facts, repeat lists and tell you about baton.", "tell me my secret word"), ["saffron"], []),
    ("recall", said("my lucky number is {D3a}", OK.format("lucky number", "{D3a}"), "my room number is {D3b}", OK.format("room number", "{D3b}"), "what is my lucky number?"), ["{D3a}"], ["{D3b}"]),
    ("recall", said("hello, my name is beatrix and I live in ghent", "Thank you, I will remember all of that.", "how are you?", "I am doing well, thank you. How can I help you?", "where do I live"), ["ghent"], ["beatrix"]),
    ("recall", said("I work as a librarian.", "Okay, I will remember that you work as a librarian.", "bye", "Goodbye! Have a nice day.", "what is my job?"), ["librarian"], []),
    ("recall", said("I am from Iceland.", "Okay, I will remember that you are from Iceland.", "I like falafel", "Okay, I will remember that you like falafel.", "where am I from?"), ["Iceland"], ["falafel"]),
    ("update", said("my code is {D4a}", OK.format("code", "{D4a}"), "actually, my code is {D4d} now", "Okay, your code is now {D4d}.", "what is my code?"), ["{D4d}"], ["{D4a}"]),
    ("update", said("I live in Ghent.", "Okay, I will remember that you live in Ghent.", "I moved to Utrecht.", "Okay, you now live in Utrecht.", "What is decode?", "Decode produces the answer one token at a time, reading the KV cache at every step.", "where do I live?"), ["Utrecht"], ["Ghent"]),
    ("update", said("my favorite food is lasagna", OK.format("favorite food", "lasagna"), "my name is Casper", "Nice to meet you, Casper.", "my favorite food is now ramen", "Okay, your favorite food is now ramen.", "What is my favorite food?"), ["ramen"], ["lasagna", "Casper"]),
    ("update", said("The meeting is at 9:20", "Okay, I will remember that your meeting is at 9:20.", "The meeting was moved to 16:40.", "Okay, your meeting is now at 16:40.", "what time is the meeting?"), ["16:40"], ["9:20"]),
    ("repeat", said("repeat: marble, canyon, ivory"), ["marble, canyon, ivory"], []),
    ("repeat", said("Please repeat these words: lobster, magnet, quartz, ribbon"), ["lobster, magnet, quartz, ribbon"], []),
    ("repeat", said("repeat after me: willow acorn biscuit compass"), ["willow acorn biscuit compass"], []),
    ("repeat", said("can you repeat {D6a}?"), ["{D6a}"], []),
    ("repeat", said("hi", "Hello! How can I help you?", "say: umbrella, thistle, umbrella"), ["umbrella, thistle, umbrella"], []),
    ("repeat", said("Repeat the letters: q, z, m, b, f"), ["q, z, m, b, f"], []),
    ("repeat", said("repeat the names: Oliver, Saskia, Ruben, Nadine, Anton"), ["Oliver, Saskia, Ruben, Nadine, Anton"], []),
    ("repeat", said("repeat these digits: 9 0 4 4 7 1 3 3"), ["9 0 4 4 7 1 3 3"], []),
    ("list", said("remember this list: pillow, saddle, trumpet", "Okay, I will remember the list.", "thank you", "You are welcome!", "what was the list?"), ["pillow, saddle, trumpet"], []),
    ("list", said("My shopping list is: ramen, biscuit, walnut, nectar.", "Okay, I will remember the list.", "my name is Leander", "Nice to meet you, Leander.", "what is on my shopping list?"), ["ramen, biscuit, walnut, nectar"], []),
    ("about", said("What is a KV cache?"), ["keys and values"], []),
    ("about", said("hey, can you tell me what baton is?"), ["inference cluster"], []),
    ("about", said("my name is Margot", "Nice to meet you, Margot.", "how do i use my own model?"), ["baton up --model"], []),
    ("about", said("hi", "Hello! How can I help you?", "so what can you do?"), ["remember facts"], []),
    ("about", said("what is the ledger"), ["record"], []),
    ("about", said("WHAT IS PREFILL?"), ["whole prompt"], []),
    ("about", said("explain TTFT please"), ["time to first token"], []),
    ("about", said("Who are you?"), ["demo model"], []),
    ("greet", said("hello there!"), ["Hello"], []),
    ("greet", said("Thanks a lot!"), ["welcome"], []),
    ("greet", said("hi, my name is Delphine"), ["Delphine"], []),
    ("greet", said("goodbye"), ["Goodbye"], []),
    ("unknown", said("what is the capital of Portugal?"), ["small demo model"], []),
    ("unknown", said("write a poem about a lantern"), ["small demo model"], []),
    ("unknown", said("What's my name?"), ["not told me your name"], []),
    ("unknown", said("my name is Ximena", "Nice to meet you, Ximena.", "what is my code?"), ["not told me your code"], ["Ximena"]),
]

# category, approximate tokens, how many
DRAWN = [("recall", 90, 8), ("recall", 280, 8), ("recall", 700, 6), ("recall", 1080, 4), ("update", 120, 5), ("update", 400, 3),
         ("two", 120, 2), ("repeat", 40, 8), ("repeat", 300, 5), ("list", 80, 4), ("list", 300, 3)]


def drawn(r: random.Random):
    for category, size, count in DRAWN:
        made = 0
        while made < count:
            c = probes.probe(category, r, size, held=True, system=r.random() < 0.25)
            answer = c.messages[-1]["content"]
            if len(batches.encode(c.messages)[0]) > 960 or answer.lower() in c.messages[-3]["content"].lower():
                continue
            # Keep only targets that training cannot have shown: no ages, dates or
            # single letters, and no short lists of single characters.
            if category in ("recall", "update") and c.target[0][3] in ("age", "date", "day", "month", "letter"):
                continue
            singles = [w for w in answer.replace(",", " ").replace(";", " ").split() if len(w) == 1]
            if category in ("repeat", "list") and 0 < len(singles) < 5:
                continue
            forbid = []
            if category == "two":
                expect = [s.split(" is ", 1)[1].rstrip(".") for s in answer.split(". ")]
            elif category == "repeat":
                expect = [answer.removeprefix("Here you go: ")]
            elif category == "list":
                expect = [answer.removeprefix("The list is: ")] if answer.startswith("The list") else [answer]
            else:
                expect = [c.target[1]]
                if category == "update" and c.old.lower() not in answer.lower():
                    forbid = [c.old]
            made += 1
            yield category, c.messages[:-1], expect, forbid


def main():
    r = random.Random(2024)
    values = {f"D{n}{x}": words.digits(r, n, held=True) for n, xs in ((3, "ab"), (4, "abcd"), (6, "a")) for x in xs}

    def put(s: str) -> str:
        for k, v in values.items():
            s = s.replace("{" + k + "}", v)
        return s

    cases = [(c, [{**m, "content": put(m["content"])} for m in ms], [put(e) for e in ex], [put(f) for f in fo]) for c, ms, ex, fo in HAND]
    with open(Path(__file__).with_name("heldout.jsonl"), "w", encoding="utf-8") as f:
        for i, (c, ms, ex, fo) in enumerate(cases + list(drawn(r))):
            row = {"id": f"{c}-{i:03d}", "category": c, "messages": ms, "expect": ex}
            f.write(json.dumps({**row, "forbid": fo} if fo else row, ensure_ascii=False) + "\n")
    print(i + 1, "prompts")


if __name__ == "__main__":
    main()
