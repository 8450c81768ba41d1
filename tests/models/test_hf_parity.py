"""Whole models against transformers and PEFT, live, in float32."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.quantization.absmax import absmax_quantize
from fabric_jax.quantization.absmean import absmean_quantize
from tests.models import hf_oracle, running
from tests.models.hf_mapping import LINEARS, to_hf_names, to_peft_names
from tests.models.tiny_problems import LIVE, PROBLEMS, Problem, make_problem

# One worker, so that the programs of single operations are compiled once.
pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("hf-parity")]
Oracle = Callable[..., list[ModuleType]]

TERNARY = [name for name in PROBLEMS if name != "llama-float"]
TRAINABLE = ["bitnet-relu2-online", "bitnet-silu-online", "llama-float"]
PEFT = [name for name in PROBLEMS if name.startswith("bitnet")]


@pytest.fixture(autouse=True)
def _oracles(oracle: Oracle) -> None:
    oracle("torch", "transformers", "accelerate", "peft")


NEAR = 1e-4
"""Of a code's rounding boundary, in codes: an ulp of the largest activation, and of a norm."""
APART = 1e-3
"""Logits that a code has moved, where what is not exact moves them by 1e-5."""


def comparable(problem: Problem, model: Any, *, adapted: bool = False) -> np.ndarray:
    """Tokens on whose codes, and on those of all tokens before, both sides agree.

    Our codes are of a run layer by layer. In a run of the whole another one may move, on machines
    that sum in another order: a token whose logits are far apart is left out, with those after it,
    if an activation of it is near a boundary.
    """
    if problem.storage == "float":
        return np.ones(problem.tokens.shape, bool)
    inputs = hf_oracle.recorded_inputs(model, problem.tokens)
    inputs = {name: x for name, x in inputs.items() if name.endswith("_proj")}
    theirs = {name: hf_oracle.codes(x) for name, x in inputs.items()}
    keep = running.untouched_tokens(running.activation_codes(problem, adapted=adapted), theirs)
    found = np.asarray(running.logits(problem, adapted=adapted))
    expected = hf_oracle.run(model, problem.tokens)["logits"]
    near = np.any([running.near_boundary(x, NEAR) for x in inputs.values()], axis=0)
    moved = near & (np.abs(found - expected).max(axis=-1) > APART)
    keep &= ~np.logical_or.accumulate(moved, axis=1)
    assert keep.mean() > 0.4
    return keep


def gradients_of(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix("grad:"): v for k, v in result.items() if k.startswith("grad:")}


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits_op_by_op(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    expected = hf_oracle.run(model, problem.tokens)["logits"]
    found = np.asarray(running.logits(problem))
    keep = comparable(problem, model)
    assert expected.std() > 3
    # Without quantisers activations are larger: even numpy and torch differ by 5e-4 there.
    bound = 5e-4 if name == "llama-float" else 2e-5
    np.testing.assert_allclose(found[keep], expected[keep], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["bitnet-relu2-online", "bitnet-silu-offline", "llama-bitlinear"])
def test_logits_under_one_jit(name: str, tmp_path: Path) -> None:
    """Fusion moves a code in thousands across a rounding boundary; the distribution stays."""
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    expected = hf_oracle.run(model, problem.tokens)["logits"]
    found = np.asarray(running.logits(problem, jit=True))
    log_p, log_q = (np.asarray(jax.nn.log_softmax(jnp.asarray(z))) for z in (expected, found))
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    assert divergence.mean() < 2e-3
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) >= 0.95


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_all_weights_op_by_op(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    keep = comparable(problem, model)
    expected = hf_oracle.run(model, problem.tokens, keep)
    loss, grads = running.loss_and_gradients(problem, keep)
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=2e-6)
    bound = 1e-4 if name == "llama-float" else 1e-5
    running.assert_gradients(to_hf_names(grads, problem.config), gradients_of(expected), bound)


def test_gradients_of_all_weights_under_one_jit(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-online", LIVE)
    keep = np.ones(problem.tokens.shape, bool)
    expected = hf_oracle.run(hf_oracle.load_model(problem, tmp_path), problem.tokens, keep)
    loss, grads = running.loss_and_gradients(problem, keep, remat="linears", jit=True)
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=1e-3)
    running.assert_gradients(to_hf_names(grads, problem.config), gradients_of(expected), 2e-2)


@pytest.mark.parametrize("name", TERNARY)
def test_codes_equal_layer_by_layer(name: str, tmp_path: Path) -> None:
    """Teacher-forced: each linear and each layer is fed what the oracle's was fed."""
    problem = make_problem(name, LIVE)
    recorded = hf_oracle.recorded_inputs(hf_oracle.load_model(problem, tmp_path), problem.tokens)
    compared = []
    for i in range(problem.config.num_layers):
        theirs = {module: recorded[f"model.layers.{i}.{module}"] for module in LINEARS.values()}
        codes = {module: hf_oracle.codes(x) for module, x in theirs.items()}
        for module, x in theirs.items():
            np.testing.assert_array_equal(absmax_quantize(jnp.asarray(x))[0], codes[module])
        ours, left = running.layer_inputs(problem, i, jnp.asarray(recorded[f"model.layers.{i}"]))
        own = {module: np.asarray(absmax_quantize(x)[0]) for module, x in ours.items()}
        keep = running.untouched_tokens(own, codes)
        for module, x in theirs.items():
            assert_close(ours[module], x, keep)
        if i + 1 < problem.config.num_layers:
            assert_close(left, recorded[f"model.layers.{i + 1}"], keep)
        compared.append(keep.mean())
    assert np.mean(compared) > 0.8


def assert_close(found: jax.Array, expected: np.ndarray, keep: np.ndarray) -> None:
    bound = 5e-6 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found)[keep], expected[keep], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["bitnet-relu2-online", "bitnet-silu-online"])
def test_ternary_codes_of_all_weights_equal(name: str) -> None:
    import torch
    from transformers.integrations.bitnet import WeightQuant

    for tensor, master in make_problem(name, LIVE).state.items():
        if tensor.endswith("_proj.weight"):
            values = WeightQuant.apply(torch.from_numpy(master)).numpy()
            codes, _ = absmean_quantize(jnp.asarray(master))
            np.testing.assert_array_equal(codes, np.sign(values), err_msg=tensor)


@pytest.mark.parametrize("name", PEFT)
def test_lora_equals_peft(name: str, tmp_path: Path) -> None:
    """On both forms of ``autobitlinear``; the packed ``bitlinear`` is refused by PEFT."""
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    model = hf_oracle.wrap_with_peft(model, problem)
    keep = comparable(problem, model, adapted=True)
    expected = hf_oracle.run(model, problem.tokens, keep)
    found = np.asarray(running.logits(problem, adapted=True))
    plain = np.asarray(running.logits(problem))
    loss, grads = running.loss_and_gradients(problem, keep, adapted=True)
    size = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(found[keep], expected["logits"][keep], rtol=0, atol=2e-6 * size)
    assert np.abs(found - plain).max() > 1
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=2e-6)
    named, exact = to_peft_names(grads, problem.config), gradients_of(expected)
    running.assert_gradients(named, exact, 2e-5)
    assert np.median([running.relative_error(named[name], exact[name]) for name in exact]) < 5e-6
