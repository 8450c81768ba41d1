"""Answers by generation and by likelihood, on models whose answers are known."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fabric_jax.data.batch import Batch
from fabric_jax.data.config import DataConfig
from fabric_jax.data.load import load_evaluation
from fabric_jax.data.tokenize_rows import LabelledRow
from fabric_jax.data.tokenizer import byte_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.evaluation.accuracy import make_accuracy_task
from fabric_jax.evaluation.compare import compare
from fabric_jax.evaluation.likelihood import make_scorer
from fabric_jax.evaluation.questions import make_questions
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_adapter, initialize_base
from fabric_jax.models.registry import get_config

BYTES = byte_tokenizer()
CONFIG = dataclasses.replace(
    get_config("bitnet-tiny"), num_layers=1, hidden_size=64, ffn_size=32, num_heads=2,
    num_kv_heads=2, head_dim=32, vocab_size=259, max_length=64, tied_head=False, sub_norms=False,
)  # fmt: skip
RECORDS = [
    {"text": "Q: one?\nA: Yes. Rationale: so.", "label": "Yes", "question": "one?"},
    {"text": "Q: two two?\nA: No. Rationale: not.", "label": "No", "question": "two two?"},
    {"question": "three?", "answer": "Yes", "label": "Yes"},
    {"messages": [{"role": "user", "content": "4?"}, {"role": "assistant", "content": "Uncertain"}],
     "label": "Uncertain"},
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[LabelledRow, ...]:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    found = load_evaluation(DataConfig(data=str(path), shuffle=False), BYTES).labelled
    assert len(found) == len(RECORDS)
    return found


def automaton(follows: dict[str, str]):
    """A model that knows only which byte follows which: layers add nothing, the head looks up.

    ``follows`` maps a byte to the next; what has no entry is followed by end of text.
    """
    definition = define_decoder(CONFIG, DecoderOptions(mode="float"))
    base = jax.tree.map(jnp.zeros_like, initialize_base(definition, 0))
    embedding, head = np.zeros((2, 259, 64), np.float32)
    # Channel 0 is of all bytes without an entry, each other one has its own.
    embedding[:, 0], head[BYTES.eos_id, 0] = 1, 1
    for channel, (before, after) in enumerate(follows.items(), 1):
        embedding[ord(before), [0, channel]] = 0, 1
        head[ord(after), channel] = 1
    base["embedding"] = jnp.asarray(embedding)
    base["head"] = jnp.asarray(head)
    base["final_norm"]["gain"] = jnp.ones(64, jnp.float32)
    return definition, base


def test_generated_answers_are_scored_by_their_first_word(rows):
    # ":" leads to " no" and then to the end, whatever the question.
    definition, base = automaton({":": " ", " ": "n", "n": "o"})
    task = make_accuracy_task(definition, BYTES, rows, batch_size=3)
    result = task(base, {})
    assert result.answers == (" no",) * 4
    assert result.predictions == ("No",) * 4
    assert (result.scores.correct, result.scores.total) == (1, 4)
    assert result.scores.format_rate == 1.0
    assert result.scores.support == {"No": 1, "Uncertain": 1, "Yes": 2}


def test_answers_outside_the_classes_count_against_the_format(rows):
    definition, base = automaton({":": " ", " ": "n", "n": "i"})
    result = make_accuracy_task(definition, BYTES, rows)(base, {})
    assert result.answers == (" ni",) * 4
    assert result.predictions == (None,) * 4
    assert result.scores.accuracy == result.scores.format_rate == 0.0


def test_an_endless_word_is_cut_and_wrong(rows):
    definition, base = automaton({":": " ", " ": "n", "n": "o", "o": "o"})
    result = make_accuracy_task(definition, BYTES, rows)(base, {})
    # The longest class with its space has 10 bytes.
    assert result.answers == (" n" + "o" * 16,) * 4
    assert result.scores.format_rate == 0.0


@pytest.fixture(scope="module")
def random_model():
    options = DecoderOptions(lora=LoraConfig(rank=2))
    definition = define_decoder(dataclasses.replace(CONFIG, sub_norms=True), options)
    base = initialize_base(definition, 1)
    base["head"] *= jnp.float32(20)
    noise = np.random.default_rng(1)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(noise.normal(0, 0.5, x.shape), jnp.float32),
        initialize_adapter(definition, 1),
    )
    return definition, base, adapter


@pytest.fixture(scope="module")
def log_probability(random_model):
    """Of a continuation, from the logits of the whole sequence, summed in float64."""
    definition, base, adapter = random_model

    @jax.jit
    def logits(tokens):
        decoder = definition.bind(base, adapter)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))[0]

    def score(context, rest) -> float:
        tokens = np.zeros((1, CONFIG.max_length), np.int32)
        tokens[0, : len(context) + len(rest)] = [*context, *rest]
        rows = np.asarray(logits(tokens), np.float64)[len(context) - 1 :]
        log_p = rows - np.log(np.exp(rows).sum(1, keepdims=True))
        return sum(log_p[i, token] for i, token in enumerate(rest))

    return score


def test_scores_are_log_probabilities(random_model, log_probability):
    pairs = [([1, 2, 3], [4]), ([9] * 20, [5, 6, 7, 8]), ([7], [1, 2]), ([4, 4], [3, 2, 1])]
    scores = make_scorer(random_model[0])(*random_model[1:], pairs, 3)
    expected = [log_probability(*pair) for pair in pairs]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("by", ["likelihood", "likelihood_per_token"])
def test_the_likeliest_class_is_chosen(random_model, log_probability, rows, by):
    definition, base, adapter = random_model
    names = ("No", "Uncertain", "Yes")
    result = make_accuracy_task(definition, BYTES, rows, by=by, batch_size=5)(base, adapter)
    expected = []
    for row in rows:
        scores = []
        for name in names:
            rest = BYTES.encode(row.separator + name)
            score = log_probability(row.prompt_ids, rest)
            scores.append(score / len(rest) if by == "likelihood_per_token" else score)
        expected.append(names[int(np.argmax(scores))])
    assert result.predictions == tuple(expected)
    assert result.scores.format_rate == 1.0
    assert result.answers == ()


def test_questions_are_prompts_and_answers_as_trained(rows):
    questions = make_questions(rows, ("No", "Yes"), BYTES, 64)
    bos = (BYTES.bos_id,)
    assert questions[0].context == (*bos, *b"Q: one?\nA:")
    assert questions[0].continuations == (tuple(b" No"), tuple(b" Yes"))
    assert questions[2].context == (*bos, *b"Q: three?\nA:")
    # The default template spells begin-of-text itself.
    text = BYTES.decode(questions[3].context + questions[3].continuations[1])
    assert questions[3].context[:1] == bos
    assert text.endswith("Assistant: Yes")
    assert text.count("<|bos|>") == 1


def test_a_boundary_that_the_vocabulary_moves_is_found():
    """A prompt may end in a space that the vocabulary joins with the answer's first word."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["A: Yes", "A: No", "Q: x"] * 50, trainer)
    tokenizer = dataclasses.replace(
        BYTES, backend=backend, vocab_size=300, bos_id=None, add_bos=False
    )
    prompt = "Q: x\nA: "
    row = LabelledRow(
        prompt=prompt, prompt_ids=tuple(tokenizer.encode(prompt)), separator="", label="Yes"
    )
    question = make_questions([row], ("No", "Yes"), tokenizer, 64)[0]
    assert tokenizer.decode(question.context) == "Q: x\nA:"
    assert [tokenizer.decode(rest) for rest in question.continuations] == [" No", " Yes"]
    for rest, name in zip(question.continuations, ("No", "Yes"), strict=True):
        assert [*question.context, *rest] == tokenizer.encode(prompt + name)


