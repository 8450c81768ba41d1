"""What the benchmark times: products of one shape, by the kernels and by XLA."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fabric_kernels.packing import Packing, pack, packed_width, unpack
from fabric_kernels.ternary_matmul.api import GradientBits, ternary_linear, ternary_matmul
from fabric_kernels.ternary_matmul.weight import TernaryWeight

PACKINGS: tuple[Packing, ...] = ("ternary2", "ternary1.6")
# A call computes at least this, on one matrix after another: far more than dispatching it costs.
CALL_OPERATIONS = 2.5e8
# Of the matrices that XLA multiplies by, which are 4 to 20 times as large as packed ones.
UNPACKED_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compiled call to time.

    Attributes:
        name: ``linear`` (quantises its input), ``integers``, ``transposed16``, ``transposed24``;
            ``xla-...`` for XLA's dots with unpacked matrices.
        packing: of the weights, empty where they are not packed.
        n: N.
        k: K.
        rows: M.
        layers: different matrices that one call multiplies by, one after another.
        weight_bytes: of all of them, as they are stored.
        run: makes the call and waits for it.
    """

    name: str
    packing: str
    n: int
    k: int
    rows: int
    layers: int
    weight_bytes: int
    run: Callable[[], object]

    @property
    def operations(self) -> float:
        """Multiplications and additions of a call."""
        return 2.0 * self.rows * self.n * self.k * self.layers


def layers_for(n: int, k: int, rows: int, most: int) -> int:
    """How many matrices a call takes so that it is not dispatch that is timed."""
    return int(np.clip(np.ceil(CALL_OPERATIONS / (2.0 * rows * n * k)), 1, most))


def kernel_cases(n: int, k: int, rows: int, layers: int) -> list[Case]:
    """The kernels' products with a stack of ``layers`` matrices, in both packings."""
    x, codes, g = _operands(n, k, rows)
    cases: list[Case] = []
    for packing in PACKINGS:
        packed = make_stack(n, k, layers, packing)
        scales = jnp.full((layers,), 0.02, jnp.float32)
        cases += [
            _case(name, packing, (n, k, rows, layers), packed.nbytes, call, *operands)
            for name, call, *operands in (
                ("linear", _scan(_linear(k, packing)), x, packed, scales),
                ("integers", _integers(packing), codes, tuple(packed)),
                ("transposed16", _scan(_transposed(k, packing, 16)), g, packed, scales),
                ("transposed24", _scan(_transposed(k, packing, 24)), g, packed, scales),
            )
        ]
    return cases


