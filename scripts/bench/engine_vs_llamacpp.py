#!/usr/bin/env python3
"""Measures baton's engine and llama.cpp side by side: same weights, same threads, alternately in one session.

    scripts/bench/make_models.py --out models
    scripts/bench/engine_vs_llamacpp.py --models models --llama-bin ../llama.cpp/build/bin \\
        --baton target/release/baton --name my-machine

Per figure, llama.cpp's best setting (flash attention, micro-batch) is looked for first; the rounds then alternate between
the two programs, one command each. What is printed is the median over the rounds. Everything the programs said is kept
under docs/benchmarks/<name>/: results.md, raw.jsonl (one line per command, with its output) and machine.json.

The figures are llama.cpp's own: `llama-bench -p` (prefill), `-n` and `-d` (decode), and "S_TG t/s" of `llama-batched-bench`.
Needs a native build of llama.cpp (llama-bench, llama-batched-bench) and no other load on the machine.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Shape and GGUF format of each scenario, most telling first.
SCENARIOS = [
    ("qwen2.5-0.5b", "q8_0"),
    ("qwen2.5-0.5b", "bf16"),
    ("qwen2.5-0.5b", "q4_0"),
    ("llama-3.2-1b", "q8_0"),
    ("llama-3.2-1b", "bf16"),
]
# What baton is told to make of the Hugging Face directory to hold against each format; --baton-flags overrides.
BATON_FLAGS = {"q8_0": "--quantize int8", "q4_0": "--quantize int4", "bf16": "--quantize none"}

GENERATED = 64  # tokens per sequence of a decode figure, as `llama-bench -n 64`
BATCH_PROMPT = 128  # prompt tokens of each sequence of a batch figure
DEPTH = 4096
BATCHED_TRIES = 8  # llama-batched-bench may end before its last line is printed, mostly with tiny models
# name, what it is, ratio to reach
FIGURES = {
    "prefill-512": ("prefill", 512, 3.0),
    "prefill-2048": ("prefill", 2048, 3.0),
    "decode": ("depth", 0, 1.2),
    "decode-at-4096": ("depth", DEPTH, 1.5),
    "batch-16": ("batch", 16, 2.0),
    "batch-32": ("batch", 32, 2.0),
}


class Session:
    """Runs commands and keeps what they say."""

    def __init__(self, directory, prefix, timeout, hidden):
        self.prefix, self.timeout, self.hidden = shlex.split(prefix), timeout, hidden
        self.raw = (directory / "raw.jsonl").open("w")

    def run(self, command, **about):
        print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
        start = time.time()
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, timeout=self.timeout)
        record = {
            **about, "command": command, "started": round(start), "seconds": round(time.time() - start, 1),
            "exit_code": done.returncode, "output": parsed(done.stdout),
        }
        if done.returncode != 0:
            record["stderr"] = done.stderr[-4000:]
        line = json.dumps(record)
        for path, name in self.hidden.items():
            line = line.replace(path, name)
        self.raw.write(line + "\n")
        self.raw.flush()
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
        return record["output"]


def parsed(text):
    """JSON if it is (a document, or a line each), else the text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows or text


