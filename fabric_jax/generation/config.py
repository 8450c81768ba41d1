"""How tokens are chosen and when to stop."""

from dataclasses import dataclass

from fabric_jax.errors import FabricError


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one call.

    Attributes:
        max_new_tokens: most tokens after a prompt.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens whose probabilities reach p together (Holtzman et al.
            2020, arXiv:1904.09751), counted after ``top_k``; 1 for all.
        seed: of sampling. Prompt i draws from a stream of its own, whatever the batch size.
        stop_tokens: ids that end an answer.
        batch_size: prompts computed at once; 0 for all.
        cache_length: positions that the key/value cache holds for each prompt; 0 for as many as
            the prompts and new tokens need.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    batch_size: int = 0
    cache_length: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that can't be meant."""
        if self.max_new_tokens < 1:
            raise _out_of_range("max_new_tokens", "1 or more", self.max_new_tokens)
        if not 0 <= self.temperature < float("inf"):
            raise _out_of_range("temperature", "0 or more, finite", self.temperature)
        if not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", "more than 0, at most 1", self.top_p)
        for name in ("top_k", "seed", "batch_size", "cache_length"):
            value = getattr(self, name)
            if value < 0:
                raise _out_of_range(name, "0 or more", value)


def _out_of_range(name: str, expected: str, found: float) -> FabricError:
    return FabricError(f"{name} is out of range", expected=expected, found=str(found))
