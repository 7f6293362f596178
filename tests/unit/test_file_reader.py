"""Reading with several threads: every byte in its place, by every way, and the errors of one thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.block_memory import Event, Transfers
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.file_reader import FileReader
from flux2_kit.flux2_core.files import write_safetensors
from flux2_kit.flux2_core.pipeline import GenerateRequest, SamplingConfig, load_pipeline
from flux2_kit.flux2_core.tensor_source import TensorSource
from torch import Tensor

NUM_BYTES, PART_BYTES = 100_003, 1000


class LazyTransfers(Transfers):
    """A copy happens when something waits for it: whoever does not wait finds other bytes."""

    def __init__(self) -> None:
        self.num_copies = 0

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        pending: list[Callable[[], object]] = [lambda: target.copy_(source)]
        self.num_copies += 1
        return pending

    def wait(self, event: Event) -> None:
        while event:
            event.pop()()

    wait_on_host = wait


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "random"
    path.write_bytes(torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8).numpy().tobytes())
    return path


@pytest.fixture(params=["positional", "seeking", "in small pieces"])
def system(request, monkeypatch) -> None:
    """What systems there are: without reads at a position, and with reads that give less than was asked for."""
    if request.param != "seeking" and not hasattr(os, "preadv"):
        pytest.skip("this system reads at no position")
    if request.param == "seeking":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif request.param == "in small pieces":
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, views, position: preadv(file, [views[0][:77]], position))


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize(("begin", "num_bytes"), [(0, NUM_BYTES), (13, 40_000), (99_000, 1003), (5, 0)])
@pytest.mark.parametrize("is_staged", [False, True])
def test_every_byte_is_in_its_place(path, begin, num_bytes, is_staged):
    reader = FileReader(num_threads=3, part_bytes=PART_BYTES)
    transfers = LazyTransfers() if is_staged else None
    for _ in range(2):  # the second time with threads and buffers that are there
        target = torch.zeros(num_bytes, dtype=torch.uint8)
        reader.fill(path, begin, target, transfers)
        assert target.numpy().tobytes() == path.read_bytes()[begin : begin + num_bytes]
    if transfers is not None:
        assert transfers.num_copies == 2 * -(-num_bytes // PART_BYTES)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("is_staged", [False, True])
def test_an_early_end_is_an_error_and_no_thread_reads_on(path, is_staged):
    reader = FileReader(num_threads=3, part_bytes=PART_BYTES)
    transfers = LazyTransfers() if is_staged else None
    target = torch.zeros(2 * NUM_BYTES, dtype=torch.uint8)
    with pytest.raises(EOFError, match="ends at byte 100003"):
        reader.fill(path, 0, target, transfers)
    before = target.clone()
    reader.fill(path, 0, torch.zeros(NUM_BYTES, dtype=torch.uint8), transfers)  # as good as before
    assert torch.equal(target, before)


def test_threads_end_with_their_reader(path):
    before = set(threading.enumerate())
    reader = FileReader(num_threads=3, part_bytes=PART_BYTES)
    reader.fill(path, 0, torch.zeros(NUM_BYTES, dtype=torch.uint8))
    threads = set(threading.enumerate()) - before
    assert threads
    del reader
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_large_tensors_are_read_by_parts(tmp_path):
    tensors = {
        "a": torch.randn(123, 45),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randint(0, 255, (9001,), dtype=torch.uint8),
        "d": torch.zeros(0, 3),
    }
    path = write_safetensors(tmp_path / "x.safetensors", tensors)
    source = TensorSource(path)
    source._reader = FileReader(part_bytes=PART_BYTES)
    for name, tensor in tensors.items():
        for mapped in (False, True):
            read = source.get(name, mapped)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(ValueError, match="was cut off while it was read; download it again"):
        source.get("c")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_tensors_that_are_read_under_inference_mode_can_be_written_to_outside(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    with torch.inference_mode():
        tensor = TensorSource(path).get("a")
    tensor += 1
    assert tensor.tolist() == [2, 2, 2]


def test_mapped_tensors_are_read_ahead_where_they_fit(tmp_path, monkeypatch):
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, num_bytes, __: advice.append((begin, num_bytes)))
    path = write_safetensors(tmp_path / "x.safetensors", {"a": torch.randn(100)})
    source = TensorSource(path)
    source.get("a", mapped=True)
    assert advice == [(source.table["a"].begin, 400)]
    monkeypatch.setattr("flux2_kit.flux2_core.tensor_source.available_host_bytes", lambda: 700)
    TensorSource(path).get("a", mapped=True)
    assert len(advice) == 1


def test_a_second_generation_reads_nothing(random_tiny_files, monkeypatch):
    pipeline = load_pipeline(
        "tiny",
        dit=random_tiny_files.dit,
        autoencoder=random_tiny_files.autoencoder,
        text_encoder=random_tiny_files.text_encoder,
    )
    sampling = SamplingConfig(num_steps=1)
    first = pipeline.generate(GenerateRequest(prompt="a circle", sampling=sampling))
    monkeypatch.setattr(TensorSource, "__init__", pytest.fail)
    monkeypatch.setattr(TensorSource, "get", pytest.fail)
    second = pipeline.generate(GenerateRequest(prompt="a circle", sampling=sampling))
    assert torch.equal(first.latents, second.latents)


def test_lines_of_a_file_share_what_was_loaded(random_tiny_files, tmp_path, monkeypatch):
    reads = []
    get = TensorSource.get
    monkeypatch.setattr(
        TensorSource, "get", lambda self, name, *args, **kw: reads.append(name) or get(self, name, *args, **kw)
    )
    counts = []
    for lines in ("one --d 1\n", "one --d 1\ntwo --d 2\nthree --d 3\n"):
        (tmp_path / "prompts.txt").write_text(lines)
        options = [
            "--infer_steps",
            "1",
            "--save_path",
            str(tmp_path / "out"),
            "--from_file",
            str(tmp_path / "prompts.txt"),
        ]
        assert main(["generate", *random_tiny_files.options, *options]) == 0
        counts.append(len(reads))
        reads.clear()
    assert counts[0] == counts[1] > 100
