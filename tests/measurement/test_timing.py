import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_jax.measurement.timing import summarize, time_repeated


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_quartiles_are_numpys(seconds: list[float]):
    timing = summarize(seconds)
    expected = np.percentile(np.asarray(seconds, np.float64), [25, 50, 75])
    np.testing.assert_allclose([timing.low, timing.median, timing.high], expected, rtol=1e-12)
    assert timing.spread == pytest.approx((expected[2] - expected[0]) / expected[1])
    assert (timing.fastest, timing.count) == (min(seconds), len(seconds))


def test_no_durations_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_warm_up_runs_but_does_not_count():
    calls: list[int] = []

    def call():
        calls.append(1)
        return jnp.ones(3) * 2

    timing = time_repeated(call, repeats=4, warmup=3)
    assert len(calls) == 7
    assert timing.count == 4
    assert timing.median > 0
