"""Cached tensors that are read from the disk once in a run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..flux2_core.device_memory import available_host_bytes
from .cache_plan import CacheFile, read_cached

HOST_SHARE = 0.25
"""Of the host memory that is available when a run begins, for what is kept."""
UNKNOWN_BYTES = 2**30
"""Where the system does not tell what is available."""


class KeptFiles:
    """Reads cached files and keeps their tensors as long as there is room; what comes later is read every time.

    Pictures come in another order in every epoch, so that throwing out what was used longest ago would win nothing.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """Takes the bytes that may be kept; None: a share of what is available now."""
        if max_bytes is None:
            available = available_host_bytes()
            max_bytes = UNKNOWN_BYTES if available is None else round(HOST_SHARE * available)
        self.free_bytes = max_bytes
        self._kept: dict[tuple[Path, str], Tensor] = {}

    def __call__(self, folder: Path, file: CacheFile) -> Tensor:
        """The tensor of a file, see `cache_plan.read_cached`; it must not be written to."""
        key = (folder, file.name)
        if key not in self._kept:
            tensor = read_cached(folder, file)
            if tensor.nbytes > self.free_bytes:
                return tensor
            self.free_bytes -= tensor.nbytes
            self._kept[key] = tensor
        return self._kept[key]
