"""Runs our decoder on a tiny problem."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from tests.models.hf_mapping import to_adapter
from tests.models.tiny_problems import ALPHA, RANK, Problem


def define(problem: Problem, *, adapted: bool = False, **options: Any) -> DecoderDefinition:
    """Our decoder of a problem, with or without its adapter."""
    lora = LoraConfig(rank=RANK if adapted else 0, alpha=ALPHA)
    return define_decoder(problem.config, DecoderOptions(mode=problem.mode, lora=lora, **options))


def adapter_of(problem: Problem, adapted: bool) -> dict[str, Any]:
    """The adapter tree, empty where there is no adapter."""
    return to_adapter(problem.adapter, problem.config) if adapted else {}


def whole_rows(tokens: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segment ids of rows that are one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32)


def logits(problem: Problem, *, adapted: bool = False, **options: Any) -> jax.Array:
    """Float32 logits [B, T, V]."""
    decoder = define(problem, adapted=adapted, **options).bind(
        problem.base(), adapter_of(problem, adapted)
    )
    return decoder.logits(decoder(*whole_rows(problem.tokens)))


def loss_and_gradients(
    problem: Problem, *, adapted: bool = False, **options: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean next-token loss, and its gradient by the adapter if there is one, else by the base."""
    definition = define(problem, adapted=adapted, **options)
    tokens = problem.tokens
    targets = jnp.asarray(np.pad(tokens[:, 1:], ((0, 0), (0, 1))))
    weights = jnp.asarray(np.arange(tokens.shape[1]) < tokens.shape[1] - 1, jnp.float32)
    weights = jnp.broadcast_to(weights, tokens.shape) / (tokens.size - tokens.shape[0])

    def loss(trained: dict[str, Any], frozen: dict[str, Any]) -> jax.Array:
        base, adapter = (frozen, trained) if adapted else (trained, frozen)
        decoder = definition.bind(base, adapter)
        hidden = decoder(*whole_rows(tokens))
        return decoder.loss(hidden, targets, weights, train_head=not adapted)

    base, adapter = problem.base(), adapter_of(problem, adapted)
    trained, frozen = (adapter, base) if adapted else (base, adapter)
    return jax.value_and_grad(loss)(trained, frozen)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    largest = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(np.asarray(found, np.float64) - expected).max()) / largest
