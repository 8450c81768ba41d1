"""Reading ``tokenizer.model``: SentencePiece's ModelProto, without the protobuf library.

Only these fields of sentencepiece_model.proto matter here::

    ModelProto      1: repeated SentencePiece   2: TrainerSpec   3: NormalizerSpec
    SentencePiece   1: string piece   2: float score   3: enum type (1 when absent)
    TrainerSpec     3: enum model_type (1 unigram, 2 BPE)
    NormalizerSpec  3: bool add_dummy_prefix (true when absent)
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from fabric_jax.data.sentencepiece_bpe import Pieces, PieceType
from fabric_jax.errors import FabricError

_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_sentencepiece_model(path: Path) -> Pieces:
    """Reads the pieces of a SentencePiece BPE model.

    Raises:
        FabricError: not a SentencePiece model, or one that isn't BPE.
    """
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    model_type, add_dummy_prefix = 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                tokens.append(_as_bytes(piece[1]).decode("utf-8"))
                scores.append(struct.unpack("<f", _as_bytes(piece.get(2, bytes(4))))[0])
                types.append(_as_int(piece.get(3, PieceType.NORMAL.value)))
            elif number == 2 and isinstance(value, bytes):
                model_type = _as_int(dict(_fields(value)).get(3, 1))
            elif number == 3 and isinstance(value, bytes):
                add_dummy_prefix = bool(dict(_fields(value)).get(3, 1))
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise FabricError(
            f"cannot read {path}", expected="a SentencePiece model", found=repr(error)
        ) from error
    if not tokens:
        raise FabricError(f"{path} holds no pieces", expected="a SentencePiece model")
    if model_type != _BPE:
        raise FabricError(
            f"{path} is not a BPE model", expected="model_type 2", found=str(model_type)
        )
    return Pieces(tokens=tokens, scores=scores, types=types, add_prefix_space=add_dummy_prefix)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers and values, fixed-width ones as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"field of {size} bytes at byte {at} passes the end")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("expected bytes, found a number")
    return value


def _as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("expected a number, found bytes")
    return value
