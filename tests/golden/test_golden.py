"""Our arithmetic against stored results of transformers and PEFT; torch is not needed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.quantization.absmax import absmax_fake_quantize, absmax_quantize
from fabric_jax.quantization.absmean import absmean_fake_quantize, absmean_quantize
from tests.golden.make_golden import SEED
from tests.models import running
from tests.models.hf_mapping import to_hf_names, to_peft_names
from tests.models.tiny_problems import GOLDEN, PROBLEMS, Problem, checksum, make_problem

# One worker, so that the programs of single operations are compiled once.
pytestmark = pytest.mark.xdist_group("golden")

FOLDER = Path(__file__).parent
ADAPTED = [name for name in PROBLEMS if name.startswith("bitnet")]
TRAINABLE = ["bitnet-relu2-online", "bitnet-silu-online", "llama-float"]


def load(name: str) -> tuple[Problem, dict[str, np.ndarray]]:
    with np.load(FOLDER / f"{name}.npz") as file:
        stored = dict(file)
    problem = make_problem(name, GOLDEN, SEED)
    assert checksum(problem) == int(stored["state"]), "the golden file is of other weights"
    return problem, stored


def part(stored: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}


def comparable(problem: Problem, stored: dict[str, np.ndarray], adapted: bool) -> np.ndarray:
    """Tokens on whose codes, and on those of all tokens before, both sides agree."""
    if problem.storage == "float":
        return np.ones(problem.tokens.shape, bool)
    theirs = part(stored, "lora:codes:" if adapted else "codes:")
    keep = running.untouched_tokens(running.activation_codes(problem, adapted=adapted), theirs)
    assert keep.mean() > 0.4
    return keep


def assert_logits(found: jax.Array, expected: np.ndarray, keep: np.ndarray, bound: float) -> None:
    np.testing.assert_allclose(np.asarray(found)[keep], expected[keep], rtol=0, atol=bound)


def test_activation_codes() -> None:
    with np.load(FOLDER / "quantizers.npz") as stored:
        x = jnp.asarray(stored["x"])
        for quantize in (absmax_quantize, jax.jit(absmax_quantize)):
            np.testing.assert_array_equal(quantize(x)[0], stored["x_codes"])
        values = absmax_fake_quantize(x)
        np.testing.assert_allclose(values, stored["x_values"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["w", "tiny", "ties"])
def test_weight_codes(name: str) -> None:
    with np.load(FOLDER / "quantizers.npz") as stored:
        weight, values = jnp.asarray(stored[name]), stored[f"{name}_values"]
    for quantize in (absmean_quantize, jax.jit(absmean_quantize)):
        np.testing.assert_array_equal(quantize(weight)[0], np.sign(values))
    np.testing.assert_allclose(absmean_fake_quantize(weight), values, rtol=4e-7, atol=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits(name: str) -> None:
    problem, stored = load(name)
    keep = comparable(problem, stored, adapted=False)
    found = running.logits(problem)
    bound = 1e-4 if name == "llama-float" else 2e-5
    assert_logits(found, stored["logits"], keep, bound)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_all_weights(name: str) -> None:
    problem, stored = load(name)
    if not np.all(comparable(problem, stored, adapted=False)):
        pytest.skip("a code lies on a rounding boundary on this machine: gradients differ")
    keep = np.ones(problem.tokens.shape, bool)
    loss, grads = running.loss_and_gradients(problem, keep)
    assert float(loss) == pytest.approx(stored["loss"].item(), rel=2e-6)
    bound = 1e-4 if name == "llama-float" else 1e-5
    found = to_hf_names(grads, problem.config)
    running.assert_gradients(found, part(stored, "grad:"), bound)


@pytest.mark.parametrize("name", ADAPTED)
def test_logits_with_an_adapter(name: str) -> None:
    problem, stored = load(name)
    keep = comparable(problem, stored, adapted=True)
    found = running.logits(problem, adapted=True)
    assert_logits(found, stored["lora:logits"], keep, 2e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_gradients_of_the_adapter(name: str) -> None:
    problem, stored = load(name)
    if not np.all(comparable(problem, stored, adapted=True)):
        pytest.skip("a code lies on a rounding boundary on this machine: gradients differ")
    keep = np.ones(problem.tokens.shape, bool)
    loss, grads = running.loss_and_gradients(problem, keep, adapted=True)
    assert float(loss) == pytest.approx(stored["lora:loss"].item(), rel=2e-6)
    found = to_peft_names(grads, problem.config)
    running.assert_gradients(found, part(stored, "lora:grad:"), 1e-5)


def test_loss_and_gradients_under_one_jit() -> None:
    """Fusion moves codes across rounding boundaries, so the bounds are wide."""
    problem, stored = load("bitnet-silu-online")
    keep = np.ones(problem.tokens.shape, bool)
    loss, grads = running.loss_and_gradients(problem, keep, jit=True)
    assert float(loss) == pytest.approx(stored["loss"].item(), rel=1e-2)
    found = to_hf_names(grads, problem.config)
    running.assert_gradients(found, part(stored, "grad:"), 5e-2)
