"""Reads large parts of files with several threads: into host memory, or through pinned memory onto a device.

One thread that copies out of the system's cache, or waits for a disk, uses a fraction of what either can do. On the way
to a device a part is copied while the next ones are read, and no more of the file is in host memory than those parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from .block_memory import Event, HostBuffer, Transfers

NUM_THREADS = 8
PART_BYTES = 8 * 2**20
"""What one thread reads at a time; larger parts are no faster, smaller ones cost more calls."""

ReadAt = Callable[[int, memoryview], None]
"""Fills memory from a position of a file."""


class FileReader:
    """Threads, and the pinned memory that they read into on the way to a device; both are made when they are needed."""

    def __init__(self, *, num_threads: int = NUM_THREADS, part_bytes: int = PART_BYTES) -> None:
        self.num_threads = num_threads
        self.part_bytes = part_bytes
        self._threads: ThreadPoolExecutor | None = None
        self._staging: SimpleQueue[tuple[HostBuffer, Event]] | None = None

    def fill(self, path: Path, begin: int, target: Tensor, transfers: Transfers | None = None) -> None:
        """Reads as many bytes as ``target`` has; returns when they are there, or ordered where ``transfers`` are given.

        Args:
            begin: position in the file, in bytes.
            target: uint8 ``[num_bytes]``; in host memory without ``transfers``.
            transfers: copy to where the target is; what is computed after this call comes after them.

        Raises:
            EOFError: the file ends before.
            OSError: it cannot be read.
        """
        num_bytes = target.numel()
        parts = [(start, min(start + self.part_bytes, num_bytes)) for start in range(0, num_bytes, self.part_bytes)]
        with opened(path) as read_at:
            if transfers is None:
                memory = target.numpy().data
                self._run(lambda start, stop: read_at(begin + start, memory[start:stop]), parts)
            else:
                self._fill_staged(read_at, begin, target, parts, transfers)

    def _fill_staged(
        self, read_at: ReadAt, begin: int, target: Tensor, parts: list[tuple[int, int]], transfers: Transfers
    ) -> None:
        if self._staging is None:
            self._staging = SimpleQueue()
            for _ in range(self.num_threads):
                self._staging.put((HostBuffer(self.part_bytes), None))
        staging, after = self._staging, transfers.mark()
        copies: list[Event] = []

        def read(start: int, stop: int) -> None:
            buffer, copied = staging.get()
            try:
                if target.is_cuda:
                    with torch.cuda.device(target.device):  # a thread begins with the first one
                        buffer.pin()
                transfers.wait_on_host(copied)
                part = buffer.bytes[: stop - start]
                read_at(begin + start, part.numpy().data)
                copied = transfers.copy(target[start:stop], part, after)
                copies.append(copied)
            finally:
                staging.put((buffer, copied))

        try:
            self._run(read, parts)
        finally:
            for copied in copies:
                transfers.wait(copied)

    def _run(self, read: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
        """Reads all parts; when it returns, by an error too, no thread is at work any more."""
        if len(parts) <= 1:
            for part in parts:
                read(*part)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="file-reader")
        futures = [self._threads.submit(read, *part) for part in parts]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


@contextmanager
def opened(path: Path) -> Iterator[ReadAt]:
    """A file that several threads may read at a time; raises as `FileReader.fill`."""
    if not hasattr(os, "preadv"):  # Windows, and older systems of Apple
        yield lambda position, memory: _read_alone(path, position, memory)
        return
    file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read_at(position: int, memory: memoryview) -> None:
        while memory:
            count = os.preadv(file, [memory], position)
            if not count:
                raise EOFError(f"{path} ends at byte {position}")
            position, memory = position + count, memory[count:]

    try:
        yield read_at
    finally:
        os.close(file)


def _read_alone(path: Path, position: int, memory: memoryview) -> None:
    """As ``read_at`` of `opened`, with a file of its own, since threads would share a position in one."""
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        while memory:
            count = file.readinto(memory)
            if not count:
                raise EOFError(f"{path} ends at byte {position}")
            position, memory = position + count, memory[count:]


def expect(path: Path, begin: int, num_bytes: int) -> None:
    """Lets the system read a part of a file ahead, where it takes such advice, for one who maps it and goes on."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # some file systems take none
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            os.posix_fadvise(file, begin, num_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
