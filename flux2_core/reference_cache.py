"""References computed once for all steps: the exact cache of networks that were trained for it, and an approximate one.

Networks trained for it (klein-9b-kv) compute reference tokens at sigma 0, and let them attend to each other alone, not
to text or picture (diffusers, ``models/transformers/transformer_flux2.py``, ``kv_cache_mode="extract"``). So their keys
and values depend on references and weights, and on nothing else: one pass over the references gives what every step of
every picture with them attends to, whatever its prompt and seed.

Other networks compute them anew in every step, from text and picture too. Their approximate cache keeps keys and values
of the first step for the others of one picture.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .attention import rope_table
from .content_store import ContentStore, tensor_digest, weights_state
from .device_memory import device_budget
from .dit import Flux2DiT, PreparedInputs, sinusoidal_embedding
from .key_values import BlockKeyValues
from .latents import reference_tokens
from .reference_memory import Place, reference_cache_bytes

ReferenceCacheMode = Literal["auto", "off", "exact", "approximate"]
"""auto: exact for networks that were trained for it, off for others."""

MAX_KEPT = 8
SMALL_BYTES = 2**28
"""Several caches are kept as long as they are no larger together than this, or than the one in use."""
KEPT_SHARE = 8
"""Where no plan says so, a cache stays on the device if it takes no more than one part in so many of what is free."""


class ReferenceCaches:
    """Exact caches of one DiT by references, LoRAs and guidance, and where new caches of both kinds go."""

    def __init__(self) -> None:
        self.place: Place | None = None
        """By the memory plan; None: on the device where there is room when it is needed."""
        self._weights: Hashable = None
        self._kept: ContentStore[tuple[list[BlockKeyValues], object]] = ContentStore(
            max_items=MAX_KEPT, max_bytes=SMALL_BYTES
        )

    def exact(
        self, dit: Flux2DiT, references: Sequence[Tensor], guidance: float | None = None
    ) -> Sequence[BlockKeyValues]:
        """Keys and values for every block, computed unless they are here already.

        Args:
            references: latents ``[B or 1, 128, h_i, w_i]`` in their order.
            guidance: embedded guidance, for networks with an embedder.
        """
        rows = _distinct_rows(references)
        state, adapters = weights_state(dit, moves=True), _adapters(dit)
        if state != self._weights:
            self.clear()
            self._weights = state
        key = None
        if adapters is not None:
            key = (*map(tensor_digest, rows), dit.device, guidance, tuple(name for name, _ in adapters))
            if (found := self._kept.get(key)) is not None:
                return found[0]
        tokens, ids = reference_tokens(rows)
        blocks = self.new(dit, tokens.shape[1], tokens.shape[0])
        compute_alone(dit, tokens, ids, guidance, blocks)
        if key is not None:
            # With what the adapters are told by: while it is held, nothing else can have its identity.
            self._kept.put(key, (blocks, adapters), sum(block.num_bytes for block in blocks))
        return blocks

    def new(self, dit: Flux2DiT, num_tokens: int, num_rows: int) -> list[BlockKeyValues]:
        """An empty cache where there is room for it; others leave for it."""
        num_bytes = reference_cache_bytes(dit.config, num_tokens, num_rows, dit.dtype.itemsize)
        self._kept.max_bytes = max(num_bytes, SMALL_BYTES)
        self._kept.make_room(num_bytes)
        place = self.place
        if place is None:
            free = device_budget(dit.device)
            # Half of it: the steps need some as well.
            place = "device" if free is None or num_bytes <= free // 2 else "host"
        store = torch.device("cpu") if place == "host" else None
        num_blocks = len(dit.double_blocks) + len(dit.single_blocks)
        return [BlockKeyValues(num_tokens, store) for _ in range(num_blocks)]

    def settle(self, device: torch.device) -> None:
        """After a run: what would be in the way of others leaves the device, unless a plan counts on it."""
        if self.place is None and (free := device_budget(device)) is not None:
            self._kept.remove(lambda kept: _device_bytes(kept[0]) > free // KEPT_SHARE)

    def leave_device(self) -> None:
        """Forgets what is not in host memory: others need the device."""
        self._kept.remove(lambda kept: _device_bytes(kept[0]) > 0)

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()


_caches: WeakKeyDictionary[Flux2DiT, ReferenceCaches] = WeakKeyDictionary()


def reference_caches(dit: Flux2DiT) -> ReferenceCaches:
    """The caches that live as long as a DiT."""
    if dit not in _caches:
        _caches[dit] = ReferenceCaches()
    return _caches[dit]


@torch.no_grad()
def compute_alone(
    dit: Flux2DiT, tokens: Tensor, ids: Tensor, guidance: float | None, blocks: Sequence[BlockKeyValues]
) -> None:
    """Fills a cache by a pass over references alone, at sigma 0.

    Args:
        tokens: ``[B, R, 128]``
        ids: ``[R, 4]``
    """
    device, dtype, config = dit.device, dit.dtype, dit.config
    rows = tokens.shape[0]
    embedded = None
    if dit.guidance_in is not None and guidance is not None:
        embedded = dit.guidance_in(sinusoidal_embedding(torch.full((rows,), guidance, device=device)).to(dtype))
    prepared = PreparedInputs(
        text=torch.empty(rows, 0, config.hidden_size, device=device, dtype=dtype),
        rope=rope_table(ids.to(device), config.rope_axes, config.rope_theta),
        guidance=embedded,
    )
    dit.velocity(tokens.to(device, dtype), torch.zeros(rows, device=device), prepared, blocks)


def _device_bytes(blocks: Sequence[BlockKeyValues]) -> int:
    """What a cache takes of the device that it was computed on."""
    return sum(block.num_bytes for block in blocks if block.store is None)


def _distinct_rows(references: Sequence[Tensor]) -> list[Tensor]:
    """References of as many rows as differ: one where all pictures of the batch have the same."""
    if all(bool((latents == latents[:1]).all()) for latents in references):
        return [latents[:1] for latents in references]
    rows = max(latents.shape[0] for latents in references)
    return [latents.expand(rows, -1, -1, -1) for latents in references]


def _adapters(dit: Flux2DiT) -> list[tuple[Hashable, object]] | None:
    """What tells the live LoRAs apart, each with what has to be held for that; None where they may change unseen."""
    from .lora import LiveFactors, linear_layers

    found: list[tuple[Hashable, object]] = []
    for name, layer in linear_layers(dit).items():
        for adapter in layer.adapters:
            tensors = list(adapter.factors.tensors().values()) if isinstance(adapter, LiveFactors) else []
            if not isinstance(adapter, LiveFactors) or any(tensor.requires_grad for tensor in tensors):
                return None
            told = tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)
            found.append(((name, id(adapter.factors), told, adapter.strength), adapter.factors))
    return found
