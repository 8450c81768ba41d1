"""One operation around the Triton kernels: it picks how they run, and keeps JAX from warning.

JAX has deprecated the backend, and says so whenever a program is lowered, long after the function
that asked for a kernel has returned. So kernels are not part of a program until it is lowered, and
then within a scope that ignores that one warning.
"""

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Mode = Literal["interpret", "cuda", "rocm"]
"""What runs a kernel: only ``cuda`` has inline PTX, only ``interpret`` needs no GPU."""
MODES: dict[str, Mode] = {"cpu": "interpret", "cuda": "cuda", "rocm": "rocm"}
"""By the platform that a program is lowered for."""

_Shapes = tuple[jax.ShapeDtypeStruct, ...]


@contextmanager
def without_deprecation() -> Generator[None]:
    """A scope in which JAX doesn't warn of Pallas Triton; other warnings pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Tt]riton", category=DeprecationWarning)
        yield


def kernel_module(name: str, instead: str = "xla") -> ModuleType:
    """The module of Triton kernels of that full name, imported when it is first asked for.

    Raises:
        NotImplementedError: this JAX has no Pallas Triton; ``instead`` says which implementations
            do without.
    """
    try:
        with without_deprecation():
            return import_module(name)
    except ImportError as error:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Pallas Triton; use implementation {instead}"
        ) from error


def on_platform(call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args, mode=...)`` with the mode of the platform that the program is lowered for.

    Args:
        call: traces kernels; the shapes of its results don't depend on ``mode``.
        args: pytrees of arrays.
    """
    leaves, tree = jax.tree.flatten(args)

    def flat(*leaves: Any, mode: Mode) -> Any:
        return call(*jax.tree.unflatten(tree, leaves), mode=mode)

    outputs = jax.eval_shape(partial(flat, mode="interpret"), *leaves)
    shapes, out_tree = jax.tree.flatten(outputs)

    def body(*leaves: Any, mode: Mode) -> list[Any]:
        return jax.tree.leaves(flat(*leaves, mode=mode))

    return jax.tree.unflatten(out_tree, _call.bind(*leaves, body=body, shapes=tuple(shapes)))


_call = Primitive("fabric_triton")
_call.multiple_results = True


def _abstract(*_: Any, body: Callable[..., Any], shapes: _Shapes) -> list[Any]:
    del body
    return [ShapedArray(shape.shape, shape.dtype) for shape in shapes]


def _run(*args: Any, body: Callable[..., Any], shapes: _Shapes) -> Any:
    """Outside of ``jit``: a program of its own."""
    return jax.jit(partial(_call.bind, body=body, shapes=shapes))(*args)


def _lower(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    body: Callable[..., Any],
    shapes: _Shapes,
    mode: Mode,
) -> Any:
    del shapes
    with without_deprecation():
        return mlir.lower_fun(partial(body, mode=mode), multiple_results=True)(ctx, *args)


def _batch(
    args: Sequence[Any], dims: Sequence[Any], *, body: Callable[..., Any], shapes: _Shapes
) -> tuple[Any, list[int]]:
    def batched(*args: Any, mode: Mode) -> Any:
        return jax.vmap(partial(body, mode=mode), in_axes=list(dims))(*args)

    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    more = tuple(jax.ShapeDtypeStruct((size, *s.shape), s.dtype) for s in shapes)
    return _call.bind(*args, body=batched, shapes=more), [0] * len(shapes)


_call.def_abstract_eval(_abstract)
_call.def_impl(_run)
batching.primitive_batchers[_call] = _batch
for _platform, _mode in MODES.items():
    mlir.register_lowering(_call, partial(_lower, mode=_mode), platform=_platform)
