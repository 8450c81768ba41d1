"""Builds the wheel: hatchling, with the CPU kernels compiled into it where that is possible.

This is both the build backend (hatchling's, asking for jaxlib's headers as well) and hatchling's
build hook. An editable installation and an sdist hold no library; there, and wherever none could be
compiled, the package builds one itself when it is first needed.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling import build as backend
from hatchling.build import build_editable as build_editable
from hatchling.build import build_sdist as build_sdist
from hatchling.build import build_wheel as build_wheel
from hatchling.build import get_requires_for_build_editable as get_requires_for_build_editable
from hatchling.build import get_requires_for_build_sdist as get_requires_for_build_sdist
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("kernels", "fabric_kernels")


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What hatchling asks for, and jaxlib for its headers where there is a compiler for them."""
    requirements = backend.get_requires_for_build_wheel(config_settings)
    builder = _builder()
    if _switched_off() or importlib.util.find_spec("jaxlib"):
        return requirements
    try:
        builder.find_compiler()
    except builder.BuildError:
        return requirements
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]
    return [*requirements, hook["headers"]]


class CpuLibraryHook(BuildHookInterface[Any]):
    """Compiles the CPU kernels and puts them into the wheel, which is then one platform's.

    A wheel without them is as good where they can be compiled later, so nothing fails for want of
    a compiler.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles before the files of the wheel are collected."""
        if version == "editable" or _switched_off():
            return
        builder = _builder()
        self._folder = Path(tempfile.mkdtemp(prefix="fabric_kernels-"))
        library = self._folder / "fabric_kernels_cpu.so"
        try:
            builder.build(library, builder.find_compiler(), builder.find_headers())
        except (builder.BuildError, OSError) as error:
            self.app.display_warning(f"The wheel will hold no compiled CPU kernels: {error}")
            # Stays where it holds the log that the message names.
            with contextlib.suppress(OSError):
                self._folder.rmdir()
            return
        for file in (library, builder.record_path(library)):
            build_data["force_include"][str(file)] = f"fabric_kernels/lib/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was compiled, once the wheel is written."""
        if not build_data.get("pure_python", True):
            shutil.rmtree(self._folder)


def _switched_off() -> bool:
    return os.environ.get("FABRIC_KERNELS_CPU", "1") == "0"


def _platform_tag() -> str:
    """Of this machine: what was compiled here promises nothing about older systems."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))


def _builder() -> ModuleType:
    """``fabric_kernels.build_cpu_library`` without its package, which imports jax."""
    name = "build_cpu_library"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / PACKAGE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
