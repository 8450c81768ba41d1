"""A plain PyTorch training loop of a dense model of given dimensions, for comparison of speed.

The model is the one that ``pretrain_throughput`` trains, without quantisers: sub-norms, rotary
positions, a gated feed-forward, a tied head; bfloat16 by autocast over float32 weights, the fused
AdamW, PyTorch's flash attention, optionally ``torch.compile``. It prints one JSON object.

    python3 -m experiments.peers.torch_pretrain --batch 32 --length 1024 --compile
"""

import argparse
import json
import time
from typing import Any

import torch
import torch.nn.functional as f
from torch import nn

from experiments.peers.timing import timed


class Norm(nn.Module):
    """RMS norm; the float32 gain is rounded to the input's dtype, which the fused kernel wants."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Any) -> Any:
        """``x`` [..., width], normalised."""
        return f.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-5)


class Block(nn.Module):
    """One layer."""

    def __init__(self, width: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(map(Norm, (width, width, width, ffn)))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, h: Any, cos: Any, sin: Any) -> Any:
        """The residual stream [B, T, D] after the layer."""
        b, t, width = h.shape
        x = self.norms[0](h)
        q, k, v = (
            linear(x).view(b, t, self.heads, -1).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(self.norms[1](y.transpose(1, 2).reshape(b, t, width)))
        x = self.norms[2](h)
        return h + self.down(self.norms[3](f.silu(self.gate(x)) * self.up(x)))


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class Model(nn.Module):
    """Tokens to the mean next-token loss."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(given.vocab, given.width)
        self.blocks = nn.ModuleList(
            Block(given.width, given.ffn, given.heads) for _ in range(given.layers)
        )
        self.norm = Norm(given.width)
        half = given.width // given.heads // 2
        angles = torch.outer(torch.arange(given.length), 10_000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Any, targets: Any) -> Any:
        """Mean loss of int64 [B, T]."""
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        logits = f.linear(self.norm(h), self.embedding.weight)
        return f.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def parse() -> argparse.Namespace:
    """The dimensions and how many steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        *(("layers", 11), ("width", 768), ("ffn", 3072), ("heads", 12), ("vocab", 32768)),
        *(("batch", 32), ("length", 1024), ("steps", 20), ("warmup", 5)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    """Times steps on random tokens."""
    given = parse()
    torch.set_float32_matmul_precision("high")
    model = Model(given).to(given.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    run = torch.compile(model) if given.compile else model
    rows = torch.randint(0, given.vocab, (given.batch, given.length + 1), device=given.device)
    on_gpu = given.device == "cuda"

    def step() -> Any:
        with torch.autocast(given.device, torch.bfloat16):
            loss = run(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    start = time.perf_counter()
    for _ in range(given.warmup):
        step().item()
    warm = time.perf_counter() - start
    record = {
        "seconds": timed(step, given.steps),
        "warmup_seconds": warm,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "torch": torch.__version__,
        "compiled": given.compile,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
