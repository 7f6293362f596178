"""Kernels for softmax attention, by name, and which one is fastest where.

Nothing is imported or set until a kernel is asked for. All but ``sage`` compute the same up to rounding; ``sage``
(SageAttention, arXiv:2411.10958) multiplies in 8 bits and is never chosen by itself.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .command_errors import is_out_of_memory

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "sdpa", "cudnn", "flash", "efficient", "flash3", "sage"]
"""``sdpa`` is PyTorch's own choice, ``cudnn``, ``flash`` and ``efficient`` are what it chooses among; ``flash3``
(FlashAttention-3) and ``sage`` are packages. ``auto`` measures the exact ones on CUDA and is ``sdpa`` elsewhere."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[B, H, N, head_dim]`` to ``[B, H, N, head_dim]``."""

TORCH_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PACKAGES = {"flash3": "flash_attn_interface", "sage": "sageattention"}
INSTALL = {
    "flash3": "build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    "sage": "install it from github.com/thu-ml/SageAttention",
}
CANDIDATES: tuple[AttentionBackend, ...] = ("sdpa", "cudnn", "flash", "flash3")
"""What ``auto`` measures; the first one stays where another is not faster by `MARGIN`."""
MARGIN = 0.03
NUM_TIMED = 3
LARGEST_ERROR = 2e-2
"""Relative L2 distance to ``sdpa`` up to which a candidate counts as exact, in 16 bits."""

_fastest: dict[tuple[Any, ...], AttentionBackend] = {}
"""What was measured, by device, type, width of a head, batch times heads, and powers of two of both lengths."""

_out_of_graphs: dict[AttentionBackend, Kernel] = {}
"""Packages that torch.compile is to call and not to trace. Made when one is first used: it loads the whole compiler."""


def attend(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """Softmax attention of ``[B, H, N, head_dim]``, of the same shape."""
    if backend != "auto":
        return kernel(backend)(q, k, v)
    found = fastest(q, k, v) if q.is_cuda else "sdpa"
    if found == "sdpa":
        return kernel(found)(q, k, v)
    try:
        return kernel(found)(q, k, v)
    except Exception as error:  # lengths that were not measured may be refused
        if is_out_of_memory(error):
            raise
        logger.warning("attention %s does not take %s (%s); PyTorch's choice is used", found, tuple(q.shape), error)
        _fastest[_key(q, k)] = "sdpa"
    return kernel("sdpa")(q, k, v)


def check_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Tries a backend on a few numbers.

    Raises:
        ValueError: the name is unknown, a package is missing, or it does not run on this device in this type.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"the attention is {backend!r}; allowed are {', '.join(get_args(AttentionBackend))}")
    if backend in ("auto", "sdpa"):
        return
    if backend in PACKAGES:
        _package(backend)
    q = torch.ones(1, 2, 16, head_dim, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            kernel(backend)(q, q, q)
    except Exception as error:  # each package has errors of its own
        raise ValueError(
            f"attention {backend} does not run on {device} in {str(dtype).removeprefix('torch.')} with heads of "
            f"{head_dim} ({str(error).splitlines()[0] if str(error) else type(error).__name__}); use auto"
        ) from error


def kernel(backend: AttentionBackend) -> Kernel:
    """The function of a backend; where its package is missing, it raises a ValueError when it runs."""
    if backend == "sdpa":
        return F.scaled_dot_product_attention
    if backend not in PACKAGES:
        return _of_torch(backend)
    if backend not in _out_of_graphs:
        packaged: dict[str, Kernel] = {"flash3": _flash3, "sage": _sage}
        disable: Any = torch.compiler.disable
        _out_of_graphs[backend] = disable(packaged[backend])
    return _out_of_graphs[backend]


def _of_torch(backend: AttentionBackend) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(TORCH_KERNELS[backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Any = _package("flash3").flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    # Until 2025 it gave the sums of the softmax as well.
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise ValueError("attention sage has no backward pass; use auto for training")
    with torch.cuda.device_of(q):  # its kernels are Triton's in part, which run on the current device
        return _package("sage").sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _package(backend: AttentionBackend) -> Any:
    try:
        return importlib.import_module(PACKAGES[backend])
    except ImportError as error:
        raise ValueError(
            f"attention {backend} needs the package {PACKAGES[backend]}, which is not installed ({error}); "
            f"{INSTALL[backend]}, or use auto"
        ) from error


def fastest(q: Tensor, k: Tensor, v: Tensor) -> AttentionBackend:
    """The fastest of `CANDIDATES` for tensors like these, measured when such are first met without gradients.

    Under torch.compile and with gradients it is ``sdpa``: measuring is no part of a graph, and what is fast forward
    need not be fast backward. While a CUDA graph is captured, what was not measured before is ``sdpa`` as well.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return "sdpa"
    key = _key(q, k)
    if key not in _fastest:
        if is_capturing():
            return "sdpa"
        # Refusals of PyTorch's kernels are told of as warnings, and events are of the current device.
        with warnings.catch_warnings(), torch.cuda.device_of(q):
            warnings.simplefilter("ignore")
            _fastest[key] = _measure(q, k, v)
        logger.debug("attention of %s x %s: %s", tuple(q.shape), k.shape[2], _fastest[key])
    return _fastest[key]


def is_capturing() -> bool:
    """Whether the current stream is captured into a CUDA graph, which what waits for the device would end."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _key(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    lengths = q.shape[2].bit_length(), k.shape[2].bit_length()
    return (q.device, q.dtype, q.shape[3], q.shape[0] * q.shape[1], *lengths)


def _measure(q: Tensor, k: Tensor, v: Tensor) -> AttentionBackend:
    expected = F.scaled_dot_product_attention(q, k, v)
    length = torch.linalg.vector_norm(expected, dtype=torch.float32)
    best: AttentionBackend = "sdpa"
    best_ms = _milliseconds(kernel("sdpa"), q, k, v)
    for candidate in CANDIDATES[1:]:
        try:
            run = kernel(candidate)
            # No copies in fp32: there is little memory beside a large picture.
            distance = torch.linalg.vector_norm(run(q, k, v) - expected, dtype=torch.float32)
            if not float(distance / length) <= LARGEST_ERROR:
                continue
            milliseconds = _milliseconds(run, q, k, v)
        except Exception as error:  # not installed, or not for this device, type or width
            logger.debug("attention %s: %s", candidate, error)
            continue
        if milliseconds < best_ms * (1 - MARGIN):
            best, best_ms = candidate, milliseconds
    return best


def _milliseconds(run: Kernel, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of one call after a warm-up, the least of a few."""
    run(q, k, v)
    found = []
    for _ in range(NUM_TIMED):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(q, k, v)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return min(found)
