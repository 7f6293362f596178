"""How much memory there is to plan with, on the device and in the host."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
from pathlib import Path

import torch

from .launch import num_local_processes

logger = logging.getLogger(__name__)

GIB = 2**30
RESERVE_BYTES, RESERVE_SHARE = GIB // 4, 0.06
"""Of the device's free memory left alone: for other programs, and because the caching allocator wastes some."""
HOST_RESERVE_SHARE = 0.1
MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def device_budget(device: torch.device, budget_gib: float | None = None) -> int | None:
    """Bytes that tensors may take on a device; None where nothing limits them.

    Args:
        budget_gib: what was asked for, in GiB; None, or more than a CUDA device has: what is free there, less a
            reserve.

    Raises:
        ValueError: the budget is no number above 0.
    """
    if budget_gib is not None:
        if not (math.isfinite(budget_gib) and budget_gib > 0):
            raise ValueError(f"the memory budget is {budget_gib}; it must be a number of GiB above 0, such as 8")
        if device.type != "cuda":
            return round(budget_gib * GIB)
        total = torch.cuda.mem_get_info(device)[1]
        if budget_gib * GIB <= total:
            return round(budget_gib * GIB)
        logger.warning(
            "the memory budget of %g GiB is more than the %.1f GiB of the device: what is free is used",
            budget_gib,
            total / GIB,
        )
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What this process has cached counts as taken there, but will be used again.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, round(free * (1 - RESERVE_SHARE)) - RESERVE_BYTES)


def has_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bf16 as fast as in fp16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def available_host_bytes() -> int | None:
    """Host memory that can be taken without swapping, less a reserve; None where the system does not tell.

    Processes that were launched together have equal shares of it.
    """
    found = [size for size in (_system_bytes(), _control_group_bytes()) if size is not None]
    return round(min(found) * (1 - HOST_RESERVE_SHARE) / num_local_processes()) if found else None


def _system_bytes() -> int | None:
    if sys.platform == "win32":
        return _windows_bytes()
    try:
        for line in MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:  # macOS does not tell what is available, only what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _control_group_bytes() -> int | None:
    """What the limit of a container leaves."""
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        # Pages of files count as used, but are given back when memory is short.
        files = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        return None if limit == "max" else max(0, int(limit) - used + files)
    except (OSError, ValueError, IndexError):
        return None


def _windows_bytes() -> int | None:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "a", "b", "c", "d", "e")),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    found = ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # pyright: ignore
    return status.available if found else None
