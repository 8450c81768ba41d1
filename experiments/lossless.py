"""Does any kernel or format change what a model says, against the float32 reference?

The reference multiplies by float32 master weights, with no packed byte anywhere, and is XLA's
throughout. Products of the same integers are the same numbers in every implementation, rounded
alike (``fabric_kernels.absmax``): with ``sides=xla`` nothing else differs, and KL must be 0. Norms,
gates and attention of another implementation (``sides=own``) sum in another order; where a model
amplifies a changed last bit, as random weights do, codes turn and it shows. KL divergence is taken
in float64 from float32 logits; the published figure (2.95e-4) compares two backends through logits
stored in 16 bits, whose own floor is of that size.

On an NVIDIA GPU XLA's reciprocals are not correctly rounded: of one token in seven the scale is off
by its last bit (``experiments/rounding.py``). So the reference itself does not follow the rule
there, and the kernels, which do, differ from it with ``sides=xla`` too.

    fabric-jax sweep experiments.lossless --platform cpu --out DIR
    fabric-jax sweep experiments.lossless --platform cuda --out DIR
    fabric-jax sweep experiments.lossless --out DIR model=FOLDER text=TEXT

``model`` is a registry name (random weights, random tokens) or a folder with master weights, such
as ``runs/quickstart/pretrain/model`` after ``make quickstart``. Two minutes on two cores.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.job import small_share
from fabric_jax.sweeps import NotOnThisPlatform, current_platform

COLUMNS = ("kl_mean", "kl_max", "top1_agreement", "perplexity_ratio", "positions")
TIMEOUT_SECONDS = 1200
SMALL = ("bitnet-tiny", "runs/quickstart/pretrain/model")
ON = {
    "cpu": ("xla", "cpu"),
    "cuda": ("xla", "triton", "mosaic_gpu", "tuned"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared with the reference.

    Attributes:
        implementation: of the packed products.
        sides: what runs norms, gates and attention: ``own`` is what goes with the implementation,
            ``xla`` what the reference has, so that the products alone can differ.
        packing: of the weights.
        dtype: of activations.
        embedding: how embedding and head are stored.
        act_quant: quantiser of activations; the reference's is per_token.
        model: registry name or folder.
        text: JSONL with ``text`` fields, or plain text; empty for random tokens.
        rows: of the text.
        length: tokens predicted in a row.
        seed: of random weights and tokens.
    """

    implementation: str = "xla"
    sides: Literal["own", "xla"] = "own"
    packing: Literal["ternary2", "ternary1.6"] = "ternary2"
    dtype: Literal["float32", "bfloat16"] = "float32"
    embedding: Literal["float32", "float16", "int8", "int4"] = "float32"
    act_quant: Literal["per_token", "block256", "none"] = "per_token"
    model: str = "bitnet-tiny"
    text: str = ""
    rows: int = 32
    length: int = 128
    seed: int = 0


def config() -> Config:
    return Config()


def cells(base: Config) -> list[Config]:
    kernels = [
        replace(base, implementation=name, packing=packing, sides=sides)
        for name in ("xla", "cpu", "triton", "mosaic_gpu", "tuned")
        for packing in ("ternary2", "ternary1.6")
        for sides in (("own",) if name == "xla" else ("own", "xla"))
    ]
    formats = [
        replace(base, embedding="float16"),
        replace(base, embedding="int8"),
        replace(base, embedding="int4"),
        replace(base, dtype="bfloat16"),
        replace(base, act_quant="block256"),
        replace(base, act_quant="none"),
    ]
    return [*kernels, *formats]


def environment(cell: Config, platform: str) -> dict[str, str]:
    # A GPU's default for float32 rounds factors to ten bits, in the reference as elsewhere.
    precision = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} if platform == "cuda" else {}
    return precision | (small_share(platform, 0.1) if cell.model in SMALL else {})


def measure(cell: Config) -> dict[str, Any]:
    platform = current_platform()
    if cell.implementation not in ON.get(platform, ()):
        raise NotOnThisPlatform(f"{cell.implementation} does not run on {platform}")
    if cell.implementation == "mosaic_gpu" and cell.packing != "ternary2":
        raise NotOnThisPlatform(f"mosaic_gpu does not read {cell.packing}")
    from fabric_jax.checkpoints.loading import load_base
    from fabric_jax.conversion.damage import Run, measure_damage
    from fabric_jax.models.decoder import define_decoder

    loaded = load_base(
        cell.model, mode="master", dtype="float32", implementation="xla", seed=cell.seed
    )
    reference = define_decoder(
        loaded.definition.config, replace(loaded.definition.options, sides="xla")
    )
    rows = token_rows(cell, reference.config.vocab_size, loaded.tokenizer_source)
    other = variant(cell, loaded.definition, loaded.base)
    found = measure_damage(Run(reference, loaded.base, {}), Run(*other, {}), rows).to_dict()
    del found["perplexity_base"]
    ratio = found["perplexity_after"] / found["perplexity_before"]
    return found | {"perplexity_ratio": ratio, "implementation": cell.implementation}


def variant(cell: Config, definition: Any, base: Any) -> tuple[Any, Any]:
    """The packed model of the cell: definition and weights."""
    import jax
    import jax.numpy as jnp
    from fabric_kernels.block_quantization import quantize_blocks

    from fabric_jax.layers.table import table_bits
    from fabric_jax.models.decoder import define_decoder
    from fabric_jax.models.packing import pack_base

    options: Any = replace(definition.options, packing=cell.packing)
    packed, tree = pack_base(replace(definition, options=options), base)
    options = replace(
        packed.options,
        implementation=cell.implementation,
        sides=None if cell.sides == "own" else cell.sides,
        dtype=cell.dtype,
        embedding_dtype=cell.embedding,
        act_quant=cell.act_quant,
    )
    tree = dict(tree)
    bits = table_bits(cell.embedding)
    for name in {"embedding", "head"} & set(tree):
        if bits is None:
            tree[name] = tree[name].astype(cell.embedding)
        else:
            codes, scales = quantize_blocks(tree[name], bits)
            tree[name] = {"codes": jnp.asarray(codes), "scales": jnp.asarray(scales)}

    def gain(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(cell.dtype) if path[-1].key == "gain" else leaf

    final = define_decoder(definition.config, options)
    return final, jax.tree_util.tree_map_with_path(gain, tree)


def token_rows(cell: Config, vocabulary: int, own_tokenizer: str) -> list[Any]:
    """Rows of ``length`` + 1 tokens."""
    import json
    from pathlib import Path

    import numpy as np

    if not cell.text:
        generator = np.random.default_rng(cell.seed)
        return list(generator.integers(3, vocabulary, (cell.rows, cell.length + 1), np.int32))
    from fabric_jax.data.tokenizer import load_tokenizer

    content = Path(cell.text).read_text(encoding="utf-8")
    if cell.text.endswith(".jsonl"):
        content = "\n".join(json.loads(line)["text"] for line in content.splitlines())
    ids = np.asarray(load_tokenizer(own_tokenizer).encode(content), np.int32)
    starts = range(0, min(len(ids) - 1, cell.rows * cell.length), cell.length)
    return [ids[start : start + cell.length + 1] for start in starts]
