"""The processes that train or encode together: one alone, or those that ``accelerate launch`` started."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many there are, which one this is, and how they talk."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    state: Any = None
    """accelerate's `PartialState` where there are several."""

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.index == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Waits until all are here."""
        if self.count > 1:
            self.state.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)).item())


def join_processes(device: torch.device) -> Processes:
    """The processes of this launch; `device` is what a single process uses, several take one GPU each.

    Nothing is initialised where there is only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    assert state.device is not None
    return Processes(index=state.process_index, count=state.num_processes, device=state.device, state=state)
