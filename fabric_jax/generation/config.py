"""How tokens are chosen and when to stop."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from fabric_jax.errors import FabricError, unknown_name

CacheDtype = Literal["", "float32", "bfloat16", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = ("", "float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one call.

    Attributes:
        max_new_tokens: most tokens after a prompt.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens whose probabilities reach p together (Holtzman et al.
            2020, arXiv:1904.09751), counted after ``top_k``; 1 for all.
        min_p: leave out tokens less likely than ``min_p`` times the most likely one (Nguyen et al.
            2024, arXiv:2407.01082); 0 for none.
        repetition_penalty: logits of tokens that the prompt or the answer holds already are divided
            by it where they are positive and multiplied where negative (Keskar et al. 2019,
            arXiv:1909.05858), before anything else; 1 for none.
        seed: of sampling. Prompt i draws from a stream of its own, whatever the batch size.
        stop_tokens: ids that end an answer.
        log_probs: whether to return the log-probability of each new token.
        batch_size: prompts computed at once, at most; 0 for all.
        cache_length: positions that the key/value cache holds for each prompt; 0 for as many as
            the prompts and new tokens need.
        cache_dtype: of stored keys and values; empty for that of the activations. ``int8`` has one
            scale for each vector of a head.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    log_probs: bool = False
    batch_size: int = 0
    cache_length: int = 0
    cache_dtype: CacheDtype = ""

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        if self.max_new_tokens < 1:
            raise _out_of_range("max_new_tokens", "1 or more", self.max_new_tokens)
        if not 0 <= self.temperature < float("inf"):
            raise _out_of_range("temperature", "0 or more, finite", self.temperature)
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", "more than 0, at most 1", self.top_p)
        if not 0 <= self.min_p <= 1:
            raise _out_of_range("min_p", "0 to 1", self.min_p)
        if not 0 < self.repetition_penalty < float("inf"):
            raise _out_of_range("repetition_penalty", "more than 0", self.repetition_penalty)
        for name in ("top_k", "seed", "batch_size", "cache_length"):
            value = getattr(self, name)
            if value < 0:
                raise _out_of_range(name, "0 or more", value)
        if self.cache_dtype not in CACHE_DTYPES:
            raise unknown_name("dtype of the cache", self.cache_dtype, CACHE_DTYPES[1:])


class GenerationOptions(TypedDict, total=False):
    """The attributes of ``GenerationConfig`` as keywords; those left out have its defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    log_probs: bool
    batch_size: int
    cache_length: int
    cache_dtype: CacheDtype


def _out_of_range(name: str, expected: str, found: float) -> FabricError:
    return FabricError(f"{name} is out of range", expected=expected, found=str(found))
