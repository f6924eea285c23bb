#!/usr/bin/env python3
"""Kills and stops coordinators of a group under load, in a loop, and checks what must hold.

    cargo build --release && scripts/soak/group.py --minutes 10

Starts `baton up --coordinators 3` on the demo model. Clients of every coordinator stream answers without a pause. Every few
seconds one coordinator is killed with SIGKILL (`baton up` starts it again) or stopped with SIGSTOP for longer than an
election takes; every other time it is the leader.

It must hold: no request of a client fails whose own coordinator was left alone; every answer that a client got to its end has
its record, and no record is there twice; all members come to the same hash at the same index. Afterwards every row is read
through the feed with its cursor, whose numbers must have no gap, and held against what the client of that request saw: ended
or cut, tokens of prompt and answer, and what they cost by the price that was set. The export must pass `baton ledger verify`. Measured: the time from the blow to a new leader. Needs nothing but Python.
"""

import argparse
import http.client
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

# A life shorter than this counts as fast, in seconds; the supervisor's own limit and some time for its restart.
FAST_S = 75
# Fast deaths in a row of one member, below the supervisor's limit: its pause before a restart is two seconds then.
FAST_DEATHS = 4

ROOT = pathlib.Path(__file__).resolve().parents[2]


def get(url, path, timeout=5.0):
    """Status and body, or None if there is no answer."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def post(url, path, body):
    """Posts JSON, and expects it to work."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        sys.exit(f"FAILED: POST {path}: {answer.status} {text[:300]!r}")
    return json.loads(text)


