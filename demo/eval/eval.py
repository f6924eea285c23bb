#!/usr/bin/env python3
"""Run the held-out set against any OpenAI-compatible server.

What it is for: proves over HTTP that a server answers as the demo model should,
greedy and without streaming.  A prompt is right if every `expect` string and no
`forbid` string occurs in the answer, ignoring case.  Standard library only.

What it is not for: speed measurements, or checking weights (eval_jax.py).

    python3 demo/eval/eval.py --url http://127.0.0.1:8080/v1 --min 0.9
"""
import argparse
import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HELDOUT = Path(__file__).with_name("heldout.jsonl")


def load(path=HELDOUT) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def grade(case: dict, answer: str) -> bool:
    low = answer.lower()
    return (all(e.lower() in low for e in case["expect"])
            and not any(f.lower() in low for f in case.get("forbid", [])))


def summarise(cases: list[dict], answers: list[str]) -> dict:
    """Counts by category, in order of appearance, and the wrong answers."""
    table, wrong = {}, []
    for case, answer in zip(cases, answers):
        row = table.setdefault(case["category"], {"right": 0, "total": 0})
        ok = grade(case, answer)
        row["right"] += ok
        row["total"] += 1
        if not ok:
            wrong.append({"id": case["id"], "expect": case["expect"], "forbid": case.get("forbid", []), "answer": answer})
    right, total = (sum(r[k] for r in table.values()) for k in ("right", "total"))
    return {"right": right, "total": total, "share": right / max(total, 1), "categories": table, "wrong": wrong}


def report(result: dict) -> str:
    lines = [f"{'category':<12} {'right':>5} {'of':>4}  share"]
    for name, row in result["categories"].items():
        lines.append(f"{name:<12} {row['right']:>5} {row['total']:>4}  {row['right'] / row['total']:.1%}")
    lines.append(f"{'all':<12} {result['right']:>5} {result['total']:>4}  {result['share']:.1%}")
    for w in result["wrong"]:
        lines.append(f"wrong {w['id']}: expected {w['expect']}" + (f" not {w['forbid']}" if w["forbid"] else "") + f", got {w['answer']!r}")
    return "\n".join(lines)


def call(url: str, body: dict | None = None, timeout: float = 120) -> dict:
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = "Bearer " + os.environ["OPENAI_API_KEY"]
    req = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    with urllib.request.urlopen(req, timeout=timeout) as resp:
        return json.load(resp)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--url", default="http://127.0.0.1:8080/v1")
    ap.add_argument("--model", help="default: the first of /v1/models")
    ap.add_argument("--set", default=str(HELDOUT))
    ap.add_argument("--max-tokens", type=int, default=80)
    ap.add_argument("--parallel", type=int, default=1, help="requests in flight")
    ap.add_argument("--min", type=float, default=0.9, help="exit 1 below this share")
    ap.add_argument("--json", action="store_true", help="print the result as JSON")
    args = ap.parse_args()
    base = args.url.rstrip("/")
    model = args.model or call(base + "/models")["data"][0]["id"]
    cases = load(args.set)

    def ask(case):
        body = {"model": model, "messages": case["messages"], "temperature": 0, "max_tokens": args.max_tokens, "stream": False}
        try:
            return call(base + "/chat/completions", body)["choices"][0]["message"]["content"] or ""
        except (OSError, KeyError, IndexError, ValueError) as e:
            # A failed request counts as a wrong answer and shows its reason.
            return f"<request failed: {e}>"

    with ThreadPoolExecutor(max(1, args.parallel)) as pool:
        answers = list(pool.map(ask, cases))
    result = {"model": model, **summarise(cases, answers)}
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else report(result))
    return 0 if result["share"] >= args.min else 1


if __name__ == "__main__":
    sys.exit(main())
