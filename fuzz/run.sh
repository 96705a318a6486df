#!/bin/bash
# Builds the fuzz targets with coverage and runs each for some seconds: run.sh SECONDS [TARGET [INPUT]]
set -euo pipefail
cd "$(dirname "$0")"
seconds=$1
targets=${2:-control converted layer nri pci spdy virtio vsock}
host=x86_64-unknown-linux-gnu
# What cargo-fuzz passes, less the sanitizers, which need a nightly compiler: the code is safe but for few lines, and arithmetic is checked.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
export CARGO_TARGET_DIR=$PWD/target
cargo build --quiet --release --target $host --bins
for target in $targets; do
    program=target/$host/release/$target
    if [ "$seconds" = 0 ]; then
        "$program" "${3:?an input}"
        continue
    fi
    mkdir -p "target/corpus/$target" "target/artifacts/$target"
    echo "fuzz: $target for $seconds s"
    "$program" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=4096 -max_len=4096 -print_final_stats=1 \
        -artifact_prefix="target/artifacts/$target/" "target/corpus/$target" 2>"target/$target.log" || {
        tail -n 60 "target/$target.log" >&2
        exit 1
    }
    grep -E 'stat::(number_of_executed_units|new_units_added)|^#.*DONE' "target/$target.log"
done
