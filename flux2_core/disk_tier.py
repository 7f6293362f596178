"""The disk tier of block streaming: blocks are read from a safetensors file, ahead of their use, by a thread.

For hosts that cannot hold the model either. The file has to hold the weights as they run (BFL's names and layout for a
DiT, bf16 or fp8 as they are computed with), so that a block is read straight into the buffer that goes to the device.
Between passes the model's weights are mapped from the file: they can be saved, and take no memory that the system could
not take back.

Blocks are read, not copied out of the mapping: a file that is cut off under a mapping ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from .block_memory import Arrival, Event, HostBuffer, Member, StreamedBlock, Transfers, check_frozen, lay_out, on_device
from .file_reader import FileReader
from .state_dict import COMFYUI_DIT_PREFIX
from .tensor_source import TensorEntry, TensorSource, spread_samples
from .text_encoder import PREFIXES as TEXT_ENCODER_PREFIXES

NUM_BUFFERS = 2
"""Host buffers: one is read into while the other one is copied to the device."""
KEPT_BYTES = 2**20
"""Tensors up to this size (norms, scales) that the file holds in another form stay in host memory."""
SAMPLES, SAMPLE_BYTES = 8, 4096
"""A weight and its place in the file are compared in so many parts of so many bytes, evenly spread."""


class DiskReader:
    """Reads blocks from a file in the order in which they are asked for, in a thread of its own.

    Args:
        source: the checkpoint; it must not change while this lives, which is checked whenever a block is read.
        block_names: what the names of each block's tensors begin with, after a prefix of the whole checkpoint.
    """

    def __init__(self, source: TensorSource, block_names: Sequence[str]) -> None:
        self.source = source
        self.block_names = block_names
        self.prefix = next((prefix for prefix in _prefixes(source) if _has(source, prefix, block_names)), "")
        self._stats = {file: _identity(file) for file in source.files}
        self._reader = FileReader()
        self._num_bytes = 0
        self._buffers: list[tuple[HostBuffer, Event]] = []
        """With the event after which the last copy from it is over; used in turn, the next one first."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="block-reader")

    @property
    def num_bytes(self) -> int:
        """Of all host buffers."""
        return NUM_BUFFERS * self._num_bytes

    def open_block(self, index: int, block: nn.Module) -> DiskBlock:
        """A block that is read from the file from now on; its weights are mapped from there.

        Raises:
            ValueError: the file does not hold its weights as they run.
        """
        opened = DiskBlock(block, self, self.prefix + self.block_names[index])
        if opened.num_bytes > self._num_bytes:
            self.finish()
            self._num_bytes, self._buffers = opened.num_bytes, []
        return opened

    def order(self, block: DiskBlock, target: Tensor, transfers: Transfers, after: Event) -> Arrival:
        """Lets a block be read and copied; what is given back waits for the reading and raises its errors."""
        return self._thread.submit(self._read, block, target, transfers, after).result

    def finish(self) -> None:
        """Returns once everything that was ordered has been read; what went wrong is of no interest any more."""
        self._thread.submit(int).result()

    def close(self) -> None:
        """Ends the thread and frees the buffers; no copy may be under way."""
        self._thread.shutdown(cancel_futures=True)
        for buffer, _ in self._buffers:
            buffer.unpin()
        self._buffers = []

    def read_samples(self, entry: TensorEntry) -> bytes:
        """Parts of a tensor; see `SAMPLES`."""
        parts = []
        for start, stop in spread_samples(entry.num_bytes, SAMPLES, SAMPLE_BYTES):
            part = torch.empty(stop - start, dtype=torch.uint8)
            self._fill(part, entry, start)
            parts.append(part.numpy().tobytes())
        return b"".join(parts)

    def _read(self, block: DiskBlock, target: Tensor, transfers: Transfers, after: Event) -> Event:
        if not self._buffers:
            self._buffers = [(HostBuffer(self._num_bytes), None) for _ in range(NUM_BUFFERS)]
        buffer, copied = self._buffers.pop(0)
        try:
            if target.is_cuda:
                with on_device(target.device):  # a thread begins with the first one
                    buffer.pin()
            transfers.wait_on_host(copied)
            self._check_unchanged()
            for member, stored in block.parts:
                part = buffer.bytes[member.offset : member.offset + member.num_bytes]
                if isinstance(stored, Tensor):
                    part.copy_(stored)
                else:
                    self._fill(part, stored)
            self._check_unchanged()  # a change while it was read
            copied = transfers.copy(target, buffer.bytes[: block.num_bytes], after)
        finally:
            self._buffers.append((buffer, copied))
        return copied

    def _fill(self, target: Tensor, entry: TensorEntry, start: int = 0) -> None:
        """Reads as many bytes of a tensor as ``target`` has.

        Raises:
            ValueError: the file ends before, or cannot be read.
        """
        try:
            try:
                self._reader.fill(entry.file, entry.begin + start, target)
            except (EOFError, OSError):
                self._check_unchanged()  # says more
                raise
        except EOFError as error:
            raise ValueError(f"{entry.file} was cut off while the model streams from it; download it again") from error
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{entry.file} cannot be read: {reason}; load the model again") from error

    def _check_unchanged(self) -> None:
        for file, stat in self._stats.items():
            if _identity(file) != stat:
                raise ValueError(
                    f"{file} was changed or replaced while the model streams from it; load the model again, and leave "
                    "the file alone as long as it runs"
                )


