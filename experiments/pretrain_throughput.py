"""How fast does a model of 125M train from scratch, beside a dense PyTorch model of its dimensions?

Each variant is one compiled optimizer step on random tokens: ``dense`` (no quantisers),
``ternary-float`` (codes multiplied as bfloat16) and ``ternary-int8`` (codes multiplied as int8, the
same sums). FLOPs are counted as by PaLM (arXiv:2204.02311, appendix B), whatever is multiplied in
which precision: ``6 N + 12 L T D`` a token, N the weights that are multiplied, head included;
utilisation is of the bfloat16 peak. PyTorch runs in processes of its own. The layers are compiled
one after another and nothing is recomputed: 17 GiB at the default size. The record is written anew
after each result, so that a run that is stopped leaves what it has.

    PYTHONPATH=.:kernels python3 -m experiments.pretrain_throughput --out throughput.json

``--rounds 3`` measures everything in turn three times: a clock that falls as the card warms up then
meets all of them. Medians are over the steps of all rounds; each round's stand beside them.

Attention is cuDNN's; ``--attention auto`` takes our own kernels, and a variant that cuDNN refuses
is measured with those too.

On one H100 about a minute a variant, most of it compilation.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, cast

import jax
import jax.numpy as jnp

from experiments.arguments import add_settings
from fabric_jax.data.batch import Batch
from fabric_jax.files import write_json
from fabric_jax.layers.attention import AttentionChoice
from fabric_jax.measurement.categories import compiled_memory
from fabric_jax.measurement.device import device_facts
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, Remat, define_decoder
from fabric_jax.models.initialize import initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.quantization.ste_options import SteOptions
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.recipes import recipe_optimizer
from fabric_jax.training.step import TrainState, init_state, make_train_step

VARIANTS: dict[str, SteOptions] = {
    "ternary-packed": SteOptions(product="packed"),
    "ternary-int8": SteOptions(product="int8"),
    "dense": SteOptions(weights="none"),
    "ternary-float": SteOptions(),
}
PEERS = {"torch": False, "torch-compiled": True}
"""By name, whether ``torch.compile`` is asked for."""
OWN = "-own-attention"
"""Ends the name of a variant that cuDNN refused, measured with our own kernels."""
TORCH_SECONDS = 240
"""That a run of PyTorch may take, compilation included."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all variants share.

    Attributes:
        model: registry name.
        vocab_size: rows of the embedding; a multiple of 128, as is usual where speed counts.
        rows: of a step.
        length: positions in a row.
        steps: timed ones in a round.
        warmup: steps before them, at least one.
        rounds: in which all are measured in turn.
        dtype: of activations.
        remat: what the backward pass recomputes.
        attention: cuDNN's without a mask, which is what PyTorch runs too; auto on CPU.
        tile_mib: logits that exist at once.
        round_logits: to bfloat16, as PyTorch's autocast does; losses are float32 from there.
        unroll: layers one after another instead of a loop.
        peak_tflops: of the device, dense bfloat16; 989 for H100 and H200 SXM by data sheet.
    """

    model: str = "bitnet-125m"
    vocab_size: int = 32768
    rows: int = 32
    length: int = 1024
    steps: int = 20
    warmup: int = 3
    rounds: int = 1
    dtype: str = "bfloat16"
    remat: Remat = "none"
    attention: AttentionChoice = "cudnn-causal"
    tile_mib: int = 512
    round_logits: bool = True
    unroll: bool = True
    peak_tflops: float = 989.0


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Of forward and backward, attention counted without its mask."""
    weights = model.linear_parameters + model.vocab_size * model.hidden_size
    width = model.num_heads * model.head_dim
    return 6.0 * weights + 12.0 * model.num_layers * length * width


def chosen_model(settings: Settings) -> ModelConfig:
    return replace(get_config(settings.model), vocab_size=settings.vocab_size)


def decoder_options(variant: str, settings: Settings) -> DecoderOptions:
    """How a variant is stored and computed."""
    ste = VARIANTS[variant]
    return DecoderOptions(
        mode="master",
        dtype=settings.dtype,
        embedding_dtype="float32",
        norm_dtype="float32",
        act_quant="none" if ste.weights == "none" else "per_token",
        remat=settings.remat,
        ste=ste,
        attention=settings.attention,
        loss_tile_bytes=settings.tile_mib << 20,
        round_logits=settings.round_logits,
        unroll=settings.unroll,
    )


