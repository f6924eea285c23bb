#!/usr/bin/env python3
"""Time to first token of a known prompt that waits behind a strange one, with its blocks in a slow object store: with and
without the router's hint to read ahead. A real `baton up` of one worker, and a stand-in for S3 whose reads take --latency-ms.

    cargo build --release
    python3 scripts/bench/read_ahead.py --model MODEL [--tokens 1500] [--repeat 6] [--latency-ms 30] > read_ahead.json

The pool holds less than two prompts. Each time a prompt nobody has seen is sent, and 200 ms later a known one whose blocks were
pushed out. `ttft` is from sending the known one to its first token; `after` is what of this came after the strange one had
answered, so that its compute is out of the sum. The clusters alternate; answers must not change.
"""
import argparse, http.server, json, os, pathlib, signal, statistics, subprocess, sys, tempfile, threading, time

from kv_tiers import ROOT, ask, prompt, settle, wait, workers


class Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as a KV tier asks for."""

    protocol_version = "HTTP/1.1"
    objects, latency_s = {}, 0.0

    def log_message(self, *_):
        pass

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        Store.objects[self.path.split("?")[0]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def do_GET(self):
        time.sleep(Store.latency_s)
        found = Store.objects.get(self.path.split("?")[0])
        self.answer(404) if found is None else self.answer(200, found)

    def do_DELETE(self):
        Store.objects.pop(self.path.split("?")[0], None)
        self.answer(204)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=os.environ.get("BATON", ROOT / "target/release/baton"))
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--kv-mem", default="40MiB")
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--latency-ms", type=float, default=30)
    args = parser.parse_args()
    Store.latency_s = args.latency_ms / 1e3
    server = Server(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    runs = []
    for round in range(args.rounds):
        for read_ahead in (False, True):
            Store.objects.clear()
            runs.append(measure(args, server.server_port, read_ahead, round))
            print(json.dumps(runs[-1]), file=sys.stderr)
    summary = {}
    for read_ahead in (False, True):
        of = [run for run in runs if run["read_ahead"] == read_ahead]
        summary["with" if read_ahead else "without"] = {
            key: round_ms([t for run in of for t in run["raw_ms"][key]]) for key in ("ttft", "after")
        }
    json.dump({"model": args.model or "demo", "latency_ms": args.latency_ms, "median_ms": summary, "runs": runs}, sys.stdout, indent=1)


def round_ms(times):
    return round(statistics.median(times), 1)


def without_hints(url, config):
    """`up` has no flag for it: its file is changed, and the coordinator killed, which `up` starts again with that file."""
    config.write_text("read_ahead = false\n" + config.read_text())
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config).encode() in arguments:
            os.kill(int(process.name), signal.SIGKILL)
    time.sleep(1)
    wait(lambda: [w for w in workers(url) if w["state"] == "ready"] or None)


def measure(args, port, read_ahead, round):
    with tempfile.TemporaryDirectory() as temp:
        command = [args.binary, "up", "--port", "0", "--prefill", "0", "--kv-mem", args.kv_mem, "--data-dir", temp + "/data"]
        command += ["--kv-object", "s3://kv/blocks", "--model-name", "m"] + (["--model", args.model] if args.model else [])
        env = dict(os.environ, AWS_ENDPOINT=f"http://127.0.0.1:{port}", AWS_ALLOW_HTTP="true", AWS_REGION="x")
        env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        up = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        try:
            url = wait(lambda: json.loads((pathlib.Path(temp) / "data/ready.json").read_text()))["url"]
            if not read_ahead:
                without_hints(url, pathlib.Path(temp) / "data/config/coordinator-0.toml")
            known = [prompt(args.tokens, salt) for salt in range(3)]
            ask(url, prompt(64, 99))
            first = [ask(url, text) for text in known]
            settle(url)
            # One load that waits for nobody, so that its speed is known.
            ask(url, known[0])
            raw, cached = {"ttft": [], "after": []}, []
            for n in range(args.repeat):
                ended = []
                strange = threading.Thread(
                    target=lambda: (ask(url, prompt(args.tokens, 1000 * round + 100 + n)), ended.append(time.perf_counter()))
                )
                strange.start()
                time.sleep(0.2)
                took, answer, usage = ask(url, known[(n + 1) % 3])
                now = time.perf_counter()
                strange.join()
                assert answer == first[(n + 1) % 3][1], "the answer changed"
                raw["ttft"].append(took * 1e3)
                assert took > 0.2, "it did not wait; use a larger model"
                raw["after"].append((now - ended[0]) * 1e3)
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            time.sleep(1)  # a heartbeat later
            stats = workers(url)[0]["kv_tiers"]
        finally:
            up.terminate()
            up.wait()
    raw = {key: [round_ms([t]) for t in times] for key, times in raw.items()}
    return {"read_ahead": read_ahead, "prompt_tokens": usage["prompt_tokens"], "cached": cached, "raw_ms": raw, "stats": stats}


if __name__ == "__main__":
    main()
