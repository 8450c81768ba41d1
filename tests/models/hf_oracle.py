"""The tiny problems in transformers and PEFT; needs torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fabric_jax.models.config import ModelConfig
from tests.models.hf_mapping import LINEARS
from tests.models.tiny_problems import ALPHA, RANK, Problem

QUANTIZATION: dict[str, dict[str, str] | None] = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "offline": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {},
    "float": None,
}


def hf_config(problem: Problem) -> dict[str, Any]:
    """``config.json`` of a problem."""
    import transformers

    config: ModelConfig = problem.config
    kind = transformers.BitNetConfig if config.sub_norms else transformers.LlamaConfig
    values = kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        hidden_act=config.activation,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        max_position_embeddings=config.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=1,
        eos_token_id=2,
    ).to_dict()
    values["architectures"] = ["BitNetForCausalLM" if config.sub_norms else "LlamaForCausalLM"]
    quantization = QUANTIZATION[problem.storage]
    if quantization is not None:
        values["quantization_config"] = {"quant_method": "bitnet", **quantization}
    return values


def load_model(problem: Problem, folder: Path) -> Any:
    """Writes a checkpoint as released ones are and loads it, in float32 and eval mode."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

    tensors = {name: torch.from_numpy(array.copy()) for name, array in problem.state.items()}
    if problem.mode == "packed":
        for module, scale in problem.scales.items():
            codes = tensors[f"{module}.weight"]
            tensors[f"{module}.weight"] = pack_weights(codes.clone())
            stored = scale if problem.storage == "offline" else 1 / scale
            tensors[f"{module}.weight_scale"] = torch.tensor([stored])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(problem)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    rotary = model.model.rotary_emb
    exponents = np.arange(0, problem.config.head_dim, 2) / problem.config.head_dim
    exact = torch.from_numpy((problem.config.rope_theta**-exponents).astype(np.float32))
    # torch's float32 powers are off by an ulp or two; rotary positions have a test of their own.
    torch.testing.assert_close(rotary.inv_freq, exact, rtol=1e-6, atol=0)
    rotary.inv_freq = exact
    return model.to(torch.float32).eval()


def wrap_with_peft(model: Any, problem: Problem) -> Any:
    """PEFT's LoRA on all linears, holding the adapter of the problem."""
    import peft
    import torch

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[name.split(".")[-1] for name in LINEARS.values()],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config).eval()
    own = dict(wrapped.named_parameters())
    for name, array in problem.adapter.items():
        own[_peft_parameter(name)].data = torch.from_numpy(array.copy())
    return wrapped


def _peft_parameter(name: str) -> str:
    return "base_model.model." + name.replace(".weight", ".default.weight")


def run(model: Any, tokens: np.ndarray, keep: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Logits, and with ``keep`` the mean loss of the targets after those tokens and its gradients.

    Gradients are ``grad:<name>`` for every parameter that trains.
    """
    import torch

    ids = torch.from_numpy(tokens).long()
    if keep is None:
        with torch.no_grad():
            return {"logits": model(ids).logits.numpy()}
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = torch.where(torch.from_numpy(keep[:, :-1].copy()), ids[:, 1:], -100)
    out = model(ids, labels=labels)
    model.zero_grad()
    out.loss.backward()
    result = {"logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.removeprefix("base_model.model.").replace(".default.", ".")
            result[f"grad:{plain}"] = parameter.grad.numpy()
    return result


def recorded_inputs(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What enters each linear and each layer (``model.layers.<i>``), by module name."""
    import torch

    inputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else keywords["hidden_states"]
            inputs[name] = x.detach().numpy()

        return hook

    handles = []
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.")
        inside = plain.removeprefix("model.layers.").partition(".")[2]
        if plain.startswith("model.layers.") and (not inside or inside in LINEARS.values()):
            hook = keep(plain)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(torch.from_numpy(tokens).long())
    for handle in handles:
        handle.remove()
    return inputs


def codes(values: np.ndarray) -> np.ndarray:
    """The released activation quantiser, int8 codes."""
    import torch
    from transformers.integrations.bitnet import BitLinear

    module = BitLinear(4, 4, False, dtype=torch.float32)
    return module.activation_quant(torch.from_numpy(values))[0].numpy()
