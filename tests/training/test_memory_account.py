"""The account of a job's memory: columns that are counted apart agree."""

from dataclasses import replace

import pytest

from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.measurement.step_scratch import predict_scratch
from fabric_jax.models.decoder import DecoderOptions
from fabric_jax.models.registry import get_config
from fabric_jax.training.config import OptimizerConfig
from fabric_jax.training.memory_account import (
    PUBLISHED,
    MemoryConfig,
    account,
    largest_that_fits,
)

SMALL = MemoryConfig(
    model="bitnet-125m", remat="layer", embedding_dtype="float16", lora=LoraConfig(rank=8)
)


@pytest.fixture(scope="module")
def compiled():
    return account(SMALL)


def test_the_arguments_of_the_compiled_step_are_the_analytic_arrays(compiled):
    arrays = compiled.arrays
    known = arrays.base + arrays.adapters + arrays.optimizer
    # Beside them only a batch of 128 positions, a key and counters.
    assert 0 <= compiled.compiled.arguments - known < 64 << 10


def test_analytic_and_compiled_totals_agree(compiled):
    assert compiled.analytic == pytest.approx(compiled.compiled.total, rel=0.15)
    assert compiled.measured is None


def test_the_packed_linears_take_two_bits_each(compiled):
    config = get_config("bitnet-125m")
    assert compiled.arrays.weights == config.linear_parameters // 4


def test_a_measured_job_peaks_above_its_arrays():  # the baseline is of this busy process
    config = replace(SMALL, model="bitnet-tiny", max_length=32, steps=2)
    found = account(config)
    assert found.measured is not None
    assert found.measured.steps == 2
    arrays = found.arrays
    assert found.measured.peak > arrays.base + arrays.adapters + arrays.optimizer
    assert found.measured.baseline > 0


def test_what_is_kept_grows_with_the_layers_and_the_rows():
    config = get_config("bitnet-1b")
    options = DecoderOptions(dtype="bfloat16", remat="layer")
    one = predict_scratch(config, options, rows=1, length=128, kernels=True)
    four = predict_scratch(config, options, rows=4, length=128, kernels=True)
    assert one.kept == config.num_layers * 128 * config.hidden_size * 2
    assert four.kept == 4 * one.kept
    kept = [
        predict_scratch(
            config, replace(options, remat=remat), rows=1, length=128, kernels=True
        ).kept
        for remat in ("offload", "layer", "int8-residuals", "linears", "none")
    ]
    assert kept == sorted(kept)


@pytest.mark.slow
def test_the_sizes_that_fit_are_the_smallest_ones():
    base = replace(SMALL, model="", fits=1.0)
    names = [name for name, _ in largest_that_fits(base)]
    assert names == list(PUBLISHED[: len(names)])
    assert 0 < len(names) < len(PUBLISHED)
    more = [name for name, _ in largest_that_fits(replace(base, fits=4.0))]
    assert len(more) > len(names)
    for name, size in largest_that_fits(base):
        assert size <= 2**30, name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "bitnet-125m", "fits": 4.0}, "--fits"),
        ({"model": ""}, "--model"),
        ({"max_length": 0}, "max_length"),
        ({"steps": -1}, "steps"),
        ({"lora": LoraConfig(rank=0)}, "rank"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change, text: str):
    with pytest.raises(FabricError, match=text):
        replace(SMALL, **change)


def test_rows_longer_than_the_model_allows_are_refused():
    with pytest.raises(FabricError, match="longer than"):
        account(replace(SMALL, max_length=1 << 20))


def test_the_optimizer_setting_reaches_the_account():
    small = replace(SMALL, compile=False, optimizer=OptimizerConfig(clip_norm=0.0))
    assert account(small).compiled is None
