"""From what a user names to a model: a registry name, a folder, a GGUF file or a hub id."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fabric_kernels import Packing
from fabric_kernels.ternary_matmul import GradientBits, Implementation, SideImplementation
from jax.typing import DTypeLike

from fabric_jax.checkpoints.assemble import assemble_base, in_form
from fabric_jax.checkpoints.hub import fetch_model, is_hub_id
from fabric_jax.checkpoints.huggingface.read import open_huggingface
from fabric_jax.checkpoints.native import is_model_folder, open_native
from fabric_jax.checkpoints.source import ModelSource
from fabric_jax.choices import Weights
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.bit_linear import BaseMode, FloatFormat
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, Remat, define_decoder
from fabric_jax.models.initialize import Tree, initialize_base
from fabric_jax.models.registry import REGISTRY
from fabric_jax.quantization.absmax import ActQuant

RUN_MODEL = "model"
"""Folder of the weights in the output of a run that trained all of them."""

ACCEPTED = (
    "a registry name (`fabric-jax models` lists them), a folder saved by fabric_jax or by "
    "transformers, a .gguf file, or a hub id org/name[@revision]"
)


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A base model, ready to be bound to an adapter.

    Attributes:
        definition: of the decoder, with the adapter's shapes.
        base: its weights.
        tokenizer_source: the model's own tokenizer, as ``load_tokenizer`` takes it; "" (bytes) for
            a model that has none.
    """

    definition: DecoderDefinition
    base: Tree
    tokenizer_source: str


@dataclass(frozen=True, kw_only=True)
class WeightsForm:
    """The form of the linears' weights, as ``DecoderOptions`` says it.

    Attributes:
        mode: None where the model decides.
        packing: layout of packed weights.
        float_format: of plain linears as they are stored.
    """

    mode: BaseMode | None = None
    packing: Packing = "ternary2"
    float_format: FloatFormat = "same"


def weights_form(weights: Weights | Literal["auto"] | None) -> WeightsForm:
    """What a user's word for the form of the weights means; no mode for None and ``auto``."""
    match weights:
        case None | "auto":
            return WeightsForm()
        case "ternary2" | "ternary1.6":
            return WeightsForm(mode="packed", packing=weights)
        case "packed" | "master" | "float":
            return WeightsForm(mode=weights)
        case "float32" | "bfloat16" | "float16" | "int8" | "int4":
            return WeightsForm(mode="float", float_format=weights)


def load_base(
    source: str | Path,
    *,
    mode: BaseMode | None = None,
    dtype: DTypeLike = "float32",
    act_quant: ActQuant | None = None,
    seed: int = 0,
    lora: LoraConfig | None = None,
    remat: Remat = "none",
    implementation: Implementation | None = None,
    embedding_dtype: DTypeLike | None = None,
    gradient_bits: GradientBits = 16,
    packing: Packing = "ternary2",
    float_format: FloatFormat = "same",
    sides: SideImplementation | None = None,
) -> LoadedBase:
    """Loads or makes the base of a model, on the default device.

    Args:
        source: a registry name, which gives random weights, or what ``open_source`` takes.
        mode: form of the linears' weights. None: packed where the model is ternary, float
            otherwise; masters are packed as they are loaded. ``master`` or ``packed`` for plain
            float weights says that they are masters.
        dtype: of activations and unpacked weights.
        act_quant: quantiser of the inputs of ternary linears. None: the model's, or per token.
        seed: of random weights.
        lora: adapters to declare; None for none.
        remat: what the backward pass recomputes.
        implementation: which ``ternary_matmul`` runs; None picks.
        embedding_dtype: of embedding and head as they are stored, ``"int8"`` and ``"int4"``
            included; None for ``dtype``.
        gradient_bits: of the backward product through packed weights on CPU.
        packing: layout of packed weights, whatever the one they are stored in.
        float_format: of linears in the mode ``float`` in memory, whatever the one in the source.
        sides: what runs norms, gates and attention; None: what goes with ``implementation``.

    Raises:
        FabricError: the source is none of these, is damaged, or can't be had in that mode.
    """
    options = DecoderOptions(
        dtype=dtype,
        act_quant=act_quant or "per_token",
        implementation=implementation,
        remat=remat,
        lora=lora or LoraConfig(rank=0),
        embedding_dtype=embedding_dtype,
        gradient_bits=gradient_bits,
        packing=packing,
        float_format=float_format,
        sides=sides,
    )
    if str(source) in REGISTRY:
        config = REGISTRY[str(source)]
        chosen = mode or ("packed" if config.ternary else "float")
        definition = define_decoder(config, replace(options, mode=chosen))
        base = initialize_base(definition, seed)
        return LoadedBase(definition=definition, base=base, tokenizer_source="")
    stored = in_form(open_source(source, mode=mode), mode)
    options = replace(options, mode=stored.form, act_quant=act_quant or stored.act_quant)
    definition = define_decoder(stored.config, options)
    base = assemble_base(definition, stored)
    return LoadedBase(definition=definition, base=base, tokenizer_source=stored.tokenizer_source)


