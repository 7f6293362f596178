"""The processes that ``accelerate launch`` or ``torchrun`` started to share a command's work: which one this is.

Both tell it by environment variables (https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables).
Both also stop all processes as soon as one has ended with an error, so a share that failed waits for the others.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

LONGEST_WAIT = timedelta(days=30)
"""A process may be done long before another one; one that was killed is noticed at once."""
LONGEST_JOIN = timedelta(minutes=30)
"""A process that has not come by then is not waited for: its machine may have failed before."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes MPI started; it tells nothing else that is read here."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process among those that were started together; by default it is alone."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    """Among those of this machine."""
    uses_cpu: bool = False
    """Whether the launcher was told to compute on the CPU."""

    @property
    def is_main(self) -> bool:
        """Whether this one speaks for all."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What this process does of the work: every ``count``-th item, so that neighbours are done at a time."""
        return list(items[self.index :: self.count])

    def device_name(self, name: str | None) -> str | None:
        """The device to use where ``name`` was asked for: a GPU of its own, unless one is named by its number.

        Raises:
            ValueError: there are more processes than GPUs.
        """
        if name is None and self.uses_cpu:
            return "cpu"
        if self.count == 1 or name not in (None, "cuda") or not torch.cuda.is_available():
            return name
        num_gpus = torch.cuda.device_count()
        if self.local_index >= num_gpus:
            raise ValueError(
                f"process {self.local_index + 1} on this machine has no GPU of its own, there are {num_gpus}; start "
                "at most as many (--num_processes), or name one GPU for all (--device cuda:0)"
            )
        return f"cuda:{self.local_index}"

    def total(self, number: int) -> int:
        """The sum of all processes' numbers; waits for all of them."""
        if self.count == 1:
            return number
        sum_ = torch.tensor(number)
        torch.distributed.all_reduce(sum_)
        return int(sum_)


@contextmanager
def join_launch(environment: Mapping[str, str] = os.environ) -> Iterator[Launch]:
    """This process's place among those of its launch; joins them over gloo where there are several.

    Raises:
        ValueError: the environment tells of several processes, but not which one this is or how to reach them; or not
            all of them came.
    """
    uses_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if "WORLD_SIZE" not in environment:
        _refuse_lone_processes(environment, uses_cpu)
    try:
        launch = Launch(
            index=int(environment.get("RANK", "0")),
            count=int(environment.get("WORLD_SIZE", "1")),
            local_index=int(environment.get("LOCAL_RANK", "0")),
            uses_cpu=uses_cpu,
        )
    except ValueError as error:
        raise ValueError(f"{', '.join(VARIABLES[:3])} must be whole numbers ({error}); unset them") from None
    if launch.count <= 1:
        yield Launch(uses_cpu=uses_cpu)
        return
    missing = [name for name in VARIABLES if name not in environment]
    if missing or not 0 <= launch.index < launch.count or launch.local_index < 0:
        problem = f"{missing[0]} is not set" if missing else f"RANK is {launch.index}"
        raise ValueError(
            f"WORLD_SIZE is {launch.count}, but {problem}; start several processes with `accelerate launch -m` or "
            "torchrun, or unset WORLD_SIZE"
        )
    # Defaults of its functions would keep the group for ever if it were imported later, and with the group threads that
    # make the process abort at its end.
    importlib.import_module("torch.distributed.nn.functional")
    store = _meet(launch)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=launch.index, world_size=launch.count, timeout=LONGEST_WAIT
    )
    try:
        yield launch
    except BaseException:
        # Groups of GPUs would wait here for processes that may be waiting for this one.
        if torch.distributed.get_pg_count() == 1:
            torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def _meet(launch: Launch) -> Any:
    """Waits until all processes are there; gives the store by which they found each other."""
    meet: Any = getattr(torch.distributed, "rendezvous")  # noqa: B009 - public, and not among the stubs' exports
    try:
        store, _, _ = next(meet("env://", timeout=LONGEST_JOIN))
        store.set(f"flux2-kit/{launch.index}", "here")
        store.wait([f"flux2-kit/{index}" for index in range(launch.count)], LONGEST_JOIN)
    except RuntimeError as error:
        raise ValueError(
            f"process {launch.index} of {launch.count} waited {LONGEST_JOIN} for the others; start all of them, and "
            f"see what those say that ended early ({' '.join(str(error).split())[:200]})"
        ) from error
    return store


def num_local_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of this launch on this machine, which share its memory; 1 where nothing was launched."""
    number = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(number)) if number.isdecimal() else 1


def _refuse_lone_processes(environment: Mapping[str, str], uses_cpu: bool) -> None:
    """Refuses launches of several in which each process would take itself for the only one."""
    by_mpi = any(environment.get(name, "1") != "1" for name in MPI_SIZES)
    # accelerate starts one process then, and that more were asked for shows in the port alone.
    if by_mpi or (uses_cpu and "MASTER_PORT" in environment):
        raise ValueError(
            "several processes were asked for by MPI or `accelerate launch --cpu`, which starts several by MPI alone; "
            "start them with torchrun, or `accelerate launch --multi_gpu --num_processes N -m ... --device cpu`"
        )
