"""A model folder of transformers as a ``ModelSource``.

Files say one thing in several ways; this module decides. ``weight_scale`` divides or multiplies by
the class of linear that ``config.json`` names, whatever its size. No file is unpickled and no code
of a checkpoint is run.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fabric_jax.checkpoints import ternary
from fabric_jax.checkpoints.arrays import HostArray, Layout, summarize
from fabric_jax.checkpoints.folders import read_json_object
from fabric_jax.checkpoints.huggingface.config import Described, Storage, describe
from fabric_jax.checkpoints.huggingface.names import (
    SCALE,
    SUB_NORMS,
    SUB_NORMS_1BITLLM,
    Names,
    find_body,
    find_sub_norms,
    layers_in,
)
from fabric_jax.checkpoints.huggingface.shards import Shards, open_shards
from fabric_jax.checkpoints.source import ALL_ROWS, TernaryMatrix
from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.quantization.absmax import ActQuant

FLOATS = ("float32", "bfloat16", "float16")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
FORMS: dict[Storage, BaseMode] = {
    "bitlinear": "packed",
    "autobitlinear": "packed",
    "masters": "master",
    "plain": "float",
}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource:
    """A checked folder, as ``checkpoints.source.ModelSource`` says."""

    config: ModelConfig
    form: BaseMode
    storage: Storage
    names: Names
    shards: Shards
    tokenizer_source: str
    origin: str
    act_quant: ActQuant = "per_token"

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        """See ``ModelSource``."""
        module = self.names.linear(path, layer)
        stored = self.shards.read(f"{module}.weight")
        if self.form != "packed":
            return stored
        n, k = self.config.linear_shapes[path]
        try:
            if stored.dtype == np.uint8:
                packed = ternary.from_quarter_rows(stored, n)
            else:  # transformers writes what it loaded with ``autobitlinear`` unpacked.
                packed = ternary.pack_codes(stored)
        except FabricError as error:
            raise FabricError(f"cannot use {module}.weight of {self.origin}: {error}") from error
        return TernaryMatrix(packed=packed, scale=self._scale(module), k=k)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        """See ``ModelSource``."""
        return self.shards.read(self.names.tensor(name, layer), rows)

    def _scale(self, module: str) -> float:
        """What multiplies the codes of a linear, in float32."""
        stored = np.float32(self.shards.read(f"{module}.{SCALE}").reshape(()))
        with np.errstate(divide="ignore", over="ignore"):
            scale = np.float32(1) / stored if self.storage == "bitlinear" else stored
        if not 0 < scale < np.inf:
            raise FabricError(
                f"{module}.{SCALE} of {self.origin} is no scale",
                expected="a positive finite number",
                found=str(stored),
            )
        return float(scale)


def open_huggingface(
    folder: str | Path, *, mode: BaseMode | None = None, name: str = "", origin: str = ""
) -> HuggingFaceSource:
    """Reads and checks ``config.json`` and the headers of the weights.

    Args:
        folder: with ``config.json`` and safetensors, sharded or not.
        mode: what the weights are, for checkpoints that do not say: ``master`` or ``packed`` for
            masters of a ternary model, ``float`` for plain weights. Ignored where they do.
        name: of the model; "" for the folder's.
        origin: for messages; "" for the folder.

    Raises:
        FabricError: a file is missing or damaged, the model is of a kind that is not supported, or
            its tensors are not those of its configuration (the differing ones are named).
    """
    folder = Path(folder)
    origin = origin or str(folder)
    shards = open_shards(folder)
    sub_norms = find_sub_norms(shards.layouts)
    described = describe(
        read_json_object(folder / "config.json"),
        name=name or folder.resolve().name,
        sub_norms=sub_norms is not None,
        of_1bitllm=sub_norms is SUB_NORMS_1BITLLM,
    )
    described = _settle(described, mode, origin)
    names = Names(
        config=described.model,
        body=find_body(shards.layouts),
        sub_norms=sub_norms or SUB_NORMS,
    )
    _require_tensors(described, names, shards, origin)
    return HuggingFaceSource(
        config=described.model,
        form=FORMS[described.storage],
        storage=described.storage,
        names=names,
        shards=shards,
        tokenizer_source=_tokenizer(folder),
        origin=origin,
    )


def _settle(described: Described, mode: BaseMode | None, origin: str) -> Described:
    """Masters or plain weights, where the checkpoint leaves it open."""
    if described.storage != "unsaid":
        return described
    if mode is None:
        raise FabricError(
            f"{origin} is a ternary model without a quantization_config: its weights may be "
            "masters, to be quantised, or plain",
            fix='Say which: weights="packed" or "master" for masters, "float" for plain weights',
        )
    ternary_model = mode != "float"
    return Described(
        model=replace(described.model, ternary=ternary_model),
        storage="masters" if ternary_model else "plain",
    )


def _require_tensors(described: Described, names: Names, shards: Shards, origin: str) -> None:
    """Refuses a checkpoint whose tensors are not those of its configuration."""
    config, found = described.model, shards.layouts
    layers = layers_in(found, names.body)
    # First, so that what is compared below is never more than what the files hold.
    if layers < config.num_layers:
        raise FabricError(
            f"{origin} lacks layers", expected=f"{config.num_layers}", found=f"{layers}"
        )
    shapes = _linear_layouts(described, names)
    floats = _float_shapes(names)
    missing = [f"{name} is missing" for name in (*floats, *shapes) if name not in found]
    known = {*floats, *shapes}
    unexpected = [
        f"{name} is unexpected" for name in found if name not in known and not names.ignored(name)
    ]
    wrong = [
        f"{name} is {found[name]} instead of floats of shape {list(shape)}"
        for name, shape in floats.items()
        if name in found and (found[name].shape != shape or found[name].dtype not in FLOATS)
    ]
    wrong += [
        f"{name} is {found[name]} instead of {' or '.join(map(str, allowed))}"
        for name, allowed in shapes.items()
        if name in found and found[name] not in allowed
    ]
    if differences := wrong + missing + unexpected:
        raise FabricError(
            f"{origin} does not hold the tensors of its config.json: {summarize(differences)}"
        )


def _float_shapes(names: Names) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that is never quantised, by its name in the files."""
    config = names.config
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        names.tensor("embedding", None): table,
        names.tensor("final_norm.gain", None): (config.hidden_size,),
    }
    if not config.tied_head:
        shapes[names.head] = table
    widths = {
        "attention.sub_norm": config.num_heads * config.head_dim,
        "mlp.sub_norm": config.ffn_size,
        "attention.q_norm": config.head_dim,
        "attention.k_norm": config.head_dim,
    }
    for layer in range(config.num_layers):
        for path in names.norms:
            name = names.tensor(f"layers.{path}.gain", layer)
            shapes[name] = (widths.get(path, config.hidden_size),)
    return shapes


def _linear_layouts(described: Described, names: Names) -> dict[str, list[Layout]]:
    """What each tensor of a linear may be."""
    allowed: dict[str, list[Layout]] = {}
    for path, (n, k) in described.model.linear_shapes.items():
        floats = [Layout(shape=(n, k), dtype=dtype) for dtype in FLOATS]
        rows = -(-n // ternary.CODES_PER_BYTE)
        quarters = [Layout(shape=(rows, k), dtype="uint8")]
        scales = [Layout(shape=shape, dtype=d) for shape in ((1,), (), (1, 1)) for d in FLOATS]
        for layer in range(described.model.num_layers):
            module = names.linear(path, layer)
            match described.storage:
                case "bitlinear":
                    allowed[f"{module}.weight"] = quarters
                case "autobitlinear":
                    allowed[f"{module}.weight"] = quarters + floats
                case _:
                    allowed[f"{module}.weight"] = floats
            if FORMS[described.storage] == "packed":
                allowed[f"{module}.{SCALE}"] = scales
    return allowed


def _tokenizer(folder: Path) -> str:
    return str(folder) if any((folder / name).is_file() for name in TOKENIZERS) else ""
