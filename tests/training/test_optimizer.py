"""AdamW and its schedules against float64 numpy written from the papers' formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.errors import FabricError
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.optimizer import learning_rate_schedule, make_optimizer, warmup_steps


def expected_rate(config: OptimizerConfig, total: int, done: int) -> float:
    """The learning rate of the step after ``done`` others, from the definition."""
    warmup = config.warmup_steps or round(config.warmup_ratio * total)
    peak, last = config.learning_rate, config.min_learning_rate
    if done < warmup:
        return peak * (done + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = min((done - warmup) / max(total - warmup, 1), 1.0)
    if config.schedule == "linear":
        return peak + (last - peak) * progress
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_learning_rate_is_that_of_the_formula(schedule: Any, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 200))
    config = OptimizerConfig(
        learning_rate=data.draw(st.floats(1e-5, 1.0)),
        min_learning_rate=data.draw(st.sampled_from([0.0, 1e-6])),
        schedule=schedule,
        warmup_steps=data.draw(st.integers(0, 20)),
        warmup_ratio=data.draw(st.sampled_from([0.0, 0.03, 0.5])),
    )
    found = learning_rate_schedule(config, total)(jnp.arange(200))
    expected = [expected_rate(config, total, done) for done in range(total)]
    np.testing.assert_allclose(
        np.broadcast_to(np.asarray(found, np.float64), 200)[:total],
        expected,
        rtol=2e-5,
        atol=1e-6 * config.learning_rate,
    )


def test_no_step_is_spent_at_a_rate_of_zero() -> None:
    config = OptimizerConfig(schedule="linear", warmup_steps=3)
    assert np.all(np.asarray(learning_rate_schedule(config, 10)(jnp.arange(10))) > 0)


def test_warmup_in_steps_goes_before_its_ratio() -> None:
    assert warmup_steps(OptimizerConfig(warmup_steps=7, warmup_ratio=0.5), 100) == 7
    assert warmup_steps(OptimizerConfig(warmup_ratio=0.5), 100) == 50


def adamw_float64(
    config: OptimizerConfig, params: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Algorithm 2 of arXiv:1711.05101 after clipping by the global norm, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
        factor = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        rate = expected_rate(config, len(gradients), t - 1)
        for name, value in params.items():
            g = gradient[name].astype(np.float64) * factor
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g * g
            m_hat, v_hat = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
            decay = 0.0 if "norm" in name else config.weight_decay
            params[name] = value - rate * (
                m_hat / (np.sqrt(v_hat) + config.epsilon) + decay * value
            )
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 0.5], ids=["unclipped", "clipped"])
def test_twenty_steps_are_those_of_adamw(clip_norm: float) -> None:
    rng = np.random.default_rng(0)
    config = OptimizerConfig(
        learning_rate=3e-2, weight_decay=0.1, beta2=0.95, clip_norm=clip_norm, warmup_steps=4
    )
    params = {"a": rng.normal(size=(3, 4)), "final_norm": rng.normal(size=(5,))}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    gradients = [
        {name: rng.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
        for _ in range(20)
    ]
    optimizer = make_optimizer(config, 20)
    found: Any = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(found)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, found)
        found = optax.apply_updates(found, updates)
    expected = adamw_float64(config, params, gradients)
    for name in params:
        np.testing.assert_allclose(np.asarray(found[name]), expected[name], rtol=3e-5, atol=3e-6)


def test_bfloat16_weights_keep_float32_moments() -> None:
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = optimizer.init({"a": jnp.zeros((2, 2), jnp.bfloat16)})
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)]
    assert len(moments) == 2
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"min_learning_rate": 1.0}, "above its peak"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"beta1": 1.0}, "beta1"),
        ({"clip_norm": -0.1}, "clip_norm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_numbers_that_cannot_be_meant_are_refused(changes: dict[str, float], named: str) -> None:
    with pytest.raises(FabricError, match=named):
        OptimizerConfig(**changes)  # type: ignore[arg-type]
