import dataclasses
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fabric_jax.data.batch import Batch
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.categories import (
    compiled_memory,
    f16_bytes,
    memory_by_category,
    predict_memory,
    tree_bytes,
)
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.registry import REGISTRY
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step

# Widths that do not fill their last byte, grouped heads, a head of its own.
ODD = ModelConfig(
    name="odd",
    vocab_size=37,
    num_layers=3,
    hidden_size=22,
    ffn_size=42,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    max_length=16,
)
UNTIED = dataclasses.replace(ODD, name="untied", tied_head=False, sub_norms=False)
STEP_COUNTERS = 16


def job(config: ModelConfig, options: DecoderOptions):
    definition = define_decoder(config, options)
    base, adapter = (
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
        for state in (definition.base, definition.adapter)
    )
    optimizer = make_optimizer(OptimizerConfig(), 10)
    return definition, base, adapter, optimizer


def numpy_bytes(tree: Any) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("config", [ODD, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("mode", ["packed", "master", "float"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=2),
        LoraConfig(rank=5, targets=("q", "mlp"), adapter_dtype="bfloat16"),
        LoraConfig(rank=0),
    ],
    ids=["all", "some-bf16", "none"],
)
def test_prediction_equals_the_arrays(config: ModelConfig, mode: Any, dtype: str, lora: LoraConfig):
    options = DecoderOptions(mode=mode, dtype=dtype, lora=lora)
    definition, base, adapter, optimizer = job(config, options)
    trained = adapter or ({} if mode == "packed" else base)
    report = memory_by_category(definition, base, adapter, optimizer.init(trained))
    measured, predicted = report.measured, report.predicted
    for name in ("weights", "scales", "embedding_and_head", "norms", "adapters"):
        assert getattr(measured, name) == getattr(predicted, name), name
    assert 0 <= measured.optimizer - predicted.optimizer <= STEP_COUNTERS
    assert measured.base == numpy_bytes(base)
    assert measured.adapters == numpy_bytes(adapter)
    assert predicted.gradients == 4 * sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_packed_weights_take_two_bits_and_the_pad_of_each_row():
    shapes = [(18, 22), (6, 22), (6, 22), (22, 18), (42, 22), (42, 22), (22, 42)]
    expected = 3 * sum(n * -(-k // 4) for n, k in shapes)
    memory = predict_memory(ODD, DecoderOptions(mode="packed"))
    assert (memory.weights, memory.scales) == (expected, 3 * 7 * 4)


def test_prediction_equals_the_arrays_in_the_other_packing():
    definition, base, adapter, _ = job(ODD, DecoderOptions(packing="ternary1.6"))
    report = memory_by_category(definition, base, adapter, ())
    expected = 3 * sum(n * -(-k // 5) for n, k in ODD.linear_shapes.values())
    assert report.measured.weights == report.predicted.weights == expected
    assert report.measured.base == report.predicted.base == numpy_bytes(base)


@pytest.mark.parametrize("name", ["bitnet-125m", "bitnet-2b-4t", "falcon3-1b-1.58"])
def test_f16_is_two_bytes_for_each_declared_float_weight(name: str):
    config = REGISTRY[name]
    declared = define_decoder(config, DecoderOptions(mode="float", dtype="float16")).base
    sizes = [reduce(lambda a, b: a * b, leaf.shape, 1) for leaf in jax.tree.leaves(declared)]
    assert f16_bytes(config) == 2 * sum(sizes)


def test_compiled_step_gives_temporaries_and_counts_donated_buffers_once():
    options = DecoderOptions(lora=LoraConfig(rank=2))
    definition, base, adapter, optimizer = job(ODD, options)
    state = init_state(adapter, optimizer)
    ones = jnp.ones((1, 1, 8), jnp.int32)
    batch = Batch(
        tokens=ones,
        targets=ones,
        loss_mask=ones.astype(jnp.float32),
        segment_ids=ones,
        positions=ones,
    )
    step = make_train_step(definition, optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        compiled = step.lower(state, base, batch, jax.random.key(0)).compile()
    report = memory_by_category(definition, base, adapter, state.moments, compiled)
    analysis = compiled_memory(compiled)
    assert report.measured.temporaries == analysis.temporaries
    gradients = report.predicted.gradients
    assert gradients is not None
    assert analysis.temporaries > gradients
    arguments = numpy_bytes((state, base, batch)) + 8
    assert analysis.arguments == pytest.approx(arguments, rel=0.02)
    # The donated state comes back as the new state.
    assert analysis.aliased >= tree_bytes(state) * 0.9
    assert analysis.total < analysis.arguments + analysis.outputs + analysis.temporaries
    assert (
        report.measured.total
        == (report.measured.base + report.measured.adapters + report.measured.optimizer)
        + analysis.temporaries
    )


def test_a_parameter_without_a_category_is_an_error():
    definition, base, adapter, _ = job(ODD, DecoderOptions())
    with pytest.raises(ValueError, match=r"layers\.mystery"):
        memory_by_category(
            definition, {**base, "layers": {"mystery": jnp.ones(3)}}, adapter, optax.EmptyState()
        )
