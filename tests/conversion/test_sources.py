"""Merging: what the merged and the re-ternarised matrices are."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.checkpoints.assemble import assemble_base
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.checkpoints.ternary import dequantize, unpack_codes
from fabric_jax.conversion.sources import Derived, Merged, Reternarised, Watched, lora_change
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree
from tests.checkpoints.tree_source import assert_same_tensors, source_of
from tests.models import running
from tests.models.tiny_problems import Size, make_problem

SMALL = Size(vocab=37, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, length=9)
LORA = LoraConfig(rank=3, alpha=6, targets=("q", "mlp"), ranks=(("down", 5),), rslora=True)


def random_adapter(name: str, std: float) -> Tree:
    problem = make_problem(name, SMALL)
    options = DecoderOptions(mode=problem.mode, lora=LORA)
    declared = nnx.to_pure_dict(define_decoder(problem.config, options).adapter)
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(std * random.standard_normal(leaf.shape), leaf.dtype), declared
    )


def exact_change(adapter: Tree, path: str, layer: int) -> np.ndarray:
    group, _, name = path.partition(".")
    pair = adapter["layers"][group][name]["lora"]
    a, b = (np.asarray(pair[matrix][layer], np.float64) for matrix in "ab")
    return LORA.of(name).scale * b.T @ a


@pytest.mark.parametrize(
    "name", ["bitnet-silu-offline", "bitnet-silu-online", "llama-bitlinear", "llama-float"]
)
def test_the_merged_model_computes_what_base_and_adapter_compute_unquantised(name: str) -> None:
    problem, adapter = make_problem(name, SMALL), random_adapter(name, 0.2)
    source = source_of(problem)
    merged = Merged(source=source, lora=LORA, adapter=adapter)
    assert (merged.form, merged.act_quant, merged.config.ternary) == ("float", "none", False)
    plain = define_decoder(merged.config, DecoderOptions(mode="float"))
    options = DecoderOptions(mode=problem.mode, lora=LORA, act_quant="none")
    adapted = define_decoder(problem.config, options)

    def logits(definition: Any, base: Tree, tree: Tree) -> np.ndarray:
        decoder = definition.bind(base, tree)
        return np.asarray(decoder.logits(decoder(*running.whole_rows(problem.tokens))))

    expected = logits(adapted, problem.base(), adapter)
    found = logits(plain, assemble_base(plain, merged), {})
    bare = logits(adapted, problem.base(), jax.tree.map(jnp.zeros_like, adapter))
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * size)
    assert np.abs(expected - bare).max() > 0.05 * size


def test_merged_matrices_are_sums() -> None:
    problem = make_problem("bitnet-silu-offline", SMALL)
    adapter = random_adapter("bitnet-silu-offline", 0.2)
    source = source_of(problem)
    merged = Merged(source=source, lora=LORA, adapter=adapter)
    for path in problem.config.linear_shapes:
        matrix = source.linear(path, 1)
        assert isinstance(matrix, TernaryMatrix)
        base = dequantize(matrix.packed, matrix.scale, matrix.k)
        if LORA.covers(path.rpartition(".")[2]):
            base = base + exact_change(adapter, path, 1)
        else:
            assert lora_change(LORA, adapter, path, 1) is None
        np.testing.assert_allclose(merged.linear(path, 1), base, rtol=0, atol=1e-6)


def test_reternarised_matrices_are_rounded_at_the_scale_of_the_base() -> None:
    problem = make_problem("llama-bitlinear", SMALL)
    adapter = random_adapter("llama-bitlinear", 0.5)
    source = source_of(problem)
    found = Reternarised(source=source, lora=LORA, adapter=adapter)
    changed = 0
    for path in problem.config.linear_shapes:
        base, again = source.linear(path, 0), found.linear(path, 0)
        assert isinstance(base, TernaryMatrix)
        assert again.scale == base.scale
        codes = unpack_codes(base.packed, base.k).astype(np.float64)
        if LORA.covers(path.rpartition(".")[2]):
            codes = np.clip(codes + exact_change(adapter, path, 0) / base.scale, -1, 1)
            # Sums that lie on the edge between two codes may go either way in float32.
            sure = np.abs(np.abs(codes) - 0.5) > 1e-5
        else:
            sure = np.ones(codes.shape, bool)
        ours = unpack_codes(again.packed, again.k)
        np.testing.assert_array_equal(ours[sure], np.rint(codes)[sure])
        changed += np.sum(ours != unpack_codes(base.packed, base.k))
    assert changed > 20


def test_an_adapter_below_half_a_step_is_lost_entirely() -> None:
    source = source_of(make_problem("llama-bitlinear", SMALL))
    adapter = random_adapter("llama-bitlinear", 1e-3)
    assert_same_tensors(Reternarised(source=source, lora=LORA, adapter=adapter), source)


def test_only_packed_bases_are_made_ternary_again() -> None:
    source = source_of(make_problem("bitnet-silu-online", SMALL))
    adapter = random_adapter("bitnet-silu-online", 1)
    with pytest.raises(FabricError, match="memory holds master weights; expected packed"):
        Reternarised(source=source, lora=LORA, adapter=adapter)


def test_a_watched_source_is_the_same_and_tells_what_is_read() -> None:
    source, lines = source_of(make_problem("llama-bitlinear", SMALL)), list[str]()
    watched = Watched(source=source, report=lines.append)
    assert_same_tensors(watched, source)
    assert "layer 2 of 2: mlp.down" in lines
    assert "embedding" in lines
    other = Derived(source=replace(source, tokenizer_source="a"), tokenizer="b")
    assert (watched.tokenizer_source, other.tokenizer_source) == ("", "b")
