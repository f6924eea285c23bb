#!/bin/sh
# Builds the benchmark and runs every index on the same workload, each in a process of its own. Some 4 GiB and 2 minutes.
#   scripts/bench/router/run.sh > docs/benchmarks/router/results.txt
set -eu
cd "$(dirname "$0")"
cargo build --release --locked >&2
bin="${CARGO_TARGET_DIR:-target}/release/router-bench"
sed -n 's/^model name[^:]*: /# cpu: /p' /proc/cpuinfo | head -1
echo "# cores: $(nproc), $(rustc --version)"
for scale in "200 5000 32" "200 5000 1" "1000 50000 32"; do
    for index in baton radix compressed positional; do
        # The positional index would take 8 GiB at full size.
        case "$index $scale" in "positional 1000 50000 32") continue ;; esac
        "$bin" "$index" $scale
    done
done
"$bin" positional 1000 5000 32
"$bin" baton 1000 5000 32
