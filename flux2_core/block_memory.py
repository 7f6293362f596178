"""What block streaming moves: all tensors of a block as one flat buffer, in host memory and on a device."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Tensors begin at multiples of this in a buffer: as good as an allocation of their own."""
PAGE_BYTES = 4096
"""What memory is pinned in."""
REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""

Event = Any
"""A point in the work of a device; None where there is nothing to wait for."""
Arrival = Callable[[], Event]
"""Gives the event after which a copy is there; may block until the copy has at least been ordered."""


class Transfers:
    """Copies into device buffers; this one is done with each before it goes on."""

    def guard(self, buffer: Tensor) -> None:
        """Keeps the memory of a target from being used again before all copies are over, should it just be dropped."""

    def mark(self) -> Event:
        """The point up to which the computation has been ordered by now."""
        return None

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Orders a copy that begins after a point of the computation; gives the event of its end.

        Copies happen in the order in which they were ordered. Each bumps the version counter of the target and of all
        its views: autograd refuses to use a weight that it saved and that was since overwritten.
        """
        with torch.inference_mode(False), torch.no_grad():
            target.copy_(source)
        return None

    def wait(self, event: Event) -> None:
        """What is computed from here on comes after the event; the caller goes on at once."""

    def wait_on_host(self, event: Event) -> None:
        """Returns once the event has happened."""

    def finish(self) -> None:
        """Returns once nothing is under way any more."""


class CudaTransfers(Transfers):
    """Copies on a stream of their own, beside the computation, without making the host wait.

    Two waits keep both apart. A copy waits for the event after the last use of its target (`copy`, ``after``); a block
    waits for the event after its copy (`wait`). That a source that is not pinned by `HostBuffer` stays as it is until
    it has been read is up to the caller.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def guard(self, buffer: Tensor) -> None:
        buffer.record_stream(self.stream)

    def mark(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream), torch.inference_mode(False), torch.no_grad():
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: Event) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def wait_on_host(self, event: Event) -> None:
        if event is not None:
            event.synchronize()

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def make_transfers(device: torch.device) -> Transfers:
    """The kind of copies that fits the device."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers()


class HostBuffer:
    """Bytes in host memory that can be pinned.

    PyTorch's own pinned memory is rounded up to a power of two, up to twice what was asked for, so ordinary memory is
    registered with CUDA instead. It begins and ends at pages that nothing else lies in.
    """

    def __init__(self, num_bytes: int) -> None:
        memory = torch.empty(num_bytes + 2 * PAGE_BYTES, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE_BYTES
        self.bytes = memory[start : start + num_bytes]
        """uint8 ``[num_bytes]``"""
        self._unpin: weakref.finalize[..., HostBuffer] | None = None
        self._is_refused = False

    def pin(self) -> None:
        """Pins the memory where it lies, through the current device, for copies to all of them.

        Where the system refuses, it says so once, is not asked again, and copies are only slower.
        """
        if self._unpin is not None or self._is_refused or not self.bytes.numel() or not torch.cuda.is_available():
            return
        address = self.bytes.data_ptr()
        num_bytes = -(-self.bytes.numel() // PAGE_BYTES) * PAGE_BYTES
        cudart: Any = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(address, num_bytes, REGISTER_PORTABLE))
        if error:
            self._is_refused = True
            _tell_of_refusal(error)
            _clear_cuda_error()
            return
        # This object goes before the memory does, which it holds: nothing is freed while it is pinned.
        self._unpin = weakref.finalize(self, _unregister, address, torch.cuda.current_device())
        self._unpin.atexit = False  # the system does it, and CUDA may be gone by then

    def unpin(self) -> None:
        """Makes it ordinary memory again, after all copies."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes a CUDA device the current one: what is pinned through another one takes some of that one's memory."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _unregister(address: int, device_index: int) -> None:
    with torch.cuda.device(device_index):
        torch.cuda.synchronize()  # a model that is dropped may have ordered copies of the blocks that would come next
        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(address)


@functools.cache
def _tell_of_refusal(error: int) -> None:
    logger.warning("host memory cannot be pinned (CUDA error %d): copies to the device are slower", error)


