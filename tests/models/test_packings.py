"""The same model in 2 and in 1.6 bits a weight: everything it computes is equal, bit for bit."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import Packing, repack
from fabric_kernels.ternary_matmul import Implementation

from fabric_jax.checkpoints.loading import WeightsForm, load_base, weights_form
from fabric_jax.checkpoints.native import load_model_folder, save_model
from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.model import load_model
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.models.packing import pack_base
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step
from tests.kernels.conftest import need_cpu_kernels

# Widths that fill no last byte of either layout.
CONFIG = replace(
    get_config("bitnet-tiny"),
    name="small",
    num_layers=3,
    hidden_size=42,
    ffn_size=58,
    num_heads=3,
    num_kv_heads=1,
    head_dim=14,
    vocab_size=31,
)
PACKINGS: tuple[Packing, ...] = ("ternary2", "ternary1.6")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("cpu", "xla")


@cache
def make(packing: Packing, **options: Any) -> tuple[DecoderDefinition, Tree]:
    settings = DecoderOptions(packing=packing, lora=LoraConfig(rank=2), **options)
    definition = define_decoder(CONFIG, settings)
    return definition, initialize_base(definition, 5)


def adapter_of(definition: DecoderDefinition) -> Tree:
    """An adapter whose B is not zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype),
        initialize_adapter(definition, 0),
    )


def batch() -> Batch:
    tokens = (jnp.arange(24, dtype=jnp.int32) * 7 % 31).reshape(1, 2, 12)
    return Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, -1),
        loss_mask=jnp.ones((1, 2, 12), jnp.float32),
        segment_ids=jnp.ones((1, 2, 12), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (1, 2, 12)),
    )


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_seed_gives_the_same_codes() -> None:
    (_, two), (_, less) = (make(packing) for packing in PACKINGS)
    for path, (_, k) in CONFIG.linear_shapes.items():
        group, name = path.split(".")
        ours, theirs = less["layers"][group][name], two["layers"][group][name]
        assert ours["weight"].shape[-1] == -(-k // 5)
        expected = repack(theirs["weight"], k, "ternary2", "ternary1.6")
        np.testing.assert_array_equal(ours["weight"], expected)


@pytest.mark.parametrize("act_quant", ["per_token", "block256"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_loss_and_gradients(implementation: Implementation, act_quant: str) -> None:
    if implementation == "cpu":
        need_cpu_kernels()
    rows = jax.tree.map(lambda x: x[0], batch())

    def run(packing: Packing) -> Any:
        definition, base = make(packing, implementation=implementation, act_quant=act_quant)

        def loss(adapter: Tree, base: Tree) -> tuple[jax.Array, jax.Array]:
            decoder = definition.bind(base, adapter)
            hidden = decoder(rows.tokens, rows.positions, rows.segment_ids)
            return decoder.loss(hidden, rows.targets, rows.loss_mask), decoder.logits(hidden)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter_of(definition), base)

    expected = run("ternary2")
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(expected))
    assert_same_bits(run("ternary1.6"), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.slow
def test_training_steps(implementation: Implementation) -> None:
    if implementation == "cpu":
        need_cpu_kernels()

    def train(packing: Packing) -> Any:
        definition, base = make(packing, implementation=implementation, remat="linears")
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 100)
        state = init_state(initialize_adapter(definition, 0), optimizer)
        step = make_train_step(definition, optimizer)
        losses = []
        for _ in range(4):
            state, metrics = step(state, base, batch(), jax.random.key(0))
            losses.append(metrics.loss)
        return losses, state.params, state.moments

    expected = train("ternary2")
    assert float(expected[0][-1]) < float(expected[0][0])
    assert_same_bits(train("ternary1.6"), expected)


@pytest.mark.parametrize("held", PACKINGS)
def test_a_folder_stores_two_bits_and_loads_as_either(held: Packing, tmp_path: Path) -> None:
    definition, base = make(held)
    save_model(tmp_path / "model", definition, base, tokenizer_json=None)
    again, loaded = load_model_folder(tmp_path / "model")
    assert again.options.packing == "ternary2"
    assert_same_bits(loaded, make("ternary2")[1])
    for packing in PACKINGS:
        found = load_base(tmp_path / "model", packing=packing)
        assert found.definition.options.packing == packing
        assert_same_bits(found.base, make(packing)[1])
    model = load_model(tmp_path / "model", weights="ternary1.6")
    assert_same_bits(model.frozen, make("ternary1.6")[1])
    tokens = np.arange(10).reshape(1, 10)
    expected = load_model(tmp_path / "model", weights="ternary2").logits(tokens)
    assert_same_bits(model.logits(tokens), expected)


def test_masters_pack_into_either(tmp_path: Path) -> None:
    definition = define_decoder(CONFIG, DecoderOptions(mode="master", packing="ternary1.6"))
    masters = initialize_base(definition, 2)
    packed, base = pack_base(definition, masters)
    assert (packed.options.mode, packed.options.packing) == ("packed", "ternary1.6")
    save_model(tmp_path / "model", definition, masters, tokenizer_json=None)
    assert_same_bits(load_base(tmp_path / "model", packing="ternary1.6").base, base)


def test_generation_from_random_weights_by_name() -> None:
    prompt = [[1, 2, 3]]
    two, less = (
        load_model("bitnet-tiny", weights=word, seed=1).generate(prompt, max_new_tokens=4)
        for word in PACKINGS
    )
    assert [one.tokens for one in less] == [one.tokens for one in two]


def test_words_for_weights() -> None:
    assert weights_form(None) == weights_form("auto") == WeightsForm()
    assert weights_form("packed") == weights_form("ternary2") == WeightsForm(mode="packed")
    assert weights_form("ternary1.6") == WeightsForm(mode="packed", packing="ternary1.6")
    assert weights_form("master") == WeightsForm(mode="master")
    assert weights_form("float") == WeightsForm(mode="float")
    for word in ("float32", "bfloat16", "float16", "int8", "int4"):
        assert weights_form(word) == WeightsForm(mode="float", float_format=word)


def test_an_unknown_packing() -> None:
    unknown: Any = "ternary3"
    with pytest.raises(FabricError, match=r"ternary3.*ternary2"):
        define_decoder(CONFIG, DecoderOptions(packing=unknown))
