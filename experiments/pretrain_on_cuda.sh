#!/usr/bin/env bash
# Training from scratch on one CUDA device, from a checkout: nothing is installed and no data set is
# needed. The text is Python's own standard library. It takes jax with CUDA, flax (and what comes with
# it), jaxtyping, tokenizers, and for figures matplotlib; PyTorch where there is one to compare with.
#
#     bash experiments/pretrain_on_cuda.sh FOLDER [throughput] [gap] [ste]
#
# All three, about seven minutes with 16 processor cores, where none is named. FOLDER gets at most
# seven files, each as soon as there is something to say:
#
#     throughput-125m.json              tokens a second and FLOP utilisation, PyTorch's beside ours
#     gap-MODEL.json, gap-MODEL.png     ternary against dense, bitnet-tiny and bitnet-30m
#     ste-variants.jsonl, .svg          the sweep over straight-through variants
#
# JOBS is how many cells of the sweep run at a time. THROUGHPUT, GAP_TINY, GAP_30M and STE are further
# words for the programs, such as THROUGHPUT="--rows 64"; PLATFORM=cpu tries it all without a device.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?is the folder for the results}" && cd "$1" && pwd) || exit 2
shift
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
platform=${PLATFORM:-cuda}
[ "$platform" = cpu ] && export JAX_PLATFORMS=cpu
records=$(mkdir -p "${RECORDS:=$(mktemp -d)}" && cd "$RECORDS" && pwd)
# Not for throughput: what is read from a cache says nothing of compiling.
cache=$records/cache
export FABRIC_CORPORA=${FABRIC_CORPORA:-$records/corpora}
python=${PYTHON:-python3}

throughput() {
    # Less memory than JAX takes of its own accord: from the second round on PyTorch runs beside it.
    # shellcheck disable=SC2086
    XLA_PYTHON_CLIENT_MEM_FRACTION=.4 \
        timeout "${THROUGHPUT_SECONDS:-270}" "$python" -m experiments.pretrain_throughput --rounds 3 \
        --variants ternary-packed ternary-int8 dense --out "$out/throughput-125m.json" ${THROUGHPUT:-}
}

one_gap() {
    # Both models at once: most of the time is compilation, and neither needs a fifth of the memory.
    local name=$1
    shift
    XLA_PYTHON_CLIENT_MEM_FRACTION=.35 JAX_COMPILATION_CACHE_DIR=$cache \
        timeout "${GAP_SECONDS:-170}" "$python" -m experiments.pretrain_gap --model "bitnet-$name" \
        --out "$out/gap-$name.json" --figure "$out/gap-$name.png" "$@" \
        >"$records/gap-$name.log" 2>&1
    local code=$?
    sed "s/^/gap-$name: /" <<<"$(tail -n 25 "$records/gap-$name.log")"
    return $code
}

gap() {
    # shellcheck disable=SC2086
    one_gap tiny --tokens 3000000 --rows 32 --length 256 --vocab 4096 --dtype float32 \
        ${GAP_TINY:-} &
    local first=$!
    # shellcheck disable=SC2086
    one_gap 30m --tokens 13000000 --rows 32 --length 512 --vocab 8192 --dtype bfloat16 \
        ${GAP_30M:-}
    local code=$?
    wait $first && return $code
}

ste() {
    # A sweep that is stopped keeps what it has; the bundle is then made of that.
    local sweep=("$python" -m fabric_jax.cli.main sweep experiments.ablations.ste_variants)
    # shellcheck disable=SC2086
    timeout -s INT "${STE_SECONDS:-150}" "${sweep[@]}" --platform "$platform" --jobs "${JOBS:-8}" \
        --cache "$cache" --out "$records/ste" ${STE:-}
    cat_records >"$out/ste-variants.jsonl"
    "$python" -m fabric_jax.cli.main report "$records/ste" --out "$records/report" >/dev/null &&
        cp "$records/report/figures/ablations-ste_variants.svg" "$out/ste-variants.svg" &&
        grep -A 14 '^| variant | seeds' "$records/report/report.md"
}

cat_records() {
    "$python" -c 'import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.json")):
    print(json.dumps(json.loads(path.read_text()), separators=(",", ":")))' "$records/ste"
}

[ $# -gt 0 ] || set -- throughput gap ste
for each in "$@"; do
    case $each in throughput | gap | ste) ;; *) echo "no part $each" >&2 && exit 2 ;; esac
done
for each in "$@"; do
    began=$SECONDS
    "$each"
    echo "$each: $((SECONDS - began)) s, exit code $?"
done
