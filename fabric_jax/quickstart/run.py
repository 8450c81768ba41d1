"""The quickstart from its first sentence to its last number."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fabric_jax.errors import FabricError
from fabric_jax.evaluation import Comparison
from fabric_jax.files import write_json
from fabric_jax.quickstart.corpus import OUTCOMES, Corpus, make_corpus
from fabric_jax.quickstart.report import Answer, Report, both, plot_curves
from fabric_jax.quickstart.settings import QuickstartConfig, Recipe
from fabric_jax.quickstart.stages import (
    Layout,
    evaluate,
    fine_tune,
    finetune_config,
    measure_sizes,
    pack,
    train_from_scratch,
    write_data,
)
from fabric_jax.training.interrupt import Interrupted
from fabric_jax.training.lock import LOCK, locked_folder

CONFIG, SUMMARY, CURVES = "quickstart.json", "summary.json", "curves.png"
PARTS = ("data", "tokenizer", "pretrain", "model", "finetune", SUMMARY, CURVES)
"""What a quickstart leaves in its folder, beside ``CONFIG``."""


def run_quickstart(
    config: QuickstartConfig, *, recipe: Recipe | None = None, console: Console | None = None
) -> Report:
    """Trains a small BitNet, packs it, fine-tunes it and evaluates it, without any input.

    Args:
        config: output folder and seed.
        recipe: how much is trained.
        console: where progress goes; standard error where not given.

    Raises:
        FabricError: the output folder holds something else or can't be written.
        Interrupted: Ctrl-C or SIGTERM.
    """
    start = time.perf_counter()
    recipe, console = recipe or Recipe(), console or Console(stderr=True)
    layout = Layout(Path(config.output))
    with locked_folder(layout.root):
        _clear(layout.root)
        write_json(layout.root / CONFIG, {**asdict(config), "recipe": asdict(recipe)})
        try:
            report = _stages(config, recipe, layout, console, start)
        except Interrupted as stop:
            # The message of the run inside would tell how to resume that run alone.
            raise Interrupted(
                "stopped; `fabric-jax quickstart` starts again from the beginning",
                stop.exit_code - 128,
            ) from stop
        write_json(layout.root / SUMMARY, report.to_json())
    return report


def _stages(
    config: QuickstartConfig, recipe: Recipe, layout: Layout, console: Console, start: float
) -> Report:
    def stage(number: int, text: str) -> None:
        elapsed = time.perf_counter() - start
        console.print(f"\n[{number}/5] {text} ({elapsed:.0f} s)", markup=False, highlight=False)

    stage(1, "inventing facts, writing the corpus, learning a vocabulary")
    corpus = make_corpus(config.seed, drugs=recipe.drugs, held_out=recipe.held_out)
    vocab_size = write_data(corpus, layout)
    stage(2, f"training {recipe.model} from random weights, with these {vocab_size:,} tokens")
    pretraining = train_from_scratch(
        layout, recipe, vocab_size=vocab_size, seed=config.seed, console=console
    )
    stage(3, "packing the weights to 2 bits")
    pack(layout)
    stage(4, "LoRA on the packed model: answering questions")
    settings = finetune_config(layout, recipe, seed=config.seed)
    finetuning = fine_tune(settings, console)
    stage(5, f"asking {len(corpus.held_out)} questions that no training text contains")
    comparisons = evaluate(layout, recipe)
    plot_curves(layout.root / CURVES, layout.pretraining, layout.finetuning)
    sizes = measure_sizes(layout, settings, finetuning)
    return Report(
        output=config.output,
        seed=config.seed,
        vocab_size=vocab_size,
        statements=len(corpus.statements),
        questions=len(corpus.train),
        pretraining=pretraining,
        finetuning=finetuning,
        likelihood=comparisons["likelihood"],
        generation=comparisons["generation"],
        sizes=sizes,
        answers=_examples(corpus, comparisons["generation"]),
        seconds=time.perf_counter() - start,
    )


def _examples(corpus: Corpus, generation: Comparison) -> tuple[Answer, ...]:
    """The first held-out question of each class, with its generated answers."""
    before, after = both(generation)
    outcomes = [fact.outcome for fact in corpus.held_out]
    return tuple(
        Answer(
            question=corpus.held_out[i].question,
            expected=outcome,
            before=before.answers[i],
            after=after.answers[i],
        )
        for outcome in OUTCOMES
        for i in (outcomes.index(outcome),)
    )


def _clear(root: Path) -> None:
    """Removes an earlier quickstart; a folder with anything else in it is refused."""
    there = {path.name for path in root.iterdir()} - {LOCK}
    if not there:
        return
    foreign = sorted(there - {CONFIG, *PARTS})
    if foreign or CONFIG not in there:
        raise FabricError(
            f"{root} holds something that is no quickstart",
            found=", ".join(foreign or sorted(there)),
            fix="Choose another folder with --output",
        )
    for name in PARTS:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
