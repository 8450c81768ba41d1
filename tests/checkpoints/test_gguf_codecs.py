"""Ternary block formats against the gguf package, and codes in formats of floats."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from fabric_kernels import pack_ternary2, unpack_ternary2
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.checkpoints.gguf.codecs import (
    EMPTY_SCALE,
    decode_i2s,
    decode_tq1,
    decode_tq2,
    encode_tq1,
    encode_tq2,
)
from fabric_jax.checkpoints.gguf.floats import read_floats, read_ternary
from fabric_jax.checkpoints.source import TernaryMatrix
from fabric_jax.errors import FabricError
from fabric_jax.gguf_container import read_gguf

ENCODE = {Kind.TQ1_0: encode_tq1, Kind.TQ2_0: encode_tq2}
DECODE = {Kind.TQ1_0: decode_tq1, Kind.TQ2_0: decode_tq2}
BOTH = pytest.mark.parametrize("kind", list(ENCODE), ids=["TQ1_0", "TQ2_0"])


def matrix_of(codes: np.ndarray, scale: float) -> TernaryMatrix:
    packed = np.asarray(pack_ternary2(codes.astype(np.int8)))
    return TernaryMatrix(packed=packed, scale=scale, k=codes.shape[1])


def codes_of(matrix: TernaryMatrix) -> np.ndarray:
    return np.asarray(unpack_ternary2(matrix.packed, matrix.k))


def worked_codes() -> np.ndarray:
    return np.array([(7 * i) // 5 % 3 - 1 for i in range(256)])[None]


@BOTH
def test_the_worked_block(kind: Kind) -> None:
    codes = worked_codes()
    data = ENCODE[kind](matrix_of(codes, 0.75), "w")[0]
    if kind == Kind.TQ2_0:
        assert data[:8].tolist() == [168, 21, 170, 5, 170, 1, 106, 0]
        assert data[-6:].tolist() == [106, 0, 90, 0, 0x00, 0x3A]
    else:
        assert data[:8].tolist() == [85, 124, 255, 114, 254, 86, 251, 0]
        assert data[32] == 182
        assert data[48:].tolist() == [80, 114, 250, 86, 0x00, 0x3A]
    found = DECODE[kind](data[None], "w")
    np.testing.assert_array_equal(codes_of(found), codes)
    assert found.scale == 0.75


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 11),
    scale=st.floats(2**-10, 100, width=32),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(list(ENCODE)),
)
def test_bytes_equal_the_package_and_return(
    rows: int, blocks: int, scale: float, zeros: float, seed: int, kind: Kind
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-1, 2, (rows, blocks * 256)).astype(np.float32)
    # Whole blocks of zeros too, which have no scale of their own.
    codes *= np.repeat(random.random((rows, blocks)) >= zeros, 256, axis=1)
    data = ENCODE[kind](matrix_of(codes, scale), "w")
    theirs = gguf.quants.quantize(codes * np.float32(scale), kind)
    np.testing.assert_array_equal(data, theirs)
    found = DECODE[kind](data, "w")
    np.testing.assert_array_equal(codes_of(found), codes)
    expected = float(np.float16(scale)) if codes.any() else EMPTY_SCALE
    assert found.scale == pytest.approx(expected, rel=0, abs=0)


def test_more_rows_than_one_chunk() -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (3000, 512))
    for kind in ENCODE:
        data = ENCODE[kind](matrix_of(codes, 2.0), "w")
        np.testing.assert_array_equal(codes_of(DECODE[kind](data, "w")), codes)


@BOTH
def test_scales_that_differ_are_refused(kind: Kind) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    with pytest.raises(FabricError, match=r"w of it holds no weights of a BitNet.* 8 different"):
        DECODE[kind](gguf.quants.quantize(weights, kind), "w of it")


@BOTH
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
def test_scales_that_are_no_numbers_are_refused(kind: Kind, bits: int) -> None:
    data = ENCODE[kind](matrix_of(worked_codes(), 0.75), "w")
    data[0, -2:] = np.array([bits], "<u2").view(np.uint8)
    with pytest.raises(FabricError, match="not finite"):
        DECODE[kind](data, "w")
    data[0, -2:] = np.array([0xBA00], "<u2").view(np.uint8)
    with pytest.raises(FabricError, match="one positive scale"):
        DECODE[kind](data, "w")


def test_code_three_is_refused() -> None:
    data = encode_tq2(matrix_of(worked_codes(), 0.75), "w")
    data[0, 17] |= 0b11 << 4
    with pytest.raises(FabricError, match="no ternary codes"):
        decode_tq2(data, "w")


@BOTH
def test_a_block_without_scale_is_zeros_whatever_its_codes(kind: Kind) -> None:
    codes = np.concatenate([worked_codes(), worked_codes()], axis=1)
    data = ENCODE[kind](matrix_of(codes, 0.75), "w")
    data[0, -2:] = 0
    codes[:, 256:] = 0
    found = DECODE[kind](data, "w")
    np.testing.assert_array_equal(codes_of(found), codes)
    assert found.scale == 0.75


@pytest.mark.parametrize("scale", [1e5, 1e-9])
def test_scales_beyond_float16_are_refused(scale: float) -> None:
    with pytest.raises(FabricError, match="of some matrix is not representable in float16"):
        encode_tq2(matrix_of(worked_codes(), scale), "some matrix")


# I2_S


def classic_i2s(codes: np.ndarray, scale: float) -> np.ndarray:
    """One byte at a time, as bitnet.cpp's portable quantiser: 128 weights in 32 bytes."""
    flat = (codes + 1).reshape(-1)
    out = bytearray()
    for start in range(0, len(flat), 128):
        for m in range(32):
            a, b, c, d = (int(flat[start + m + 32 * part]) for part in range(4))
            out.append(a << 6 | b << 4 | c << 2 | d)
    tail = np.zeros(8, np.float32)
    tail[0] = scale
    return np.frombuffer(bytes(out) + tail.tobytes(), np.uint8)


