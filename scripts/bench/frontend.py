#!/usr/bin/env python3
"""The front end alone, with mock workers: baton beside NVIDIA Dynamo (its frontend and its mocker), same client.

  python3 -m venv V
  V/bin/pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1     # aisimulate, a dependency, is not on PyPI
  V/bin/pip install 'pydantic>=2.10.6,<=2.13.5' uvloop aiohttp certifi 'kubernetes<33' msgspec prometheus-client \
      pyzmq redis tqdm 'transformers>=4.56' zstandard typing-extensions
  scripts/bench/frontend.py --baton target/release/baton --dynamo V/bin/python --model DIR --out docs/benchmarks/frontend

Everything of a server (front end and workers) runs on one core, the client on another. Rounds are interleaved, and
what is reported are medians. Needs Linux, two cores, `taskset`, and a model directory with tokenizer, chat template and
config.json (no weights). Without --dynamo only baton is measured.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

# name, flags of `baton bench`, how many requests
CASES = [
    ("latency", ["-c", "1", "--input-words", "16", "--output-tokens", "1"], 400),
    ("requests", ["-c", "256", "--input-words", "16", "--output-tokens", "1"], 4000),
    ("stream", ["-c", "256", "--input-words", "16", "--output-tokens", "128"], 1024),
    ("agent", ["-c", "8", "--input-words", "6000", "--shared-prefix-words", "5800", "--shared-system",
               "--output-tokens", "4"], 240),
]
TICKS = os.sysconf("SC_CLK_TCK")


def children(pid):
    """The process and all below it."""
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as f:
                    todo += [int(child) for child in f.read().split()]
        except FileNotFoundError:
            pass
    return found


def cpu_seconds(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def rss_mb(pids):
    text = "".join(open(f"/proc/{pid}/status").read() for pid in pids)
    return sum(int(kb) for kb in re.findall(r"VmRSS:\s+(\d+)", text)) / 1024


def wait_for(what, probe, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        if probe():
            return
        time.sleep(0.2)
    sys.exit(f"{what} did not start in {seconds} s")


def lists_a_model(url):
    try:
        with urllib.request.urlopen(url + "/v1/models", timeout=2) as answer:
            return bool(json.load(answer)["data"])
    except (OSError, ValueError, KeyError):
        return False


class Baton:
    name = "baton"

    def __init__(self, args, work, profile="instant"):
        data = os.path.join(work, "baton")
        command = [args.baton, "mock", "--workers", str(args.workers), "--port", "0", "--data-dir", data]
        command += ["--model", args.model, "--profile", profile]
        log = open(os.path.join(work, "baton.log"), "w")
        self.process = subprocess.Popen(["taskset", "-c", args.server_core, *command], stdout=log, stderr=log)
        ready = os.path.join(data, "ready.json")
        wait_for("baton", lambda: os.path.exists(ready))
        with open(ready) as f:
            state = json.load(f)
        self.url = state["url"]
        self.front = [state["coordinators"][0]["pid"]]
        self.rest = [self.process.pid]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class Dynamo:
    name = "dynamo"

    def __init__(self, args, work, speed=("--speedup-ratio", "0")):
        env = os.environ | {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": os.path.join(work, "kv"), "DYN_LOG": "warn"}
        planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        port = str(args.dynamo_port)
        core = ["taskset", "-c", args.server_core, args.dynamo, "-m"]
        log = open(os.path.join(work, "dynamo.log"), "w")
        self.processes = [
            subprocess.Popen(core + module + planes, stdout=log, stderr=log, env=env)
            for module in (
                ["dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", port, "--router-mode", args.dynamo_router],
                ["dynamo.mocker", "--model-path", args.model, "--num-workers", str(args.workers), *speed,
                 "--block-size", "16", "--num-gpu-blocks-override", "27000"],
            )
        ]
        self.url = f"http://127.0.0.1:{port}"
        wait_for("dynamo", lambda: lists_a_model(self.url), 240)
        time.sleep(3)
        self.front = children(self.processes[0].pid)
        self.rest = children(self.processes[1].pid)

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(args, server, case, flags, requests):
    before = cpu_seconds(server.front), cpu_seconds(server.rest)
    command = ["taskset", "-c", args.client_core, args.baton, "bench", "--url", server.url, "--json", "-q"]
    command += [*flags, "-n", str(max(int(requests * args.scale), 8)), "--ignore-eos", "--warmup", "4"]
    command += ["--seed", str(int(time.time() * 1000) % (1 << 31))]
    began = os.times()
    report = subprocess.run(command, capture_output=True, text=True)
    ended = os.times()
    if report.returncode != 0:
        sys.exit(f"{server.name} {case}: {report.stderr}\n{report.stdout}")
    report = json.loads(report.stdout)
    # The warm-up's requests are in the CPU time.
    count = report["requests_completed"] + 4
    client = ended.children_user + ended.children_system - began.children_user - began.children_system
    return {
        "server": server.name,
        "case": case,
        "completed": report["requests_completed"],
        "failed": report["requests_failed"],
        "requests_per_s": report["requests_per_s"],
        "output_tokens_per_s": report["output_tokens_per_s"],
        # Tokens that a server sends together are one chunk.
        "chunks_per_s": report["output_chunks"] / report["duration_s"],
        "chunks_per_token": report["output_chunks"] / max(report["output_tokens"], 1),
        "itl_p50_ms": report["itl_ms"]["p50"],
        "itl_p99_ms": report["itl_ms"]["p99"],
        "input_tokens_per_s": report["input_tokens"] / report["duration_s"],
        "input_tokens_per_request": report["input_tokens"] / max(report["requests_completed"], 1),
        "output_tokens_per_request": report["output_tokens"] / max(report["requests_completed"], 1),
        "ttft_p50_ms": report["ttft_ms"]["p50"],
        "ttft_p99_ms": report["ttft_ms"]["p99"],
        "e2e_p50_ms": report["e2e_ms"]["p50"],
        "e2e_p99_ms": report["e2e_ms"]["p99"],
        "front_cpu_ms_per_request": (cpu_seconds(server.front) - before[0]) / count * 1e3,
        "workers_cpu_ms_per_request": (cpu_seconds(server.rest) - before[1]) / count * 1e3,
        "client_busy": client / report["duration_s"],
        "front_rss_mb": rss_mb(server.front),
    }


def idle(server):
    began, before = time.time(), cpu_seconds(server.front + server.rest)
    time.sleep(3)
    return (cpu_seconds(server.front + server.rest) - before) / (time.time() - began)


def plain_latency(server, count=100):
    """Median time of an answer that is not streamed, on one connection, in ms: the bench's requests are all streamed, and
    small writes of a stream may wait for a delayed acknowledgement (40 ms on Linux)."""
    model = json.load(urllib.request.urlopen(server.url + "/v1/models"))["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 1}
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    times = []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        times.append((time.perf_counter() - began) * 1e3)
        if answer.status != 200:
            sys.exit(f"{server.name}: status {answer.status}")
    connection.close()
    return statistics.median(times)


COLUMNS = [
    ("requests_per_s", "requests/s", ".0f"),
    ("output_tokens_per_s", "output tokens/s", ".0f"),
    ("chunks_per_s", "chunks/s", ".0f"),
    ("input_tokens_per_s", "input tokens/s", ".0f"),
    ("e2e_p50_ms", "p50 ms", ".2f"),
    ("e2e_p99_ms", "p99 ms", ".2f"),
    ("front_cpu_ms_per_request", "front end CPU ms/request", ".3f"),
    ("workers_cpu_ms_per_request", "workers CPU ms/request", ".3f"),
    ("client_busy", "client core busy", ".0%"),
    ("front_rss_mb", "front end RSS MB", ".0f"),
]


def table(rows, servers):
    text = "| case | server | " + " | ".join(title for _, title, _ in COLUMNS) + " |\n"
    text += "|---" * (len(COLUMNS) + 2) + "|\n"
    for case, _, _ in CASES:
        for server in servers:
            of = [row for row in rows if row["case"] == case and row["server"] == server.name]
            if of:
                cells = [format(statistics.median(row[key] for row in of), form) for key, _, form in COLUMNS]
                text += f"| {case} | {server.name} | " + " | ".join(cells) + " |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", default="target/release/baton")
    parser.add_argument("--dynamo", help="python of an environment with ai-dynamo")
    parser.add_argument("--model", required=True, help="model directory (tokenizer, chat template, config.json)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of requests")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--client-core", default="1")
    parser.add_argument("--dynamo-port", type=int, default=18342)
    parser.add_argument("--dynamo-router", default="kv", help="its router mode")
    parser.add_argument("--out", help="directory for raw.jsonl and results.md")
    args = parser.parse_args()
    os.sched_setaffinity(0, {int(args.client_core)})
    work = tempfile.mkdtemp(prefix="frontend-bench-")
    servers, rows = [], []
    try:
        servers.append(Baton(args, work))
        if args.dynamo:
            servers.append(Dynamo(args, work))
        notes = [f"{server.name} idle: {idle(server):.1%} of a core, front end {rss_mb(server.front):.0f} MB" for server in servers]
        plain = [statistics.median(plain_latency(server) for _ in range(3)) for server in servers]
        notes += [f"{server.name}, one token, not streamed: p50 {ms:.2f} ms" for server, ms in zip(servers, plain)]
        for round_number in range(args.rounds):
            for case, flags, requests in CASES:
                if args.case and case not in args.case:
                    continue
                for server in servers if round_number % 2 == 0 else servers[::-1]:
                    row = measure(args, server, case, flags, requests) | {"round": round_number}
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(work, ignore_errors=True)
    text = table(rows, servers) + "\n" + "\n".join(notes) + "\n"
    print(text)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, "raw.jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        with open(os.path.join(args.out, "results.md"), "w") as f:
            f.write(text)


if __name__ == "__main__":
    main()
