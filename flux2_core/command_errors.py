"""What the command line says about an error: one line, for people."""

from __future__ import annotations

import sys


def describe_error(error: BaseException) -> str:
    """One line for any error: what happened and what to do."""
    text = " ".join(str(error).split())
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and is_out_of_memory(error)):
        return f"out of memory ({text or 'no more to be had'}); take a smaller --image_size, or --vae_tiling"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}; check the path, its permissions and the free space"
    if isinstance(error, (ValueError, OSError)) or type(error).__name__ in ("SafetensorError", "Stopped"):
        return text or type(error).__name__
    return f"internal error, {type(error).__name__}: {text}; run again with --debug for the traceback and report it"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; not everywhere has torch a class of its own for that."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Libraries on CUDA (cuBLAS, Triton, the driver) allocate for themselves, and tell it in words too.
    told = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    told += ("Triton Error [CUDA]: out of memory",)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)
