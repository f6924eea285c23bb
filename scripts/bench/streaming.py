#!/usr/bin/env python3
"""Streamed tokens per second, like for like: baton and NVIDIA Dynamo in front of mock engines with the same pace.

  scripts/bench/streaming.py --baton target/release/baton --dynamo V/bin/python --model DIR --out docs/benchmarks/frontend

As frontend.py (which says how to make V), except that engines take time: each gives every running sequence one token per
step, and a step takes --itl-ms whatever is in it, on both sides. Numbers of streams are chosen below and above what one core
delivers. A front end that keeps up delivers streams / ITL tokens per second, a chunk for each; chunks per token below 1
are tokens that a server sent together because it was behind. Rounds alternate; each is added to streaming.jsonl in --out,
and streaming.md holds medians of all that is there.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile

import frontend

TOKENS = 256
WAVES = 3
COLUMNS = [
    ("asked_tokens_per_s", "tokens/s asked", ".0f"),
    ("output_tokens_per_s", "tokens/s", ".0f"),
    ("chunks_per_s", "chunks/s", ".0f"),
    ("chunks_per_token", "chunks per token", ".3f"),
    ("ttft_p50_ms", "TTFT p50 ms", ".1f"),
    ("itl_p50_ms", "ITL p50 ms", ".2f"),
    ("itl_p99_ms", "ITL p99 ms", ".2f"),
    ("front_cpu_us_per_token", "front end CPU us/token", ".2f"),
    ("workers_cpu_us_per_token", "workers CPU us/token", ".2f"),
    ("client_busy", "client core busy", ".0%"),
    ("front_rss_mb", "front end RSS MB", ".0f"),
]


def baton_pace(work, itl_ms):
    path = os.path.join(work, "pace.toml")
    with open(path, "w") as f:
        f.write(f"step_us = {round(itl_ms * 1000)}\nkv_bytes_per_token = 131072\nkv_bytes = 56623104000\n")
    return path


def dynamo_pace(args, work):
    """Its mocker looks step times up in a table; ours has one value. Written by its own Python, which has numpy."""
    path = os.path.join(work, "pace.npz")
    code = (
        "import numpy as np, sys\n"
        "t = float(sys.argv[2])\n"
        "np.savez(sys.argv[1], prefill_isl=[1.0, 1e6], prefill_ttft_ms=[t, t], decode_active_kv_tokens=[0.0, 1e9],\n"
        "         decode_context_length=[1.0, 1e6], decode_itl=[[t, t], [t, t]])\n"
    )
    frontend.subprocess.run([args.dynamo, "-c", code, path, str(args.itl_ms)], check=True)
    return ("--planner-profile-data", path, "--speedup-ratio", "1")


def table(rows):
    text = "| streams | server | rounds | " + " | ".join(title for _, title, _ in COLUMNS) + " |\n"
    text += "|---" * (len(COLUMNS) + 3) + "|\n"
    for streams in sorted({row["streams"] for row in rows}):
        for server in ("baton", "dynamo"):
            of = [row for row in rows if row["streams"] == streams and row["server"] == server]
            if of:
                cells = [format(statistics.median(row[key] for row in of), form) for key, _, form in COLUMNS]
                text += f"| {streams} | {server} | {len(of)} | " + " | ".join(cells) + " |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", default="target/release/baton")
    parser.add_argument("--dynamo", help="python of an environment with ai-dynamo")
    parser.add_argument("--model", required=True, help="model directory (tokenizer, chat template, config.json)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--streams", default="64,256,512,768")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--first-round", type=int, default=0, help="even: baton goes first")
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--client-core", default="1")
    parser.add_argument("--dynamo-port", type=int, default=18342)
    parser.add_argument("--dynamo-router", default="kv", help="its router mode")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of requests")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    os.sched_setaffinity(0, {int(args.client_core)})
    os.makedirs(args.out, exist_ok=True)
    raw = os.path.join(args.out, "streaming.jsonl")
    work = tempfile.mkdtemp(prefix="streaming-bench-")
    servers = []
    try:
        servers.append(frontend.Baton(args, work, baton_pace(work, args.itl_ms)))
        if args.dynamo:
            servers.append(frontend.Dynamo(args, work, dynamo_pace(args, work)))
        for number in range(args.first_round, args.first_round + args.rounds):
            for streams in map(int, args.streams.split(",")):
                flags = ["-c", str(streams), "--input-words", "16", "--output-tokens", str(TOKENS)]
                for server in servers if number % 2 == 0 else servers[::-1]:
                    row = frontend.measure(args, server, "paced", flags, streams * WAVES)
                    row |= {"round": number, "streams": streams, "itl_ms": args.itl_ms,
                            "asked_tokens_per_s": streams * 1e3 / args.itl_ms}
                    for part in ("front", "workers"):
                        row[f"{part}_cpu_us_per_token"] = row[f"{part}_cpu_ms_per_request"] * 1e3 / TOKENS
                    with open(raw, "a") as f:
                        f.write(json.dumps(row) + "\n")
                    print(json.dumps(row), file=sys.stderr, flush=True)
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(work, ignore_errors=True)
    with open(raw) as f:
        text = table([json.loads(line) for line in f])
    with open(os.path.join(args.out, "streaming.md"), "w") as f:
        f.write(text)
    print(text)


if __name__ == "__main__":
    main()
