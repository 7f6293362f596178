"""Runs that fill a cache: stopped, killed, several at a time, with little memory or disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Semaphore

import pytest
import torch
from caches import (
    AUTOENCODER,
    NAMES,
    TEXT_ENCODER,
    TINY,
    cached_files,
    draw,
    fill,
    listing,
    opened,
)
from flux2_kit.flux2_core.images import image_to_tensor, load_image
from flux2_kit.flux2_core.sampling import Stopped
from flux2_kit.training import cache_encoders, encode
from flux2_kit.training.buckets import fit_target
from flux2_kit.training.cache import CachedItem
from flux2_kit.training.cache_manifest import prune_cache
from flux2_kit.training.dataset import Dataset
from flux2_kit.training.encode import CacheOptions, cache_latents, cache_text
from safetensors.torch import load_file, save_file

# Interruptions and processes


def test_a_run_that_was_stopped_goes_on(folder):
    dataset = listing(folder)
    done = []
    options = CacheOptions(on_progress=lambda *state: done.append(state), should_stop=lambda: len(done) >= 6)
    with pytest.raises(Stopped, match=r"stopped after 2 of 3 pictures"):  # three were read, begun, and two encoded
        cache_latents(dataset, AUTOENCODER, options)
    with pytest.raises(ValueError, match=r"captions .* are not cached|files missing"):
        opened(dataset)
    assert fill(dataset) == (1, 4)
    assert len(opened(dataset).items) == 3


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from flux2_kit.training.dataset import list_dataset
from flux2_kit.training.dataset_config import DatasetConfig, SubsetConfig
from flux2_kit.training.encode import CacheOptions, cache_latents
folder, autoencoder, num_writes, index, count = sys.argv[1:]
subset = SubsetConfig(image_directory=Path(folder), resolution=(64, 64), enable_bucket=True)
replace, lock, calls = Path.replace, threading.Lock(), []
def dying(*paths):
    with lock:
        calls.append(paths)
        if len(calls) > int(num_writes):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*paths)
Path.replace = dying
options = CacheOptions(process_index=int(index), num_processes=int(count))
print(cache_latents(list_dataset(DatasetConfig(subsets=(subset,))), autoencoder, options).num_encoded)
"""


def start(folder: Path, num_writes: int, index: int = 0, count: int = 1) -> subprocess.Popen[str]:
    """A process that caches latents and is killed before it finishes one write too many."""
    arguments = [folder, AUTOENCODER, num_writes, index, count]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_run_goes_on_where_it_was(folder):
    process = start(folder, 3)  # the manifest and two pictures
    assert process.wait(120) == -signal.SIGKILL
    hidden = cached_files(folder, ".latents")
    assert len(cached_files(folder, "latents")) == 2 and hidden
    dataset = listing(folder)
    assert fill(dataset) == (1, 4)
    assert len(opened(dataset).items) == 3
    os.utime(folder / "flux2_cache" / hidden.pop(), (1, 1))
    assert prune_cache(dataset).num_deleted == 1 and cached_files(folder, ".latents") == hidden


def test_two_processes_make_the_files_of_one(filled):
    names = cached_files(filled)
    latents = {name for name in names if not name.startswith(("text", "manifest-text"))}
    shutil.rmtree(filled / "flux2_cache")
    processes = [start(filled, 100, index, 2) for index in (0, 1)]
    counts = sorted(int(process.communicate(timeout=120)[0]) for process in processes)
    assert counts == [1, 2] and cached_files(filled) == latents


def test_independent_runs_on_one_folder_do_no_harm(filled):
    names = cached_files(filled)
    shutil.rmtree(filled / "flux2_cache")
    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(lambda _: cache_latents(listing(filled), AUTOENCODER).num_encoded, range(3)))
    assert 3 <= sum(counts) <= 9
    assert cached_files(filled) == {name for name in names if not name.startswith(("text", "manifest-text"))}
    cache_text(listing(filled), TEXT_ENCODER, TINY.text_encoder)
    assert len(opened(listing(filled)).items) == 3


def test_every_file_belongs_to_one_process(folder):
    dataset = listing(folder)
    waited = []

    def options(index: int) -> CacheOptions:
        return CacheOptions(process_index=index, num_processes=2, barrier=lambda: waited.append(index))

    shares = [cache_latents(dataset, AUTOENCODER, options(index)).num_encoded for index in (0, 1)]
    assert sum(shares) == 3 and min(shares) == 1
    assert waited == [0, 0, 1, 1]
    assert cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, options(0)).num_encoded == 2
    assert cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, options(1)).num_encoded == 2
    assert len(opened(dataset).items) == 3


# Trouble


def test_a_folder_that_cannot_be_made(folder):
    (folder / "flux2_cache").write_text("in the way")
    with pytest.raises(ValueError, match=r"flux2_cache/manifest-latents.* cannot be written .*set cache_directory"):
        fill(listing(folder))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder(folder, monkeypatch):
    dataset = listing(folder)
    cache = folder / "flux2_cache"
    if os.geteuid() == 0:  # nothing is forbidden to root: the system's answer is played

        def refuse(path, _target):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(Path, "replace", refuse)
    else:
        cache.mkdir()
        cache.chmod(0o555)
    with pytest.raises(ValueError, match=r"cannot be written .*; check its permissions, or set cache_directory"):
        fill(dataset)
    monkeypatch.undo()
    cache.chmod(0o755)
    fill(dataset)
    cache.chmod(0o555)
    monkeypatch.setattr(encode, "write_cached", None)
    times = [path.stat().st_mtime_ns for path in sorted(cache.iterdir())]
    assert fill(dataset) == (0, 0)  # a whole cache is used as it is
    assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == times
    assert len(opened(dataset).items) == 3
    cache.chmod(0o755)


