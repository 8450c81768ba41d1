"""Answers and evaluations on meshes of eight virtual CPU devices, beside those of one device.

Run as a process with a folder, an implementation, ``some`` or ``everything``, and the meshes: the
number of devices is fixed for a process. Prints one JSON object: what was found by mesh, ``""``
being one device.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.data.batch import Batch
from fabric_jax.data.tokenize_rows import LabelledRow
from fabric_jax.evaluation import compare
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.model import Model, load_model
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config

ROWS, LENGTH = 8, 24
CONFIG = replace(
    get_config("bitnet-tiny"),
    name="mesh",
    num_layers=2,
    hidden_size=64,
    ffn_size=128,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_length=64,
    tied_head=False,
)
PROMPTS = ["a", "some prompt", "another one", "zz", "the fifth", "six", "seventh of them"]


def make_model(folder: Path) -> None:
    """A model that writes varied text, and two adapters of it."""
    definition = define_decoder(CONFIG, DecoderOptions(lora=LoraConfig(rank=4)))
    base = initialize_base(definition, 3)
    base["embedding"] = base["embedding"] * 50
    save_model(folder / "model", definition, base, tokenizer_json=None)
    for number in (0, 1):
        noise = np.random.default_rng(number)
        adapter = jax.tree.map(
            lambda x, noise=noise: jnp.asarray(noise.normal(0, 0.1, x.shape), x.dtype),
            initialize_adapter(definition, number),
        )
        save_adapter(folder / f"adapter{number}", definition, adapter, str(folder / "model"))


def batch(number: int) -> Batch:
    """Random rows, some of them short."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    filled = np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    fields: Any = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": filled.astype(np.float32),
        "segment_ids": filled.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), filled.shape),
    }
    return Batch(**fields)


def answers(model: Model, **options: Any) -> list[list[int]]:
    found = model.generate(PROMPTS, stop_tokens=(7,), max_new_tokens=12, **options)
    return [list(one.tokens) for one in found]


def conversation(model: Model) -> list[list[int]]:
    """A streamed answer and one that goes on from what it left in the cache."""
    first = model.stream("a prompt", stop_tokens=(), max_new_tokens=6)
    list(first)
    assert first.completion is not None
    second = model.stream("a prompt that", stop_tokens=(), max_new_tokens=6)
    second.cached = first.cached
    list(second)
    assert second.completion is not None
    return [list(first.completion.tokens), list(second.completion.tokens)]


def evaluation(model: Model) -> dict[str, Any]:
    rows = [
        LabelledRow(
            prompt=text,
            prompt_ids=tuple(model.tokenizer.encode(text, add_special=True)),
            separator=" ",
            label=label,
        )
        for text, label in (("is it?", "yes"), ("or is it?", "no"), ("then?", "maybe"))
    ]
    found: dict[str, Any] = {}
    for by in ("generation", "likelihood"):
        compared = compare(
            model.definition,
            model.frozen,
            model.adapter,
            tokenizer=model.tokenizer,
            batches=[batch(0), batch(1)],
            labelled=rows,
            by=by,
            batch_size=2,
            mesh=model.mesh,
        )
        for name, one in (("base", compared.base), ("adapter", compared.adapter)):
            assert one is not None
            assert one.perplexity is not None
            assert one.accuracy is not None
            found[f"{name} loss"] = one.perplexity.loss
            found[f"{name} {by}"] = [*one.accuracy.predictions, *one.accuracy.answers]
    return found


def on(folder: Path, mesh: str, options: dict[str, Any], *, everything: bool) -> dict[str, Any]:
    path = folder / "model"
    model = load_model(path, adapter=folder / "adapter0", mesh=mesh, **options)
    several = load_model(
        path, adapter=[folder / "adapter0", folder / "adapter1"], mesh=mesh, **options
    )
    names = [None, *several.adapter_names]
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, 10))
    q = model.frozen["layers"]["attention"]["q"]["weight"]
    found: dict[str, Any] = {
        "q": [q.nbytes, *{shard.data.nbytes for shard in q.addressable_shards}],
        "several": answers(several, adapters=[names[i % 3] for i in range(len(PROMPTS))]),
        "conversation": conversation(model),
        "logits": np.asarray(model.logits(tokens)).tolist(),
        "evaluation": evaluation(model),
    }
    if everything:
        found |= {
            "greedy": answers(model),
            "batches of 3": answers(model, batch_size=3),
            "penalty": answers(model, repetition_penalty=1.5, temperature=0.5, top_k=5),
            "int8 cache": answers(model, cache_dtype="int8"),
            "sampled": answers(model, temperature=1.0, seed=3),
        }
    return found


def main() -> None:
    folder, implementation, amount, *meshes = Path(sys.argv[1]), *sys.argv[2:]
    make_model(folder)
    options, everything = {"implementation": implementation}, amount == "everything"
    found = {mesh: on(folder, mesh, options, everything=everything) for mesh in ("", *meshes)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