def row(label: str, prompt: str = "Q: x?\nA:") -> LabelledRow:
    ids = tuple(BYTES.encode(prompt, add_special=True))
    return LabelledRow(prompt=prompt, prompt_ids=ids, separator=" ", label=label)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "two classes or more.*0 labelled rows of 0 classes"),
        ([row("Yes")] * 3, {}, "3 labelled rows of 1 classes"),
        ([row("Yes"), row("")], {}, "empty label"),
        ([row("very good"), row("very bad")], {}, "first word.*very bad.*likelihood"),
        ([row("Yes"), row("yes")], {}, "first word"),
        ([row("+"), row("no")], {}, "first word"),
        ([row("Yes"), row("No", "x" * 70)], {}, "row 1 .*at most 64 tokens; found 75"),
        ([row("Yes"), row("No")], {"by": "likelyhood"}, "Did you mean 'likelihood'"),
        ([row("Yes"), row("No")], {"batch_size": 0}, "batch_size"),
    ],
    ids=["none", "one-class", "empty", "words", "case", "signs", "long", "method", "batch"],
)
def test_impossible_tasks_are_refused(random_model, rows, options, message):
    with pytest.raises(FabricError, match=message):
        make_accuracy_task(random_model[0], BYTES, rows, **options)


def test_labels_of_several_words_work_by_likelihood(random_model):
    rows = [row("very good"), row("very bad")]
    task = make_accuracy_task(random_model[0], BYTES, rows, by="likelihood")
    assert set(task(*random_model[1:]).predictions) <= {"very good", "very bad"}


