"""Decoders whose embedding and head are int8 or int4, against the same ones in floats."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import BlockTable, dequantize_blocks, quantize_blocks

from fabric_jax.checkpoints.loading import load_base
from fabric_jax.checkpoints.native import save_model
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.categories import memory_by_category
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config
from tests.models.running import whole_rows

TINY = replace(
    get_config("bitnet-tiny"),
    name="table",
    vocab_size=301,
    num_layers=2,
    hidden_size=70,
    ffn_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
)
UNTIED = replace(TINY, name="untied", tied_head=False)
DTYPES = pytest.mark.parametrize("dtype", ["int8", "int4"])
CONFIGS = pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])


def define(config: ModelConfig, dtype: str | None, **options: Any) -> DecoderDefinition:
    lora = LoraConfig(rank=2)
    return define_decoder(config, DecoderOptions(embedding_dtype=dtype, lora=lora, **options))


def float_tables(config: ModelConfig, base: Tree) -> Tree:
    names = ("embedding",) if config.tied_head else ("embedding", "head")
    k = config.hidden_size
    return base | {
        n: dequantize_blocks(BlockTable(base[n]["codes"], base[n]["scales"], k)) for n in names
    }


def loss_and_gradient(definition: DecoderDefinition, base: Tree, adapter: Tree) -> Any:
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, definition.config.vocab_size, (2, 3, 20), np.int32)
    weights = jnp.asarray(random.random((3, 20)), jnp.float32)

    def loss(adapter: Tree) -> jax.Array:
        decoder = definition.bind(base, adapter)
        hidden = decoder(*whole_rows(tokens))
        return decoder.loss(hidden, jnp.asarray(targets), weights) / weights.sum()

    return jax.jit(jax.value_and_grad(loss))(adapter)


@DTYPES
@CONFIGS
@pytest.mark.slow
def test_loss_and_gradients_are_those_of_the_values(config: ModelConfig, dtype: str) -> None:
    definition = define(config, dtype, act_quant="none")
    base = initialize_base(definition, 0)
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)),
        initialize_adapter(definition, 0),
    )
    found = loss_and_gradient(definition, base, adapter)
    wide = define(config, None, act_quant="none")
    expected = loss_and_gradient(wide, float_tables(config, base), adapter)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)


@DTYPES
@CONFIGS
@pytest.mark.parametrize("width", [64, 70, 33])
def test_memory_is_predicted(config: ModelConfig, dtype: str, width: int) -> None:
    config = replace(config, hidden_size=width)
    definition = define(config, dtype)
    base = initialize_base(definition, 0)
    assert set(base["embedding"]) == {"codes", "scales"}
    assert ("head" in base) is not config.tied_head
    report = memory_by_category(definition, base, {}, ())
    assert report.measured.embedding_and_head == report.predicted.embedding_and_head
    assert report.measured.base == report.predicted.base


@DTYPES
def test_random_tables_are_gaussian(dtype: str) -> None:
    config = replace(TINY, vocab_size=5000, hidden_size=64)
    base = initialize_base(define(config, dtype), 0)
    values = np.asarray(float_tables(config, base)["embedding"])
    plain = np.asarray(initialize_base(define(config, None), 0)["embedding"])
    assert values.mean() == pytest.approx(0, abs=0.01 * float(plain.std()))
    assert np.corrcoef(values.ravel(), plain.ravel())[0, 1] > 0.98
    assert values.std() == pytest.approx(float(plain.std()), rel=0.03)


@DTYPES
@CONFIGS
def test_stored_floats_are_rounded_as_they_are_read(
    tmp_path: Path, config: ModelConfig, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabric_jax.checkpoints.assemble.TABLE_BLOCK_BYTES", 4 * 70 * 64)
    plain = define(config, None)
    base = initialize_base(plain, 0)
    save_model(tmp_path / "floats", plain, base, tokenizer_json=None)
    loaded = load_base(tmp_path / "floats", embedding_dtype=dtype)
    for name in ("embedding",) if config.tied_head else ("embedding", "head"):
        codes, scales = quantize_blocks(base[name], 8 if dtype == "int8" else 4)
        np.testing.assert_array_equal(loaded.base[name]["codes"], codes)
        np.testing.assert_array_equal(loaded.base[name]["scales"], scales)
    # Saved again it is the floats that the codes stand for.
    save_model(tmp_path / "again", loaded.definition, loaded.base, tokenizer_json=None)
    again = load_base(tmp_path / "again").base
    expected = float_tables(config, loaded.base)
    np.testing.assert_array_equal(again["embedding"], expected["embedding"])


def test_codes_are_not_trained() -> None:
    definition = define(TINY, "int8")
    decoder = definition.bind(initialize_base(definition, 0), initialize_adapter(definition, 0))
    zeros = jnp.zeros((1, 4), jnp.int32)
    hidden = decoder(zeros, zeros, zeros + 1)
    with pytest.raises(FabricError, match="a head of int8 codes can't be trained"):
        decoder.loss(hidden, zeros, jnp.ones((1, 4)), train_head=True)
