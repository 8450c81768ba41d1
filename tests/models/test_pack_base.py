import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import unpack_ternary2

from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.packing import pack_base
from fabric_jax.models.registry import get_config


def shrink(name, num_kv_heads):
    return replace(
        get_config(name),
        num_layers=2,
        hidden_size=32,
        ffn_size=46,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        vocab_size=61,
    )


BITNET, LLAMA = shrink("bitnet-tiny", 4), shrink("falcon-e-1b", 2)


@cache
def make_base(config):
    return initialize_base(define_decoder(config, DecoderOptions(mode="master")), 3)


def make(config, **options):
    return define_decoder(config, DecoderOptions(mode="master", **options)), make_base(config)


def logits(definition, base, adapter, tokens):
    decoder = definition.bind(base, adapter)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))


def linear_of(tree, path):
    for name in ("layers", *path.split(".")):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("config", [BITNET, LLAMA], ids=["bitnet", "llama"])
def test_codes_and_scales_are_those_of_the_definition(config):
    definition, base = make(config)
    _, packed = pack_base(definition, base)
    for path, (n, k) in config.linear_shapes.items():
        master = np.asarray(linear_of(base, path)["weight"], np.float64)
        linear = linear_of(packed, path)
        assert linear["weight"].dtype == jnp.uint8
        codes = np.asarray(unpack_ternary2(linear["weight"], k))
        assert codes.shape == (2, n, k)
        for layer in range(2):
            # In float64 by the formula of the paper; no weight here lies at a rounding boundary.
            scale = np.abs(master[layer]).mean()
            expected = np.clip(np.rint(master[layer] / scale), -1, 1)
            np.testing.assert_array_equal(codes[layer], expected)
            np.testing.assert_allclose(linear["scale"][layer], scale, rtol=1e-6)


@pytest.mark.parametrize("act_quant", ["per_token", "none"])
@pytest.mark.parametrize("config", [BITNET, LLAMA], ids=["bitnet", "llama"])
def test_logits_are_those_of_the_masters(config, act_quant):
    definition, base = make(config, act_quant=act_quant, lora=LoraConfig(rank=2))
    adapter = jax.tree.map(lambda x: x + 0.01, initialize_adapter(definition, 0))
    packed_definition, packed = pack_base(definition, base)
    assert packed_definition.options == replace(definition.options, mode="packed")
    tokens = jax.random.randint(jax.random.key(5), (2, 11), 0, config.vocab_size)
    expected = logits(definition, base, adapter, tokens)
    found = logits(packed_definition, packed, adapter, tokens)
    assert float(jnp.std(expected)) > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_not_a_linear_is_shared():
    definition, base = make(LLAMA)
    _, packed = pack_base(definition, base)
    assert packed["embedding"] is base["embedding"]
    assert packed["head"] is base["head"]
    gains = jax.tree.leaves(base["layers"]["mlp_norm"])
    assert jax.tree.leaves(packed["layers"]["mlp_norm"])[0] is gains[0]
    assert base["layers"]["mlp"]["up"]["weight"].dtype == jnp.float32


def test_packed_tree_is_the_one_declared():
    definition, base = make(BITNET)
    packed_definition, packed = pack_base(definition, base)
    declared = initialize_base(packed_definition, 0)
    assert jax.tree.structure(packed) == jax.tree.structure(declared)
    for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(declared), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("mode", ["packed", "float"])
def test_other_modes_are_refused(mode):
    definition = define_decoder(BITNET, DecoderOptions(mode=mode))
    with pytest.raises(FabricError, match=re.escape(f"the mode '{mode}'")):
        pack_base(definition, initialize_base(definition, 0))
