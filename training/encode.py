"""Fills the caches of a dataset: pictures to latents, captions to text embeddings.

What is there, right and whole is kept, and every file is written whole or not at all: a run that was killed goes on
where it was, and any number of processes may work on one folder.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.checkpoint import load_autoencoder
from ..flux2_core.command_errors import is_out_of_memory
from ..flux2_core.files import write_safetensors
from ..flux2_core.images import MAX_FILE_PIXELS, image_to_tensor, load_image
from ..flux2_core.sampling import Stopped
from ..flux2_core.text_encoder import load_text_encoder
from ..flux2_core.variants import TextEncoderConfig
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
    KEY_ENTRY,
    CacheFile,
    PictureFile,
    TextFile,
    is_whole,
    plan_pictures,
    plan_text,
    sources,
    subset_of,
)
from .dataset import Dataset
from .fingerprint import AutoencoderIdentity, TextEncoderIdentity, identify_autoencoder, identify_text_encoder

logger = logging.getLogger(__name__)

MAX_WORKERS = 8
"""Threads that read pictures where nothing else is asked for: as many as the CPU has, up to this."""
MAX_BATCH = 16
"""Pictures in a batch on a GPU where nothing else is asked for; more are no faster."""
USED_MEMORY = 0.8
"""Share of the GPU's free memory that a batch may take."""
LIVE_ACTIVATIONS = 8
"""Tensors of the first level's size that the autoencoder's encoder has in memory at a time, at most."""

