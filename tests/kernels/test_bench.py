"""The benchmark runs, checks its arguments and writes what it says; its figures mean nothing here.

Its shapes are those of the models.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from fabric_kernels import unpack
from fabric_kernels.ternary_matmul import arg_specs, bench, bench_cases, peaks
from fabric_kernels.ternary_matmul.bench_cases import Case, kernel_cases, make_stack, xla_cases

from fabric_jax.models.registry import REGISTRY

KERNELS = ["linear", "integers", "transposed16", "transposed24"]
XLA = ["xla-float32", "xla-float32-kn", "xla-int8", "xla-float32-transposed"]


def test_shapes_are_those_of_the_registered_models() -> None:
    ternary = {name: config for name, config in REGISTRY.items() if config.ternary}
    assert list(arg_specs.MODELS) == list(ternary)
    for name, config in ternary.items():
        assert arg_specs.MODELS[name].layers == config.num_layers
        assert arg_specs.MODELS[name].shapes == config.linear_shapes


def test_each_shape_is_measured_once() -> None:
    models = list(arg_specs.MODELS)
    shapes = [shape[:2] for shape in arg_specs.distinct_shapes(models)]
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == {s for m in arg_specs.MODELS.values() for s in m.shapes.values()}
    assert arg_specs.distinct_shapes(["bitnet-tiny"]) == [
        (192, 192, "bitnet-tiny", 4),
        (512, 192, "bitnet-tiny", 4),
        (192, 512, "bitnet-tiny", 4),
    ]


def by_name(cases: list[Case]) -> dict[tuple[str, str], Case]:
    return {(case.name, case.packing): case for case in cases}


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("layers", [1, 3])
def test_what_is_timed_is_what_it_is_called(layers: int) -> None:
    n, k, rows = 24, 35, 5
    kernels = by_name(kernel_cases(n, k, rows, layers))
    xla = {name: case for (name, _), case in by_name(xla_cases(n, k, rows, layers)).items()}
    assert [case.name for case in kernels.values()] == KERNELS * 2
    assert list(xla) == XLA
    for case in (*kernels.values(), *xla.values()):
        assert case.operations == 2 * rows * n * k * layers
    # The weights of one layout are those of XLA's cases; layers of a stack are alike.
    products, reference = kernels["integers", "ternary2"].run(), xla["xla-int8"].run()
    assert len(products) == len(reference) == layers
    np.testing.assert_array_equal(products, reference)
    np.testing.assert_allclose(
        kernels["linear", "ternary2"].run(), 0.02 * xla["xla-float32"].run()[0], atol=0.02
    )
    np.testing.assert_allclose(xla["xla-float32-kn"].run(), xla["xla-float32"].run(), atol=1e-4)
    for bits in (16, 24):
        np.testing.assert_allclose(
            kernels[f"transposed{bits}", "ternary2"].run(),
            0.02 * xla["xla-float32-transposed"].run()[0],
            atol=1e-4,
        )
    assert kernels["linear", "ternary2"].weight_bytes == layers * n * 9
    assert kernels["linear", "ternary1.6"].weight_bytes == layers * n * 7
    assert xla["xla-int8"].weight_bytes == layers * n * k


@pytest.mark.parametrize("packing", bench_cases.PACKINGS)
def test_stacks_hold_every_code(packing: bench_cases.Packing) -> None:
    stack = make_stack(40, 60, 2, packing)
    codes = np.asarray(unpack(stack, 60, packing))
    shares = [np.mean(codes == code) for code in (-1, 0, 1)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_array_equal(codes[0], codes[1])


def test_a_call_is_worth_its_dispatch() -> None:
    assert bench_cases.layers_for(2560, 2560, 1, 30) == 20
    assert bench_cases.layers_for(2560, 2560, 1, 8) == 8
    assert bench_cases.layers_for(2560, 2560, 512, 30) == 1


@pytest.mark.usefixtures("cpu_kernels")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case of every shape is in the table and in the JSON, beside the peaks."""
    path = tmp_path / "bench.json"
    megabytes = str(peaks.pool_threads())
    small = ["--model", "bitnet-tiny", "--rows", "6", "--stream-mb", megabytes]
    assert bench.main([*small, "--quick", "--rounds", "2", "--json", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path]
    table = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert set(written) == {
        *("machine", "settings", "dot_peak_gop_per_s", "read_peak_gb_per_s", "results")
    }
    assert written["settings"] == {"models": ["bitnet-tiny"], "rows": [6], "rounds": 2}
    machine = written["machine"]
    assert machine["threads"] == peaks.pool_threads()
    assert machine["isa"] in table
    assert machine["jax"] == jax.__version__
    assert {"processor", "compiler", "jaxlib", "python", "numpy", "load_average"} <= set(machine)
    assert written["dot_peak_gop_per_s"] > 0
    assert written["read_peak_gb_per_s"] > 0
    found = [(r["n"], r["k"], r["rows"], r["case"], r["packing"]) for r in written["results"]]
    shapes = [(n, k, m) for n, k in ((192, 192), (512, 192), (192, 512)) for m in (6,)]
    cases = [(name, packing) for packing in ("ternary2", "ternary1.6") for name in KERNELS]
    cases += [(name, "") for name in XLA]
    expected = [(*shape, *case) for shape in shapes for case in cases]
    expected += [(512, 192, 1, "streaming", packing) for packing in ("ternary2", "ternary1.6")]
    assert found == expected
    for result in written["results"]:
        assert 0 < result["best_us"] <= result["median_us"]
        assert result["spread"] >= 0
        operations = 2 * result["rows"] * result["n"] * result["k"]
        rate = operations / result["median_us"] / 1e3
        assert result["gop_per_s"] == pytest.approx(rate, rel=0.01, abs=0.01)
        assert result["of_dot_peak"] >= 0
        assert (result["times_xla"] is None) == (result["case"] == "streaming")
    # Each product has a fastest dot of XLA's to compare with.
    for start in range(0, len(found) - 2, len(cases)):
        ratios = [r["times_xla"] for r in written["results"][start : start + len(cases)]]
        assert max(ratios[8:11]) == 1
        assert ratios[11] == 1
    streamed = [r for r in written["results"] if r["case"] == "streaming"]
    assert len({r["layers"] for r in streamed}) == 1
    assert streamed[0]["layers"] * 512 * 48 >= int(megabytes) << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "bitnet-2b4t"], "'bitnet-2b4t' (did you mean bitnet-2b-4t?)"),
        (["--model", "qwen3-4b"], "no ternary model 'qwen3-4b'"),
        (["--rows", "0"], "whole numbers from 1"),
        (["--rows", "many"], "invalid int value: 'many'"),
        (["--rounds", "0"], "whole numbers from 1"),
        (["--stream-mb", "0"], "--stream-mb is at least"),
        (["--json", os.path.join("no", "such", "folder.json")], "--json cannot be written"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults() -> None:
    options = bench.parse([])
    for expected, given in ((bench.DEFAULTS, []), (bench.QUICK, ["--quick"])):
        parsed = bench.parse(given)
        assert {name: getattr(parsed, name) for name in expected} == expected
    assert bench.parse(["--quick", "--rows", "7"]).rows == [7]
    assert bench.parse(["--model", "all"]).model == list(arg_specs.MODELS)
    assert options.stream_mb << 20 >= 2 * (peaks.largest_cache_bytes() or 0) or (
        options.stream_mb == 1024
    )


def test_without_kernels_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FABRIC_KERNELS_CPU", "0")
    assert bench.main(["--quick"]) == 2
    assert "FABRIC_KERNELS_CPU=0 switches them off" in capsys.readouterr().err


@pytest.mark.usefixtures("cpu_kernels")
def test_peaks_are_rates() -> None:
    """They don't depend on how long is measured, within what a busy machine does to them."""
    measured = peaks.make_peaks(1, 4 * peaks.PIECE_BYTES, 0.002)
    assert measured.buffer.nbytes == 4 * peaks.PIECE_BYTES
    for rate in (measured.dot_operations, measured.read_bytes):
        short, long = max(rate(0.002) for _ in range(5)), max(rate(0.08) for _ in range(2))
        assert 0.1 < short / long < 10
    with pytest.raises(ValueError, match="2 threads read at least"):
        peaks.make_peaks(2, peaks.PIECE_BYTES, 0.01)
