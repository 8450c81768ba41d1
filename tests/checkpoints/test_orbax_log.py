"""What a user sees of errors that nobody can raise: not those of orbax's closed event loops."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fabric_jax.checkpoints import orbax_log

CLOSED = """
import asyncio
import tensorstore as ts
from fabric_jax.checkpoints.orbax_log import import_orbax

import_orbax()

async def leave():
    # Awaited by nobody when the loop is closed, as the other arrays of a checkpoint that fails.
    promise, future = ts.Promise.new()
    asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    return promise

async def wait(future):
    await future

loop = asyncio.new_event_loop()
promise = loop.run_until_complete(leave())
loop.close()
promise.set_result(1)
print("done")
"""


def test_results_for_a_closed_loop_are_dropped_silently() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLOSED], capture_output=True, text=True, check=True
    )
    assert "done" in result.stdout
    assert "Event loop is closed" not in result.stderr


def test_other_errors_that_nobody_can_raise_are_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(args.exc_value))
    orbax_log._drop_late_callbacks()  # pyright: ignore[reportPrivateUsage]
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as closed:
        loop.call_soon_threadsafe(print)
    errors = [(closed.value, None), (closed.value, print), (RuntimeError("another"), None)]
    for error, where in errors:
        args = SimpleNamespace(exc_type=RuntimeError, exc_value=error, object=where)
        sys.unraisablehook(args)  # pyright: ignore[reportArgumentType]
    assert told == [closed.value, errors[2][0]]
