"""Ranks and alphas of single modules: PEFT's patterns, here and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fabric_jax.checkpoints.peft import (
    differing_layers,
    load_adapter,
    read_lora_config,
    save_adapter,
)
from fabric_jax.checkpoints.peft_config import share_of
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree
from tests.models import hf_oracle, running
from tests.models.tiny_problems import Size, make_problem

SIZE = Size(vocab=37, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, length=9)
PROBLEM = make_problem("llama-float", SIZE)
CONFIG = PROBLEM.config
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


def define(lora: LoraConfig, mode: Any = "float") -> DecoderDefinition:
    return define_decoder(CONFIG, DecoderOptions(mode=mode, lora=lora))


def random_adapter(definition: DecoderDefinition) -> Tree:
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * random.standard_normal(leaf.shape), leaf.dtype),
        nnx.to_pure_dict(definition.adapter),
    )


def logits(definition: DecoderDefinition, adapter: Tree) -> np.ndarray:
    decoder = definition.bind(PROBLEM.base(), adapter)
    return np.asarray(decoder.logits(decoder(*running.whole_rows(PROBLEM.tokens))))


def same_bits(tree: Tree, other: Tree) -> bool:
    same = jax.tree.map(
        lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), tree, other
    )
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(jax.tree.leaves(same))


numbers = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 8)).map(lambda d: tuple(d.items()))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(ranks=numbers, alphas=numbers, rank=st.integers(1, 8), rslora=st.booleans())
def test_own_ranks_and_alphas_return_bit_for_bit(tmp_path_factory, ranks, alphas, rank, rslora):
    folder = tmp_path_factory.mktemp("round") / "adapter"
    lora = LoraConfig(
        rank=rank,
        targets=NAMES,
        ranks=ranks,
        alphas=tuple((name, alpha / 2) for name, alpha in alphas),
        rslora=rslora,
    )
    definition = define(lora)
    adapter = random_adapter(definition)
    save_adapter(folder, definition, adapter, "org/small")
    again = read_lora_config(folder)
    assert again == lora
    assert same_bits(load_adapter(folder, define(again)), adapter)
    assert differing_layers(folder) == []


def rewrite(folder: Path, ranks: dict[str, int], **changes: Any) -> dict[str, np.ndarray]:
    """Gives modules of a saved adapter other ranks, cutting their matrices down."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, array in tensors.items():
        for module, rank in ranks.items():
            if f"{module}." in name:
                tensors[name] = np.ascontiguousarray(
                    array[:rank] if "lora_A" in name else array[:, :rank]
                )
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def test_layers_that_differ_are_filled_with_zeros(tmp_path: Path) -> None:
    definition = define(LoraConfig(rank=5, alpha=10, targets=("q", "up")))
    save_adapter(tmp_path / "a", definition, random_adapter(definition), "org/small")
    tensors = rewrite(
        tmp_path / "a",
        {"layers.1.self_attn.q_proj": 2},
        rank_pattern={r"layers\.1\..*q_proj": 2},
        alpha_pattern={"layers.0.mlp.up_proj": 40},
    )
    lora = read_lora_config(tmp_path / "a")
    assert lora == LoraConfig(rank=5, alpha=10, targets=("q", "up"), alphas=(("up", 40.0),))
    assert differing_layers(tmp_path / "a") == ["q", "up"]
    adapter = load_adapter(tmp_path / "a", define(lora))
    q, up = adapter["layers"]["attention"]["q"]["lora"], adapter["layers"]["mlp"]["up"]["lora"]
    assert not np.any(q["a"][1, 2:])
    assert not np.any(q["b"][1, 2:])
    name = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    for layer, module, tree, scale, own in [
        (0, "self_attn.q_proj", q, 2, 10 / 5),
        (1, "self_attn.q_proj", q, 2, 10 / 2),
        (0, "mlp.up_proj", up, 8, 40 / 5),
        (1, "mlp.up_proj", up, 8, 10 / 5),
    ]:
        a, b = (tensors[name.format(layer, module, matrix)].astype(np.float64) for matrix in "AB")
        found = (
            scale
            * np.asarray(tree["b"][layer], np.float64).T
            @ np.asarray(tree["a"][layer], np.float64)
        )
        np.testing.assert_allclose(found, own * b @ a, rtol=1e-6, atol=1e-7)


