"""GGUF models that are damaged, contradictory or of another kind: refused, and told why."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from fabric_jax.checkpoints.gguf.read import open_gguf
from fabric_jax.checkpoints.gguf.write import write_gguf
from fabric_jax.errors import FabricError
from tests.checkpoints.gguf_files import BITNET, tree_source, write_llama_cpp


def broken(tmp_path, change, arch: str = "bitnet", source=None):
    source = source or tree_source(BITNET)
    return write_llama_cpp(tmp_path / "m.gguf", source, arch, Kind.TQ2_0, change=change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_v.weight"), r"blk\.1\.attn_v\.weight is missing"),
        (
            lambda t: t.update({"blk.0.attn_q.bias": np.zeros(4, np.float32)}),
            r"blk\.0\.attn_q\.bias is unexpected",
        ),
        (
            lambda t: t.update({"output.weight": t["token_embd.weight"]}),
            r"output\.weight is unexpected",
        ),
        (
            lambda t: t.update({"blk.0.attn_q.scale": np.ones(1, np.float32)}),
            r"blk\.0\.attn_q\.scale is unexpected",
        ),
        (
            lambda t: t.update({"blk.0.ffn_norm.weight": np.ones(8, np.float32)}),
            r"blk\.0\.ffn_norm\.weight is \[8\] instead of \[256\]",
        ),
        (lambda t: t.pop("token_embd.weight"), "lacks token_embd.weight"),
    ],
    ids=["missing", "bias", "head", "scale", "shape", "embedding"],
)
def test_wrong_tensors_are_named(tmp_path, change, message: str) -> None:
    with pytest.raises(FabricError, match=message):
        open_gguf(broken(tmp_path, change))


def test_values_that_are_no_numbers_are_refused(tmp_path) -> None:
    def spoil(tensors) -> None:
        tensors["blk.0.attn_norm.weight"] = np.full(256, np.inf, np.float32)
        tensors["token_embd.weight"] = np.full((61, 256), np.nan, np.float32)

    found = open_gguf(broken(tmp_path, spoil))
    with pytest.raises(FabricError, match=r"blk\.0\.attn_norm\.weight in .* not finite"):
        found.tensor("layers.attention_norm.gain", 0)
    with pytest.raises(FabricError, match=r"token_embd\.weight in .* not finite"):
        found.tensor("embedding")


def edited(tmp_path, **changes):
    """A file of ours with other metadata; None removes a key."""
    path = tmp_path / "m.gguf"
    write_gguf(path, tree_source(BITNET), kind="TQ2_0")
    reader = gguf.GGUFReader(path)
    values = {f.name: (f.contents(), f.types) for f in reader.fields.values()}
    arch = changes.pop("architecture", "bitnet")
    writer = gguf.GGUFWriter(tmp_path / "edited.gguf", arch)
    for key, (value, types) in values.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for key, value in changes.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "edited.gguf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "bitnets"}, "unknown architecture in .*Did you mean 'bitnet'"),
        ({"bitnet.block_count": None}, "lacks the metadata bitnet.block_count"),
        ({"bitnet.block_count": 4_000_000_000}, "claims 4000000000 layers, but has fewer"),
        ({"bitnet.block_count": "2"}, "expected int; found '2'"),
        ({"bitnet.block_count": 0}, "num_layers is out of range"),
        ({"bitnet.block_count": 1}, r"blk\.1\.attn_norm\.weight is unexpected"),
        ({"bitnet.embedding_length": 512}, r"token_embd\.weight is \[61, 256\] instead of"),
        ({"bitnet.attention.head_count": 0}, "claims 0 attention heads"),
        ({"bitnet.attention.head_count_kv": 3}, "can't share"),
        ({"bitnet.attention.layer_norm_rms_epsilon": float("nan")}, "norm_eps is out of range"),
        ({"bitnet.rope.freq_base": float("inf")}, "rope_theta is out of range"),
        ({"bitnet.rope.scaling.type": "yarn"}, "rope.scaling.type none or linear; found yarn"),
        ({"bitnet.rope.dimension_count": 32}, "dimension_count 64 and value_length 64; found 32"),
        ({"bitnet.hidden_activation": "swish"}, "unknown bitnet.hidden_activation"),
        ({"bitnet.expert_count": 8}, "expert_count 8, which is not supported"),
        ({"fabric_jax.act_quant": "int4"}, "unknown fabric_jax.act_quant"),
        ({"fabric_jax.padding.hidden_size": 300}, "hidden_size is out of range"),
        ({"general.type": "adapter"}, "holds no model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_metadata_is_refused(tmp_path, changes, message: str) -> None:
    with pytest.raises(FabricError, match=message):
        open_gguf(edited(tmp_path, **changes))


def test_the_activation_without_our_key(tmp_path) -> None:
    path = edited(tmp_path, **{"bitnet.hidden_activation": None})
    assert open_gguf(path).config.activation == "silu"
