"""A loaded model: weights, adapter, tokenizer, logits, generated text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int
from numpy.typing import ArrayLike

from fabric_jax.checkpoints.adapters import load_adapter, read_lora_config
from fabric_jax.checkpoints.loading import Weights, load_base, weights_form
from fabric_jax.data.tokenizer import Tokenizer, load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.generation.config import GenerationConfig
from fabric_jax.generation.generator import Generated, Generator, check_ids, make_generator
from fabric_jax.generation.prompts import Prompt, decode_continuation, encode_prompt
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree
from fabric_jax.quantization.absmax import ActQuant


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed one prompt.

    Attributes:
        text: the answer without special tokens and without the stop token.
        tokens: its token ids, the stop token included where there was one.
        finish: whether a stop token or the limit of new tokens ended it.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with its numbers.

    Attributes:
        definition: shapes and code of the decoder.
        frozen: the base weights.
        adapter: the LoRA weights, empty without an adapter.
        tokenizer_source: the model's own tokenizer, as ``load_tokenizer`` takes it.
    """

    definition: DecoderDefinition
    frozen: Tree
    adapter: Tree
    tokenizer_source: str = ""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.definition.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer; bytes for a model that has none."""
        return load_tokenizer(self.tokenizer_source)

    def logits(self, tokens: ArrayLike | Int[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Logits of the token after each of ``tokens``, integers [B, T].

        Compiled once for a shape. All logits exist at once: V · 4 bytes a token.

        Raises:
            FabricError: not integers of shape [B, T], longer than the model allows, or an id
                outside the vocabulary.
        """
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
        return self._logits(self.frozen, self.adapter, jnp.asarray(ids, jnp.int32))

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        batch_size: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> list[Completion]:
        """Continues each prompt; the completions are in the order of the prompts.

        Args:
            prompts: one text, or several prompts: texts, conversations (lists of messages) that the
                model answers through its chat template, or lists of token ids.
            max_new_tokens: most tokens after a prompt.
            temperature: 0 takes the most likely token; otherwise logits are divided by it.
            top_k: sample among the k most likely tokens; 0 for all.
            top_p: sample among the fewest tokens whose probabilities reach p together; 1 for all.
            seed: of sampling.
            stop_tokens: ids that end an answer; None for the tokenizer's own (end of text, end of
                turn).
            batch_size: prompts computed at once; 0 for all.
            tokenizer: instead of the model's own.

        Raises:
            FabricError: a setting is out of range, or a prompt is empty, doesn't fit the model with
                ``max_new_tokens`` after it, or has ids outside the vocabulary.
        """
        tokenizer = tokenizer or self.tokenizer
        stops = tokenizer.stop_ids if stop_tokens is None else tuple(stop_tokens)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=stops,
            batch_size=batch_size,
        )
        several = [prompts] if isinstance(prompts, str) else prompts
        ids = [encode_prompt(tokenizer, prompt) for prompt in several]
        results = self._generator(self.frozen, self.adapter, ids, settings)
        return [_complete(tokenizer, *pair) for pair in zip(ids, results, strict=True)]

    @cached_property
    def _generator(self) -> Generator:
        return make_generator(self.definition)

    @cached_property
    def _logits(self) -> Callable[[Tree, Tree, jax.Array], jax.Array]:
        @jax.jit
        def logits(frozen: Tree, adapter: Tree, tokens: jax.Array) -> jax.Array:
            decoder = self.definition.bind(frozen, adapter)
            row = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            positions = jnp.broadcast_to(row, tokens.shape)
            return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))

        return cast(Callable[[Tree, Tree, jax.Array], jax.Array], logits)


def _complete(tokenizer: Tokenizer, prompt: Sequence[int], result: Generated) -> Completion:
    text = decode_continuation(tokenizer, prompt, result.answer)
    return Completion(text=text, tokens=result.tokens, finish=result.finish)


def load_model(
    source: str | Path,
    *,
    weights: Weights | None = None,
    adapter: str | Path | None = None,
    act_quant: ActQuant | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
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
        adapter: an adapter folder in PEFT's layout, or a ``.gguf`` adapter.
        act_quant: quantiser of the inputs of ternary linears. None: the model's, or per token.
        dtype: of activations and unpacked weights.
        seed: of random weights.

    Raises:
        FabricError: the source or the adapter is missing, damaged or of another model.
    """
    lora = None if adapter is None else read_lora_config(adapter, source)
    form = weights_form(weights)
    loaded = load_base(
        source,
        mode=form.mode,
        packing=form.packing,
        float_format=form.float_format,
        dtype=dtype,
        act_quant=act_quant,
        seed=seed,
        lora=lora,
    )
    tree = {} if adapter is None else load_adapter(adapter, loaded.definition)
    return Model(
        definition=loaded.definition,
        frozen=loaded.base,
        adapter=tree,
        tokenizer_source=loaded.tokenizer_source,
    )
