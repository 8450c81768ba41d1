"""From what a user names to a model: a registry name or a folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from fabric_kernels.ternary_matmul import Implementation
from jax.typing import DTypeLike

from fabric_jax.checkpoints.native import is_model_folder, load_model_folder, read_model_config
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, Remat, define_decoder
from fabric_jax.models.initialize import Tree, initialize_base
from fabric_jax.models.packing import pack_base
from fabric_jax.models.registry import REGISTRY
from fabric_jax.quantization.absmax import ActQuant


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
) -> LoadedBase:
    """Loads or makes the base of a model, on the default device.

    Args:
        source: a registry name, which gives random weights, or a folder saved by ``save_model``.
        mode: form of the linears' weights. None: packed where the model is ternary, float
            otherwise. Master weights in a folder are packed as they are loaded.
        dtype: of activations and unpacked weights.
        act_quant: quantiser of the inputs of ternary linears. None: the folder's, or per token.
        seed: of random weights.
        lora: adapters to declare; None for none.
        remat: what the backward pass recomputes.
        implementation: which ``ternary_matmul`` runs; None picks.

    Raises:
        FabricError: the source is neither, is damaged, or can't be had in that mode.
    """
    options = DecoderOptions(
        dtype=dtype,
        act_quant=act_quant or "per_token",
        implementation=implementation,
        remat=remat,
        lora=lora or LoraConfig(rank=0),
    )
    name = str(source)
    if name in REGISTRY:
        config = REGISTRY[name]
        chosen = mode or ("packed" if config.ternary else "float")
        definition = define_decoder(config, replace(options, mode=chosen))
        base = initialize_base(definition, seed)
        return LoadedBase(definition=definition, base=base, tokenizer_source="")
    folder = Path(name).expanduser()
    if not is_model_folder(folder):
        raise _not_a_model(name, folder)
    stored = read_model_config(folder)
    options = replace(options, mode=stored.mode, act_quant=act_quant or stored.act_quant)
    definition, base = load_model_folder(folder, options)
    wanted = mode or ("packed" if stored.mode == "master" else stored.mode)
    if wanted == "packed" and stored.mode == "master":
        definition, base = pack_base(definition, base)
    elif wanted != stored.mode:
        raise FabricError(
            f"{folder} holds {stored.mode} weights, which can't be turned into {wanted} ones"
        )
    tokenizer = "" if stored.tokenizer is None else str(stored.tokenizer)
    return LoadedBase(definition=definition, base=base, tokenizer_source=tokenizer)


def _not_a_model(name: str, path: Path) -> FabricError:
    """The error for a source that can't be loaded, by what it looks like."""
    accepted = "a registry name (`fabric-jax models` lists them) or a folder saved by fabric_jax"
    if path.suffix == ".gguf":
        kind = "a GGUF file" if path.is_file() else "a GGUF file, which does not exist either"
        return FabricError(
            f"cannot load {name}: models of GGUF files are not supported yet",
            expected=accepted,
            found=kind,
        )
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return FabricError(
                f"cannot load {name}: it is an adapter, not a model",
                expected=accepted,
                fix="Give its base model here and the folder as the adapter",
            )
        hugging_face = (path / "config.json").is_file()
        what = "Hugging Face folders are not supported yet" if hugging_face else "no config.json"
        return FabricError(f"cannot load {name}: {what}", expected=accepted)
    if path.exists():
        return FabricError(f"cannot load {name}: it is a file", expected=accepted)
    if len(path.parts) > 2 or path.is_absolute() or name.startswith((".", "~")):
        return FabricError(f"cannot load {name}: it does not exist", expected=accepted)
    return unknown_name("model", name, (*REGISTRY, "or a folder saved by fabric_jax"))
