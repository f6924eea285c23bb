#!/usr/bin/env python3
"""Measures `baton up` and llama.cpp's server in turn, through HTTP on loopback, with the same clients and prompts.

    scripts/bench/make_models.py --out models --shape qwen2.5-0.5b
    scripts/bench/serve_vs_llamacpp.py --models models --llama-bin ../llama.cpp/build/bin \\
        --baton target/release/baton --name my-machine

`baton bench` is the client of both: a closed loop of 1, 8 and 16 clients, prompts of 264 tokens that differ, answers of
exactly 64; then 16 clients whose prompts begin with the same 512 tokens. Prompt lengths are made exact by asking each
server how many tokens a prompt had. Results and the raw reports go to docs/benchmarks/<name>/serve.md and serve.jsonl.
Both servers have as many slots as there are clients at most; the machine must do nothing else.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

SLOTS = 16
PROMPT, SHARED, OUTPUT = 264, 512, 64
# name: clients, shared tokens, requests, least tokens/s and most TTFT p50 against llama.cpp, most ITL p99 in ms
CASES = {
    "1 client": (1, 0, 8, None, None, None),
    "8 clients": (8, 0, 32, None, None, None),
    "16 clients": (16, 0, 64, 3.0, 0.25, 300),
    "16 clients, shared prefix": (16, SHARED, 64, 6.0, None, None),
}
START_S_MAX = 180  # until a server must answer
STOP_S_MAX = 15  # until a server that was asked to stop is killed
CASE_S_MAX = 900


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server as a child process; gone at the end of the `with`, whatever happens inside."""

    def __init__(self, command, port, ready, log):
        self.command, self.port, self.ready, self.log = command, port, ready, log
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        print(f"+ {shlex.join(self.command)}", file=sys.stderr, flush=True)
        self.child = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, start_new_session=True)
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait(self):
        end = time.monotonic() + START_S_MAX
        while time.monotonic() < end:
            if self.child.poll() is not None:
                raise RuntimeError(f"{self.command[0]} ended with {self.child.returncode}; see {self.log.name}")
            try:
                with urllib.request.urlopen(self.url + self.ready, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{self.command[0]} did not answer within {START_S_MAX} s; see {self.log.name}")

    def __exit__(self, *_):
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.child.pid, sign)
            except ProcessLookupError:
                break
            try:
                self.child.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                continue
        self.child.wait()


def bench(args, url, **flags):
    """One run of `baton bench`: its report."""
    command = [str(args.baton), "bench", "--url", url, "--json", "--quiet", "--ignore-eos", "--output-tokens"]
    command += [str(flags.pop("output_tokens", OUTPUT)), "--seed", str(flags.pop("seed", 0))]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_S_MAX)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed: {(done.stderr + done.stdout).strip()[-500:]}")
    return json.loads(done.stdout)


def words_for(args, url, tokens):
    """How many words make a prompt of `tokens` tokens on this server, its template included."""
    words = tokens
    for _ in range(3):
        got = bench(args, url, requests=1, concurrency=1, input_words=words, output_tokens=1)["input_tokens"]
        if got == tokens:
            break
        words = max(1, words + tokens - got)
    return words


def measure(args, server, side, round_, raw):
    with server:
        overhead = words_for(args, server.url, PROMPT) - PROMPT
        # Each case has prompts of its own: those of an earlier one would be found in the prefix cache.
        for seed, (case, (clients, shared, requests, *_)) in enumerate(CASES.items(), 1):
            if args.case and case not in args.case:
                continue
            report = bench(
                args, server.url, concurrency=clients, requests=requests, warmup=2, seed=seed,
                input_words=PROMPT + shared + overhead, shared_prefix_words=max(0, shared + overhead),
            )
            report |= {"side": side, "case": case, "round": round_}
            report.pop("url")
            report["model"] = Path(report["model"]).name
            raw.write(json.dumps(report) + "\n")
            raw.flush()
            print(f"{side}, {case}: {report['output_tokens_per_s']:.1f} tokens/s out", file=sys.stderr, flush=True)
            yield case, report


def aim(ok, text):
    return f"{text} {'yes' if ok else 'no'}"


