"""Damaged, lying and hostile GGUF files: each loads or is refused in words, nothing else happens.

FABRIC_FUZZ_CASES sets how many are tried.
"""

import os
import random
import resource
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fabric_jax.checkpoints.gguf.adapter import read_gguf_adapter, save_gguf_adapter
from fabric_jax.checkpoints.gguf.names import LINEARS, norm_shapes
from fabric_jax.checkpoints.gguf.read import open_gguf
from fabric_jax.checkpoints.gguf.write import write_gguf
from fabric_jax.data.tokenizer import load_tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.gguf_container import read_gguf
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.config import ModelConfig
from tests.checkpoints.gguf_files import BITNET, GEMMA3, LLAMA, LLAMA3, tree_source
from tests.checkpoints.test_gguf_adapter import define, random_adapter
from tests.checkpoints.test_gguf_tokenizer import sentencepiece_folder
from tests.data.test_tokenizer import train_bpe

CASES = int(os.environ.get("FABRIC_FUZZ_CASES", "300"))
GROWTH = 256 << 20
"""Bytes that a whole run may add to the process: every file here is under half a megabyte."""
ROOM = 2 << 30
"""Bytes of addresses that a case may ask for beyond what the process has."""
SECONDS = 5.0
"""That one case may take, on a busy machine."""
NUMBERS = [
    *range(42),
    *(1 << power for power in (8, 16, 20, 24, 31, 32, 40, 62, 63)),
    *((1 << power) - 1 for power in (8, 16, 31, 32, 63, 64)),
]
SMALL = replace(BITNET, num_layers=1, ffn_size=256, vocab_size=600)
HEADS = {"head_dim": 50, "num_heads": 2, "num_kv_heads": 1}


def seeds(folder: Path) -> dict[str, tuple[bytes, ModelConfig | None]]:
    """Whole files; those of adapters with the model that they belong to."""
    bpe = str(train_bpe(folder, None).parent)
    pieces = str(sentencepiece_folder(folder / "spm"))
    models = {
        "bitnet": (SMALL, "TQ2_0", bpe),
        "llama": (replace(LLAMA, num_layers=1, ffn_size=256, vocab_size=600), "TQ1_0", pieces),
        "padded": (replace(SMALL, hidden_size=100, **HEADS), "TQ2_0", ""),
        "gemma3": (replace(GEMMA3, num_layers=2), "F16", ""),
        "llama3": (replace(LLAMA3, num_layers=1), "Q8_0", ""),
    }
    files: dict[str, tuple[bytes, ModelConfig | None]] = {}
    for name, (config, kind, tokens) in models.items():
        source = tree_source(config, tokenizer_source=tokens)
        write_gguf(folder / "m.gguf", source, kind=kind)
        files[name] = ((folder / "m.gguf").read_bytes(), None)
        if name in ("llama", "padded"):
            definition = define(config, LoraConfig(rank=2, targets=("q", "down")))
            save_gguf_adapter(folder / "a.gguf", definition, random_adapter(definition))
            files[f"{name}-adapter"] = ((folder / "a.gguf").read_bytes(), config)
    return files


def read_everything(path: Path, config: ModelConfig | None) -> None:
    if config is not None:
        read_gguf_adapter(path, config)
        return
    source = open_gguf(path)
    for layer in range(source.config.num_layers):
        for linear in LINEARS:
            source.linear(linear, layer)
        for name in norm_shapes(source.config):
            source.tensor(name, layer)
    for rows in (slice(0, 3), slice(3, source.config.vocab_size)):
        source.tensor("embedding", rows=rows)
    source.tensor("final_norm.gain")
    if source.tokenizer_source:
        load_tokenizer(source.tokenizer_source).encode("some text")


def header_length(content: bytes, folder: Path) -> int:
    path = folder / "seed.gguf"
    path.write_bytes(content)
    return min(tensor.offset for tensor in read_gguf(path).tensors.values())


def damage(r: random.Random, content: bytes, header: int) -> bytes:
    """One or two changes, mostly in the header."""
    data = bytearray(content)
    for _ in range(r.choice([1, 1, 1, 2])):
        where = r.randrange(header if r.random() < 0.9 else len(data))
        where = min(where, len(data) - 1)
        match r.randrange(8):
            case 0:
                del data[max(1, where) :]
            case 1:
                data[where:where] = r.randbytes(r.randrange(1, 9))
            case 2:
                del data[where : where + r.randrange(1, 9)]
            case 3:
                data[where] ^= 1 << r.randrange(8)
            case 4 | 5:
                kind = r.choice(["<I", "<Q"])
                limit = 8 * struct.calcsize(kind)
                number = struct.pack(kind, r.choice(NUMBERS) & ((1 << limit) - 1))
                data[where : where + len(number)] = number
            case 6:
                size = r.randrange(1, 40)
                other = r.randrange(header)
                data[where : where + size] = data[other : other + size]
            case _:
                data[where : where + 2] = struct.pack("<H", r.choice([0x7E00, 0x7C00, 0xFFFF, 0]))
    return bytes(data)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """An allocation that a file asks for fails here, instead of taking the machine's memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
def test_damaged_files(tmp_path: Path) -> None:
    files = list(seeds(tmp_path).values())
    headers = [header_length(content, tmp_path) for content, _ in files]
    scratch = tmp_path / "scratch.gguf"
    for content, config in files:
        scratch.write_bytes(content)
        read_everything(scratch, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = longest = 0
    slowest = 0.0
    for case in range(CASES):
        r = random.Random(case)
        content, config = files[case % len(files)]
        scratch.write_bytes(damage(r, content, headers[case % len(files)]))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                read_everything(scratch, config)
        except FabricError as error:
            refused += 1
            longest = max(longest, len(str(error)))
        except BaseException as error:
            raise AssertionError(f"case {case} raised {error!r}") from error
        slowest = max(slowest, time.perf_counter() - start)
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    print(f"{CASES} cases, {refused} refused, {grown >> 20} MiB more, {slowest:.2f} s the slowest")
    assert grown < GROWTH
    assert slowest < SECONDS
    assert longest < 4000
    # Most changes matter; some (a letter of a name, a bit of a gain) make another valid file.
    assert 0.3 < refused / CASES < 0.99


def test_zeros_and_noise(tmp_path: Path) -> None:
    random_bytes = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    for content in (b"", b"GGUF", bytes(5000), b"GGUF" + bytes(5000), random_bytes):
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        for read in (open_gguf, load_tokenizer):
            with pytest.raises(FabricError, match="cannot read"):
                read(path)
