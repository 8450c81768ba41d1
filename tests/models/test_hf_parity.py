"""Whole models against transformers, live, in float32."""

from collections.abc from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.layers.attention import attend
from fabric_jax.layers.feed_forward import ACTIVATIONS
from fabric_jax.layers.rope import rotary_angles
from fabric_jax.models.decoder import Block
from fabric_jax.quantization.absmax import absmax_quantize
from fabric_jax.quantization.absmean import absmean_quantize
from tests.models import hf_oracle, running
from tests.models.hf_mapping import LINEARS, to_hf_names, to_peft_names
from tests.models.tiny_problems import LIVE, PROBLEMS, Problem, make_problem

pytestmark = pytest.mark.oracle
Oracle = Callable[..., list[ModuleType]]

TERNARY = [name for name in PROBLEMS if name != "llama-float"]
TRAINABLE = ["bitnet-relu2-online", "bitnet-silu-online", "llama-float"]


@pytest.fixture(autouse=True)
def _oracles(oracle: Oracle) -> None:
    oracle("torch", "transformers", "accelerate")


def logits_bound(name: str) -> float:
    """Activations of the plain model are larger: even numpy and torch differ by 5e-4 there."""
    return 5e-4 if name == "llama-float" else 2e-5


def assert_gradients(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float
) -> None:
    """Every tensor's largest difference, relative to its largest gradient."""
    gradients = {k.removeprefix("grad:"): v for k, v in expected.items() if k.startswith("grad:")}
    assert gradients.keys() == found.keys()
    errors = {k: running.relative_error(found[k], gradients[k]) for k in found}
    worst = max(errors, key=lambda k: errors[k])
    assert errors[worst] < bound, (worst, errors[worst])


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits_op_by_op(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    expected = hf_oracle.run(model, problem.tokens, backward=False)["logits"]
    with jax.disable_jit():
        found = running.logits(problem)
    assert expected.std() > 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=logits_bound(name))


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits_under_one_jit(name: str, tmp_path: Path) -> None:
    """Fusion moves a code in thousands across a rounding boundary; the distribution stays."""
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    expected = hf_oracle.run(model, problem.tokens, backward=False)["logits"]
    found = np.asarray(jax.jit(lambda: running.logits(problem))(), np.float64)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(jnp.asarray(z))) for z in (expected, found))
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    assert divergence.mean() < 1e-3
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) > 0.96


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_all_weights_op_by_op(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    expected = hf_oracle.run(hf_oracle.load_model(problem, tmp_path), problem.tokens, backward=True)
    with jax.disable_jit():
        loss, grads = running.loss_and_gradients(problem)
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-6)
    bound = 1e-4 if name == "llama-float" else 1e-5
    assert_gradients(to_hf_names(grads, problem.config), expected, bound)


@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_all_weights_under_one_jit(name: str, remat: str, tmp_path: Path) -> None:
    problem = make_problem(name, LIVE)
    expected = hf_oracle.run(hf_oracle.load_model(problem, tmp_path), problem.tokens, backward=True)
    loss, grads = jax.jit(lambda: running.loss_and_gradients(problem, remat=remat))()
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-3)
    assert_gradients(to_hf_names(grads, problem.config), expected, 2e-2)


@pytest.mark.parametrize("name", TERNARY)
def test_codes_equal_layer_by_layer(name: str, tmp_path: Path) -> None:
    """Teacher-forced: each linear and each layer is fed what the oracle's was fed."""
    problem = make_problem(name, LIVE)
    model = hf_oracle.load_model(problem, tmp_path)
    inputs = hf_oracle.linear_inputs(model, problem.tokens)
    quantizer = activation_codes()
    total = different = 0
    for i in range(problem.config.num_layers):
        ours = our_linear_inputs(problem, i, inputs[f"model.layers.{i}"])
        for module in LINEARS.values():
            x = inputs[f"model.layers.{i}.{module}"]
            codes = quantizer(x)
            np.testing.assert_array_equal(absmax_quantize(jnp.asarray(x))[0], codes)
            difference = np.abs(np.asarray(absmax_quantize(ours[module])[0], int) - codes)
            assert difference.max() <= 1
            np.testing.assert_allclose(ours[module], x, rtol=0, atol=2e-6 * np.abs(x).max())
            total, different = total + codes.size, different + np.count_nonzero(difference)
    assert total > 30_000
    assert different <= total * 1e-4


@pytest.mark.parametrize("name", ["bitnet-relu2-online", "bitnet-silu-online"])
def test_ternary_codes_of_all_weights_equal(name: str) -> None:
    import torch
    from transformers.integrations.bitnet import WeightQuant

    problem = make_problem(name, LIVE)
    for tensor, master in problem.state.items():
        if tensor.removesuffix(".weight").endswith("_proj"):
            values = WeightQuant.apply(torch.from_numpy(master)).numpy()
            codes, _ = absmean_quantize(jnp.asarray(master))
            np.testing.assert_array_equal(codes, np.sign(values), err_msg=tensor)


@pytest.mark.parametrize("name", [n for n in TERNARY if n != "llama-bitlinear"])
def test_lora_equals_peft(name: str, tmp_path: Path, oracle: Oracle) -> None:
    """PEFT refuses the packed ``bitlinear``; on both forms of ``autobitlinear`` it is exact."""
    oracle("peft")
    problem = make_problem(name, LIVE)
    model = hf_oracle.wrap_with_peft(hf_oracle.load_model(problem, tmp_path), problem)
    expected = hf_oracle.run(model, problem.tokens, backward=True)
    with jax.disable_jit():
        found = running.logits(problem, adapted=True)
        plain = running.logits(problem)
        loss, grads = running.loss_and_gradients(problem, adapted=True)
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=3e-5)
    assert float(jnp.max(jnp.abs(found - plain))) > 1
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert_gradients(to_peft_names(grads, problem.config), expected, 1e-5)


def activation_codes() -> Callable[[np.ndarray], np.ndarray]:
    """The released quantiser, as integers."""
    import torch
    from transformers.integrations.bitnet import BitLinear

    module = BitLinear(4, 4, False, dtype=torch.float32)
    return lambda x: module.activation_quant(torch.from_numpy(x))[0].numpy().astype(int)


def our_linear_inputs(problem: Problem, layer: int, h: np.ndarray) -> dict[str, jax.Array]:
    """What enters each linear of one of our layers when ``h`` enters the layer."""
    decoder = running.define(problem).bind(problem.base(), {})
    graphdef, state = nnx.split(decoder.layers)
    block: Block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))
    tokens, positions, _ = running.whole_rows(problem.tokens)
    angles = rotary_angles(positions, problem.config.head_dim, problem.config.rope_theta)
    mask = jnp.broadcast_to(
        jnp.tri(tokens.shape[1], dtype=bool)[None], (*tokens.shape, tokens.shape[1])
    )
    stream = jnp.asarray(h)
    normal = block.attention_norm(stream)
    attended = attend(*block.project(stream, angles, None), mask)
    joined = attended.reshape(*tokens.shape, -1)
    if block.attention.sub_norm is not None:
        joined = block.attention.sub_norm(joined)
    middle = block.mlp_norm(stream + block.attention.close(attended, None))
    mlp = block.mlp
    product = ACTIVATIONS[mlp.activation](mlp.gate(middle)) * mlp.up(middle)
    if mlp.sub_norm is not None:
        product = mlp.sub_norm(product)
    by_place = {"q": normal, "k": normal, "v": normal, "o": joined, "gate": middle, "up": middle}
    by_place["down"] = product
    return {module: by_place[path[-1]] for path, module in LINEARS.items()}