def _clear_cuda_error() -> None:
    """CUDA reports a failed call once more to whoever launches the next kernel."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        logger.debug("the error that pinning left behind", exc_info=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """A tensor of a block and its place in the block's buffer."""

    owner: dict[str, Any]
    """The table of parameters or buffers of the module that it belongs to."""
    key: str
    name: str
    """In the block's state dict."""
    is_parameter: bool
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    """Bytes."""
    num_bytes: int

    @property
    def tensor(self) -> Tensor:
        """What stands in the module."""
        return self.owner[self.key]

    def view(self, buffer: Tensor) -> Tensor:
        """Its part of a buffer."""
        return buffer[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


def lay_out(block: nn.Module) -> tuple[list[Member], int]:
    """All tensors of a block, one after the other, and the bytes they take together."""
    members: list[Member] = []
    position = 0
    for path, module in block.named_modules():
        for owner, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for key, tensor in owner.items():
                if tensor is None:
                    continue
                assert type(tensor) in (nn.Parameter, Tensor), f"{path}.{key} is a {type(tensor).__name__}"
                member = Member(
                    owner=owner,
                    key=key,
                    name=f"{path}.{key}" if path else key,
                    is_parameter=is_parameter,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    offset=position,
                    num_bytes=tensor.nbytes,
                )
                members.append(member)
                position += -(-member.num_bytes // ALIGNMENT) * ALIGNMENT
    return members, position


class StreamedBlock:
    """A block whose weights are elsewhere, and stand in device buffers only while it runs.

    At all other times its modules hold the host's tensors under their own names: `state_dict` and `named_parameters`
    are those of a block on the CPU. While it runs, parameters of their own, views into the buffer, take their place.
    Host parameters never change their device or storage for that, so nothing that autograd saved can change with them.
    """

    members: list[Member]
    num_bytes: int
    """Of a buffer that it fits into."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._seen: list[tuple[Tensor, int, int]] = []
        self._outside: list[Tensor] | None = None

    @property
    def host_bytes(self) -> int:
        """Host memory it holds, pinned or not; mapped files do not count."""
        raise NotImplementedError

    def fill(self, target: Tensor, transfers: Transfers, after: Event) -> Arrival:
        """Orders a copy of the weights into ``target``, uint8 ``[num_bytes]``, after a point of the computation."""
        raise NotImplementedError

    def renew(self) -> None:
        """Takes over weights that were changed from outside.

        Raises:
            ValueError: that cannot be.
        """
        raise NotImplementedError

    def pin(self) -> None:
        """Pins what it holds in host memory."""

    def unpin(self) -> None:
        """Makes that ordinary memory again."""

    def remember(self) -> None:
        """Notes which tensors stand in the modules, and in which state, for `is_unchanged`."""
        self._seen = [(member.tensor, *_state(member.tensor)) for member in self.members]

    def is_unchanged(self) -> bool:
        """Whether no weight was replaced or written to since `remember`.

        Raises:
            ValueError: a weight is to be trained.
        """
        for member, (tensor, address, version) in zip(self.members, self._seen, strict=True):
            current = member.owner.get(member.key)
            if current is not tensor or (address, version) != _state(tensor):
                return False
            if tensor.requires_grad:
                check_frozen(self.block)
        return True

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Parameters and buffers, in the order of `members`, that lie in a device buffer."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [member.view(buffer) for member in self.members]
            return [
                nn.Parameter(part, requires_grad=False) if member.is_parameter else part
                for member, part in zip(self.members, parts, strict=True)
            ]

    def swap_in(self, views: list[Tensor]) -> None:
        """Puts views of a device buffer in the places of the host's tensors."""
        assert self._outside is None, "a block runs once at a time"
        self._outside = [member.tensor for member in self.members]
        for member, tensor in zip(self.members, views, strict=True):
            member.owner[member.key] = tensor

    def swap_out(self) -> None:
        """Puts the host's tensors back."""
        assert self._outside is not None
        for member, tensor in zip(self.members, self._outside, strict=True):
            member.owner[member.key] = tensor
        self._outside = None

    def place(self, tensors: list[Tensor]) -> None:
        """Makes these the tensors of the modules; parameters stay the same objects."""
        with torch.inference_mode(False), torch.no_grad():
            for member, tensor in zip(self.members, tensors, strict=True):
                if member.is_parameter:
                    member.tensor.data = tensor
                else:
                    member.owner[member.key] = tensor
        self.remember()


class HostBlock(StreamedBlock):
    """A block in host memory: its tensors are moved into one flat buffer, and are views of it from then on."""

    def __init__(self, block: nn.Module, *, pinned: bool) -> None:
        super().__init__(block)
        self._pinned = pinned
        self.renew()

    @property
    def host_bytes(self) -> int:
        return self.num_bytes

    def fill(self, target: Tensor, transfers: Transfers, after: Event) -> Arrival:
        event = transfers.copy(target, self._buffer.bytes, after)
        return lambda: event

    def renew(self) -> None:
        check_frozen(self.block)
        self.members, self.num_bytes = lay_out(self.block)
        buffer = HostBuffer(self.num_bytes)
        if self._pinned:
            buffer.pin()
        with torch.inference_mode(False), torch.no_grad():
            views = [member.view(buffer.bytes) for member in self.members]
            for member, view in zip(self.members, views, strict=True):
                view.copy_(member.tensor)
                # The tensor's own memory goes before the next one is copied, where nothing else holds it.
                if member.is_parameter:
                    member.tensor.data = view
                else:
                    member.owner[member.key] = view
        self._buffer = buffer
        self.remember()

    def pin(self) -> None:
        self._buffer.pin()

    def unpin(self) -> None:
        self._buffer.unpin()


def check_frozen(block: nn.Module) -> None:
    """Refuses weights that are to be trained: they never come back from the device.

    Raises:
        ValueError: there are some.
    """
    trained = [name for name, parameter in block.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"weights that are trained cannot be streamed, and {trained[0]} of a {type(block).__name__} is; freeze "
            "the model (requires_grad_(False)) and train adapters, or keep all blocks resident"
        )


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def _state(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is moved or written to; one made under inference mode does not count its writes."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
