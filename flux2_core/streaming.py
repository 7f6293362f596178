"""Block streaming: a network runs on a device that does not hold it.

The weights of streamed blocks live in host memory, or in a file (`disk_tier`), and flow through a ring of device
buffers ahead of their use. Weights are frozen, so they only ever move towards the device.

The order of blocks is known: forward again and again in inference; forward, then backward from the last block to the
first in training, where each block is computed once more first (activation checkpointing). So while one block runs, the
next one of that order is copied. A buffer is overwritten only after the last computation on it: at the end of the block
in a forward pass, and in a backward pass when the next block begins, because the gradients of a block are computed from
its weights after its recomputation ends. Between both kinds of work stand events of the device, never the host.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import fp8
from .block_memory import (
    Arrival,
    Event,
    HostBlock,
    StreamedBlock,
    check_frozen,
    make_transfers,
    on_device,
    tensor_bytes,
)
from .dit import Flux2DiT
from .linear import Linear

if TYPE_CHECKING:
    import os

    from .disk_tier import DiskReader
    from .text_encoder import TextEncoder

HOST = torch.device("cpu")
RING_SIZE = 2
"""Device buffers: one block runs while the next one arrives."""

Pass = Literal["inference", "forward", "backward"]
"""A pass without gradients, and the two of training."""


@dataclass(eq=False)
class Slot:
    """A device buffer of the ring."""

    buffer: Tensor
    """uint8 ``[num_bytes of the largest streamed block]``"""
    free: Event
    """After the last computation on it."""
    index: int | None = None
    """Of the block it holds or is about to hold."""
    arrival: Arrival = lambda: None
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    """Parameters and buffers in it, by block: the same objects every time."""


class BlockStreamer:
    """Runs blocks of which some are streamed and the others stay on the device.

    The blocks are called as before. They compute bit by bit what they compute when they are all on the device. Weights
    that are changed from outside (`load_state_dict`, merging) are taken over at the next call. ``.to`` moves resident
    blocks as ever; streamed ones stay in host memory and stream to the new device from then on, and the ring is freed.

    One backward pass recomputes blocks from the last to the first; until it is over no other pass may be run from
    within it, as its hooks could.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        device: str | torch.device,
        *,
        num_resident: int,
        ring_size: int = RING_SIZE,
        pinned: bool = True,
        disk: DiskReader | None = None,
        keeps_activations: Callable[[], bool] = lambda: False,
    ) -> None:
        """Moves every block to where it belongs, one after the other: there is never a second copy of them all.

        Args:
            blocks: in the order in which they run; frozen, on any device.
            device: where they run. Elsewhere than on CUDA copies are not beside the computation.
            num_resident: how many stay on the device; they are spread evenly.
            ring_size: device buffers, each as large as the largest streamed block. With one, nothing is copied ahead.
            pinned: pin host memory where the device is CUDA; copies run at the full rate and beside the computation
                only from there.
            disk: where the streamed blocks are read from; None keeps them in host memory.
            keeps_activations: whether the blocks keep their activations, and with them their weights, for a backward
                pass. That is refused when gradients are asked for. Where this does not tell it, autograd's own error
                about overwritten tensors does.

        Raises:
            ValueError: a number is out of range, a weight is to be trained, or the file does not fit the blocks.
        """
        self.blocks = list(blocks)
        self.device = _with_index(device)
        self.ring_size = ring_size
        self._pinned = pinned
        self._disk = disk
        self._keeps_activations = keeps_activations
        self._transfers = make_transfers(self.device)
        self._streamed: dict[int, StreamedBlock] = {}
        """By index of the block, ascending."""
        self._slots: list[Slot] | None = None
        self._held: Slot | None = None
        """The one that computations of now use."""
        self._running: StreamedBlock | None = None
        self._last = -1
        """Index of the block that ran last."""
        self._pass: Pass = "inference"
        self._closed = False
        self._host_modules: list[nn.Module] = []
        if ring_size < 1:
            raise ValueError(f"the ring of device buffers needs 1 or more, got {ring_size}")
        for block in self.blocks:
            check_frozen(block)
            assert not isinstance(getattr(block.forward, "streamer", None), BlockStreamer), "streamed already"
        self._forwards = [self._wrap(index, block) for index, block in enumerate(self.blocks)]
        try:
            self.set_num_resident(num_resident)
        except BaseException:
            self.close()
            raise

    @property
    def num_resident(self) -> int:
        """Blocks that stay on the device."""
        return len(self.blocks) - len(self._streamed)

    @property
    def reads_file(self) -> bool:
        """Whether streamed blocks are read from a file, and take no host memory."""
        return self._disk is not None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the blocks that stay on the device."""
        return sum(tensor_bytes(block) for index, block in enumerate(self.blocks) if index not in self._streamed)

    @property
    def ring_bytes(self) -> int:
        """Bytes of the device buffers, which are there from the first call on."""
        return self._num_slots() * max((streamed.num_bytes for streamed in self._streamed.values()), default=0)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that streaming holds; mapped files do not count."""
        read_ahead = self._disk.num_bytes if self._disk is not None and self._streamed else 0
        return read_ahead + sum(streamed.host_bytes for streamed in self._streamed.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_num_resident(self, num_resident: int) -> None:
        """Changes how many blocks stay on the device; not from within a pass.

        Blocks that leave the device are copied to host memory (or read from the file from now on) one at a time, before
        others come, so that fewer never takes more device memory on the way.

        Raises:
            ValueError: the number is out of range.
        """
        assert not self._closed and self._running is None
        if not 0 <= num_resident <= len(self.blocks):
            raise ValueError(
                f"{num_resident} blocks cannot stay on the device: there are {len(self.blocks)}; give 0 to "
                f"{len(self.blocks)}"
            )
        self.unload()
        wanted = streamed_indices(len(self.blocks), num_resident)
        try:
            for index in wanted:
                if index not in self._streamed:
                    self._streamed[index] = self._stream(index)
            for index in range(len(self.blocks)):
                if index not in wanted:
                    self._make_resident(index)
        finally:
            self._streamed = dict(sorted(self._streamed.items()))
        self._try_fp8()

    def keep_in_host_memory(self, module: nn.Module) -> None:
        """Lets a module with few numbers to give, such as a token embedding, run on the CPU, whatever moves the model.

        What it gives goes to the device. It ends with `close`.
        """
        assert "forward" not in module.__dict__
        module.to(HOST)
        original = module.forward

        @functools.wraps(original, updated=())
        def forward(input: Tensor) -> Tensor:
            return original(input.to(HOST)).to(self.device)

        module.__dict__["forward"] = torch.compiler.disable(forward)
        module.__dict__["_apply"] = functools.partial(self._apply, module)
        self._host_modules.append(module)

    def unload(self) -> None:
        """Frees the device buffers; the next call makes new ones."""
        assert self._running is None
        if self._slots is not None:
            if self._disk is not None:
                self._disk.finish()
            # Freed memory may be given to anyone at once, so nothing may still read it or write to it.
            self._transfers.finish()
        self._slots = self._held = None

    def close(self) -> None:
        """Ends streaming: streamed blocks are plain modules in host memory (or mapped), the others stay on the device.

        Their ``.to`` brings them all to one place again.
        """
        if self._closed:
            return
        self.unload()
        self._closed = True
        for block, (own, wrapper) in zip(self.blocks, self._forwards, strict=True):
            if block.__dict__.get("forward") is wrapper:
                del block.__dict__["forward"]
                if own is not None:
                    block.__dict__["forward"] = own
        for streamed in self._streamed.values():
            streamed.block.__dict__.pop("_apply", None)
            streamed.unpin()
        self._streamed = {}
        for module in self._host_modules:
            del module.__dict__["forward"], module.__dict__["_apply"]
        self._host_modules = []
        if self._disk is not None:
            self._disk.close()

    def _stream(self, index: int) -> StreamedBlock:
        block = self.blocks[index]
        pinned = self._pinned and self.device.type == "cuda"
        with on_device(self.device):
            streamed = HostBlock(block, pinned=pinned) if self._disk is None else self._disk.open_block(index, block)
        block.__dict__["_apply"] = functools.partial(self._apply, block)
        return streamed

    def _make_resident(self, index: int) -> None:
        block, streamed = self.blocks[index], self._streamed.pop(index, None)
        block.__dict__.pop("_apply", None)
        try:
            block.to(self.device)
        except BaseException:  # out of memory, with a part of the block on the device
            if streamed is not None:
                self._streamed[index] = self._stream(index)
            raise
        if streamed is not None:
            streamed.unpin()

    def _try_fp8(self) -> None:
        """As a Linear does when its weight gets to the device, which a streamed one's never does as far as it sees."""
        linears = [module for block in self.blocks for module in block.modules() if isinstance(module, Linear)]
        if self._streamed and any(linear.weight_format == "fp8" for linear in linears):
            fp8.scaled_mm(self.device)

    def _wrap(self, index: int, block: nn.Module) -> tuple[Any, Callable[..., Any]]:
        """Lets a block announce when it begins and ends; gives the forward of its own that was replaced, and the new.

        A hook would not do: the end of a recomputation, an exception, would pass it by. torch.compile leaves this
        function alone but compiles the one within; attributes of that one are not copied, since torch.compile marks
        its functions by them.
        """
        own, original = block.__dict__.get("forward"), block.forward
        disable: Any = torch.compiler.disable
        enter, leave, go_on = disable(self._enter), disable(self._leave), disable(self._go_on)

        @functools.wraps(original, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._closed:
                return original(*args, **kwargs)
            enter(index)
            try:
                output = original(*args, **kwargs)
            finally:
                leave()
            go_on(index, output)
            return output

        wrapper = disable(forward, recursive=False)
        wrapper.streamer = self
        block.__dict__["forward"] = wrapper
        return own, wrapper

    def _enter(self, index: int) -> None:
        """Before a block: what ran before is over, and this one's weights are in their places."""
        assert self._running is None, "blocks run one after the other"
        self._release()
        self._last, self._pass = index, _current_pass()
        streamed = self._streamed.get(index)
        if streamed is None:
            self._fetch_ahead()
            return
        slot = self._slot_with(index, streamed)
        try:
            event = slot.arrival()
        except BaseException:
            self.unload()  # what else was read ahead may have failed as well
            raise
        self._transfers.wait(event)
        self._held = slot
        self._fetch_ahead()
        if index not in slot.views:
            slot.views[index] = streamed.views(slot.buffer)
        streamed.swap_in(slot.views[index])
        self._running = streamed

    def _leave(self) -> None:
        """After a block, whether or not it failed."""
        if self._running is not None:
            self._running.swap_out()
            self._running = None
        if self._pass != "backward":
            self._release()

    def _go_on(self, index: int, output: Any) -> None:
        """After a block that did not fail."""
        streamed = index in self._streamed
        if streamed and self._pass == "forward" and self._keeps_activations() and _requires_grad(output):
            raise ValueError(
                "a streamed model can be trained only with activation checkpointing, since its weights do not stay on "
                "the device for the backward pass; set checkpointing to blocks or offload, or keep all blocks resident"
            )
        self._fetch_ahead()

    def _release(self) -> None:
        """Lets the buffer in use be overwritten, after what has been ordered by now."""
        if self._held is not None:
            self._held.free = self._transfers.mark()
            self._held = None

    def _slot_with(self, index: int, streamed: StreamedBlock) -> Slot:
        """The slot that holds a block, or is about to."""
        if not streamed.is_unchanged():
            # The old buffers may still be read, or be too small for the new weights.
            self.unload()
            with on_device(self.device):
                streamed.renew()
        for slot in self._ring():
            if slot.index == index:
                return slot
        slot = self._victim(set())
        self._fill(slot, index)
        return slot

    def _fetch_ahead(self) -> None:
        """Orders copies of the blocks that come next into all buffers but the one in use."""
        if not self._streamed:
            return
        slots = self._ring()
        current = None if self._held is None else self._held.index
        wanted: list[int] = []
        for index in upcoming(list(self._streamed), self._last, self._pass):
            if len(wanted) == len(slots) - (current is not None):
                break
            if index != current and index not in wanted:
                wanted.append(index)
        present = {slot.index for slot in slots}
        for index in wanted:
            # A block with new weights is taken care of when it runs.
            if index not in present and self._streamed[index].is_unchanged():
                self._fill(self._victim(set(wanted)), index)

    def _victim(self, wanted: set[int]) -> Slot:
        """A slot that is not in use, holding none of these blocks."""
        slots = self._slots
        assert slots is not None
        free = [slot for slot in slots if slot is not self._held and slot.index not in wanted]
        return next((slot for slot in free if slot.index is None), free[0])

    def _fill(self, slot: Slot, index: int) -> None:
        streamed = self._streamed[index]
        slot.index = None
        with torch.inference_mode(False), torch.no_grad():
            slot.arrival = streamed.fill(slot.buffer[: streamed.num_bytes], self._transfers, slot.free)
        slot.index = index

    def _ring(self) -> list[Slot]:
        """The device buffers. They are made on the computation's stream: copies wait for what used their memory."""
        if self._slots is None:
            num_slots = self._num_slots()
            num_bytes = self.ring_bytes // max(1, num_slots)
            with torch.inference_mode(False):
                buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(num_slots)]
            for buffer in buffers:
                self._transfers.guard(buffer)
            self._slots = [Slot(buffer=buffer, free=self._transfers.mark()) for buffer in buffers]
        return self._slots

    def _num_slots(self) -> int:
        return min(self.ring_size, len(self._streamed))

    def _apply(self, block: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`nn.Module._apply` of a streamed block: tensors may change their type, but they stay in host memory."""
        assert self._running is None
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.unload()
            self.device, self._transfers = device, make_transfers(device)
            if self._pinned and device.type == "cuda":
                with on_device(device):
                    for streamed in self._streamed.values():
                        streamed.pin()
                self._try_fp8()

        def change_type(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=self.device)).dtype)

        with torch.inference_mode(False), torch.no_grad():
            return type(block)._apply(block, change_type, recurse)


def streamed_indices(num_blocks: int, num_resident: int) -> list[int]:
    """Which blocks are streamed: spread evenly, so that each is copied during as much computation as the others."""
    num_streamed = num_blocks - num_resident
    return [(2 * i + 1) * num_blocks // (2 * num_streamed) for i in range(num_streamed)]


def upcoming(streamed: Sequence[int], last: int, kind: Pass) -> list[int]:
    """The streamed blocks in the order in which they are used after block ``last``, which may be used once more first.

    A forward pass of training turns around at its end, and a backward pass at its beginning.
    """
    later = [index for index in streamed if index > last]
    earlier = [index for index in streamed if index < last]
    if kind == "inference":
        return [*later, *streamed]
    if kind == "forward":
        return [*later, *reversed(streamed)]
    return [*reversed(earlier), *streamed]


@torch.inference_mode(False)
@torch.no_grad()
def stream_dit(
    dit: Flux2DiT,
    device: str | torch.device,
    *,
    num_resident: int,
    ring_size: int = RING_SIZE,
    pinned: bool = True,
    file: str | os.PathLike[str] | None = None,
) -> BlockStreamer:
    """Lets a DiT run on a device with all but ``num_resident`` of its blocks streamed there.

    The DiT may have been loaded on the CPU; it is never on the device as a whole, nor twice in host memory. Everything
    but the blocks stays on the device, so that `Flux2DiT.device` and `Flux2DiT.dtype` are what inputs need. Adapters
    stay where they are; what is made for a streamed layer afterwards finds its weight in host memory, and has to be
    moved to the device of the DiT. Arguments and errors are those of `BlockStreamer`.

    Args:
        file: the safetensors file the DiT was loaded from, to stream from disk; it has to hold the weights as they run,
            see `disk_tier`.

    Raises:
        ValueError: also, in a call with gradients, when `Flux2DiT.checkpointing` is "none".
    """
    blocks = [*dit.double_blocks, *dit.single_blocks]
    names = [f"double_blocks.{i}." for i in range(len(dit.double_blocks))]
    names += [f"single_blocks.{i}." for i in range(len(dit.single_blocks))]
    disk = None if file is None else _open_disk(file, "dit", names)
    weak = weakref.ref(dit)  # who holds the streamer does not hold the DiT
    streamer = BlockStreamer(
        blocks,
        device,
        num_resident=num_resident,
        ring_size=ring_size,
        pinned=pinned,
        disk=disk,
        keeps_activations=lambda: (found := weak()) is not None and found.checkpointing == "none",
    )
    for name, child in dit.named_children():
        if name not in ("double_blocks", "single_blocks"):
            child.to(streamer.device)
    return streamer


@torch.inference_mode(False)
@torch.no_grad()
def stream_text_encoder(
    text_encoder: TextEncoder,
    device: str | torch.device,
    *,
    num_resident: int = 0,
    ring_size: int = RING_SIZE,
    pinned: bool = True,
    file: str | os.PathLike[str] | None = None,
) -> BlockStreamer:
    """Lets a text encoder run on a device with its layers streamed there; as `stream_dit`.

    The token embedding, 0.7 to 1.3 GiB in bf16, stays in host memory: a prompt looks up a few hundred rows of it.
    """
    model: Any = text_encoder.model
    names = [f"layers.{i}." for i in range(len(model.layers))]
    disk = None if file is None else _open_disk(file, "text_encoder", names)
    streamer = BlockStreamer(
        model.layers, device, num_resident=num_resident, ring_size=ring_size, pinned=pinned, disk=disk
    )
    for name, child in model.named_children():
        if name not in ("layers", "embed_tokens"):
            child.to(streamer.device)
    streamer.keep_in_host_memory(model.embed_tokens)
    return streamer


def _open_disk(file: str | os.PathLike[str], component: Literal["dit", "text_encoder"], names: list[str]) -> DiskReader:
    from .disk_tier import DiskReader
    from .tensor_source import TensorSource

    return DiskReader(TensorSource(file, component=component), names)


def _current_pass() -> Pass:
    # The same question torch.utils.checkpoint asks: it recomputes from within a backward pass.
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    return "forward" if torch.is_grad_enabled() else "inference"


def _requires_grad(output: Any) -> bool:
    outputs = output if isinstance(output, tuple | list) else (output,)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in outputs)


def _with_index(device: str | torch.device) -> torch.device:
    """The device as tensors name it, which may differ from how it was asked for."""
    return torch.empty(0, device=device).device
