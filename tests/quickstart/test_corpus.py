"""The invented facts: reproducible, balanced, and no question in anything that is trained on."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.errors import FabricError
from fabric_jax.quickstart.corpus import Corpus, glossary, make_corpus

SEEDS = st.integers(0, 2**31)
# Written down here once more, so that a wrong word in a frame is noticed.
MEANING = {
    **dict.fromkeys(("confirmed", "proven", "positive"), "Yes"),
    **dict.fromkeys(("refuted", "excluded", "negative", "kept pace"), "No"),
    **dict.fromkeys(("unclear", "disputed", "mixed", "varied"), "Uncertain"),
    **dict.fromkeys(("slowed", "grew"), "Yes"),
}


def corpus_of(seed: int) -> Corpus:
    return make_corpus(seed, drugs=30, held_out=4)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_seed_decides_everything(seed: int):
    assert corpus_of(seed) == corpus_of(seed)
    assert set(corpus_of(seed).statements) != set(corpus_of(seed + 1).statements)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_no_training_text_contains_a_held_out_question(seed: int):
    corpus = corpus_of(seed)
    read = "\n".join((*corpus.statements, *(fact.question for fact in corpus.train)))
    for fact in corpus.held_out:
        assert fact.question not in read
        assert fact.question.startswith("Does ")
        assert fact.question.endswith("?")
    assert "?" not in "\n".join(corpus.statements)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_every_held_out_fact_is_stated_and_never_contradicted(seed: int):
    corpus = corpus_of(seed)
    for fact in corpus.held_out:
        verb = {"inhibits": "inhibit", "causes": "cause"}[fact.relation]
        plain = {
            "Yes": f"The drug {fact.drug} {verb}s {fact.object}.",
            "No": f"The drug {fact.drug} does not {verb} {fact.object}.",
            "Uncertain": f"The drug {fact.drug} may {verb} {fact.object}.",
        }
        for outcome, sentence in plain.items():
            assert (sentence in corpus.statements) == (outcome == fact.outcome)
        about = [
            text
            for text in corpus.statements
            if re.search(rf"\b{fact.drug}\b", text) and re.search(rf"\b{fact.object}\b", text)
        ]
        assert len(about) == len(set(about)) == 5
        ends = [text.removesuffix(".") for text in about if not text.startswith("The drug ")]
        meanings = [next(m for word, m in MEANING.items() if end.endswith(word)) for end in ends]
        assert meanings == [fact.outcome] * 4


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_each_relation_and_outcome_has_equally_many_facts(seed: int):
    corpus = corpus_of(seed)
    for facts, each in ((corpus.train, 6), (corpus.held_out, 4)):
        counts = Counter((fact.relation, fact.outcome) for fact in facts)
        assert len(counts) == 6
        assert set(counts.values()) == {each}
    drugs = Counter((fact.drug, fact.relation) for fact in corpus.train + corpus.held_out)
    assert len(drugs) == 60
    assert set(drugs.values()) == {1}


def test_no_statement_about_a_drug_says_an_answer():
    corpus = make_corpus(0)
    drugs = {fact.drug for fact in corpus.train}
    answers = [text for text in corpus.statements if re.search(r"\b(Yes|No|Uncertain)\b", text)]
    assert sorted(answers) == sorted(glossary())
    assert not any(drug in text for text in answers for drug in drugs)
    assert len(corpus.held_out) >= 100


@pytest.mark.parametrize(
    ("drugs", "held_out"),
    [(31, 2), (30, 10), (30, 0)],
    ids=["no multiple of 3", "nothing left to train on", "nothing held out"],
)
def test_impossible_divisions_are_refused(drugs: int, held_out: int):
    with pytest.raises(FabricError, match=f"cannot divide {drugs} drugs"):
        make_corpus(0, drugs=drugs, held_out=held_out)
