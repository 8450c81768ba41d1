"""GGUF models: files of llama.cpp's converter in, ours out and back, bad ones refused."""

import re
import warnings
from dataclasses import replace
from functools import partial

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from fabric_jax.checkpoints.gguf.names import LINEARS, from_pairs, linear_name, to_pairs
from fabric_jax.checkpoints.gguf.read import open_gguf
from fabric_jax.checkpoints.gguf.write import write_gguf
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.errors import FabricError
from fabric_jax.layers.rope import RopeScaling
from tests.checkpoints.gguf_files import (
    BITNET,
    GEMMA3,
    LLAMA,
    PLAIN,
    QWEN3,
    TERNARY,
    llama_cpp_permute,
    llama_cpp_tensors,
    logits,
    tree_source,
    write_llama_cpp,
)
from tests.checkpoints.test_gguf_codecs import classic_i2s, codes_of
from tests.checkpoints.tree_source import TreeSource, assert_same_tensors


@pytest.fixture(scope="module")
def sources() -> dict[str, TreeSource]:
    return {name: tree_source(config) for name, config in (TERNARY | PLAIN).items()}


def silent_write(path, source, **options):
    """Without the warning that relu2 gets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        write_gguf(path, source, **options)
    return path


# Files of llama.cpp's converter


@pytest.mark.parametrize("kind", [Kind.TQ1_0, Kind.TQ2_0])
@pytest.mark.parametrize(("name", "arch"), [("bitnet", "bitnet"), ("llama", "llama")])
def test_ternary_files_of_llama_cpp(tmp_path, sources, name: str, arch: str, kind: Kind) -> None:
    source = sources[name]
    found = open_gguf(write_llama_cpp(tmp_path / "m.gguf", source, arch, kind))
    assert_same_tensors(found, source)
    assert (found.architecture, found.act_quant, found.tokenizer_source) == (arch, "per_token", "")
    np.testing.assert_array_equal(logits(found), logits(source))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.F32, Kind.BF16])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_plain_files_of_llama_cpp(tmp_path, sources, name: str, kind: Kind) -> None:
    source = sources[name]
    found = open_gguf(write_llama_cpp(tmp_path / "m.gguf", source, name, kind))
    if kind != Kind.BF16:
        assert_same_tensors(found, source)
        np.testing.assert_array_equal(logits(found), logits(source))
    else:
        narrow = found.linear("mlp.up", 0)
        assert narrow.dtype.name == "bfloat16"
        np.testing.assert_allclose(narrow.astype(np.float32), source.linear("mlp.up", 0), rtol=4e-3)


def test_q8_and_rows(tmp_path, sources) -> None:
    source = sources["qwen3"]
    table = "token_embd.weight"
    path = write_llama_cpp(
        tmp_path / "m.gguf", source, "qwen3", Kind.F16, others={table: Kind.Q8_0}
    )
    found = open_gguf(path)
    values = source.tensor("embedding")
    theirs = gguf.quants.dequantize(gguf.quants.quantize(values, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(found.tensor("embedding"), theirs)
    part = found.tensor("embedding", rows=slice(5, 9))
    np.testing.assert_array_equal(part, theirs[5:9])
    gain = source.tensor("final_norm.gain")
    np.testing.assert_array_equal(found.tensor("final_norm.gain", rows=slice(3, 7)), gain[3:7])


def put_divisors(tensors: dict[str, np.ndarray], values: np.ndarray) -> None:
    tensors["rope_freqs.weight"] = values


@pytest.mark.oracle
def test_llama3_rope_scaling(oracle, tmp_path, sources) -> None:
    (transformers,) = oracle("transformers")
    source = sources["llama3"]
    config = source.config
    scaling = config.rope_scaling
    assert scaling is not None
    # As Llama's converter computes them, from transformers' own frequencies.
    rope = {
        "rope_type": "llama3",
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    theirs = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=config.head_dim, rope_parameters=rope
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    divisors = (frequencies / embedding.inv_freq.numpy()).astype(np.float32)

    change = partial(put_divisors, values=divisors)
    path = write_llama_cpp(tmp_path / "m.gguf", source, "llama", Kind.F16, change=change)
    found = open_gguf(path)
    assert_same_tensors(found, source)
    write_gguf(tmp_path / "ours.gguf", source, kind="F16")
    ours = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    np.testing.assert_allclose(ours["rope_freqs.weight"], divisors, rtol=1e-6)
    assert open_gguf(tmp_path / "ours.gguf").config.rope_scaling == scaling

    for wrong, message in (
        (divisors[::-1].copy(), r"not of Llama 3\.1's kind"),
        (divisors[:-1], r"wrong shape; expected \[8\]; found \[7\]"),
    ):
        change = partial(put_divisors, values=wrong)
        path = write_llama_cpp(tmp_path / "m.gguf", source, "llama", Kind.F16, change=change)
        with pytest.raises(FabricError, match=message):
            open_gguf(path)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0, Kind.Q8_0])
def test_linears_left_out_of_the_blocks(tmp_path, kind: Kind) -> None:
    """As converters and llama-quantize leave those whose rows don't divide by 256."""
    source = tree_source(replace(BITNET, ffn_size=320))
    awkward = {f"blk.{i}.ffn_down.weight": kind for i in range(2)}
    path = write_llama_cpp(tmp_path / "m.gguf", source, "bitnet", Kind.TQ2_0, others=awkward)
    found = open_gguf(path)
    assert found.form == "packed"
    for layer in range(2):
        ours, theirs = found.linear("mlp.down", layer), source.linear("mlp.down", layer)
        assert isinstance(ours, TernaryMatrix)
        np.testing.assert_array_equal(ours.packed, theirs.packed)
        assert ours.scale == pytest.approx(theirs.scale, rel=5e-4)


