"""torch.compile block by block: one graph for all double blocks and one for all single ones, whatever the sizes are.

A whole network as one graph would take minutes to compile, and again for every size; blocks take seconds, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .dit import Flux2DiT
from .streaming import BlockStreamer

Backend = str | Callable[..., Any]


def compile_blocks(dit: Flux2DiT, *, backend: Backend = "inductor") -> None:
    """Lets torch.compile run the blocks of a DiT from the next call on; weights and state dict stay what they are.

    It composes with adapters, quantised weights, activation checkpointing and streaming, before or after it. The first
    size gets graphs of its own, the second one those of all sizes that follow; a batch of one and larger ones differ,
    as do passes with and without gradients. Results differ from those of the plain blocks by rounding.

    Args:
        backend: of torch.compile.

    Raises:
        ValueError: torch.compile does not work on this machine.
    """
    _try(dit.device, backend)
    # Not dynamic=True: that makes variables of numbers such as the scales of LoRAs as well, which torch 2.13 cannot do
    # within functions that have a backward pass of their own.
    for block in (*dit.double_blocks, *dit.single_blocks):
        if isinstance(getattr(block.forward, "streamer", None), BlockStreamer):
            # The streamer's wrapper is no part of the graph, the forward within it is.
            block.compile(backend=backend)
        elif not hasattr(block.forward, "_torchdynamo_orig_callable"):
            # Not `block.compile`: that gives both kinds of blocks one cache, of few places.
            block.forward = torch.compile(block.forward, backend=backend)


def _try(device: torch.device, backend: Backend) -> None:
    """Compiles a sum, so that a missing compiler shows before a network is to run."""
    try:
        function = torch.compile(lambda x: x + x.sum(), backend=backend)
        with torch.inference_mode(False):
            function(torch.ones(32, device=device))
    except Exception as error:  # whatever a compiler or a missing one raises
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"torch.compile does not work here ({type(error).__name__}: {text}); install a C++ compiler, or Triton for "
            "a GPU, or leave compile out"
        ) from error