def test_zeros_that_fill_up_stay_zeros_in_training(tmp_path: Path) -> None:
    definition = define(LoraConfig(rank=4, targets=("q",)))
    save_adapter(tmp_path / "a", definition, random_adapter(definition), "org/small")
    rewrite(tmp_path / "a", {"layers.1.self_attn.q_proj": 1}, rank_pattern={"layers.1.*": 1})
    lora = read_lora_config(tmp_path / "a")
    definition = define(lora)

    def loss(adapter: Tree) -> jax.Array:
        decoder = definition.bind(PROBLEM.base(), adapter)
        hidden = decoder(*running.whole_rows(PROBLEM.tokens))
        return jnp.sum(jnp.square(decoder.logits(hidden)))

    gradients = jax.grad(loss)(load_adapter(tmp_path / "a", definition))
    q = gradients["layers"]["attention"]["q"]["lora"]
    for matrix in (q["a"], q["b"]):
        assert not np.any(matrix[1, 1:])
        assert np.all(np.any(matrix[0], axis=-1))
        assert np.any(matrix[1, 0])


def test_a_layer_of_scale_zero_does_nothing(tmp_path: Path) -> None:
    definition = define(LoraConfig(rank=4, alpha=8, targets=("q",)))
    save_adapter(tmp_path / "a", definition, random_adapter(definition), "org/small")
    narrow = {"layers.1.self_attn.q_proj": 1}
    rewrite(tmp_path / "a", narrow, rank_pattern={"layers.1.*": 1}, alpha_pattern={"layers.0.*": 0})
    lora = read_lora_config(tmp_path / "a")
    assert lora.of("q").scale == 2
    q = load_adapter(tmp_path / "a", define(lora))["layers"]["attention"]["q"]["lora"]
    assert not np.any(q["b"][0])
    assert np.any(q["b"][1])


def test_a_rank_that_the_tensors_do_not_have_is_refused(tmp_path: Path) -> None:
    definition = define(LoraConfig(rank=4, targets=("q",)))
    save_adapter(tmp_path / "a", definition, random_adapter(definition), "org/small")
    rewrite(tmp_path / "a", {}, rank_pattern={"q_proj": 3})
    with pytest.raises(
        FabricError, match=r"lora_A.weight is float32\[4,16\] instead of .*\[3,16\]"
    ):
        load_adapter(tmp_path / "a", define(read_lora_config(tmp_path / "a")))
    with pytest.raises(FabricError, match=r"expected rank 4 .* for q; found rank 3"):
        load_adapter(tmp_path / "a", definition)


PATTERNS = (
    "q_proj",
    "self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    r"layers\.[01]\.mlp\.\w+",
    r"^model\.layers\.0\.self_attn\.(q|k)_proj",
    "roj",
    "attn.q_proj",
    ".*",
    "down_proj|up_proj",
    "layers.(0|1).*v_proj",
)


@pytest.mark.oracle
@settings(max_examples=60, deadline=None)
@given(chosen=st.lists(st.sampled_from(PATTERNS), unique=True))
def test_patterns_mean_what_peft_takes_them_for(oracle, chosen):
    (other,) = oracle("peft.utils.other")
    pattern = {key: number for number, key in enumerate(chosen, 2)}
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": pattern, "alpha_pattern": pattern}
    for layer in range(2):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            path = f"model.layers.{layer}.{module}"
            expected = pattern.get(other.get_pattern_key(pattern.keys(), path), 1)
            share = share_of(config, path)
            assert (share.rank, share.alpha) == (expected, expected)


RICH = {
    "rank_pattern": {
        r"layers\.1\.self_attn\.(q|k)_proj": 5,
        "q_proj": 2,
        "layers.0.mlp.*": 1,
    },
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "gate_proj": 9, "down_proj": 1},
}


