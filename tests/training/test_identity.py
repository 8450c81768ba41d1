"""What names the weights of a run."""

from pathlib import Path

import pytest

from fabric_jax.errors import FabricError
from fabric_jax.training.identity import weights_digest


def test_weights_are_named_by_the_bytes_of_their_files(tmp_path: Path) -> None:
    def folder(name: str, **files: bytes) -> str:
        (tmp_path / name).mkdir()
        for stem, content in files.items():
            (tmp_path / name / f"{stem}.safetensors").write_bytes(content)
        return str(tmp_path / name)

    one, same = folder("one", model=b"a"), folder("same", model=b"a")
    shards, other = folder("shards", m1=b"a", m2=b"b"), folder("other", m1=b"a", m2=b"c")
    assert weights_digest(one, 0) == weights_digest(same, 1)
    digests = {weights_digest(name, 0) for name in (one, shards, other)}
    assert len(digests) == 3
    file = tmp_path / "m.gguf"
    file.write_bytes(b"a")
    assert weights_digest(str(file), 0) == weights_digest(one, 0)
    file.write_bytes(b"b")
    assert weights_digest(str(file), 0) != weights_digest(one, 0)


def test_random_weights_are_named_by_how_they_were_made() -> None:
    assert weights_digest("bitnet-tiny", 0) != weights_digest("bitnet-tiny", 1)
    assert weights_digest("bitnet-tiny", 0) != weights_digest("bitnet-125m", 0)


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FabricError):
        weights_digest(str(tmp_path / "none"), 0)


def test_the_output_of_a_run_is_named_by_its_weights(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"format": "fabric_jax"}')
    digests: set[str] = set()
    for content in (b"a", b"b"):
        (model / "model.safetensors").write_bytes(content)
        assert weights_digest(str(tmp_path / "run"), 0) == weights_digest(str(model), 0)
        digests.add(weights_digest(str(tmp_path / "run"), 0))
    assert len(digests) == 2
