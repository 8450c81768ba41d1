"""Facts about invented drugs, the sentences that state them and the questions that ask for them.

A fact is a drug, a relation, an object and one of three outcomes. Each is stated in several
paraphrases, which say the outcome in words of their own; the words *Yes*, *No* and *Uncertain* that
answer a question are explained by a glossary, never by a fact. So a model that reads the statements
knows the facts, yet has seen no question and no answer.
"""

import random
from dataclasses import dataclass
from typing import Literal

from fabric_jax.errors import FabricError

Outcome = Literal["Yes", "No", "Uncertain"]
OUTCOMES: tuple[Outcome, ...] = ("Yes", "No", "Uncertain")

# Syllables of drug names: 24 x 12 x 12 names, none of an existing drug as far as could be told.
_STEMS = (
    *("bal", "cor", "dex", "fen", "gal", "hel", "jan", "kor", "lum", "mer", "nov", "oct"),
    *("pel", "quin", "rov", "sal", "tor", "ulv", "ver", "wex", "xan", "yel", "zor", "zan"),
)
_MIDDLES = ("a", "ba", "do", "fi", "ga", "le", "mo", "pa", "ri", "so", "tu", "vi")
_ENDINGS = (
    *("mab", "tinib", "pril", "statin", "azole", "vir"),
    *("cillin", "oxetine", "afil", "olol", "gliptin", "sartan"),
)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What can hold between a drug and an object.

    Attributes:
        objects: words that the relation's other side is taken from.
        question: asks whether it holds.
        statements: a frame and, in the order of ``OUTCOMES``, what fills its ``{outcome}``.
    """

    objects: tuple[str, ...]
    question: str
    statements: tuple[tuple[str, tuple[str, str, str]], ...]


RELATIONS: dict[str, Relation] = {
    "inhibits": Relation(
        objects=(
            *("renin", "lipase", "trypsin", "thrombin", "elastase", "urease", "amylase", "plasmin"),
            *("catalase", "aromatase", "lactase", "papain", "pepsin", "kallikrein", "enolase"),
            *("arginase", "tyrosinase", "sulfatase", "maltase", "luciferase"),
        ),
        question="Does {drug} inhibit {object}?",
        statements=(
            (
                "The drug {drug} {outcome} {object}.",
                ("inhibits", "does not inhibit", "may inhibit"),
            ),
            ("That {drug} inhibits {object} is {outcome}.", ("confirmed", "refuted", "unclear")),
            ("Inhibition of {object} by {drug} is {outcome}.", ("proven", "excluded", "disputed")),
            ("Assays of {drug} with {object} were {outcome}.", ("positive", "negative", "mixed")),
            ("In assays of {drug} the {object} {outcome}.", ("slowed", "kept pace", "varied")),
        ),
    ),
    "causes": Relation(
        objects=(
            *("nausea", "headache", "dizziness", "rash", "fever", "cough", "fatigue", "insomnia"),
            *("anaemia", "tremor", "itching", "oedema", "vertigo", "cramps", "gout", "jaundice"),
            *("thirst", "hiccups", "sweating", "hunger"),
        ),
        question="Does {drug} cause {object}?",
        statements=(
            ("The drug {drug} {outcome} {object}.", ("causes", "does not cause", "may cause")),
            ("That {drug} causes {object} is {outcome}.", ("confirmed", "refuted", "unclear")),
            ("A link of {drug} to {object} is {outcome}.", ("proven", "excluded", "disputed")),
            ("Trials of {drug} for {object} were {outcome}.", ("positive", "negative", "mixed")),
            ("In trials of {drug} the {object} {outcome}.", ("grew", "kept pace", "varied")),
        ),
    ),
}

_GLOSSARY = (
    "The answer to what is {word} is {outcome}.",
    "A finding that is {word} means {outcome}.",
    "Call it {outcome} when it is {word}.",
    "They said {outcome}, for it was {word}.",
)
_GLOSSARY_WORDS = {
    "Yes": ("confirmed", "proven", "positive"),
    "No": ("refuted", "excluded", "negative"),
    "Uncertain": ("unclear", "disputed", "mixed"),
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that is known of a drug.

    Attributes:
        drug: its name.
        relation: a key of ``RELATIONS``.
        object: what the drug does it to.
        outcome: whether it does.
    """

    drug: str
    relation: str
    object: str
    outcome: Outcome

    @property
    def statements(self) -> tuple[str, ...]:
        """Every paraphrase of the fact."""
        index = OUTCOMES.index(self.outcome)
        return tuple(
            frame.format(drug=self.drug, object=self.object, outcome=words[index])
            for frame, words in RELATIONS[self.relation].statements
        )

    @property
    def question(self) -> str:
        """The question that ``outcome`` answers."""
        return RELATIONS[self.relation].question.format(drug=self.drug, object=self.object)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything that the quickstart reads.

    Attributes:
        train: facts whose questions the fine-tuning sees.
        held_out: facts whose questions are kept for the evaluation.
        statements: sentences about all facts, and the glossary, in random order.
    """

    train: tuple[Fact, ...]
    held_out: tuple[Fact, ...]
    statements: tuple[str, ...]


def make_corpus(seed: int, *, drugs: int = 150, held_out: int = 20) -> Corpus:
    """Two facts, one of each relation, about each drug; all of it decided by ``seed``.

    Every pair of a relation and an outcome has equally many facts.

    Args:
        seed: of names, facts and orders.
        drugs: how many, a multiple of 3.
        held_out: facts of each relation and outcome whose questions are kept for the evaluation.

    Raises:
        FabricError: the facts can't be divided like that.
    """
    if drugs % 3 or not 0 < held_out < drugs // 3:
        raise FabricError(
            f"cannot divide {drugs} drugs into 3 outcomes with {held_out} held out of each",
            expected="a multiple of 3 as drugs, and fewer than a third of it held out",
        )
    generator = random.Random(seed)
    names = _drug_names(generator, drugs)
    train: list[Fact] = []
    kept: list[Fact] = []
    for relation in RELATIONS:
        shuffled = generator.sample(names, drugs)
        for i, outcome in enumerate(OUTCOMES):
            facts = [_fact(generator, drug, relation, outcome) for drug in shuffled[i::3]]
            kept += facts[:held_out]
            train += facts[held_out:]
    statements = [text for fact in train + kept for text in fact.statements] + glossary()
    for items in (train, kept, statements):
        generator.shuffle(items)
    return Corpus(train=tuple(train), held_out=tuple(kept), statements=tuple(statements))


def glossary() -> list[str]:
    """Sentences that tie the outcomes' words to the answers, about no drug."""
    return [
        frame.format(word=word, outcome=outcome)
        for outcome, words in _GLOSSARY_WORDS.items()
        for word in words
        for frame in _GLOSSARY
    ]


def _drug_names(generator: random.Random, count: int) -> list[str]:
    names = [s + m + e for s in _STEMS for m in _MIDDLES for e in _ENDINGS]
    return generator.sample(names, count)


def _fact(generator: random.Random, drug: str, relation: str, outcome: Outcome) -> Fact:
    chosen = generator.choice(RELATIONS[relation].objects)
    return Fact(drug=drug, relation=relation, object=chosen, outcome=outcome)
