"""Runs that train all weights, by recipe: streams, resuming, packing, conversion."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import unpack_ternary2
from rich.console import Console

from fabric_jax.checkpoints.huggingface.write import write_huggingface
from fabric_jax.checkpoints.loading import load_base, open_source
from fabric_jax.checkpoints.native import load_model_folder, save_model
from fabric_jax.conversion import ConvertConfig
from fabric_jax.conversion.convert import convert
from fabric_jax.data.config import DataConfig
from fabric_jax.data.token_stream import TokenStream
from fabric_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.models.initialize import Tree, initialize_base
from fabric_jax.models.packing import pack_base
from fabric_jax.models.registry import REGISTRY
from fabric_jax.quantization.master_linear import weight_codes
from fabric_jax.quantization.ste_options import SteOptions
from fabric_jax.training.config import OptimizerConfig, PretrainConfig
from fabric_jax.training.loop import pretrain
from fabric_jax.training.pretrain import find_origin, pretrain_job
from fabric_jax.training.summary import Summary
from fabric_jax.training.train import unfinished_warmup
from tests.training.conftest import MICRO
from tests.training.runs import Crash, metrics

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]

ONE = replace(MICRO, name="one", num_layers=1)
WEIGHTS = "model/model.safetensors"
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "one", ONE)


def settings(text_rows: Path, output: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "model": "one",
        "output": str(output),
        "dataset": DataConfig(data=str(text_rows), eval_fraction=0.2, max_length=32, batch_size=2),
        "optimizer": OptimizerConfig(learning_rate=3e-3),
        "max_steps": 6,
        "eval_every": 3,
        "save_every": 2,
        "tensorboard": False,
        "samples": 0,
        "sample_tokens": 4,
    }
    return PretrainConfig(**(values | changes))


@pytest.fixture(scope="module")
def scratch(
    tmp_path_factory: pytest.TempPathFactory, text_rows: Path, compiled_once: None
) -> tuple[PretrainConfig, Summary]:
    """A run of six steps from random weights that nothing interrupted."""
    config = settings(text_rows, tmp_path_factory.mktemp("runs") / "scratch", samples=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "one", ONE)
        return config, pretrain(config, console=QUIET)


def logits(definition: DecoderDefinition, base: Tree) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 260, (2, 24)), jnp.int32)
    row = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), tokens.shape)
    decoder = definition.bind(base, {})
    return np.asarray(decoder.logits(decoder(tokens, row, jnp.ones_like(tokens))))


@pytest.mark.slow
def test_a_run_reports_bits_per_byte_and_writes_samples(
    scratch: tuple[PretrainConfig, Summary],
) -> None:
    config, summary = scratch
    evaluated = [line for line in metrics(Path(config.output)) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    index = json.loads((Path(config.output) / "corpus" / "index.json").read_text())
    held_out = index["splits"]["held_out"]
    # Bytes as tokens: one target a byte, and the end of each document.
    targets = held_out["text_bytes"] + held_out["documents"]
    assert held_out["tokens"] - held_out["documents"] == targets
    bits = summary.eval_loss_last * targets / np.log(2) / held_out["text_bytes"]  # pyright: ignore
    assert summary.eval_bits_per_byte_last == pytest.approx(bits, rel=1e-5)
    samples = (Path(config.output) / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [3, 6]


@pytest.mark.slow
def test_a_stream_that_crashed_twice_ends_in_the_same_weights(
    scratch: tuple[PretrainConfig, Summary],
    text_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(text_rows, tmp_path / "crashed", resume="auto")
    take = TokenStream.__next__
    for allowed in (3, 2):
        left = iter(range(allowed))

        def crashing(self: TokenStream, left: Any = left) -> Any:
            if next(left, None) is None:
                raise Crash
            return take(self)

        with monkeypatch.context() as patch:
            patch.setattr(TokenStream, "__next__", crashing)
            with pytest.raises(Crash):
                pretrain(config, console=QUIET)
    pretrain(config, console=QUIET)
    whole = Path(scratch[0].output)
    assert (tmp_path / "crashed" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert [line["step"] for line in metrics(tmp_path / "crashed")] == list(range(1, 7))


@pytest.mark.parametrize("to", ["ternary2", "hf", "gguf-tq2_0"])
def test_exported_models_compute_what_the_training_forward_computed(
    to: Any, scratch: tuple[PretrainConfig, Summary], tmp_path: Path
) -> None:
    config, _ = scratch
    job = pretrain_job(config, find_origin(config))
    _, masters = load_model_folder(Path(config.output) / "model")
    definition = job.definition
    expected = logits(definition, masters)
    output = tmp_path / ("packed.gguf" if to.startswith("gguf") else "packed")
    convert(ConvertConfig(model=config.output, output=str(output), to=to))
    loaded = load_base(output)
    assert loaded.definition.options.mode == "packed"
    assert expected.std() > 0.05
    for path, (_, k) in ONE.linear_shapes.items():
        block, name = path.split(".")
        forward, _ = weight_codes(masters["layers"][block][name]["weight"][0], SteOptions())
        codes = unpack_ternary2(loaded.base["layers"][block][name]["weight"][0], k)
        np.testing.assert_array_equal(codes, forward, err_msg=path)
    if to.startswith("gguf"):
        # The file holds tables and scales in float16: compared is what rounding leaves.
        definition, rounded = pack_base(definition, masters)
        rounded["embedding"] = rounded["embedding"].astype(jnp.float16).astype(jnp.float32)
        for path in ONE.linear_shapes:
            block, name = path.split(".")
            scale = loaded.base["layers"][block][name]["scale"]
            ours = rounded["layers"][block][name]
            np.testing.assert_allclose(scale, ours["scale"], rtol=2**-11)
            ours["scale"] = scale
        expected = logits(definition, rounded)
    np.testing.assert_allclose(logits(loaded.definition, loaded.base), expected, atol=1e-5)


def test_going_on_from_a_packed_model_leaves_its_forward_unchanged(
    micro_model: Path, text_rows: Path, tmp_path: Path
) -> None:
    config = settings(text_rows, tmp_path / "run", model=str(micro_model), recipe="continue")
    job = pretrain_job(config, find_origin(config))
    packed = load_base(micro_model)
    np.testing.assert_allclose(
        logits(job.definition, job.fresh()), logits(packed.definition, packed.base), atol=1e-5
    )


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.slow
def test_a_dense_checkpoint_is_converted_gradually(
    qk_norm: bool, text_rows: Path, tmp_path: Path
) -> None:
    dense = replace(
        ONE, ternary=False, sub_norms=False, tied_head=qk_norm, qk_norm=qk_norm, vocab_size=260
    )
    definition = define_decoder(dense, DecoderOptions(mode="float"))
    base = initialize_base(definition, 1)
    save_model(tmp_path / "dense", definition, base, tokenizer_json=None)
    write_huggingface(open_source(tmp_path / "dense"), tmp_path / "hf", packed=False)
    config = settings(
        text_rows,
        tmp_path / "run",
        model=str(tmp_path / "hf"),
        recipe="convert",
        quantization_warmup=4,
    )
    job = pretrain_job(config, find_origin(config))
    tokens = jnp.ones((1, 8), jnp.int32)
    row = jnp.arange(8, dtype=jnp.int32)[None]
    decoder = job.definition.bind(job.fresh(), {})
    start = decoder.logits(decoder(tokens, row, tokens, None, jnp.float32(0)))
    plain = definition.bind(base, {})
    np.testing.assert_allclose(start, plain.logits(plain(tokens, row, tokens)), atol=1e-5)
    if not qk_norm:  # One run is enough: the two families differ in what was compared above.
        assert pretrain(config, console=QUIET).steps == 6
        assert load_base(config.output).definition.options.mode == "packed"


def test_variants_beyond_packed_weights_say_so_at_export(text_rows: Path, tmp_path: Path) -> None:
    ste = SteOptions(weight_scale="channel", hadamard=True)
    config = settings(text_rows, tmp_path / "run", ste=ste)
    job = pretrain_job(config, find_origin(config))
    assert "will not be packed" in job.notes[0]
    job.export(tmp_path / "run" / "model", job.fresh())
    with pytest.raises(FabricError, match="a weight scale for each channel and an online Hadamard"):
        convert(ConvertConfig(model=config.output, output=str(tmp_path / "p"), to="native"))
    definition, base = load_model_folder(tmp_path / "run" / "model")
    assert definition.options.ste == ste
    assert np.isfinite(logits(definition, base)).all()


def test_supervised_fine_tuning_trains_all_weights_on_answers(
    micro_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "chat.jsonl"
    rows.write_text('{"question": "two and two", "answer": "four"}\n' * 8)
    config = settings(rows, tmp_path / "run", model=str(micro_model), recipe="sft")
    config = replace(config, dataset=replace(config.dataset, eval_fraction=0.0), max_steps=2)
    summary = pretrain(config, console=QUIET)
    assert summary.trained_parameters == summary.parameters
    # The answer, the space before it and the end of text.
    assert summary.trainable_tokens < 0.5 * summary.real_tokens
    fresh = pretrain_job(config, find_origin(config)).fresh()
    _, trained = load_model_folder(tmp_path / "run" / "model")
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), trained, fresh)
    assert all(jax.tree.leaves(moved))


def test_half_precision_computes_from_float32_masters(text_rows: Path, tmp_path: Path) -> None:
    config = settings(text_rows, tmp_path / "run", dtype="bfloat16")
    job = pretrain_job(config, find_origin(config))
    masters = job.fresh()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(masters)} == {"float32"}
    job.export(tmp_path / "run" / "model", masters)
    assert load_model_folder(tmp_path / "run" / "model")[0].options.dtype == "float32"
    packed = load_base(config.output, dtype="bfloat16", embedding_dtype="float32")
    # Codes and scales are the same and sums exact, in bfloat16 too.
    expected = logits(job.definition, masters)
    np.testing.assert_allclose(logits(packed.definition, packed.base), expected, atol=1e-5)


@pytest.mark.slow
def test_a_run_in_half_precision_learns(text_rows: Path, tmp_path: Path) -> None:
    config = settings(text_rows, tmp_path / "run", dtype="bfloat16", max_steps=40, z_loss=1e-4)
    config = replace(config, token_budget=40 * 64)
    summary = pretrain(config, console=QUIET)
    assert summary.steps == 40
    assert summary.loss_last < 0.8 * summary.loss_first  # pyright: ignore


@pytest.mark.parametrize(
    ("recipe", "model", "message"),
    [("convert", "packed", "ternary already"), ("continue", "dense", "is a dense model")],
)
def test_recipes_refuse_what_they_are_not_for(
    recipe: Any, model: str, message: str, micro_model: Path, text_rows: Path, tmp_path: Path
) -> None:
    definition = define_decoder(replace(ONE, ternary=False), DecoderOptions(mode="float"))
    folder = tmp_path / "dense"
    save_model(folder, definition, initialize_base(definition, 0), tokenizer_json=None)
    chosen = micro_model if model == "packed" else folder
    config = settings(text_rows, tmp_path / "run", model=str(chosen), recipe=recipe)
    with pytest.raises(FabricError, match=message):
        find_origin(config)


def dense_folder(folder: Path) -> str:
    """A dense model as a run without quantisers exports it."""
    definition = define_decoder(
        replace(ONE, ternary=False), DecoderOptions(mode="float", act_quant="none")
    )
    save_model(folder, definition, initialize_base(definition, 0), tokenizer_json=None)
    return str(folder)


def test_a_converted_model_has_quantised_activations(text_rows: Path, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense")
    config = settings(text_rows, tmp_path / "run", model=dense, recipe="convert")
    options = [
        pretrain_job(one, find_origin(one)).definition.options
        for one in (config, replace(config, act_quant="block256"))
    ]
    assert [one.act_quant for one in options] == ["per_token", "block256"]


def test_a_run_shorter_than_its_quantisation_says_so(text_rows: Path, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense")
    config = settings(text_rows, tmp_path / "run", model=dense, recipe="convert")
    said: list[str] = []
    for warmup, steps in ((8, 6), (6, 6), (5, 6)):
        job = pretrain_job(replace(config, quantization_warmup=warmup), find_origin(config))
        said.append(" ".join(unfinished_warmup(job, steps)))
    # The last of six steps is number 5 from 0.
    assert "grows over 8 steps" in said[0]
    assert "trains at 62% of it" in said[0]
    assert "trains at 83% of it" in said[1]
    assert not said[2]


def test_an_exported_model_brings_its_chat_template_and_end_of_turn(
    micro_model: Path, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    backend = byte_tokenizer().backend
    backend.save(str(tokenizer / "tokenizer.json"))
    special = {"bos_token": "<|bos|>", "eos_token": "<|pad|>", "add_bos_token": False}
    special["chat_template"] = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(special))
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    rows = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    config = settings(rows, tmp_path / "run", model=str(micro_model), recipe="sft")
    dataset = replace(config.dataset, eval_fraction=0.0, tokenizer=str(tokenizer))
    job = pretrain_job(replace(config, dataset=dataset), find_origin(config))
    for _ in range(2):  # An earlier export is replaced.
        job.export(tmp_path / "run" / "model", job.fresh())
    found = load_tokenizer(open_source(tmp_path / "run").tokenizer_source)
    expected = load_tokenizer(tokenizer)
    assert found.fingerprint == expected.fingerprint
    for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "chat_template"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompt": "x" * 5000, "samples": 1}, "beginning of the samples fills"),
        (
            {"act_quant": "block256", "ste": SteOptions(activations="int4-hybrid")},
            "a rule of their own; expected act_quant per_token; found block256",
        ),
    ],
    ids=["prompt", "int4"],
)
def test_settings_that_would_fail_late_or_count_for_nothing(
    changes: Any, message: str, text_rows: Path, tmp_path: Path
) -> None:
    config = settings(text_rows, tmp_path / "run", **changes)
    with pytest.raises(FabricError, match=message):
        pretrain_job(config, find_origin(config))


def test_a_model_that_is_taken_as_it_is_learns_no_vocabulary(
    micro_model: Path, text_rows: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"model": str(micro_model), "train_tokenizer": 300}
    config = settings(text_rows, tmp_path / "run", recipe="continue", **changes)
    with pytest.raises(FabricError, match=r"Leave out .*--train-tokenizer"):
        find_origin(config)
