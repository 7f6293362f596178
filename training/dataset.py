"""What is trained on: settings of a dataset, and the list of its pictures.

Settings come from musubi-tuner's TOML or JSON schema, DiffSynth-Studio's metadata tables, or a bare folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Pictures from one place, all treated alike: an entry of ``[[datasets]]``."""

    image_directory: Path | None = None
    """Pictures with captions in files of the same stem."""
    image_jsonl_file: Path | None = None
    """One JSON object a line: image_path, caption, control_path or control_path_0, control_path_1, ..."""
    metadata_file: Path | None = None
    """CSV, JSON or JSONL with the columns image, prompt, edit_image; paths are relative to it."""
    cache_directory: Path | None = None
    """None: a folder `flux2_cache` beside the pictures."""
    control_directory: Path | None = None
    """References of a picture: files of the same stem, or stem_0, stem_1, ..."""
    mask_directory: Path | None = None
    """Loss masks: files of the same stem, white is trained and black is not."""
    caption_extension: str = ".txt"
    resolution: tuple[int, int] = (960, 544)
    """Width and height in pixels; with buckets only the area counts."""
    batch_size: int = 1
    num_repeats: int = 1
    """How often each picture comes in an epoch."""
    enable_bucket: bool = False
    """Pictures keep about their aspect: each goes to the bucket of the nearest one."""
    bucket_no_upscale: bool = False
    """Pictures smaller than the bucket keep their size, but for the crop to multiples of 16."""
    control_fit: str = "inference"
    """How references are fitted: "inference" (as when generating), "target" (to the picture's bucket), "original"
    (only cropped to 16), "area" (to the area of control_resolution)."""
    control_resolution: tuple[int, int] | None = None
    caption_dropout: float = 0.0
    """Share of steps in which a picture is trained with the empty caption."""
    shuffle_caption: bool = False
    """Parts of the caption come in another order each time."""
    caption_separator: str = ","
    keep_parts: int = 0
    """Parts at the beginning that keep their place."""
    num_caption_orders: int = 8
    """Orders that are cached for each caption."""
    trigger_word: str | None = None
    """Put in front of every caption that does not have it."""
    flip: bool = False
    """Half of the time the picture, its references and its mask are mirrored left to right."""
    validation_fraction: float = 0.0
    """Share of the pictures that is held out for the validation loss."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """All places pictures come from."""

    subsets: tuple[SubsetConfig, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetItem:
    """A picture with all that belongs to it."""

    subset: int
    """Index in `DatasetConfig.subsets`."""
    image: Path
    size: tuple[int, int]
    """Width and height in pixels, EXIF orientation applied."""
    bucket: tuple[int, int]
    """Width and height in pixels at which it is trained, multiples of 16."""
    captions: tuple[str, ...]
    """With trigger word; more than one where parts are shuffled, the first in the original order."""
    references: tuple[Path, ...] = ()
    mask: Path | None = None
    is_validation: bool = False


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Settings and pictures."""

    config: DatasetConfig
    items: tuple[DatasetItem, ...] = field(default_factory=tuple)
