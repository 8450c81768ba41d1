"""BitNet b1.58 models: sub-norms, tied head."""

from dataclasses import replace

from fabric_jax.models.config import ModelConfig


def _bitnet(
    name: str, num_layers: int, hidden: int, ffn: int, heads: int, *, vocab: int = 32002
) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_length=2048,
    )


# A model for tests and the quickstart, with a vocabulary of bytes (256, then pad, bos, eos).
TINY = replace(_bitnet("bitnet-tiny", 4, 192, 512, 6, vocab=260), max_length=512)

# A model that learns to write on one GPU in minutes; all widths are multiples of 256.
SMALL = _bitnet("bitnet-30m", 8, 512, 1536, 8, vocab=8192)

# The eight sizes of the published memory and speed tables: dimensions of the random models that
# microsoft/BitNet's utils/generate-dummy-bitnet-model.py makes under these names.
PUBLISHED = (
    _bitnet("bitnet-125m", 11, 768, 3072, 12),
    _bitnet("bitnet-350m", 24, 1024, 3072, 16),
    _bitnet("bitnet-1b", 24, 2048, 3584, 32),
    _bitnet("bitnet-1.5b", 28, 1536, 9216, 32),
    _bitnet("bitnet-2.7b", 24, 3072, 7680, 32),
    _bitnet("bitnet-3.8b", 24, 3840, 8192, 32),
    _bitnet("bitnet-7b", 32, 4096, 12032, 32),
    _bitnet("bitnet-13b", 40, 5120, 13824, 40),
)

# huggingface.co/1bitLLM: the reproduction by the community.
ONE_BIT_LLM = (
    _bitnet("bitnet-b1.58-large", 24, 1536, 4096, 16),
    _bitnet("bitnet-b1.58-xl", 24, 2048, 5460, 32),
    _bitnet("bitnet-b1.58-3b", 26, 3200, 8640, 32),
)

# huggingface.co/microsoft/bitnet-b1.58-2B-4T (report: arXiv:2504.12285).
TWO_B_4T = ModelConfig(
    name="bitnet-2b-4t",
    vocab_size=128256,
    num_layers=30,
    hidden_size=2560,
    ffn_size=6912,
    num_heads=20,
    num_kv_heads=5,
    head_dim=128,
    max_length=4096,
    rope_theta=500_000.0,
    activation="relu2",
)

CONFIGS = (TINY, SMALL, *PUBLISHED, *ONE_BIT_LLM, TWO_B_4T)