def open_source(source: str | Path, *, mode: BaseMode | None = None) -> ModelSource:
    """Opens a stored model without reading its weights.

    Args:
        source: a folder of fabric_jax (that of a run which trained all weights too) or of Hugging
            Face transformers (safetensors), a ``.gguf`` file, or a hub id: ``org/name``,
            ``org/name@revision``, ``org/name/file.gguf``. What exists on this machine is never
            looked for on the hub.
        mode: what the weights are, for checkpoints that do not say; see ``open_huggingface``.

    Raises:
        FabricError: the source is none of these, is damaged or not supported.
    """
    name = str(source)
    path = Path(name).expanduser()
    if not path.exists() and is_hub_id(name):
        return _open_path(fetch_model(name), name, mode=mode, label=name)
    return _open_path(path, name, mode=mode, label="")


def weights_folder(path: Path) -> Path:
    """``path``, or where the weights lie in the output of a run that trained all of them."""
    of_run = path.is_dir() and not is_model_folder(path) and is_model_folder(path / RUN_MODEL)
    return path / RUN_MODEL if of_run else path


def _open_path(path: Path, name: str, *, mode: BaseMode | None, label: str) -> ModelSource:
    """``label`` is the hub id that ``path`` came from."""
    if path.is_file() and path.suffix == ".gguf":
        from fabric_jax.checkpoints.gguf.read import open_gguf

        return open_gguf(path)
    path = weights_folder(path)
    if not path.is_dir() or not (path / "config.json").is_file():
        raise _not_a_model(name, path)
    if is_model_folder(path):
        return open_native(path)
    own_name = label.partition("@")[0].rpartition("/")[2]
    return open_huggingface(path, mode=mode, name=own_name, origin=label)


def _not_a_model(name: str, path: Path) -> FabricError:
    """The error for a source that can't be loaded, by what it looks like."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return FabricError(
                f"cannot load {name}: it is an adapter, not a model",
                expected=ACCEPTED,
                fix="Give its base model here and the folder as the adapter",
            )
        vocabularies = sorted(path.glob("*.gguf"))
        fix = f"Name {vocabularies[0]} itself" if vocabularies else None
        return FabricError(f"cannot load {name}: no config.json", expected=ACCEPTED, fix=fix)
    if path.exists():
        return FabricError(f"cannot load {name}: it is a file", expected=ACCEPTED)
    if name in REGISTRY:
        return FabricError(
            f"the name {name} stands for a size, not for stored weights",
            expected="a folder, a .gguf file or a hub id org/name[@revision]",
        )
    if len(path.parts) > 1 or name.startswith((".", "~")) or path.suffix == ".gguf":
        return FabricError(f"cannot load {name}: it does not exist", expected=ACCEPTED)
    return unknown_name("model", name, (*REGISTRY, "a folder, a .gguf file or a hub id"))
