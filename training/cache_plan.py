"""Which files a dataset needs in its caches, named by all that decides their content.

A name is a digest of the picture's bytes, its preparation and the encoder's identity (or of the caption and the
encoder's): whatever changes asks for another file, and two pictures of one name never share one.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from ..flux2_core.autoencoder import PIXELS_PER_LATENT
from ..flux2_core.files import write_safetensors
from ..flux2_core.tensor_source import TORCH_DTYPES, read_header
from .buckets import control_size, fit_control, fit_mask, fit_target
from .dataset import Dataset, DatasetItem
from .dataset_config import SubsetConfig
from .fingerprint import AutoencoderIdentity, TextEncoderIdentity

PREPARATION_VERSION = 1
"""Goes up when a picture, a mask or a caption is prepared differently than before."""
KEY_ENTRY, CHECKSUM_ENTRY = "flux2_kit.cache_key", "flux2_kit.crc32"
"""Entries of a file's metadata."""
MAX_HEADER_BYTES = 4096
"""A cached file is at most that much larger than its tensor."""

Kind = Literal["latents", "mask", "text"]


@dataclass(frozen=True, kw_only=True)
class CacheFile:
    """One tensor in a file of its own."""

    kind: Kind
    """The tensor's name, and the beginning of the file's."""
    key: str
    """32 hexadecimal digits."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The file's."""
        return f"{self.kind}-{self.key}.safetensors"

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Fit(Protocol):
    def __call__(self, image: Image.Image) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class PictureFile(CacheFile):
    """Latents of a picture ``[128, h, w]``, or weights of a mask ``[h, w]``."""

    source: Path
    fit: _Fit = field(compare=False, repr=False)
    mirrored: bool = False
    """Left to right, after fitting."""


@dataclass(frozen=True, kw_only=True)
class TextFile(CacheFile):
    """The embedding of a caption, ``[max_tokens, context_dim]``."""

    caption: str


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """What is encoded for one item."""

    latents: PictureFile
    references: tuple[PictureFile, ...]
    mask: PictureFile | None
    mirrored_latents: PictureFile | None
    """None where the subset does not flip. A mirrored mask is the mask mirrored."""
    mirrored_references: tuple[PictureFile, ...]

    @property
    def all(self) -> list[PictureFile]:
        """All of them."""
        files = (self.latents, *self.references, self.mask, self.mirrored_latents, *self.mirrored_references)
        return [file for file in files if file is not None]


def sources(item: DatasetItem) -> list[Path]:
    """The files on disk that an item is made of, captions left out."""
    return [item.image, *item.references, *([] if item.mask is None else [item.mask])]


def plan_pictures(
    item: DatasetItem, subset: SubsetConfig, autoencoder: AutoencoderIdentity, hashes: Mapping[Path, str]
) -> PictureFiles:
    """The files of one item.

    Args:
        hashes: sha256 of every file of `sources`.
    """
    height, width = _latents_size(item.bucket)
    cover = {"rule": "cover", "size": item.bucket}

    def latents(source: Path, preparation: dict[str, Any], fit: _Fit, shape: tuple[int, ...], mirrored: bool):
        key = _key("latents", hashes[source], preparation | {"mirrored": mirrored}, autoencoder.parts)
        return PictureFile(
            kind="latents", key=key, shape=shape, dtype=torch.float32, source=source, fit=fit, mirrored=mirrored
        )

    def target(mirrored: bool) -> PictureFile:
        shape = (autoencoder.channels, height, width)
        return latents(item.image, cover, partial(fit_target, bucket=item.bucket), shape, mirrored)

    def references(mirrored: bool) -> tuple[PictureFile, ...]:
        preparation = _reference_preparation(item, subset, autoencoder.reference_sides)
        settings: dict[str, Any] = {
            "subset": subset,
            "bucket": item.bucket,
            "num_references": len(item.references),
            "reference_sides": autoencoder.reference_sides,
        }
        files = []
        for source, size in zip(item.references, item.reference_sizes, strict=True):
            shape = (autoencoder.channels, *_latents_size(control_size(size, **settings)))
            files.append(latents(source, preparation, partial(fit_control, **settings), shape, mirrored))
        return tuple(files)

    mask = None
    if item.mask is not None:
        key = _key("mask", hashes[item.mask], cover, {})
        fit = partial(fit_mask, bucket=item.bucket)
        mask = PictureFile(kind="mask", key=key, shape=(height, width), dtype=torch.float32, source=item.mask, fit=fit)
    return PictureFiles(
        latents=target(False),
        references=references(False),
        mask=mask,
        mirrored_latents=target(True) if subset.flip else None,
        mirrored_references=references(True) if subset.flip else (),
    )