class DiskBlock(StreamedBlock):
    """A block in a file; outside of passes its tensors are mapped from there.

    Args:
        block: its tensors have to be those of the file.
        reader: of the file.
        prefix: what names of the block's tensors begin with in the file.
    """

    def __init__(self, block: nn.Module, reader: DiskReader, prefix: str) -> None:
        super().__init__(block)
        check_frozen(block)
        self._reader = reader
        self.members, self.num_bytes = lay_out(block)
        self.parts: list[tuple[Member, TensorEntry | Tensor]] = [
            (member, self._find(member, prefix + member.name)) for member in self.members
        ]
        """Every tensor, and where it is read from or its bytes."""
        self.place([self._outside_of_passes(member, part, prefix) for member, part in self.parts])

    @property
    def host_bytes(self) -> int:
        return sum(part.nbytes for _, part in self.parts if isinstance(part, Tensor))

    def fill(self, target: Tensor, transfers: Transfers, after: Event) -> Arrival:
        return self._reader.order(self, target, transfers, after)

    def renew(self) -> None:
        raise ValueError(
            f"weights of a model that streams from {self._reader.source.path} were changed, and what runs is the file; "
            "merge into a file and load that, or stream from host memory"
        )

    def _find(self, member: Member, name: str) -> TensorEntry | Tensor:
        path, entry = self._reader.source.path, self._reader.source.table.get(name)
        stored = None if entry is None else self._reader.source.dtype(name)
        fits = entry is not None and stored == member.dtype and entry.num_bytes == member.num_bytes
        if entry is not None and fits and entry.begin % member.dtype.itemsize == 0:
            if self._reader.read_samples(entry) == _samples(_bytes_of(member.tensor)):
                return entry
            difference = "holds other numbers than the model, which may have LoRAs merged in"
        elif entry is None:
            difference = "is not there"
        elif fits:
            difference = "does not begin at a multiple of its type's size"
        else:
            difference = f"is {entry.dtype} {list(entry.shape)}, and runs as {member.dtype} {list(member.shape)}"
        if member.num_bytes <= KEPT_BYTES:
            return _bytes_of(member.tensor).to("cpu", copy=True)
        raise ValueError(
            f"blocks cannot be streamed from {path}: {name} {difference}; write a file that holds the weights as they "
            "run with `flux2 quantize`, or stream from host memory"
        )

    def _outside_of_passes(self, member: Member, part: TensorEntry | Tensor, prefix: str) -> Tensor:
        if isinstance(part, Tensor):
            return part.view(member.dtype).view(member.shape)
        return self._reader.source.get(prefix + member.name, mapped=True).view(member.shape)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _samples(flat: Tensor) -> bytes:
    parts = [flat[start:stop].cpu() for start, stop in spread_samples(flat.numel(), SAMPLES, SAMPLE_BYTES)]
    return torch.cat(parts).numpy().tobytes() if parts else b""


def _identity(path: Path) -> tuple[int, ...]:
    """Differs when another file is there, or was written to."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _prefixes(source: TensorSource) -> tuple[str, ...]:
    return TEXT_ENCODER_PREFIXES if source.component == "text_encoder" else ("", COMFYUI_DIT_PREFIX)


def _has(source: TensorSource, prefix: str, block_names: Sequence[str]) -> bool:
    start = prefix + block_names[0]
    return any(name.startswith(start) for name in source.table)
