"""The few PTX instructions of the kernels' inline assembly, carried out on arrays.

Kernels for CUDA can't be interpreted without a GPU, for Pallas does not read PTX. This does, as the
instruction set defines each instruction (PTX ISA, section 9.7), on groups of elements in registers
as Triton packs them: operands in the order of results, then arguments, four bytes a register, what
is consecutive in a tensor consecutive in registers.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Register = jax.Array
"""uint32 [groups]."""


def elementwise_inline_asm(
    asm: str, *, args: Sequence[jax.Array], constraints: str, pack: int, result_shape_dtypes: Any
) -> list[jax.Array]:
    """As ``jax.experimental.pallas.triton`` has it."""
    inputs = [register for x in args for register in _registers(x, pack)]
    counts = [pack * jnp.dtype(out.dtype).itemsize // 4 or 1 for out in result_shape_dtypes]
    outputs = sum(counts)
    assert constraints.count("=") == outputs
    assert len(constraints.split(",")) == outputs + len(inputs)
    names: dict[str, Register] = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    for line in re.sub(r"[{}]", "", asm).split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            _run(line.strip(), names)
    results: list[jax.Array] = []
    for out, count in zip(result_shape_dtypes, counts, strict=True):
        first = sum(counts[: len(results)])
        found = jnp.stack([names[f"${first + i}"] for i in range(count)], axis=-1)
        results.append(_elements(found, out))
    return results


def _registers(x: jax.Array, pack: int) -> list[Register]:
    size = x.dtype.itemsize
    groups = x.reshape(-1, pack)
    if size < 4:
        groups = lax.bitcast_convert_type(groups.reshape(len(groups), -1, 4 // size), jnp.uint32)
    else:
        groups = lax.bitcast_convert_type(groups, jnp.uint32)
    return [groups[:, i] for i in range(groups.shape[1])]


def _elements(registers: jax.Array, out: jax.ShapeDtypeStruct) -> jax.Array:
    return lax.bitcast_convert_type(registers, out.dtype).reshape(out.shape)


def _run(line: str, names: dict[str, Register]) -> None:
    instruction, rest = line.split(None, 1)
    target, *operands = [word.strip() for word in rest.split(",")]
    shape = next(iter(names.values())).shape
    values = [
        names[word] if word in names else jnp.full(shape, int(word, 0), jnp.uint32)
        for word in operands
    ]
    names[target] = INSTRUCTIONS[instruction](*values)


def _bytes(x: Register) -> list[Register]:
    return [(x >> (8 * i)) & 0xFF for i in range(4)]


def _permute(a: Register, b: Register, selector: Register) -> Register:
    every = jnp.stack([*_bytes(a), *_bytes(b)], axis=-1)
    result = jnp.zeros_like(a)
    for i in range(4):
        chosen = (selector >> (4 * i)) & 0x7
        byte = jnp.take_along_axis(every, chosen[:, None].astype(jnp.int32), axis=-1)[:, 0]
        result = result | (byte << (8 * i))
    return result


def _signed(x: Register) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _dot(a: Register, b: Register, c: Register) -> Register:
    total = _signed(c)
    for x, y in zip(_bytes(a), _bytes(b), strict=True):
        total = total + (_signed(x) << 24 >> 24) * (_signed(y) << 24 >> 24)
    return lax.bitcast_convert_type(total, jnp.uint32)


def _floats(call: Callable[..., jax.Array]) -> Callable[..., Register]:
    def run(*registers: Register) -> Register:
        values = [lax.bitcast_convert_type(x, jnp.float32) for x in registers]
        return lax.bitcast_convert_type(call(*values), jnp.uint32)

    return run


def _halves(dtype: Any) -> Callable[..., Register]:
    """``a · b + c`` of two halves; exact in float32 for the numbers that kernels have there."""

    def run(*registers: Register) -> Register:
        a, b, c = (lax.bitcast_convert_type(x, dtype).astype(jnp.float32) for x in registers)
        return lax.bitcast_convert_type((a * b + c).astype(dtype), jnp.uint32)

    return run


def _to_integer(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(
        jnp.where(jnp.isnan(x), 0.0, jnp.rint(x)).astype(jnp.int32), jnp.float32
    )


INSTRUCTIONS: dict[str, Callable[..., Register]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "neg.s32": lambda a: lax.bitcast_convert_type(-_signed(a), jnp.uint32),
    "prmt.b32": _permute,
    "dp4a.s32.s32": _dot,
    "rcp.rn.f32": _floats(lambda a: 1.0 / a),
    "mul.rn.f32": _floats(lambda a, b: a * b),
    "cvt.rni.s32.f32": _floats(_to_integer),
    "fma.rn.bf16x2": _halves(jnp.bfloat16),
    "fma.rn.f16x2": _halves(jnp.float16),
}