@pytest.mark.parametrize("shape", [(3, 256), (32, 20), (2, 64), (128, 12)])
def test_i2s_knows_no_rows(shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(1).integers(-1, 2, shape)
    found = decode_i2s(classic_i2s(codes, 0.3), *shape, "w")
    np.testing.assert_array_equal(codes_of(found), codes)
    assert found.scale == float(np.float32(0.3))


def test_bad_i2s_is_refused() -> None:
    codes = np.zeros((2, 64), int)
    for scale in (np.nan, np.inf, -1.0, 0.0):
        with pytest.raises(FabricError, match="no positive number"):
            decode_i2s(classic_i2s(codes, scale), 2, 64, "w")
    data = classic_i2s(codes, 1.0).copy()
    data[3] = 0b00_11_00_00
    with pytest.raises(FabricError, match="no ternary codes"):
        decode_i2s(data, 2, 64, "w")


# Ternary matrices in formats of floats


def one_tensor(path, values: np.ndarray, kind: Kind):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(path)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("scale", [0.75, 0.0371])
def test_codes_return_from_floats(tmp_path, kind: Kind, scale: float) -> None:
    random = np.random.default_rng(2)
    codes = random.integers(-1, 2, (50, 96))
    codes[7] = 0
    codes[8, 32:64] = 0
    file = one_tensor(tmp_path / "w.gguf", (codes * np.float32(scale)).astype(np.float32), kind)
    found = read_ternary(file, "w")
    np.testing.assert_array_equal(codes_of(found), codes)
    # As the block's float16 has it: s, s/127 or s/8.
    parts = {Kind.Q8_0: 127, Kind.Q4_0: 8}
    if kind in parts:
        part = np.float16(np.float32(scale) / np.float32(parts[kind]))
        assert found.scale == float(np.float32(part) * np.float32(parts[kind]))
    else:
        stored = {Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}.get(kind, np.float32)
        assert found.scale == float(stored(np.float32(scale)))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0])
def test_floats_that_are_not_ternary_are_refused(tmp_path, kind: Kind) -> None:
    weights = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    file = one_tensor(tmp_path / "w.gguf", weights, kind)
    with pytest.raises(FabricError, match=f"stored as {kind.name} in a file of ternary weights"):
        read_ternary(file, "w")


def test_two_scales_in_q4_are_refused(tmp_path) -> None:
    values = np.full((2, 32), 0.5, np.float32)
    values[1] = 0.25
    file = one_tensor(tmp_path / "w.gguf", values, Kind.Q4_0)
    with pytest.raises(FabricError, match="2 different ones"):
        read_ternary(file, "w")


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0]
)
def test_floats_equal_the_package(tmp_path, kind: Kind) -> None:
    values = np.random.default_rng(4).standard_normal((70, 256)).astype(np.float32)
    file = one_tensor(tmp_path / "w.gguf", values, kind)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    np.testing.assert_array_equal(read_floats(file, "w").astype(np.float32), theirs)
    part = read_floats(file, "w", slice(13, 40)).astype(np.float32)
    np.testing.assert_array_equal(part, theirs[13:40])


def raw_tensor(path, data: np.ndarray, kind: Kind):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(path)


@pytest.mark.parametrize("kind", [Kind.Q6_K, Kind.Q4_K])
def test_k_quants_equal_the_package(tmp_path, kind: Kind) -> None:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(5).integers(0, 256, (6, 2, size)).astype(np.uint8)
    # Scales last in Q6_K, first in Q4_K.
    places = (slice(-2, None),) if kind == Kind.Q6_K else (slice(0, 2), slice(2, 4))
    for place in places:
        data[..., place] = np.array([0x2C00], "<u2").view(np.uint8)
    file = raw_tensor(tmp_path / "w.gguf", data.reshape(6, -1), kind)
    theirs = gguf.quants.dequantize(data.reshape(6, -1), kind)
    np.testing.assert_array_equal(read_floats(file, "w"), theirs)


def test_unsupported_and_broken_floats(tmp_path) -> None:
    data = np.zeros((2, 34), np.uint8)
    file = raw_tensor(tmp_path / "w.gguf", data, Kind.MXFP4)
    with pytest.raises(FabricError, match=r"w in .* is stored as MXFP4"):
        read_floats(file, "w")
    values = np.ones((2, 32), np.float32)
    values[1, 3] = np.nan
    with pytest.raises(FabricError, match=r"w in .* not finite"):
        read_floats(one_tensor(tmp_path / "n.gguf", values, Kind.F16), "w")
    data = np.zeros((1, 34), np.uint8)
    data[0, :2] = [0x00, 0x7E]
    file = raw_tensor(tmp_path / "q.gguf", data, Kind.Q8_0)
    with pytest.raises(FabricError, match=r"w in .* not finite"):
        read_floats(file, "w")