def batch() -> Batch:
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    return Batch(
        tokens=tokens,
        targets=tokens + 1,
        loss_mask=np.ones((2, 16), np.float32),
        segment_ids=np.ones((2, 16), np.int32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)),
    )


def test_base_and_adapter_side_by_side(random_model, rows):
    definition, base, adapter = random_model
    both = compare(
        definition, base, adapter, tokenizer=BYTES, batches=iter([batch()]), labelled=rows,
        by="likelihood",
    )  # fmt: skip
    plain = dataclasses.replace(definition.options, lora=LoraConfig(rank=0))
    bare = define_decoder(definition.config, plain)
    alone = compare(
        bare, base, {}, tokenizer=BYTES, batches=iter([batch()]), labelled=rows,
        by="likelihood",
    )  # fmt: skip
    assert alone.adapter is None
    assert both.adapter is not None
    assert both.base.perplexity.loss == pytest.approx(alone.base.perplexity.loss, rel=1e-6)
    assert both.base.accuracy.predictions == alone.base.accuracy.predictions
    assert both.adapter.perplexity.loss != both.base.perplexity.loss
    direct = make_accuracy_task(definition, BYTES, rows, by="likelihood")(base, adapter)
    assert both.adapter.accuracy.predictions == direct.predictions


def test_rows_that_are_no_task_are_refused_before_anything_is_computed(random_model, rows):
    definition, base, adapter = random_model
    batches, same = iter([batch()]), [row for row in rows if row.label == rows[0].label]
    with pytest.raises(FabricError, match="two classes"):
        compare(definition, base, adapter, tokenizer=BYTES, batches=batches, labelled=same)
    assert next(batches, None) is not None


def test_what_there_is_nothing_for_is_left_out(random_model):
    definition, base, adapter = random_model
    result = compare(definition, base, adapter, tokenizer=BYTES, batches=[batch()])
    assert result.base.accuracy is None
    assert result.adapter.accuracy is None
    assert result.base.perplexity is not None


def test_biomedical_rows_are_asked_as_they_are_written(shared_data):
    path = shared_data / "biomedqa" / "validation.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = load_evaluation(DataConfig(data=str(path)), BYTES).labelled
    assert [row.label for row in rows] == [record["label"] for record in records]
    assert [row.prompt for row in rows] == [f"Q: {record['question']}\nA:" for record in records]
