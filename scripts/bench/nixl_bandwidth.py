#!/usr/bin/env python3
"""Bandwidth of the PyPI `nixl` wheel between two processes on this machine, for the comparison in docs/kv-transfer.md.

Needs a Python with `nixl` and `numpy` (pip install nixl numpy; torch is not used). Two processes, UCX backend, WRITE from
host memory to host memory: with UCX_TLS=tcp ("nixl-tcp") and with UCX's own choice, which on one host is shared memory
("nixl-default"). Both sides' buffers are larger than any cache. Prints one JSON line a cell, the same fields as
kvtransfer's bandwidth example: medians of --rounds, bytes per second, CPU seconds per 10^9 bytes of both processes.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

PIECES = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]
IN_FLIGHT = [1, 4, 16]


def agent(name):
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def buffer(bytes_):
    import numpy

    memory = numpy.ones(bytes_, dtype=numpy.uint8)  # touched, so that no page fault is measured
    return memory, memory.ctypes.data


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def target(args):
    """The passive side: registers memory, says where it is, and answers with its CPU time until told to stop."""
    me = agent("target")
    memory, address = buffer(args.buffer)
    me.register_memory([(address, args.buffer, 0, "")], "DRAM")
    print(json.dumps({"metadata": me.get_agent_metadata().hex(), "address": address}), flush=True)
    for line in sys.stdin:
        if line.strip() == "cpu":
            print(json.dumps({"cpu": cpu_seconds(), "first": int(memory[0]), "last": int(memory[-1])}), flush=True)


def measure(args, transport):
    env = dict(os.environ, NIXL_LOG_LEVEL="ERROR")
    if transport == "nixl-tcp":
        env["UCX_TLS"] = "tcp"
    else:
        env.pop("UCX_TLS", None)
    common = [sys.executable, __file__, "--buffer", str(args.buffer), "--volume", str(args.volume),
              "--rounds", str(args.rounds), "--transport", transport]
    if args.quick:
        common.append("--quick")
    subprocess.run(common + ["--role", "initiator"], env=env, check=True)


def initiator(args):
    import numpy

    child = subprocess.Popen([sys.executable, __file__, "--role", "target", "--buffer", str(args.buffer)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    hello = json.loads(child.stdout.readline())

    def child_cpu():
        child.stdin.write("cpu\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())["cpu"]

    me = agent("initiator")
    memory, address = buffer(args.buffer)
    memory[:] = 7
    me.register_memory([(address, args.buffer, 0, "")], "DRAM")
    peer = me.add_remote_agent(bytes.fromhex(hello["metadata"]))
    peer = peer.decode() if isinstance(peer, bytes) else peer
    me.make_connection(peer)
    pieces = [256 << 10] if args.quick else PIECES
    for piece in pieces:
        for in_flight in IN_FLIGHT:
            # A transfer is a list of descriptors, as the KV of one prompt is; 16 of them cover the buffer.
            count = max(args.buffer // 16 // piece, 1)
            handles = []
            for at in range(16):
                order = numpy.random.default_rng(at).permutation(count)
                local = [(address + (at * count + i) * piece, piece, 0) for i in range(count)]
                remote = [(hello["address"] + (at * count + int(i)) * piece, piece, 0) for i in order]
                handles.append(me.initialize_xfer("WRITE", me.get_xfer_descs(local, "DRAM"),
                                                  me.get_xfer_descs(remote, "DRAM"), peer))
            speeds, cpus = [], []
            for round_ in range(args.rounds + 1):  # the first one warms up
                left = max(args.volume // (count * piece), in_flight)
                total = left * count * piece
                free, running = list(range(16)), []
                cpu = cpu_seconds() + child_cpu()
                begin = time.perf_counter()
                while left or running:
                    while left and len(running) < in_flight:
                        at = free.pop()
                        if me.transfer(handles[at]) == "ERR":
                            sys.exit("the transfer failed")
                        running.append(at)
                        left -= 1
                    for at in list(running):
                        state = me.check_xfer_state(handles[at])
                        if state == "ERR":
                            sys.exit("the transfer failed")
                        if state == "DONE":
                            running.remove(at)
                            free.insert(0, at)
                took = time.perf_counter() - begin
                cpu = cpu_seconds() + child_cpu() - cpu
                if round_:
                    speeds.append(total / took)
                    cpus.append(cpu / total * 1e9)
            for handle in handles:
                handle.release()
            print(json.dumps({"transport": args.transport, "piece_bytes": piece, "in_flight": in_flight,
                              "bytes_per_s": statistics.median(speeds), "cpu_s_per_gb": statistics.median(cpus),
                              "rounds": speeds}), flush=True)
    child.stdin.close()
    child.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buffer", type=int, default=512 << 20, help="bytes of each side's buffer")
    parser.add_argument("--volume", type=int, default=1 << 30, help="bytes moved in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one piece size only")
    parser.add_argument("--transport", default="all", choices=["all", "nixl-tcp", "nixl-default"])
    parser.add_argument("--role", default="parent", choices=["parent", "initiator", "target"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "target":
        return target(args)
    if args.role == "initiator":
        return initiator(args)
    for transport in ["nixl-tcp", "nixl-default"] if args.transport == "all" else [args.transport]:
        measure(args, transport)


if __name__ == "__main__":
    main()
