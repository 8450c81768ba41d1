"""Training of all weights in processes that are killed and resumed."""

import random
import signal
import time
from pathlib import Path

import pytest

from fabric_jax.data.config import DataConfig
from fabric_jax.training.command import flags
from fabric_jax.training.config import PretrainConfig
from tests.training.runs import metrics
from tests.training.test_kill_resume import Run, wait_for_step

pytestmark = pytest.mark.xdist_group("training processes")


def configure(output: Path, rows: Path, steps: int) -> PretrainConfig:
    return PretrainConfig(
        model="bitnet-tiny",
        num_layers=1,
        output=str(output),
        dataset=DataConfig(data=str(rows), eval_fraction=0.1, max_length=32, batch_size=2),
        token_budget=steps * 64,
        eval_every=7,
        save_every=4,
        tensorboard=False,
        samples=0,
        resume="auto",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_a_run_that_was_killed_ends_in_the_same_weights(
    kills: int, text_rows: Path, tmp_path: Path, programs: Path
) -> None:
    """Moments are drawn from the steps, and from the time after the start: some hit loading."""
    draw, steps = random.Random(kills), 20 * kills
    words = flags(configure(tmp_path / "whole", text_rows, steps))
    whole = Run(words, programs, tmp_path / "whole.log", "pretrain")
    assert whole.wait() == 0, whole.text
    output = tmp_path / "killed"
    words = flags(configure(output, text_rows, steps))
    for number in range(kills):
        run = Run(words, programs, tmp_path / f"{number}.log", "pretrain")
        if number % 2:
            time.sleep(draw.uniform(0.0, 4.0))
        else:
            wait_for_step(run, output, draw.randint(1, (number + 1) * steps // (kills + 1)))
            time.sleep(draw.uniform(0.0, 0.05))
        run.process.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, f"ended before it was killed:\n{run.text}"
    last = Run(words, programs, tmp_path / "last.log", "pretrain")
    assert last.wait() == 0, last.text
    weights = "model/model.safetensors"
    assert (output / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert [line["step"] for line in metrics(output)] == list(range(1, steps + 1))
