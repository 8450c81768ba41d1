"""What the script that measures several GPUs does around its cases."""

import argparse
import os

import pytest

from experiments.scaling import run_process, scaling


def test_a_case_that_takes_too_long_is_stopped() -> None:
    """Before Python has imported jax: there is no case that is done in a tenth of a second."""
    found = run_process("bitnet-tiny:data=1", [], dict(os.environ), 0.1)
    assert found == {"failed": "stopped after 0 seconds"}


def test_a_case_that_fails_says_why() -> None:
    variables = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    found = run_process("no-such-model:data=1", [], variables, 120)
    assert "no-such-model" in found["failed"]


def test_scaling_is_a_quotient_of_what_was_measured() -> None:
    options = argparse.Namespace(models=["a", "b"], devices=2)
    cases = {
        "a:data=1": {"tokens_per_second": 100.0},
        "a:data=2": {"tokens_per_second": 190.0},
        "b:data=1": {"failed": "no memory"},
        "b:data=2": {"tokens_per_second": 50.0},
    }
    assert scaling(cases, options) == {"a": pytest.approx(1.9)}
