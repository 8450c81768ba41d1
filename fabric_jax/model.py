"""A loaded model: weights, adapter, tokenizer, logits, generated text."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels.large_pages import move_to_large_pages
from fabric_kernels.ternary_matmul import Implementation
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int
from numpy.typing import ArrayLike

from fabric_jax.checkpoints.adapters import load_adapter, read_lora_config
from fabric_jax.checkpoints.loading import LoadedBase, load_base, weights_form
from fabric_jax.choices import Weights
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.generation.adapters import Member, stack_adapters
from fabric_jax.generation.config import GenerationConfig, GenerationOptions
from fabric_jax.generation.generator import Generator, check_ids, make_generator
from fabric_jax.generation.prompts import Prompt, decode_continuation, encode_prompt
from fabric_jax.generation.session import Cached, Finish, Generated, Session, Stats
from fabric_jax.generation.text import REPLACEMENT, TextStream
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, define_decoder
from fabric_jax.models.initialize import Tree
from fabric_jax.models.on_mesh import place_base
from fabric_jax.parallel.mesh import named_mesh
from fabric_jax.parallel.placement import ROWS, WHOLE, assembling, base_specs, place_whole, shape_of
from fabric_jax.quantization.absmax import ActQuant

AdapterName = str | None
TableDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]
PIECE_SECONDS = 0.05
"""What a dispatch of a streamed answer may take: the eye takes more for a stutter."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed one prompt.

    Attributes:
        text: the answer without special tokens, without the stop token or string.
        tokens: its token ids, those of the stop token or string included where there was one.
        finish: whether a stop token or string, the limit of new tokens or the reader ended it.
        log_probs: of each token under the model itself, nats; None where nobody asked.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    log_probs: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with its numbers.

    Attributes:
        definition: shapes and code of the decoder.
        frozen: the base weights.
        adapter: the LoRA weights, empty without an adapter; with several a stack of them.
        tokenizer_source: the model's own tokenizer, as ``load_tokenizer`` takes it.
        adapter_names: of the stack's adapters, as they were named to ``load_model``.
        own_tokenizer: in place of the one that ``tokenizer_source`` names.
        mesh: the devices that the trees lie on, the base cut along them; None for one device.
    """

    definition: DecoderDefinition
    frozen: Tree
    adapter: Tree
    tokenizer_source: str = ""
    adapter_names: tuple[str, ...] = ()
    own_tokenizer: Tokenizer | None = None
    mesh: Mesh | None = None

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.definition.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer; bytes for a model that has none."""
        return self.own_tokenizer or load_tokenizer(self.tokenizer_source)

    def logits(self, tokens: ArrayLike | Int[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Logits of the token after each of ``tokens``, integers [B, T].

        Compiled once for a shape. All logits exist at once: V · 4 bytes a token.

        Raises:
            FabricError: several adapters, not integers of shape [B, T], longer than the model
                allows, an id outside the vocabulary, or a B that the mesh doesn't divide.
        """
        if self.adapter_names:
            raise FabricError(
                "logits are those of one adapter", fix="Load the model with one, not with a list"
            )
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise FabricError(
                "logits takes token ids",
                expected="integers of shape [B, T]",
                found=f"{ids.dtype} of shape {list(ids.shape)}",
            )
        if ids.shape[1] > self.config.max_length:
            raise FabricError(
                f"{ids.shape[1]} tokens are more than {self.config.name} allows",
                expected=f"at most {self.config.max_length}",
            )
        check_ids(ids, self.config.vocab_size, "the batch")
        if self.mesh is not None:
            shape_of(self.mesh).require_rows(ids.shape[0])
        return self._logits(self.frozen, self.adapter, jnp.asarray(ids, jnp.int32))

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        adapters: AdapterName | Sequence[AdapterName] = None,
        tokenizer: Tokenizer | None = None,
        report: Callable[[Stats], None] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Completion]:
        """Continues each prompt; the completions are in the order of the prompts.

        Args:
            prompts: one text, or several prompts: texts, conversations (lists of messages) that the
                model answers through its chat template, or lists of token ids.
            stop_tokens: ids that end an answer; None for the tokenizer's own (end of text, end of
                turn).
            stop_strings: texts that end an answer and are cut from it.
            adapters: of a model loaded with several, the one to use, or one for each prompt; None
                for the base alone.
            tokenizer: instead of the model's own.
            report: is given the times of every batch.
            **options: how tokens are chosen, how many at most, and what is kept; see
                ``GenerationConfig``.

        Raises:
            FabricError: a setting is out of range, or a prompt is empty, doesn't fit the model with
                ``max_new_tokens`` after it, or has ids outside the vocabulary.
        """
        tokenizer = tokenizer or self.tokenizer
        stops = tokenizer.stop_ids if stop_tokens is None else tuple(stop_tokens)
        settings = GenerationConfig(stop_tokens=stops, **options)
        _check_stop_strings(stop_strings)
        several = [prompts] if isinstance(prompts, str) else prompts
        ids = [encode_prompt(tokenizer, prompt) for prompt in several]
        streams = [
            TextStream(tokenizer=tokenizer, prompt=prompt, stop_strings=tuple(stop_strings))
            for prompt in ids
        ]
        counts = [0] * len(ids)

        def watch(i: int, tokens: tuple[int, ...]) -> bool:
            streams[i].add(tokens[counts[i] :])
            counts[i] = len(tokens)
            return streams[i].stopped

        results = self._generator(
            self.frozen,
            self.adapter,
            ids,
            settings,
            adapter_ids=self._adapter_ids(adapters, len(ids)),
            watch=watch if stop_strings else None,
            report=report,
        )
        return [
            _complete(tokenizer, prompt, result, stop_strings)
            for prompt, result in zip(ids, results, strict=True)
        ]

    def stream(
        self,
        prompt: Prompt,
        *,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        adapter: AdapterName = None,
        tokenizer: Tokenizer | None = None,
        **options: Unpack[GenerationOptions],
    ) -> "Stream":
        """The answer to one prompt, a piece of text at a time as it is generated.

        Its pieces are those of :class:`Stream`; the other arguments are those of :meth:`generate`.
        """
        tokenizer = tokenizer or self.tokenizer
        stops = tokenizer.stop_ids if stop_tokens is None else tuple(stop_tokens)
        settings = GenerationConfig(stop_tokens=stops, **options)
        _check_stop_strings(stop_strings)
        ids = self._adapter_ids(adapter, 1)
        return Stream(
            generator=self._generator,
            frozen=self.frozen,
            adapter=self.adapter,
            adapter_id=None if ids is None else ids[0],
            tokenizer=tokenizer,
            prompt=tuple(encode_prompt(tokenizer, prompt)),
            settings=settings,
            stop_strings=tuple(stop_strings),
        )

    def _adapter_ids(
        self, names: AdapterName | Sequence[AdapterName], count: int
    ) -> list[int] | None:
        """The numbers in the stack of adapters; None where there is no stack."""
        several = [names] * count if names is None or isinstance(names, str) else list(names)
        if not self.adapter_names:
            if any(name is not None for name in several):
                raise FabricError(
                    "the model was not loaded with several adapters to choose from",
                    fix="Give load_model a list of adapters",
                )
            return None
        if len(several) != count:
            raise FabricError(
                "there is one adapter for each prompt",
                expected=f"{count} names",
                found=str(len(several)),
            )
        for name in several:
            if name is not None and name not in self.adapter_names:
                raise unknown_name("adapter", name, self.adapter_names)
        return [0 if name is None else 1 + self.adapter_names.index(name) for name in several]

    @cached_property
    def _generator(self) -> Generator:
        return make_generator(self.definition, self.mesh)

    @cached_property
    def _logits(self) -> Callable[[Tree, Tree, jax.Array], jax.Array]:
        mesh, definition = self.mesh, self.definition
        if mesh is not None:
            definition = definition.on_mesh(shape_of(mesh))

        def logits(frozen: Tree, adapter: Tree, tokens: jax.Array) -> jax.Array:
            decoder = definition.bind(frozen, adapter)
            row = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            positions = jnp.broadcast_to(row, tokens.shape)
            return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))

        if mesh is None:
            return jax.jit(logits)
        ternary = definition.options.mode != "float"
        specs = base_specs(self.frozen, shape_of(mesh), ternary=ternary)
        mapped = jax.shard_map(
            logits, mesh=mesh, in_specs=(specs, WHOLE, ROWS), out_specs=ROWS, check_vma=False
        )
        return jax.jit(mapped)


@dataclass(kw_only=True)
class Stream:
    """Iterates over the pieces of an answer; each is text that will not change, or none yet.

    The number of tokens a dispatch grows until it takes ``PIECE_SECONDS``.

    Attributes:
        generator: of the model.
        frozen: base weights.
        adapter: the adapter, or a stack of several.
        adapter_id: of a stack.
        tokenizer: of the model.
        prompt: token ids.
        settings: how.
        stop_strings: texts that end the answer.
        cached: what an earlier answer left: what it has in common with the prompt is not computed
            again. Afterwards what this one leaves.
        stats: times, after the answer.
        completion: the answer, when the last piece has come or the iteration has been left.
    """

    generator: Generator
    frozen: Tree
    adapter: Tree
    adapter_id: int | None
    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    settings: GenerationConfig
    stop_strings: tuple[str, ...] = ()
    cached: Cached | None = None
    stats: Stats | None = None
    completion: Completion | None = None

    def check(self) -> None:
        """Raises the FabricError that iteration would raise for the prompt."""
        self.generator.check([self.prompt], self.settings)

    def __iter__(self) -> Iterator[str]:
        """Generates the answer."""
        text = TextStream(
            tokenizer=self.tokenizer, prompt=self.prompt, stop_strings=self.stop_strings
        )
        cached, self.cached = self.cached, None
        session = self.generator.start(
            self.frozen,
            self.adapter,
            self.prompt,
            self.settings,
            adapter_id=self.adapter_id,
            cached=cached,
        )
        given, steps = 0, 1
        try:
            while not session.done and not text.stopped:
                begin = time.perf_counter()
                session.advance(steps)
                spent = time.perf_counter() - begin
                steps = max(1, min(2 * steps, int(steps * PIECE_SECONDS / spent)))
                stopping = self.settings.stop_tokens
                fresh = [token for token in session.tokens(0)[given:] if token not in stopping]
                given = len(session.tokens(0))
                # Nothing too, so that a reader who wants to leave can.
                yield text.add(fresh)
            if piece := text.finish():
                yield piece
        finally:
            self._close(session, text)

    def _close(self, session: Session, text: TextStream) -> None:
        """Keeps what the answer leaves, however it ended."""
        if not session.done and not text.stopped:
            session.end(0)
        self.stats = session.stats
        self.cached = session.cached(self.prompt)
        self.completion = _completion(text, session.generated(0))


def _complete(
    tokenizer: Tokenizer, prompt: Sequence[int], result: Generated, stop_strings: Sequence[str]
) -> Completion:
    text = TextStream(tokenizer=tokenizer, prompt=prompt, stop_strings=tuple(stop_strings))
    whole = "" if stop_strings else decode_continuation(tokenizer, prompt, result.answer)
    if stop_strings or REPLACEMENT in whole:
        # A whole run of bytes is replaced where the last of its characters is cut off.
        text.add(result.answer)
        text.finish()
    else:
        text.text = whole
    return _completion(text, result)


def _completion(text: TextStream, result: Generated) -> Completion:
    """The answer, without what a dispatch took behind a stop string."""
    finish, count = result.finish, len(result.tokens)
    if text.stopped:
        finish, count = "stop", text.taken
    log_probs = None if result.log_probs is None else result.log_probs[:count]
    return Completion(
        text=text.text, tokens=result.tokens[:count], finish=finish, log_probs=log_probs
    )


def _check_stop_strings(stop_strings: Sequence[str]) -> None:
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise FabricError("stop strings are a list of texts that are not empty")


def load_model(
    source: str | Path,
    *,
    weights: Weights | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    act_quant: ActQuant | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    embedding_dtype: TableDtype | None = None,
    implementation: Implementation | None = None,
    seed: int = 0,
    mesh: str = "",
) -> Model:
    """Loads a model, with an adapter if one is named.

    Args:
        source: a registry name, which gives random weights; a folder saved by fabric_jax or by
            transformers (safetensors); a ``.gguf`` file; or a hub id: ``org/name``,
            ``org/name@revision``, ``org/name/file.gguf``.
        weights: form of the linears' weights: ``packed`` or ``ternary2`` (2-bit codes),
            ``ternary1.6`` (the same codes, five a byte), ``master`` (float, quantised in every
            pass), ``float`` (plain linears in ``dtype``) or ``float32``, ``bfloat16``, ``float16``,
            ``int8`` or ``int4`` (plain linears that are stored so). None: packed where the
            model is ternary, float otherwise. ``packed`` or ``master`` for a checkpoint of plain
            floats says that these are master weights of a ternary model.
        adapter: an adapter folder in PEFT's layout, or a ``.gguf`` adapter; a list of several for
            a model of which each prompt has its own.
        act_quant: quantiser of the inputs of ternary linears. None: the model's, or per token.
        dtype: of activations and unpacked weights.
        embedding_dtype: of embedding and head as they are stored, ``int8`` and ``int4`` included;
            None for ``dtype``.
        implementation: of the products with packed weights; None picks.
        seed: of random weights.
        mesh: how many devices lie along data, fsdp and tensor, as in ``data=4,tensor=2``: rows of
            batches are cut along data and fsdp, packed weights along fsdp and tensor. Results are
            those of one device, on which the model is where no mesh is named.

    Raises:
        FabricError: the source or the adapter is missing, damaged or of another model, or there
            are other devices than the mesh says.
    """
    several = adapter is not None and not isinstance(adapter, str | Path)
    one = None if several else cast(str | Path | None, adapter)
    lora = None if one is None else read_lora_config(one, source)
    form, devices = weights_form(weights), named_mesh(mesh)
    with assembling(1 if devices is None else devices.size):
        loaded = load_base(
            source,
            mode=form.mode,
            packing=form.packing,
            float_format=form.float_format,
            dtype=dtype,
            act_quant=act_quant,
            seed=seed,
            lora=lora,
            embedding_dtype=embedding_dtype,
            implementation=implementation,
        )
        if devices is None:
            move_to_large_pages(loaded.base)
        if several:
            return _on_mesh(_with_adapters(loaded, cast(Sequence[str | Path], adapter)), devices)
        tree = {} if one is None else load_adapter(one, loaded.definition)
        model = Model(
            definition=loaded.definition,
            frozen=loaded.base,
            adapter=tree,
            tokenizer_source=loaded.tokenizer_source,
        )
        return _on_mesh(model, devices)


def _on_mesh(model: Model, mesh: Mesh | None) -> Model:
    """The model with its trees on the devices of a mesh."""
    if mesh is None:
        return model
    base = place_base(model.frozen, model.definition, mesh)
    return replace(model, frozen=base, adapter=place_whole(model.adapter, mesh), mesh=mesh)


def _with_adapters(loaded: LoadedBase, paths: Sequence[str | Path]) -> Model:
    """The model with a stack of adapters."""
    names = tuple(map(str, paths))
    if len(set(names)) != len(names):
        raise FabricError("an adapter is named twice", found=", ".join(names))
    members: list[Member] = []
    for path in paths:
        lora = read_lora_config(path, loaded.definition.config)
        options = replace(loaded.definition.options, lora=lora)
        own = define_decoder(loaded.definition.config, options)
        members.append((lora, load_adapter(path, own)))
    definition, tree = stack_adapters(loaded.definition, members)
    return Model(
        definition=definition,
        frozen=loaded.base,
        adapter=tree,
        tokenizer_source=loaded.tokenizer_source,
        adapter_names=names,
    )
