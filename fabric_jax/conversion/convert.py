"""One call from any model or adapter to any format."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from fabric_jax.checkpoints.adapters import load_adapter, model_config, notes_on, read_lora_config
from fabric_jax.checkpoints.assemble import assemble_base, in_form
from fabric_jax.checkpoints.huggingface.write import write_huggingface
from fabric_jax.checkpoints.loading import open_source
from fabric_jax.checkpoints.native_write import write_native
from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.checkpoints.source import ModelSource
from fabric_jax.conversion.config import ALIASES, DENSE, OF_ADAPTERS, TERNARY, ConvertConfig
from fabric_jax.conversion.damage import Damage, Run, measure_damage, text_rows
from fabric_jax.conversion.output import check_output
from fabric_jax.conversion.sizes import Sizes, measure_sizes
from fabric_jax.conversion.sources import Derived, Merged, Reternarised, Watched
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree
from fabric_jax.models.registry import REGISTRY

Report = Callable[[str], None]

NOMINAL_BITS = {"gguf-tq1_0": 1.6875, "gguf-tq2_0": 2.0625}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written.

    Attributes:
        output: the file or folder.
        sizes: of a model, None for an adapter.
        damage: what a re-ternarised merge destroyed, None where nothing was.
        notes: what the user should know of the result.
    """

    output: Path
    sizes: Sizes | None
    damage: Damage | None
    notes: tuple[str, ...]