def test_weights_that_are_not_ternary_are_named(tmp_path, sources) -> None:
    def spoil(tensors) -> None:
        tensors["blk.1.ffn_up.weight"][0, 0] = 0.7

    path = write_llama_cpp(
        tmp_path / "m.gguf",
        tree_source(BITNET),
        "bitnet",
        Kind.TQ2_0,
        others={"blk.1.ffn_up.weight": Kind.F16},
        change=spoil,
    )
    with pytest.raises(FabricError, match=r"blk\.1\.ffn_up\.weight in .* stored as F16 in a file"):
        open_gguf(path).linear("mlp.up", 1)


@pytest.mark.parametrize("arch", ["bitnet-b1.58", "bitnet-25"])
def test_files_of_bitnet_cpp(tmp_path, sources, arch: str) -> None:
    source = sources["relu2"]
    ours = silent_write(tmp_path / "m.gguf", source, kind="TQ2_0", architecture=arch)
    assert_same_tensors(open_gguf(ours), source)
    with pytest.warns(UserWarning, match="classic layout of I2_S"):
        found = open_gguf(as_i2s(ours, tmp_path / "i2s.gguf", source))
    assert (found.architecture, found.config.activation) == (arch, "relu2")
    assert_same_tensors(found, source)


def as_i2s(model, path, source: TreeSource):
    """The file again without our keys, its linears in I2_S, for which the package has no name."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        ours = field.name.startswith("fabric_jax") or field.name.endswith("hidden_activation")
        if not ours and not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    paths = {linear_name(path, layer): (path, layer) for path in LINEARS for layer in range(2)}
    arrays: list[np.ndarray] = []
    for tensor in reader.tensors:
        data = np.asarray(tensor.data)
        shape, kind = tensor.shape[::-1].tolist(), tensor.tensor_type
        if tensor.name in paths:
            matrix = source.linear(*paths[tensor.name])
            assert isinstance(matrix, TernaryMatrix)
            data, kind = classic_i2s(codes_of(matrix), matrix.scale), 36
        # Not uint8, which would make the package look up the type's block size.
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.int8), data.nbytes, kind)
        arrays.append(data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in arrays:
        writer.write_tensor_data(data)
    writer.close()
    return path


# Ours


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "F16"])
@pytest.mark.parametrize("name", list(TERNARY))
def test_ternary_models_return_bit_for_bit(tmp_path, sources, name: str, kind: str) -> None:
    source = replace(sources[name], act_quant="block256")
    path = silent_write(tmp_path / "m.gguf", source, kind=kind)
    found = open_gguf(path)
    assert_same_tensors(found, source)
    assert (found.config, found.act_quant) == (source.config, "block256")
    assert (found.padding is not None) == (name.startswith("padded") and kind != "F16")


@pytest.mark.parametrize("name", list(PLAIN))
def test_plain_models_return_bit_for_bit(tmp_path, sources, name: str) -> None:
    source = sources[name]
    write_gguf(tmp_path / "m.gguf", source, kind="F16")
    found = open_gguf(tmp_path / "m.gguf")
    assert_same_tensors(found, source)
    assert found.config == source.config
    np.testing.assert_array_equal(logits(found), logits(source))


@pytest.mark.parametrize(
    ("name", "arch", "kind"),
    [
        ("bitnet", "bitnet", "TQ1_0"),
        ("llama", "llama", "TQ2_0"),
        ("qwen3", "qwen3", "F16"),
        ("gemma3", "gemma3", "F16"),
        ("qwen3", "qwen3", "Q8_0"),
    ],
)
def test_tensors_equal_those_of_llama_cpps_converter(
    tmp_path, sources, name: str, arch: str, kind: str
) -> None:
    """Names, shapes, types and bytes; the same file but for metadata of our own."""
    source = sources[name]
    # 80 inputs don't divide into blocks of Q8_0.
    left = {f"blk.{i}.ffn_down.weight": Kind.F16 for i in range(2)}
    others = left if kind == "Q8_0" else None
    write_gguf(tmp_path / "ours.gguf", source, kind=kind)
    theirs = write_llama_cpp(tmp_path / "m.gguf", source, arch, Kind[kind], others=others)
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    expected = gguf.GGUFReader(theirs)
    assert {t.name for t in ours.tensors} == {t.name for t in expected.tensors}
    tensors = {t.name: t for t in expected.tensors}
    for tensor in ours.tensors:
        other = tensors[tensor.name]
        assert tensor.tensor_type == other.tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.shape, other.shape)
        np.testing.assert_array_equal(tensor.data, other.data, err_msg=tensor.name)
    for key, field in expected.fields.items():
        if not key.startswith(("GGUF.", "bitnet.rope.scaling", "general.file_type")):
            assert ours.fields[key].contents() == field.contents(), key
            assert ours.fields[key].types == field.types, key


def test_keys_that_the_runtime_needs(tmp_path, sources) -> None:
    write_gguf(tmp_path / "m.gguf", sources["bitnet"], kind="TQ1_0")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.architecture"] == "bitnet"
    assert fields["general.type"] == "model"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_TQ1_0
    assert fields["general.quantization_version"] == 2
    assert fields["bitnet.rope.freq_base"] == 500_000.0
    assert fields["bitnet.rope.dimension_count"] == fields["bitnet.attention.key_length"] == 64
    assert fields["bitnet.vocab_size"] == 61
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert not [name for name in names if name.endswith("scale") or name == "output.weight"]


def test_masters_are_quantised_by_the_forward_pass_rule(tmp_path) -> None:
    from fabric_jax.models.decoder import DecoderOptions, define_decoder
    from fabric_jax.models.initialize import initialize_base
    from fabric_jax.models.packing import pack_base

    definition = define_decoder(BITNET, DecoderOptions(mode="master"))
    base = initialize_base(definition, 3)
    write_gguf(
        tmp_path / "m.gguf", TreeSource(config=BITNET, form="master", tree=base), kind="TQ2_0"
    )
    found = open_gguf(tmp_path / "m.gguf")
    _, packed = pack_base(definition, base)
    for layer in range(2):
        matrix = found.linear("mlp.gate", layer)
        node = packed["layers"]["mlp"]["gate"]
        assert isinstance(matrix, TernaryMatrix)
        np.testing.assert_array_equal(matrix.packed, node["weight"][layer])
        assert matrix.scale == float(np.float16(node["scale"][layer]))


def test_relu2_is_written_with_a_warning(tmp_path, sources) -> None:
    with pytest.warns(UserWarning, match="hard-codes SiLU for arch bitnet") as caught:
        write_gguf(tmp_path / "m.gguf", sources["relu2"], kind="TQ2_0")
    assert len(caught) == 1
    assert open_gguf(tmp_path / "m.gguf").config.activation == "relu2"
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["bitnet.hidden_activation"].contents() == "relu2"


def test_tables_in_other_types(tmp_path, sources) -> None:
    source = sources["llama"]
    for kind in ("BF16", "F32"):
        write_gguf(tmp_path / "m.gguf", source, kind="TQ2_0", tables=kind)
        table = open_gguf(tmp_path / "m.gguf").tensor("head").astype(np.float32)
        tolerance = 0 if kind == "F32" else 2**-8
        np.testing.assert_allclose(table, source.tensor("head"), rtol=tolerance)
        gguf.GGUFReader(tmp_path / "m.gguf")


def changed(source: TreeSource, name: str, value: float) -> TreeSource:
    tree = dict(source.tree)
    array = np.array(tree[name])
    array[0, 0] = value
    return replace(source, tree=tree | {name: array})


@pytest.mark.parametrize(
    ("name", "options", "change", "message"),
    [
        ("qwen3", {"kind": "TQ2_0"}, {}, "16-bit weights, which TQ2_0 can't"),
        ("bitnet", {"kind": "TQ3"}, {}, "unknown GGUF type"),
        ("bitnet", {"kind": "F16"}, {"activation": "gelu"}, "activation 'gelu' instead of"),
        ("bitnet", {"kind": "F16"}, {"tied_head": False}, "tied_head False instead of True"),
        ("bitnet", {"kind": "F16"}, {"head_dim": 128}, "as many channels in all heads"),
        ("llama", {"kind": "F16"}, {"activation": "relu2"}, "arch llama computes something else"),
        ("gemma3", {"kind": "F16"}, {"global_every": 3}, "global_every 3 instead of 6"),
        ("gemma3", {"kind": "F16"}, {"attention_scale": 0.5}, "attention_scale 0.5"),
        (
            "qwen3",
            {"kind": "F16"},
            {
                "rope_scaling": RopeScaling(
                    kind="llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_length=64,
                )
            },
            "arch qwen3 has no Llama 3 rope scaling",
        ),
        (
            "padded",
            {"kind": "TQ1_0", "architecture": "bitnet-b1.58"},
            {"activation": "relu2"},
            "needs padding, which bitnet.cpp can't run",
        ),
        ("bitnet", {"kind": "TQ1_0", "architecture": "bitnet-25"}, {}, "activation 'silu'"),
        ("bitnet", {"kind": "TQ1_0", "architecture": "phi"}, {}, "unknown architecture"),
    ],
)
def test_what_runtimes_can_not_run_is_refused(
    tmp_path, sources, name: str, options, change, message: str
) -> None:
    source = sources[name]
    source = replace(source, config=replace(source.config, **change))
    with pytest.raises(FabricError, match=message):
        silent_write(tmp_path / "m.gguf", source, **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, sources) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, sources["bitnet"], kind="TQ2_0")
    before = path.read_bytes()
    for value in (np.nan, 1e6):
        with pytest.raises(FabricError, match="embedding has values that F16 can't hold"):
            write_gguf(path, changed(sources["bitnet"], "embedding", value), kind="TQ2_0")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == before
    with pytest.raises(FabricError, match="cannot write"):
        write_gguf(path / "below.gguf", sources["bitnet"], kind="TQ2_0")


def test_linear_rope_scaling_of_llama(tmp_path) -> None:
    config = replace(LLAMA, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    write_gguf(tmp_path / "m.gguf", tree_source(config), kind="TQ2_0")
    assert open_gguf(tmp_path / "m.gguf").config == config


def test_permutation_is_the_converters() -> None:
    rows = np.random.default_rng(0).standard_normal((3 * 8, 5))
    np.testing.assert_array_equal(to_pairs(rows, 3), llama_cpp_permute(rows, 3))
    np.testing.assert_array_equal(from_pairs(to_pairs(rows, 3), 3), rows)


def test_names_come_from_the_packages_map() -> None:
    """The oracle of these tests covers every tensor of every family."""
    families = {"bitnet": BITNET, "llama": LLAMA, "qwen3": QWEN3, "gemma3": GEMMA3}
    for arch, config in families.items():
        names = llama_cpp_tensors(tree_source(config), arch)
        assert all(re.match(r"(blk\.\d+\.)?\w+\.weight$", name) for name in names)
