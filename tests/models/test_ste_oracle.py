"""One straight-through training step of the Llama family against transformers' online QAT."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import optax
import pytest

from tests.models import hf_oracle, running
from tests.models.hf_mapping import to_hf_names
from tests.models.test_hf_parity import comparable, gradients_of
from tests.models.tiny_problems import LIVE, Problem, make_problem

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("hf-parity")]


def problem() -> Problem:
    """Masters without sub-norms, with a head of their own; BitNet is in the parity tests."""
    plain = make_problem("llama-float", replace(LIVE, layers=2))
    return replace(plain, storage="online", config=replace(plain.config, ternary=True))


def test_a_step_on_all_weights_equals_online_qat(
    oracle: Callable[..., list[ModuleType]], tmp_path: Path
) -> None:
    """Loss, gradients, and the weights after a step of gradient descent, op by op in float32."""
    oracle("torch", "transformers", "accelerate", "peft")
    chosen = problem()
    model = hf_oracle.load_model(chosen, tmp_path)
    keep = comparable(chosen, model)
    expected = hf_oracle.run(model, chosen.tokens, keep)
    loss, grads = running.loss_and_gradients(chosen, keep)
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=2e-6)
    theirs = gradients_of(expected)
    running.assert_gradients(to_hf_names(grads, chosen.config), theirs, 1e-5)
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(chosen.base()))
    stepped = to_hf_names(optax.apply_updates(chosen.base(), updates), chosen.config)
    for name, gradient in theirs.items():
        exact = chosen.state[name] - np.float32(0.1) * gradient
        np.testing.assert_allclose(stepped[name], exact, atol=2e-6 * np.abs(exact).max())
