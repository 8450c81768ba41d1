"""Adapters in llama.cpp's format, and what runtimes make of base and adapter together."""

import warnings
from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.checkpoints.assemble import assemble_base
from fabric_jax.checkpoints.gguf.adapter import read_gguf_adapter, save_gguf_adapter
from fabric_jax.checkpoints.gguf.write import write_gguf
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from tests.checkpoints.gguf_files import (
    BITNET,
    LLAMA,
    PROBE,
    QWEN3,
    TERNARY,
    llama_cpp_permute,
    tree_source,
)
from tests.checkpoints.gguf_runtime import runtime_logits
from tests.models.running import whole_rows

PLAIN_LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)
LORAS = {
    "plain": PLAIN_LORA,
    "rslora": LoraConfig(rank=4, alpha=6.0, targets=("q", "down"), rslora=True),
    "ranks": LoraConfig(rank=4, alpha=8.0, ranks=(("q", 2), ("down", 6)), targets=("all",)),
    "alphas": LoraConfig(rank=4, alpha=8.0, ranks=(("k", 3),), alphas=(("q", 5.0), ("k", 12.0))),
}


def define(config, lora):
    mode = "packed" if config.ternary else "float"
    return define_decoder(config, DecoderOptions(mode=mode, lora=lora, act_quant="none"))


def random_adapter(definition, seed: int = 1, std: float = 0.1):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(std * random.standard_normal(leaf.shape), leaf.dtype),
        nnx.to_pure_dict(definition.adapter),
    )


def assert_close(tree, other, rtol: float) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol)


@pytest.mark.parametrize("name", list(LORAS))
@pytest.mark.parametrize("model", ["bitnet", "llama", "padded"])
def test_adapters_return(tmp_path, name: str, model: str) -> None:
    config, lora = TERNARY[model], LORAS[name]
    definition = define(config, lora)
    adapter = random_adapter(definition)
    save_gguf_adapter(tmp_path / "a.gguf", definition, adapter)
    found, tree = read_gguf_adapter(tmp_path / "a.gguf", config)
    assert found == lora
    # One rounding each way where a factor had to be multiplied in, else the same bits.
    exact = model != "padded" and name != "alphas"
    assert_close(tree, adapter, 0 if exact else 3e-7)
    jax.tree.map(np.testing.assert_array_equal, define(config, found).adapter, definition.adapter)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("bitnet", "plain"),
        ("bitnet", "rslora"),
        ("llama", "ranks"),
        ("padded", "alphas"),
        ("padded-llama", "rslora"),
    ],
)
def test_the_runtime_computes_what_we_do(tmp_path, name: str, model: str) -> None:
    """Base and adapter from their files, in float64, against our decoder on what was written."""
    source = tree_source(TERNARY[model])
    definition = define(source.config, LORAS[name])
    adapter = random_adapter(definition)
    write_gguf(tmp_path / "m.gguf", source, kind="TQ2_0")
    save_gguf_adapter(tmp_path / "a.gguf", definition, adapter)
    base = assemble_base(definition, source)

    def run(tree):
        decoder = definition.bind(base, tree)
        return decoder.logits(decoder(*whole_rows(PROBE[:1])))[0]

    with_adapter = np.asarray(jax.jit(run)(adapter))
    zero = np.asarray(jax.jit(run)(jax.tree.map(jnp.zeros_like, adapter)))
    found = runtime_logits(tmp_path / "m.gguf", PROBE[0], tmp_path / "a.gguf")
    bare = runtime_logits(tmp_path / "m.gguf", PROBE[0])
    # Padded queries have a scale that float16 rounds; their norms a slightly larger epsilon.
    tolerance = 3e-3 if model.startswith("padded") else 1e-4
    spread = zero.std()
    assert np.abs(bare - zero).max() < tolerance * spread
    assert np.abs(found - with_adapter).max() < tolerance * spread
    assert np.abs(with_adapter - zero).max() > 0.2 * spread


