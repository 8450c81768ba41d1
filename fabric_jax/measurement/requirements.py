"""Which packages and accelerator plugins this installation lacks, and how to get them."""

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

GOOGLE_PCI = "0x1ae0"
# Google's virtual disks and network cards carry the same vendor number as its TPUs.
STORAGE_AND_NETWORK = ("0x01", "0x02")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that can be installed.

    Attributes:
        name: of the distribution, or of the extra for an accelerator.
        purpose: what needs it.
        required: training doesn't start without it.
    """

    name: str
    purpose: str
    required: bool


@dataclass(frozen=True, kw_only=True)
class MissingPart:
    """A part that isn't there, and the command that installs it."""

    part: Part
    command: str


PARTS = (
    Part(name="flax", purpose="the model", required=True),
    Part(name="optax", purpose="the optimizer", required=True),
    Part(name="orbax-checkpoint", purpose="checkpoints", required=True),
    Part(name="safetensors", purpose="model and adapter files", required=True),
    Part(name="datasets", purpose="reading rows", required=True),
    Part(name="grain", purpose="shuffling and resuming", required=True),
    Part(name="tokenizers", purpose="every tokenizer", required=True),
    Part(name="jinja2", purpose="chat templates", required=True),
    Part(name="tensorboardX", purpose="writing TensorBoard curves", required=True),
    Part(name="rich", purpose="progress and tables", required=True),
    Part(name="tyro", purpose="command-line flags", required=True),
    Part(name="gguf", purpose="vocabularies of .gguf files", required=False),
    Part(name="huggingface_hub", purpose="tokenizers and rows by hub name", required=False),
    Part(name="matplotlib", purpose="the quickstart's curves as PNG", required=False),
    Part(name="tensorboard", purpose="looking at TensorBoard curves", required=False),
)
ACCELERATORS = {
    "cuda": Part(name="cuda", purpose="the NVIDIA GPU of this machine", required=False),
    "rocm": Part(name="rocm", purpose="the AMD GPU of this machine", required=False),
    "tpu": Part(name="tpu", purpose="the TPU of this machine", required=False),
}


def missing_parts(platforms: set[str]) -> list[MissingPart]:
    """Parts that aren't installed.

    Args:
        platforms: those that jax has devices for; an accelerator that the machine has and jax
            doesn't see is missing its plugin.
    """
    missing = [
        MissingPart(part=part, command=install_command(part.name))
        for part in PARTS
        if not _installed(part.name)
    ]
    for extra in present_accelerators():
        if ("tpu" if extra == "tpu" else "gpu") not in platforms:
            missing.append(MissingPart(part=ACCELERATORS[extra], command=extra_command(extra)))
    return missing


def present_accelerators(root: Path = Path("/")) -> list[str]:
    """Names of the extras for the accelerators whose drivers or devices show under ``root``."""
    found: list[str] = []
    if (root / "dev/nvidiactl").exists() or (root / "proc/driver/nvidia/version").exists():
        found.append("cuda")
    if (root / "dev/kfd").exists():
        found.append("rocm")
    if any(_is_tpu(device) for device in (root / "sys/bus/pci/devices").glob("*")):
        found.append("tpu")
    return found


def install_command(name: str) -> str:
    """The command that installs one package in a version that fits this one."""
    return _pip([_requirement(name)])


def extra_command(extra: str) -> str:
    """The command that installs what an extra of this package asks for."""
    return _pip([text for text, _, group in _declared() if group == extra])


def _pip(requirements: list[str]) -> str:
    return "python -m pip install " + " ".join(f"'{text}'" for text in requirements)


def _requirement(name: str) -> str:
    python = sys.version_info[:2]
    for text, marker, extra in _declared():
        if extra is None and _same(text, name) and _fits(marker, python):
            return text
    return name


def _declared() -> list[tuple[str, str, str | None]]:
    """(requirement, marker, extra) of each dependency in this package's metadata."""
    try:
        lines = requires("fabric-jax") or []
    except PackageNotFoundError:
        return []
    rows: list[tuple[str, str, str | None]] = []
    for line in lines:
        text, _, marker = (piece.strip() for piece in line.partition(";"))
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        rows.append((text, marker, extra.group(1) if extra else None))
    return rows


def _fits(marker: str, python: tuple[int, int]) -> bool:
    """Whether a marker on the Python version, the only kind used, holds."""
    bound = re.search(r"python_version\s*(<|>=)\s*['\"](\d+)\.(\d+)['\"]", marker)
    if bound is None:
        return True
    limit = (int(bound.group(2)), int(bound.group(3)))
    return python < limit if bound.group(1) == "<" else python >= limit


def _same(requirement: str, name: str) -> bool:
    found = re.match(r"[\w.-]+", requirement)
    return found is not None and _normal(found.group()) == _normal(name)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _is_tpu(device: Path) -> bool:
    try:
        vendor = (device / "vendor").read_text().strip()
        kind = (device / "class").read_text().strip()
    except OSError:
        return False
    return vendor == GOOGLE_PCI and not kind.startswith(STORAGE_AND_NETWORK)
