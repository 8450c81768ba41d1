"""Several adapters in a batch against each of them alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.errors import FabricError
from fabric_jax.generation.adapters import stack_adapters
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import make_generator
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base

SMALL = ModelConfig(
    name="small",
    vocab_size=97,
    num_layers=2,
    hidden_size=32,
    ffn_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=32,
    tied_head=False,
)
# Different ranks, scales and targets; one linear with a rank of its own.
LORAS = [
    LoraConfig(rank=2, alpha=4.0, targets=("attention",)),
    LoraConfig(rank=3, alpha=2.0, targets=("q", "mlp"), ranks=(("down", 4),)),
]
PROMPTS = [[5, 17, 3], [9, 1, 2, 3, 4], [42]]
SETTINGS = GenerationConfig(max_new_tokens=8, cache_length=32)


@pytest.mark.parametrize("mode", ["float", pytest.param("packed", marks=pytest.mark.slow)])
def test_each_row_gets_what_its_adapter_gives_alone(mode):
    definition = define_decoder(SMALL, DecoderOptions(mode=mode, act_quant="none"))
    base = initialize_base(definition, 3)
    base["embedding"] *= jnp.float32(50)
    members, alone = [], []
    noise = np.random.default_rng(0)
    bare = make_generator(definition)(base, {}, PROMPTS, SETTINGS)
    for lora in LORAS:
        own = define_decoder(SMALL, replace(definition.options, lora=lora))
        tree = jax.tree.map(
            lambda x: jnp.asarray(noise.normal(0, 0.3, x.shape), x.dtype),
            initialize_adapter(own, 0),
        )
        members.append((lora, tree))
        alone.append(make_generator(own)(base, tree, PROMPTS, SETTINGS))
    combined, stack = stack_adapters(definition, members)
    assert len({results[0].tokens for results in (bare, *alone)}) == 3
    prompts = PROMPTS * 3
    ids = [number for number in range(3) for _ in PROMPTS]
    found = make_generator(combined)(base, stack, prompts, SETTINGS, adapter_ids=ids)
    assert found == [*bare, *alone[0], *alone[1]]


@pytest.mark.parametrize("alphas", [(0.0, 6.0), (6.0, 0.0), (0.0, 0.0)])
def test_an_adapter_whose_scale_is_zero_adds_nothing(alphas):
    loras = [LoraConfig(rank=2, alpha=alpha, targets=("q",)) for alpha in alphas]
    definition = define_decoder(SMALL, DecoderOptions())
    own = define_decoder(SMALL, replace(definition.options, lora=loras[0]))
    tree = jax.tree.map(lambda x: jnp.ones(x.shape), initialize_adapter(own, 0))
    combined, stack = stack_adapters(definition, [(lora, tree) for lora in loras])
    b = np.asarray(stack["layers"]["attention"]["q"]["lora"]["b"])
    for number, alpha in enumerate((0.0, *alphas)):
        np.testing.assert_allclose(b[:, number] * combined.options.lora.of("q").scale, alpha / 2)


def test_no_adapters_are_no_stack():
    with pytest.raises(FabricError, match="no adapters"):
        stack_adapters(define_decoder(SMALL, DecoderOptions()), [])
