"""``fabric-jax generate``: answers to one prompt, to a file of prompts, or in a conversation."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fabric_jax.choices import ActQuantChoice, ImplementationChoice, TableDtype, WeightsChoice
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    from fabric_jax.generation.config import GenerationOptions
    from fabric_jax.generation.session import Stats
    from fabric_jax.model import Model

INTERRUPTED_CODE = 130


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Text from a model.

    With a prompt, or one on standard input, it is continued; with --prompts a file of them is;
    with neither, on a terminal, a conversation begins. Ctrl-C stops an answer.

    Attributes:
        model: registry name (random weights), a folder saved by fabric_jax or by transformers, a
            .gguf file, or a hub id: org/name, org/name@revision, org/name/file.gguf.
        prompt: text to continue; - or nothing reads standard input where it is no terminal.
        chat: take the prompt for a user's message and answer it through the chat template.
        system: a system message before a conversation.
        prompts: file of prompts: rows of a .jsonl, .ndjson or .json file with "prompt" or
            "messages" (and "adapter" to choose one), or a text file with a prompt a line.
        out: JSONL file for the answers to --prompts, in their order; written whole or not at all.
        adapter: folders or .gguf files of adapters. With several, one prompt is answered by each
            of them in one batch, and a conversation starts with the first.
        tokenizer: a tokenizer folder, tokenizer.json, tokenizer.model, .gguf file or hub id. Empty:
            the model's own, or bytes for a model that has none.
        chat_template: a Jinja file to use instead of the tokenizer's own chat template.
        max_new_tokens: most tokens of an answer.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens whose probabilities reach p together; 1 for all.
        min_p: leave out tokens less likely than this share of the most likely one.
        repetition_penalty: on logits of tokens that were there before; 1 for none.
        stop: texts that end an answer and are cut from it.
        seed: of sampling, and of random weights.
        log_probs: write the log-probability of each token to --out.
        batch_size: prompts of --prompts computed at once.
        context: positions that a conversation may have.
        cache_dtype: of stored keys and values; auto is dtype.
        dtype: of activations and unpacked weights.
        embedding_dtype: of embedding and head in memory; same is dtype.
        weights: form of the linears' weights; auto is packed where the model is ternary.
        act_quant: quantiser of the inputs of ternary linears; auto: what the model was saved with,
            else per_token.
        implementation: of the products with packed weights; auto picks.
        mesh: how many devices lie along data, fsdp and tensor, as in data=4,tensor=2; rows are cut
            along data and fsdp, packed weights along fsdp and tensor. Empty: one device.
    """

    model: str = field(metadata={"positional": True})
    prompt: str = field(default="", metadata={"positional": True})
    chat: bool = False
    system: str = ""
    prompts: str = ""
    out: str = ""
    adapter: tuple[str, ...] = ()
    tokenizer: str = ""
    chat_template: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    log_probs: bool = False
    batch_size: int = 8
    context: int = 2048
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    embedding_dtype: TableDtype = "same"
    weights: WeightsChoice = "auto"
    act_quant: ActQuantChoice = "auto"
    implementation: ImplementationChoice = "auto"
    mesh: str = ""

    def __post_init__(self) -> None:
        """Refuses what contradicts itself."""
        if bool(self.prompts) != bool(self.out):
            raise FabricError("--prompts and --out belong together: a file in, a file out")
        if self.prompts and self.prompt:
            raise FabricError("there is one prompt and a file of prompts; give one of them")
        if self.prompts and (self.chat or self.system):
            raise FabricError(
                "--chat and --system are for one prompt or a conversation",
                fix='Give --prompts rows with "messages"',
            )
        if self.log_probs and not self.out:
            raise FabricError(
                "log-probabilities are written to a file", fix="Give --prompts, --out"
            )
        if self.mesh:
            from fabric_jax.parallel.mesh import parse_mesh

            shape = parse_mesh(self.mesh, None)
            if self.prompts:
                shape.require_rows(self.batch_size)

    @property
    def options(self) -> "GenerationOptions":
        """How tokens are chosen."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "cache_dtype": "" if self.cache_dtype == "auto" else self.cache_dtype,
        }


def run(arguments: Sequence[str]) -> int:
    """Parses the flags, generates, prints."""
    from fabric_jax.cli.arguments import parse

    config = parse(GenerateConfig, "generate", arguments)
    if config.prompts:
        return _file(config)
    if config.prompt in ("", "-") and (config.prompt or not sys.stdin.isatty()):
        return _one(config, _standard_input())
    if config.prompt:
        return _one(config, config.prompt)
    from fabric_jax.cli.chat import chat

    return chat(load(config), config)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise FabricError(f"standard input is no text: {error}", expected=error.encoding) from error


def load(config: GenerateConfig, *, choose: bool = False) -> "Model":
    """The model with its adapters and its tokenizer; ``choose`` between one and none."""
    from dataclasses import replace

    from rich.console import Console

    from fabric_jax.data.tokenizer import load_tokenizer
    from fabric_jax.model import load_model

    several = choose or len(config.adapter) > 1
    with Console(stderr=True).status(f"loading {config.model}"):
        model = load_model(
            config.model,
            weights=None if config.weights == "auto" else config.weights,
            adapter=config.adapter if several else (*config.adapter, None)[0],
            act_quant=None if config.act_quant == "auto" else config.act_quant,
            dtype=config.dtype,
            embedding_dtype=None if config.embedding_dtype == "same" else config.embedding_dtype,
            implementation=None if config.implementation == "auto" else config.implementation,
            seed=config.seed,
            mesh=config.mesh,
        )
        source = config.tokenizer or model.tokenizer_source
        tokenizer = load_tokenizer(source, chat_template=config.chat_template or None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise FabricError(
            f"the tokenizer {tokenizer.source} has more tokens than {model.config.name}",
            expected=f"at most {model.config.vocab_size}",
            found=str(tokenizer.vocab_size),
            fix="Use the tokenizer that the model was made with",
        )
    return replace(model, own_tokenizer=tokenizer)


def messages_of(config: GenerateConfig, text: str) -> list[dict[str, str]]:
    """A conversation that ``text`` begins."""
    system = [{"role": "system", "content": config.system}] if config.system else []
    return [*system, {"role": "user", "content": text}]


def _one(config: GenerateConfig, text: str) -> int:
    """The answer to one prompt, streamed; with several adapters each one's."""
    if not text:
        raise FabricError("the prompt is empty", expected="a text, or one on standard input")
    from fabric_jax.cli.chat import interrupted

    model = load(config)
    prompt = messages_of(config, text) if config.chat or config.system else text
    if model.adapter_names:
        names = (None, *model.adapter_names)
        timed: list[Stats] = []
        answers = model.generate(
            [prompt] * len(names),
            adapters=names,
            stop_strings=config.stop,
            report=timed.append,
            **config.options,
        )
        for name, answer in zip(names, answers, strict=True):
            print(f"== {name or 'without an adapter'}\n{answer.text}\n")
        print_stats(timed[0])
        return 0
    stream = model.stream(prompt, stop_strings=config.stop, **config.options)
    with interrupted() as stopped:
        for piece in stream:
            print(piece, end="", flush=True)
            if stopped():
                break
    print(flush=True)
    assert stream.stats is not None
    print_stats(stream.stats)
    return INTERRUPTED_CODE if stopped() else 0


