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

pytestmark = pytest.mark.oracle
Oracle = Callable[..., list[ModuleType]]

TERNARY = [name for name in PROBLEMS if name != "llama-float"]
TRAINABLE = ["bitnet-relu2-online", "bitnet-silu-online", "llama-float"]
PEFT = [name for name in PROBLEMS if name.startswith("bitnet")]


@pytest.fixture(autouse=True)
def _oracles(oracle: Oracle) -> None:
    oracle("torch", "transformers", "accelerate", "peft")


def comparable(problem: Problem, model: Any, *, adapted: bool = False) -> np.ndarray:
    """Tokens on whose codes, and on those of all tokens before, both sides agree."""
    if problem.storage == "float":
        return np.ones(problem.tokens.shape, bool)
    inputs = hf_oracle.recorded_inputs(model, problem.tokens)
    theirs = {name: hf_oracle.codes(x) for name, x in inputs.items() if name.endswith("_proj")}
    keep = running.untouched_tokens(running.activation_codes(problem, adapted=adapted), theirs)
    assert keep.mean() > 0.4
    return keep


def gradients_of(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix("grad:"): v for k, v in result.items() if k.startswith("grad:")}


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits_op_by_op(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    keep = comparable(problem, model)
    expected = hf_oracle.run(model, problem.tokens)["logits"]
    with jax.disable_jit():
        found = np.asarray(running.logits(problem))
    assert expected.std() > 3
    # Without quantisers activations are larger: even numpy and torch differ by 5e-4 there.
    bound = 5e-4 if name == "llama-float" else 2e-5
    np.testing.assert_allclose(found[keep], expected[keep], rtol=0, atol=bound)


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits_under_one_jit(name: str, tmp_path: Path) -> None:
    """Fusion moves a code in thousands across a rounding boundary; the distribution stays."""
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    expected = hf_oracle.run(model, problem.tokens)["logits"]
    found = np.asarray(jax.jit(lambda: running.logits(problem))())
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
    with jax.disable_jit():
        loss, grads = running.loss_and_gradients(problem, keep)
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=2e-6)
    bound = 1e-4 if name == "llama-float" else 1e-5
    running.assert_gradients(to_hf_names(grads, problem.config), gradients_of(expected), bound)


@pytest.mark.parametrize("remat", ["none", "linears", "layer"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_all_weights_under_one_jit(name: str, remat: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    keep = np.ones(problem.tokens.shape, bool)
    expected = hf_oracle.run(hf_oracle.load_model(problem, tmp_path), problem.tokens, keep)
    loss, grads = jax.jit(lambda: running.loss_and_gradients(problem, keep, remat=remat))()
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=1e-3)
    running.assert_gradients(to_hf_names(grads, problem.config), gradients_of(expected), 1e-2)


@pytest.mark.parametrize("name", TERNARY)
def test_codes_equal_layer_by_layer(name: str, tmp_path: Path) -> None:
    """Teacher-forced: each linear and each layer is fed what the oracle's was fed."""
    problem = make_problem(name, LIVE)
    recorded = hf_oracle.recorded_inputs(hf_oracle.load_model(problem, tmp_path), problem.tokens)
    total = different = 0
    for i in range(problem.config.num_layers):
        entered = jnp.asarray(recorded[f"model.layers.{i}"])
        ours, left = running.layer_inputs(problem, i, entered)
        for module in LINEARS.values():
            x = recorded[f"model.layers.{i}.{module}"]
            codes = hf_oracle.codes(x)
            np.testing.assert_array_equal(absmax_quantize(jnp.asarray(x))[0], codes)
            np.testing.assert_allclose(ours[module], x, rtol=0, atol=5e-6 * np.abs(x).max())
            gap = np.abs(np.asarray(absmax_quantize(ours[module])[0], int) - codes)
            assert gap.max() <= 1
            total, different = total + gap.size, different + np.count_nonzero(gap)
        after = recorded.get(f"model.layers.{i + 1}")
        if after is not None and different == 0:
            np.testing.assert_allclose(left, after, rtol=0, atol=5e-6 * np.abs(after).max())
    assert total > 30_000
    assert different <= total * 1e-4


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
    with jax.disable_jit():
        found = np.asarray(running.logits(problem, adapted=True))
        plain = np.asarray(running.logits(problem))
        loss, grads = running.loss_and_gradients(problem, keep, adapted=True)
    size = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(found[keep], expected["logits"][keep], rtol=0, atol=1e-6 * size)
    assert np.abs(found - plain).max() > 1
    assert float(loss) == pytest.approx(expected["loss"].item(), rel=2e-6)
    named, exact = to_peft_names(grads, problem.config), gradients_of(expected)
    running.assert_gradients(named, exact, 2e-5)
    assert np.median([running.relative_error(named[name], exact[name]) for name in exact]) < 5e-6
