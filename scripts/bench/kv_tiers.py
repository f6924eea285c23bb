#!/usr/bin/env python3
"""Time to first token of a known prompt from each KV tier, against computing it, through a real `baton up`.

    cargo build --release
    python3 scripts/bench/kv_tiers.py --model MODEL [--tokens 2000] [--repeat 5] > kv_tiers.json

For each tier a cluster of one worker is started whose pool holds little more than one prompt. A prompt is computed (miss),
asked again (pool), pushed out by another prompt and asked again (host, disk or store); with a disk or store also
after `kill -9` of the worker. Medians over --repeat prompts; the raw times are printed too. Answers must not change.
"""
import argparse, json, os, pathlib, signal, statistics, subprocess, sys, tempfile, time, urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=os.environ.get("BATON", ROOT / "target/release/baton"))
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--kv-mem", default="40MiB")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    results = []
    for tier in ("host", "disk", "store"):
        results.append(measure(args, tier))
        print(json.dumps(results[-1]), file=sys.stderr)
    json.dump({"model": args.model or "demo", "kv_mem": args.kv_mem, "results": results}, sys.stdout, indent=1)


def measure(args, tier):
    with tempfile.TemporaryDirectory() as temp:
        flags = {
            "host": ["--kv-host-mem", "2GiB"],
            "disk": ["--kv-disk", "2GiB"],
            "store": ["--kv-object", f"file://{temp}/store"],
        }[tier]
        command = [args.binary, "up", "--port", "0", "--prefill", "0", "--kv-mem", args.kv_mem, "--data-dir", temp + "/data"]
        command += flags + (["--model", args.model, "--model-name", "m"] if args.model else ["--model-name", "m"])
        up = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ready = wait(lambda: json.loads((pathlib.Path(temp) / "data/ready.json").read_text()))
            url = ready["url"]
            prompts = [prompt(args.tokens, salt) for salt in range(args.repeat)]
            times = {"miss": [], "pool": [], tier: [], "after kill -9": []}
            answers, tokens, cached = [], 0, {}
            ask(url, prompt(64, 99))  # everything is touched once
            for n, text in enumerate(prompts):
                for how in ("miss", "pool"):
                    took, answer, usage = ask(url, text)
                    times[how].append(took)
                    cached.setdefault(how, []).append(usage["prompt_tokens_details"]["cached_tokens"])
                tokens = usage["prompt_tokens"]
                answers.append(answer)
            settle(url)
            for n in range(args.repeat):
                took, answer, usage = ask(url, prompts[n])
                times[tier].append(took)
                cached.setdefault(tier, []).append(usage["prompt_tokens_details"]["cached_tokens"])
                assert answer == answers[n], "the answer changed"
            worker = workers(url)[0]
            if tier != "host":
                os.kill(worker["pid"], signal.SIGKILL)
                wait(lambda: [w for w in workers(url) if w["state"] == "ready" and w["pid"] != worker["pid"]] or None)
                for n in range(args.repeat):
                    took, answer, usage = ask(url, prompts[n])
                    times["after kill -9"].append(took)
                    cached.setdefault("after kill -9", []).append(usage["prompt_tokens_details"]["cached_tokens"])
                    assert answer == answers[n], "the answer changed"
            time.sleep(1)  # a heartbeat later
            stats = workers(url)[0]["kv_tiers"]
        finally:
            up.terminate()
            up.wait()
    medians = {how: round(statistics.median(took) * 1e3, 1) for how, took in times.items() if took}
    raw = {how: [round(t * 1e3, 1) for t in took] for how, took in times.items() if took}
    return {"tier": tier, "prompt_tokens": tokens, "ttft_ms": medians, "cached": cached, "raw_ms": raw, "stats": stats}


def prompt(tokens, salt):
    """About a token a word with the demo model, more with large vocabularies: the answer says how many it were."""
    words, state = [], salt * 7919 + 1
    for _ in range(tokens // 2):
        state = (state * 1103515245 + 12345) % 2**31
        words.append(str(state // 65536 % 90 + 10))
    return " ".join(words)


def ask(url, text):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 1}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    return time.perf_counter() - started, answer["choices"][0]["message"]["content"], answer["usage"]


def workers(url):
    with urllib.request.urlopen(url + "/cluster/workers", timeout=10) as response:
        return json.load(response)


def settle(url):
    """Until nothing more is written."""
    last = None
    while (now := json.dumps([w["kv_tiers"] for w in workers(url)])) != last:
        last = now
        time.sleep(1)


def wait(look, limit=300):
    until = time.time() + limit
    while time.time() < until:
        try:
            if found := look():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise SystemExit("not ready in time")


if __name__ == "__main__":
    main()
