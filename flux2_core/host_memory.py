"""Host memory as the operating system counts it."""

from __future__ import annotations

import ctypes
import sys


def trim_host_memory() -> None:
    """Hands freed memory back to the system, where the C library would keep it.

    A model is loaded by turns of large memory that is freed and smaller memory that stays. Between pieces that stay,
    glibc keeps what was freed: without this, half the size of the model is added to the peak.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library, musl say
