"""Results that are kept by what they were made from, within bounds: the least recently used leave first."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class ContentStore(Generic[Value]):
    """A bounded memory, private to whoever made it."""

    def __init__(self, *, max_items: int, max_bytes: int) -> None:
        self.max_items, self.max_bytes = max_items, max_bytes
        self._items: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(size for _, size in self._items.values())

    def get(self, key: Hashable) -> Value | None:
        """What is kept under a key; it becomes the one that leaves last."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keeps a value, unless it alone is too large; others leave for it."""
        self._items.pop(key, None)
        if num_bytes > self.max_bytes or self.max_items < 1:
            return
        self.make_room(num_bytes)
        self._items[key] = value, num_bytes

    def make_room(self, num_bytes: int) -> None:
        """Lets values leave until there is room for one more of this size."""
        while self._items and (len(self._items) >= self.max_items or self.num_bytes + num_bytes > self.max_bytes):
            self._items.popitem(last=False)

    def remove(self, is_unwanted: Callable[[Value], bool]) -> None:
        """Lets some values leave."""
        self._items = OrderedDict((key, item) for key, item in self._items.items() if not is_unwanted(item[0]))

    def clear(self) -> None:
        """Lets everything leave."""
        self._items.clear()


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's numbers, its type and its shape."""
    host = tensor.detach().cpu().contiguous()
    state = hashlib.sha256(f"{host.dtype} {tuple(host.shape)} ".encode())
    state.update(host.flatten().view(torch.uint8).numpy().tobytes())
    return state.digest()


def weights_state(module: nn.Module, *, moves: bool = False) -> Hashable:
    """Differs after a weight was replaced, cast or written into; a look at its numbers is not needed.

    Args:
        moves: whether it moves between devices: then only parameters count, not where they are, and who replaces the
            data of one has to say so (`torch.autograd.graph.increment_version`).
    """
    tensors = [*module.parameters(), *(() if moves else module.buffers())]
    return tuple(
        (
            id(tensor),
            tensor.dtype,
            0 if tensor.is_inference() else tensor._version,
            None if moves else tensor.data_ptr(),
        )
        for tensor in tensors
    )
