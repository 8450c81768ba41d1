"""Damaged, lying and hostile folders: each loads or is refused in words, nothing else happens.

FABRIC_FUZZ_CASES sets how many are tried.
"""

import copy
import json
import os
import random
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric_jax.checkpoints.assemble import in_form
from fabric_jax.checkpoints.huggingface.names import LINEARS
from fabric_jax.checkpoints.huggingface.read import open_huggingface
from fabric_jax.errors import FabricError
from tests.checkpoints import hf_folder

CASES = int(os.environ.get("FABRIC_FUZZ_CASES", "300"))
GROWTH = 256 << 20
"""Bytes that a whole run may add to the process: every file here is of some kilobytes."""
KINDS = ["bitnet-relu2-offline", "llama-bitlinear", "llama-float", "bitnet-silu-online"]
STRANGE = [
    *(None, True, False, "", "x", [], {}, [[]], {"a": 1}, -1, 0, 1, 2, 3, 7, 0.5, -0.0, 1e-300),
    *(1 << 16, 1 << 31, 1 << 40, 1 << 63, 1 << 64, 10**30, float("nan"), float("inf"), 1e308),
    *("bitlinear", "autobitlinear", "online", "offline", "lm_head", "gptq", "silu", "gelu"),
    *("../../etc/passwd", "/etc/passwd.safetensors", "a\0b.safetensors", ".safetensors"),
    *("F32", "U8", "BF16", "I64", "F64", "gemma3", "gemma3_text", "qwen3", "llama", "mamba"),
    *(["full_attention"], ["sliding_attention", "full_attention"], ["lm_head", "(a+)+$"]),
    *({"rope_type": "linear", "factor": 0}, {"rope_type": "llama3"}, {"type": "yarn"}),
]
EXTRA = ["head_dim", "layer_types", "rope_parameters", "sliding_window", "is_bitnet_config"]
EXTRA += ["text_config", "rope_local_base_freq", "query_pre_attn_scalar", "attention_bias"]


def read_everything(folder: Path) -> None:
    source = open_huggingface(folder)
    in_form(source, None)
    for layer in range(source.config.num_layers):
        for path in LINEARS:
            source.linear(path, layer)
        for path in source.names.norms:
            source.tensor(f"layers.{path}.gain", layer)
    for rows in (slice(0, 3), slice(3, source.config.vocab_size)):
        source.tensor("embedding", rows=rows)


def change_bytes(r: random.Random, content: bytes) -> bytes:
    where = r.randrange(len(content) + 1)
    match r.randrange(6):
        case 0:
            return content[:where]
        case 1:
            return content[:where] + r.randbytes(r.randrange(1, 9)) + content[where:]
        case 2:
            return content[:where] + content[where + r.randrange(1, 65) :]
        case 3:
            return struct.pack("<Q", r.choice([0, 1, 1 << 20, 1 << 27, 1 << 63])) + content[8:]
        case 4:
            return content[:where] + r.randbytes(8) + content[where + 8 :]
        case _:
            changed = bytearray(content or b"\0")
            for _ in range(r.randrange(1, 4)):
                # Half of the flips go to the beginning, where headers are.
                end = len(changed) if r.random() < 0.5 else min(len(changed), 400)
                changed[r.randrange(end)] ^= 1 << r.randrange(8)
            return bytes(changed)


def change_json(r: random.Random, value: Any) -> Any:
    """A copy of nested objects with one thing changed, somewhere."""
    value = copy.deepcopy(value)
    node, inner = value, value
    while isinstance(inner, dict | list) and inner:
        node = inner
        key = r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node))
        inner = node[key]
        if r.random() < 0.3:
            break
    if not isinstance(node, dict | list) or not node:
        return r.choice(STRANGE)
    match r.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[r.choice([*EXTRA, "x", "model.layers.7.mlp.up_proj.weight"])] = inner
        case 2 if isinstance(node, dict):
            node[r.choice(EXTRA)] = r.choice(STRANGE)
        case 3 if isinstance(inner, int) and not isinstance(inner, bool):
            node[key] = inner + r.choice([-1, 1, 4, 16, -8])
        case _:
            node[key] = r.choice(STRANGE)
    return value


def change_header(r: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = change_json(r, json.loads(content[8 : 8 + length]))
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def damage(r: random.Random, files: dict[str, bytes]) -> dict[str, bytes]:
    files = dict(files)
    for _ in range(r.choice([1, 1, 1, 2])):
        name = r.choice(sorted(files))
        content = files[name]
        if r.random() < 0.03:
            del files[name]
            if not files:
                break
        elif name.endswith(".json") and r.random() < 0.8:
            try:
                files[name] = json.dumps(change_json(r, json.loads(content))).encode()
            except ValueError:
                files[name] = change_bytes(r, content)
        elif name.endswith(".safetensors") and r.random() < 0.5:
            try:
                files[name] = change_header(r, content)
            except (ValueError, struct.error):
                files[name] = change_bytes(r, content)
        else:
            files[name] = change_bytes(r, content)
    return files


def pristine(folder: Path, name: str, shards: int) -> dict[str, bytes]:
    hf_folder.write_problem(folder, name, shards=shards)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_damaged_folders(tmp_path: Path) -> None:
    seeds = [
        pristine(tmp_path / f"{name}-{shards}", name, shards) for name in KINDS for shards in (1, 2)
    ]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for files in seeds:
        replace_files(scratch, files)
        read_everything(scratch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = longest = 0
    for case in range(CASES):
        r = random.Random(case)
        replace_files(scratch, damage(r, seeds[case % len(seeds)]))
        try:
            read_everything(scratch)
        except FabricError as error:
            refused += 1
            longest = max(longest, len(str(error)))
        except BaseException as error:
            raise AssertionError(f"case {case} raised {error!r}") from error
    unit = 1 if sys.platform == "darwin" else 1024
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * unit < GROWTH
    assert longest < 4000
    # Most changes matter; some (a bit of a weight, an unknown key) make another valid model.
    assert 0.5 < refused / CASES < 0.99


def replace_files(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_nesting(tmp_path: Path, depth: int) -> None:
    hf_folder.write_problem(tmp_path, "llama-float")
    (tmp_path / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(FabricError):
        open_huggingface(tmp_path)
