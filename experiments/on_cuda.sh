#!/usr/bin/env bash
# The memory and speed tables on one CUDA device, from a checkout: nothing is installed, no data set and
# no tokenizer is needed, only jax with CUDA, flax (and what comes with it) and jaxtyping.
#
#     bash experiments/on_cuda.sh FOLDER
#
# leaves vram-cuda.jsonl and finetune_throughput-cuda.jsonl in FOLDER, a record a line. About four
# minutes with 16 processor cores. JOBS is how many cells compile or measure memory at a time.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
export PYTHONPATH=.:kernels
records=$(mktemp -d)
fabric() {
    local began=$SECONDS
    "${PYTHON:-python3}" -m fabric_jax.cli.main sweep "$@" --platform cuda --cache "$records/cache"
    echo "$1: $((SECONDS - began)) s"
}
jobs=${JOBS:-10}
fabric experiments.vram --jobs "$jobs" --out "$records/vram" --bundle "$out/vram-cuda.jsonl"
# Programs first, all at once; then one cell at a time has the device to itself.
fabric experiments.finetune_throughput compile_only=true shape=published,current --jobs "$jobs" --out "$records/compiled"
fabric experiments.finetune_throughput budget_seconds=3 shape=packed model=bitnet-125m,bitnet-1b \
    --out "$records/throughput"
fabric experiments.finetune_throughput budget_seconds=3 shape=published,current \
    --out "$records/throughput" --bundle "$out/finetune_throughput-cuda.jsonl"