def streaming_cases(n: int, k: int, stack_bytes: int) -> list[Case]:
    """One row by stacks that no cache holds: as many layers in both packings."""
    layers = -(-stack_bytes // (n * packed_width(k)))
    x = _operands(n, k, 1)[0]
    scales = jnp.full((layers,), 0.02, jnp.float32)
    cases: list[Case] = []
    for packing in PACKINGS:
        packed = make_stack(n, k, layers, packing)
        call = _scan(_linear(k, packing))
        size = (n, k, 1, layers)
        cases.append(_case("streaming", packing, size, packed.nbytes, call, x, packed, scales))
    return cases


def xla_cases(n: int, k: int, rows: int, layers: int) -> list[Case]:
    """XLA's dots with the same matrices unpacked, each the way round that may be the fastest."""
    layers = int(np.clip(UNPACKED_BYTES // (4 * n * k), 1, layers))
    x, codes, g = _operands(n, k, rows)
    packed = make_stack(n, k, layers, "ternary2")
    ints = tuple(unpack(one, k, "ternary2") for one in packed)
    floats = tuple(one.astype(jnp.float32) for one in ints)
    turned = tuple(jnp.asarray(np.asarray(one).T) for one in floats)
    cases: list[Case] = []
    for name, operand, axis, weights in (
        ("xla-float32", x, 1, floats),
        ("xla-float32-kn", x, 0, turned),
        ("xla-int8", codes, 1, ints),
        ("xla-float32-transposed", g, 0, floats),
    ):
        size, total = (n, k, rows, layers), sum(w.nbytes for w in weights)
        cases.append(_case(name, "", size, total, _dots(axis), operand, weights))
    return cases


def make_stack(n: int, k: int, layers: int, packing: Packing) -> jax.Array:
    """uint8 [L, N, W] of bytes that a packer writes, chosen at random; layers are alike."""
    per_byte = 4 if packing == "ternary2" else 5
    codes = np.array(list(product((-1, 0, 1), repeat=per_byte)), np.int8)
    known = np.asarray(pack(jnp.asarray(codes), packing))[:, 0]
    shape = (n, packed_width(k, packing))
    layer = known[np.random.default_rng(0).integers(0, len(known), shape, np.uint8)]
    return jnp.asarray(np.broadcast_to(layer, (layers, *shape)))


def _operands(n: int, k: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, codes [M, K] and a gradient [M, N]."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((rows, k), np.float32))
    codes = jnp.asarray(rng.integers(-128, 128, (rows, k)), jnp.int8)
    return x, codes, jnp.asarray(rng.standard_normal((rows, n), np.float32))


Body = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _linear(k: int, packing: Packing) -> Body:
    def body(x: jax.Array, packed: jax.Array, scales: jax.Array, layer: jax.Array) -> jax.Array:
        weight = TernaryWeight(packed, scales, layer, k, packing)
        return ternary_linear(x, (weight,), implementation="cpu")[0]

    return body


def _transposed(k: int, packing: Packing, bits: GradientBits) -> Body:
    def body(g: jax.Array, packed: jax.Array, scales: jax.Array, layer: jax.Array) -> jax.Array:
        weight = TernaryWeight(packed, scales, layer, k, packing)

        def linear(x: jax.Array) -> jax.Array:
            return ternary_linear(x, (weight,), implementation="cpu", gradient_bits=bits)[0]

        # The forward product is not used, and so not in the program.
        return jax.vjp(linear, jnp.zeros((g.shape[0], k), jnp.float32))[1](g)[0]

    return body


def _scan(body: Body) -> Callable[..., jax.Array]:
    """One matrix of the stack after another; the last product is the result."""

    def call(operand: jax.Array, packed: jax.Array, scales: jax.Array) -> jax.Array:
        def step(_: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            return body(operand, packed, scales, layer), None

        out = jax.eval_shape(body, operand, packed, scales, jnp.int32(0))
        return lax.scan(step, jnp.zeros(out.shape, out.dtype), jnp.arange(packed.shape[0]))[0]

    return call


def _integers(packing: Packing) -> Callable[..., list[jax.Array]]:
    def call(codes: jax.Array, matrices: tuple[jax.Array, ...]) -> list[jax.Array]:
        return [ternary_matmul(codes, m, packing=packing, implementation="cpu") for m in matrices]

    return call


def _dots(axis: int) -> Callable[..., list[jax.Array]]:
    def call(operand: jax.Array, matrices: tuple[jax.Array, ...]) -> list[jax.Array]:
        accumulate = jnp.int32 if operand.dtype == jnp.int8 else jnp.float32
        contract = (((1,), (axis,)), ((), ()))
        return [
            lax.dot_general(operand, m, contract, preferred_element_type=accumulate)
            for m in matrices
        ]

    return call


def _case(
    name: str,
    packing: str,
    size: tuple[int, int, int, int],
    weight_bytes: int,
    call: Callable[..., Any],
    *operands: Any,
) -> Case:
    """Compiles ``call`` for these operands and runs it once."""
    n, k, rows, layers = size
    compiled = jax.jit(call).lower(*operands).compile()

    def run() -> object:
        return jax.block_until_ready(compiled(*operands))

    run()
    return Case(
        name=name,
        packing=packing,
        n=n,
        k=k,
        rows=rows,
        layers=layers,
        weight_bytes=weight_bytes,
        run=run,
    )
