"""A run on a base whose tables are integers."""

from pathlib import Path

import pytest

from fabric_jax.training.loop import finetune
from tests.training.conftest import Configure
from tests.training.runs import metrics

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.xdist_group("training")]


@pytest.mark.parametrize(("dtype", "noise"), [("int8", 0.01), ("int4", 0.05)])
@pytest.mark.slow
def test_loss_stays_near_that_of_floats(
    configure: Configure, tmp_path: Path, dtype: str, noise: float
) -> None:
    losses: dict[str, list[float]] = {}
    for kind in ("same", dtype):
        config = configure(tmp_path / kind, embedding_dtype=kind, eval_every=4)
        finetune(config)
        losses[kind] = [line["loss"] for line in metrics(Path(config.output))]
    assert losses[dtype] == pytest.approx(losses["same"], rel=noise)
    assert losses[dtype] != losses["same"]
