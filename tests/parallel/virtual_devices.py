"""Programs in processes with several virtual CPU devices, and the meshes of eight."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fabric_jax.parallel.mesh import AXES

ROOT = Path(__file__).resolve().parents[2]
EVERY_MESH = [
    ",".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if sizes[0] * sizes[1] * sizes[2] == 8
]


def run_program(name: str, *words: str, devices: int = 8, of: str = "parallel") -> Any:
    """The JSON that a program of a folder of tests prints."""
    program = ROOT / "tests" / of / "programs" / f"{name}.py"
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}".strip(),
    }
    result = subprocess.run(
        [sys.executable, str(program), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
