"""Products of sharded arrays on four virtual CPU devices, against those of whole ones.

Run as a process: the number of devices is fixed for a process. Prints what differs, or "equal".
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import LowRank, TernaryWeight, pack, ternary_linear, ternary_matmul
from jax.sharding import AxisType, NamedSharding, PartitionSpec

M, N, K, RANK = 8, 36, 70, 2
WHOLE, ROWS = PartitionSpec(), PartitionSpec("d")


def cases(implementation: Any) -> dict[str, tuple[Callable[..., Any], Any, Any, Any]]:
    """Function, arguments, their sharding and that of the results under shard_map."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-1, 2, (N, K)), jnp.int8)
    x = jnp.asarray(rng.standard_normal((M, K)), jnp.float32)
    x8 = jnp.asarray(rng.integers(-128, 128, (M, K)), jnp.int8)
    a, b = (jnp.asarray(rng.standard_normal((RANK, n)), jnp.float32) for n in (K, N))
    chosen = {"implementation": implementation}

    def linear(x: jax.Array, weight: TernaryWeight) -> jax.Array:
        return ternary_linear(x, (weight,), **chosen)[0]

    def backward(x: jax.Array, weight: TernaryWeight, adapter: LowRank) -> jax.Array:
        outputs, pull = jax.vjp(lambda x: ternary_linear(x, (weight,), (adapter,), **chosen)[0], x)
        return pull(jnp.sin(outputs))[0]

    found: dict[str, tuple[Callable[..., Any], Any, Any, Any]] = {}
    for packing in ("ternary2", "ternary1.6"):
        packed = pack(codes, packing)
        weight = TernaryWeight(packed, jnp.float32(0.3), None, K, packing)
        by_rows = TernaryWeight(ROWS, WHOLE, None, K, packing)  # type: ignore[arg-type]
        product = partial(ternary_matmul, packing=packing, **chosen)
        columns = PartitionSpec(None, "d")
        adapter = LowRank(a, b, 0.5)
        found |= {
            f"{packing}-batch": (product, (x8, packed), (ROWS, WHOLE), ROWS),
            f"{packing}-outputs": (product, (x8, packed), (WHOLE, ROWS), columns),
            f"{packing}-linear-batch": (linear, (x, weight), (ROWS, WHOLE), ROWS),
            f"{packing}-linear-outputs": (linear, (x, weight), (WHOLE, by_rows), columns),
            f"{packing}-backward-batch": (
                backward,
                (x, weight, adapter),
                (ROWS, WHOLE, WHOLE),
                ROWS,
            ),
        }
    return found


def same(implementation: str, found: np.ndarray, expected: np.ndarray) -> bool:
    """To the last bit, but for the roundings of floats that XLA puts into another order."""
    if implementation == "cpu" or expected.dtype == np.int32:
        return np.array_equal(found, expected)
    return bool(np.max(np.abs(found - expected)) <= 1e-6 * np.max(np.abs(expected)))


def main() -> None:
    assert len(jax.devices()) == 4, jax.devices()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    wrong: list[str] = []
    for name, (function, arguments, specs, out) in cases(sys.argv[1]).items():
        expected = np.asarray(jax.jit(function)(*arguments))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )
        sharded = jax.device_put(arguments, shardings)
        # The gradient rules don't say over which devices a result varies.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        for how, call in (("jit", function), ("shard_map", mapped)):
            y = jax.jit(call)(*sharded)
            if not same(sys.argv[1], np.asarray(y), expected):
                wrong.append(f"{name} under {how}")
            if how == "shard_map" and len(y.addressable_shards) != 4:
                wrong.append(f"{name} is not sharded")
    print(", ".join(wrong) or "equal")


if __name__ == "__main__":
    main()
