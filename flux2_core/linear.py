"""The one Linear of the DiT: a weight, and the adapters that are added to its output while they are set."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(Protocol):
    """Something that changes the output of a Linear without touching its weight."""

    def __call__(self, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The change ``[..., out]`` to add, from input ``[..., in]``, unadapted output and weight ``[out, in]``."""
        ...


class Linear(nn.Linear):
    """``x W^T`` plus the sum of what the adapters give; without bias, as everywhere in FLUX.2.

    Adapters are no part of the module tree: the state dict stays that of a plain Linear.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.adapters: tuple[Adapter, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        output = result = F.linear(input, self.weight)
        for adapter in self.adapters:
            result = result + adapter(input, output, self.weight)
        return result
