"""Products of sharded arguments in plain ``jit`` on eight virtual CPU devices, against one device.

Run as a process with an implementation, and "everything" or "some": the number of devices is fixed
for a process. Prints one JSON object: for each case what differs from one device, what the compiled
program moves, and how its first result lies.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import (
    LowRank,
    TernaryWeight,
    pack,
    ternary_linear,
    ternary_matmul,
    ternary_matmul_transposed,
)
from fabric_kernels.packing import Packing
from fabric_kernels.ternary_matmul import ternary_linear_transposed
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, N, RANK, LAYERS = (4, 6), (16, 24), 3, 3
MESH = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How arguments lie.

    Attributes:
        x: of [B, T, K].
        weights: of each [N, W].
        y: of the first output [B, T, N], as it has to come out.
    """

    x: P
    weights: tuple[P, P]
    y: P


def alike(spec: P) -> tuple[P, P]:
    return spec, spec


LAYOUTS = {
    "rows": Layout(x=P("d"), weights=alike(P()), y=P("d")),
    "both axes of rows": Layout(x=P("t", "d"), weights=alike(P()), y=P("t", "d")),
    "outputs": Layout(x=P("d"), weights=alike(P("t")), y=P("d", None, "t")),
    "outputs of one": Layout(x=P("d"), weights=(P("t"), P()), y=P("d", None, "t")),
    "inputs": Layout(x=P("d", None, "t"), weights=alike(P(None, "t")), y=P("d")),
    "inputs, whole rows": Layout(x=P(), weights=alike(P(None, "t")), y=P()),
    "inputs along two axes": Layout(x=P(), weights=alike(P(None, ("d", "t"))), y=P()),
    "both": Layout(x=P(), weights=alike(P("d", "t")), y=P(None, None, "d")),
    "rows and outputs along one axis": Layout(x=P("t"), weights=alike(P("t")), y=P("t")),
}


@dataclass(frozen=True)
class Problem:
    """Arguments on one device."""

    x: jax.Array
    weights: tuple[TernaryWeight, ...]
    adapters: tuple[LowRank | None, ...]


def problem(packing: Packing, k: int, dtype: Any, stack: int | None = None) -> Problem:
    rng = np.random.default_rng(0)
    lead = () if stack is None else (stack,)
    weights = tuple(
        TernaryWeight(
            pack(jnp.asarray(rng.integers(-1, 2, (*lead, n, k)), jnp.int8), packing),
            jnp.asarray(rng.uniform(0.01, 0.03, lead), jnp.float32),
            None if stack is None else jnp.zeros((), jnp.int32),
            k,
            packing,
        )
        for n in N
    )
    a = jnp.asarray(rng.standard_normal((RANK, k)), jnp.float32)
    b = jnp.asarray(rng.standard_normal((RANK, N[0])), jnp.float32)
    x = jnp.asarray(rng.standard_normal((*ROWS, k)) * rng.uniform(0.1, 9, (*ROWS, 1)), dtype)
    return Problem(x, weights, (LowRank(a, b, 0.5), None))


