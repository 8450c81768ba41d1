"""The published recipes: shapes of the schedules, and how flags change them."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.data.config import DataConfig
from fabric_jax.errors import FabricError
from fabric_jax.training.config import OptimizerConfig, PretrainConfig
from fabric_jax.training.optimizer import (
    describe_optimizer,
    learning_rate_schedule,
    make_optimizer,
    warmup_steps,
    weight_decay_schedule,
)
from fabric_jax.training.recipes import published_peaks, recipe_optimizer, resolve
from fabric_jax.training.step import StepOptions

DATA = DataConfig(data="rows.jsonl")
T = 10_000
SCRATCH = recipe_optimizer("scratch", 700_000_000)


def rates(optimizer: OptimizerConfig, total: int) -> np.ndarray:
    return np.asarray(learning_rate_schedule(optimizer, total)(jnp.arange(total)), np.float64)


def test_two_stages_are_the_lines_of_the_published_figure() -> None:
    found = rates(SCRATCH, T)
    w, end = 375, 3e-5
    assert found.argmax() == w - 1 or found.argmax() == w
    assert found[w] == pytest.approx(1.5e-3, rel=1e-6)
    np.testing.assert_allclose(found[:w], 1.5e-3 * np.arange(1, w + 1) / w, rtol=1e-5)
    t = np.arange(w, T)
    for peak, part in ((1.5e-3, t < T // 2), (1e-3, t >= T // 2)):
        line = peak + (end - peak) * (t[part] - w) / (T - w)
        np.testing.assert_allclose(found[w:][part], line, rtol=1e-5)
    # The figure's drop at half of the run, with its warm-up of 0.4 % of the steps.
    whole = rates(SCRATCH, 100_000)
    assert whole[49_999] == pytest.approx(7.7e-4, rel=5e-3)
    assert whole[50_000] == pytest.approx(5.15e-4, rel=5e-3)
    assert end < found[-1] < 1.01 * end


def test_weight_decay_ends_with_the_first_stage() -> None:
    schedule = weight_decay_schedule(SCRATCH, T)
    assert callable(schedule)
    found = np.asarray(schedule(jnp.arange(T)))
    assert set(found[: T // 2].tolist()) == {np.float32(0.1)}
    assert not found[T // 2 :].any()


def test_the_optimizer_decays_by_that_schedule() -> None:
    """With no gradient AdamW moves a weight by its decay alone."""
    total = 20
    optimizer = make_optimizer(replace(SCRATCH, warmup_steps=2), total)
    params = {"w": jnp.ones(3), "norm": {"gain": jnp.ones(3)}}
    zeros = {"w": jnp.zeros(3), "norm": {"gain": jnp.zeros(3)}}
    state = optimizer.init(params)
    moved: list[float] = []
    for _ in range(total):
        updates, state = optimizer.update(zeros, state, params)
        moved.append(float(updates["w"][0]))
        assert not np.any(updates["norm"]["gain"])
    expected = -0.1 * rates(replace(SCRATCH, warmup_steps=2), total)
    np.testing.assert_allclose(moved[: total // 2], expected[: total // 2], rtol=1e-5)
    assert not any(moved[total // 2 :])


def test_warmup_is_at_most_a_tenth_of_a_short_run() -> None:
    assert warmup_steps(SCRATCH, 100_000) == 375
    assert warmup_steps(SCRATCH, 200) == 20


@pytest.mark.parametrize(
    ("parameters", "peaks"),
    [
        (125_000_000, (1.5e-3, 1e-3)),
        (1_300_000_000, (1.2e-3, 8e-4)),
        (3_300_000_000, (1.2e-3, 8e-4)),
    ],
)
def test_peaks_by_size(parameters: int, peaks: tuple[float, float]) -> None:
    assert published_peaks(parameters) == peaks


def test_what_is_given_counts_and_the_rest_is_the_recipes() -> None:
    config = PretrainConfig(
        model="bitnet-tiny", output="o", dataset=DATA, optimizer=OptimizerConfig(learning_rate=4e-3)
    )
    found = resolve(config, 1_000_000).optimizer
    second = pytest.approx(4e-3 * 1e-3 / 1.5e-3)
    assert (found.learning_rate, found.second_learning_rate) == (4e-3, second)
    published = recipe_optimizer("scratch", 1)
    back = replace(found, learning_rate=1.5e-3, second_learning_rate=1e-3)
    assert back == published
    cosine = replace(config, optimizer=OptimizerConfig(schedule="linear", weight_decay=0.5))
    found = resolve(cosine, 1_000_000).optimizer
    assert (found.schedule, found.weight_decay, found.second_learning_rate) == ("linear", 0.5, 0)
    plain = replace(config, optimizer_defaults="plain")
    assert resolve(plain, 1_000_000) == plain
    sft = resolve(replace(config, recipe="sft", optimizer=OptimizerConfig()), 1).optimizer
    assert (sft.learning_rate, sft.weight_decay) == (1e-4, 0)


def test_the_second_stage_never_begins_above_the_first() -> None:
    config = PretrainConfig(
        model="bitnet-tiny", output="o", dataset=DATA, optimizer=OptimizerConfig(learning_rate=2e-5)
    )
    found = rates(resolve(config, 1_000_000).optimizer, 100)
    assert found[50] < found[49]
    given = OptimizerConfig(learning_rate=4e-4, second_learning_rate=4e-4, schedule="two-stage")
    found = resolve(replace(config, optimizer=given), 1).optimizer
    assert found.second_learning_rate == 4e-4


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_a_share_of_warmup_counts_where_the_recipe_has_steps(share: float) -> None:
    given = OptimizerConfig(warmup_ratio=share)
    config = PretrainConfig(model="bitnet-tiny", output="o", dataset=DATA, optimizer=given)
    optimizer = resolve(config, 1).optimizer
    assert warmup_steps(optimizer, 2000) == 2000 * share
    steps = replace(given, warmup_steps=7)
    assert warmup_steps(resolve(replace(config, optimizer=steps), 1).optimizer, 2000) == 7


def test_a_run_says_what_its_recipe_decided() -> None:
    assert describe_optimizer(SCRATCH, 200) == (
        "two-stage: learning rate 0.0015, from half of the run 0.001, to 3e-05; "
        "warm-up steps 20; weight decay 0.1, then 0"
    )
    constant = OptimizerConfig(schedule="constant", warmup_ratio=0)
    line = "constant: learning rate 0.0002; warm-up steps 0; weight decay 0"
    assert describe_optimizer(constant, 9) == line


def test_quantisation_grows_linearly_and_stays() -> None:
    strength = StepOptions(quantization_warmup=4).strength
    found = [float(strength(jnp.int32(step))) for step in (0, 1, 2, 4, 5, 1000)]  # pyright: ignore
    assert found == [0, 0.25, 0.5, 1, 1, 1]
    assert StepOptions().strength(jnp.int32(0)) is None


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(FabricError, match="schedule two-stage with a second_learning_rate"):
        OptimizerConfig(schedule="two-stage")
    with pytest.raises(FabricError, match="either named or learnt"):
        PretrainConfig(
            model="m", output="o", dataset=replace(DATA, tokenizer="t"), train_tokenizer=300
        )
    with pytest.raises(FabricError, match=r"knows no train_on.*found completion"):
        PretrainConfig(model="m", output="o", dataset=replace(DATA, train_on="completion"))
    streams: list[dict[str, Any]] = [{"corpus": "c"}, {"document_mask": False}]
    for given in streams:
        with pytest.raises(FabricError, match="rows stream alone"):
            PretrainConfig(model="m", output="o", dataset=DATA, recipe="sft", **given)
    with pytest.raises(FabricError, match="no document_mask"):
        PretrainConfig(model="m", output="o", dataset=DATA, attention="cudnn-causal")
