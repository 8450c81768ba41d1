"""``fabric-jax models``: the registry."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fabric_jax.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """The models that go by a name; a name gives random weights in their final format.

    Attributes:
        json: print JSON instead of a table.
        dtype: in which weights that are not packed are counted: embedding, head, norms and, of
            models that are not ternary, the linears.
    """

    json: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


def run(arguments: Sequence[str]) -> int:
    """Parses the flags and prints the table."""
    from fabric_jax.cli.arguments import parse

    options = parse(ModelsOptions, "models", arguments)
    from fabric_jax.cli.output import print_json
    from fabric_jax.models.registry import REGISTRY

    rows = [_row(config, options.dtype) for config in REGISTRY.values()]
    if options.json:
        print_json(rows)
    else:
        _print(rows, options.dtype)
    return 0


def _row(config: "ModelConfig", dtype: str) -> dict[str, Any]:
    from fabric_jax.measurement.categories import f16_bytes, predict_memory
    from fabric_jax.models.decoder import DecoderOptions

    memory = predict_memory(
        config, DecoderOptions(mode="packed" if config.ternary else "float", dtype=dtype)
    )
    stored = memory.weights + memory.scales
    return {
        "name": config.name,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.ffn_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.max_length,
        "vocabulary": config.vocab_size,
        "parameters": config.parameters,
        "linear_parameters": config.linear_parameters,
        "bytes_linears": stored,
        "bits_per_linear_weight": 8 * stored / config.linear_parameters,
        "bytes_embedding_and_head": memory.embedding_and_head,
        "bytes_model": memory.base,
        "bytes_f16": f16_bytes(config),
    }


def _print(rows: list[dict[str, Any]], dtype: str) -> None:
    from fabric_jax.cli.output import bytes_text, console, count_text, print_table

    columns = (
        *("name", "L", "D", "F", "heads", "context", "weights"),
        *("linears", "bits each", "embed", "all", "in f16"),
    )
    table = [
        (
            row["name"],
            str(row["layers"]),
            str(row["hidden_size"]),
            str(row["ffn_size"]),
            f"{row['heads']}/{row['kv_heads']}",
            str(row["context"]),
            count_text(row["parameters"]),
            bytes_text(row["bytes_linears"]),
            f"{row['bits_per_linear_weight']:.4f}",
            bytes_text(row["bytes_embedding_and_head"]),
            bytes_text(row["bytes_model"]),
            bytes_text(row["bytes_f16"]),
        )
        for row in rows
    ]
    print_table("models", columns, table)
    console().print(
        "L layers, D model width, F feed-forward width; heads: query/key-value. Linears: "
        "bytes of packed weights and scales,\nand what that makes for each weight in bits; the "
        "models in 32 or 16 bits are not ternary.\nEmbed: the embedding, with the head where it "
        f"is a matrix of its own. What is not packed is in {dtype}."
    )
