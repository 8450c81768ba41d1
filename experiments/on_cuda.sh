#!/usr/bin/env bash
# What there is to measure on one CUDA device, from a checkout: nothing is installed, no data set is
# needed, only jax with CUDA, flax (and what comes with it) and jaxtyping; for `quality`, `ste`, `lossless`
# of a trained model and `ablation_times` tokenizers, safetensors and grain (with array_record, portpicker,
# psutil, cloudpickle) too. Their wheels, unpacked into a folder on PYTHONPATH, will do.
#
#     bash experiments/on_cuda.sh FOLDER [PART ...]
#
# leaves GROUP-cuda.jsonl in FOLDER, a record a line (a group is an experiment, or all ablations), as
# `fabric-jax report` reads them. They are written every 20 seconds: what is killed loses at most the
# cells that were running, and the same command with the same RECORDS goes on after the others. Each
# part's time is printed. Parts, with the minutes that a GPU with 16 processor cores should take by the
# number of cells (half a minute to compile, 10 s to start and measure what is compiled):
#
#     check        10 s   what is installed, and which device it is
#     vram         12     90 cells, 12 at a time; nearly all of it is autotuning
#     quality      7      144 cells, 16 at a time: biomed and the ablations of LoRA, times left out
#     ste          4      30 cells, 12 at a time: straight-through variants, trained from scratch
#     lossless     2      24 cells, 12 at a time
#     throughput   5      16 programs at once, then 20 cells alone
#     decode       6      27 programs at once, then 27 cells alone
#     kernels      2      9 cells at once, then alone
#     host         3      4 cells: decode on the processor of the same machine
#     ablation_times  4   12 cells alone: packing and remat with their times
#
# vram and throughput where none is named. Memory and quality are not affected by what else runs. Times
# are taken one at a time, of programs that were compiled before into the cache; TURNS (3) is how many of
# these cells there are at once: the others start and load their programs meanwhile, and 1 is quite alone.
#
# RECORDS: folder of records and compiled programs, kept; a temporary one where not given.
# PLATFORM (cuda), JOBS (12), LIMIT (cells a sweep; 0 for all): to try it elsewhere.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?is the folder for the records}" && cd "$1" && pwd) || exit 2
shift
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
records=${RECORDS:-$(mktemp -d)}
platform=${PLATFORM:-cuda} jobs=${JOBS:-12} limit=${LIMIT:-0} turns=${TURNS:-3} python=${PYTHON:-python3}
mkdir -p "$records"

# sweep FOLDER EXPERIMENT [WORD ...]: lines of cells that went well are left out.
sweep() {
    local began=$SECONDS folder="$records/$1" name=$2
    shift 2
    "$python" -m fabric_jax.cli.main sweep "experiments.$name" --platform "$platform" --limit "$limit" \
        --memory-gib 100 --cache "$records/cache" --out "$folder" "$@" 2>&1 | grep -v "^ok "
    echo "  $name $*: $((SECONDS - began)) s"
}
# All records so far, a file a group.
keep() {
    "$python" - "$records/records" "$out" "$platform" <<'END'
import sys
from pathlib import Path

from fabric_jax.sweeps.records import read_folder, write_bundle

source, out, platform = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
groups = {}
if any(source.rglob("*.json")):
    for _, record in read_folder(source):
        groups.setdefault(record.experiment.split(".")[0], []).append(record)
for name, found in groups.items():
    found.sort(key=lambda record: (record.experiment, record.platform, record.name))
    write_bundle(out / f"{name}-{platform}.jsonl", found)
END
}
keep_on() { while sleep 20; do keep; done; }

