#!/usr/bin/env bash
# The published tables on one CUDA device, from a checkout: nothing is installed, no data set and no
# tokenizer is needed, only jax with CUDA, flax (and what comes with it) and jaxtyping.
#
#     bash experiments/on_cuda.sh FOLDER [vram] [throughput] [lossless] [decode] [kernels]
#
# leaves EXPERIMENT-cuda.jsonl in FOLDER for each that is named, a record a line; vram and throughput,
# about four minutes with 16 processor cores, where none is. JOBS is how many cells compile or measure
# memory at a time; times are always taken alone.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
export PYTHONPATH=.:kernels
records=${RECORDS:-$(mktemp -d)}
jobs=${JOBS:-10}
fabric() {
    local began=$SECONDS
    "${PYTHON:-python3}" -m fabric_jax.cli.main sweep "$@" --platform cuda --cache "$records/cache"
    echo "$1: $((SECONDS - began)) s"
}
vram() {
    fabric experiments.vram --jobs "$jobs" --out "$records/vram" --bundle "$out/vram-cuda.jsonl"
}
throughput() {
    # Programs first, all at once; then one cell at a time has the device to itself.
    local name=experiments.finetune_throughput records_here="$records/throughput"
    fabric $name compile_only=true shape=published,current --jobs "$jobs" --out "$records/compiled"
    fabric $name budget_seconds=3 shape=packed model=bitnet-125m,bitnet-1b --out "$records_here"
    fabric $name budget_seconds=3 shape=published,current --out "$records_here" \
        --bundle "$out/finetune_throughput-cuda.jsonl"
}
lossless() {
    fabric experiments.lossless --jobs "$jobs" --out "$records/lossless" \
        --bundle "$out/lossless-cuda.jsonl"
}
decode() {
    fabric experiments.decode_throughput --out "$records/decode" \
        --bundle "$out/decode_throughput-cuda.jsonl"
}
kernels() {
    fabric experiments.kernels model=bitnet-1b,bitnet-13b --out "$records/kernels" \
        --bundle "$out/kernels-cuda.jsonl"
}
for each in "${@:-vram}"; do
    "$each"
done
[ $# -gt 0 ] || throughput