def place(whole: Problem, layout: Layout) -> Problem:
    def put(array: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(array, NamedSharding(MESH, spec))

    def weight(one: TernaryWeight, spec: P) -> TernaryWeight:
        lead = (None,) * (one.packed.ndim - 2)
        everywhere = jax.tree.map(lambda leaf: put(leaf, P()), one)
        return replace(everywhere, packed=put(one.packed, P(*lead, *spec)))

    return Problem(
        put(whole.x, layout.x),
        tuple(map(weight, whole.weights, layout.weights)),
        jax.tree.map(lambda leaf: put(leaf, P()), whole.adapters),
    )


def codes(how: Any, x: jax.Array, weights: Any, adapters: Any) -> Any:
    del adapters
    x8 = jnp.clip(jnp.rint(x.astype(jnp.float32) * 9), -128, 127).astype(jnp.int8)
    first = weights[0]
    return ternary_matmul(x8, first.packed, packing=first.packing, implementation=how)


def linear(how: Any, x: jax.Array, weights: Any, adapters: Any) -> Any:
    del adapters
    return ternary_linear(x, weights, implementation=how)


def floats(how: Any, x: jax.Array, weights: Any, adapters: Any) -> Any:
    del adapters
    first, named = weights[0], {"packing": weights[0].packing, "implementation": how}
    y = ternary_matmul(x, first.packed, **named)
    return y, ternary_matmul_transposed(jnp.sin(y), first.packed, first.k, **named)


def adapted(how: Any, x: jax.Array, weights: Any, adapters: Any) -> Any:
    def run(x: jax.Array, adapters: Any) -> Any:
        return ternary_linear(x, weights, adapters, implementation=how)

    outputs, pull = jax.vjp(run, x, adapters)
    return outputs, pull(tuple(jnp.sin(y) for y in outputs))


def transposed(how: Any, x: jax.Array, weights: Any, adapters: Any) -> Any:
    outputs = linear(how, x, weights, adapters)
    return outputs, ternary_linear_transposed(outputs, weights, implementation=how)


def functions() -> dict[str, Callable[..., Any]]:
    """Of implementation, x, weights, adapters; "bits" are the same bits on every mesh."""
    return {
        "codes, bits": codes,
        "linear, bits": linear,
        "floats": floats,
        "adapters": adapted,
        "transposed": transposed,
    }


def over_layers(how: Any, x: jax.Array, weights: Any, adapters: Any) -> Any:
    """A residual stream through a stack whose layers are named by index, and its gradients."""

    def loss(x: jax.Array, adapters: Any) -> jax.Array:
        def layer(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            here = tuple(replace(weight, layer=number) for weight in weights)
            y, _ = ternary_linear(x, here, adapters, implementation=how)
            return x + jnp.sum(y, axis=-1, keepdims=True) * 0.1, None

        return jnp.sum(jnp.sin(lax.scan(layer, x, jnp.arange(LAYERS))[0]))

    return jax.value_and_grad(loss, argnums=(0, 1))(x, adapters)


def compare(run: Callable[..., Any], whole: Problem, layout: Layout) -> dict[str, Any]:
    expected = jax.jit(run)(whole.x, whole.weights, whole.adapters)
    own = place(whole, layout)
    compiled = jax.jit(run).lower(own.x, own.weights, own.adapters).compile()
    found = compiled(own.x, own.weights, own.adapters)
    errors: list[float] = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(leaf, np.float64) for leaf in (a, b))
        errors.append(float(np.max(np.abs(one - other)) / max(np.max(np.abs(other)), 1e-9)))
    first = jax.tree.leaves(found)[0]
    return {
        "error": max(errors),
        "moves": moves(compiled.as_text() or ""),
        "as expected": first.sharding.is_equivalent_to(NamedSharding(MESH, layout.y), first.ndim),
        "lies": str(first.sharding.spec),
    }


def moves(program: str) -> list[str]:
    """Type and name of each collective of a compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?(\w+)\[[^=]*? ({names})(?:-start)?\(", program)
    return sorted({f"{dtype} {name}" for dtype, name in found})


def main() -> None:
    implementation, everything = sys.argv[1], sys.argv[2] == "everything"
    found: dict[str, Any] = {}

    def take(label: str, whole: Problem, layout: Layout, names: Sequence[str]) -> None:
        for name in names:
            run = over_layers if name == "layers" else functions()[name]
            result = compare(partial(run, implementation), whole, layout)
            found[f"{label}: {name}"] = result

    whole = problem("ternary2", 64, jnp.float32)
    stack = problem("ternary2", 64, jnp.float32, LAYERS)
    few = ["linear, bits", "adapters"]
    for where, layout in LAYOUTS.items():
        take(where, whole, layout, list(functions()) if everything else few)
    if not everything:
        take("inputs", stack, replace(LAYOUTS["inputs"], y=P()), ["layers"])
        print(json.dumps(found))
        return
    for where in ("rows", "outputs", "inputs", "both"):
        take(where, stack, replace(LAYOUTS[where], y=P()), ["layers"])
    fifths = problem("ternary1.6", 80, jnp.float32)
    for where in ("outputs", "inputs"):
        take(f"ternary1.6, {where}", fifths, LAYOUTS[where], list(functions()))
    # 70 channels are 18 bytes, the last one half full: halves hold 36 and 34 channels.
    halves = Layout(x=P(), weights=alike(P(None, "d")), y=P())
    ragged = problem("ternary2", 70, jnp.float32)
    take("half a byte", ragged, halves, list(functions()))
    short = problem("ternary2", 64, jnp.bfloat16)
    for where in ("outputs", "inputs"):
        take(f"bfloat16, {where}", short, LAYOUTS[where], ["linear, bits"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