def plan_text(caption: str, text_encoder: TextEncoderIdentity) -> TextFile:
    """The file of one caption."""
    key = _key("text", hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest(), {}, text_encoder.parts)
    shape = (text_encoder.max_tokens, text_encoder.context_dim)
    return TextFile(kind="text", key=key, shape=shape, dtype=text_encoder.torch_dtype, caption=caption)


def subset_of(dataset: Dataset, item: DatasetItem) -> SubsetConfig:
    """The settings of an item."""
    return dataset.config.subsets[item.subset]


def find(folder: Path, file: CacheFile) -> tuple[int, str] | None:
    """Where the tensor begins in a cached file, and its checksum, by the header; None where there is no such file.

    A link is none: who may write into a cache may lead it to anywhere.

    Raises:
        ValueError: the file is cut off, holds something else, or cannot be read.
    """
    path = folder / file.name
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    if not stat.S_ISREG(status.st_mode):
        return None
    if status.st_size > file.num_bytes + MAX_HEADER_BYTES:
        raise _unusable(path, f"it has {status.st_size} bytes for a tensor of {file.num_bytes}")
    try:
        table, metadata = read_header(path)
    except ValueError as error:
        raise _unusable(path, f"it is cut off or damaged ({error})") from error
    entry = table.get(file.kind)
    if entry is None or len(table) != 1 or metadata.get(KEY_ENTRY) != file.key or CHECKSUM_ENTRY not in metadata:
        raise _unusable(path, "it holds something else than its name says")
    if entry.shape != file.shape or TORCH_DTYPES.get(entry.dtype) != file.dtype:
        raise _unusable(path, f"it holds {entry.dtype} of shape {list(entry.shape)}, not what its name says")
    return entry.begin, metadata[CHECKSUM_ENTRY]


def is_whole(folder: Path, file: CacheFile) -> bool:
    """Whether a file is there, right, and not cut off."""
    try:
        return find(folder, file) is not None
    except ValueError:
        return False


def read_cached(folder: Path, file: CacheFile) -> torch.Tensor:
    """The tensor of a cached file; it can be used in training even when read inside ``torch.inference_mode``.

    Raises:
        ValueError: the file was deleted, cut off or replaced since the cache was opened, its content is not what was
            written, or it holds values that are not finite.
    """
    path = folder / file.name
    found = find(folder, file)
    if found is None:
        raise ValueError(f"{path} was deleted while it was in use; run `flux2 cache` again")
    begin, written = found
    with torch.inference_mode(False):
        data = torch.empty(file.num_bytes, dtype=torch.uint8)
        try:
            with path.open("rb") as opened:
                opened.seek(begin)
                opened.readinto(data.numpy().data)
        except OSError as error:
            raise _unusable(path, str(error.strerror)) from error
        tensor = data.view(file.dtype).reshape(file.shape)
        if checksum(tensor) != written:
            raise _unusable(path, "its content is not what was written")
        if not is_finite(tensor):
            raise _unusable(path, "it holds values that are not finite")
    return tensor


def write_cached(folder: Path, file: CacheFile, tensor: torch.Tensor) -> None:
    """Writes a cached file, whole or not at all."""
    tensor = tensor.to(file.dtype).contiguous()
    metadata = {KEY_ENTRY: file.key, CHECKSUM_ENTRY: checksum(tensor)}
    write_safetensors(folder / file.name, {file.kind: tensor}, metadata)


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of the bytes of a contiguous tensor on the CPU: it finds what a disk or a copy has damaged."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or no number; ten times as fast as asking for each."""
    return bool(tensor.abs().max().isfinite())


def _unusable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no whole file of a cache: {reason}. Delete it and run `flux2 cache` again")


def _latents_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in latents of a picture of (width, height) px."""
    return size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT


def _reference_preparation(item: DatasetItem, subset: SubsetConfig, reference_sides: tuple[int, int]) -> dict[str, Any]:
    """What decides how `fit_control` brings a reference to its size."""
    if subset.control_fit == "target":
        return {"rule": "cover", "size": item.bucket}
    if subset.control_fit == "area":
        width, height = subset.control_resolution or subset.resolution
        return {"rule": "area", "pixels": width * height}
    if subset.control_fit == "original":
        sides = subset.control_resolution
        return {"rule": "shrink", "max_pixels": sides and sides[0] * sides[1]}
    assert subset.control_fit == "inference", subset.control_fit
    return {"rule": "shrink", "max_pixels": reference_sides[len(item.references) > 1] ** 2}


def _key(kind: Kind, content: str, preparation: Mapping[str, Any], encoder: Mapping[str, Any]) -> str:
    parts = {"kind": kind, "version": PREPARATION_VERSION, "content": content}
    parts |= {"preparation": dict(preparation), "encoder": dict(encoder)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