FileT = TypeVar("FileT", bound=CacheFile)
RowT = TypeVar("RowT")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a cache is filled; nothing of it changes what is in the files but for the last bits."""

    device: torch.device | str = "cpu"
    """Where the encoder runs."""
    batch_size: int | None = None
    """None: pictures by free memory on a GPU and one by one on a CPU; captions one by one, which gives the same bits as
    encoding at run time."""
    num_workers: int | None = None
    """Threads that read pictures; None: by the number of CPU cores."""
    skip_existing: bool = True
    """False encodes everything again."""
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
    manifests = []
    for subset, items in group_subsets(dataset, "latents"):
        folder, listed = cache_folder(subset), []
        for item in items:
            files = plan_pictures(item, subset_of(dataset, item), identity, digests).all
            listed.append((portable(item.image, folder), tuple(file.name for file in files)))
            wanted += [(folder, file) for file in files]
        path = manifest_path(subset, "latents", identity)
        pictures = {portable(path, folder): hashes[path] for item in items for path in sources(item)}
        settings = manifest_settings(subset, "latents")
        manifest = Manifest(what="latents", encoder=identity, settings=settings, items=tuple(listed), pictures=pictures)
        manifests.append((path, manifest))
    _write_manifests(manifests, options)
    if options.barrier is not None and not options.process_index:
        options.barrier()
    work = _share_work(wanted, options)
    missing = _missing(work, options)
    encoder = _LatentsEncoder(Path(autoencoder_path), identity, options)
    num_encoded = _encode_pictures(missing, encoder, options)
    if options.barrier is not None:
        options.barrier()
    return CacheReport(
        what="latents",
        num_encoded=num_encoded,
        num_kept=len(work) - num_encoded,
        manifests=tuple(path for path, _ in manifests),
    )


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
    manifests = []
    for subset, items in group_subsets(dataset, "text"):
        folder = cache_folder(subset)
        texts = [("", ("",)), *((portable(item.image, folder), item.captions) for item in items)]
        listed = []
        for picture, captions in texts:
            files = [plan_text(caption, identity) for caption in captions]
            listed.append((picture, tuple(file.name for file in files)))
            wanted += [(folder, file) for file in files]
        settings = manifest_settings(subset, "text")
        manifest = Manifest(what="text", encoder=identity, settings=settings, items=tuple(listed))
        manifests.append((manifest_path(subset, "text", identity), manifest))
    _write_manifests(manifests, options)
    work = _share_work(wanted, options)
    missing = _missing(work, options)
    num_encoded, num_cut = _encode_texts(missing, Path(text_encoder_path), config, identity, tokenizer, options)
    if options.barrier is not None:
        options.barrier()
    return CacheReport(
        what="text",
        num_encoded=num_encoded,
        num_kept=len(work) - num_encoded,
        manifests=tuple(path for path, _ in manifests),
        num_cut=num_cut,
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
    return hash_pictures(
        paths,
        known_hashes(read_manifests(dataset)),
        num_workers=options.threads,
        on_progress=options.on_progress,
        should_stop=options.should_stop,
    )


def _write_manifests(manifests: Iterable[tuple[Path, Manifest]], options: CacheOptions) -> None:
    if options.process_index:
        return
    for path, manifest in manifests:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(path, manifest)


def _share_work(wanted: Iterable[tuple[Path, FileT]], options: CacheOptions) -> list[_Work[FileT]]:
    """Every file once, those of this process.

    All files are dealt out, not only the missing ones: what is missing may look different to each process.
    """
    files: dict[str, FileT] = {}
    folders: dict[str, dict[Path, None]] = {}
    for folder, file in wanted:
        files.setdefault(file.name, file)
        folders.setdefault(file.name, {})[folder] = None
    work = [_Work(file=files[name], folders=tuple(folders[name])) for name in sorted(files)]
    return work[options.process_index :: options.num_processes]


def _missing(work: list[_Work[FileT]], options: CacheOptions) -> list[_Work[FileT]]:
    """What has to be encoded, files of one shape together."""
    if options.skip_existing:
        with ThreadPoolExecutor(options.threads) as pool:
            done = list(pool.map(_Work.is_done, work))
        work = [one for one, is_done in zip(work, done, strict=True) if not is_done]
    return sorted(work, key=lambda one: one.file.shape, reverse=True)  # the largest first: memory is told at the start


def _write(work: _Work[FileT], tensor: Tensor) -> None:
    file = work.file
    assert tuple(tensor.shape) == file.shape, (tensor.shape, file)
    if not torch.isfinite(tensor).all():
        what = repr(file.caption[:80]) if isinstance(file, TextFile) else str(getattr(file, "source", file.name))
        raise ValueError(f"the encoder gives values that are not finite for {what}; let it compute in bf16 or fp32")
    for folder in work.folders:
        with _writing(folder / file.name):
            folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(folder / file.name, {file.kind: tensor.to(file.dtype)}, {KEY_ENTRY: file.key})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ValueError(
            f"{path} cannot be written ({reason}); make room there, or set cache_directory to a folder of yours. What "
            "was cached so far is kept"
        ) from error


# Pictures


def _encode_pictures(missing: list[_Work[PictureFile]], encoder: _LatentsEncoder, options: CacheOptions) -> int:
    """Writes masks as they come and latents in batches of one size; returns how many files were made."""
    num_done = num_encoded = 0
    batch: list[tuple[_Work[PictureFile], Tensor]] = []

    def flush() -> None:
        nonlocal num_done, num_encoded
        if options.should_stop is not None and options.should_stop():
            raise Stopped(f"stopped after {num_done} of {len(missing)} pictures; the rest is encoded next time")
        is_mask = batch[0][0].file.kind == "mask"
        tensors = [tensor for _, tensor in batch]
        for (work, _), tensor in zip(batch, tensors if is_mask else encoder.encode(tensors), strict=True):
            _write(work, tensor)
        num_encoded += len(batch)
        num_done += len(batch)
        batch.clear()
        if options.on_progress is not None:
            options.on_progress("pictures encoded", num_done, len(missing))

    for work, tensor in _read_ahead(missing, options):
        if tensor is None:
            num_done += 1  # another process has done it meanwhile
            continue
        if batch and batch[0][1].shape != tensor.shape:
            flush()
        batch.append((work, tensor))
        if work.file.kind == "mask" or len(batch) >= encoder.batch_size(tensor):
            flush()
    if batch:
        flush()
    return num_encoded


def _read_ahead(
    missing: list[_Work[PictureFile]], options: CacheOptions
) -> Iterator[tuple[_Work[PictureFile], Tensor | None]]:
    """Pictures in their order, read in threads while earlier ones are encoded; None: is there by now."""

    def read(work: _Work[PictureFile]) -> Tensor | None:
        return None if options.skip_existing and work.is_done() else prepare_picture(work.file)

    pool = ThreadPoolExecutor(options.threads)
    try:
        pending: deque[tuple[_Work[PictureFile], Future[Tensor | None]]] = deque()
        for work in missing:
            pending.append((work, pool.submit(read, work)))
            if len(pending) > 2 * options.threads:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_picture(file: PictureFile) -> Tensor:
    """A picture fitted for the autoencoder, ``[1, 3, H, W]`` in -1..1, or a mask's weights ``[h, w]``, fp32.

    Raises:
        ValueError: it cannot be read, or changed since the dataset was listed.
    """
    image = _load_mask(file.source) if file.kind == "mask" else load_image(file.source)
    try:
        fitted = file.fit(image)
    except ValueError as error:
        raise ValueError(f"{file.source}: {error}") from error
    if file.mirrored:
        fitted = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = (side * PIXELS_PER_LATENT for side in file.shape[-2:])
    if fitted.size != (width, height):
        raise ValueError(f"{file.source} changed while the dataset was cached; run the command again")
    if file.kind != "mask":
        return image_to_tensor(fitted)
    grey = image_to_tensor(fitted)[:, :1] / 2 + 0.5
    return F.avg_pool2d(grey, PIXELS_PER_LATENT)[0, 0]


def _load_mask(path: Path) -> Image.Image:
    """A mask as its file has it: transparency means something else than in a picture."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_FILE_PIXELS:
                raise ValueError(f"{path} claims {image.width}x{image.height} px; at most {MAX_FILE_PIXELS} are read")
            image.load()
            return image.copy()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a mask ({error}); give a whole PNG, JPEG or WebP file") from error


