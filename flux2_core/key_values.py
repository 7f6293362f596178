"""Keys and values of reference tokens, computed in one pass of the DiT and attended to in others."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockKeyValues:
    """Those of one block, ``[rows, H, R, head_dim]`` each, normed and rotated; R tokens at the end of a sequence.

    While there are none, the block that they are given to stores its own here. From then on they stand beside the
    tokens of every sequence that the block runs on: with ``rows`` 1 for each of its rows, else for as many rows, again
    and again (the two halves of classifier-free guidance).

    Args:
        store: where they are kept; None: where they are computed. From elsewhere they are copied for every use.
    """

    def __init__(self, num_tokens: int, store: torch.device | None = None) -> None:
        self.num_tokens = num_tokens
        self.store = store
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.keys, self.values) if tensor is not None)

    def join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a block attends to, from its own keys and values ``[B, H, N, head_dim]``."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (self._keep(x[:, :, -self.num_tokens :]) for x in (keys, values))
            return keys, values
        return _beside(keys, self.keys), _beside(values, self.values)

    def _keep(self, tensor: Tensor) -> Tensor:
        """A copy: a slice would hold all of the tensor that it is part of."""
        if self.store is None or self.store == tensor.device:
            return tensor.clone(memory_format=torch.contiguous_format)
        # Only from pinned memory are copies to the device fast, and not waited for.
        kept = torch.empty(
            tensor.shape, dtype=tensor.dtype, device=self.store, pin_memory=tensor.is_cuda and self.store.type == "cpu"
        )
        return kept.copy_(tensor)


def _beside(own: Tensor, kept: Tensor) -> Tensor:
    kept = kept.to(own.device, non_blocking=True)
    rows = own.shape[0]
    if kept.shape[0] == 1:
        kept = kept.expand(rows, -1, -1, -1)
    elif kept.shape[0] != rows:
        kept = kept.repeat(rows // kept.shape[0], 1, 1, 1)
    return torch.cat((own, kept), dim=2)
