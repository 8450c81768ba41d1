import json
import shutil
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fabric_jax.checkpoints.peft import load_adapter, read_lora_config, save_adapter
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.registry import get_config

CONFIG = replace(
    get_config("falcon-e-1b"),
    name="small",
    num_layers=2,
    hidden_size=24,
    ffn_size=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=50,
    norm_eps=1e-5,
    max_length=64,
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "v", "down"), dropout=0.25)


def define(lora=LORA, config=CONFIG, **options):
    return define_decoder(config, DecoderOptions(lora=lora, **options))


def make_adapter(definition):
    """A random adapter whose B is not zero."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype),
        nnx.to_pure_dict(definition.adapter),
    )


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    definition = define()
    save_adapter(folder, definition, make_adapter(definition), "org/small")
    return folder


@pytest.fixture
def saved(template, tmp_path):
    return shutil.copytree(template, tmp_path / "adapter")


TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lora=st.builds(
        LoraConfig,
        rank=st.integers(1, 12),
        alpha=st.floats(0.5, 64),
        targets=st.sets(st.sampled_from(TARGETS), min_size=1).map(
            lambda chosen: tuple(sorted(chosen, key=TARGETS.index))
        ),
        dropout=st.floats(0, 0.9),
        rslora=st.booleans(),
        adapter_dtype=st.sampled_from(["float32", "bfloat16"]),
    )
)
def test_adapter_returns_bit_for_bit(tmp_path_factory, lora):
    folder = tmp_path_factory.mktemp("round") / "adapter"
    definition = define(lora)
    adapter = make_adapter(definition)
    save_adapter(folder, definition, adapter, "org/small")
    again = read_lora_config(folder)
    assert again == lora
    assert_same_bits(load_adapter(folder, define(again)), adapter)


def test_groups_of_targets(tmp_path):
    definition = define(LoraConfig(rank=2, targets=("attention", "up")))
    adapter = make_adapter(definition)
    save_adapter(tmp_path / "a", definition, adapter, "org/small")
    assert read_lora_config(tmp_path / "a").targets == ("q", "k", "v", "o", "up")
    assert_same_bits(load_adapter(tmp_path / "a", definition), adapter)


def test_files(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/small",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.25,
        "use_rslora": False,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
    }
    assert expected.items() <= config.items()
    tensors = load_file(saved / "adapter_model.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.{module}.{matrix}.weight": shape
        for layer in range(2)
        for module, matrix, shape in [
            ("self_attn.q_proj", "lora_A", (3, 24)),
            ("self_attn.q_proj", "lora_B", (24, 3)),
            ("self_attn.v_proj", "lora_A", (3, 24)),
            ("self_attn.v_proj", "lora_B", (12, 3)),
            ("mlp.down_proj", "lora_A", (3, 40)),
            ("mlp.down_proj", "lora_B", (24, 3)),
        ]
    }
    down = make_adapter(define())["layers"]["mlp"]["down"]["lora"]
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], down["a"][1])


def test_stored_halves_are_widened(saved):
    path = saved / "adapter_model.safetensors"
    halves = {name: array.astype(np.float16) for name, array in load_file(path).items()}
    save_file(halves, path)
    assert read_lora_config(saved).adapter_dtype == "float32"
    loaded = load_adapter(saved, define())
    expected = jax.tree.map(
        lambda x: x.astype(jnp.float16).astype(jnp.float32), make_adapter(define())
    )
    assert_same_bits(loaded, expected)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A0), rf"{A0} is missing"),
        (
            lambda t: t.update({A0.replace(".0.", ".7."): t[A0]}),
            r"layers\.7\.self_attn\.q_proj\.lora_A\.weight is unexpected",
        ),
        (
            lambda t: t.update({A0.replace("self_attn", "mlp"): t[A0]}),
            r"layers\.0\.mlp\.q_proj\.lora_A\.weight is unexpected",
        ),
        (
            lambda t: t.update({A0: np.ones((3, 32), np.float32)}),
            rf"{A0} is float32\[3,32\] instead of float32\[3,24\]",
        ),
        (lambda t: t.update({A0: np.ones((3, 24), np.int8)}), rf"{A0} is int8\[3,24\]"),
        (lambda t: t.update({A0: np.full((3, 24), np.inf, np.float32)}), rf"{A0} in .* not finite"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A0]}),
            "targets modules that can't have one here.*lm_head",
        ),
        (lambda t: t.update(stray=t[A0]), "targets modules that can't have one here.*stray"),
        (lambda t: t.clear(), "no tensor"),
    ],
    ids=[
        "missing",
        "layer",
        "module",
        "shape",
        "integer",
        "not-finite",
        "lm-head",
        "stray",
        "empty",
    ],
)
def test_other_tensors_are_refused(saved, change, message):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(FabricError, match=message):
        load_adapter(saved, define())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(CONFIG, hidden_size=32), ["[3,24] instead of float32[3,32]", "D 32"]),
        (replace(CONFIG, num_layers=1), ["layers.1.", "unexpected", "L 1"]),
        (replace(CONFIG, num_layers=3), ["layers.2.", "missing", "L 3"]),
        (replace(CONFIG, ffn_size=48), ["down_proj.lora_A.weight is float32[3,40]", "F 48"]),
        (replace(CONFIG, num_kv_heads=4), ["v_proj.lora_B.weight", "heads 4/4"]),
    ],
    ids=["width", "fewer-layers", "more-layers", "ffn", "kv-heads"],
)
def test_adapter_of_another_model_is_refused(saved, config, words):
    with pytest.raises(FabricError, match="trained on org/small, does not fit small") as caught:
        load_adapter(saved, define(config=config))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"rank": 4}, {"alpha": 3.0}, {"rslora": True}], ids=["rank", "alpha", "rslora"]
)
def test_other_settings_are_refused(saved, change):
    with pytest.raises(FabricError, match="other LoRA settings"):
        load_adapter(saved, define(replace(LORA, **change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA; found IA3"),
        ({"use_dora": True}, "more than plain LoRA.*use_dora"),
        ({"bias": "all"}, "more than plain LoRA.*bias = 'all'"),
        ({"rank_pattern": {"q_proj": "four"}}, "no whole number; found 'four'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern in .* is no object"),
        ({"rank_pattern": {"q_proj": 0}}, "LoRA rank of q out of range"),
        ({"alpha_pattern": {"q_proj": "much"}}, "wrong type"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "LoRA alpha out of range: q has inf"),
        ({"alpha_pattern": {"(q_proj": 4}}, "malformed pattern"),
        ({"alpha_pattern": {r"(\\w+)+!": 4}}, "too long to match"),
        ({"alpha_pattern": {".*.*.*.*.*": 4}}, "too long to match"),
        ({"alpha_pattern": {"q" * 1000: 4}}, "too long to match"),
        ({"velora_config": {"num_groups": 2}}, "velora_config"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"target_modules": ["q_proj", "k_proj"]}, "disagree about the targets"),
        ({"r": "three"}, "no whole number; found 'three'"),
        ({"r": 3.5}, "no whole number"),
        ({"lora_alpha": None}, "wrong type"),
        ({"r": -1}, "LoRA rank out of range"),
        ({"lora_dropout": 2.0}, "LoRA dropout out of range"),
    ],
)
def test_other_configurations_are_refused(saved, change, message):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FabricError, match=message):
        read_lora_config(saved)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_missing_settings(saved, key):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(FabricError, match=key):
        read_lora_config(saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(FabricError, match=name):
        load_adapter(saved, define())


def test_missing_folder(tmp_path):
    with pytest.raises(FabricError, match="does not exist"):
        read_lora_config(tmp_path / "none")


def test_damaged_weights(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FabricError, match=f"cannot read {path}"):
        load_adapter(saved, define())


def test_what_does_not_fit_is_not_saved(tmp_path):
    definition = define()
    adapter = make_adapter(definition)
    with pytest.raises(FabricError, match="no adapter of small"):
        save_adapter(tmp_path / "a", define(replace(LORA, rank=2)), adapter, "org/small")
    with pytest.raises(FabricError, match="rank 0"):
        save_adapter(tmp_path / "a", define(LoraConfig(rank=0)), {}, "org/small")
    adapter["layers"]["mlp"]["down"]["lora"]["b"] *= jnp.nan
    with pytest.raises(
        FabricError, match=r"down_proj\.lora_B\.weight has values that are not finite"
    ):
        save_adapter(tmp_path / "a", definition, adapter, "org/small")
    assert list(tmp_path.iterdir()) == []


def llama(transformers):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.ffn_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            head_dim=CONFIG.head_dim,
            max_position_embeddings=CONFIG.max_length,
            rope_theta=CONFIG.rope_theta,
            rms_norm_eps=CONFIG.norm_eps,
            tie_word_embeddings=False,
        )
    )


@pytest.mark.oracle
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_loads_what_is_saved_here(tmp_path, oracle, rslora):
    peft, transformers = oracle("peft", "transformers")
    definition = define(replace(LORA, targets=("all",), rslora=rslora))
    adapter = make_adapter(definition)
    save_adapter(tmp_path / "a", definition, adapter, "org/small")
    with warnings.catch_warnings():
        # PEFT warns of keys that it misses or does not know.
        warnings.filterwarnings("error", message=".*keys")
        model = peft.PeftModel.from_pretrained(llama(transformers), tmp_path / "a")
    seen = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        *_, layer, block, projection = name.split(".")
        group = "attention" if block == "self_attn" else "mlp"
        linear = adapter["layers"][group][projection.removesuffix("_proj")]["lora"]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        np.testing.assert_array_equal(a.detach().numpy(), linear["a"][int(layer)])
        np.testing.assert_array_equal(b.detach().numpy(), linear["b"][int(layer)].T)
        assert module.scaling["default"] == pytest.approx(definition.options.lora.scale)
        seen += 1
    assert seen == 7 * CONFIG.num_layers


@pytest.mark.oracle
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["two", "all-linear"])
def test_what_peft_saves_loads_here(tmp_path, oracle, rslora, targets):
    peft, transformers, torch = oracle("peft", "transformers", "torch")
    settings_ = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
    )
    model = peft.get_peft_model(llama(transformers), settings_)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(generator=generator)
    model.save_pretrained(tmp_path / "a")
    lora = read_lora_config(tmp_path / "a")
    two = ("q", "v")
    assert lora == LoraConfig(
        rank=4,
        alpha=12.0,
        targets=two if len(targets) == 2 else TARGETS,
        dropout=0.1,
        rslora=rslora,
    )
    adapter = load_adapter(tmp_path / "a", define(lora))
    weights = dict(model.named_parameters())
    for layer in range(CONFIG.num_layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn"
        for target in two:
            found = adapter["layers"]["attention"][target]["lora"]
            a, b = (
                weights[f"{prefix}.{target}_proj.lora_{matrix}.default.weight"].detach().numpy()
                for matrix in "AB"
            )
            np.testing.assert_array_equal(found["a"][layer], a)
            np.testing.assert_array_equal(found["b"][layer], b.T)


@pytest.mark.oracle
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_adapted_logits_agree_with_peft(tmp_path, oracle, rslora):
    """The same base and the same folder give the same logits in both libraries."""
    peft, transformers, torch = oracle("peft", "transformers", "torch")
    model = llama(transformers).eval()
    definition = define(
        replace(LORA, targets=("all",), rslora=rslora), replace(CONFIG, ternary=False), mode="float"
    )
    adapter = jax.tree.map(lambda x: 0.1 * x, make_adapter(definition))
    save_adapter(tmp_path / "a", definition, adapter, "org/small")
    state = {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}

    def stack(name):
        return jnp.stack([state[f"model.layers.{i}.{name}.weight"] for i in range(2)])

    def linears(module, names):
        return {name: {"weight": stack(f"{module}.{name}_proj")} for name in names}

    base = {
        "embedding": state["model.embed_tokens.weight"],
        "head": state["lm_head.weight"],
        "final_norm": {"gain": state["model.norm.weight"]},
        "layers": {
            "attention": linears("self_attn", "qkvo"),
            "mlp": linears("mlp", ("gate", "up", "down")),
            "attention_norm": {"gain": stack("input_layernorm")},
            "mlp_norm": {"gain": stack("post_attention_layernorm")},
        },
    }
    tokens = np.arange(34).reshape(2, 17) % CONFIG.vocab_size
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor(tokens)).logits.numpy()
    decoder = definition.bind(base, load_adapter(tmp_path / "a", definition))
    positions = np.broadcast_to(np.arange(17, dtype=np.int32), (2, 17))
    hidden = decoder(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.ones((2, 17), jnp.int32)
    )
    np.testing.assert_allclose(decoder.logits(hidden), expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-2