class Variant:
    """A variant's compiled step; compiled once, however often it is measured."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.settings = settings
        self.definition = define_decoder(chosen_model(settings), decoder_options(name, settings))
        self.optimizer = make_optimizer(
            recipe_optimizer("scratch", self.definition.config.parameters), 10_000
        )
        self.batch, self.key = random_batch(settings), jax.random.key(1)
        state = jax.eval_shape(self.fresh)
        start = time.perf_counter()
        step = make_train_step(self.definition, self.optimizer, trains="base")
        self.compiled = step.lower(state, {}, self.batch, self.key).compile()
        self.compile_seconds = time.perf_counter() - start

    def fresh(self) -> TrainState:
        """What every round begins with: a step gives its own state's memory to the next one's."""
        return init_state(initialize_base(self.definition, 0), self.optimizer)

    def measure(self) -> dict[str, Any]:
        """Seconds of each step of a round, and what XLA plans for it."""
        losses, seconds = timed(self.compiled, self.fresh(), self.batch, self.key, self.settings)
        return {
            "seconds": seconds,
            "compile_seconds": round(self.compile_seconds, 1),
            "compiled_bytes": compiled_memory(self.compiled).total,
            "attention": self.settings.attention,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }


def timed(
    compiled: Any, state: Any, batch: Batch, key: jax.Array, settings: Settings
) -> tuple[list[float], list[float]]:
    """The losses of all steps, and the time between two of the timed ones.

    As in the training loop, a step's loss is read while the next one runs.
    """
    losses: list[float] = []
    ends: list[float] = []
    pending: Any = None
    for _ in range(settings.warmup + settings.steps + 1):
        state, metrics = compiled(state, {}, batch, key)
        if pending is not None:
            losses.append(float(pending.loss))
            ends.append(time.perf_counter())
        pending = metrics
    ends = ends[settings.warmup - 1 :]
    return losses, [end - begin for begin, end in pairwise(ends)]


def random_batch(settings: Settings) -> Batch:
    """One micro-batch of rows that are one document each."""
    shape = (1, settings.rows, settings.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, settings.vocab_size, jnp.int32)
    row = jnp.arange(settings.length, dtype=jnp.int32)
    return Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=-1),
        loss_mask=jnp.ones(shape, jnp.float32),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(row, shape),
    )


def rates(rounds: list[list[float]], settings: Settings) -> dict[str, Any]:
    """Median, spread, tokens a second and utilisation of the steps of all rounds."""
    seconds = [one for each in rounds for one in each]
    median = statistics.median(seconds)
    tokens = settings.rows * settings.length / median
    flops = tokens * flops_per_token(chosen_model(settings), settings.length)
    return {
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "seconds_median_of_rounds": [statistics.median(each) for each in rounds],
        "tokens_per_second": tokens,
        "tflops": flops / 1e12,
        "mfu": flops / 1e12 / settings.peak_tflops,
    }


def measure_torch(settings: Settings, *, compiled: bool) -> dict[str, Any]:
    """The same rows through PyTorch, in another process; why not, where it can't be."""
    model = chosen_model(settings)
    words = {
        "layers": model.num_layers,
        "width": model.hidden_size,
        "ffn": model.ffn_size,
        "heads": model.num_heads,
        "vocab": model.vocab_size,
        "batch": settings.rows,
        "length": settings.length,
        "steps": settings.steps,
    }
    command = [sys.executable, "-m", "experiments.peers.torch_pretrain"]
    command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    command += ["--compile"] if compiled else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TORCH_SECONDS} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return cast(dict[str, Any], json.loads(done.stdout.strip().splitlines()[-1]))


def measure_all(
    settings: Settings, variants: Sequence[str], peers: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each result with its name as it comes; what a device can't run is a result too.

    A result is of all rounds until then.
    """
    ready: dict[str, Variant] = {}
    rounds: dict[str, list[list[float]]] = {}
    failed: set[str] = set()
    for _ in range(settings.rounds):
        for name in [*peers, *variants, *(f"{variant}{OWN}" for variant in variants)]:
            wanted = not name.endswith(OWN) or name.removesuffix(OWN) in failed
            if not wanted or name in failed:
                continue
            found = measure_or_say(name, settings, ready)
            if "error" in found:
                failed.add(name)
            else:
                rounds.setdefault(name, []).append(found.pop("seconds"))
                found = rates(rounds[name], settings) | found
            yield name, found


def measure_or_say(name: str, settings: Settings, ready: dict[str, Variant]) -> dict[str, Any]:
    """The seconds of a round and more, or the error."""
    if name in PEERS:
        return measure_torch(settings, compiled=PEERS[name])
    if name.endswith(OWN):
        settings = replace(settings, attention="auto")
    try:
        if name not in ready:
            ready[name] = Variant(name.removesuffix(OWN), settings)
        return ready[name].measure()
    except Exception as error:  # XLA's errors have no class of their own
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def main() -> None:
    """Measures PyTorch, then every variant; the record grows with each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    add_settings(parser, Settings())
    given = vars(parser.parse_args())
    settings = Settings(**{name: given[name] for name in asdict(Settings())})
    results: dict[str, Any] = {}
    device: dict[str, Any] = {}
    for name, found in measure_all(settings, given["variants"], given["peers"]):
        print(name, json.dumps(found), flush=True)
        results[name] = found
        record = {
            "experiment": "pretrain_throughput",
            "settings": asdict(settings),
            "flops_per_token": flops_per_token(chosen_model(settings), settings.length),
            "results": results,
        }
        if name not in PEERS:  # JAX has the device by now, beside which PyTorch finds its place
            device = device_facts().to_dict()
        write_json(given["out"], record | {"device": device})


if __name__ == "__main__":
    main()
