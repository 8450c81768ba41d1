"""What breaks a run, by the means that break it in earnest: limits of the system, bad numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fabric_jax.data.batch import Batch
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.training.command import flags
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.loop import finetune
from fabric_jax.training.optimizer import make_optimizer
from fabric_jax.training.step import init_state, make_train_step
from tests.training.conftest import Configure
from tests.training.runs import metrics, steps_saved

pytestmark = pytest.mark.xdist_group("training processes")

ROOT = Path(__file__).resolve().parents[2]
LIMITED = """
import resource, sys
from fabric_jax.cli.main import main
kind, size = getattr(resource, sys.argv[1]), int(sys.argv[2])
resource.setrlimit(kind, (size, size))
sys.exit(main(sys.argv[3:]))
"""


def limited(kind: str, size: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """``fabric-jax`` in a process under one of the system's limits."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(size), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_out_of_memory_names_the_need_and_three_ways_to_fit(
    configure: Configure, tmp_path: Path
) -> None:
    dataset = {"batch_size": 65536, "max_length": 64, "packing": False}
    config = configure(tmp_path / "run", dataset=dataset, max_steps=1, remat="none")
    run = limited("RLIMIT_AS", 6 << 30, ["finetune", *flags(config)])
    assert run.returncode == 2, run.stderr
    assert "out of memory: the job needs" in run.stderr
    assert re.search(r"--batch-size 32768 --accumulation 2 \([\d,]+ MiB\)", run.stderr)
    assert run.stderr.count(" MiB);") + run.stderr.count(" MiB). Checkpoints") == 3
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.long
def test_a_full_disk_at_any_size_leaves_nothing_half_written(
    configure: Configure, tmp_path: Path
) -> None:
    """No file may grow beyond a limit, which is raised until the run succeeds."""
    seen: set[int] = set()
    for size in (0, 1, 100, 1000, 4000, 10_000, 30_000, 100_000, 1_000_000):
        output = tmp_path / str(size)
        config = configure(output, max_steps=3, save_every=1, tensorboard=False)
        run = limited("RLIMIT_FSIZE", size, ["finetune", *flags(config)])
        seen.add(run.returncode)
        assert run.returncode in (0, 2), run.stderr
        if run.returncode == 2:
            assert "cannot" in run.stderr
            assert "Traceback" not in run.stderr
        for name in ("summary.json", "config.json", "adapter/adapter_model.safetensors"):
            file = output / name
            assert not file.exists() or file.stat().st_size > 0, f"{name} at {size}"
        # What is there can be continued, now that there is room.
        finetune(
            configure(output, max_steps=3, save_every=1, tensorboard=False, resume="auto"),
            console=Console(quiet=True),
        )
        assert [line["step"] for line in metrics(output)] == [1, 2, 3]
    assert seen == {0, 2}


def poisoned(definition: DecoderDefinition, value: float) -> Batch:
    """A batch whose loss is ``value``, by the weight of one target."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, definition.config.vocab_size, (1, 2, 16)), jnp.int32)
    ones = jnp.ones_like(tokens)
    mask = jnp.ones(tokens.shape, jnp.float32).at[0, 0, 3].set(value)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape)
    return Batch(
        tokens=tokens, targets=tokens, loss_mask=mask, segment_ids=ones, positions=positions
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_without_a_finite_loss_can_be_left_out(
    value: float, micro_definition: DecoderDefinition
) -> None:
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10)
    base = initialize_base(micro_definition, 0)
    step = make_train_step(micro_definition, optimizer, skip_nonfinite=True)
    state = init_state(initialize_adapter(micro_definition, 0), optimizer)
    fine, key = poisoned(micro_definition, 1.0), jax.random.key(0)
    state, _ = step(state, base, fine, key)
    before = jax.tree.map(np.array, (state.params, state.moments))
    state, bad = step(state, base, poisoned(micro_definition, value), key)
    assert not np.isfinite(float(bad.loss))
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves((state.params, state.moments)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert int(state.step) == 2
    state, good = step(state, base, fine, key)
    assert np.isfinite(float(good.loss))


def test_a_run_that_only_skips_ends_and_saves_nothing_bad(
    configure: Configure, tmp_path: Path, quiet: Console
) -> None:
    config = configure(
        tmp_path / "run",
        optimizer={"learning_rate": 1e30, "schedule": "constant", "warmup_steps": 1},
        save_every=1,
        nonfinite="skip",
        max_steps=40,
        epochs=40,
    )
    with pytest.raises(FabricError, match=r"diverged in step \d+"):
        finetune(config, console=quiet)
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter").exists()
    assert steps_saved(tmp_path / "run")