def peft_model(oracle: Any, folder: Path, **changes: Any) -> Any:
    """PEFT's model of the problem, with random weights in both matrices of every linear."""
    peft, torch = oracle("peft", "torch")
    model = hf_oracle.load_model(PROBLEM, folder)
    lora = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **changes
    )
    model = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.mark.oracle
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_patterns_of_peft_give_its_logits_here_and_back_there(tmp_path, oracle, rslora):
    peft, _ = oracle("peft", "transformers")
    model = peft_model(oracle, tmp_path / "base", use_rslora=rslora, **RICH)
    model.save_pretrained(tmp_path / "a")
    expected = hf_oracle.run(model, PROBLEM.tokens)["logits"]
    lora = read_lora_config(tmp_path / "a")
    assert dict(lora.ranks) == {"q": 5, "k": 5}
    assert differing_layers(tmp_path / "a") == ["q", "k", "gate", "up", "down"]
    adapter = load_adapter(tmp_path / "a", define(lora))
    np.testing.assert_allclose(logits(define(lora), adapter), expected, rtol=0, atol=5e-5)
    save_adapter(tmp_path / "b", define(lora), adapter, "org/small")
    plain = hf_oracle.load_model(PROBLEM, tmp_path / "base")
    base = hf_oracle.run(plain, PROBLEM.tokens)["logits"]
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "b").eval()
    found = hf_oracle.run(again, PROBLEM.tokens)["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert np.abs(expected - base).max() > 0.1


@pytest.mark.oracle
def test_own_ranks_trained_here_give_the_same_logits_in_peft(tmp_path, oracle):
    peft, _ = oracle("peft", "transformers")
    lora = LoraConfig(
        rank=3, ranks=(("attention", 2), ("down", 7)), alphas=(("up", 1.5),), rslora=True
    )
    definition = define(lora)
    adapter = random_adapter(definition)
    save_adapter(tmp_path / "a", definition, adapter, "org/small")
    model = hf_oracle.load_model(PROBLEM, tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    found = hf_oracle.run(model, PROBLEM.tokens)["logits"]
    np.testing.assert_allclose(logits(definition, adapter), found, rtol=0, atol=5e-5)


@pytest.mark.oracle
def test_what_peft_trained_goes_on_here_with_its_loss(tmp_path, oracle):
    """A few steps of AdamW there; the next step's loss and gradients are the same here."""
    (torch,) = oracle("torch")
    keep = np.ones(PROBLEM.tokens.shape, bool)
    model = peft_model(oracle, tmp_path / "base", **RICH)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    first = None
    for _ in range(3):
        first = first or float(hf_oracle.run(model, PROBLEM.tokens, keep)["loss"])
        optimizer.step()
    model.save_pretrained(tmp_path / "a")
    expected = hf_oracle.run(model, PROBLEM.tokens, keep)
    assert float(expected["loss"]) < first
    lora = replace(read_lora_config(tmp_path / "a"), dropout=0.0)
    definition = define(lora)
    targets = jnp.asarray(np.pad(PROBLEM.tokens[:, 1:], ((0, 0), (0, 1))))
    weights = np.pad(np.ones_like(PROBLEM.tokens[:, 1:], np.float32), ((0, 0), (0, 1)))

    def loss(adapter: Tree) -> jax.Array:
        decoder = definition.bind(PROBLEM.base(), adapter)
        hidden = decoder(*running.whole_rows(PROBLEM.tokens))
        return decoder.loss(hidden, targets, jnp.asarray(weights / weights.sum()))

    value, gradients = jax.value_and_grad(loss)(load_adapter(tmp_path / "a", definition))
    assert float(value) == pytest.approx(float(expected["loss"]), rel=2e-6)
    a = expected["grad:model.layers.1.self_attn.v_proj.lora_A.weight"]
    found = gradients["layers"]["attention"]["v"]["lora"]["a"][1]
    np.testing.assert_allclose(found, a, rtol=0, atol=1e-5 * np.abs(a).max())