class Group:
    """A running `baton up`."""

    def __init__(self, binary, directory, workers):
        self.data = pathlib.Path(directory) / "data"
        log = open(pathlib.Path(directory) / "up.log", "wb")
        command = [binary, "up", "--port", "0", "--coordinators", "3", "--prefill", "0", "--decode", str(workers),
                   "--threads", "1", "--data-dir", str(self.data)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (self.data / "ready.json").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the group did not start; see {directory}")
            time.sleep(0.1)

    def coordinators(self):
        return json.loads((self.data / "ready.json").read_text())["coordinators"]

    def leader(self, among):
        """Index of the member that says it leads, or None."""
        for index in among:
            answer = get(self.urls[index], "/metrics", 0.5)
            if answer and b"\nbaton:raft_leader 1" in answer[1]:
                return index
        return None

    def members(self, url):
        answer = get(url, "/cluster/coordinators")
        if not answer or answer[0] != 200:
            return []
        return json.loads(answer[1])["coordinators"]

    def agree(self, patience=60):
        """Waits until all members have applied the same; their settled count."""
        deadline = time.monotonic() + patience
        members = []
        while time.monotonic() < deadline:
            members = self.members(self.urls[0])
            same = {(m["applied_index"], m["state_hash"], m["settled"], m["reachable"]) for m in members}
            if len(members) == 3 and len(same) == 1 and members[0]["reachable"]:
                return members[0]["settled"]
            time.sleep(0.2)
        sys.exit(f"FAILED: the members do not agree: {members}")


# USD per million tokens, so that every token costs whole nano-units: 20,000, 2,000 and 80,000.
PRICE = {"model": "baton-demo", "input": "20", "cached_input": "2", "output": "80"}
NANO = {"input_nano": 20_000, "cached_input_nano": 2_000, "output_nano": 80_000}


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.sent = 0
        self.answered = 0
        self.excused = 0
        self.failures = []
        # Of each answer that began, by request id: the tokens of its chunks, and its usage if it came to the end.
        self.seen = {}
        # When each member was last struck, and since when it is well again (None: it is not).
        self.struck = [0.0, 0.0, 0.0]
        self.well = [0.0, 0.0, 0.0]
        # For the supervisor's patience.
        self.born = [time.monotonic()] * 3
        self.fast_deaths = [0, 0, 0]


def saw(text):
    """Request id, whether it came to its end, and its usage, of a streamed answer or the beginning of one."""
    request_id, usage = None, None
    for line in text.split(b"\n\n")[:-1]:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            request_id = chunk.get("id", request_id)
            usage = chunk.get("usage") or usage
    return request_id and (request_id, b"data: [DONE]" in text, usage)


def read_feed(url):
    """Every row of the ledger, by the cursor; the numbers must have no gap."""
    rows, after = [], 0
    while True:
        status, body = get(url, f"/v1/ledger/rows?after={after}&limit=500", 20) or (None, b"")
        if status != 200:
            raise RuntimeError(f"the feed answers {status}: {body[:200]!r}")
        page = json.loads(body)["rows"]
        if not page:
            return rows
        for row in page:
            after += 1
            if int(row["sequence"]) != after:
                raise RuntimeError(f"the feed goes on with row {row['sequence']} where {after} is next")
            rows.append(row)


def compare(rows, tally):
    """What is wrong with the records, held against what clients saw."""
    wrong, records = [], {}
    for row in rows:
        usage = row["usage"]
        if usage["request_id"] in records:
            wrong.append(f"two rows for {usage['request_id']}")
        records[usage["request_id"]] = usage
        prompt, cached, completion = (int(usage.get(name, 0)) for name in
                                      ("prompt_tokens", "cached_tokens", "completion_tokens"))
        counts = {"input_nano": prompt - cached, "cached_input_nano": cached, "output_nano": completion}
        # Nothing is charged where nothing was delivered.
        ended_well = usage["status"] in ("completed", "length")
        due = {name: count * NANO[name] if completion or ended_well else 0 for name, count in counts.items()}
        charged = {name: int(row["charge"].get(name, 0)) for name in NANO}
        if charged != due:
            wrong.append(f"{usage['request_id']} ({usage['status']}) is charged {charged}, not {due}")
    for request_id, (ended, told) in tally.seen.items():
        record = records.get(request_id)
        if record is None:
            if ended:
                wrong.append(f"no record of {request_id}, which was answered")
        elif ended:
            cached = told["prompt_tokens_details"]["cached_tokens"]
            theirs = (told["prompt_tokens"], cached, told["completion_tokens"], "length")
            ours = tuple(int(record.get(name, 0)) for name in ("prompt_tokens", "cached_tokens", "completion_tokens"))
            if (*ours, record["status"]) != theirs:
                wrong.append(f"{request_id}: its client saw {theirs}, on record is {(*ours, record['status'])}")
    return wrong


def verify(binary, url, directory):
    """Exports the ledger and has it verified; what is wrong with it."""
    path = str(pathlib.Path(directory) / "ledger.jsonl")
    for command in (["ledger", "export", "--url", url, "-o", path], ["ledger", "verify", path]):
        done = subprocess.run([binary, *command], capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            return [f"baton {' '.join(command)}: {done.stdout[-300:]} {done.stderr[-300:]}"]
    print(done.stdout.strip(), file=sys.stderr)
    return []


def client(group, index, tally, stop, number):
    body = json.dumps({"model": "baton-demo", "stream": True, "stream_options": {"include_usage": True},
                       "messages": [{"role": "user", "content": f"client {number} and so on"}],
                       "max_tokens": 24, "ignore_eos": True})
    parts = urllib.parse.urlsplit(group.urls[index])
    while not stop.is_set():
        with tally.lock:
            well = tally.well[index]
        if well is None:
            time.sleep(0.05)
            continue
        began = time.monotonic()
        with tally.lock:
            tally.sent += 1
        why, text = None, b""
        try:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=40)
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = b""
            while True:
                part = answer.read1(65536)
                if not part:
                    break
                text += part
            if answer.status != 200:
                why = f"status {answer.status}: {text[:200]!r}"
            elif b"data: [DONE]" not in text or b'"completion_tokens":24' not in text.replace(b" ", b""):
                why = f"no end: {text[-300:]!r}"
        except (OSError, http.client.HTTPException) as error:
            why = repr(error)
        finally:
            connection.close()
        seen = saw(text)
        with tally.lock:
            if seen:
                tally.seen[seen[0]] = seen[1:]
            if why is None:
                tally.answered += 1
            elif tally.struck[index] >= began or tally.well[index] is None:
                tally.excused += 1
            else:
                tally.failures.append(f"member {index}, {time.monotonic() - began:.1f} s: {why}")


def strike(group, tally, random_, turn):
    """One blow; returns (what, whether a leader was hit, seconds to a new leader)."""
    leader = group.leader(range(3))
    if leader is None:
        return None
    victim = leader if turn % 2 == 0 else random_.choice([i for i in range(3) if i != leader])
    others = [i for i in range(3) if i != victim]
    pid = group.coordinators()[victim]["pid"]
    # `baton up` leaves a process dead that dies seven times in a row within a minute of its start.
    lived = time.monotonic() - tally.born[victim]
    fast = tally.fast_deaths[victim] + 1 if lived < FAST_S else 1
    kill = random_.random() < 0.5 and fast <= FAST_DEATHS
    with tally.lock:
        tally.well[victim] = None
        tally.struck[victim] = time.monotonic()
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL if kill else signal.SIGSTOP)
    took = None
    if victim == leader:
        while took is None and time.monotonic() - began < 30:
            if group.leader(others) is not None:
                took = time.monotonic() - began
            else:
                time.sleep(0.01)
        if took is None:
            tally.failures.append("no new leader in 30 s")
    if kill:
        tally.born[victim], tally.fast_deaths[victim] = time.monotonic(), fast
    else:
        time.sleep(max(0.0, random_.uniform(2.0, 4.0) - (time.monotonic() - began)))
        os.kill(pid, signal.SIGCONT)
    # Well again: it takes requests, for two looks in a row.
    deadline, good = time.monotonic() + 60, 0
    while good < 2 and time.monotonic() < deadline:
        answer = get(group.urls[victim], "/ready", 1)
        good = good + 1 if answer and answer[0] == 200 else 0
        time.sleep(0.2)
    with tally.lock:
        tally.struck[victim] = time.monotonic()
        tally.well[victim] = time.monotonic()
    if good < 2:
        tally.failures.append(f"member {victim} does not come back")
    return ("kill" if kill else "stop"), victim == leader, took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=2, help="of each coordinator")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--binary", default=str(ROOT / "target/release/baton"))
    args = parser.parse_args()
    random_ = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="baton-soak-") as directory:
        group = Group(args.binary, directory, args.workers)
        group.urls = [coordinator["url"] for coordinator in group.coordinators()]
        try:
            report = run(args, random_, group, directory)
        finally:
            group.process.terminate()
            group.process.wait(60)
    print(json.dumps(report, indent=2))
    sys.exit(1 if report["failures"] else 0)


