from pathlib import Path

import jax
import pytest

from experiments.recipe_curves import RUNS, Settings, cells, config, run, verdict


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{n} and {n + 1} are neighbours"}}\n' for n in range(40)))
    settings = Settings(data=str(rows), tokenizer="", model="bitnet-tiny", steps=4, length=32)
    with jax.numpy_dtype_promotion("standard"):
        return run(settings)


@pytest.mark.slow
def test_every_step_of_every_run_has_a_loss(curves: dict[str, list[float]]) -> None:
    assert set(curves) == {f"{recipe}{seed}" for recipe, seed in RUNS}
    assert {len(curve) for curve in curves.values()} == {4}


@pytest.mark.slow
def test_two_and_1_6_bits_agree_and_int8_is_near(curves: dict[str, list[float]]) -> None:
    found = verdict(curves)
    assert found["a_equals_b"]
    assert 0 < max(found["c_from_a"].values()) < 0.05 * curves["A0"][0]


def test_the_recipes_differ_in_what_they_name(tmp_path: Path) -> None:
    runs = cells(config(Settings(data="d", tokenizer="t"), str(tmp_path)))
    assert runs["A0"].weights == "ternary2"
    assert runs["B0"].weights == "ternary1.6"
    assert runs["C1"].optimizer.moments == "int8"
    assert runs["C1"].embedding_dtype == "int8"
    assert runs["C2"].seed == runs["C2"].dataset.data_seed == 2