class _LatentsEncoder:
    """An autoencoder that is loaded when first used, and finds out how much it can take at a time."""

    def __init__(self, path: Path, identity: AutoencoderIdentity, options: CacheOptions) -> None:
        self.path = path
        self.identity = identity
        self.device = torch.device(options.device)
        self.wanted_batch = options.batch_size
        self.max_pixels = math.inf
        """Of a batch."""
        self.tile_from = math.inf
        """Pixels of a picture from which it is encoded in tiles."""
        self._autoencoder: Flux2Autoencoder | None = None

    @property
    def autoencoder(self) -> Flux2Autoencoder:
        if self._autoencoder is None:
            self._autoencoder = load_autoencoder(self.path, dtype=self.identity.torch_dtype, device=self.device)
            if self.wanted_batch is None and self.device.type == "cuda":
                width = self._autoencoder.config.encoder_widths[0]
                bytes_per_pixel = LIVE_ACTIVATIONS * width * self.identity.torch_dtype.itemsize
                self.max_pixels = USED_MEMORY * torch.cuda.mem_get_info(self.device)[0] / bytes_per_pixel
        return self._autoencoder

    def batch_size(self, picture: Tensor) -> int:
        """How many pictures of this size are encoded at a time."""
        limit = self.wanted_batch or (MAX_BATCH if self.device.type == "cuda" else 1)
        if self.device.type == "cuda":
            assert self.autoencoder is not None
        pixels = picture.shape[-2] * picture.shape[-1]
        return max(1, int(min(self.max_pixels / pixels, limit)))

    def encode(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Latents ``[128, h, w]`` of pictures of one size, on the CPU."""
        latents: list[Tensor] = []
        while len(latents) < len(pictures):
            count = self.batch_size(pictures[0])
            chunk = torch.cat(list(pictures[len(latents) : len(latents) + count]))
            pixels = chunk.shape[-2] * chunk.shape[-1]
            result = _unless_out_of_memory(lambda chunk=chunk: self._encode(chunk))
            if result is not None:
                latents += list(result)
            elif len(chunk) > 1:
                self.max_pixels = pixels * (len(chunk) // 2)
            elif pixels < self.tile_from:
                self.tile_from = pixels
            else:
                raise ValueError(
                    f"a picture of {chunk.shape[-1]}x{chunk.shape[-2]} px does not fit into memory, in tiles neither; "
                    "take --vae_dtype bf16 or --device cpu, or a smaller resolution"
                )
        return latents

    def _encode(self, chunk: Tensor) -> Tensor:
        tiled = chunk.shape[-2] * chunk.shape[-1] >= self.tile_from
        with torch.inference_mode():
            images = chunk.to(self.device)
            return (self.autoencoder.encode_tiled(images) if tiled else self.autoencoder.encode(images)).cpu()


def _unless_out_of_memory(compute: Callable[[], Tensor]) -> Tensor | None:
    """What `compute` gives, or None where memory was too small for it; memory is freed then."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the error's traceback kept the tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


# Captions


def _encode_texts(
    missing: list[_Work[TextFile]],
    path: Path,
    config: TextEncoderConfig,
    identity: TextEncoderIdentity,
    tokenizer: str | Path | None,
    options: CacheOptions,
) -> tuple[int, int]:
    """Returns how many files were made, and how many captions lost tokens."""
    if not missing:
        return 0, 0
    encoder = load_text_encoder(path, config, tokenizer=tokenizer, dtype=identity.torch_dtype, device=options.device)
    num_done = num_encoded = 0
    cut: list[str] = []
    count = options.batch_size or 1
    while num_done < len(missing):
        if options.should_stop is not None and options.should_stop():
            raise Stopped(f"stopped after {num_done} of {len(missing)} captions; the rest is encoded next time")
        taken = missing[num_done : num_done + count]
        batch = [work for work in taken if not (options.skip_existing and work.is_done())]
        if batch:
            encoding = None

            def encode(batch: list[_Work[TextFile]] = batch) -> Tensor:
                nonlocal encoding
                encoding = encoder.encode([work.file.caption for work in batch])
                return encoding.embeddings.cpu()

            embeddings = _unless_out_of_memory(encode)
            if embeddings is None and count == 1:
                raise ValueError("one caption does not fit into memory; take --text_encoder_dtype bf16 or --device cpu")
            if embeddings is None:
                count = max(1, len(batch) // 2)
                continue
            assert encoding is not None
            for work, embedding, num_cut in zip(batch, embeddings, encoding.num_cut, strict=True):
                _write(work, embedding)
                cut += [work.file.caption] if num_cut else []
        num_encoded += len(batch)
        num_done += len(taken)
        if options.on_progress is not None:
            options.on_progress("captions encoded", num_done, len(missing))
    if cut:
        logger.warning(
            "%d captions are longer than the %d tokens that the model takes; their ends were cut: %r ...",
            len(cut),
            config.max_tokens,
            cut[0][:80],
        )
    return num_encoded, len(cut)