def run(args, random_, group, directory):
    before = group.agree()
    post(group.urls[0], "/v1/organization/prices", PRICE)
    # Every member has to have heard of the price before the first request.
    group.agree()
    tally, stop = Tally(), threading.Event()
    threads = [threading.Thread(target=client, args=(group, index, tally, stop, n), daemon=True)
               for n in range(args.clients) for index in range(3)]
    for thread in threads:
        thread.start()
    blows, elections, turn = {"kill": 0, "stop": 0}, [], 0
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        time.sleep(random_.uniform(0.5, 2.0))
        struck = strike(group, tally, random_, turn)
        if struck is None:
            continue
        turn += 1
        blows[struck[0]] += 1
        if struck[2] is not None:
            elections.append(struck[2])
        print(f"{struck[0]:5} {'leader' if struck[1] else 'follower':8} "
              f"{'' if struck[2] is None else f'new leader after {struck[2]:.2f} s'}", file=sys.stderr)
    stop.set()
    for thread in threads:
        thread.join(60)
    # Requests whose client was cut off settle by themselves a moment later.
    time.sleep(2)
    settled = group.agree() - before
    failures = list(tally.failures)
    if not tally.answered <= settled <= tally.sent:
        failures.append(f"{settled} records for {tally.answered} answers and {tally.sent} requests")
    try:
        rows = read_feed(group.urls[2])
        if len(rows) != settled:
            failures.append(f"{len(rows)} rows were read of {settled} records")
        failures += compare(rows, tally)
    except RuntimeError as error:
        rows = []
        failures.append(str(error))
    post(group.urls[1], "/v1/ledger/seal", {})
    failures += verify(args.binary, group.urls[0], directory)
    elections.sort()
    return {
        "seconds": 60 * args.minutes, "seed": args.seed, "blows": blows,
        "requests": tally.sent, "answered": tally.answered, "cut_with_their_own_coordinator": tally.excused,
        "records": settled, "read_and_compared": len(rows),
        "statuses": {status: sum(row["usage"]["status"] == status for row in rows)
                     for status in sorted({row["usage"]["status"] for row in rows})},
        "new_leader_s": {
            "count": len(elections),
            "median": elections[len(elections) // 2] if elections else None,
            "max": elections[-1] if elections else None,
        },
        "failures": failures[:20],
    }


if __name__ == "__main__":
    main()