class LlamaCpp:
    """llama-bench and llama-batched-bench on one GGUF file."""

    def __init__(self, session, args, model):
        self.session, self.bin, self.model, self.threads = session, args.llama_bin, model, args.threads

    def measure(self, kind, size, setting, **about):
        """Tokens per second with one setting, or a list of (setting, rate) with several."""
        if kind == "batch":
            return self.batched(size, setting, **about)
        command = [str(self.bin / "llama-bench"), "-m", str(self.model), "-t", str(self.threads), "-o", "json", "-r", "1"]
        command += ["-fa", ",".join(setting["fa"])]
        if kind == "prefill":
            ubatch = ",".join(str(u) for u in setting["ubatch"])
            command += ["-p", str(size), "-n", "0", "-ub", ubatch, "-b", "2048"]
        else:
            command += ["-p", "0", "-n", str(GENERATED), "-d", str(size)]
        rows = self.session.run(command, side="llama.cpp", **about)
        return [(self.setting_of(row, kind), row["avg_ts"]) for row in rows]

    def batched(self, size, setting, **about):
        found = []
        for fa in setting["fa"]:
            command = [
                str(self.bin / "llama-batched-bench"), "-m", str(self.model), "-t", str(self.threads), "-tb",
                str(self.threads), "-fa", fa, "-npp", str(BATCH_PROMPT), "-ntg", str(GENERATED), "-npl", str(size), "-c",
                str(size * (BATCH_PROMPT + GENERATED)), "-b", "2048", "-ub", "512", "--output-format", "jsonl",
            ]
            for _ in range(BATCHED_TRIES):
                row = self.session.run(command, side="llama.cpp", **about)
                if isinstance(row, dict) and row.get("pl") == size:
                    found.append(({"fa": [fa]}, row["speed_tg"]))
                    break
            else:
                raise RuntimeError(f"{shlex.join(command)} printed no result")
        return found

    @staticmethod
    def setting_of(row, kind):
        # Older versions print numbers, newer ones words.
        fa = "on" if str(row["flash_attn"]).lower() in ("1", "on", "true") else "off"
        return {"fa": [fa], "ubatch": [row["n_ubatch"]]} if kind == "prefill" else {"fa": [fa]}

    def best_setting(self, kind, size, **about):
        tried = {"fa": ["off", "on"], "ubatch": sorted({min(u, size) for u in (256, 512, 2048)})}
        found = self.measure(kind, size, tried, phase="tuning", **about)
        return max(found, key=lambda item: item[1])[0]


class Baton:
    """`baton bench engine` on the Hugging Face directory."""

    def __init__(self, session, args, model, flags, limits):
        self.session, self.model, self.flags, self.limits = session, model, flags, limits
        self.baton, self.threads = args.baton, args.threads

    def measure(self, kind, size, **about):
        wanted = {
            "prefill": ["--prefill", str(size)],
            "depth": ["--decode-depth", str(size)],
            "batch": ["--decode-batch", str(size), "--batch-prompt", str(BATCH_PROMPT)],
        }[kind]
        command = [str(self.baton), "bench", "engine", "--model", str(self.model), "--threads", str(self.threads)]
        command += ["--json", "--quiet", "--repeat", "1", "--decode-tokens", str(GENERATED), *wanted, *self.flags]
        command += ["--limits", str(self.limits)]
        return self.session.run(command, side="baton", **about)["figures"][0]


def machine(args):
    """What was measured on and with, for people who compare."""
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)

    def said(command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return (done.stdout + done.stderr).strip()

    here = Path(__file__).resolve().parent
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"), "cpu": cpu, "cores": os.cpu_count(), "threads": args.threads,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "llama.cpp": said([str(args.llama_bin / "llama-bench"), "--version"]).splitlines()[:2],
        "baton": None if args.only == "llama" else said([str(args.baton), "--version"]),
        "commit": said(["git", "-C", str(here), "rev-parse", "HEAD"]), "rounds": args.rounds,
    }