def test_a_full_disk_keeps_what_was_written(folder, monkeypatch):
    dataset = listing(folder)
    write = encode.write_cached
    room = Semaphore(2)

    def write_until_full(folder, file, tensor):
        if not room.acquire(blocking=False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / file.name))
        write(folder, file, tensor)

    monkeypatch.setattr(encode, "write_cached", write_until_full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left.*make room there"):
        fill(dataset)
    monkeypatch.undo()
    assert fill(dataset) == (1, 4)


def test_pictures_that_cannot_be_read(folder):
    dataset = listing(folder)
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"some pictures cannot be encoded; the others are cached: ") as caught:
        fill(dataset)
    assert all(f"{name}.png cannot be read as a picture" in str(caught.value) for name in ("a", "b"))
    assert len(cached_files(folder, "latents")) == 1
    (folder / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b.png cannot be read \(No such file"):
        fill(dataset)
    with pytest.raises(ValueError, match=r"not cached|No such file"):
        opened(dataset)


def test_a_reference_that_changed_since_it_was_listed(folder):
    control = folder.parent / "control"
    for name in NAMES:
        draw(control / f"{name}.png", 10, (80, 64))
    dataset = listing(folder, control_directory=control)
    draw(control / "a.png", 10, (64, 96))
    with pytest.raises(ValueError, match=r"a.png changed while the dataset was cached"):
        fill(dataset)


class FakeAutoencoder:
    """Holds as many pixels as it has memory for."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.batches: list[int] = []
        self.config = TINY.autoencoder

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        if images.shape[0] * images.shape[-1] * images.shape[-2] > self.max_pixels:
            raise torch.OutOfMemoryError("out of memory")
        return images[:, :1, ::16, ::16].expand(-1, 128, -1, -1).float()

    def encode_tiled(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(0)
        if self.max_pixels == 0:
            raise torch.OutOfMemoryError("out of memory")
        return torch.zeros(len(images), 128, images.shape[-2] // 16, images.shape[-1] // 16)


@pytest.mark.parametrize(
    ("num_fitting", "batches"),
    [(100, [8, 1]), (5, [8, 4, 4, 1]), (2, [8, 4, 2, 2, 2, 2, 1]), (0.5, [8, 4, 2, 1] + [0] * 9)],
)
def test_batches_are_halved_until_they_fit(folder, monkeypatch, num_fitting, batches):
    for seed in range(3, 9):
        draw(folder / f"p{seed}.png", seed)
        (folder / f"p{seed}.txt").write_text("x")
    dataset = listing(folder)
    width, height = dataset.items[0].bucket
    fake = FakeAutoencoder(int(num_fitting * width * height))
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    assert cache_latents(dataset, AUTOENCODER, CacheOptions(batch_size=8)).num_encoded == 9
    assert fake.batches == batches


def test_pictures_of_one_size_go_together(folder, monkeypatch):
    for seed in range(3, 7):
        draw(folder / f"p{seed}.png", seed, (90, 70) if seed % 2 else (70, 90))
        (folder / f"p{seed}.txt").write_text("x")
    fake = FakeAutoencoder(10**9)
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    dataset = listing(folder, resolution=(96, 96))
    assert cache_latents(dataset, AUTOENCODER, CacheOptions(batch_size=8)).num_encoded == 7
    assert sorted(fake.batches) == [2, 5]
    for cached in open_latents(dataset):
        picture = image_to_tensor(fit_target(load_image(cached.item.image), cached.item.bucket))
        assert torch.equal(load_file(cached.folder / cached.files.latents.name)["latents"], fake.encode(picture)[0])


def test_writing_does_not_hold_up_the_encoder(folder, monkeypatch):
    went_on, waited = Event(), []
    fake = FakeAutoencoder(10**9)
    real_encode, real_write = fake.encode, encode.write_cached

    def encode_and_tell(images):
        if fake.batches:
            went_on.set()
        return real_encode(images)

    def write_when_it_went_on(*arguments):
        waited.append(went_on.wait(10))
        real_write(*arguments)

    fake.encode = encode_and_tell
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    monkeypatch.setattr(encode, "write_cached", write_when_it_went_on)
    cache_latents(listing(folder), AUTOENCODER)
    assert waited == [True] * 3


def open_latents(dataset: Dataset) -> tuple[CachedItem, ...]:
    cache_text(dataset, TEXT_ENCODER, TINY.text_encoder)
    return opened(dataset).items


def test_memory_for_nothing_at_all(folder, monkeypatch):
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: FakeAutoencoder(0))
    with pytest.raises(ValueError, match=r"px does not fit into memory, in tiles neither; take --vae_dtype bf16"):
        fill(listing(folder))


def test_latents_that_are_not_finite(folder, monkeypatch):
    fake = FakeAutoencoder(10**9)
    fake.encode = lambda images: torch.full((1, 128, *[side // 16 for side in images.shape[-2:]]), torch.nan)
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    with pytest.raises(ValueError, match=r"not finite for .*png; let it compute in bf16 or fp32"):
        fill(listing(folder))
    assert not cached_files(folder, "latents")


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"num_workers": -1}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="must be"):
        CacheOptions(**setting)


def test_foreign_files_are_not_opened(filled):
    dataset = listing(filled)
    path = filled / "flux2_cache" / f"latents-{'1' * 32}.safetensors"
    save_file({"latents": torch.zeros(128, 4, 4)}, path)
    assert len(opened(dataset).items) == 3 and path.exists()
