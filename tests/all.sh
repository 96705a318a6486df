#!/bin/bash
# Every test, stage by stage, with the minutes that each took; `make test` and CI call it. Ends at the first stage that fails.
set -uo pipefail
cd "$(dirname "$0")/.."

# Before half an hour of other stages.
for program in cargo go; do
    command -v "$program" >/dev/null || { echo "tests: $program is missing: docs/development.md says what is needed" >&2; exit 1; }
done

started=$SECONDS
declare -a report
finish() {
    echo "=== stages"
    printf '%s\n' "${report[@]}"
    awk -v s=$((SECONDS - started)) 'BEGIN { printf "%5.1f min  in all; the budget of each stage is in docs/development.md\n", s / 60 }'
}
stage() { # name, command...
    local name=$1 begin=$SECONDS
    shift
    echo "=== $name: $*"
    "$@"
    local code=$?
    report+=("$(awk -v s=$((SECONDS - begin)) 'BEGIN { printf "%5.1f min", s / 60 }')  $name$([ $code = 0 ] || echo " (failed with $code)")")
    if [ $code != 0 ]; then
        finish
        exit $code
    fi
}

stage 'setup' make -s setup
stage 'build' make -s build
stage 'guest, distribution kernel' make -s guest
stage 'demo' make -s demo
stage 'guest, tuned kernel' make -s guest-tuned
stage 'lints' make -s check
stage 'unit and component tests' make -s unit
stage 'fuzzing, 20 s each' ./fuzz/run.sh 20
stage 'peers' make -s crictl kubelet nri-plugin
stage 'end to end, distribution kernel' make -s e2e
stage 'end to end, tuned kernel' make -s e2e-tuned
stage 'critest' make -s critest
stage 'kubelet' make -s e2e-kubelet
stage 'node VM' make -s e2e-node-short
stage 'critest, node VM' make -s critest-node
finish
