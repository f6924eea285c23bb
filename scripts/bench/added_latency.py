#!/usr/bin/env python3
"""What baton's front end adds to the time to first token, the client's and the worker's own time taken apart.

  cargo build --release && cargo build --release -p baton-loadtest --example floor_server
  scripts/bench/added_latency.py --model DIR --out docs/benchmarks/frontend

Same client, same load, one core for everything of a server and one for the client, against two servers in turn:

- the floor (`loadtest/examples/floor_server.rs`): answers with a canned stream as soon as a request is read. Its times are
  those of the client, the kernel and the loopback.
- `baton mock` with engines that take no time: gateway, admission, router, encrypted wire, and the worker's own scheduler and
  engine loop.

*added* is the difference of the percentiles of the two. *outside workers* is measured inside the coordinator, per request
(`baton:time_to_first_token_outside_workers_seconds`): from a request's head to its first token at the gateway, less what the
worker says it had it (queue and first step); percentiles interpolated within buckets. It has no client and no socket in it, and
includes the way to the worker and back.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request

import frontend

LOADS = [
    ("1 client", ["-c", "1"], 3000),
    ("500/s", ["--rate", "500"], 4000),
    ("2000/s", ["--rate", "2000"], 12000),
]
METRIC = "baton:time_to_first_token_outside_workers_seconds_bucket"


class Floor:
    name = "floor"

    def __init__(self, args, _work):
        self.process = subprocess.Popen(["taskset", "-c", args.server_core, args.floor], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.front, self.rest = [self.process.pid], []

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


def outside(url):
    """Bucket's upper end to requests in it or below."""
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    found = {}
    for line in text.splitlines():
        match = re.match(re.escape(METRIC) + r'\{.*le="([^"]+)".*\} (\d+)', line)
        if match:
            found[float(match[1])] = int(match[2])
    return found


def percentile(before, after, share):
    counts = [(end, after[end] - before.get(end, 0)) for end in sorted(after)]
    if not counts or counts[-1][1] == 0:
        return float("nan")
    wanted, low, below = counts[-1][1] * share, 0.0, 0
    for end, count in counts:
        if count >= wanted:
            return (low + (end - low) * (wanted - below) / max(count - below, 1)) * 1e3
        low, below = end, count
    return float("nan")


def table(rows):
    text = ("| load | rounds | floor TTFT p50 / p99 ms | baton TTFT p50 / p99 ms | added p50 / p99 ms | outside workers p50 / p99 ms | "
            "requests/s |\n" + "|---" * 7 + "|\n")
    for load, _, _ in LOADS:
        of = {name: [row for row in rows if row["load"] == load and row["server"] == name] for name in ("floor", "baton")}
        if not all(of.values()):
            continue
        mid = lambda name, key: statistics.median(row[key] for row in of[name])
        cells = [f"{mid(name, 'ttft_p50_ms'):.2f} / {mid(name, 'ttft_p99_ms'):.2f}" for name in ("floor", "baton")]
        added = [mid("baton", key) - mid("floor", key) for key in ("ttft_p50_ms", "ttft_p99_ms")]
        cells.append(f"{added[0]:.2f} / {added[1]:.2f}")
        cells.append(f"{mid('baton', 'outside_p50_ms'):.2f} / {mid('baton', 'outside_p99_ms'):.2f}")
        text += f"| {load} | {len(of['baton'])} | " + " | ".join(cells) + f" | {mid('baton', 'requests_per_s'):.0f} |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", default="target/release/baton")
    parser.add_argument("--floor", default="target/release/examples/floor_server")
    parser.add_argument("--model", required=True, help="model directory (tokenizer, chat template, config.json)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of requests")
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--client-core", default="1")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    os.sched_setaffinity(0, {int(args.client_core)})
    work = tempfile.mkdtemp(prefix="latency-bench-")
    servers, rows = [], []
    try:
        servers += [Floor(args, work), frontend.Baton(args, work)]
        for number in range(args.rounds):
            for load, flags, requests in LOADS:
                for server in servers if number % 2 == 0 else servers[::-1]:
                    before = outside(server.url) if server.name == "baton" else {}
                    flags_all = [*flags, "--input-words", "16", "--output-tokens", "1"]
                    row = frontend.measure(args, server, "added", flags_all, requests) | {"round": number, "load": load}
                    if server.name == "baton":
                        after = outside(server.url)
                        row |= {f"outside_p{share}_ms": percentile(before, after, share / 100) for share in (50, 99)}
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(work, ignore_errors=True)
    text = table(rows)
    print(text)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "latency.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    with open(os.path.join(args.out, "latency.md"), "w") as f:
        f.write(text)


if __name__ == "__main__":
    main()
