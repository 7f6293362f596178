"""How a DiT computes, where that is a matter of speed alone: the attention kernel, and torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_backends import AttentionBackend, check_backend
from .dit import Flux2DiT

COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What may be chosen about speed."""

    attention: AttentionBackend = "auto"
    compile: bool = False
    """Compile the blocks with torch.compile: the first step takes some seconds longer, others less."""


def accelerate(dit: Flux2DiT, acceleration: Acceleration) -> None:
    """Sets up a DiT, before or after LoRAs are put on it, its weights are quantised, or its blocks are streamed.

    Raises:
        ValueError: something that was asked for does not run here.
    """
    check_backend(acceleration.attention, dit.device, dit.dtype, dit.config.head_dim)
    for block in dit.blocks:
        block.attention_backend = acceleration.attention
    if acceleration.compile:
        compile_blocks(dit)


def compile_blocks(dit: Flux2DiT, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Lets torch.compile make one program for all double blocks and one for all single ones.

    Numbers of tokens are symbols in it, so that other pictures, texts and references run the same program; it is made
    anew for another number of rows (once: from then on that is a symbol too), for adapters of another kind, and for
    weights of another format.

    Args:
        backend: of torch.compile.

    Raises:
        ValueError: what torch.compile builds with is not there.
    """
    if backend == "inductor":
        check_compiler(dit.device)
    for block in dit.blocks:
        if not getattr(block, "is_compiled", False):
            block.__dict__["is_compiled"] = True
            block.__dict__["forward"] = _compiled(block.forward, backend)


def _compiled(forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    # Not `Module.compile`: that compiles a function of all modules, whose programs share one small limit. And not
    # dynamic=True: then all sizes are symbols, equal ones the same symbol, and 4096 tokens of 4096 channels are fixed.
    compiled: Any = torch.compile(forward, backend=backend)
    from torch._dynamo import maybe_mark_dynamic  # imported here: it takes long

    def run(*args: Any, **kwargs: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.dim() == 3:
                maybe_mark_dynamic(tensor, 0 if tensor.shape[2] == 2 else 1)
        return compiled(*args, **kwargs)

    return run


def check_compiler(device: torch.device) -> None:
    """Refuses torch.compile where it could not build anything.

    Raises:
        ValueError: says what to install.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile needs Triton; install it (pip install triton, on Windows triton-windows)")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise ValueError(
            "compile needs a C++ compiler; install one (Debian and Ubuntu: apt install g++; macOS: xcode-select "
            "--install; Windows: the Visual Studio Build Tools), or leave compile out"
        )
