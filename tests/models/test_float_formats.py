"""Float models whose linears are stored in another format, against the same ones in floats."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import BlockTable, dequantize_blocks
from flax import nnx

from fabric_jax.checkpoints.loading import WeightsForm, load_base, weights_form
from fabric_jax.checkpoints.native import save_model
from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import FloatFormat
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.categories import memory_by_category
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, Remat, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step
from tests.models import baseline_models as tiny
from tests.models.running import whole_rows

pytestmark = pytest.mark.xdist_group("baselines")
FORMATS = pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "int4"])
CONFIGS = pytest.mark.parametrize("name", ["qwen3", "gemma3"])
LORA = LoraConfig(rank=2)


def define(config: ModelConfig, form: FloatFormat, **options: Any) -> DecoderDefinition:
    return define_decoder(
        config, DecoderOptions(mode="float", float_format=form, lora=LORA, **options)
    )


def widened(definition: DecoderDefinition, base: Tree) -> Tree:
    """The base with float32 linears of the same values."""

    def widen(tree: Any, path: str) -> Any:
        if not isinstance(tree, dict):
            return tree
        node = cast(Tree, tree)
        if "codes" in node:
            k = definition.config.linear_shapes[path][1]
            return {"weight": dequantize_blocks(BlockTable(node["codes"], node["scales"], k))}
        if "weight" in node:
            return {"weight": node["weight"].astype(jnp.float32)}
        return {name: widen(child, f"{path}.{name}".lstrip(".")) for name, child in node.items()}

    return base | {"layers": widen(base["layers"], "")}


def logits_and_gradient(definition: DecoderDefinition, base: Tree, adapter: Tree) -> Any:
    tokens = tiny.tokens_of(definition.config)

    def loss(adapter: Tree) -> tuple[jax.Array, jax.Array]:
        decoder = definition.bind(base, adapter)
        logits = decoder.logits(decoder(*whole_rows(tokens)))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[..., None], 2)
        return -chosen.mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)


@FORMATS
@CONFIGS
@pytest.mark.slow
def test_logits_and_gradients_are_those_of_the_values(name: str, form: FloatFormat) -> None:
    config = tiny.CONFIGS[name]
    definition = define(config, form, remat="linears")
    base = initialize_base(definition, 0)
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)),
        initialize_adapter(definition, 0),
    )
    found = logits_and_gradient(definition, base, adapter)
    plain = define(config, "same", remat="linears")
    expected = logits_and_gradient(plain, widened(definition, base), adapter)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)


@FORMATS
@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_predicted(name: str, form: FloatFormat, dtype: str) -> None:
    config = replace(tiny.CONFIGS[name], ffn_size=75)
    definition = define(config, form, dtype=dtype)
    base = initialize_base(definition, 0)
    report = memory_by_category(definition, base, {}, ())
    for category in ("weights", "scales", "embedding_and_head", "norms"):
        assert getattr(report.measured, category) == getattr(report.predicted, category), category
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(base)) == report.predicted.base


@pytest.mark.parametrize("form", ["float16", "int8", "int4"])
def test_random_weights_are_those_of_the_float_model(form: FloatFormat) -> None:
    definition = define(tiny.QWEN3, form)
    values = widened(definition, initialize_base(definition, 0))["layers"]["mlp"]["down"]["weight"]
    plain = initialize_base(define(tiny.QWEN3, "same"), 0)["layers"]["mlp"]["down"]["weight"]
    assert float(values.std()) == pytest.approx(float(plain.std()), rel=0.03)
    if form != "float16":
        assert np.corrcoef(values.ravel(), plain.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "int4"])
def test_stored_floats_are_rounded_as_they_are_read(
    tmp_path: Path, form: FloatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabric_jax.checkpoints.assemble.TABLE_BLOCK_BYTES", 4 * 32 * 24)
    plain = define(tiny.QWEN3, "same")
    base = initialize_base(plain, 0)
    save_model(tmp_path / "floats", plain, base, tokenizer_json=None)
    loaded = load_base(tmp_path / "floats", float_format=form)
    found = loaded.base["layers"]["attention"]["q"]
    weight = np.asarray(base["layers"]["attention"]["q"]["weight"])
    if form in ("int8", "int4"):
        kind = gguf.GGMLQuantizationType.Q8_0 if form == "int8" else gguf.GGMLQuantizationType.Q4_0
        theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        ours = dequantize_blocks(BlockTable(found["codes"], found["scales"], weight.shape[-1]))
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_array_equal(found["weight"], weight.astype(jnp.dtype(form)))
    # Saved again it is the floats of the same values.
    save_model(tmp_path / "again", loaded.definition, loaded.base, tokenizer_json=None)
    again, expected = load_base(tmp_path / "again").base, widened(loaded.definition, loaded.base)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("remat", ["none", "linears", "layer"])
@pytest.mark.slow
def test_no_stack_is_made_in_a_step(form: FloatFormat, remat: Remat) -> None:
    """A further layer costs less than half of its matrices in int4."""
    temporaries: list[int] = []
    config = replace(tiny.QWEN3, hidden_size=256, ffn_size=1024, num_heads=8)
    for layers in (4, 12):
        definition = define(replace(config, num_layers=layers), form, remat=remat)
        optimizer = make_optimizer(OptimizerConfig(), 10)
        base, adapter = (
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            for tree in map(nnx.to_pure_dict, (definition.base, definition.adapter))
        )
        state = jax.eval_shape(lambda p, o=optimizer: init_state(p, o), adapter)
        ids: Any = jax.ShapeDtypeStruct((1, 1, 4), jnp.int32)
        mask: Any = jax.ShapeDtypeStruct((1, 1, 4), jnp.float32)
        batch = Batch(tokens=ids, targets=ids, loss_mask=mask, segment_ids=ids, positions=ids)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = make_train_step(definition, optimizer).lower(state, base, batch, key).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    of_layer = config.linear_parameters // config.num_layers
    assert (temporaries[1] - temporaries[0]) / 8 < of_layer / 4


def test_words_that_do_not_fit() -> None:
    assert weights_form("int4") == WeightsForm(mode="float", float_format="int4")
    unknown: Any = "int5"
    with pytest.raises(FabricError, match=r"int5.*int4"):
        define(tiny.QWEN3, unknown)
    with pytest.raises(FabricError, match="no float weights to be stored as int8"):
        load_base("bitnet-tiny", float_format="int8")


def test_a_packed_checkpoint_has_no_floats(tmp_path: Path) -> None:
    loaded = load_base("bitnet-tiny")
    save_model(tmp_path / "packed", loaded.definition, loaded.base, tokenizer_json=None)
    with pytest.raises(FabricError, match="packed weights, which can't be turned into float ones"):
        load_base(tmp_path / "packed", mode="float", float_format="int8")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    plain = define(tiny.QWEN3, "same")
    base = jax.tree.map(lambda leaf: leaf * 1e7, initialize_base(plain, 0))
    save_model(tmp_path / "floats", plain, base, tokenizer_json=None)
    with pytest.raises(FabricError, match="beyond those of float16"):
        load_base(tmp_path / "floats", float_format="float16")
