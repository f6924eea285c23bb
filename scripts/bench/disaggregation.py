#!/usr/bin/env python3
"""What handing KV from a prefill worker to a decode worker costs, and what it gains, on the same cores of one machine.

    scripts/bench/make_models.py --out models --shape qwen2.5-0.5b
    scripts/bench/disaggregation.py --model models/qwen2.5-0.5b --baton target/release/baton --name my-machine

Price: two clusters run at once, one worker against prefill + decode, each with all cores for each worker, so that
whichever works has the machine. Requests for one token go to them in turn, one at a time, each prompt new; TTFT beside TTFT.
Gain: streams of tokens run while long prompts arrive one after another. Once with one worker that has all cores and
chunks its prefill (at its default pace, and with no pace), once with a prefill and a decode worker that share them. The time
between two tokens of the streams is compared, and how many long prompts got their first token meanwhile.
Results and raw numbers go to docs/benchmarks/<name>/disaggregation.md and .json.
"""

import argparse
import http.client
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from serve_vs_llamacpp import Server, free_port  # noqa: E402

WORDS = Path(__file__).read_text().split()
REQUEST_S_MAX = 300


def prompt(words, seed):
    """`words` short words, different from the first on: no prefix cache helps."""
    pick = random.Random(seed)
    return " ".join(f"{pick.randrange(1000)}" for _ in range(words))


def stream(port, words, seed, max_tokens, stop=None):
    """One streamed chat request: prompt tokens, and when it was sent and each content chunk arrived."""
    body = json.dumps({
        "model": MODEL, "messages": [{"role": "user", "content": prompt(words, seed)}], "max_tokens": max_tokens,
        "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    })
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S_MAX)
    times, usage, sent = [], None, time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read()[:300]}")
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        now, chunk = time.perf_counter(), json.loads(line[6:])
        usage = chunk.get("usage") or usage
        if any(choice["delta"].get("content") is not None and choice.get("finish_reason") is None
               and "role" not in choice["delta"] for choice in chunk["choices"]):
            times.append(now)
        if stop is not None and stop.is_set():
            break
    connection.close()
    return usage, sent, times


MODEL = None


