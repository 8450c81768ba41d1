"""With A frozen (LoRA-FA) only B moves, as it would with both trained, and costs memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file

from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.categories import predict_memory, tree_bytes
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_adapter, initialize_base
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.loop import finetune
from fabric_jax.training.memory_account import MemoryConfig, account
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.partition import join, split, trained_leaves
from fabric_jax.training.step import TrainState, init_state, make_train_step
from tests.training.conftest import MICRO, Configure
from tests.training.test_train_step import random_batch

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1, clip_norm=0.0)


def define(*, freeze_a: bool = True, **lora: Any) -> DecoderDefinition:
    settings = {"rank": 4} | lora
    options = DecoderOptions(remat="layer", lora=LoraConfig(freeze_a=freeze_a, **settings))
    return define_decoder(MICRO, options)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Dotted paths to copies of the arrays."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def start(definition: DecoderDefinition) -> Tree:
    """An adapter whose B is not zero."""
    adapter = initialize_adapter(definition, 0)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype), adapter
    )


def run(
    definition: DecoderDefinition,
    config: OptimizerConfig = OPTIMIZER,
    *,
    fused: bool = False,
    steps: int = 4,
    same_batch: bool = False,
) -> tuple[TrainState, list[tuple[float, float]]]:
    freeze_a = definition.options.lora.freeze_a
    optimizer = make_optimizer(config, 8, freeze_a=freeze_a)
    base = initialize_base(definition, 0)
    state = init_state(start(definition), optimizer)
    step = make_train_step(definition, optimizer, fused=fused)
    seen: list[tuple[float, float]] = []
    for seed in range(steps):
        batch = random_batch(0 if same_batch else seed, 1, 2)
        state, metrics = step(state, base, batch, jax.random.key(3))
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return state, seen


def test_splitting_leaves_every_leaf_in_one_part() -> None:
    tree = start(define())
    trained, frozen = split(tree, freeze_a=True)
    assert {name.split(".")[-1] for name in leaves(trained)} == {"b"}
    assert {name.split(".")[-1] for name in leaves(frozen)} == {"a"}
    assert leaves(trained).keys() | leaves(frozen).keys() == leaves(tree).keys()
    for parts in ((trained, frozen), split(tree, freeze_a=False)):
        jax.tree.map(np.testing.assert_array_equal, join(*parts), tree)
    assert trained_leaves(tree, freeze_a=False) is tree


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_stays_bit_for_bit_and_has_no_state(
    fused: bool, moments: Literal["float32", "int8"]
) -> None:
    definition = define(dropout=0.1)
    before = leaves(start(definition))
    config = replace(OPTIMIZER, moments=moments)
    state, losses = run(definition, config, fused=fused, steps=6, same_batch=True)
    after = leaves(state.params)
    for name, array in before.items():
        assert np.array_equal(after[name], array) == name.endswith(".a"), name
    assert losses[-1][0] < losses[0][0]
    names = leaves(state.moments)
    assert not [name for name in names if ".lora.a" in name]
    assert [name for name in names if ".lora.b" in name]


def test_the_first_update_of_b_is_that_of_full_lora() -> None:
    """Adam's first moment is 0.1 of the gradient: B's gradient is the same with A trained."""
    config = replace(OPTIMIZER, weight_decay=0.0)
    (frozen, _), (full, _) = (
        run(define(freeze_a=freeze_a), config, steps=1) for freeze_a in (True, False)
    )
    moments, others = leaves(frozen.moments), leaves(full.moments)
    assert moments.keys() < others.keys()
    for name, array in moments.items():
        np.testing.assert_allclose(array, others[name], rtol=1e-5, atol=1e-9, err_msg=name)


def gradient_norm(state: TrainState) -> float:
    """Of what reached Adam in the first step: its first moment is 0.1 of that."""
    squares = [np.sum(np.square(x / 0.1)) for n, x in leaves(state.moments).items() if "mu" in n]
    return float(np.sqrt(sum(squares)))


def test_norm_and_clipping_are_over_b_alone() -> None:
    clipped = replace(OPTIMIZER, clip_norm=0.01, weight_decay=0.0)
    plain = replace(clipped, clip_norm=0.0)
    (state, [(_, norm)]), (unclipped, [(_, same)]) = (
        run(define(), config, steps=1) for config in (clipped, plain)
    )
    _, [(_, whole)] = run(define(freeze_a=False), plain, steps=1)
    assert norm == same == pytest.approx(gradient_norm(unclipped), rel=1e-4)
    assert norm < whole
    assert gradient_norm(state) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.slow
def test_the_fused_step_trains_alike() -> None:
    definition = define(dropout=0.2)
    (after, losses), (within, fused) = (run(definition, fused=fused) for fused in (False, True))
    np.testing.assert_allclose(fused, losses, rtol=2e-5)
    assert jax.tree.structure(after) == jax.tree.structure(within)
    one, other = leaves(after.params), leaves(within.params)
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize(
    ("remat", "fused"), [("layer", False), ("layer", True), ("linears", False), ("none", False)]
)
@pytest.mark.slow
def test_a_compiled_step_needs_no_more_scratch(
    remat: Literal["layer", "linears", "none"],
    fused: bool,
    implementation: Literal["xla"] | None,
) -> None:
    scratch = {}
    for freeze_a in (False, True):
        options = DecoderOptions(
            remat=remat,
            lora=LoraConfig(rank=16, freeze_a=freeze_a),
            implementation=implementation,
        )
        definition = define_decoder(replace(MICRO, num_layers=8), options)
        optimizer = make_optimizer(OPTIMIZER, 8, freeze_a=freeze_a)
        adapter = nnx.to_pure_dict(definition.adapter)
        state: Any = jax.eval_shape(lambda p, o=optimizer: init_state(p, o), adapter)
        base: Any = nnx.to_pure_dict(definition.base)
        step = make_train_step(definition, optimizer, fused=fused)
        compiled = step.lower(state, base, random_batch(0, 1, 2), jax.random.key(0)).compile()
        scratch[freeze_a] = compiled.memory_analysis().temp_size_in_bytes
    assert scratch[True] < scratch[False]


@pytest.mark.slow
def test_predicted_memory_counts_b_alone() -> None:
    definition = define()
    state, _ = run(definition, steps=1)
    b = tree_bytes(trained_leaves(state.params, freeze_a=True))
    predicted = predict_memory(definition.config, definition.options)
    assert predicted.gradients == b
    assert predicted.optimizer == 2 * b
    assert predicted.adapters == tree_bytes(state.params)
    settings = MemoryConfig(model="bitnet-tiny", lora=LoraConfig(rank=4, freeze_a=True))
    found = account(settings)
    assert found.compiled is not None
    arrays = found.arrays
    known = arrays.base + arrays.adapters + arrays.optimizer
    assert 0 <= found.compiled.arguments - known < 64 << 10
    full = account(replace(settings, lora=LoraConfig(rank=4), compile=False)).arrays
    assert arrays.optimizer < full.optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(
    dtype: Literal["float32", "bfloat16"], configure: Configure, tmp_path: Path, quiet: Console
) -> None:
    lora = LoraConfig(rank=4, dropout=0.1, freeze_a=True, adapter_dtype=dtype)
    optimizer = {"schedule": "constant", "warmup_steps": 2}
    long = configure(tmp_path / "long", lora=lora, optimizer=optimizer, max_steps=6)
    summary = finetune(long, console=quiet)
    short = replace(long, output=str(tmp_path / "short"), max_steps=3)
    finetune(short, console=quiet)
    finetune(replace(short, max_steps=6, resume="auto"), console=quiet)
    files = [Path(c.output) / "adapter" / "adapter_model.safetensors" for c in (long, short)]
    assert files[0].read_bytes() == files[1].read_bytes()

    definition = define(dropout=0.1, adapter_dtype=dtype)
    fresh = initialize_adapter(definition, 0)
    save_adapter(tmp_path / "fresh", definition, fresh, long.model)
    start, end = load_file(tmp_path / "fresh" / files[0].name), load_file(files[0])
    for name, array in start.items():
        assert np.array_equal(array, end[name]) == ("lora_A" in name), name
    trained = trained_leaves(fresh, freeze_a=True)
    assert summary.trained_parameters == sum(x.size for x in jax.tree.leaves(trained))

    other = replace(short, lora=replace(lora, freeze_a=False), resume="auto")
    with pytest.raises(FabricError, match=r"lora\.freeze_a"):
        finetune(other, console=quiet)
