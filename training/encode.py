"""Fills the caches of a dataset: pictures to latents, captions to text embeddings.

What is there, right and whole is kept, and every file is written whole or not at all: a run that was killed goes on
where it was, and any number of processes may work on one folder.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..flux2_core.sampling import Stopped
from ..flux2_core.variants import TextEncoderConfig
from .cache_encoders import CaptionEncoder, PictureEncoder, prepare_picture
from .cache_manifest import (
    Manifest,
    PictureHash,
    Progress,
    What,
    cache_folder,
    group_subsets,
    hash_pictures,
    known_hashes,
    manifest_path,
    manifest_settings,
    portable,
    read_manifests,
    write_manifest,
)
from .cache_plan import (
    CacheFile,
    PictureFile,
    TextFile,
    is_finite,
    is_whole,
    plan_pictures,
    plan_text,
    sources,
    subset_of,
    write_cached,
)
from .dataset import Dataset
from .dataset_tables import Problems
from .fingerprint import identify_autoencoder, identify_text_encoder
from .read_ahead import read_ahead

logger = logging.getLogger(__name__)

MAX_WORKERS = 8
"""Threads that read pictures where nothing else is asked for: as many as the CPU has, up to this."""
NUM_WRITERS = 4
"""Threads that write files: the disk is waited for beside the encoder."""
FileT = TypeVar("FileT", bound=CacheFile)
InputT = TypeVar("InputT")
InputT_contra = TypeVar("InputT_contra", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a cache is filled; nothing of it changes what is in the files but for the last bits."""

    device: torch.device | str = "cpu"
    """Where the encoder runs."""
    batch_size: int | None = None
    """None: pictures by free memory on CUDA, else one by one; captions one by one. One by one gives the same bits as
    encoding at run time; in fp32 on a CPU, latents of batches were seen to differ by 2e-6 (of values up to 5)."""
    num_workers: int | None = None
    """Threads that read pictures; None: by the number of CPU cores."""
    skip_existing: bool = True
    """False reads and encodes everything again; True takes a picture of the same size and time of change as known."""
    on_progress: Progress | None = None
    should_stop: Callable[[], bool] | None = None
    """Asked between batches."""
    process_index: int = 0
    """Processes that encode together share the work; the one of index 0 writes the manifests."""
    num_processes: int = 1
    barrier: Callable[[], object] | None = None
    """Waits for all processes."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must be 0 or more")
        assert 0 <= self.process_index < self.num_processes

    @property
    def threads(self) -> int:
        """That read pictures."""
        return max(1, min(os.cpu_count() or 1, MAX_WORKERS) if self.num_workers is None else self.num_workers)


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What a run did, in this process."""

    what: What
    num_encoded: int
    """Distinct files that were made."""
    num_kept: int
    """That were there, right and whole."""
    manifests: tuple[Path, ...]
    """Of the dataset with this encoder."""
    num_cut: int = 0
    """Captions that were encoded and lost tokens at the end."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the files are."""
        return tuple(dict.fromkeys(path.parent for path in self.manifests))


