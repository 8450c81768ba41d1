"""Whole conversions between files, read back by the readers and by transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fabric_jax.checkpoints.adapters import load_adapter, notes_on, read_lora_config
from fabric_jax.checkpoints.assemble import assemble_base, in_form
from fabric_jax.checkpoints.loading import open_source
from fabric_jax.checkpoints.native import save_model
from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.conversion import ConvertConfig, Converted, convert
from fabric_jax.conversion.sources import Merged, Reternarised
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from tests.checkpoints.tree_source import assert_same_tensors, source_of
from tests.models import hf_oracle, running
from tests.models.tiny_problems import Problem, Size, make_problem

SIZE = Size(vocab=260, layers=2, hidden=16, ffn=24, heads=2, kv_heads=2, length=9)
LORA = LoraConfig(rank=3, alpha=6, ranks=(("down", 5),), alphas=(("q", 9.0),), rslora=True)
NAMES = ["bitnet-silu-offline", "bitnet-silu-online", "llama-bitlinear", "llama-float"]


def native(problem: Problem, folder: Path) -> str:
    definition = define_decoder(problem.config, DecoderOptions(mode=problem.mode))
    save_model(folder, definition, problem.base(), tokenizer_json=None)
    return str(folder)


def adapter(problem: Problem, folder: Path, lora: LoraConfig = LORA, std: float = 0.2) -> str:
    options = DecoderOptions(mode=problem.mode, lora=lora)
    definition = define_decoder(problem.config, options)
    random = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda leaf: jnp.asarray(std * random.standard_normal(leaf.shape), leaf.dtype),
        nnx.to_pure_dict(definition.adapter),
    )
    save_adapter(folder, definition, tree, "org/base")
    return str(folder)


def run(model: object, output: Path, to: Any, **changes: Any) -> Converted:
    return convert(ConvertConfig(model=str(model), output=str(output), to=to, **changes))


@pytest.mark.parametrize("name", NAMES)
def test_every_format_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, SIZE)
    source = native(problem, tmp_path / "n")
    expected = in_form(source_of(problem), None)
    ternary = problem.mode != "float"
    formats = ["hf-packed"] if ternary else ["hf-f32"]
    if problem.mode == "packed":  # Whose scales are exact in half precision.
        formats += ["gguf-tq1_0", "gguf-tq2_0"]
    for to in formats:
        output = tmp_path / (f"{to}.gguf" if to.startswith("gguf") else to)
        run(source, output, to)
        back = run(output, tmp_path / f"back-{to}", "native")
        found = open_source(back.output)
        if to.startswith("gguf"):
            # Tables are in half precision there.
            found = _with_tables_of(found, expected)
        assert_same_tensors(found, expected)
        if problem.mode != "master":
            same = (tmp_path / f"back-{to}" / "model.safetensors").read_bytes()
            exact = same == (tmp_path / "n" / "model.safetensors").read_bytes()
            assert exact or to.startswith("gguf")


def _with_tables_of(found: Any, expected: Any) -> Any:
    for name in ("embedding",) if expected.config.tied_head else ("embedding", "head"):
        half = expected.tensor(name).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found.tensor(name), half)

    class Tables:
        config, form = found.config, found.form
        linear = staticmethod(found.linear)

        @staticmethod
        def tensor(name: str, layer: int | None = None) -> np.ndarray:
            chosen = expected if name in ("embedding", "head") else found
            return chosen.tensor(name, layer)

    return Tables()


def test_masters_stay_masters_in_float_formats_and_are_packed_elsewhere(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-online", SIZE)
    source = native(problem, tmp_path / "n")
    run(source, tmp_path / "f", "hf-f32")
    assert_same_tensors(open_source(tmp_path / "f"), source_of(problem))
    run(tmp_path / "f", tmp_path / "p", "native")
    assert open_source(tmp_path / "p").form == "packed"


def test_sizes_count_every_bit_of_the_linears(tmp_path: Path) -> None:
    problem = make_problem("llama-bitlinear", SIZE)
    source = native(problem, tmp_path / "n")
    weights = problem.config.linear_parameters
    scales = 32 * 7 * problem.config.num_layers
    for to, bits in (("hf-packed", 2 + scales / weights), ("hf-bf16", 16), ("hf-f32", 32)):
        sizes = run(source, tmp_path / to, to).sizes
        assert sizes is not None
        assert sizes.bits_per_weight == pytest.approx(bits)
        files = sum(path.stat().st_size for path in (tmp_path / to).iterdir())
        assert sizes.total == files
    done = run(source, tmp_path / "m.gguf", "gguf-tq2_0")
    assert done.sizes is not None
    assert done.sizes.total == (tmp_path / "m.gguf").stat().st_size
    assert any("filled up with zeros" in note for note in done.notes)


def test_merging_into_ternary_weights_is_refused_with_the_reason(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SIZE)
    source, tree = native(problem, tmp_path / "n"), adapter(problem, tmp_path / "a")
    for to in ("native", "hf-packed", "gguf-tq1_0", "gguf-tq2_0"):
        output = tmp_path / "out" / f"{to}.gguf"
        output = output if to.startswith("gguf") else output.with_suffix("")
        with pytest.raises(FabricError, match=r"loses the adapter.*--to peft.*--reternarise"):
            run(source, output, to, adapter=tree)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf-f32", "gguf-f16"])
def test_a_dense_merge_is_the_sum_and_says_what_it_computes(to: str, tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SIZE)
    source, tree = native(problem, tmp_path / "n"), adapter(problem, tmp_path / "a")
    output = tmp_path / ("m.gguf" if to.startswith("gguf") else "m")
    done = run(source, output, to, adapter=tree)
    assert any("act_quant none" in note for note in done.notes)
    definition = define_decoder(problem.config, DecoderOptions(lora=LORA))
    merged = Merged(source=source_of(problem), lora=LORA, adapter=load_adapter(tree, definition))
    found = open_source(output, mode="float")
    assert (found.form, found.config.ternary) == ("float", False)
    for path in problem.config.linear_shapes:
        expected = merged.linear(path, 1)
        bound = np.abs(expected) * 2.0**-11 + 1e-7 if to == "gguf-f16" else 0
        assert np.all(np.abs(np.asarray(found.linear(path, 1), np.float32) - expected) <= bound)


@pytest.mark.oracle
def test_transformers_computes_the_dense_merge(tmp_path: Path, oracle: Any) -> None:
    torch, transformers = oracle("torch", "transformers")
    problem = make_problem("bitnet-relu2-offline", SIZE)
    source, tree = native(problem, tmp_path / "n"), adapter(problem, tmp_path / "a", std=0.05)
    run(source, tmp_path / "m", "hf-f32", adapter=tree)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = hf_oracle.run(model, problem.tokens)["logits"]
    options = DecoderOptions(lora=LORA, act_quant="none")
    definition = define_decoder(problem.config, options)
    decoder = definition.bind(problem.base(), load_adapter(tree, definition))
    ours = np.asarray(decoder.logits(decoder(*running.whole_rows(problem.tokens))))
    np.testing.assert_allclose(found, ours, rtol=0, atol=2e-5 * np.abs(ours).max())


def test_a_reternarised_merge_is_measured_on_what_is_written(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SIZE)
    source, tree = native(problem, tmp_path / "n"), adapter(problem, tmp_path / "a", std=0.4)
    (tmp_path / "t.txt").write_text("Not much of a text, but a text. " * 4)
    merge = {"adapter": tree, "reternarise": True, "text": str(tmp_path / "t.txt")}
    done = run(source, tmp_path / "m", "native", text_length=40, **merge)
    damage = done.damage
    assert damage is not None
    assert damage.positions == 32 * 4
    assert damage.kl_mean > 0.01
    assert damage.top1_agreement < 1
    assert damage.perplexity_base != damage.perplexity_after
    definition = define_decoder(problem.config, DecoderOptions(lora=LORA))
    expected = Reternarised(
        source=source_of(problem), lora=LORA, adapter=load_adapter(tree, definition)
    )
    assert_same_tensors(open_source(tmp_path / "m"), expected)


@pytest.mark.parametrize("name", ["bitnet-silu-offline", "llama-bitlinear"])
def test_adapters_go_to_gguf_and_back(name: str, tmp_path: Path) -> None:
    problem = make_problem(name, SIZE)
    source, tree = native(problem, tmp_path / "n"), adapter(problem, tmp_path / "a")
    run(source, tmp_path / "a.gguf", "gguf-adapter", adapter=tree)
    run(source, tmp_path / "b", "peft", adapter=str(tmp_path / "a.gguf"))
    lora = read_lora_config(tmp_path / "b", problem.config)
    assert lora == read_lora_config(tree, problem.config)
    assert lora == read_lora_config(tmp_path / "a.gguf", problem.config)
    definition = define_decoder(problem.config, DecoderOptions(lora=lora))
    ours = load_adapter(tree, definition)
    for other in (tmp_path / "b", tmp_path / "a.gguf"):
        again = load_adapter(other, definition)
        assert jax.tree.structure(again) == jax.tree.structure(ours)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(ours), strict=True):
            # The runtime knows one alpha: other scales go through B, rounded once each way.
            np.testing.assert_allclose(x, y, rtol=3e-7)


def test_layers_that_differ_are_said(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SIZE)
    source, tree = native(problem, tmp_path / "n"), adapter(problem, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"layers.0.self_attn.v_proj": 1} | config["alpha_pattern"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    done = run(source, tmp_path / "b", "peft", adapter=tree)
    assert len(done.notes) == 1
    assert "differ in rank or scale (v)" in done.notes[0]
    assert notes_on(tmp_path / "b") == []


def test_an_adapter_of_a_registered_size_needs_no_weights(tmp_path: Path) -> None:
    config = replace(make_problem("bitnet-silu-offline", SIZE).config, name="x")
    with pytest.raises(FabricError, match="weights are random"):
        run("bitnet-tiny", tmp_path / "m", "hf-packed")
    tree = adapter(
        replace(make_problem("bitnet-silu-offline", SIZE), config=config), tmp_path / "a"
    )
    with pytest.raises(FabricError, match="does not fit bitnet-tiny"):
        run("bitnet-tiny", tmp_path / "a.gguf", "gguf-adapter", adapter=tree)


def test_other_arithmetic_is_said(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SIZE)
    options = DecoderOptions(act_quant="block256")
    definition = define_decoder(problem.config, options)
    save_model(tmp_path / "n", definition, problem.base(), tokenizer_json=None)
    (note,) = run(tmp_path / "n", tmp_path / "m", "hf-packed").notes
    assert "act_quant block256" in note
    notes = run(tmp_path / "n", tmp_path / "b", "hf-bf16").notes
    assert any("bfloat16 rounds" in note for note in notes)
    notes = run(tmp_path / "n", tmp_path / "m.gguf", "gguf-q8_0").notes
    assert any("ternary types alone" in note for note in notes)


def test_squared_relu_in_gguf_is_warned_of(tmp_path: Path) -> None:
    source = native(make_problem("bitnet-relu2-offline", SIZE), tmp_path / "n")
    notes = run(source, tmp_path / "m.gguf", "gguf-tq2_0").notes
    assert any("SiLU" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "peft"}, "peft is a format of adapters"),
        ({"reternarise": True}, "Name one with --adapter"),
        ({"adapter": "a", "reternarise": True}, "has to be measured"),
        ({"text": "t"}, "only used to measure"),
        ({"text_length": 1}, "text_length out of range"),
        ({"shard_gb": 0.0}, "shard_gb out of range"),
    ],
)
def test_requests_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        ConvertConfig(**({"model": "m", "output": "o", "to": "native"} | changes))


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    problem = make_problem("bitnet-silu-offline", SIZE)
    source = native(problem, tmp_path / "n")
    tree = adapter(problem, tmp_path / "a")
    (tmp_path / "text.gguf").write_text("mine")
    run(source, tmp_path / "m.gguf", "gguf-f16")
    run(source, tmp_path / "hf", "hf-packed")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for output, to, given, message in [
        ("n", "native", {}, "is what is read"),
        (".", "native", {}, "is what is read"),
        ("n", "hf-packed", {}, "is what is read"),
        ("hf", "native", {}, "another format"),
        ("a", "native", {}, "holds other files"),
        ("a", "gguf-f16", {}, "ends in .gguf"),
        ("m.gguf", "native", {}, "is a folder"),
        ("text.gguf", "gguf-f16", {}, "is no GGUF file"),
        ("m.gguf", "gguf-adapter", {"adapter": tree}, "holds something else"),
        ("m.gguf/x.gguf", "gguf-f16", {}, "cannot write"),
    ]:
        with pytest.raises(FabricError, match=message):
            run(source, tmp_path / output, to, **given)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    run(source, tmp_path / "m.gguf", "gguf-q8_0")
    run(source, tmp_path / "hf", "hf-f32")


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    problem = make_problem("llama-bitlinear", SIZE)
    source = native(problem, tmp_path / "n")
    path = tmp_path / "n" / "model.safetensors"
    content = bytearray(path.read_bytes())
    where = content.index(b'"layers.mlp.up.weight"')
    start = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    offset = start["layers.mlp.up.weight"]["data_offsets"][0]
    content[8 + int.from_bytes(content[:8], "little") + offset] = 0xFF
    assert where > 0
    path.write_bytes(content)
    for to in ("hf-packed", "hf-f32", "gguf-tq2_0"):
        output = tmp_path / ("out.gguf" if to.startswith("gguf") else "out")
        with pytest.raises(FabricError, match="no packed ternary codes"):
            run(source, output, to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n"]


def test_the_base_loads_as_the_merge_was_measured(tmp_path: Path) -> None:
    """``assemble_base`` of the written folder is what ``measure_damage`` ran."""
    problem = make_problem("llama-bitlinear", SIZE)
    run(native(problem, tmp_path / "n"), tmp_path / "m", "hf-packed")
    source = open_source(tmp_path / "m")
    base = assemble_base(define_decoder(source.config, DecoderOptions()), source)
    for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(problem.base()), strict=True):
        np.testing.assert_array_equal(x, y)
