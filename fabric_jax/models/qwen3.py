"""Qwen3 in 16 bits (report: arXiv:2505.09388): norms of queries and keys, a tied head."""

from fabric_jax.models.config import ModelConfig


def _qwen3(name: str, num_layers: int, hidden: int, ffn: int, heads: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=151936,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        max_length=40960,
        rope_theta=1e6,
        norm_eps=1e-6,
        sub_norms=False,
        ternary=False,
        qk_norm=True,
    )


# huggingface.co/Qwen/Qwen3-{0.6,1.7,4}B
CONFIGS = (
    _qwen3("qwen3-0.6b", 28, 1024, 3072, 16),
    _qwen3("qwen3-1.7b", 28, 2048, 6144, 16),
    _qwen3("qwen3-4b", 36, 2560, 9728, 32),
)
