"""torch.compile block by block: one graph for all double blocks and one for all single ones, whatever the sizes are.

A whole network as one graph would take minutes to compile, and again for every size; blocks take seconds, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dit import Flux2DiT
from .streaming import BlockStreamer

Backend = str | Callable[..., Any]


def compile_blocks(dit: Flux2DiT, *, backend: Backend = "inductor") -> None:
    """Lets torch.compile run the blocks of a DiT from the next call on; weights and state dict stay what they are.

    It composes with adapters, quantised weights, activation checkpointing and streaming, before or after it. Numbers of
    tokens are symbols: other pictures, texts and references run the same graphs. Another number of rows makes them
    anew, once, as do passes with and without gradients, and adapters or weights of another kind. Results differ from
    those of the plain blocks by rounding.

    Args:
        backend: of torch.compile.

    Raises:
        ValueError: torch.compile does not work on this machine.
    """
    _try(dit.device, backend)
    # Not dynamic=True: then equal sizes are one symbol, which fixes 4096 tokens of 4096 channels; and numbers such
    # as the scales of LoRAs are variables, which torch 2.13 cannot do in functions with a backward pass of their own.
    for block in dit.blocks:
        if getattr(block, "is_compiled", False):
            continue
        block.__dict__["is_compiled"] = True
        if isinstance(getattr(block.forward, "streamer", None), BlockStreamer):
            # The streamer's wrapper is no part of the graph, the forward within it is.
            block.compile(backend=backend)
            block._compiled_call_impl = _with_symbols(block._compiled_call_impl)
        else:
            # Not `block.compile`: that gives both kinds of blocks one cache, of few places.
            block.__dict__["forward"] = _with_symbols(torch.compile(block.forward, backend=backend))


def _with_symbols(compiled: Any) -> Callable[..., Any]:
    """Says of the arguments of a block which of their sizes are symbols."""
    from torch._dynamo import maybe_mark_dynamic  # imported here: it takes long

    def run(*args: Any, **kwargs: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.dim() == 3:
                is_rope = tensor.shape[2] == 2
                maybe_mark_dynamic(tensor, 0 if is_rope else 1)
        return compiled(*args, **kwargs)

    return run


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
