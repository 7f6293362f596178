"""How much of a network is on its device, in bytes: for a host that shares the device among networks.

A DiT and a text encoder leave the device block by block, which are streamed from then on; an autoencoder leaves it
whole. What has left is in host memory, and comes back with the same numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .autoencoder import Flux2Autoencoder
from .block_memory import lay_out, tensor_bytes
from .dit import Flux2DiT
from .reference_cache import reference_caches
from .reference_store import unchanged_by_moves
from .streaming import HOST, RING_SIZE, BlockStreamer, stream_dit, stream_text_encoder, streamed_indices
from .text_encoder import TextEncoder

Network = Flux2DiT | TextEncoder | Flux2Autoencoder
RAISE_SHARE = 1 / 8
"""Of a network's blocks: only for so many more do blocks come to the device while others stay streamed. Every other
number of resident blocks is another choice of them, so most of them move."""


class Residence:
    """Moves a network, which it does not keep alive, to its device and away; not from within a pass of it."""

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        streamer: BlockStreamer | None = None,
        limit: int | None = None,
    ) -> None:
        """Takes over a network that is on its device, but for what is streamed there.

        Args:
            streamer: of its blocks, where they are streamed already.
            limit: at most so many blocks are ever resident; None: all.
        """
        self._network = weakref.ref(network)
        self.device = device
        self.streamer = streamer
        self.is_loaded = True
        self._limit = limit

    @property
    def network(self) -> Network:
        network = self._network()
        assert network is not None, "it is used, so it is alive"
        return network

    @property
    def module(self) -> nn.Module:
        """The weights."""
        network = self.network
        return network.model if isinstance(network, TextEncoder) else network

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which they run; none where only the whole network moves."""
        network = self.network
        if isinstance(network, Flux2DiT):
            return [*network.double_blocks, *network.single_blocks]
        model: Any = self.module
        return list(model.layers) if isinstance(network, TextEncoder) else []

    @property
    def num_blocks(self) -> int:
        return len(self._sizes[0])

    @property
    def limit(self) -> int:
        """The most blocks that are resident."""
        return self.num_blocks if self._limit is None else self._limit

    @property
    def num_resident(self) -> int:
        """Blocks that are on the device while the network is."""
        return self.num_blocks if self.streamer is None else self.streamer.num_resident

    @property
    def moves(self) -> bool:
        """Whether the device has memory of its own, which is free once the network is in host memory."""
        return self.device.type != HOST.type

    @property
    def device_bytes(self) -> int:
        """What the network takes of the device now, with the buffers that it streams through."""
        return self.bytes_with(self.num_resident) if self.is_loaded else 0

    @property
    def wanted_bytes(self) -> int:
        """What it takes where nothing is short."""
        return self.bytes_with(self.limit)

    def bytes_with(self, num_resident: int) -> int:
        """What it takes of the device with so many resident blocks."""
        blocks, slots, outer = self._sizes
        if num_resident < len(blocks) or self.streamer is not None:
            outer -= self._kept_in_host_memory
        streamed = set(streamed_indices(len(blocks), num_resident))
        ring_size = RING_SIZE if self.streamer is None else self.streamer.ring_size
        ring = min(ring_size, len(streamed)) * max((slots[index] for index in streamed), default=0)
        return outer + ring + sum(size for index, size in enumerate(blocks) if index not in streamed)

    def load(self, budget: int | None = None) -> None:
        """Brings the network to the device, or changes how much of it is there.

        Args:
            budget: bytes that it may take; None: as many as its limit allows. Where even streaming takes more, it
                takes more.
        """
        wanted = self.limit if budget is None else self._fitting(budget) or 0
        now = self.num_resident
        if self.is_loaded and now < wanted < min(self.limit, now + RAISE_SHARE * self.num_blocks):
            return
        try:
            with self._moving():
                if not self.is_loaded:
                    self._come(wanted)
                elif wanted != now:
                    self._set_num_resident(wanted)
        except BaseException:  # out of memory, with a part of it on the device
            self.leave()
            raise
        self.is_loaded = True

    def free(self, num_bytes: int) -> int:
        """Lets as many blocks leave as it takes to free so many bytes; tells how many these are.

        Nothing happens, and 0 is told, where that would not be enough: then it is better to `leave`.
        """
        before = self.device_bytes
        wanted = self._fitting(before - num_bytes)
        if not self.is_loaded or not self.moves or not self.num_blocks or wanted is None:
            return 0
        with self._moving():
            self._forget_references()
            self._set_num_resident(wanted)
        return before - self.device_bytes

    def leave(self) -> None:
        """Frees everything that the network takes of the device."""
        with self._moving():
            self._forget_references()
            if self.streamer is not None:
                self.streamer.unload()
            if self.moves:
                if self.streamer is not None and self.streamer.reads_file:
                    self.streamer.set_num_resident(0)  # host memory could not hold the others
                nn.Module.to(self.module, HOST)
        self.is_loaded = False

    def set_limit(self, limit: int) -> None:
        """Lets at most so many blocks be resident from now on."""
        self._limit = limit
        if self.is_loaded and self.num_resident > limit:
            with self._moving():
                self._set_num_resident(limit)

    @cached_property
    def _sizes(self) -> tuple[list[int], list[int], int]:
        """Bytes of each block, of the buffer that it streams through, and of all that is no block."""
        blocks = self.blocks
        sizes = [tensor_bytes(block) for block in blocks]
        return sizes, [lay_out(block)[1] for block in blocks], tensor_bytes(self.module) - sum(sizes)

    @cached_property
    def _kept_in_host_memory(self) -> int:
        """Bytes of what is no block, and that streaming leaves in host memory: the token embedding."""
        model: Any = self.module
        return tensor_bytes(model.embed_tokens) if isinstance(self.network, TextEncoder) else 0

    def _fitting(self, budget: int) -> int | None:
        """The most resident blocks that a budget allows; None where even none is too many."""
        return next((number for number in range(self.limit, -1, -1) if self.bytes_with(number) <= budget), None)

    def _come(self, num_resident: int) -> None:
        if self.streamer is None and num_resident < self.num_blocks:
            self.streamer = self._stream(num_resident)
            return
        if self.streamer is not None:
            self.streamer.set_num_resident(num_resident)
        nn.Module.to(self.module, self.device)

    def _set_num_resident(self, num_resident: int) -> None:
        if self.streamer is not None:
            self.streamer.set_num_resident(num_resident)
        elif num_resident < self.num_blocks:
            self.streamer = self._stream(num_resident)

    def _stream(self, num_resident: int) -> BlockStreamer:
        network = self.network
        if isinstance(network, Flux2DiT):
            return stream_dit(network, self.device, num_resident=num_resident)
        assert isinstance(network, TextEncoder)
        return stream_text_encoder(network, self.device, num_resident=num_resident)

    def _forget_references(self) -> None:
        """Frees what is kept on the device beside the weights."""
        if isinstance(network := self.network, Flux2DiT):
            reference_caches(network).leave_device()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Weights that move stay fit for training, and what was computed with them stays known."""
        network = self.network
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(network, Flux2Autoencoder):
                with unchanged_by_moves(network):
                    yield
            else:
                yield
