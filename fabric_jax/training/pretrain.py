"""What a run that trains all weights is made of: its model by recipe, its data, its export."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from fabric_jax.checkpoints.assemble import assemble_base, in_form
from fabric_jax.checkpoints.loading import open_source
from fabric_jax.checkpoints.masters import MastersOf
from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.source import ModelSource
from fabric_jax.checkpoints.tokenizer_copy import tokenizer_settings
from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.files import cannot_write
from fabric_jax.generation import GenerationConfig, make_generator
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_base
from fabric_jax.models.registry import get_config
from fabric_jax.training.command import command_line
from fabric_jax.training.config import PretrainConfig
from fabric_jax.training.identity import weights_digest
from fabric_jax.training.metrics import SAMPLES
from fabric_jax.training.rows import load_rows, load_stream, stream_tokenizer
from fabric_jax.training.session import Job
from fabric_jax.training.step import StepOptions

MIB = 1 << 20
ACCELERATOR_TILE_MIB = 512


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights of a run come from.

    Attributes:
        model: what it is; ``ternary`` whatever the quantisers of the run are.
        source: of stored weights; None for random ones.
    """

    model: ModelConfig
    source: ModelSource | None


def find_origin(config: PretrainConfig) -> Origin:
    """The model and weights that a recipe starts from.

    Raises:
        FabricError: there is no such model, or the recipe does not take such weights.
    """
    if config.recipe == "scratch":
        return Origin(model=_chosen_size(config), source=None)
    sizes = config.vocab_size or config.num_layers or config.train_tokenizer
    if sizes or config.gate != "model" or config.sub_norms != "model":
        raise FabricError(
            f"the recipe {config.recipe} takes a model as it is",
            fix="Leave out --vocab-size, --num-layers, --train-tokenizer, --gate and --sub-norms",
        )
    if config.recipe == "convert":
        source = open_source(config.model)
        if source.form != "float":
            raise FabricError(
                f"{config.model} is ternary already",
                expected="a dense model to convert",
                fix="Go on with it under --recipe continue",
            )
        source = in_form(source, "master")
        return Origin(model=replace(source.config, ternary=True), source=source)
    source = open_source(config.model)
    if source.form == "float":
        raise FabricError(
            f"{config.model} is a dense model",
            expected="a packed model or masters",
            fix="Make it ternary with --recipe convert first",
        )
    if source.form == "packed":
        source = MastersOf(source=source)
    return Origin(model=source.config, source=source)


def pretrain_job(config: PretrainConfig, origin: Origin) -> Job:
    """The job of a run; ``config`` has its recipe's optimizer already."""
    source = origin.source
    own_tokenizer = "" if source is None else source.tokenizer_source
    model = origin.model
    if config.streams:
        tokenizer = stream_tokenizer(config, own_tokenizer)
        if config.train_tokenizer and source is None and not config.vocab_size:
            model = replace(model, vocab_size=tokenizer.vocab_size)
        data = load_stream(config, model, tokenizer)
    else:
        data, tokenizer = load_rows(config, model, own_tokenizer)
    definition = define_decoder(model, training_options(config, source))
    keeps = config.dataset.tokenizer or config.train_tokenizer or own_tokenizer
    vocabulary = tokenizer.backend.to_str().encode() if keeps else None

    def fresh() -> Tree:
        if source is None:
            return initialize_base(definition, config.seed)
        return assemble_base(definition, source)

    def export(folder: Path, base: Tree) -> None:
        save_model(
            folder,
            export_definition(definition),
            base,
            tokenizer_json=vocabulary,
            tokenizer_settings=tokenizer_settings(tokenizer) if keeps else None,
        )

    warmup = config.quantization_warmup if config.recipe == "convert" else 0
    origin_name = f"random {config.model} of seed {config.seed}"
    return Job(
        definition=definition,
        trains="base",
        frozen={},
        fresh=fresh,
        data=data,
        weights=origin_name if source is None else weights_digest(config.model, config.seed),
        kind="model",
        export=export,
        keep_best=False,
        resume_with=command_line("pretrain", replace(config, resume="auto")),
        notes=_notes(config),
        step=StepOptions(z_loss=config.z_loss, quantization_warmup=warmup),
        settings=_settings(config, warmup),
        sample=_sampler(config, definition, tokenizer) if config.samples else None,
    )


