"""Hub ids, against a cache laid out as the hub's library does and a server that answers as it."""

import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fabric_jax.checkpoints import hub
from fabric_jax.checkpoints.loading import load_base, open_source
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError
from tests.checkpoints import hf_folder

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def snapshot(cache: Path, revision: str = "main") -> Path:
    """The folder of a cached snapshot of org/name."""
    stored = cache / "models--org--name"
    (stored / "refs").mkdir(parents=True, exist_ok=True)
    (stored / "refs" / revision).write_text(SHA)
    (stored / "snapshots" / SHA).mkdir(parents=True, exist_ok=True)
    return stored / "snapshots" / SHA


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", "", "")),
        ("microsoft/bitnet-b1.58-2B-4T", ("microsoft/bitnet-b1.58-2B-4T", "", "")),
        ("tiiuae/Falcon-E-1B@prequantized", ("tiiuae/Falcon-E-1B", "", "prequantized")),
        ("org/name@refs/pr/1", ("org/name", "", "refs/pr/1")),
        ("org/name/a.gguf", ("org/name", "a.gguf", "")),
        ("org/name/sub/a-b.gguf@v1.0", ("org/name", "sub/a-b.gguf", "v1.0")),
    ],
)
def test_hub_ids(name: str, parts: tuple[str, str, str]) -> None:
    assert hub.is_hub_id(name)
    found = hub.parse_hub_id(name)
    assert (found.repository, found.file, found.revision) == parts


@pytest.mark.parametrize(
    "name",
    ["name", "./a/b", "../a/b", "/a/b", "~/a", "a/b/c", "a/../b", "org/name/../x.gguf", "a/b@", ""],
)
def test_other_names(name: str) -> None:
    assert not hub.is_hub_id(name)


def test_offline_the_cache_is_used_and_its_revision_told(cache, caplog) -> None:
    problem = hf_folder.write_problem(snapshot(cache), "llama-bitlinear")
    with caplog.at_level(logging.WARNING):
        loaded = load_base("org/name")
    assert loaded.definition.config.name == "name"
    assert loaded.definition.config.hidden_size == problem.config.hidden_size
    assert SHA in caplog.text
    assert "org/name" in caplog.text
    assert open_source("org/name").origin == "org/name"


def test_revisions(cache) -> None:
    hf_folder.write_problem(snapshot(cache, "v1.0"), "llama-bitlinear")
    for name in ("org/name@v1.0", f"org/name@{SHA}"):
        assert hub.fetch_model(name).name == SHA
    with pytest.raises(FabricError, match="cannot get model org/name@v2 from the hub"):
        hub.fetch_model("org/name@v2")


def test_a_folder_here_comes_before_the_hub(cache, tmp_path) -> None:
    hf_folder.write_problem(snapshot(cache), "llama-bitlinear")
    hf_folder.write_problem(tmp_path / "org" / "name", "bitnet-relu2-offline")
    assert load_base("org/name").definition.config.sub_norms


def test_nothing_cached_and_no_connection(cache) -> None:
    for name in ("org/name", "org/name/model.gguf"):
        with pytest.raises(FabricError, match=f"cannot get model {name} from the hub.*connection"):
            load_base(name)
    with pytest.raises(FabricError, match="cannot get tokenizer org/name from the hub"):
        load_tokenizer("org/name")


def test_a_cached_tokenizer_is_no_model(cache) -> None:
    (snapshot(cache) / "tokenizer.json").write_text("{}")
    with pytest.raises(FabricError, match=r"cannot load org/name: no config\.json"):
        load_base("org/name")


def test_a_gguf_file_that_is_not_cached(cache) -> None:
    (snapshot(cache) / "tokenizer.json").write_text("{}")
    with pytest.raises(FabricError, match="the file is not in its cache"):
        hub.fetch_model("org/name/model.gguf")
    (snapshot(cache) / "model.gguf").write_bytes(b"GGUF")
    assert hub.fetch_model("org/name/model.gguf").name == "model.gguf"


@pytest.fixture
def server(cache, tmp_path, monkeypatch) -> Iterator[Path]:
    """A hub of one repository, org/name, whose files are those of the folder that is yielded."""
    repository = tmp_path / "repository"
    repository.mkdir()

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            files = {str(p.relative_to(repository)): p for p in repository.rglob("*.*")}
            path = self.path.split("?")[0]
            name = path.partition(f"/resolve/{SHA}/")[2]
            if name in files:
                tag = f'"{len(files[name].read_bytes()):040x}"'
                self.answer(files[name].read_bytes(), X_Repo_Commit=SHA, ETag=tag)
            elif path.startswith("/api/models/org/name/tree/"):
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                    for n, p in files.items()
                ]
                self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            elif path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "org/name", "sha": SHA, "siblings": siblings}
                self.answer(json.dumps(info).encode(), Content_Type="application/json")
            else:
                self.answer(b"", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=listening.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield repository
    listening.shutdown()
    listening.server_close()


def test_download(server, cache) -> None:
    """Only what is read here, and again from the cache when the connection is gone."""
    hf_folder.write_problem(server, "llama-bitlinear", shards=2)
    unwanted = ("pytorch_model.bin", "modeling.py", "original/params.json", "a/b.safetensors")
    for name in (*unwanted, "consolidated.safetensors", "tokenizer.json"):
        (server / name).parent.mkdir(exist_ok=True)
        (server / name).write_text("{}")
    assert load_base("org/name").definition.options.mode == "packed"
    fetched = {p.name for p in snapshot(cache).rglob("*.*")}
    assert fetched == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }


def test_download_of_one_file(server) -> None:
    (server / "sub").mkdir()
    (server / "sub" / "model.gguf").write_bytes(b"GGUF")
    (server / "other.gguf").write_bytes(b"GGUF")
    path = hub.fetch_model("org/name/sub/model.gguf")
    assert path.read_bytes() == b"GGUF"
    assert not (path.parent.parent / "other.gguf").exists()
    with pytest.raises(FabricError, match=r"unknown file.*Did you mean 'sub/model\.gguf'"):
        hub.fetch_model("org/name/sub/modell.gguf")
    with pytest.raises(FabricError, match=r"GGUF files alone\. Name one of them: org/name/"):
        hub.fetch_model("org/name")


def test_repositories_without_weights(server) -> None:
    (server / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FabricError, match=r"no safetensors; found pickles"):
        hub.fetch_model("org/name")
    with pytest.raises(FabricError, match=r"cannot get model org/other .*Check the spelling"):
        hub.fetch_model("org/other")
