"""From a source to the base tree: leaf by leaf, layer by layer, straight into the final format.

Every leaf is one buffer on the host. On CPU the array of jax is that very buffer; elsewhere the
buffer is given up as soon as the device has its copy. Beside the leaves there is never more than
one matrix of one layer, or a few rows of a table, which may be quantised as they come. Sources give
packed matrices as ``ternary2``; for another layout each is re-packed on its way into the buffer.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from fabric_kernels import Packing, quantize_blocks, repack
from flax import nnx

from fabric_jax.checkpoints.arrays import HostArray, Layout, is_finite, layouts
from fabric_jax.checkpoints.source import ALL_ROWS, ModelSource, TernaryMatrix
from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree, nest
from fabric_jax.models.packing import check_codes, pack_stack
from fabric_jax.quantization.absmax import ActQuant

ALIGNMENT = 64
"""Of buffers that jax takes over on CPU."""
TABLE_BLOCK_BYTES = 1 << 22
SCRATCH_BYTES = 1 << 28
REPACK_BYTES = 1 << 25
WORKERS = min(4, os.cpu_count() or 1)
_repack = jax.jit(repack, static_argnames=("k", "source", "to"))


def base_layouts(definition: DecoderDefinition) -> dict[str, Layout]:
    """Shape and dtype of each base weight, by dotted name."""
    return layouts(nnx.to_pure_dict(definition.base))


def assemble_base(definition: DecoderDefinition, source: ModelSource) -> Tree:
    """Reads all base weights of a decoder, to the default device.

    Args:
        definition: whose config and mode are those of ``source``.
        source: where the tensors come from.

    Raises:
        FabricError: the source is of another form, or a tensor can't be read.
    """
    if definition.options.mode != source.form:
        raise FabricError(
            f"{source.origin} holds {source.form} weights",
            expected=f"the mode {definition.options.mode!r}",
        )
    expected = base_layouts(definition)
    leaves: list[tuple[tuple[str, ...], jax.Array]] = []

    def keep(name: str, buffer: HostArray) -> None:
        leaves.append((tuple(name.split(".")), _to_device(buffer)))

    paths = definition.config.linear_shapes
    linears = {f"layers.{path}.{part}": path for path in paths for part in ("weight", "codes")}
    # Tables first: while they are read, little else is there yet.
    for name, layout in sorted(expected.items(), key=lambda item: item[0].startswith("layers.")):
        if name.endswith((".scale", ".scales")):  # read with what they are scales of
            continue
        buffer = _aligned(layout)
        if name in ("embedding.codes", "head.codes"):
            table = name.removesuffix(".codes")
            scale = _aligned(expected[f"{table}.scales"])
            _read_quantized(source, table, buffer, scale, definition.config.hidden_size)
            keep(f"{table}.scales", scale)
        elif name not in linears:
            _read_tensor(source, name, buffer)
        elif source.form == "packed":
            scale = _read_packed(source, linears[name], buffer, definition.options.packing)
            keep(f"layers.{linears[name]}.scale", scale)
        elif name.endswith(".codes"):
            path = linears[name]
            scale = _aligned(expected[f"layers.{path}.scales"])
            _read_blocks(source, path, buffer, scale, paths[path])
            keep(f"layers.{path}.scales", scale)
        else:
            _read_floats(source, linears[name], buffer)
        keep(name, buffer)
    return nest(leaves)


def in_form(source: ModelSource, mode: BaseMode | None) -> ModelSource:
    """The source with its linears in another form, where that is one that they can have.

    Masters can be packed; plain floats that are said to be masters are masters.

    Args:
        source: any.
        mode: the form; None: packed where the model is ternary, float otherwise.

    Raises:
        FabricError: packed weights have no masters, and ternary ones are no plain floats.
    """
    wanted = mode or ("float" if source.form == "float" else "packed")
    if wanted == source.form:
        return source
    if source.form == "packed" or wanted == "float":
        raise FabricError(
            f"{source.origin} holds {source.form} weights, which can't be turned into {wanted} ones"
        )
    return _Changed(source=source, config=replace(source.config, ternary=True), form=wanted)


@dataclass(frozen=True, kw_only=True)
class _Changed:
    """A source of floats as masters, or packed."""

    source: ModelSource
    config: ModelConfig
    form: BaseMode
    lock: Any = field(default_factory=threading.Lock)

    @property
    def act_quant(self) -> ActQuant:
        return self.source.act_quant

    @property
    def tokenizer_source(self) -> str:
        return self.source.tokenizer_source

    @property
    def origin(self) -> str:
        return self.source.origin

    def linear(self, path: str, layer: int) -> TernaryMatrix | HostArray:
        if self.form != "packed":
            return self.source.linear(path, layer)
        with self.lock:  # One float matrix at a time; the quantiser uses all cores.
            matrix = self.source.linear(path, layer)
            return matrix if isinstance(matrix, TernaryMatrix) else quantize_matrix(matrix)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> HostArray:
        return self.source.tensor(name, layer, rows=rows)


def quantize_matrix(master: HostArray) -> TernaryMatrix:
    """Packed absmean codes and scale of one master matrix [N, K], by the forward pass's rule."""
    # As a stack of one, since that is what was compiled for the packing of whole models; and in
    # float32 on the host, where jax reads it without a copy.
    stack = _aligned(Layout(shape=(1, *master.shape), dtype="float32"))
    np.copyto(stack[0], master)
    device = _to_device(stack)
    packed, scales = pack_stack(device)
    check_codes(device[0], packed[0], scales[0])
    return TernaryMatrix(packed=np.asarray(packed)[0], scale=float(scales[0]), k=master.shape[1])


