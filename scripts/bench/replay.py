#!/usr/bin/env python3
"""Replays a trace against a live cluster of mock workers (real gateway, router, wire) and in the simulator, side by side.

  cargo build --release
  scripts/bench/replay.py --trace mooncake_conversation.jsonl --out docs/benchmarks/replay

Everything runs `--speed` times faster than recorded: arrivals (`baton bench --speed`), steps (`baton mock --speed`) and
targets. What does not scale is the same in the simulator (`--time-scale`): heartbeats, delays of block events. The table
converts times back to those of the machines pretended to be. A cell is a policy and a size of KV memory; each takes (part of
the trace / speed) and needs an otherwise idle machine. Cells are added to raw.jsonl in --out, and results.md is made of
all that is there, so that cells can be measured one at a time.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

TTFT_TARGET_MS, TPOT_TARGET_MS = 2000, 100
# Of the simulator: messages of block events leave a worker every 25 ms at most, so they are half of that old, and one hop.
EVENT_DELAY_MS = 13


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def coordinator_metrics(url):
    with urllib.request.urlopen(url + "/metrics") as answer:
        text = answer.read().decode()
    found = {}
    for line in text.splitlines():
        match = re.match(r"baton:((?:router|time_to_first_token|request_queue_time|admission)_\w+?)(?:\{[^}]*\})? ([0-9.e+-]+)$", line)
        if match and "bucket" not in match[1]:
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def live(args, policy, kv_mem):
    with tempfile.TemporaryDirectory(prefix="replay-") as data:
        command = [args.baton, "mock", "--word-model", "--workers", str(args.workers), "--profile", args.profile]
        command += ["--speed", str(args.speed), "--kv-mem", kv_mem, "--routing", policy, "--port", "0", "--data-dir", data]
        with open(os.path.join(data, "log"), "w") as log:
            cluster = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            ready = Path(data, "ready.json")
            end = time.time() + 60
            while not ready.exists():
                if time.time() > end or cluster.poll() is not None:
                    sys.exit("the cluster did not start:\n" + Path(data, "log").read_text())
                time.sleep(0.1)
            ready = json.loads(ready.read_text())
            front = ready["coordinators"][0]["pid"]
            command = [args.baton, "bench", "--url", ready["url"], "--trace", args.trace, "--speed", str(args.speed), "--json", "-q"]
            command += ["-n", str(args.requests), "--ignore-eos", "--seed", str(args.seed), "--in-flight-max", "1000"]
            command += ["--ttft-target", str(TTFT_TARGET_MS / args.speed), "--tpot-target", str(TPOT_TARGET_MS / args.speed)]
            before = cpu_seconds(front), cpu_seconds(cluster.pid)
            began = os.times()
            done = subprocess.run(command, capture_output=True, text=True)
            ended = os.times()
            if done.returncode != 0:
                sys.exit(f"baton bench: {done.stderr}{done.stdout}")
            report = json.loads(done.stdout)
            client = ended.children_user + ended.children_system - began.children_user - began.children_system
            report["cores_busy"] = {
                "coordinator": (cpu_seconds(front) - before[0]) / report["duration_s"],
                "workers": (cpu_seconds(cluster.pid) - before[1]) / report["duration_s"],
                "client": client / report["duration_s"],
            }
            report["metrics"] = coordinator_metrics(ready["url"])
            return report
        finally:
            cluster.send_signal(signal.SIGTERM)
            cluster.wait(30)


def simulated(args, policy, kv_mem, time_scale):
    command = [args.baton, "bench", "simulate", "--trace", args.trace, "-n", str(args.requests), "--workers", str(args.workers)]
    command += ["--profile", args.profile, "--kv-mem", kv_mem, "--policy", policy, "--seed", str(args.seed)]
    command += ["--time-scale", str(time_scale), "--event-delay", str(EVENT_DELAY_MS), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"baton bench simulate: {done.stderr}{done.stdout}")
    return json.loads(done.stdout)[0]


def row(kind, cell, report, scale):
    ms = lambda latency, *names: " / ".join(f"{report[latency][name] * scale:.0f}" for name in names)
    itl = " / ".join(f"{report['itl_ms'][name] * scale:.1f}" for name in ("p50", "p99"))
    failed = report.get("requests_failed", report.get("requests_refused", 0))
    goodput = report["goodput_per_s"] / scale
    return (f"| {cell['policy']} | {cell['kv_mem']} | {cell['requests']} | {cell['seed']} | {kind} | {report['hit_rate']:.2%} | "
            f"{report['hit_rate_bound']:.2%} | {ms('ttft_ms', 'p50', 'p90', 'p99')} | {itl} | {report['good_share']:.1%} | "
            f"{goodput:.2f} | {failed} |\n")


def table(cells):
    text = ("| policy | KV per worker | requests | seed | | hit rate | bound | TTFT p50 / p90 / p99 ms | ITL p50 / p99 ms | good | "
            "good/s | failed |\n" + "|---" * 12 + "|\n")
    for cell in cells:
        speed = cell["speed"]
        text += row(f"live, {speed:g} x", cell, cell["live"], speed)
        text += row(f"simulated, {speed:g} x", cell, cell["simulated_compressed"], speed)
        text += row("simulated, 1 x", cell, cell["simulated"], 1)
    text += "\n| policy | KV per worker | seed | coordinator, workers, client: cores busy | send delay p99 ms |\n|---|---|---|---|---|\n"
    for cell in cells:
        busy = ", ".join(f"{cell['live']['cores_busy'][part]:.2f}" for part in ("coordinator", "workers", "client"))
        text += f"| {cell['policy']} | {cell['kv_mem']} | {cell['seed']} | {busy} | {cell['live']['send_delay_ms']['p99']:.1f} |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", default="target/release/baton")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--requests", type=int, default=2000, help="the first so many of the trace")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--profile", default="8xh100-llama3-70b")
    parser.add_argument("--speed", type=float, default=6.0)
    parser.add_argument("--policy", default="cache-aware,least-loaded,round-robin,random")
    parser.add_argument("--kv-mem", default="430GB,1600GiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="directory for raw.jsonl and results.md")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    raw = Path(args.out, "raw.jsonl")
    for kv_mem in args.kv_mem.split(","):
        for policy in args.policy.split(","):
            cell = {"policy": policy, "kv_mem": kv_mem, "requests": args.requests, "seed": args.seed, "speed": args.speed,
                    "workers": args.workers, "profile": args.profile,
                    "live": live(args, policy, kv_mem),
                    "simulated_compressed": simulated(args, policy, kv_mem, args.speed),
                    "simulated": simulated(args, policy, kv_mem, 1)}
            with open(raw, "a") as f:
                f.write(json.dumps(cell) + "\n")
    cells = [json.loads(line) for line in raw.read_text().splitlines()]
    text = table(cells)
    Path(args.out, "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
