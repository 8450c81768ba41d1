import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_jax.checkpoints.train_state import TrainCheckpoints
from fabric_jax.errors import FabricError

IDENTITY = {"model": {"name": "m", "hidden_size": 6}, "lora": {"rank": 4, "targets": ("q", "k")}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-2)))


def make_params(seed: int, rank: int = 4):
    a, b = jax.random.split(jax.random.key(seed))
    linear = {
        "a": jax.random.normal(a, (2, rank, 6)),
        "b": jax.random.normal(b, (2, 6, rank)),
    }
    return {"layers": {"attention": {"q": {"lora": linear}}}, "gain": jnp.float32(seed)}


def make_state(seed: int, rank: int = 4, optimizer=OPTIMIZER):
    """Parameters, and moments that are no longer zero."""
    params = make_params(seed, rank)
    return update(params, optimizer.init(params), optimizer)


def update(params, moments, optimizer=OPTIMIZER):
    # optax mixes dtypes in its bias correction.
    with jax.numpy_dtype_promotion("standard"):
        grads = jax.tree.map(jnp.sin, params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def reports():
    return []


@pytest.fixture
def open_checkpoints(tmp_path, reports):
    opened = []

    def open_(folder=tmp_path / "run", *, keep_last=2, identity=IDENTITY):
        checkpoints = TrainCheckpoints(
            folder, keep_last=keep_last, identity=identity, report=reports.append
        )
        opened.append(checkpoints)
        return checkpoints

    yield open_
    for checkpoints in opened:
        checkpoints.close()


def save(checkpoints, step, *, metric=None, state=None):
    params, moments = state or make_state(step)
    checkpoints.save(
        step, params, moments, data_state={"row": 7 * step}, meta={"n": step}, metric=metric
    )


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_state_returns_bit_for_bit(open_checkpoints):
    first = open_checkpoints()
    save(first, 3)
    first.close()
    params, moments = make_state(0)
    restored = open_checkpoints().restore(params, moments)
    assert restored.step == 3
    assert restored.data_state == {"row": 21}
    assert restored.meta == {"n": 3}
    assert_same_bits((restored.params, restored.moments), make_state(3))


def test_training_continues_as_if_never_stopped(open_checkpoints):
    step = jax.jit(lambda state: update(*state), donate_argnums=0)
    state, straight = make_state(1), make_state(1)
    for _ in range(4):
        straight = step(straight)
    for _ in range(2):
        state = step(state)
    first = open_checkpoints()
    save(first, 2, state=state)
    first.close()
    restored = open_checkpoints().restore(*jax.eval_shape(lambda: make_state(1)))
    state = (restored.params, restored.moments)
    for _ in range(2):
        state = step(state)
    assert_same_bits(state, straight)


def test_buffers_may_be_donated_while_the_save_runs(open_checkpoints):
    destroy = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints = open_checkpoints()
    for step in (1, 2, 3):
        params, moments = make_state(step)
        save(checkpoints, step, state=(params, moments))
        jax.block_until_ready(destroy((params, moments)))
        assert any(leaf.is_deleted() for leaf in jax.tree.leaves((params, moments)))
    restored = checkpoints.restore(*make_state(0))
    assert_same_bits((restored.params, restored.moments), make_state(3))


def test_restored_arrays_can_be_donated(open_checkpoints):
    checkpoints = open_checkpoints()
    save(checkpoints, 1)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    restored = checkpoints.restore(*make_state(0))
    doubled = double(restored.params)
    assert_same_bits(doubled, jax.tree.map(lambda x: x + x, make_state(1)[0]))
    assert_same_bits(checkpoints.restore(*make_state(0)).params, make_state(1)[0])


def test_optimizer_without_arrays(open_checkpoints):
    plain = optax.sgd(0.1)
    params, moments = make_state(2, optimizer=plain)
    assert not jax.tree.leaves(moments)
    checkpoints = open_checkpoints()
    save(checkpoints, 2, state=(params, moments))
    restored = checkpoints.restore(params, moments)
    assert_same_bits((restored.params, restored.moments), (params, moments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32"])
def test_dtypes(open_checkpoints, dtype):
    params = {"x": jax.random.normal(jax.random.key(0), (3, 5)).astype(dtype)}
    checkpoints = open_checkpoints()
    save(checkpoints, 1, state=(params, (jnp.zeros((), dtype),)))
    restored = checkpoints.restore(params, (jnp.zeros((), dtype),))
    assert_same_bits((restored.params, restored.moments), (params, (jnp.zeros((), dtype),)))


def test_arrays_without_elements(open_checkpoints):
    params = {"full": jnp.ones(3), "empty": jnp.zeros((0, 5), jnp.bfloat16)}
    checkpoints = open_checkpoints()
    save(checkpoints, 1, state=(params, {}))
    assert_same_bits(checkpoints.restore(params, {}).params, params)


def test_nothing_saved_yet(open_checkpoints):
    checkpoints = open_checkpoints()
    assert checkpoints.restore(*make_state(0)) is None
    assert checkpoints.latest_step() is None
    assert checkpoints.best_step() is None


@pytest.mark.parametrize(
    ("metrics", "kept", "best"),
    [
        ([3.0, 1.0, 2.0, 5.0, 4.0], [2, 4, 5], 2),
        ([3.0, 1.0, 2.0, 5.0, 0.5], [4, 5], 5),
        ([None, None, 2.0, None, None], [3, 4, 5], 3),
        ([None] * 5, [4, 5], None),
        ([float("nan"), 1.0, float("-inf"), 2.0, float("nan")], [2, 4, 5], 2),
        ([1.0, 2.0, 1.0, 3.0, 4.0], [3, 4, 5], 3),
    ],
    ids=["older", "newest", "sparse", "none", "not-finite", "newest-of-equals"],
)
@pytest.mark.parametrize("reopen", [False, True], ids=["one-session", "reopened"])
def test_newest_and_best_are_kept(open_checkpoints, tmp_path, metrics, kept, best, reopen):
    checkpoints = open_checkpoints()
    for step, metric in enumerate(metrics, start=1):
        save(checkpoints, step, metric=metric)
        if reopen:
            checkpoints.close()
            checkpoints = open_checkpoints()
    assert checkpoints.best_step() == best
    assert checkpoints.latest_step() == 5
    assert steps_of(tmp_path / "run") == kept


def test_saving_a_step_again_replaces_it(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save(checkpoints, 5, metric=1.0)
    save(checkpoints, 5, state=make_state(9), metric=2.0)
    save(checkpoints, 6, metric=1.5)
    assert checkpoints.best_step() == 6
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["5", "6"]
    checkpoints.close()
    shutil.rmtree(tmp_path / "run" / "6")
    restored = open_checkpoints().restore(*make_state(0))
    assert_same_bits(restored.params, make_state(9)[0])


def test_a_replacement_that_was_cut_short_is_undone(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save(checkpoints, 5)
    checkpoints.close()
    (tmp_path / "run" / "5").rename(tmp_path / "run" / "5.replaced")
    assert open_checkpoints().latest_step() == 5


def adam_alone():
    return make_state(1, optimizer=optax.adamw(1e-2))


@pytest.mark.parametrize(
    ("identity", "like", "words"),
    [
        (
            {"model": IDENTITY["model"], "lora": {"rank": 8, "targets": ["q", "k"]}},
            lambda: make_state(0),
            ["lora.rank is 4 in the checkpoint, 8 here"],
        ),
        (
            {"model": {"name": "m"}, "lora": IDENTITY["lora"], "seed": 1},
            lambda: make_state(0),
            ["model.hidden_size is 6 in the checkpoint, absent here", "seed is absent in the"],
        ),
        (
            IDENTITY,
            lambda: make_state(0, rank=3),
            [
                "params: layers.attention.q.lora.a is float32[2,4,6] instead of float32[2,3,6]",
                "more",
            ],
        ),
        (
            IDENTITY,
            lambda: ({"other": jnp.ones(2)}, ()),
            ["other is missing", "gain is unexpected"],
        ),
        (IDENTITY, adam_alone, ["moments: ", "count", "missing"]),
    ],
    ids=["setting", "key", "shape", "names", "optimizer"],
)
def test_checkpoint_of_another_run_is_refused(open_checkpoints, reports, identity, like, words):
    checkpoints = open_checkpoints()
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.close()
    with pytest.raises(FabricError, match="of another run") as caught:
        open_checkpoints(identity=identity).restore(*like())
    for word in words:
        assert word in str(caught.value)
    assert reports == []


@pytest.mark.parametrize("tree", ["params", "moments"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(open_checkpoints, tree, value):
    checkpoints = open_checkpoints()
    save(checkpoints, 1)
    state = dict(zip(("params", "moments"), make_state(2), strict=True))
    leaves, structure = jax.tree.flatten(state[tree])
    index = next(i for i, leaf in enumerate(leaves) if leaf.ndim == 3)
    leaves[index] = leaves[index].at[1, 2, 3].set(value)
    state[tree] = jax.tree.unflatten(structure, leaves)
    save(checkpoints, 2, state=tuple(state.values()))
    with pytest.raises(FabricError, match=rf"step 2 .*{tree} .*lora.* not finite"):
        checkpoints.wait()
    assert checkpoints.restore(*make_state(0)).step == 1


@pytest.mark.parametrize("field", ["data_state", "meta"])
def test_what_json_cannot_hold_is_refused(open_checkpoints, field):
    fields = {"data_state": {}, "meta": {}} | {field: {"x": object()}}
    with pytest.raises(FabricError, match=field):
        open_checkpoints().save(1, *make_state(1), **fields)


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(FabricError, match="keep_last"):
        TrainCheckpoints(tmp_path, keep_last=0, identity={}, report=print)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "emptied": empty, "flipped": flip, "deleted": Path.unlink}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    with TrainCheckpoints(folder, keep_last=2, identity=IDENTITY, report=print) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    return folder


def check_damaged(folder: Path) -> bool:
    """Restores from a folder whose step 2 may be damaged; True if step 1 had to do.

    Whatever happened to the files, the state must be exactly one that was saved.
    """
    reports = []
    with TrainCheckpoints(folder, keep_last=2, identity=IDENTITY, report=reports.append) as again:
        restored = again.restore(*make_state(0))
        assert_same_bits((restored.params, restored.moments), make_state(restored.step))
        assert restored.data_state == {"row": 7 * restored.step}
        if restored.step == 2:
            assert reports == []
            return False
        assert len(reports) <= 1
        # A checkpoint whose folder lost its name entirely was never seen; others are named.
        assert not reports or (str(folder / "2") in reports[0] and "step 1" in reports[0])
        save(again, 2)
        assert again.latest_step() == 2
        again.restore(*make_state(0))
    return True


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("item", ["params", "moments", "data", "meta", "manifest"])
def test_every_item_is_verified(two_checkpoints, tmp_path, item, damage):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    for path in files_of(folder / "2" / item):
        if path.name != "commit_success.txt":
            damage(path)
    assert check_damaged(folder)
    assert (folder / "2.damaged").is_dir()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_goes_unnoticed(two_checkpoints, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(two_checkpoints, folder)
    files = files_of(folder / "2")
    path = files[data.draw(st.integers(0, len(files) - 1), label="file")]
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["bit", "cut", "zeros", "deleted"]), label="kind")
    where = data.draw(st.integers(0, max(0, len(content) - 1)), label="offset")
    if kind == "deleted" or not content:
        path.unlink()
    elif kind == "bit":
        content[where] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[:where])
    else:
        path.write_bytes(content[:where] + bytes(len(content) - where))
    check_damaged(folder)
    shutil.rmtree(folder.parent)


def test_a_missing_item_is_damage(two_checkpoints, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    shutil.rmtree(folder / "2" / "moments")
    assert check_damaged(folder)


def test_nothing_but_damaged_checkpoints(two_checkpoints, tmp_path, open_checkpoints):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    for step in ("1", "2"):
        empty(folder / step / "manifest" / "metadata")
    with pytest.raises(FabricError, match=r"every checkpoint .* damaged: step 2: .*; step 1: "):
        open_checkpoints().restore(*make_state(0))
    assert steps_of(folder) == [1, 2]


def test_a_damaged_checkpoint_is_never_the_best(two_checkpoints, tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(keep_last=3)
    save(checkpoints, 1, metric=0.1)
    save(checkpoints, 2, metric=0.2)
    checkpoints.close()
    flip(tmp_path / "run" / "1" / "manifest" / "metadata")
    assert open_checkpoints(keep_last=3).best_step() == 2
