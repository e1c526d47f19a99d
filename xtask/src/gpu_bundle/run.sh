#!/usr/bin/env bash
# Tests and measures PackInfer on this machine's GPU.
#
# usage: run.sh RESULTS [STEP...]
#
# Writes to the folder RESULTS. Without steps, all of them; a step that lacks something is skipped, and says so.
#   info      the device, the driver, the kernels that would be used
#   tests     the library's GPU tests
#   verify    every batch against float64 attention
#   bench     every batch: time against the floor, packed and per request
#   peers     other libraries on the same batches (peers.py)
#   sanitize  compute-sanitizer's memcheck and racecheck on small batches
set -uo pipefail

bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
all_steps=(info tests verify bench peers sanitize)
# Status of a step that lacks something.
skipped=77

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

info() { "$bundle/packinfer" info; }

tests() { "$bundle/gpu-tests" --test-threads=1 --nocapture; }

verify() { "$bundle/packinfer" verify --device cuda --batch "$bundle"/batches/*.json; }

bench() {
    "$bundle/packinfer" bench --device cuda --baseline per-request --json "$results/bench.json" --batch "$bundle"/batches/*.json
}

peers() {
    [ -f "$bundle/peers.py" ] || { echo "the bundle has no peers.py"; return $skipped; }
    command -v python3 >/dev/null || { echo "there is no python3"; return $skipped; }
    if compgen -G "$bundle/wheels/*.whl" >/dev/null; then
        local site="$results/site-packages"
        python3 -m pip install --quiet --no-index --no-deps --target "$site" "$bundle"/wheels/*.whl || return
        # Of several wheels that share a package, pip keeps the files of one: unpacked once more, they lie over each other.
        local wheel
        for wheel in "$bundle"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site" || return; done
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" SITEDIRS="$site${SITEDIRS:+:$SITEDIRS}"
    fi
    python3 "$bundle/peers.py" --out "$results/peers.json" "$bundle"/batches/*.json
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer"; return $skipped; }
    local tool
    for tool in memcheck racecheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$bundle/packinfer" verify --device cuda --batch "$bundle"/small/*.json || return
    done
}

# Runs a step; what it prints goes to the terminal and to a file.
run_step() {
    local started=$SECONDS status outcome
    echo "==== $1"
    "$1" 2>&1 | tee "$results/$1.txt"
    status=${PIPESTATUS[0]}
    case $status in
        0) outcome=ok ;;
        "$skipped") outcome=skipped ;;
        *) outcome="failed ($status)" ;;
    esac
    echo "$1: $outcome, $((SECONDS - started)) s" >>"$results/summary.txt"
    [ "$status" = 0 ] || [ "$status" = "$skipped" ]
}

case "${1:-}" in
    "" | -h | --help) usage; exit $(($# == 0 ? 2 : 0)) ;;
esac
results=$1
shift
for step in "$@"; do
    [[ " ${all_steps[*]} " == *" $step "* ]] || { echo "run.sh: no step $step: ${all_steps[*]}" >&2; exit 2; }
done
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
: >"$results/summary.txt"
[ $# -gt 0 ] || set -- "${all_steps[@]}"
failed=0
for step in "$@"; do run_step "$step" || failed=1; done
echo "==== summary"
cat "$results/summary.txt"
exit $failed
