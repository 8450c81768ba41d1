"""The linears of the models that these kernels are made for, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelLinears:
    """Sizes of a decoder's layers, which give the shapes [N, K] of its linears.

    Attributes:
        layers: L.
        hidden: D.
        query: H · hd, outputs of the query projection.
        key: outputs of the key and of the value projection.
        ffn: F.
    """

    layers: int
    hidden: int
    query: int
    key: int
    ffn: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each linear of a layer."""
        return {
            "attention.q": (self.query, self.hidden),
            "attention.k": (self.key, self.hidden),
            "attention.v": (self.key, self.hidden),
            "attention.o": (self.hidden, self.query),
            "mlp.gate": (self.ffn, self.hidden),
            "mlp.up": (self.ffn, self.hidden),
            "mlp.down": (self.hidden, self.ffn),
        }


def _linears(layers: int, hidden: int, query: int, key: int, ffn: int) -> ModelLinears:
    return ModelLinears(layers=layers, hidden=hidden, query=query, key=key, ffn=ffn)


# Layers, hidden size, outputs of query and of key, width of the feed-forward.
MODELS: dict[str, ModelLinears] = {
    "bitnet-tiny": _linears(4, 192, 192, 192, 512),
    "bitnet-30m": _linears(8, 512, 512, 512, 1536),
    "bitnet-125m": _linears(11, 768, 768, 768, 3072),
    "bitnet-350m": _linears(24, 1024, 1024, 1024, 3072),
    "bitnet-1b": _linears(24, 2048, 2048, 2048, 3584),
    "bitnet-1.5b": _linears(28, 1536, 1536, 1536, 9216),
    "bitnet-2.7b": _linears(24, 3072, 3072, 3072, 7680),
    "bitnet-3.8b": _linears(24, 3840, 3840, 3840, 8192),
    "bitnet-7b": _linears(32, 4096, 4096, 4096, 12032),
    "bitnet-13b": _linears(40, 5120, 5120, 5120, 13824),
    "bitnet-b1.58-large": _linears(24, 1536, 1536, 1536, 4096),
    "bitnet-b1.58-xl": _linears(24, 2048, 2048, 2048, 5460),
    "bitnet-b1.58-3b": _linears(26, 3200, 3200, 3200, 8640),
    "bitnet-2b-4t": _linears(30, 2560, 2560, 640, 6912),
    "llama3-8b-1.58": _linears(32, 4096, 4096, 1024, 14336),
    "falcon3-1b-1.58": _linears(18, 2048, 2048, 1024, 8192),
    "falcon3-3b-1.58": _linears(22, 3072, 3072, 1024, 9216),
    "falcon3-7b-1.58": _linears(28, 3072, 3072, 1024, 23040),
    "falcon3-10b-1.58": _linears(40, 3072, 3072, 1024, 23040),
    "falcon-e-1b": _linears(24, 2048, 2048, 256, 9216),
    "falcon-e-3b": _linears(32, 2048, 2048, 256, 13312),
}
"""Every model with ternary weights, by its name."""


def distinct_shapes(models: list[str]) -> list[tuple[int, int, str, int]]:
    """(N, K, model, layers): each shape once, under the first model that has it."""
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for model in models:
        for shape in MODELS[model].shapes.values():
            found.setdefault(shape, (model, MODELS[model].layers))
    return [(n, k, model, layers) for (n, k), (model, layers) in found.items()]
