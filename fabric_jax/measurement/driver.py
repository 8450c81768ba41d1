"""Memory of a GPU as its driver counts it: contexts, loaded code and pools included."""

import os
import shutil
import subprocess
import threading
from types import TracebackType

import jax

INTERVAL_SECONDS = 0.05


def driver_bytes() -> int | None:
    """Memory in use on the first visible NVIDIA GPU, all processes; None where it can't be read.

    ``nvidia-smi`` is asked, which comes with the driver. The share of one process is hidden in
    most containers, so a figure is worth something only on a GPU that nobody else uses.
    """
    if jax.default_backend() != "gpu" or shutil.which("nvidia-smi") is None:
        return None
    # The driver's own order, which is jax's where CUDA_DEVICE_ORDER says PCI_BUS_ID.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", first]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    text = answer.stdout.strip()
    return int(text) << 20 if answer.returncode == 0 and text.isdigit() else None


class DriverPeak:
    """Samples :func:`driver_bytes` while a block runs; ``peak`` is None where it can't be read.

    With preallocation (jax's default on a GPU) what is seen is the pool, not what is used of it.
    """

    def __init__(self) -> None:
        """Nothing is sampled yet."""
        self.peak: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "DriverPeak":
        """Starts sampling."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes a last sample and stops."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            last = self._stop.is_set()
            now = driver_bytes()
            if now is None:
                return
            self.peak = now if self.peak is None else max(self.peak, now)
            if last:
                return
            self._stop.wait(INTERVAL_SECONDS)
