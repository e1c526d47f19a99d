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
#   kv        copies of KV slots and appended tokens, against the copy bandwidth
#   decode    decode steps of each trace, with KV in pages and in extents
#   peers     other libraries on the same batches (peers.py)
#   sanitize  compute-sanitizer's memcheck, racecheck and synccheck on small batches
set -uo pipefail

bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
all_steps=(info tests verify bench kv decode peers sanitize)
# Status of a step that lacks something.
skipped=77

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

info() { "$bundle/packinfer" info; }

# Families of kernels that the device can run; `auto`, which says what is wrong, if there is no such device.
families() { "$bundle/packinfer" info | grep -oE 'sm_[0-9]+a?' | sort -u | grep . || echo auto; }

# The program's arguments for a family.
on() { echo --device cuda; [ "$1" = auto ] || echo --kernels "$1"; }

tests() {
    local family
    for family in $(families); do
        echo "== $family kernels"
        if [ "$family" != auto ]; then export PACKINFER_TEST_KERNELS=$family; fi
        "$bundle/gpu-tests" --test-threads=1 --nocapture || return
    done
}

verify() {
    local family
    for family in $(families); do
        "$bundle/packinfer" verify $(on "$family") --batch "$bundle"/batches/*.json || return
    done
}

bench() {
    "$bundle/packinfer" bench --device cuda --baseline per-request --json "$results/bench.json" --batch "$bundle"/batches/*.json
}

kv() { "$bundle/packinfer" bench-kv --json "$results/kv.json"; }

decode() {
    local trace name
    compgen -G "$bundle/traces/*" >/dev/null || { echo "the bundle has no traces"; return $skipped; }
    for trace in "$bundle"/traces/*; do
        name=$(basename "$trace")
        "$bundle/packinfer" decode-run --device cuda --trace "$trace" --json "$results/decode-${name%.*}.json" || return
    done
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
    local family tool
    for family in $(families); do
        for tool in memcheck racecheck synccheck; do
            echo "== $tool, $family kernels"
            compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$bundle/packinfer" verify $(on "$family") --batch "$bundle"/small/*.json || return
        done
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