def convert(config: ConvertConfig, report: Report = lambda _: None) -> Converted:
    """Reads tensor by tensor, writes tensor by tensor; the result appears whole or not at all.

    Args:
        config: what to convert into what.
        report: called with lines of progress.

    Raises:
        FabricError: the source is damaged, the format can't hold it, the output is something else,
            or an adapter would be merged into ternary weights without being told to.
    """
    config = replace(config, to=ALIASES.get(config.to, config.to))
    output = Path(config.output).expanduser()
    check_output(config, output)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        if config.to in OF_ADAPTERS:
            notes = _convert_adapter(config, output)
            sizes, damage = None, None
        else:
            source, notes, damage = _prepare(config, report)
            _write(config, Watched(source=source, report=report), output)
            sizes = measure_sizes(output, source.config)
            notes += _notes_on_size(config, sizes)
    notes += [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    return Converted(output=output, sizes=sizes, damage=damage, notes=tuple(notes))


def _prepare(config: ConvertConfig, report: Report) -> tuple[ModelSource, list[str], Damage | None]:
    """The source to write, in the form that the format takes; notes; the damage of a merge."""
    if config.model in REGISTRY:
        raise FabricError(
            f"{config.model} is the name of a size, whose weights are random",
            expected="a folder, a .gguf file or a hub id",
        )
    mode = None if config.weights == "auto" else config.weights
    source = open_source(config.model, mode=mode)
    if mode == "master" and source.form == "float":
        source = in_form(source, "master")
    if config.tokenizer:
        source = Derived(source=source, tokenizer=config.tokenizer)
    if config.adapter:
        return _merge(config, source, report)
    keeps_masters = config.to in ("hf-bf16", "hf-f32")
    if source.form == "master" and not keeps_masters:
        source = in_form(source, "packed")
    return source, _notes_on_model(config, source), None


def _merge(
    config: ConvertConfig, source: ModelSource, report: Report
) -> tuple[ModelSource, list[str], Damage | None]:
    ternary = source.form != "float"
    if ternary and config.to in TERNARY and not config.reternarise:
        raise FabricError(
            f"an adapter can't be merged into the ternary weights of {source.origin}: rounding "
            "weights and adapter to three values again loses the adapter, whose numbers are "
            "small against a step of the codes, and spoils what they do not lose",
            fix="Ship the adapter by itself (--to peft or gguf-adapter), merge into dense weights "
            f"({', '.join(sorted(DENSE))}), or give --reternarise to do it all the same and have "
            "the damage measured",
        )
    if config.reternarise and not ternary:
        raise FabricError(f"{source.origin} is not a ternary model: it is merged without loss")
    if config.reternarise and source.form == "master":
        source = in_form(source, "packed")
    definition, adapter = _adapter_of(config, source)
    lora, notes = definition.options.lora, notes_on(config.adapter)
    if config.reternarise:
        merged = Reternarised(source=source, lora=lora, adapter=adapter)
        damage = _measure(config, source, merged, definition, adapter, report)
        return merged, notes + _notes_on_model(config, merged), damage
    if ternary:
        notes.append(
            "the merged model is dense: neither its weights nor its activations are quantised any "
            "more, so it computes what act_quant none computes, not what the base and the adapter "
            "computed with int8 activations"
        )
    return Merged(source=source, lora=lora, adapter=adapter), notes, None


def _adapter_of(config: ConvertConfig, source: ModelSource) -> tuple[DecoderDefinition, Tree]:
    lora = read_lora_config(config.adapter, source.config)
    options = DecoderOptions(mode=source.form, act_quant=source.act_quant, lora=lora)
    definition = define_decoder(source.config, options)
    return definition, load_adapter(config.adapter, definition)


def _measure(
    config: ConvertConfig,
    source: ModelSource,
    merged: ModelSource,
    definition: DecoderDefinition,
    adapter: Tree,
    report: Report,
) -> Damage:
    """The adapted model against the merged one, on the text."""
    length = min(config.text_length, source.config.max_length)
    tokenizer = load_tokenizer(source.tokenizer_source)
    rows = text_rows(config.text, tokenizer, length, source.config.vocab_size)
    report("loading the model")
    bare = replace(definition.options, lora=LoraConfig(rank=0))
    plain = define_decoder(source.config, bare)
    before = Run(definition, assemble_base(definition, source), adapter)
    after = Run(plain, assemble_base(plain, merged), {})
    return measure_damage(before, after, rows, report)


def _notes_on_model(config: ConvertConfig, source: ModelSource) -> list[str]:
    """What another program will compute otherwise than this one."""
    notes: list[str] = []
    ternary = source.form != "float"
    if ternary and config.to.startswith("hf-") and source.act_quant != "per_token":
        notes.append(
            f"the model is computed with act_quant {source.act_quant} here; transformers always "
            "quantises activations per token"
        )
    if ternary and config.to in ("gguf-f16", "gguf-q8_0"):
        notes.append(
            "llama.cpp quantises activations for ternary types alone: from this file it computes "
            "what act_quant none computes"
        )
    if config.to == "hf-bf16" and source.form == "packed":
        notes.append(
            "transformers takes the scales from the stored floats, which bfloat16 rounds: they "
            "are off by up to 0.4 %; hf-packed and hf-f32 keep them"
        )
    return notes


def _notes_on_size(config: ConvertConfig, sizes: Sizes) -> list[str]:
    """That padding costs, where it costs more than a tenth."""
    nominal = NOMINAL_BITS.get(config.to)
    if nominal is None or sizes.bits_per_weight < 1.1 * nominal:
        return []
    return [
        f"rows were filled up with zeros to blocks of 256, which makes {sizes.bits_per_weight:.4g} "
        f"bits of {nominal} for a weight; outputs are the same"
    ]


def _convert_adapter(config: ConvertConfig, output: Path) -> list[str]:
    """Writes the adapter alone; of the model only the dimensions are needed."""
    model = model_config(config.model)
    lora = read_lora_config(config.adapter, model)
    options = DecoderOptions(mode="packed" if model.ternary else "float", lora=lora)
    definition = define_decoder(model, options)
    adapter = load_adapter(config.adapter, definition)
    if config.to == "peft":
        save_adapter(output, definition, adapter, config.model)
    else:
        from fabric_jax.checkpoints.gguf.adapter import save_gguf_adapter

        save_gguf_adapter(output, definition, adapter)
    return notes_on(config.adapter)


def _write(config: ConvertConfig, source: ModelSource, output: Path) -> None:
    dtype = None if config.dtype == "auto" else config.dtype
    limit = round(config.shard_gb * 1e9)
    match config.to:
        case "native":
            write_native(source, output, dtype=dtype)
        case "hf-packed":
            write_huggingface(source, output, packed=True, dtype=dtype, shard_bytes=limit)
        case "hf-bf16" | "hf-f32":
            stored = "bfloat16" if config.to == "hf-bf16" else "float32"
            write_huggingface(source, output, packed=False, dtype=stored, shard_bytes=limit)
        case _:
            from fabric_jax.checkpoints.gguf.write import write_gguf

            kind = config.to.removeprefix("gguf-").upper()
            write_gguf(output, source, kind=cast(Literal["TQ1_0", "TQ2_0", "F16", "Q8_0"], kind))