def cache_latents(
    dataset: Dataset,
    autoencoder_path: str | Path,
    options: CacheOptions | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> CacheReport:
    """Encodes pictures, references and masks of a dataset, as far as that is not done yet.

    Args:
        autoencoder_path: loaded only if something has to be encoded.
        options: how.
        dtype: the autoencoder computes in; None: that of its file, as at run time. Latents are stored as fp32.

    Raises:
        ValueError: a picture or the autoencoder cannot be read, the cache cannot be written, or memory is too small.
        Stopped: `options.should_stop` answered True; what was done is kept.
    """
    options = options or CacheOptions()
    identity = identify_autoencoder(autoencoder_path, dtype)
    if options.barrier is not None and options.process_index:
        options.barrier()  # the manifests of process 0 save the others from reading every picture
    hashes = _hash_sources(dataset, options)
    digests = {path: picture.sha256 for path, picture in hashes.items()}
    wanted: list[tuple[Path, PictureFile]] = []
    manifests: dict[Path, Manifest] = {}
    for subset, items in group_subsets(dataset, "latents"):
        folder, listed = cache_folder(subset), []
        for item in items:
            files = plan_pictures(item, subset_of(dataset, item), identity, digests).all
            listed.append((portable(item.image, folder), tuple(file.name for file in files)))
            wanted += [(folder, file) for file in files]
        manifests[manifest_path(subset, "latents", identity)] = Manifest(
            what="latents",
            encoder=identity,
            settings=manifest_settings(subset, "latents"),
            items=tuple(listed),
            pictures={portable(path, folder): hashes[path] for item in items for path in sources(item)},
        )
    _write_manifests(manifests, options)
    if options.barrier is not None and not options.process_index:
        options.barrier()
    encoder = PictureEncoder(autoencoder_path, identity, device=options.device, batch_size=options.batch_size)

    def prepare(file: PictureFile) -> Tensor:
        picture = prepare_picture(file)
        # Asked for afterwards: the name of the cached file tells what the picture held when its manifest was made.
        if not hashes[file.source].is_of(file.source):
            raise ValueError(f"{file.source} changed while the dataset was cached; run the command again")
        return picture

    num_encoded, num_kept = _fill(wanted, prepare, encoder, options, "pictures")
    return CacheReport(what="latents", num_encoded=num_encoded, num_kept=num_kept, manifests=tuple(manifests))


def cache_text(
    dataset: Dataset,
    text_encoder_path: str | Path,
    config: TextEncoderConfig,
    options: CacheOptions | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> CacheReport:
    """Encodes the captions of a dataset and the empty caption, as far as that is not done yet.

    Args:
        text_encoder_path: loaded only if something has to be encoded.
        config: of the variant.
        options: how.
        tokenizer: as in `load_text_encoder`.
        dtype: the encoder computes in and embeddings are stored in; None: that of its file, as at run time.

    Raises:
        ValueError: the text encoder cannot be read or is of another model, or the cache cannot be written.
        Stopped: `options.should_stop` answered True; what was done is kept.
    """
    options = options or CacheOptions()
    identity = identify_text_encoder(text_encoder_path, config, tokenizer=tokenizer, dtype=dtype)
    wanted: list[tuple[Path, TextFile]] = []
    manifests: dict[Path, Manifest] = {}
    for subset, items in group_subsets(dataset, "text"):
        folder, listed = cache_folder(subset), []
        for picture, captions in [("", ("",)), *((portable(item.image, folder), item.captions) for item in items)]:
            files = [plan_text(caption, identity) for caption in captions]
            listed.append((picture, tuple(file.name for file in files)))
            wanted += [(folder, file) for file in files]
        manifests[manifest_path(subset, "text", identity)] = Manifest(
            what="text", encoder=identity, settings=manifest_settings(subset, "text"), items=tuple(listed)
        )
    _write_manifests(manifests, options)
    encoder = CaptionEncoder(
        text_encoder_path,
        config,
        identity,
        device=options.device,
        batch_size=options.batch_size,
        tokenizer=tokenizer,
    )
    num_encoded, num_kept = _fill(wanted, lambda file: file.caption, encoder, options, "captions")
    if encoder.cut:
        logger.warning(
            "%d captions are longer than the %d tokens that the model takes; their ends were cut: %r ...",
            len(encoder.cut),
            config.max_tokens,
            encoder.cut[0][:80],
        )
    return CacheReport(
        what="text",
        num_encoded=num_encoded,
        num_kept=num_kept,
        manifests=tuple(manifests),
        num_cut=len(encoder.cut),
    )


@dataclass(frozen=True, kw_only=True)
class _Work(Generic[FileT]):
    """One file, and every folder it belongs into: subsets with caches of their own may share pictures."""

    file: FileT
    folders: tuple[Path, ...]

    def is_done(self) -> bool:
        return all(is_whole(folder, self.file) for folder in self.folders)


def _hash_sources(dataset: Dataset, options: CacheOptions) -> dict[Path, PictureHash]:
    paths = [path for item in dataset.items for path in sources(item)]
    believes_manifests = options.skip_existing or options.process_index  # those that process 0 has just written
    return hash_pictures(
        paths,
        known_hashes(read_manifests(dataset)) if believes_manifests else {},
        num_workers=options.threads,
        on_progress=options.on_progress,
        should_stop=options.should_stop,
    )


def _write_manifests(manifests: Mapping[Path, Manifest], options: CacheOptions) -> None:
    if options.process_index:
        return
    for path, manifest in manifests.items():
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(path, manifest)


class _Encoder(Protocol[InputT_contra]):
    """`cache_encoders.PictureEncoder` and `CaptionEncoder`."""

    def batch_size(self, _input: InputT_contra, /) -> int: ...
    def encode(self, _inputs: Sequence[InputT_contra], /) -> list[Tensor]: ...


def _fill(
    wanted: Iterable[tuple[Path, FileT]],
    prepare: Callable[[FileT], InputT],
    encoder: _Encoder[InputT],
    options: CacheOptions,
    what: str,
) -> tuple[int, int]:
    """Does this process's share of the work, each file once; returns how many files were made and how many kept.

    All files are dealt out, not only the missing ones: what is missing may look different to each process.
    """
    files: dict[str, FileT] = {}
    folders: dict[str, dict[Path, None]] = {}
    for folder, file in wanted:
        files.setdefault(file.name, file)
        folders.setdefault(file.name, {})[folder] = None
    work = [_Work(file=files[name], folders=tuple(folders[name])) for name in sorted(files)]
    work = work[options.process_index :: options.num_processes]
    missing = work
    if options.skip_existing:
        missing = [one for one, is_done in read_ahead(_Work.is_done, work, options.threads) if not is_done]
    # Files of one shape together, the largest first: memory that is too small is found at the start.
    missing = sorted(missing, key=lambda one: one.file.shape, reverse=True)
    num_encoded, problems = _encode(missing, prepare, encoder, options, what)
    if options.barrier is not None:
        options.barrier()
    problems.raise_if_any(f"some {what} cannot be encoded; the others are cached")
    return num_encoded, len(work) - num_encoded


def _write(work_and_tensor: tuple[_Work[FileT], Tensor]) -> None:
    work, tensor = work_and_tensor
    file = work.file
    assert tuple(tensor.shape) == file.shape, (tensor.shape, file)
    if not is_finite(tensor):
        what = repr(file.caption[:80]) if isinstance(file, TextFile) else str(getattr(file, "source", file.name))
        raise ValueError(f"the encoder gives values that are not finite for {what}; let it compute in bf16 or fp32")
    for folder in work.folders:
        with _writing(folder / file.name):
            folder.mkdir(parents=True, exist_ok=True)
            write_cached(folder, file, tensor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}); {advice}, or set cache_directory to a folder of "
            "yours. What was cached so far is kept"
        ) from error


