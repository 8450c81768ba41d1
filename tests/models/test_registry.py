"""Registered models have the published dimensions and parameter counts."""

import jax
import pytest

from fabric_jax.errors import FabricError
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.registry import REGISTRY, get_config

# Parameters in millions as their sources state them: the table of the published benchmark sizes,
# then the released checkpoints (linears, embedding and head).
TOTAL = {
    "bitnet-125m": 128.4,
    "bitnet-350m": 359.9,
    "bitnet-1b": 996.7,
    "bitnet-1.5b": 1502.5,
    "bitnet-2.7b": 2703.0,
    "bitnet-3.8b": 3803.4,
    "bitnet-7b": 7009.7,
    "bitnet-13b": 12851.6,
}
LINEAR_AND_EMBEDDING = {
    "bitnet-b1.58-large": (679.5, 49.2),
    "bitnet-b1.58-xl": (1207.8, 65.5),
    "bitnet-b1.58-3b": (3221.5, 102.4),
    "bitnet-2b-4t": (2084.0, 328.3),
    "llama3-8b-1.58": (6979.3, 1050.7),
    "falcon3-1b-1.58": (1132.5, 536.9),
    "falcon3-3b-1.58": (2422.2, 805.3),
    "falcon3-7b-1.58": (6650.1, 805.3),
    "falcon3-10b-1.58": (9500.1, 805.3),
    "falcon-e-1b": (1585.4, 134.2),
    "falcon-e-3b": (2919.2, 134.2),
}


@pytest.mark.parametrize("name", TOTAL)
def test_total_parameters(name: str) -> None:
    # The stated totals leave the norms' gains out in some rows: 0.1 % at most.
    assert get_config(name).parameters / 1e6 == pytest.approx(TOTAL[name], rel=1e-3)


@pytest.mark.parametrize("name", LINEAR_AND_EMBEDDING)
def test_parameters_by_kind(name: str) -> None:
    config, (linear, embedding) = get_config(name), LINEAR_AND_EMBEDDING[name]
    assert config.linear_parameters / 1e6 == pytest.approx(linear, abs=0.051)
    assert config.embedding_parameters / 1e6 == pytest.approx(embedding, abs=0.051)


def test_2b_4t_to_the_unit() -> None:
    assert get_config("bitnet-2b-4t").parameters == 2_412_820_480


@pytest.mark.parametrize("name", REGISTRY)
def test_declared_tree_has_the_parameters_of_the_config(name: str) -> None:
    config = get_config(name)
    base = define_decoder(config, DecoderOptions(mode="float")).base
    shapes = jax.tree.leaves(base)
    assert sum(leaf.size for leaf in shapes) == config.parameters


@pytest.mark.parametrize("name", [name for name, config in REGISTRY.items() if config.ternary])
def test_packed_tree_stores_two_bits_a_weight(name: str) -> None:
    config = get_config(name)
    leaves = jax.tree.leaves(define_decoder(config, DecoderOptions(mode="packed")).base)
    packed = sum(leaf.size for leaf in leaves if leaf.dtype == "uint8")
    assert packed * 4 == config.linear_parameters
    scales = 7 * config.num_layers
    floats = sum(leaf.size for leaf in leaves if leaf.dtype == "float32")
    assert floats == config.embedding_parameters + config.norm_parameters + scales


def test_2b_4t_facts() -> None:
    config = get_config("bitnet-2b-4t")
    assert (config.activation, config.rope_theta, config.max_length) == ("relu2", 500_000.0, 4096)
    assert config.sub_norms
    assert config.tied_head


@pytest.mark.parametrize("name", [n for n in REGISTRY if n.startswith(("falcon", "llama"))])
def test_ternary_llamas_have_neither_sub_norms_nor_a_tied_head(name: str) -> None:
    config = get_config(name)
    assert not config.sub_norms
    assert not config.tied_head
    assert config.activation == "silu"


def test_an_unknown_name_offers_the_closest() -> None:
    with pytest.raises(FabricError, match=r"unknown model 'bitnet-2b4t'.*'bitnet-2b-4t'"):
        get_config("bitnet-2b4t")


@pytest.mark.parametrize("name", REGISTRY)
def test_configs_survive_json(name: str) -> None:
    config = get_config(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is out of range.*found 0"),
        ({"num_kv_heads": 4}, "6 query heads can't share 4"),
        ({"head_dim": 31}, "even head_dim.*found 31"),
        ({"activation": "rleu2"}, "unknown activation 'rleu2'.*'relu2'"),
        ({"hiden_size": 3}, "unknown model configuration key 'hiden_size'.*'hidden_size'"),
    ],
    ids=["no-layers", "heads", "odd-head", "activation", "unknown-key"],
)
def test_impossible_dimensions(change: dict[str, object], message: str) -> None:
    values = get_config("bitnet-tiny").to_dict() | change
    with pytest.raises(FabricError, match=message):
        ModelConfig.from_dict(values)


def test_missing_keys_are_named() -> None:
    values = get_config("bitnet-tiny").to_dict()
    del values["ffn_size"]
    with pytest.raises(FabricError, match="lacks ffn_size"):
        ModelConfig.from_dict(values)
