"""The processes that train or encode together: one alone, or those that ``accelerate launch`` or torchrun started.

Numbers on a GPU are summed from GPU to GPU. Everything else goes from host to host, beside the computation: asking
whether to stop makes no host wait for its GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ..flux2_core.command_errors import is_out_of_memory
from ..flux2_core.command_options import choose_device
from ..flux2_core.launch import join_launch

LONGEST_SUM = timedelta(hours=1)
"""Within it all GPUs must have come to a sum; the hosts have met before, so it is the length of a step at most."""
SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What accelerate can be told to split a model with, by the variables that say so."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many there are, which one this is, and how they talk."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    device_group: Any = None
    """Over which tensors on the device are summed; None: as those of the host."""

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.index == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over all processes, in place.

        Raises:
            ValueError: another process has ended.
        """
        if self.count > 1:
            group = None if tensor.device.type == "cpu" else self.device_group
            try:
                distributed.all_reduce(tensor, group=group)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"process {self.index} of {self.count} lost the others: one of them has ended, and says why "
                    f"itself, or the network failed ({reason})"
                ) from error
        return tensor

    def barrier(self) -> None:
        """Waits until all are here, however long it takes."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; waits for all of them."""
        return bool(self.sum_(torch.tensor(float(flag)))) if self.count > 1 else flag


@contextmanager
def join_processes(device_name: str | None) -> Iterator[Processes]:
    """The processes of this launch. Nothing is initialised where there is only one.

    Args:
        device_name: what was asked for; None or "cuda": a GPU for each process.

    Raises:
        ValueError: there is no such device, or the environment tells of processes that cannot be joined.
    """
    with join_launch() as launch:
        device = choose_device(launch.device_name(device_name))
        group = None
        if device.type == "cuda" and launch.count > 1:
            torch.cuda.set_device(device)  # what is allocated without naming a device goes there too
            if distributed.is_nccl_available():
                group = distributed.new_group(backend="nccl", timeout=LONGEST_SUM)
        yield Processes(index=launch.index, count=launch.count, device=device, device_group=group)


def launcher_precision(environment: Mapping[str, str] = os.environ) -> str | None:
    """The mixed precision that accelerate was told; None for "no", which it also says when it was told nothing.

    Raises:
        ValueError: accelerate was told to do what this training does in another way, or not at all.
    """
    for variable, name in SHARDED.items():
        if environment.get(variable, "false").lower() == "true":
            raise ValueError(
                f"accelerate was told to use {name}, which splits models that are trained whole; here every GPU has "
                "all of the base, or streams it. Start with `accelerate launch --multi_gpu`"
            )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ValueError("accelerate was told to compile; set its dynamo_backend to no, and give --compile here")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"accelerate was told mixed_precision {precision}; allowed are no, fp16 and bf16. An 8-bit base is "
            "--precision fp8 here"
        )
    return None if precision == "no" else precision