def test_what_the_file_holds(tmp_path) -> None:
    """As convert_lora_to_gguf.py writes it: names, orientation, order of rows, float32."""
    lora = LORAS["rslora"]
    definition = define(LLAMA, lora)
    adapter = random_adapter(definition)
    save_gguf_adapter(tmp_path / "a.gguf", definition, adapter)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    # The runtime divides by the rank, rsLoRA by its square root.
    assert fields["adapter.lora.alpha"] == 6.0 * 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
    names = {
        f"blk.{i}.{stem}.weight.lora_{letter}"
        for i in range(2)
        for stem in ("attn_q", "ffn_down")
        for letter in "ab"
    }
    assert tensors.keys() == names
    q = adapter["layers"]["attention"]["q"]["lora"]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_a"].data, q["a"][1])
    peft_b = np.asarray(q["b"][1]).T
    permuted = llama_cpp_permute(peft_b, LLAMA.num_heads)
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_b"].data, permuted)
    down = adapter["layers"]["mlp"]["down"]["lora"]["b"][0]
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight.lora_b"].data, np.asarray(down).T)


def foreign(path, config, tensors, *, alpha=8.0, arch="bitnet", **fields):
    """An adapter by somebody else's converter."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in fields.items():
        writer.add_string(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(stem: str, n: int, k: int, rank: int, dtype=np.float32):
    random = np.random.default_rng(rank)
    a = random.standard_normal((rank, k)).astype(dtype)
    b = random.standard_normal((n, rank)).astype(dtype)
    return {f"{stem}.weight.lora_a": a, f"{stem}.weight.lora_b": b}


def effect(tree, lora: LoraConfig, target: str, layer: int) -> np.ndarray:
    node = tree["layers"]["attention"][target]["lora"]
    a, b = (np.asarray(node[x][layer], np.float64) for x in ("a", "b"))
    return lora.of(target).scale * b.T @ a


@pytest.mark.parametrize("alpha", [8.0, 0.0, None])
def test_ranks_that_differ_and_layers_that_lack(tmp_path, alpha: float | None) -> None:
    tensors = pair("blk.0.attn_q", 256, 256, 2) | pair("blk.1.attn_q", 256, 256, 5)
    tensors |= pair("blk.1.attn_v", 128, 256, 3, np.float16)
    tensors |= pair("output_norm", 1, 256, 1)
    path = foreign(tmp_path / "a.gguf", BITNET, tensors, alpha=alpha)
    lora, tree = read_gguf_adapter(path, BITNET)
    assert (lora.of("q").rank, lora.of("v").rank, lora.linears) == (5, 3, {"q", "v"})
    for target, layer in (("q", 0), ("q", 1), ("v", 1)):
        a, b = (tensors[f"blk.{layer}.attn_{target}.weight.lora_{x}"] for x in "ab")
        scale = alpha / len(a) if alpha else 1.0
        expected = scale * b.astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(effect(tree, lora, target, layer), expected, atol=1e-5)
    assert not effect(tree, lora, "v", 0).any()
    # It can be trained on: the settings define a decoder that these weights fit.
    declared = nnx.to_pure_dict(define(BITNET, lora).adapter)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, declared)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (pair("blk.0.attn_q", 256, 256, 2), {"arch": "llama"}, "another architecture"),
        (pair("blk.0.attn_q", 256, 128, 2), {}, r"instead of \[R, 256\] and \[256, R\]"),
        (pair("blk.7.attn_q", 256, 256, 2), {}, "of a layer beyond 2"),
        (pair("token_embd", 61, 256, 2), {}, "nothing that can have an adapter here"),
        (pair("blk.00.attn_q", 256, 256, 2), {}, "nothing that can have an adapter here"),
        ({"blk.0.attn_q.weight.lora_a": np.ones((2, 256), np.float32)}, {}, "lacks its lora_b"),
        ({"blk.0.attn_q.lora_a": np.ones((2, 256), np.float32)}, {}, "nothing that can have"),
        ({"w": np.ones((2, 256), np.float32)}, {}, "nothing that can have"),
        (pair("output_norm", 1, 256, 1), {}, "can't be read: empty"),
        (pair("blk.0.attn_q", 256, 256, 2), {"fabric_jax.lora": "{"}, "is damaged"),
        *(
            (pair("blk.0.attn_q", 256, 256, 2), {"fabric_jax.lora": settings}, message)
            for settings, message in (
                ('{"rank": 3, "targets": ["q"]}', "contradicts the rest"),
                ('{"rank": 2, "targets": ["q"], "adapter_dtype": "f|oat32"}', "is damaged"),
                ('{"rank": 2, "targets": ["q"], "rslora": 1}', "is damaged"),
                ('{"rank": 2, "targets": ["q"], "ranks": [["q", 2, 3]]}', "is damaged"),
                ('{"rank": 0, "targets": ["q"]}', "contradicts the rest"),
                ('{"rank": 2, "targets": ["q"], "alpha": 1%s}' % ("0" * 400), "is damaged"),
                ("[" * 5000, "is damaged"),
            )
        ),
    ],
    ids=lambda value: "",
)
def test_bad_adapters_are_refused(tmp_path, tensors, options, message: str) -> None:
    path = foreign(tmp_path / "a.gguf", BITNET, tensors, **options)
    with pytest.raises(FabricError, match=message):
        read_gguf_adapter(path, BITNET)


def test_values_that_are_no_numbers(tmp_path) -> None:
    tensors = pair("blk.0.attn_q", 256, 256, 2)
    tensors["blk.0.attn_q.weight.lora_b"][0, 0] = np.nan
    with pytest.raises(FabricError, match="not finite"):
        read_gguf_adapter(foreign(tmp_path / "a.gguf", BITNET, tensors), BITNET)
    definition = define(BITNET, PLAIN_LORA)
    adapter = jax.tree.map(lambda x: x.at[0, 0, 0].set(jnp.inf), random_adapter(definition))
    with pytest.raises(FabricError, match=r"lora_a has values that F32 can't hold"):
        save_gguf_adapter(tmp_path / "b.gguf", definition, adapter)
    assert not (tmp_path / "b.gguf").exists()


def test_adapters_of_other_models(tmp_path) -> None:
    definition = define(TERNARY["padded"], PLAIN_LORA)
    save_gguf_adapter(tmp_path / "a.gguf", definition, random_adapter(definition))
    other = replace(TERNARY["padded"], ffn_size=400)
    with pytest.raises(FabricError, match="of a model with other widths"):
        read_gguf_adapter(tmp_path / "a.gguf", other)
    with pytest.raises(FabricError, match="are no adapter of tiny-llama"):
        save_gguf_adapter(
            tmp_path / "b.gguf", define(LLAMA, PLAIN_LORA), random_adapter(definition)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_gguf(tmp_path / "m.gguf", tree_source(BITNET), kind="TQ2_0")
    with pytest.raises(FabricError, match="no LoRA adapter"):
        read_gguf_adapter(tmp_path / "m.gguf", BITNET)


def test_unpadded_bases_and_plain_models(tmp_path) -> None:
    config = TERNARY["padded"]
    definition = define(config, PLAIN_LORA)
    adapter = random_adapter(definition)
    save_gguf_adapter(tmp_path / "a.gguf", definition, adapter, base_kind="F16")
    _, tree = read_gguf_adapter(tmp_path / "a.gguf", config)
    assert_close(tree, adapter, 0)
    definition = define(QWEN3, PLAIN_LORA)
    adapter = random_adapter(definition)
    save_gguf_adapter(tmp_path / "b.gguf", definition, adapter)
    lora, tree = read_gguf_adapter(tmp_path / "b.gguf", QWEN3)
    assert lora == PLAIN_LORA
    assert_close(tree, adapter, 0)


def test_alpha_zero_is_refused(tmp_path) -> None:
    definition = define(BITNET, replace(PLAIN_LORA, alpha=0.0))
    with pytest.raises(FabricError, match="alpha 0 adds nothing"):
        save_gguf_adapter(tmp_path / "a.gguf", definition, random_adapter(definition))
