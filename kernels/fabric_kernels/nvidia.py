"""Which NVIDIA GPU programs run on, if any."""

import jax

Capability = tuple[int, int]
NONE: Capability = (0, 0)
AMPERE: Capability = (8, 0)
"""The first with bfloat16: from there on Triton's kernels are what runs where nobody says so."""
HOPPER: Capability = (9, 0)


def compute_capability() -> Capability:
    """Of the CUDA GPU that programs run on; ``NONE`` where they run on something else."""
    if jax.default_backend() != "gpu":
        return NONE
    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    # AMD's architectures have names, such as gfx942, where NVIDIA's have numbers.
    major, _, minor = found.partition(".")
    return (int(major), int(minor or 0)) if major.isdecimal() else NONE
