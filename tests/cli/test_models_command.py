import json

import pytest

from fabric_jax.cli.output import bytes_text, count_text
from fabric_jax.models.registry import REGISTRY


def test_json_has_every_model_with_its_dimensions(fabric):
    outcome = fabric("models", "--json")
    assert outcome.code == 0
    listed = {row["name"]: row for row in json.loads(outcome.out)}
    assert list(listed) == list(REGISTRY)
    two = listed["bitnet-2b-4t"]
    # The count of the released checkpoint, and 30 layers' ternary weights by hand.
    assert two["parameters"] == 2_412_820_480
    linears = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 2560 * 6912)
    assert two["linear_parameters"] == linears
    assert two["bytes_linears"] == linears // 4 + 30 * 7 * 4
    assert two["bytes_embedding_and_head"] == 4 * 128256 * 2560
    assert two["bytes_f16"] == 2 * two["parameters"]
    for name, row in listed.items():
        if REGISTRY[name].ternary:
            assert 2 < row["bits_per_linear_weight"] < 2.001
        else:
            assert row["bits_per_linear_weight"] == 32


def test_embedding_is_counted_in_the_dtype_asked_for(fabric):
    listed = [
        json.loads(fabric("models", "--json", "--dtype", dtype).out)
        for dtype in ("float32", "bfloat16")
    ]
    for wide, narrow in zip(*listed, strict=True):
        assert wide["bytes_embedding_and_head"] == 2 * narrow["bytes_embedding_and_head"]
        packed = REGISTRY[wide["name"]].ternary
        assert wide["bytes_linears"] == (1 if packed else 2) * narrow["bytes_linears"]


def test_table_has_a_line_for_every_model(fabric):
    lines = fabric("models").out.splitlines()
    for name, config in REGISTRY.items():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert str(config.hidden_size) in line.split()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (12 << 20, "12.0 MiB"),
        (345 << 30, "345 GiB"),
    ],
)
def test_bytes_have_three_digits(count: int | None, text: str):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (1_800, "1.8k"), (128_400_000, "128.4M"), (12_850_000_000, "12.85B")],
)
def test_counts_have_a_letter(count: int, text: str):
    assert count_text(count) == text