def table(results):
    lines = [
        "| case | server | tokens/s out | TTFT p50 ms | ITL p50 ms | ITL p99 ms | prompt tokens | failed | aims |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for case, sides in results.items():
        middle = {}
        for side, reports in sides.items():
            def of(pick):
                return statistics.median(pick(r) for r in reports)
            row = middle[side] = {
                "out": of(lambda r: r["output_tokens_per_s"]), "ttft": of(lambda r: r["ttft_ms"]["p50"]),
                "itl": of(lambda r: r["itl_ms"]["p50"]), "itl99": of(lambda r: r["itl_ms"]["p99"]),
            }
            aims, (_, _, _, rate, ttft, itl99) = "", CASES[case]
            if side == "baton" and "llama.cpp" in middle:
                peer, found = middle["llama.cpp"], [f"{row['out'] / middle['llama.cpp']['out']:.2f} x"]
                if rate:
                    found.append(aim(row["out"] >= rate * peer["out"], f">= {rate:.0f} x"))
                if ttft:
                    found.append(aim(row["ttft"] <= ttft * peer["ttft"], f"TTFT <= {ttft} x"))
                if itl99:
                    found.append(aim(row["itl99"] <= itl99, f"ITL p99 <= {itl99} ms"))
                aims = ", ".join(found)
            tokens = of(lambda r: r["input_tokens"] / max(1, r["requests_completed"]))
            cells = [
                case, side, f"{row['out']:.1f}", f"{row['ttft']:.0f}", f"{row['itl']:.1f}", f"{row['itl99']:.0f}",
                f"{tokens:.0f}", str(sum(r["requests_failed"] for r in reports)), aims,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True, help="what make_models.py wrote")
    p.add_argument("--llama-bin", type=Path, required=True, help="directory of llama-server")
    p.add_argument("--baton", type=Path, default=Path("target/release/baton"), help="default: %(default)s")
    p.add_argument("--name", required=True, help="the results go to docs/benchmarks/<name>/")
    p.add_argument("--shape", default="qwen2.5-0.5b", help="default: %(default)s")
    p.add_argument("--format", default="q8_0", help="GGUF format of llama.cpp's side (default: %(default)s)")
    p.add_argument("--baton-flags", default="--quantize int8", help="more flags for `baton up` (default: %(default)s)")
    p.add_argument("--llama-flags", default="-fa on", help="more flags for llama-server (default: %(default)s)")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of both (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=1, help="each starts both servers anew (default: %(default)s)")
    p.add_argument("--case", action="append", choices=CASES, help="may be repeated (default: all)")
    p.add_argument("--only", choices=["llama", "baton"], help="measure one side only")
    args = p.parse_args()

    directory = Path(__file__).resolve().parents[2] / "docs/benchmarks" / args.name
    directory.mkdir(parents=True, exist_ok=True)
    results = {}
    with tempfile.TemporaryDirectory() as scratch, (directory / "serve.jsonl").open("w") as raw:
        def llama():
            port, log = free_port(), open(Path(scratch) / "llama.log", "w")
            context = SLOTS * (PROMPT + SHARED + OUTPUT + 184)  # 1024 a slot
            command = [
                str(args.llama_bin / "llama-server"), "-m", str(args.models / f"{args.shape}-{args.format}.gguf"), "-t",
                str(args.threads), "-tb", str(args.threads), "-np", str(SLOTS), "-c", str(context), "--host", "127.0.0.1",
                "--port", str(port), *shlex.split(args.llama_flags),
            ]
            return Server(command, port, "/health", log)

        def baton():
            port, log = free_port(), open(Path(scratch) / "baton.log", "w")
            command = [
                str(args.baton), "up", "--prefill", "0", "--decode", "1", "--model", str(args.models / args.shape),
                "--port", str(port), "--threads", str(args.threads), "--data-dir", str(Path(scratch) / "data"),
                *shlex.split(args.baton_flags),
            ]
            return Server(command, port, "/ready", log)

        sides = {"llama.cpp": llama, "baton": baton}
        try:
            for round_ in range(args.rounds):
                for side, start in sides.items():
                    if args.only and not side.startswith(args.only):
                        continue
                    for case, report in measure(args, start(), side, round_, raw):
                        results.setdefault(case, {}).setdefault(side, []).append(report)
        except RuntimeError as error:
            for log in Path(scratch).glob("*.log"):
                print(f"-- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
            sys.exit(str(error))
        finally:
            if results:
                heading = f"{args.shape}, llama.cpp: {args.format} {args.llama_flags}; baton: {args.baton_flags or 'bf16'}; "
                heading += f"{args.threads} threads, {time.strftime('%Y-%m-%d %H:%M %Z')}; medians of {args.rounds} rounds.\n\n"
                (directory / "serve.md").write_text(heading + table(results))
    print(table(results))


if __name__ == "__main__":
    main()