def cluster(args, scratch, name, flags):
    port = free_port()
    command = [str(args.baton), "up", "--model", str(args.model), "--port", str(port), "--data-dir",
               str(Path(scratch) / name), "--kv-mem", args.kv_mem, *shlex.split(args.flags), *flags]
    server = Server(command, port, "/ready", open(Path(scratch) / f"{name}.log", "w"))
    server.port_number = port
    return server


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def price(args, scratch):
    both = ["--threads", str(args.threads)]
    one = cluster(args, scratch, "one", ["--prefill", "0", "--decode", "1", *both])
    two = cluster(args, scratch, "two", ["--prefill", "1", "--decode", "1", "--prefill-threshold", "64", *both])
    rows = []
    with one, two:
        for tokens, count in [(512, args.requests), (8192, max(args.requests // 3, 4))]:
            words, got = tokens // 2, 0
            for _ in range(6):  # how many words make that many tokens
                got = stream(one.port_number, words, -words, 1)[0]["prompt_tokens"]
                if abs(got - tokens) <= tokens // 100:
                    break
                words = max(1, words * tokens // got)
            stream(two.port_number, words, -1, 1)
            took = {"one": [], "two": []}
            for at in range(count):
                for name, server in [("one", one), ("two", two)]:
                    usage, sent, _ = stream(server.port_number, words, (name, tokens, at).__repr__(), 1)
                    took[name].append((time.perf_counter() - sent) * 1e3)
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
                    if cached > 64:
                        raise RuntimeError(f"{cached} cached tokens in a prompt that should be new")
            rows.append({"prompt_tokens": got, "requests": count, "one_ms": took["one"], "two_ms": took["two"]})
            middle = {name: statistics.median(values) for name, values in took.items()}
            print(f"{got} tokens: one worker {middle['one']:.0f} ms, prefill + decode {middle['two']:.0f} ms", file=sys.stderr)
    return rows


def gain(args, scratch, name, flags):
    """Inter-token times of `args.streams` streams while prompts arrive, in ms."""
    with cluster(args, scratch, name, flags) as server:
        stop, gaps, firsts, failures = threading.Event(), [], [], []
        begin = time.perf_counter()

        def streaming(seed):
            try:
                while not stop.is_set():
                    times = stream(server.port_number, 64, f"{name} {seed} {time.time()}", 2000, stop)[2]
                    gaps.extend((b - a) * 1e3 for a, b in zip(times, times[1:]))
            except Exception as error:  # reported by the caller
                failures.append(error)

        def arriving():
            at = 0
            try:
                while not stop.is_set():
                    _, sent, times = stream(server.port_number, args.long_words, f"{name} long {at}", 2)
                    firsts.append((times[0] - sent) * 1e3 if times else None)
                    at += 1
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=streaming, args=(i,)) for i in range(args.streams)]
        for thread in threads:
            thread.start()
        time.sleep(3)  # streams alone, so that all are decoding
        gaps.clear()
        threads.append(threading.Thread(target=arriving))
        threads[-1].start()
        time.sleep(args.seconds)
        stop.set()
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError(f"{name}: {failures[0]}")
        elapsed = time.perf_counter() - begin
        row = {"name": name, "gaps": len(gaps), "itl_p50": quantile(gaps, 0.5), "itl_p99": quantile(gaps, 0.99),
               "itl_max": max(gaps), "prompts": len(firsts), "seconds": elapsed,
               "ttft_p50": statistics.median(f for f in firsts if f) if any(firsts) else None}
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def main():
    global MODEL
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--baton", type=Path, default=Path("target/release/baton"))
    p.add_argument("--name", required=True, help="the results go to docs/benchmarks/<name>/")
    p.add_argument("--flags", default="--quantize int8", help="more flags for `baton up` (default: %(default)s)")
    p.add_argument("--kv-mem", default="768MiB")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--requests", type=int, default=24, help="of each price measurement (a third for 8k)")
    p.add_argument("--streams", type=int, default=4)
    p.add_argument("--long-words", type=int, default=2000)
    p.add_argument("--seconds", type=int, default=30, help="of each gain measurement")
    p.add_argument("--rounds", type=int, default=3, help="of the gain measurements")
    p.add_argument("--only", choices=["price", "gain"])
    args = p.parse_args()
    MODEL = args.model.name
    directory = Path(__file__).resolve().parents[2] / "docs/benchmarks" / args.name
    directory.mkdir(parents=True, exist_ok=True)
    half = max(args.threads // 2, 1)
    setups = [
        ("one worker, no pace", ["--prefill", "0", "--decode", "1", "--threads", str(args.threads), "--step-target-ms", "0"]),
        ("one worker", ["--prefill", "0", "--decode", "1", "--threads", str(args.threads)]),
        ("prefill + decode", ["--prefill", "1", "--decode", "1", "--prefill-threshold", "256", "--threads", str(half)]),
    ]
    raw = {"date": time.strftime("%Y-%m-%d %H:%M %Z"), "flags": args.flags, "threads": args.threads, "price": [], "gain": []}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if args.only != "gain":
                raw["price"] = price(args, scratch)
            if args.only != "price":
                for round_ in range(args.rounds):
                    for name, flags in setups:
                        row = gain(args, scratch, name, flags)
                        raw["gain"].append(row | {"round": round_})
        except (RuntimeError, OSError) as error:
            for log in Path(scratch).glob("*.log"):
                print(f"-- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
            sys.exit(str(error))
    lines = [f"{MODEL}, {args.flags}, {args.threads} threads, {raw['date']}", ""]
    if raw["price"]:
        lines += ["| prompt tokens | one worker, ms | prefill + decode, ms | price | aim |", "|--:|--:|--:|--:|---|"]
        for row in raw["price"]:
            one, two = statistics.median(row["one_ms"]), statistics.median(row["two_ms"])
            share = two / one - 1
            lines.append(f"| {row['prompt_tokens']} | {one:.1f} | {two:.1f} | {share * 100:+.1f} % | <= 5 % {'yes' if share <= 0.05 else 'no'} |")
        lines.append("")
    if raw["gain"]:
        lines += [f"{args.streams} streams while prompts of {args.long_words} words arrive one after another, "
                  f"{args.seconds} s, medians of {args.rounds} rounds:", "",
                  "| setup | ITL p50 ms | ITL p99 ms | ITL max ms | tokens streamed | long prompts | their TTFT p50 ms |", "|---|--:|--:|--:|--:|--:|--:|"]
        for name, _ in setups:
            rows = [row for row in raw["gain"] if row["name"] == name]
            def of(key):
                return statistics.median(row[key] or 0 for row in rows)
            lines.append(f"| {name} | {of('itl_p50'):.1f} | {of('itl_p99'):.1f} | {of('itl_max'):.0f} | {of('gaps'):.0f} | {of('prompts'):.0f} | {of('ttft_p50'):.0f} |")
    text = "\n".join(lines) + "\n"
    (directory / "disaggregation.md").write_text(text)
    (directory / "disaggregation.json").write_text(json.dumps(raw, indent=1))
    print(text)


if __name__ == "__main__":
    main()
