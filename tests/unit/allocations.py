"""Counts the memory of tensors, operation by operation: what a device's own counters would tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that operations make and that has not been freed again.

    Args:
        device_type: count only what is there; meta tensors, which have a size and no memory, count as "meta".
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.device_type = device_type
        self.peak = self.live = 0
        self.names: list[str] = []
        """Of the operations, in order."""
        self._storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._sweep()
        self.names.append(func.name())
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs or {}))}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            is_new = storage._cdata not in given and storage._cdata not in self._storages
            if is_new and tensor.device.type == self.device_type:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result

    def _sweep(self) -> None:
        for key, (reference, num_bytes) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self.live -= num_bytes


def tensors_of(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_of(work: Callable[[], object], device_type: str = "cpu") -> int:
    with Allocations(device_type) as allocations:
        work()
    return allocations.peak
