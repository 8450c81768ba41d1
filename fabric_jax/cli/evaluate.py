"""``fabric-jax evaluate``: perplexity and task accuracy, with and without an adapter."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fabric_jax.choices import ActQuantChoice, ImplementationChoice, TableDtype, WeightsChoice
from fabric_jax.data.config import DataConfig, LongRows, TrainOn
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from fabric_jax.checkpoints.loading import LoadedBase
    from fabric_jax.data.batch import Batch
    from fabric_jax.data.load import EvaluationData
    from fabric_jax.data.tokenizer import Tokenizer
    from fabric_jax.evaluation import Comparison, Evaluation
    from fabric_jax.models.initialize import Tree


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Perplexity of a model on rows and, where these have labels, accuracy on the task.

    With --against the model is compared with itself after a change, token by token.

    Attributes:
        model: registry name (random weights), a folder saved by fabric_jax or by transformers, a
            .gguf file, or a hub id: org/name, org/name@revision, org/name/file.gguf.
        data: rows to evaluate on: a .jsonl, .json or .parquet file, a folder of them, or a data
            set of the Hugging Face hub.
        adapter: folder or .gguf file of an adapter; the base is then measured too, beside it.
        tokenizer: a tokenizer folder, tokenizer.json, tokenizer.model, .gguf file or hub id. Empty:
            the model's own, or bytes for a model that has none.
        chat_template: a Jinja file to use instead of the tokenizer's own chat template.
        columns: columns to read under other names, as known=column.
        max_length: positions in a row.
        batch_size: rows computed at once.
        long_rows: what to do with rows longer than max_length.
        train_on: tokens that count for perplexity; as in fine-tuning.
        by: how an answer is taken from the model: the first word of what it generates greedily, or
            the label it finds most likely (also by the mean over tokens); none for perplexity only.
        dtype: of activations and unpacked weights.
        weights: form of the linears' weights; auto is packed where the model is ternary. packed for
            a checkpoint of plain floats says that these are master weights of a ternary model.
            packed is ternary2 (2 bits a weight); ternary1.6 holds five weights a byte, with the
            same results.
        act_quant: quantiser of the inputs of ternary linears; auto: what the model was saved with,
            else per_token.
        embedding_dtype: of embedding and head in memory; same is dtype.
        implementation: of the products with packed weights; auto picks.
        sides: what runs norms, gates and attention; auto: what goes with the implementation. With
            one and the same, implementations of the products differ in nothing.
        against: what the second model has instead: model=, adapter= (none for none), weights=,
            dtype=, embedding-dtype=, act-quant=, implementation= or sides=, as in
            implementation=xla.
        mesh: how many devices lie along data, fsdp and tensor, as in data=4,tensor=2; rows are cut
            along data and fsdp, packed weights along fsdp and tensor. Empty: one device.
        seed: of random base weights.
        json: file to write the figures to.
    """

    model: str
    data: str
    adapter: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    columns: tuple[str, ...] = ()
    max_length: int = 512
    batch_size: int = 8
    long_rows: LongRows = "truncate"
    train_on: TrainOn = "auto"
    by: Literal["generation", "likelihood", "likelihood_per_token", "none"] = "generation"
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: WeightsChoice = "auto"
    act_quant: ActQuantChoice = "auto"
    embedding_dtype: TableDtype = "same"
    implementation: ImplementationChoice = "auto"
    sides: Literal["auto", "xla", "cpu"] = "auto"
    against: tuple[str, ...] = ()
    mesh: str = ""
    seed: int = 0
    json: str = ""

    def __post_init__(self) -> None:
        """Refuses what a mesh can't do."""
        if not self.mesh:
            return
        from fabric_jax.parallel.mesh import parse_mesh

        parse_mesh(self.mesh, None).require_rows(self.batch_size)
        if self.against:
            raise FabricError(
                "two models are compared on one device", fix="Leave out --mesh, or --against"
            )

    @property
    def dataset(self) -> DataConfig:
        """How to read the rows."""
        return DataConfig(
            data=self.data,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            columns=self.columns,
            max_length=self.max_length,
            batch_size=self.batch_size,
            long_rows=self.long_rows,
            train_on=self.train_on,
            shuffle=False,
        )


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, evaluates, prints the table."""
    from fabric_jax.cli.arguments import parse

    config = parse(EvaluateConfig, "evaluate", arguments)
    from fabric_jax.data import load_evaluation, load_tokenizer

    dataset = config.dataset
    from fabric_jax.cli.against import changed_config, run_against
    from fabric_jax.evaluation import Run
    from fabric_jax.files import require_writable
    from fabric_jax.parallel.mesh import named_mesh

    changed = changed_config(config)
    if config.json:
        require_writable(config.json)
    mesh = named_mesh(config.mesh)
    loaded, adapter = load(config, mesh)
    tokenizer = load_tokenizer(
        config.tokenizer or loaded.tokenizer_source, chat_template=config.chat_template or None
    )
    _check_vocabulary(loaded, tokenizer)
    data = load_evaluation(dataset, tokenizer)
    print(data.summary)
    if config.against:
        return run_against(config, changed, Run(loaded.definition, loaded.base, adapter), data)
    comparison = _compare(config, loaded, adapter, tokenizer, data, mesh)
    if config.json:
        from fabric_jax.files import write_json

        write_json(config.json, _record(config, comparison))
    _print(config, comparison)
    return 0


def load(config: EvaluateConfig, mesh: "Mesh | None" = None) -> "tuple[LoadedBase, Tree]":
    """The model and its adapter, an empty one where none is named; on a mesh where one is given."""
    from dataclasses import replace

    from fabric_jax.checkpoints.adapters import load_adapter, read_lora_config
    from fabric_jax.checkpoints.loading import load_base, weights_form
    from fabric_jax.models.on_mesh import place_base
    from fabric_jax.parallel.placement import assembling, place_whole

    form = weights_form(config.weights)
    lora = read_lora_config(config.adapter, config.model) if config.adapter else None
    with assembling(1 if mesh is None else mesh.size):
        loaded = load_base(
            config.model,
            mode=form.mode,
            packing=form.packing,
            float_format=form.float_format,
            dtype=config.dtype,
            act_quant=None if config.act_quant == "auto" else config.act_quant,
            seed=config.seed,
            lora=lora,
            embedding_dtype=None if config.embedding_dtype == "same" else config.embedding_dtype,
            implementation=None if config.implementation == "auto" else config.implementation,
            sides=None if config.sides == "auto" else config.sides,
        )
        _check_length(config, loaded)
        adapter = load_adapter(config.adapter, loaded.definition) if config.adapter else {}
        if mesh is None:
            return loaded, adapter
        base = place_base(loaded.base, loaded.definition, mesh)
        return replace(loaded, base=base), place_whole(adapter, mesh)


def _check_length(config: EvaluateConfig, loaded: "LoadedBase") -> None:
    model = loaded.definition.config
    if config.max_length > model.max_length:
        raise FabricError(
            f"rows are longer than {model.name} allows",
            expected=f"max_length of at most {model.max_length}",
            found=str(config.max_length),
        )


def _check_vocabulary(loaded: "LoadedBase", tokenizer: "Tokenizer") -> None:
    model = loaded.definition.config
    if tokenizer.vocab_size > model.vocab_size:
        raise FabricError(
            f"the tokenizer {tokenizer.source} has more tokens than {model.name}",
            expected=f"at most {model.vocab_size}",
            found=str(tokenizer.vocab_size),
            fix="Use the tokenizer that the model was made with",
        )


def _compare(
    config: EvaluateConfig,
    loaded: "LoadedBase",
    adapter: "Tree",
    tokenizer: "Tokenizer",
    data: "EvaluationData",
    mesh: "Mesh | None",
) -> "Comparison":
    """Measures, saying on a terminal how far it is."""
    from rich.console import Console

    from fabric_jax.evaluation import compare

    total = data.batches.batches_in_epoch(0)
    asked = () if config.by == "none" else data.labelled
    with Console(stderr=True).status("compiling") as status:

        def batches() -> "Iterator[Batch]":
            for number, batch in enumerate(data.batches.epoch(0), 1):
                status.update(f"perplexity: batch {number} of {total}")
                yield batch
            status.update(f"accuracy: {len(asked)} questions")

        return compare(
            loaded.definition,
            loaded.base,
            adapter,
            tokenizer=tokenizer,
            batches=batches(),
            labelled=asked,
            by="generation" if config.by == "none" else config.by,
            batch_size=config.batch_size,
            mesh=mesh,
        )


def _record(config: EvaluateConfig, comparison: "Comparison") -> dict[str, Any]:
    """What ``--json`` writes: the settings, the machine, the figures."""
    from fabric_jax.measurement.device import device_facts

    adapted = comparison.adapter
    return {
        "config": asdict(config),
        "device": device_facts().to_dict(),
        "base": _figures(comparison.base),
        "adapter": None if adapted is None else _figures(adapted),
    }


def _figures(evaluation: "Evaluation") -> dict[str, Any]:
    """Flat keys; those that were not measured are left out."""
    figures: dict[str, Any] = {}
    if (perplexity := evaluation.perplexity) is not None:
        figures["perplexity"] = perplexity.perplexity
        figures["loss"] = perplexity.loss
        figures["tokens"] = perplexity.tokens
    if (task := evaluation.accuracy) is not None:
        figures |= {"by": task.by, **task.scores.to_dict()}
        figures["predictions"] = list(task.predictions)
        if task.answers:
            figures["answers"] = list(task.answers)
    return figures


def _print(config: EvaluateConfig, comparison: "Comparison") -> None:
    from fabric_jax.cli.output import print_table

    columns = [_column(comparison.base)]
    names = ["base"]
    if comparison.adapter is not None:
        columns.append(_column(comparison.adapter))
        names.append("with adapter")
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    print_table(f"{config.model} on {config.data}", ("", *names), rows)


def _column(evaluation: "Evaluation") -> dict[str, str]:
    """Name to text of each figure."""
    texts: dict[str, str] = {}
    if (perplexity := evaluation.perplexity) is not None:
        texts["perplexity"] = f"{perplexity.perplexity:.4g}"
        texts["loss, nats a token"] = f"{perplexity.loss:.4f}"
        texts["tokens"] = f"{perplexity.tokens:,}"
    if (task := evaluation.accuracy) is not None:
        scores = task.scores
        low, high = scores.interval
        texts[f"accuracy by {task.by.replace('_', ' ')}"] = f"{scores.accuracy:.1%}"
        texts["95% interval"] = f"{low:.1%} to {high:.1%}"
        texts["right"] = f"{scores.correct} of {scores.total}"
        texts["macro-F1"] = f"{scores.macro_f1:.3f}"
        texts["format rate"] = f"{scores.format_rate:.1%}"
        for label, f1 in scores.f1.items():
            texts[f"F1 of {label} ({scores.support[label]} rows)"] = f"{f1:.3f}"
    return texts