def _encode(
    missing: Sequence[_Work[FileT]],
    prepare: Callable[[FileT], InputT],
    encoder: _Encoder[InputT],
    options: CacheOptions,
    what: str,
) -> tuple[int, Problems]:
    """Makes what is missing, in batches of one shape, while what comes next is prepared and what is ready is written.

    Returns how many files were made, and why others cannot be.

    Raises:
        Stopped: `options.should_stop` answered True.
    """
    num_done = num_encoded = 0
    problems = Problems()

    def tell() -> None:
        if options.on_progress is not None and missing:
            options.on_progress(f"{what} encoded", num_done, len(missing))

    def prepare_unless_done(work: _Work[FileT]) -> InputT | ValueError | None:
        try:
            return None if options.skip_existing and work.is_done() else prepare(work.file)
        except ValueError as error:
            return error

    def prepared() -> Generator[tuple[_Work[FileT], InputT], None, None]:
        nonlocal num_done
        with contextlib.closing(read_ahead(prepare_unless_done, missing, options.threads)) as inputs:
            for work, input_ in inputs:
                if isinstance(input_, ValueError):
                    problems.add(str(input_))
                if input_ is None or isinstance(input_, ValueError):  # None: another process has done it meanwhile
                    num_done += 1
                else:
                    yield work, input_

    def encoded() -> Generator[tuple[_Work[FileT], Tensor], None, None]:
        nonlocal num_done, num_encoded
        tell()  # a bar is to be seen while the encoder is loaded
        with contextlib.closing(prepared()) as inputs:
            for batch in _batches(inputs, encoder):
                if options.should_stop is not None and options.should_stop():
                    return
                tensors = encoder.encode([input_ for _, input_ in batch])
                yield from zip([work for work, _ in batch], tensors, strict=True)
                num_done, num_encoded = num_done + len(batch), num_encoded + len(batch)
                tell()

    with (
        contextlib.closing(encoded()) as tensors,
        contextlib.closing(read_ahead(_write, tensors, NUM_WRITERS)) as written,
    ):
        for _ in written:
            pass
    if num_done < len(missing):
        raise Stopped(f"stopped after {num_done} of {len(missing)} {what}; the rest is encoded next time")
    return num_encoded, problems


def _batches(
    inputs: Iterable[tuple[_Work[FileT], InputT]], encoder: _Encoder[InputT]
) -> Iterator[list[tuple[_Work[FileT], InputT]]]:
    """Neighbours of one shape together, as many as the encoder takes."""
    batch: list[tuple[_Work[FileT], InputT]] = []
    for work, input_ in inputs:
        if batch and (batch[0][0].file.kind, batch[0][0].file.shape) != (work.file.kind, work.file.shape):
            yield batch
            batch = []
        batch.append((work, input_))
        if len(batch) >= encoder.batch_size(input_):
            yield batch
            batch = []
    if batch:
        yield batch
