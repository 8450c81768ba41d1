"""The ``fabric-jax`` command: picks the subcommand, prints errors, decides the exit code."""

import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import cast

from fabric_jax.errors import FabricError, unknown_name

COMMANDS = {
    "quickstart": "train, pack, fine-tune and evaluate a tiny model; needs no file and no network",
    "finetune": "LoRA-fine-tune a packed model on your rows",
    "pretrain": "train all weights: from scratch, a dense model to ternary, a packed one further",
    "generate": "continue a prompt or a file of prompts, or chat, with one adapter or several",
    "evaluate": "perplexity and task accuracy of a model, with and without its adapter",
    "convert": "write a model or an adapter in another format: transformers, GGUF, PEFT",
    "sweep": "measure the cells of an experiment, each in a process of its own",
    "report": "tables, verdicts and figures from the records of sweeps",
    "memory": "what a fine-tuning job needs: by dimensions, as compiled, as measured",
    "models": "list the models that go by a name",
    "doctor": "what this machine offers, what is missing and how to install it",
}
"""Each is a module of this package with ``run(arguments) -> exit code``."""

ERROR_CODE = 2
INTERRUPTED_CODE = 130
BROKEN_PIPE_CODE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fabric-jax`` with ``arguments`` (default: those of the process).

    Returns:
        The exit code: 0, 2 for wrong input, 128 and the signal's number where a signal stopped a
        run (130 after Ctrl-C), or what the command decides.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return _exit_code(stop)
    except FabricError as error:
        return _refused(error)
    except (RuntimeError, AssertionError):
        if not (names := _missing_platforms()):
            raise
        problem = f"jax finds no device of JAX_PLATFORMS={names}"
        fix = "Unset it, and `fabric-jax doctor` says what there is and what to install"
        return _refused(FabricError(problem, fix=fix))
    except KeyboardInterrupt as stop:
        # A training loop that saved first says how to resume, and knows which signal it was.
        print(f"fabric-jax: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_code", INTERRUPTED_CODE)
    except BrokenPipeError:
        # The reader left (`fabric-jax models | head`); the interpreter's last flush must not
        # fail. The code is that of rich, which sees to it where a table was being printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_CODE


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_help(), file=sys.stderr)
        return ERROR_CODE
    first = words[0]
    if first in ("-h", "--help", "help"):
        print(_help())
        return 0
    if first in ("-V", "--version"):
        print(_version())
        return 0
    if first.startswith("-"):
        raise unknown_name("option", first, ("--help", "--version"))
    if first not in COMMANDS:
        raise unknown_name("command", first, COMMANDS)
    # Only now: jax takes a second to import.
    module = import_module(f"fabric_jax.cli.{first}")
    run = cast(Callable[[Sequence[str]], int], module.run)
    return run(words[1:])


def _refused(error: FabricError) -> int:
    if os.environ.get("FABRIC_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"fabric-jax: error: {error}", file=sys.stderr)
    return ERROR_CODE


def _missing_platforms() -> str:
    """What the variable asks jax for, where that is why jax does not start; else nothing."""
    names = os.environ.get("JAX_PLATFORMS", "")
    try:
        import_module("jax").devices()
    except (RuntimeError, AssertionError):
        return names
    return ""


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: fabric-jax COMMAND [options]\n\n"
        "LoRA fine-tuning of BitNet b1.58 (ternary) language models on packed 2-bit weights.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        f"  {'-h, --help':<{width}}this text; after a command, its own options\n"
        f"  {'--version':<{width}}versions of fabric-jax, jax and Python\n\n"
        + textwrap.fill(
            "Errors are one message on standard error and exit code 2; with FABRIC_TRACEBACK=1 "
            "in the environment they come with a traceback.",
            width=88,
        )
    )


def _version() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    return f"fabric-jax {_installed('fabric-jax')} (jax {_installed('jax')}, Python {python})"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
