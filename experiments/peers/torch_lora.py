"""LoRA fine-tuning with PyTorch, transformers and PEFT: a peer of ``finetune_throughput``.

A Llama of the dimensions of a published BitNet size in bfloat16, its embedding tied, adapters of
rank 8 on all seven linears in float32, AdamW; PyTorch's scaled dot-product attention, one document
a row; with ``--checkpoint`` each layer is recomputed, with ``--compile`` the model goes through
``torch.compile``. Weights are random. It prints one JSON object; memory is the allocator's peak.

    python3 -m experiments.peers.torch_lora --checkpoint --compile
"""

import argparse
import json
import time
from typing import Any

import peft
import torch
import transformers

from experiments.peers.timing import timed

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parse() -> argparse.Namespace:
    """The dimensions and how many steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        *(("layers", 24), ("width", 2048), ("ffn", 3584), ("heads", 32), ("vocab", 32002)),
        *(("rows", 16), ("length", 512), ("rank", 8), ("steps", 20), ("warmup", 5)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def build(given: argparse.Namespace) -> Any:
    """The model with its adapters, on the device."""
    config = transformers.LlamaConfig(
        num_hidden_layers=given.layers,
        hidden_size=given.width,
        intermediate_size=given.ffn,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        vocab_size=given.vocab,
        max_position_embeddings=given.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    settings = peft.LoraConfig(
        r=given.rank, lora_alpha=2 * given.rank, target_modules=list(LINEARS), task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if given.checkpoint:
        adapted.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        adapted.enable_input_require_grads()
    return adapted.train()


def main() -> None:
    """Times steps on random tokens."""
    given = parse()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = build(given)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    run = torch.compile(model) if given.compile else model
    tokens = torch.randint(0, given.vocab, (given.rows, given.length), device="cuda")

    def step() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    start = time.perf_counter()
    first = step().item()
    for _ in range(given.warmup - 1):
        step().item()
    warm = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, given.steps)
    record = {
        "seconds": seconds,
        "warmup_seconds": warm,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "trained": sum(p.numel() for p in trained),
        "loss_first": first,
        "loss_last": step().item(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "compiled": given.compile,
        "checkpointed": given.checkpoint,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
