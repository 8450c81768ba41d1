"""Ternary models of Llama's architecture: no sub-norms, a head of their own."""

from fabric_jax.models.config import ModelConfig


def _ternary_llama(
    name: str,
    num_layers: int,
    hidden: int,
    ffn: int,
    heads: tuple[int, int, int],
    *,
    vocab: int,
    theta: float,
    eps: float,
    max_length: int,
) -> ModelConfig:
    """``heads`` is (query heads, key/value heads, head width)."""
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        max_length=max_length,
        rope_theta=theta,
        norm_eps=eps,
        sub_norms=False,
        tied_head=False,
    )


def _falcon3(
    name: str, layers: int, hidden: int, ffn: int, heads: int, max_length: int
) -> ModelConfig:
    return _ternary_llama(
        name,
        layers,
        hidden,
        ffn,
        (heads, 4, 256),
        vocab=131072,
        theta=1_000_042.0,
        eps=1e-6,
        max_length=max_length,
    )


def _falcon_e(name: str, layers: int, ffn: int) -> ModelConfig:
    return _ternary_llama(
        name,
        layers,
        2048,
        ffn,
        (16, 2, 128),
        vocab=32768,
        theta=1e6,
        eps=1e-5,
        max_length=32768,
    )


CONFIGS = (
    # huggingface.co/HF1BitLLM/Llama3-8B-1.58-100B-tokens
    _ternary_llama(
        "llama3-8b-1.58",
        32,
        4096,
        14336,
        (32, 8, 128),
        vocab=128256,
        theta=500_000.0,
        eps=1e-5,
        max_length=8192,
    ),
    # huggingface.co/tiiuae/Falcon3-{1,3,7,10}B-Instruct-1.58bit
    _falcon3("falcon3-1b-1.58", 18, 2048, 8192, 8, 8192),
    _falcon3("falcon3-3b-1.58", 22, 3072, 9216, 12, 32768),
    _falcon3("falcon3-7b-1.58", 28, 3072, 23040, 12, 32768),
    _falcon3("falcon3-10b-1.58", 40, 3072, 23040, 12, 32768),
    # huggingface.co/tiiuae/Falcon-E-{1,3}B
    _falcon_e("falcon-e-1b", 24, 9216),
    _falcon_e("falcon-e-3b", 32, 13312),
)
