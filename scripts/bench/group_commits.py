#!/usr/bin/env python3
"""Durable commits per second of baton's coordinator group and of etcd, side by side on one disk.

    apt-get install etcd-server
    cargo build --release -p baton-raftstore --example commits
    scripts/bench/group_commits.py --commits target/release/examples/commits --name my-machine

Three etcd members on loopback, each with its data directory beside the three of baton, all on the disk of --dir. For each number
of writers the two systems run in turn, --rounds times; what is printed is the median. Both are driven by the same program
(coordinator/raftstore/examples/commits): a writer waits for its commit before the next; records of 16 + 216 bytes.

What is not equal: baton's members share one process and reach each other through queues, as its gateways reach their
coordinator; etcd's clients and members use gRPC over loopback TCP, since it offers nothing else. A second row for etcd with one
member shows what its disk and interface cost without a group. Results go to docs/benchmarks/<name>/group_commits.md and .json.
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Etcd:
    """A cluster on loopback, with its data below `directory`."""

    def __init__(self, directory, members):
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-", dir=directory))
        ports = free_ports(2 * members)
        clients, peers = ports[:members], ports[members:]
        cluster = ",".join(f"m{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
        self.endpoints = [f"http://127.0.0.1:{port}" for port in clients]
        self.log = open(self.directory / "log", "w")
        self.processes = [
            subprocess.Popen(
                ["etcd", "--name", f"m{i}", "--data-dir", str(self.directory / f"m{i}"),
                 "--listen-client-urls", self.endpoints[i], "--advertise-client-urls", self.endpoints[i],
                 "--listen-peer-urls", f"http://127.0.0.1:{peers[i]}",
                 "--initial-advertise-peer-urls", f"http://127.0.0.1:{peers[i]}",
                 "--initial-cluster", cluster, "--quota-backend-bytes", str(8 << 30), "--log-level", "error"],
                stdout=self.log, stderr=self.log)
            for i in range(members)
        ]
        for endpoint in self.endpoints:
            self.wait(endpoint)

    def wait(self, endpoint):
        for _ in range(150):
            try:
                with urllib.request.urlopen(f"{endpoint}/health", timeout=1) as answer:
                    if json.load(answer).get("health") == "true":
                        return
            except OSError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"etcd at {endpoint} is not healthy after 30 s; see {self.log.name}")

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(20)
        self.log.close()
        shutil.rmtree(self.directory)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", default="target/release/examples/commits", help="the built example")
    parser.add_argument("--dir", default=".", help="a folder on the disk to be measured")
    parser.add_argument("--name", required=True, help="folder under docs/benchmarks for the results")
    parser.add_argument("--writers", default="1,64,1024")
    parser.add_argument("--members", default="1,3")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if shutil.which("etcd") is None:
        raise SystemExit("etcd is missing: apt-get install etcd-server")
    version = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    raw = []
    for members in (int(number) for number in options.members.split(",")):
        for writers in (int(number) for number in options.writers.split(",")):
            load = ["--writers", str(writers), "--seconds", str(options.seconds)]
            for _ in range(options.rounds):
                result, note = run([options.commits, "--members", str(members), "--dir", options.dir, *load])
                raw.append({**result, "note": note})
                print(raw[-1], flush=True)
                etcd = Etcd(options.dir, members)
                try:
                    result, note = run([options.commits, "--etcd", ",".join(etcd.endpoints), *load])
                finally:
                    etcd.stop()
                raw.append({**result, "note": note})
                print(raw[-1], flush=True)
    lines = [f"# Durable commits: baton's group and {version}", "",
             f"`{Path(__file__).name}`, median of {options.rounds} rounds of {options.seconds} s, in turn on one disk.", "",
             "| members | writers | baton commits/s | p50, p99 ms | etcd commits/s | p50, p99 ms | ratio |",
             "|---|---|---|---|---|---|---|"]
    keys = sorted({(row["members"], row["writers"]) for row in raw})
    for members, writers in keys:
        def median(system, field):
            rows = [row[field] for row in raw
                    if (row["system"], row["members"], row["writers"]) == (system, members, writers)]
            return statistics.median(rows)
        ours, theirs = median("baton", "commits_per_s"), median("etcd", "commits_per_s")
        lines.append(f"| {members} | {writers} | {ours:,.0f} | {median('baton', 'p50_ms'):.2f}, {median('baton', 'p99_ms'):.2f} "
                     f"| {theirs:,.0f} | {median('etcd', 'p50_ms'):.2f}, {median('etcd', 'p99_ms'):.2f} | {ours / theirs:.1f}× |")
    folder = Path("docs/benchmarks") / options.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "group_commits.md").write_text("\n".join(lines) + "\n")
    (folder / "group_commits.json").write_text("\n".join(json.dumps(row) for row in raw) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
