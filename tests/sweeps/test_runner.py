"""The runner, with an experiment whose cells end in every way there is."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fabric_jax.cli.main import main
from fabric_jax.errors import FabricError
from fabric_jax.sweeps import process
from fabric_jax.sweeps.environment import (
    SharedDevices,
    chosen_variables,
    process_environment,
    recorded_variables,
)
from fabric_jax.sweeps.experiment import JOBS_VARIABLE, TURN_VARIABLE, load_experiment, own_turn
from fabric_jax.sweeps.identity import code_digest, own_sources
from fabric_jax.sweeps.records import Record, read_folder
from fabric_jax.sweeps.runner import SweepOptions, plan

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def sweep(out: Path, *words: str) -> int:
    return main(["sweep", "toy_experiment", "--platform", "cpu", "--out", str(out), *words])


def by_name(out: Path) -> dict[str, Record]:
    return {record.name: record for _, record in read_folder(out)}


def test_every_ending_is_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.1)
    code = sweep(
        tmp_path,
        *("number=1", "--timeout", "4", "--memory-gib", "0.35", "--jobs", "4"),
        *("--bundle", str(tmp_path / "all" / "b.jsonl")),
    )
    assert code == 1  # cells crashed
    found = {r.cell["how"]: r for r in by_name(tmp_path / "all").values()}
    assert {how: record.status for how, record in found.items()} == {
        "well": "ok",
        "signal": "crash",
        "raises": "crash",
        "device_memory": "out_of_memory",
        "host_memory": "out_of_memory",
        "never": "unsupported",
        "slow": "timeout",
        "nothing": "crash",
        "leaves": "crash",
        "nan": "crash",
        "thread": "ok",
    }
    assert found["well"].metrics == {"value_seconds": 1.5}
    assert found["signal"].detail is not None
    assert "SIGSEGV" in found["signal"].detail
    assert found["raises"].detail == "ValueError: a reason"
    assert "NoneType instead of a dict" in (found["nothing"].detail or "")
    assert "losses; expected a finite number" in (found["nan"].detail or "")
    assert found["leaves"].detail == "the process ended before measure() did"
    assert "11 records" in capsys.readouterr().out


def test_a_record_is_kept_until_it_is_asked_for_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("how=well", f"log={log}")
    assert sweep(tmp_path / "out", *words) == 0
    assert sweep(tmp_path / "out", *words) == 0
    assert log.read_text().splitlines() == ["1", "2"]

    # Records of other code are kept and said to be stale.
    for path in (tmp_path / "out" / "toy_experiment").glob("*.json"):
        path.write_text(path.read_text().replace('"code": "', '"code": "0'))
    options = SweepOptions(
        experiment="toy_experiment", platform="cpu", out=str(tmp_path / "out"), overrides=words
    )
    assert [task.state for task in plan(options)[1]] == ["stale", "stale"]
    assert sweep(tmp_path / "out", *words, "number=2", "--rerun", "stale") == 0
    assert [task.state for task in plan(options)[1]] == ["stale", "kept"]
    assert log.read_text().splitlines() == ["1", "2", "2"]


def test_a_killed_sweep_goes_on_without_repeating_a_cell(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    command = [
        *(sys.executable, "-m", "fabric_jax.cli.main", "sweep", "toy_experiment"),
        *("--platform", "cpu", "--out", str(out), "how=well", "number=1"),
        *("maybe=1,2,3,4,5,6,7,8", "seconds=0.1", f"log={log}"),
    ]
    paths = os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths}
    dice = random.Random(0)
    for begun in (2, 5):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while not log.exists() or len(log.read_text().split()) < begun:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {str(record.cell["maybe"]) for record in by_name(out).values()}
    measured = log.read_text().split()
    subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)

    assert 0 < len(done) < 8
    assert {r.cell["maybe"] for r in by_name(out).values()} == set(range(1, 9))
    again = set(log.read_text().split()[len(measured) :])
    assert not again & done
    # At most the cell that was being measured began a second time.
    assert len(log.read_text().split()) <= 8 + 2


def test_a_record_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    words = ("how=well", "number=1", "seconds=0.5")
    assert sweep(tmp_path, *words) == 0
    (path,) = (tmp_path / "toy_experiment").glob("*.json")
    before = path.read_bytes()
    paths = os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "fabric_jax.cli.main", "sweep", "toy_experiment"]
    command += ["--platform", "cpu", "--out", str(tmp_path), "--rerun", "all", *words]
    log = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    )
    assert log.stderr is not None
    log.stderr.readline()  # the sweep has begun
    time.sleep(0.2)
    log.send_signal(signal.SIGKILL)
    log.communicate()
    assert path.read_bytes() == before
    # One that fails takes its place all the same.
    assert sweep(tmp_path, "how=raises", "number=1", "seconds=0.5") == 1
    assert sweep(tmp_path, *words, "--rerun", "all", "--timeout", "0.2") == 0
    assert [r.status for n, r in by_name(tmp_path).items() if "well" in n] == ["timeout"]


def test_the_code_of_an_experiment_is_also_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lab").mkdir()
    sources = {
        "lab/one.py": "import json\nfrom lab import two\n",
        "lab/two.py": "def later():\n    from .three import x\n",
        "lab/three.py": "x = 1\n",
        "lab/other.py": "",
        "single.py": "import beside\nimport lab.one\n",
        "beside.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    names = {m: {p.name for p in own_sources(m)} for m in ("lab.one", "single")}
    assert names == {
        "lab.one": {"one.py", "two.py", "three.py"},
        "single": {"single.py", "beside.py"},
    }
    before = code_digest("lab.one")
    (tmp_path / "lab/other.py").write_text("x = 2\n")
    assert code_digest("lab.one") == before
    (tmp_path / "lab/three.py").write_text("x = 2\n")
    assert code_digest("lab.one") != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nowher", None),
        ("FIGURE = {'x': 'a'}", "expected a fabric_jax.sweeps.Figure"),
        ("FIGURE = Figure(x='a', y='b', kind='pie')", "unknown kind of a figure"),
        ("FIGURE = Figure(x='a', y='b', series='c')", "unknown series"),
        ("FIGURE = Figure(x='a', y='b', log='x')", "a is no number"),
    ],
)
def test_a_wrong_experiment_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str | None
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = '"""Why?"""\nfrom dataclasses import dataclass\nfrom fabric_jax.sweeps import Figure\n'
    text += "@dataclass(frozen=True)\nclass C:\n    a: str = 'a'\nconfig = C\n"
    text += f"cells = lambda base: [base]\nmeasure = lambda cell: {{}}\n{source}\n"
    # A module that isn't there may begin as the experiment's name does.
    name = f"nowhere_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(FabricError if message else ModuleNotFoundError, match=message or "nowher"):
        load_experiment(name)


@pytest.mark.parametrize("name", ["", "./toy_experiment.py", "toy_experiment.py", "a/b.py"])
def test_an_experiment_is_a_module(name: str) -> None:
    with pytest.raises(FabricError, match="no experiment"):
        load_experiment(name)


def test_names_of_reports_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lossless.py").write_text((HERE / "toy_experiment.py").read_text())
    with pytest.raises(FabricError, match="Rename"):
        load_experiment("lossless")


def test_damaged_records_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "how=well", "number=1") == 0
    (path,) = (tmp_path / "toy_experiment").glob("*.json")
    good = json.loads(path.read_text())
    for broken, message in (
        ("{", "no JSON"),
        (b"\xff", "no JSON"),
        (json.dumps(good | {"figure": {"x": 1}}), "fields of a Figure"),
        ("[]", "no record"),
        (json.dumps(good | {"schema": 7}), "another schema"),
        (json.dumps(good | {"status": "fine"}), "expected one of ok"),
        (json.dumps(good | {"seconds": "2"}), "seconds; expected a number"),
        (json.dumps(good | {"extra": 1}), "has no 'extra'"),
        (json.dumps({k: v for k, v in good.items() if k != "cell"}), "lacks 'cell'"),
    ):
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        with pytest.raises(FabricError, match=message):
            read_folder(tmp_path)
    assert sweep(tmp_path, "how=well", "number=1") == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["numbr=1"], "number"),
        (["number=one"], "a whole number"),
        (["number"], "key=value"),
        (["number=3"], "no cell has number=3"),
        (["number=1", "number=2"], "twice"),
    ],
)
def test_wrong_overrides(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_overrides_are_typed_and_become_axes(tmp_path: Path) -> None:
    options = SweepOptions(
        experiment="toy_experiment",
        platform="cpu",
        out=str(tmp_path),
        overrides=("how=well", "number=2", "names=a,b+c", "maybe=none,4", "seconds=0.5"),
    )
    cells = [task.cell for task in plan(options)[1]]
    assert [(c.names, c.maybe) for c in cells] == [
        (("a",), None),
        (("a",), 4),
        (("b", "c"), None),
        (("b", "c"), 4),
    ]
    assert {c.seconds for c in cells} == {0.5}
    # The command in a record selects that cell alone.
    for task in plan(options)[1]:
        words = task.draft.command.split("--out DIR ")[1].split()
        again = SweepOptions(
            experiment="toy_experiment",
            platform="cpu",
            out=str(tmp_path),
            overrides=tuple(word.strip("'") for word in words),
        )
        assert [other.draft.digest for other in plan(again)[1]] == [task.draft.digest]


def test_a_platform_must_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "toy_experiment", "--platform", "gpu", "--out", str(tmp_path)]) == 2
    assert "cuda" in capsys.readouterr().err
    assert main(["sweep", "toy_experimen", "--out", str(tmp_path)]) == 2
    assert "no experiment" in capsys.readouterr().err


def test_cells_share_a_device_by_their_fractions() -> None:
    device, running, most = SharedDevices(4), [0.0], [0.0]
    lock = threading.Lock()

    def run(fraction: float) -> None:
        variables = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(fraction),
        }
        with device.share(variables):
            with lock:
                running[0] += fraction
                most[0] = max(most[0], running[0])
            time.sleep(0.02)
            with lock:
                running[0] -= fraction

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [0.3, 0.3, 0.5, 0.2, 0.9, 0.1, 0.4]))
    assert 0.5 < most[0] <= 0.9 + 1e-9


def test_what_is_timed_takes_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def run(_: int) -> None:
        with own_turn():
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.02)
            with lock:
                running[0] -= 1

    for path, expected in (("", 4), (str(tmp_path / ".turn"), 1)):
        monkeypatch.setenv(TURN_VARIABLE, path)
        most[0] = 0
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(8)))
        assert most[0] == expected


def test_sweeps_that_were_started_together_say_how_many_cells_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(JOBS_VARIABLE, "16")
    assert chosen_variables("cuda", {}, "", 2)[JOBS_VARIABLE] == "16"
    monkeypatch.delenv(JOBS_VARIABLE)
    assert JOBS_VARIABLE not in chosen_variables("cuda", {}, "")


def test_each_device_has_a_cell_at_a_time(tmp_path: Path) -> None:
    """Processes that last, each on the device that it was told; the toy never touches it."""
    command = ["sweep", "toy_devices", "--platform", "cuda", "--out", str(tmp_path)]
    assert main([*command, "--devices", "0,3"]) == 0
    found = [record for _, record in read_folder(tmp_path)]
    assert len(found) == 6
    times: dict[str, list[tuple[float, float]]] = {}
    for record in found:
        device = record.metrics["device"]
        assert record.environment["CUDA_VISIBLE_DEVICES"] == device
        assert record.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert record.metrics["alone"]
        times.setdefault(device, []).append((record.metrics["began"], record.metrics["ended"]))
    assert set(times) == {"0", "3"}
    for spans in map(sorted, times.values()):
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    # Both at once: cells of one overlap cells of the other.
    assert any(a[0] < b[1] and b[0] < a[1] for a in times["0"] for b in times["3"])


def test_devices_and_shares_go_together() -> None:
    devices = SharedDevices(2, ("0", "1"))
    half = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(devices.share(half)) for _ in range(4)]
    assert given == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--platform", "cpu", "--devices", "0,1"], "on cuda alone"),
        (["--platform", "cuda", "--devices", "0,0"], "named once"),
        (["--platform", "cuda", "--devices", "0,"], "named once"),
    ],
)
def test_wrong_devices(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "toy_experiment", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_a_process_is_told_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cuda = chosen_variables("cuda", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}, "cache")
    assert process_environment(cuda)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.1"
    assert cuda["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    # What a shell has set besides is kept, and said; paths are only said to be there.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/a/folder")
    monkeypatch.setenv("FABRIC_KERNELS_ISA", "avx2")
    assert process_environment(cuda)["FABRIC_KERNELS_ISA"] == "avx2"
    recorded = recorded_variables(cuda | {"JAX_COMPILATION_CACHE_DIR": "cache"})
    assert recorded["FABRIC_KERNELS_ISA"] == "avx2"
    assert recorded_variables({})["JAX_COMPILATION_CACHE_DIR"] == "set"
    assert recorded["JAX_COMPILATION_CACHE_DIR"] == "set"
    assert "JAX_PLATFORMS" not in recorded_variables({})
    tpu = chosen_variables("tpu-v5e", {}, "")
    assert process_environment(tpu)["FABRIC_KERNELS_CPU"] == "0"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in process_environment(tpu)


def test_kills_by_the_system_are_counted_outside_of_containers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\n")
    (tmp_path / "events").write_text("low 0\noom 2\noom_kill 1\noom_group_kill 7\n")
    places = [str(tmp_path / name) for name in ("vmstat", "events", "missing")]
    for chosen, expected in ((places[:1], 3), (places, 4), (places[2:], 0)):
        monkeypatch.setattr(process, "OOM_COUNTERS", chosen)
        assert process.oom_kills() == expected