def _file(config: GenerateConfig) -> int:
    """Answers to a file of prompts."""
    from fabric_jax.cli.prompt_file import read_prompts, write_answers
    from fabric_jax.files import require_writable

    rows = read_prompts(config.prompts)
    named = {row.adapter for row in rows if row.adapter is not None}
    if unknown := sorted(named - set(config.adapter)):
        raise FabricError(
            f"{config.prompts} names an adapter that is not given with --adapter",
            expected=", ".join(config.adapter) or "none",
            found=unknown[0],
        )
    require_writable(config.out)
    model = load(config, choose=bool(named))
    timed: list[Stats] = []
    options = config.options
    options["batch_size"], options["log_probs"] = config.batch_size, config.log_probs
    answers = model.generate(
        [row.prompt for row in rows],
        adapters=[row.adapter for row in rows],
        stop_strings=config.stop,
        report=timed.append,
        **options,
    )
    write_answers(config.out, rows, answers)
    print(f"{len(answers):,} answers in {config.out}", file=sys.stderr)
    total = timed[0]
    for stats in timed[1:]:
        total = total + stats
    print_stats(total)
    return 0


def print_stats(stats: "Stats") -> None:
    """One line on standard error: what was read and written, and how fast."""
    parts = [
        f"first token after {stats.first_token_seconds:.2f} s",
        f"prefill {stats.prompt_tokens:,} tokens, {stats.prefill_rate:,.1f} tokens/s",
        f"decode {stats.new_tokens:,} tokens, {stats.decode_rate:,.1f} tokens/s",
    ]
    if stats.compile_seconds:
        parts.append(f"compiling {stats.compile_seconds:.1f} s besides")
    print(f"[{'; '.join(parts)}]", file=sys.stderr, flush=True)
