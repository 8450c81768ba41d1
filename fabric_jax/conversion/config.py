"""What a conversion is asked for; every field is a flag of ``fabric-jax convert``."""

from dataclasses import dataclass, field
from typing import Literal

from fabric_jax.errors import FabricError

Target = Literal[
    "native",
    "ternary2",
    "hf",
    "hf-packed",
    "hf-bf16",
    "hf-f32",
    "gguf-tq1_0",
    "gguf-tq2_0",
    "gguf-f16",
    "gguf-q8_0",
    "peft",
    "gguf-adapter",
]

ALIASES: dict[Target, Target] = {"ternary2": "native", "hf": "hf-packed"}
"""Other words for a format."""

TERNARY: frozenset[Target] = frozenset({"native", "hf-packed", "gguf-tq1_0", "gguf-tq2_0"})
"""Formats whose linears are codes, where the model is ternary."""
DENSE: frozenset[Target] = frozenset({"hf-bf16", "hf-f32", "gguf-f16", "gguf-q8_0"})
"""Formats whose linears are numbers of 8 bits or more."""
OF_ADAPTERS: frozenset[Target] = frozenset({"peft", "gguf-adapter"})


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Writes a model, or an adapter of it, in another format.

    Attributes:
        model: a folder of fabric_jax or transformers, the output of a pretrain run, a .gguf file or
            a hub id; the first word after the command will do.
        output: folder or .gguf file to write; the second word will do. One of the same kind is
            replaced, nothing else is.
        to: the format. native or ternary2: a folder of fabric_jax; hf-packed (or hf), hf-bf16,
            hf-f32: one that transformers loads, with packed codes, or with floats that it
            quantises as it uses them; gguf-...: a file for llama.cpp; peft, gguf-adapter: the
            adapter alone.
        adapter: an adapter of the model, a folder in PEFT's layout or a .gguf file. It is converted
            by itself (to peft and gguf-adapter) or merged into the model.
        reternarise: merge the adapter into ternary weights all the same, and measure what that
            destroys on the text.
        text: a text file to measure on.
        text_length: positions in a row of the text.
        weights: what the floats of a checkpoint are that does not say: masters of a ternary model,
            or plain weights.
        dtype: of floats that are not quantised, in formats that leave the choice; auto: as they are
            stored.
        tokenizer: to go with the model in place of its own: a folder, tokenizer.json,
            tokenizer.model, .gguf file or hub id.
        shard_gb: size of the largest file of a folder for transformers, in units of 10^9 bytes.
        json: file to write sizes and measurements to.
    """

    model: str = field(metadata={"positional": True})
    output: str = field(metadata={"positional": True})
    to: Target
    adapter: str = ""
    reternarise: bool = False
    text: str = ""
    text_length: int = 256
    weights: Literal["auto", "master", "float"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tokenizer: str = ""
    shard_gb: float = 5.0
    json: str = ""

    def __post_init__(self) -> None:
        """Refuses combinations that mean nothing."""
        if self.to in OF_ADAPTERS and not self.adapter:
            raise FabricError(f"{self.to} is a format of adapters", fix="Name one with --adapter")
        if self.reternarise and (not self.adapter or self.to in OF_ADAPTERS):
            raise FabricError(
                "reternarise is for merging an adapter into a model", fix="Name one with --adapter"
            )
        if self.reternarise and not self.text:
            raise FabricError(
                "what a re-ternarised merge destroys has to be measured",
                fix="Give a text that the adapted model is good at with --text",
            )
        if self.text and not self.reternarise:
            raise FabricError("a text is only used to measure a re-ternarised merge")
        if self.text_length < 2:
            raise FabricError(
                "text_length out of range", expected="2 or more", found=str(self.text_length)
            )
        if not self.shard_gb > 0:
            raise FabricError("shard_gb out of range", expected="above 0", found=str(self.shard_gb))