def percent(fraction):
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def table(results):
    """The results as markdown."""
    lines = [
        "| weights | figure | llama.cpp tok/s | baton tok/s | ratio | aim | reached | best read GB/s | of it | of arithmetic |",
        "|---|---|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for (shape, fmt), figures in results.items():
        for name, got in figures.items():
            aim = FIGURES[name][2]
            llama = statistics.median(got["llama"]) if got["llama"] else None
            baton = statistics.median(f["tokens_per_s"] for f in got["baton"]) if got["baton"] else None
            ratio = baton / llama if baton and llama else None
            last = got["baton"][-1] if got["baton"] else {}
            cells = [
                f"{shape} {fmt}", name, f"{llama:.1f}" if llama else "", f"{baton:.1f}" if baton else "",
                f"{ratio:.2f}" if ratio else "", f"{aim:.1f}", "" if ratio is None else "yes" if ratio >= aim else "no",
                f"{got['bandwidth']:.1f}" if got.get("bandwidth") else "", percent(last.get("memory_fraction")), percent(last.get("arithmetic_fraction")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True, help="what make_models.py wrote")
    p.add_argument("--llama-bin", type=Path, required=True, help="directory of llama-bench and llama-batched-bench")
    p.add_argument("--baton", type=Path, default=Path("target/release/baton"), help="default: %(default)s")
    p.add_argument("--name", required=True, help="the results go to docs/benchmarks/<name>/")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of both programs (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    p.add_argument("--scenario", action="append", help="SHAPE/FORMAT, such as qwen2.5-0.5b/q8_0; may be repeated (default: all)")
    p.add_argument("--figure", action="append", choices=FIGURES, help="may be repeated (default: all)")
    p.add_argument("--baton-flags", action="append", default=[], metavar="FORMAT=FLAGS",
                   help=f"flags of `baton bench engine` for a format (default: {BATON_FLAGS})")
    p.add_argument("--only", choices=["llama", "baton"], help="measure one side only")
    p.add_argument("--prefix", default="", help="command to run every command under, such as 'taskset -c 0-7'")
    p.add_argument("--timeout", type=float, default=900, help="seconds for one command (default: %(default)s)")
    args = p.parse_args()
    flags = BATON_FLAGS | dict(item.split("=", 1) for item in args.baton_flags)
    scenarios = [tuple(s.rsplit("/", 1)) for s in args.scenario] if args.scenario else SCENARIOS
    for scenario in scenarios:
        if len(scenario) != 2 or scenario[1] not in flags:
            p.error(f"a scenario is SHAPE/FORMAT with a format of {', '.join(flags)}, not {'/'.join(scenario)}")
    figures = args.figure or list(FIGURES)

    directory = Path(__file__).resolve().parents[2] / "docs/benchmarks" / args.name
    directory.mkdir(parents=True, exist_ok=True)
    about = machine(args)
    # What is kept says which program and model, not where they lay on this machine.
    hidden = {f"{args.llama_bin}/": "", f"{args.models}/": "models/", str(args.baton): "baton", f"{directory}/": ""}
    session = Session(directory, args.prefix, args.timeout, hidden)
    limits = directory / "limits.json"
    results = {}
    for shape, fmt in scenarios:
        llama = LlamaCpp(session, args, args.models / f"{shape}-{fmt}.gguf")
        baton = Baton(session, args, args.models / shape, shlex.split(flags[fmt]), limits)
        for name in figures:
            kind, size, _ = FIGURES[name]
            got = results.setdefault((shape, fmt), {}).setdefault(name, {"llama": [], "baton": [], "setting": None})
            where = {"scenario": f"{shape}/{fmt}", "figure": name}
            try:
                # Before every figure: the bandwidth of a shared machine moves with its neighbours.
                command = [str(args.baton), "bench", "machine", "--threads", str(args.threads), "--json", "--quiet"]
                found = session.run(command, side="machine", **where) if args.only != "llama" else {"memory_reads": []}
                limits.write_text(json.dumps(found, indent=1) + "\n")
                got["bandwidth"] = max((read["gb_per_s"] for read in found["memory_reads"]), default=None)
                if args.only != "baton":
                    got["setting"] = llama.best_setting(kind, size, **where)
                for round_ in range(args.rounds):
                    if args.only != "baton":
                        got["llama"] += [rate for _, rate in llama.measure(kind, size, got["setting"], round=round_, **where)]
                    if args.only != "llama":
                        got["baton"].append(baton.measure(kind, size, round=round_, **where))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{shape} {fmt} {name}: {error}", file=sys.stderr)
                got.setdefault("error", str(error))
            # After every figure, so that an interrupted session leaves what it has.
            about["settings of llama.cpp"] = {
                f"{'/'.join(scenario)} {figure}": g["setting"] for scenario, f in results.items() for figure, g in f.items()
            }
            (directory / "machine.json").write_text(json.dumps(about, indent=1) + "\n")
            heading = f"{about['cpu']}, {args.threads} threads, {about['date']}; medians of {args.rounds} rounds.\n\n"
            (directory / "results.md").write_text(heading + table(results))
    print(table(results))
    failed = [g["error"] for f in results.values() for g in f.values() if "error" in g]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
