"""Scores against their definitions."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_jax.evaluation.classification import classify, first_word, wilson_interval

Z_95 = 1.959963984540054  # 97.5th percentile of the normal distribution, from tables


def boundary(accepted, inside: float, outside: float) -> float:
    """Where ``accepted`` changes between a value that is and one that isn't."""
    for _ in range(100):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
    return inside


@given(trials=st.integers(1, 2000), data=st.data())
def test_wilson_interval_by_root_finding(trials, data):
    """Its ends are where the score test of the observed share is just not rejected."""
    successes = data.draw(st.integers(0, trials))
    share = successes / trials

    def accepted(p: float) -> bool:
        return (share - p) ** 2 <= Z_95**2 * p * (1 - p) / trials

    low, high = boundary(accepted, share, 0.0), boundary(accepted, share, 1.0)
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-9)


def test_wilson_interval_of_a_published_example():
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_scores_by_hand():
    gold = ["yes", "yes", "yes", "no", "no", "maybe"]
    answers = ["yes", "yes", "no", "no", None, "blue"]
    scores = classify(gold, answers)
    assert scores.labels == ("maybe", "no", "yes")
    np.testing.assert_array_equal(scores.confusion, [[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 2, 0]])
    assert (scores.total, scores.correct) == (6, 3)
    assert scores.accuracy == 0.5
    assert scores.format_rate == pytest.approx(4 / 6)
    # yes: precision 2/2, recall 2/3. no: precision 1/2, recall 1/2. maybe: never right.
    assert scores.f1 == pytest.approx({"maybe": 0.0, "no": 0.5, "yes": 0.8})
    assert scores.macro_f1 == pytest.approx((0.0 + 0.5 + 0.8) / 3)
    assert scores.support == {"maybe": 1, "no": 2, "yes": 3}


CLASSES = st.sampled_from("abc")


@given(st.lists(st.tuples(CLASSES, st.one_of(st.none(), CLASSES, st.just("z"))), min_size=1))
def test_f1_from_precision_and_recall(pairs):
    gold, answers = [g for g, _ in pairs], [a for _, a in pairs]
    scores = classify(gold, answers)
    for label in set(gold):
        hits = sum(g == a == label for g, a in pairs)
        recall = hits / gold.count(label)
        precision = hits / answers.count(label) if label in answers else 0.0
        expected = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert scores.f1[label] == pytest.approx(expected)
    assert scores.macro_f1 == pytest.approx(math.fsum(scores.f1.values()) / len(set(gold)))
    assert scores.accuracy == pytest.approx(np.mean([g == a for g, a in pairs]))
    assert scores.format_rate == pytest.approx(np.mean([a in set(gold) for a in answers]))


def test_scores_are_json():
    values = json.loads(json.dumps(classify(["a", "b"], ["a", None]).to_dict()))
    assert values["accuracy"] == 0.5
    assert values["confusion"] == [[1, 0, 0], [0, 0, 1]]
    assert values["accuracy_low"] < 0.5 < values["accuracy_high"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" Yes. Rationale: it does", "yes"),
        ("\n**NO**", "no"),
        ('"Uncertain",', "uncertain"),
        ("- yes", "yes"),
        ("yes/no", "yes/no"),
        ("Uncertainty", "uncertainty"),
        ("YESno", "yesno"),
        ("straße!", "strasse"),
        ("", ""),
        (" ... ", ""),
    ],
)
def test_first_word(text, word):
    assert first_word(text) == word
