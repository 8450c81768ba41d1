"""Runs our decoder on a tiny problem."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fabric_jax.layers.attention import attend
from fabric_jax.layers.feed_forward import ACTIVATIONS
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.layers.rope import rotary_angles
from fabric_jax.models.decoder import Block, DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.quantization.absmax import absmax_quantize
from tests.models.hf_mapping import LINEARS, to_adapter
from tests.models.tiny_problems import ALPHA, RANK, Problem


def define(problem: Problem, *, adapted: bool = False, **options: Any) -> DecoderDefinition:
    """Our decoder of a problem, with or without its adapter."""
    lora = LoraConfig(rank=RANK if adapted else 0, alpha=ALPHA)
    # Gradients are compared to float32's accuracy.
    options = {"gradient_bits": 24} | options
    return define_decoder(problem.config, DecoderOptions(mode=problem.mode, lora=lora, **options))


def adapter_of(problem: Problem, adapted: bool) -> dict[str, Any]:
    """The adapter tree, empty where there is no adapter."""
    return to_adapter(problem.adapter, problem.config) if adapted else {}


def whole_rows(tokens: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segment ids of rows that are one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32)


def logits(
    problem: Problem, *, adapted: bool = False, jit: bool = False, **options: Any
) -> jax.Array:
    """Float32 logits [B, T, V], op by op or under one ``jit``."""
    definition = define(problem, adapted=adapted, **options)

    def run(base: dict[str, Any], adapter: dict[str, Any]) -> jax.Array:
        decoder = definition.bind(base, adapter)
        return decoder.logits(decoder(*whole_rows(problem.tokens)))

    with jax.disable_jit(not jit):
        return jax.jit(run)(problem.base(), adapter_of(problem, adapted))


def loss_and_gradients(
    problem: Problem, keep: np.ndarray, *, adapted: bool = False, jit: bool = False, **options: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean loss of the targets after the tokens that ``keep`` marks, and its gradient.

    By the adapter if there is one, else by the base; op by op or under one ``jit``.
    """
    definition = define(problem, adapted=adapted, **options)
    tokens = problem.tokens
    targets = jnp.asarray(np.pad(tokens[:, 1:], ((0, 0), (0, 1))))
    counted = np.pad(keep[:, :-1], ((0, 0), (0, 1))).astype(np.float32)
    weights = jnp.asarray(counted / counted.sum())

    def loss(trained: dict[str, Any], frozen: dict[str, Any]) -> jax.Array:
        base, adapter = (frozen, trained) if adapted else (trained, frozen)
        decoder = definition.bind(base, adapter)
        hidden = decoder(*whole_rows(tokens))
        return decoder.loss(hidden, targets, weights, train_head=not adapted)

    base, adapter = problem.base(), adapter_of(problem, adapted)
    trained, frozen = (adapter, base) if adapted else (base, adapter)
    with jax.disable_jit(not jit):
        return jax.jit(jax.value_and_grad(loss))(trained, frozen)


def layer_inputs(
    problem: Problem, layer: int, h: jax.Array, *, adapted: bool = False
) -> tuple[dict[str, jax.Array], jax.Array]:
    """What enters each linear of a layer, by Hugging Face name, and what leaves it, given ``h``."""
    decoder = define(problem, adapted=adapted).bind(problem.base(), adapter_of(problem, adapted))
    graphdef, state = nnx.split(decoder.layers)
    block: Block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))
    tokens, positions, _ = whole_rows(problem.tokens)
    angles = rotary_angles(positions, problem.config.head_dim, problem.config.rope_theta)
    length = tokens.shape[1]
    mask = jnp.broadcast_to(jnp.tri(length, dtype=bool)[None], (*tokens.shape, length))
    normal = block.attention_norm(h)
    projected, h = block.project(h, angles, None)
    attended = attend(*projected, mask)
    joined = attended.reshape(*tokens.shape, -1)
    if block.attention.sub_norm is not None:
        joined = block.attention.sub_norm(joined)
    middle = block.mlp_norm(h + block.attention.close(attended, None))
    mlp = block.mlp
    product = ACTIVATIONS[mlp.activation](mlp.gate(middle)) * mlp.up(middle)
    if mlp.sub_norm is not None:
        product = mlp.sub_norm(product)
    by_place = {"q": normal, "k": normal, "v": normal, "o": joined, "gate": middle, "up": middle}
    by_place["down"] = product
    named = {module: by_place[path[-1]] for path, module in LINEARS.items()}
    return named, block.combine(h, attended, None)


def activation_codes(problem: Problem, *, adapted: bool = False) -> dict[str, np.ndarray]:
    """Int8 codes of the input of every linear in a run of the whole model, op by op."""
    codes: dict[str, np.ndarray] = {}
    h = problem.base()["embedding"][problem.tokens]
    for layer in range(problem.config.num_layers):
        inputs, h = layer_inputs(problem, layer, h, adapted=adapted)
        for module, x in inputs.items():
            codes[f"model.layers.{layer}.{module}"] = np.asarray(absmax_quantize(x)[0])
    return codes


def untouched_tokens(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Where a token and all before it in its row have the same codes on both sides, bool [B, T].

    Two correct implementations differ by an ulp in a norm, which moves one code in about 10^5
    across a rounding boundary. A tiny random model amplifies that to a difference of 0.1 in the
    logits of this and later tokens, so these can't be compared. All others can, however the machine
    sums.
    """
    same = [np.all(ours[module] == codes, axis=-1) for module, codes in theirs.items()]
    return np.logical_and.accumulate(np.all(same, axis=0), axis=1)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    largest = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(np.asarray(found, np.float64) - expected).max()) / largest


def assert_gradients(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], bound: float
) -> None:
    """Both have the same tensors, and the relative error of each is under ``bound``."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < bound, f"{worst}: {errors[worst]}"
