"""The text part of Gemma 3 in 16 bits (report: arXiv:2503.19786).

Five layers with a sliding window, then a global one; four norms a layer and norms of queries and
keys; embeddings times sqrt(D); a tied head.
"""

from fabric_jax.layers.rope import RopeScaling
from fabric_jax.models.config import ModelConfig


def _gemma3(
    name: str,
    num_layers: int,
    hidden: int,
    ffn: int,
    heads: tuple[int, int],
    *,
    window: int,
    max_length: int,
    rope_scaling: RopeScaling | None,
) -> ModelConfig:
    """``heads`` is (query heads, key/value heads)."""
    return ModelConfig(
        name=name,
        vocab_size=262144,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=256,
        max_length=max_length,
        rope_theta=1e6,
        norm_eps=1e-6,
        activation="gelu",
        sub_norms=False,
        ternary=False,
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=True,
        sliding_window=window,
        global_every=6,
        local_rope_theta=10_000.0,
        rope_scaling=rope_scaling,
    )


def _long(name: str, num_layers: int, hidden: int, ffn: int, heads: tuple[int, int]) -> ModelConfig:
    return _gemma3(
        name,
        num_layers,
        hidden,
        ffn,
        heads,
        window=1024,
        max_length=131072,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
    )


# huggingface.co/google/gemma-3-{1,4,12}b-it; the embedding of the larger two has 64 rows more
# there, for images.
CONFIGS = (
    _gemma3(
        "gemma-3-1b",
        26,
        1152,
        6912,
        (4, 1),
        window=512,
        max_length=32768,
        rope_scaling=None,
    ),
    _long("gemma-3-4b", 34, 2560, 10240, (8, 4)),
    _long("gemma-3-12b", 48, 3840, 15360, (16, 8)),
)
