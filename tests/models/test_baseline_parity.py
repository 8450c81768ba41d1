"""The 16-bit families against transformers, live, in float32."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from fabric_jax.layers.rope import RopeScaling, rotary_frequencies
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.registry import get_config
from tests.models import baseline_models as tiny
from tests.models.running import whole_rows

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("baseline-parity")]
Oracle = Callable[..., list[ModuleType]]

BASELINES = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b"]


@pytest.fixture(autouse=True)
def _oracles(oracle: Oracle) -> None:
    oracle("torch", "transformers")


def our_logits(config: ModelConfig, base: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    definition = define_decoder(config, DecoderOptions(mode="float"))

    def run(base: dict[str, Any]) -> jax.Array:
        decoder = definition.bind(base, {})
        return decoder.logits(decoder(*whole_rows(tokens)))

    return np.asarray(jax.jit(run)(base))


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits(name: str) -> None:
    """The largest difference is under 2e-5 of the largest logit."""
    config = tiny.CONFIGS[name]
    model = tiny.hf_model(config)
    tokens = tiny.tokens_of(config)
    expected = their_logits(model, tokens)
    found = our_logits(config, tiny.our_tree(config, model), tokens)
    scale = np.abs(expected).max()
    assert expected.std() > 1
    assert np.abs(found - expected).max() / scale < 2e-5


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("gemma3", {"sliding_window": 6}),
    "pattern": ("gemma3", {"global_every": 5}),
    "local-theta": ("gemma3", {"local_rope_theta": 2e4}),
    "theta": ("gemma3", {"rope_theta": 1e4}),
    "linear": ("gemma3", {"rope_scaling": RopeScaling(kind="linear", factor=4.0)}),
    "scale": ("gemma3", {"attention_scale": None}),
    "embedding": ("gemma3", {"embedding_scale": False}),
    "offset": ("gemma3", {"norm_offset": 0.0}),
    "activation": ("gemma3", {"activation": "silu"}),
    "llama3": ("llama3", {"rope_scaling": None}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_setting_counts(case: str) -> None:
    """Ours with one setting changed leaves theirs: the comparison above would see it."""
    name, change = CHANGES[case]
    config = replace(tiny.CONFIGS[name], num_layers=6 if name == "gemma3" else 1)
    model = tiny.hf_model(config)
    tokens = tiny.tokens_of(config, rows=1)
    expected = their_logits(model, tokens)
    base = tiny.our_tree(config, model)
    found = our_logits(replace(config, **change), base, tokens)
    assert np.abs(found - expected).max() / np.abs(expected).max() > 2e-3


@pytest.mark.parametrize(
    ("factor", "theta", "length"), [(8.0, 5e5, 8192), (32.0, 5e5, 8192), (4.0, 1e4, 2048)]
)
def test_llama3_frequencies(factor: float, theta: float, length: int) -> None:
    """Those of Llama 3.1 and 3.2, in float32 where ours are in float64."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=length,
    )
    config = replace(tiny.LLAMA3, rope_theta=theta, rope_scaling=scaling, head_dim=128)
    hf = tiny.hf_config(config)
    assert isinstance(hf, LlamaConfig)
    expected = LlamaRotaryEmbedding(hf).inv_freq.numpy()
    found = rotary_frequencies(128, theta, scaling)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    plain = rotary_frequencies(128, theta)
    assert np.sum((found < plain) & (found > plain / factor * 1.001)) > 0


@pytest.mark.parametrize("name", BASELINES)
def test_parameter_counts(name: str) -> None:
    """Of the whole model on the meta device, to the unit."""
    import torch
    import transformers

    config = get_config(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny.hf_config(config))
    assert model.num_parameters() == config.parameters
