"""Which variant of straight-through training learns best?

Each variant differs from BitNet b1.58 in one switch, see ``VARIANTS`` for where it comes from.
Float weights are the line that none should cross. A cell trains a small model from random weights
on Python's standard library with the published two-stage recipe; held-out files give bits per byte.
Variants with the same seed start from the same weights and see the same rows in the same order, so
differences to b1.58 are paired by seed.

    fabric-jax sweep experiments.ablations.ste_variants --out DIR --jobs 8 --cache CACHE

30 cells of under a minute each on an H200, most of it compilation, of which those that differ in
the seed alone share one. A minute a cell on two CPU cores:

    fabric-jax sweep experiments.ablations.ste_variants --platform cpu --out DIR --cache CACHE \
        num_layers=1 tokens=100000 rows=8 length=128 vocab=1024
"""

import tempfile
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fabric_jax.quantization.ste_options import SteOptions
from fabric_jax.sweeps import Figure, grid

COLUMNS = ("bits_per_byte", "eval_loss", "loss", "tokens_per_second", "packs", "source")
FIGURE = Figure(x="variant", y="bits_per_byte", kind="bar", baseline="b1.58")
SEEDS = (0, 1, 2)
HELD_OUT = 0.02

Name = Literal[
    "b1.58",
    "clipped-gradient",
    "stochastic-rounding",
    "scale-by-channel",
    "scale-by-group",
    "int4-hybrid",
    "hadamard",
    "squared-relu",
    "no-sub-norms",
    "float-weights",
]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One difference from BitNet b1.58.

    Attributes:
        source: where it was proposed.
        ste: its quantisers.
        gate: activation of the gate.
        sub_norms: whether there are norms before o and down.
    """

    source: str
    ste: SteOptions = field(default_factory=SteOptions)
    gate: Literal["silu", "relu2"] = "silu"
    sub_norms: Literal["yes", "no"] = "yes"


def _quantisers(source: str, **changed: Any) -> Variant:
    return Variant(source=source, ste=SteOptions(**changed))


VARIANTS: dict[Name, Variant] = {
    "b1.58": Variant(source="arXiv:2402.17764"),
    "clipped-gradient": _quantisers("arXiv:1602.02830", weight_gradient="clipped"),
    "stochastic-rounding": _quantisers("arXiv:1510.03009", weight_rounding="stochastic"),
    "scale-by-channel": _quantisers("arXiv:2406.07177", weight_scale="channel"),
    "scale-by-group": _quantisers("arXiv:2407.12327", weight_scale="group"),
    "int4-hybrid": _quantisers("arXiv:2411.04965 (a4.8)", activations="int4-hybrid"),
    "hadamard": _quantisers("arXiv:2504.18415 (v2)", hadamard=True),
    "squared-relu": Variant(source="arXiv:2504.12285", gate="relu2"),
    "no-sub-norms": Variant(source="Falcon-E, HF1BitLLM", sub_norms="no"),
    "float-weights": _quantisers("none: not quantised", weights="none"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
        variant: a key of ``VARIANTS``.
        model: registry name.
        num_layers: 0 for the model's.
        tokens: positions to train on.
        rows: of a step.
        length: positions in a row.
        vocab: tokens of the BPE vocabulary.
        dtype: of activations; weights are float32.
        seed: of weights and order; ``SEEDS`` where none of them is asked for.
    """

    variant: Name = "b1.58"
    model: str = "bitnet-tiny"
    num_layers: int = 0
    tokens: int = 3_000_000
    rows: int = 32
    length: int = 256
    vocab: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    """Every variant with every seed; those that share a program are far apart.

    So cells that start together each compile another one, and later ones find theirs compiled.
    """
    seeds = SEEDS if base.seed in SEEDS else (base.seed,)
    return grid(base, seed=seeds, variant=tuple(VARIANTS))


def environment(cell: Config, platform: str) -> dict[str, str]:
    """The share of an 80 GB device that a cell needs, so that several can run beside another."""
    if platform != "cuda":
        return {}
    from fabric_jax.models.registry import get_config

    model = replace(get_config(cell.model), vocab_size=cell.vocab)
    layers, positions = cell.num_layers or model.num_layers, cell.rows * cell.length
    # Masters, two moments, gradients and a step's copies; all that is between linears; logits.
    weights = 32 * model.parameters
    kept = positions * layers * 8 * (16 * model.hidden_size + 8 * model.ffn_size)
    logits = 16 * min(positions * cell.vocab, 1 << 27)
    share = (weights + kept + logits + (2 << 30)) / (78 << 30)
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{min(0.9, share + 0.005):.2f}"}


def measure(cell: Config) -> dict[str, Any]:
    """Trains one model; what it came to on the held-out files."""
    from rich.console import Console

    from experiments.stdlib_corpus import shared_corpus
    from fabric_jax.training.loop import pretrain

    corpus = shared_corpus(vocab=cell.vocab, held_out=HELD_OUT)
    with tempfile.TemporaryDirectory() as output:
        job = job_config(cell, str(corpus.folder), f"{output}/run")
        summary = pretrain(job, console=Console(stderr=True))
    variant = VARIANTS[cell.variant]
    return {
        "bits_per_byte": summary.eval_bits_per_byte_last,
        "eval_loss": summary.eval_loss_last,
        "loss": summary.loss_last,
        "parameters": summary.parameters,
        "steps": summary.steps,
        "tokens_per_second": summary.tokens_per_second,
        "compile_seconds": summary.compile_seconds,
        "compiled_bytes": summary.compiled_bytes,
        "packs": not variant.ste.beyond_packed,
        "source": variant.source,
        "corpus": corpus.digest[:16],
    }


def job_config(cell: Config, corpus: str, output: str) -> Any:
    """The ``PretrainConfig`` of a cell."""
    from fabric_jax.data.config import DataConfig
    from fabric_jax.data.stdlib import STDLIB
    from fabric_jax.training.config import PretrainConfig

    variant = VARIANTS[cell.variant]
    return PretrainConfig(
        model=cell.model,
        num_layers=cell.num_layers,
        output=output,
        corpus=corpus,
        train_tokenizer=cell.vocab,
        dataset=DataConfig(
            data=STDLIB,
            eval_fraction=HELD_OUT,
            max_length=cell.length,
            batch_size=cell.rows,
            data_seed=cell.seed,
        ),
        token_budget=cell.tokens,
        # After the last step alone.
        eval_every=10**9,
        save_every=0,
        log_every=10,
        tensorboard=False,
        samples=0,
        seed=cell.seed,
        dtype=cell.dtype,
        ste=variant.ste,
        act_quant="none" if variant.ste.weights == "none" else None,
        gate=variant.gate,
        sub_norms=variant.sub_norms,
    )
