"""ModelConfig: what it refuses, and its way through JSON."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fabric_jax.errors import FabricError
from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.registry import REGISTRY, get_config

LLAMA3: dict[str, Any] = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}


@pytest.mark.parametrize("name", REGISTRY)
def test_json_and_back(name: str) -> None:
    config = get_config(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rope_scaling_in_json() -> None:
    config = replace(get_config("falcon-e-1b"), rope_scaling=RopeScaling(**LLAMA3))
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["rope_scaling"] == LLAMA3
    assert ModelConfig.from_dict(stored) == config


def test_a_file_from_before_the_newer_fields_is_read() -> None:
    config = get_config("bitnet-2b-4t")
    old = config.to_dict()
    for name in ("qk_norm", "post_norms", "norm_offset", "embedding_scale", "attention_scale"):
        del old[name]
    for name in ("sliding_window", "global_every", "local_rope_theta", "rope_scaling"):
        del old[name]
    assert ModelConfig.from_dict(old) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_offset": 0.5}, "norm_offset is out of range.*0 or 1.*found 0.5"),
        ({"attention_scale": -1.0}, "attention_scale is out of range.*positive number"),
        ({"attention_scale": float("nan")}, "attention_scale is out of range"),
        ({"rope_theta": float("inf")}, "rope_theta is out of range"),
        ({"norm_eps": "1e-5"}, "norm_eps is out of range.*found '1e-5'"),
        ({"qk_norm": 1}, "qk_norm is out of range.*true or false"),
        ({"num_layers": "4"}, "num_layers is out of range.*found '4'"),
        ({"num_layers": True}, "num_layers is out of range.*found True"),
        ({"name": 3}, "name is out of range.*text.*found 3"),
        ({"activation": ["silu"]}, "unknown activation"),
        ({"hidden_size": None}, "hidden_size is out of range.*found None"),
        ({"sliding_window": 0, "global_every": 2}, "sliding_window is out of range.*found 0"),
        ({"sliding_window": 8}, "both sliding_window and a global_every above 1.*8 and 1"),
        ({"global_every": 6}, "both sliding_window and a global_every above 1.*None and 6"),
        ({"local_rope_theta": 1e4}, "local_rope_theta but no local layers"),
        ({"rope_scaling": "yarn"}, "rope_scaling of a model configuration.*'yarn'"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "unknown rope scaling 'yarn'"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {"kind": "linear", "faktor": 2}}, "'faktor'.*'factor'"),
        ({"rope_scaling": {"kind": "linear", "factor": 0}}, "factor is out of range.*found 0"),
        ({"rope_scaling": LLAMA3 | {"kind": "linear"}}, "'linear' has no low_freq_factor, "),
        ({"rope_scaling": LLAMA3 | {"original_length": None}}, "original_length is out of range"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor below.*4 and 4.0"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    values = get_config("bitnet-tiny").to_dict() | change
    with pytest.raises(FabricError, match=message):
        ModelConfig.from_dict(values)
