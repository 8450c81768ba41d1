"""The published figures, as they were printed; ``published.json`` says where."""

import json
from functools import cache
from pathlib import Path
from typing import Any

SIZES = (
    *("bitnet-125m", "bitnet-350m", "bitnet-1b", "bitnet-1.5b", "bitnet-2.7b", "bitnet-3.8b"),
    *("bitnet-7b", "bitnet-13b"),
)
PUBLISHED_POSITIONS = 264 * 128
"""Positions of a published epoch: 264 rows of the training split, one padded to 128 a step. Times
an epoch over times a step, both printed in the earlier of the two articles, give 256 to 302."""

VRAM_NOTE = (
    "Published: “peak VRAM during LoRA fine-tuning”; device, tool and whether the driver's share "
    "is in it are not stated. Less weights and adapter, the TQ2_0 column grows with the model as "
    "the activations of a step would; the TQ1_0 column does not (13B leaves 109 MiB, 125M 209), "
    "and its differences to TQ2_0 are 7 to 33 times those of the weights. TQ2_0 is the column to "
    "compare with; every claim that is made uses TQ1_0. The 16-bit rows agree with each other."
)
EPOCH_NOTE = (
    "Published: wall clock of one epoch, evaluation of 14 rows and checkpoints included; no "
    "spread. The quotient of the TQ2_0 and TQ1_0 columns is the same on three devices to within "
    "what is rounded, so the columns were not measured independently. Ours is all steps of the "
    "epoch after compilation, without evaluation and checkpoints; ≈ where a cell ran part of an "
    "epoch: the median step times their number."
)
DECODE_NOTE = (
    "Published: llama-cli, batch 1, 256 tokens, sampled; which of the tool's columns is printed is "
    "not stated. TQ1_0 is printed as 1.5 to 5.9 times faster than TQ2_0 on some devices and slower "
    "on others, where upstream documents TQ2_0 as the faster one."
)
LOSSLESS_NOTE = (
    "Published: GPU against CPU; model, text and number of chunks not stated. Logits of that tool "
    "are stored in 16 bits, whose own floor is 5.5e-4 in its documentation. Ours: with products "
    "alone, norms, gates and attention are the reference's too, and 0 means equal to the last bit; "
    "otherwise those sum in another order. bitnet-tiny has random weights and reads random tokens: "
    "its likeliest tokens are nearly tied, so a last bit turns them, which in a trained model it "
    "does not."
)
RANK_NOTE = (
    "Published: Qwen3-1.7B in PyTorch, 33 test questions, so ±15 points at 95 %; no accuracy of a "
    "BitNet model is published. Ours is of another model and other questions: only how little it "
    "depends on the rank can be compared."
)


@cache
def published() -> dict[str, Any]:
    """All tables."""
    text = (Path(__file__).parent / "published.json").read_text(encoding="utf-8")
    return json.loads(text)


def citation() -> str:
    """Where the figures were printed."""
    source = published()["source"]
    return f"{source['repository']}, {source['file']} at {source['commit'][:8]}, {source['date']}"
