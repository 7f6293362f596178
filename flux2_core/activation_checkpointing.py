"""Activation checkpointing: blocks keep only their inputs for the backward pass, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "blocks", "offload"]
"""What is kept for the backward pass: all activations; the inputs of each block, which then runs a second time; or
these inputs in host memory."""

RunBlock = Callable[..., Any]
"""Called as ``run(block, tokens, *shared)``; gives ``block(*tokens, *shared)``."""


def block_runner(mode: Checkpointing) -> RunBlock:
    """How the blocks run in one forward pass of a network.

    ``tokens`` are what goes from block to block; they are kept, and may go to the host. ``shared`` is what all blocks
    are given alike (positions, modulations): it is there once and stays. Outputs and gradients do not depend on the
    mode; the random state is that of the first run when a block runs again. Without gradients blocks just run.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in get_args(Checkpointing):
        raise ValueError(f"checkpointing must be one of {', '.join(get_args(Checkpointing))}, got {mode!r}")
    if mode == "none" or not torch.is_grad_enabled():
        return _run_plainly
    return partial(_run_checkpointed, HostStore() if mode == "offload" else None)


def _run_plainly(block: nn.Module, tokens: tuple[Tensor, ...], *shared: Any) -> Any:
    return block(*tokens, *shared)


def _run_checkpointed(store: HostStore | None, block: nn.Module, tokens: tuple[Tensor, ...], *shared: Any) -> Any:
    def run(*tokens: Tensor) -> Any:
        return block(*tokens, *shared)

    if store is None:
        return checkpoint(run, *tokens, use_reentrant=False)
    # Only the arguments meet these hooks: inside, those of the checkpoint take their place.
    with torch.autograd.graph.saved_tensors_hooks(store.put, store.get):
        return checkpoint(run, *tokens, use_reentrant=False)


class HostTensor:
    """A tensor in host memory, and on its device again once it has been asked for."""

    def __init__(self, index: int, host: Tensor, device: torch.device) -> None:
        self.index = index
        self.host = host
        self.device = device
        self.fetched: Tensor | None = None
        self.ready: torch.cuda.Event | None = None


class HostStore:
    """Puts tensors into host memory in one order and gives them back in about the opposite one.

    For CUDA, host memory is pinned and copies run on a side stream, beside the computation. Two rules keep device
    memory small although the CPU is far ahead of the device, where marking tensors as used on the side stream would
    not: the source of a copy is held until the computation has been told to wait for that copy, which it does a block
    later; and tensors that come back live in the side stream's own memory, whose next use waits for the computation.
    """

    AHEAD = 2
    """How many tensors are fetched before they are asked for: the inputs of a double block."""

    def __init__(self) -> None:
        self._items: list[HostTensor | None] = []
        self._leaving: list[tuple[Tensor, torch.cuda.Event]] = []
        """Tensors whose copies may still be under way."""

    def put(self, tensor: Tensor) -> HostTensor | Tensor:
        """A copy in host memory; empty tensors stay."""
        if tensor.numel() == 0:
            return tensor
        tensor = tensor.detach()
        host = self._copy_pinned(tensor) if tensor.device.type == "cuda" else tensor.to("cpu", copy=True)
        item = HostTensor(len(self._items), host, tensor.device)
        self._items.append(item)
        return item

    def get(self, item: HostTensor | Tensor) -> Tensor:
        """The tensor on its device; those that were put before it are fetched meanwhile."""
        if isinstance(item, Tensor):
            return item
        self._fetch(item)
        result, item.fetched = item.fetched, None
        assert result is not None
        if item.ready is not None:
            torch.cuda.current_stream(item.device).wait_event(item.ready)
        self._items[item.index] = None
        for earlier in reversed(self._items[max(0, item.index - self.AHEAD) : item.index]):
            if earlier is not None:
                self._fetch(earlier)
        return result

    def _copy_pinned(self, tensor: Tensor) -> Tensor:
        computation, side = torch.cuda.current_stream(tensor.device), _side_stream(tensor.device)
        while len(self._leaving) >= self.AHEAD:
            _, event = self._leaving.pop(0)
            computation.wait_event(event)
        side.wait_stream(computation)
        with torch.cuda.stream(side):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        self._leaving.append((tensor, _recorded(side)))
        return host

    def _fetch(self, item: HostTensor) -> None:
        if item.fetched is not None:
            return
        with _beside_computation(item.device) as side:
            item.fetched = item.host.to(item.device, non_blocking=True)
            item.ready = None if side is None else _recorded(side)


@contextmanager
def _beside_computation(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """On CUDA the side stream, after what the computation was given so far; elsewhere the computation's own."""
    if device.type != "cuda":
        yield None
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield side


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: memory that was allocated on a stream is only used again on it."""
    return torch.cuda.Stream(device)