def repack_matrix(packed: HostArray | jax.Array, k: int, source: Packing, to: Packing) -> HostArray:
    """One matrix [N, W] in another layout, on the host; itself where that is the same."""
    return np.asarray(packed if source == to else _repack(packed, k=k, source=source, to=to))


def _read_packed(source: ModelSource, path: str, buffer: HostArray, packing: Packing) -> HostArray:
    """Fills the packed stack of one linear, in the layout ``packing``; its scales [L]."""
    scales = np.empty(len(buffer), np.float32)

    def read(layer: int) -> None:
        matrix = source.linear(path, layer)
        assert isinstance(matrix, TernaryMatrix)
        packed = repack_matrix(matrix.packed, matrix.k, "ternary2", packing)
        _copy(source, f"{path} of layer {layer}", packed, buffer[layer])
        scales[layer] = matrix.scale

    # Re-packing needs the matrix once more, and its own scratch.
    scratch = 2 * buffer[0].nbytes if packing == "ternary2" else 4 * buffer[0].nbytes + REPACK_BYTES
    _for_each(read, range(len(buffer)), scratch)
    return scales


def _read_floats(source: ModelSource, path: str, buffer: HostArray) -> None:
    def read(layer: int) -> None:
        matrix = source.linear(path, layer)
        assert not isinstance(matrix, TernaryMatrix)
        with np.errstate(over="ignore"):  # becomes an error below
            _copy(source, f"{path} of layer {layer}", matrix, buffer[layer])
        if buffer.dtype == np.float16 and not is_finite(buffer[layer]):
            raise FabricError(
                f"{path} of layer {layer} in {source.origin} has values beyond those of float16",
                fix="Take bfloat16 or float32",
            )

    _for_each(read, range(len(buffer)), 2 * buffer[0].nbytes)


def _read_blocks(
    source: ModelSource, path: str, codes: HostArray, scales: HostArray, shape: tuple[int, int]
) -> None:
    """Fills the stacks of codes and scales of a float linear [N, K], quantising blocks of rows."""
    (n, k), bits = shape, 8 if codes.dtype == np.int8 else 4
    step = max(1, TABLE_BLOCK_BYTES // (4 * k))

    def read(layer: int) -> None:
        matrix = source.linear(path, layer)
        assert not isinstance(matrix, TernaryMatrix)
        _check_shape(source, f"{path} of layer {layer}", matrix, shape)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            codes[layer, rows], scales[layer, rows] = quantize_blocks(matrix[rows], bits)

    # A matrix as it is read, and what the rounding has of a block.
    _for_each(read, range(len(codes)), 2 * 4 * n * k + 8 * TABLE_BLOCK_BYTES)


def _read_tensor(source: ModelSource, name: str, buffer: HostArray) -> None:
    if name.startswith("layers."):
        for layer in range(len(buffer)):
            _copy(source, f"{name}, layer {layer}", source.tensor(name, layer), buffer[layer])
        return
    step = max(1, TABLE_BLOCK_BYTES * len(buffer) // max(1, buffer.nbytes))

    def read(start: int) -> None:
        rows = slice(start, min(start + step, len(buffer)))
        _copy(source, name, source.tensor(name, rows=rows), buffer[rows])

    _for_each(read, range(0, len(buffer), step), 2 * TABLE_BLOCK_BYTES)


def _read_quantized(
    source: ModelSource, name: str, codes: HostArray, scales: HostArray, k: int
) -> None:
    """Fills codes and scales of a table [N, k], quantising blocks of its rows."""
    step = max(1, TABLE_BLOCK_BYTES // (4 * k))

    def read(start: int) -> None:
        rows = slice(start, min(start + step, len(codes)))
        values = np.empty((rows.stop - start, k), np.float32)
        _copy(source, name, source.tensor(name, rows=rows), values)
        codes[rows], scales[rows] = quantize_blocks(values, 8 if codes.dtype == np.int8 else 4)

    # The rounding has a few float arrays of the size of its input.
    _for_each(read, range(0, len(codes), step), 8 * TABLE_BLOCK_BYTES)


def _copy(source: ModelSource, what: str, found: HostArray, place: HostArray) -> None:
    """Copies with a cast between float dtypes."""
    _check_shape(source, what, found, place.shape)
    np.copyto(place, found, casting="unsafe")


def _check_shape(
    source: ModelSource, what: str, found: HostArray, expected: tuple[int, ...]
) -> None:
    if found.shape != expected:
        raise FabricError(
            f"{what} in {source.origin} has another shape",
            expected=str(list(expected)),
            found=str(list(found.shape)),
        )


def _for_each(read: Callable[[int], None], items: Iterable[int], scratch: int) -> None:
    """Calls ``read``, which needs ``scratch`` bytes, on some threads: it waits for the disk."""
    with ThreadPoolExecutor(max(1, min(WORKERS, SCRATCH_BYTES // scratch))) as pool:
        try:
            for _ in pool.map(read, items):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _aligned(layout: Layout) -> HostArray:
    """An uninitialised array that jax can take over on CPU."""
    dtype = np.dtype(layout.dtype)
    size = int(np.prod(layout.shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(layout.shape)


def _to_device(buffer: HostArray) -> jax.Array:
    """The array of jax; on CPU it is ``buffer``, which nobody else may then change."""
    array: Any = jax.device_put(buffer, may_alias=True)
    return jax.block_until_ready(array)