check() {
    "$python" - <<'END'
import importlib.util
import jax

wanted = ("jaxtyping", "flax", "optax", "orbax", "tokenizers", "safetensors", "jinja2", "grain", "rich")
print("missing:", [name for name in wanted if importlib.util.find_spec(name) is None])
print(jax.__version__, jax.devices())
END
    [ "$platform" != cuda ] || nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv,noheader
    echo "$(nproc) cores"
}
vram() { sweep records vram --jobs "$jobs"; }
# The quickstart's model, which the runs of `quality` start from.
model() {
    [ -f runs/quickstart/model/config.json ] && return
    XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" - <<'END'
from fabric_jax.quickstart.run import run_quickstart
from fabric_jax.quickstart.settings import QuickstartConfig, Recipe

run_quickstart(QuickstartConfig(), recipe=Recipe(tensorboard=False))
END
}
quality() {
    model || return
    # Sixteen at a time in all; with the seed first, what one seed has compiled the others find.
    export FABRIC_SWEEP_JOBS=16
    local seeds=seed=0,1,2
    sweep records ablations.rank_and_targets $seeds --jobs 4 &
    local each=($!)
    sweep records biomed $seeds --jobs 4 &
    each+=($!)
    sweep records ablations.rslora $seeds --jobs 2 &
    each+=($!)
    sweep records ablations.learning_rate $seeds --jobs 2 &
    each+=($!)
    { sweep records ablations.activations $seeds; sweep records ablations.packing seed=0,1; } &
    each+=($!)
    sweep records ablations.head_format $seeds &
    each+=($!)
    sweep records ablations.optimizer_width $seeds &
    each+=($!)
    sweep records ablations.remat seed=0,1 &
    each+=($!)
    wait "${each[@]}"
    unset FABRIC_SWEEP_JOBS
}
ablation_times() {
    model || return
    sweep records ablations.packing --rerun all
    sweep records ablations.remat --rerun all
}
ste() { sweep records ablations.ste_variants --jobs "$jobs"; }
lossless() {
    sweep records lossless --jobs "$jobs"
    local folder=runs/quickstart
    [ -f $folder/pretrain/model/config.json ] || return
    sweep records lossless --jobs "$jobs" packing=ternary2 dtype=float32 embedding=float32 \
        act_quant=per_token model=$folder/pretrain/model text=$folder/data/statements.jsonl
}
throughput() {
    local name=finetune_throughput small=bitnet-125m
    sweep compiled $name compile_only=true shape=published,current --jobs "$jobs"
    sweep compiled $name compile_only=true shape=custom model=$small rows=8,16 packing=true --jobs 2
    # The published epoch of the smallest model first, whole: a row a step, rows packed, 8 rows a step.
    sweep records $name --jobs "$turns" budget_seconds=0 shape=published,packed,current \
        model=$small
    sweep records $name --jobs "$turns" budget_seconds=0 shape=custom model=$small rows=8,16 \
        packing=true
    sweep records $name --jobs "$turns" budget_seconds=3 shape=published,current \
        model=bitnet-350m,bitnet-1b,bitnet-1.5b,bitnet-2.7b,bitnet-3.8b,bitnet-7b,bitnet-13b
    sweep records $name --jobs "$turns" budget_seconds=3 shape=packed model=bitnet-1b
}
decode() {
    local batches="model=bitnet-1b,bitnet-2b-4t,bitnet-13b packing=ternary2 batch=8,16,32"
    sweep compiled decode_throughput repeats=1 --jobs "$jobs"
    # shellcheck disable=SC2086
    sweep compiled decode_throughput repeats=1 $batches --jobs "$jobs"
    sweep records decode_throughput --jobs "$turns"
    # shellcheck disable=SC2086
    sweep records decode_throughput $batches --jobs "$turns"
}
host() {
    platform=cpu sweep records host_decode
}
kernels() {
    local models=model=bitnet-1b,bitnet-2b-4t,bitnet-13b
    sweep compiled kernels $models rounds=1 --jobs "$jobs"
    sweep records kernels --jobs "$turns" $models
}

for part in "${@:-vram}"; do
    case $part in
    check | vram | model | quality | ste | ablation_times | lossless | throughput | decode | host | kernels) ;;
    *) echo "no part $part" >&2 && exit 2 ;;
    esac
done
keep_on &
keeper=$!
trap 'kill $keeper 2>/dev/null; keep' EXIT
for part in "${@:-vram}"; do
    began=$SECONDS
    "$part"
    keep
    echo "$part: $((SECONDS - began)) s"
done
[ $# -gt 0 ] || throughput