def training_options(config: PretrainConfig, source: ModelSource | None) -> DecoderOptions:
    """How the model is stored and computed: float32 masters of everything, activations in dtype.

    Raises:
        FabricError: the quantiser of activations has no such variant.
    """
    if source is None or config.recipe == "convert":
        # A dense model says nothing of the quantiser that it is to have as a ternary one.
        act_quant = config.act_quant or "per_token"
    else:
        act_quant = config.act_quant or source.act_quant
    if act_quant != "per_token" and config.ste.activations != "int8":
        raise FabricError(
            f"{config.ste.activations} activations are quantised by a rule of their own",
            expected="act_quant per_token",
            found=act_quant,
        )
    return DecoderOptions(
        mode="master",
        dtype=config.dtype,
        embedding_dtype="float32",
        norm_dtype="float32",
        act_quant=act_quant,
        remat=config.remat,
        ste=config.ste,
        attention=config.attention,
        loss_tile_bytes=MIB * _tile_mib(config),
        unroll=config.unroll,
    )


def export_definition(definition: DecoderDefinition) -> DecoderDefinition:
    """How the trained weights are saved: float32 masters, or a dense model's own weights."""
    options = definition.options
    if options.ste.weights == "none":
        dense = replace(definition.config, ternary=False)
        return define_decoder(dense, DecoderOptions(mode="float", act_quant="none"))
    plain = DecoderOptions(mode="master", act_quant=options.act_quant, ste=options.ste)
    return define_decoder(definition.config, plain)


def _chosen_size(config: PretrainConfig) -> ModelConfig:
    model = replace(get_config(config.model), ternary=True)
    if config.vocab_size:
        model = replace(model, vocab_size=config.vocab_size)
    if config.num_layers:
        model = replace(model, num_layers=config.num_layers)
    if config.gate != "model":
        model = replace(model, activation=config.gate)
    if config.sub_norms != "model":
        model = replace(model, sub_norms=config.sub_norms == "yes")
    return model


def _tile_mib(config: PretrainConfig) -> int:
    return config.loss_tile_mib or (8 if jax.default_backend() == "cpu" else ACCELERATOR_TILE_MIB)


def _settings(config: PretrainConfig, warmup: int) -> dict[str, object]:
    """What a step depends on beside the optimizer, for resuming."""
    ste = asdict(config.ste)
    del ste["product"]  # The same sums either way.
    rows = "stream" if config.streams else "packed"
    return {
        "recipe": config.recipe,
        "ste": ste,
        "z_loss": config.z_loss,
        "quantization_warmup": warmup,
        "rows": rows,
        "document_mask": config.document_mask,
    }


def _notes(config: PretrainConfig) -> tuple[str, ...]:
    beyond = config.ste.beyond_packed
    if not beyond or config.ste.weights == "none":
        return ()
    return (f"packed weights can't express {' and '.join(beyond)}: this model will not be packed",)


def _sampler(
    config: PretrainConfig, definition: DecoderDefinition, tokenizer: Tokenizer
) -> Callable[[int, Tree], list[str]]:
    """Generates texts with the weights as the training forward quantises them."""
    generator = make_generator(definition)
    prompt = tokenizer.encode(config.sample_prompt, add_special=True) or [tokenizer.bos_id or 0]
    room = definition.config.max_length - len(prompt)
    settings = GenerationConfig(
        max_new_tokens=max(1, min(config.sample_tokens, room)),
        temperature=0.8,
        top_p=0.95,
        stop_tokens=tokenizer.stop_ids,
    )
    if room < 1:
        raise FabricError(
            "the beginning of the samples fills all positions of the model",
            expected=f"less than {definition.config.max_length} tokens",
            found=str(len(prompt)),
            fix="Shorten --sample-prompt, or give --samples 0",
        )
    path = Path(config.output) / SAMPLES

    def sample(step: int, base: Tree) -> list[str]:
        seeded = replace(settings, seed=config.seed + step)
        written = generator(base, {}, [prompt] * config.samples, seeded)
        texts = [tokenizer.decode(one.tokens, skip_special=True) for one in written]
        lines = [json.dumps({"step": step, "text": text}) + "\n" for text in texts]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise cannot_write(path, error) from error
        return [repr(config.sample_prompt + text) for text in texts]

    return sample
