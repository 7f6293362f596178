"""Settings of a dataset, and how they are read.

They come from musubi-tuner's TOML or JSON schema (github.com/kohya-ss/musubi-tuner, ``docs/dataset_config.md``), from
DiffSynth-Studio's metadata tables, or from a bare folder.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..flux2_core.autoencoder import PIXELS_PER_LATENT
from ..flux2_core.files import MAX_JSON_BYTES, read_limited
from ..flux2_core.images import MIN_SIDE
from .dataset_paths import check_inside, resolve_named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

logger = logging.getLogger(__name__)

FOLDER_SIDE = 1024
"""Side in pixels of the square whose area pictures of a bare folder or table are trained at."""
MAX_SIDE = 8192
"""Largest side of a resolution, in pixels."""
MAX_BATCH_SIZE = 4096
MAX_CAPTION_ORDERS = 64
MAX_REPEATS = 1_000_000
MAX_SUBSETS = 1000
CONTROL_FITS = ("inference", "target", "original", "area")
CACHE_FOLDER = "flux2_cache"


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Pictures from one place, all treated alike: an entry of ``[[datasets]]``.

    Exactly one of ``image_directory``, ``image_jsonl_file`` and ``metadata_file`` is set.

    Raises:
        ValueError: a setting is out of its range, or two of them contradict each other.
    """

    image_directory: Path | None = None
    """Pictures with captions in files of the same stem; folders inside it are not searched."""
    image_jsonl_file: Path | None = None
    """One JSON object a line: image_path, caption, control_path or control_path_0, control_path_1, ..., mask_path."""
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
    (only cropped to 16; scaled down to the area of control_resolution, where that is given), "area" (up or down to the
    area of control_resolution, or of resolution where that is not given, at their own aspect)."""
    control_resolution: tuple[int, int] | None = None
    """Width and height in pixels; only the area counts."""
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
    """Share of the pictures that is held out for the validation loss; at least one picture where it is above 0."""

    def __post_init__(self) -> None:
        given = [name for name in SOURCE_KEYS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(SOURCE_KEYS)} says where the pictures are; "
                f"got {' and '.join(given) or 'none'}"
            )
        _check_resolution("resolution", self.resolution)
        if self.control_resolution is not None:
            _check_resolution("control_resolution", self.control_resolution)
        _check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        _check_range("num_repeats", self.num_repeats, 1, MAX_REPEATS)
        _check_range("keep_parts", self.keep_parts, 0, 1000)
        _check_range("num_caption_orders", self.num_caption_orders, 1, MAX_CAPTION_ORDERS)
        _check_range("caption_dropout", self.caption_dropout, 0, 1)
        _check_range("validation_fraction", self.validation_fraction, 0, 0.9)
        if self.control_fit not in CONTROL_FITS:
            raise ValueError(f"control_fit is {self.control_fit!r}; allowed are {', '.join(CONTROL_FITS)}")
        if self.control_resolution is not None and self.control_fit not in ("original", "area"):
            raise ValueError(
                f"control_resolution is given, but control_fit {self.control_fit!r} does not use it; "
                'leave it out, or set control_fit to "area" or "original"'
            )
        if not self.caption_separator.strip():
            raise ValueError("caption_separator is blank; give the sign that stands between parts, such as ','")
        if self.trigger_word is not None and not self.trigger_word.strip():
            raise ValueError("trigger_word is blank; give a word, or leave the key out")
        if self.caption_extension in ("", ".") or "/" in self.caption_extension or "\\" in self.caption_extension:
            raise ValueError(f"caption_extension is {self.caption_extension!r}; give the end of a name, such as '.txt'")

    @property
    def place(self) -> Path:
        """The folder or table that the pictures come from."""
        place = self.image_directory or self.image_jsonl_file or self.metadata_file
        assert place is not None
        return place

    @property
    def folder(self) -> Path:
        """The folder that names of pictures are relative to."""
        return self.image_directory or self.place.parent

    @property
    def cache_folder(self) -> Path:
        """Where the caches of this subset go."""
        return self.cache_directory or self.folder / CACHE_FOLDER


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """All places pictures come from."""

    subsets: tuple[SubsetConfig, ...]
    roots: tuple[Path, ...] | None = None
    """Folders outside of which nothing is read; None: anywhere."""


SOURCE_KEYS = ("image_directory", "image_jsonl_file", "metadata_file")
PLACE_KEYS = (*SOURCE_KEYS, "control_directory", "mask_directory")
"""Paths that belong to one entry of ``[[datasets]]``."""
VIDEO_KEYS = (
    *("video_directory", "video_jsonl_file", "target_frames", "frame_extraction", "frame_stride", "frame_sample"),
    *("max_frames", "source_fps"),
)
FRAMEPACK_KEYS = ("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post")
DEPRECATED_KEYS = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}


def load_dataset_config(
    path: str | os.PathLike[str], *, roots: Sequence[Path] | None = None, side: int = FOLDER_SIDE
) -> DatasetConfig:
    """Reads the settings of a dataset.

    Args:
        path: a TOML or JSON file in musubi-tuner's schema; a metadata table (CSV, JSON or JSONL); or a folder of
            pictures with captions in .txt files. Relative paths in a file are taken from the file's folder, and from
            the working directory (as musubi-tuner does) where nothing lies there.
        roots: folders in which everything must lie that the path, the settings or a table name, once links are
            followed; None allows any place.
        side: for a table or folder, which have no settings: pictures go to buckets of the area of a square of this
            side, in pixels.

    Raises:
        ValueError: the file is missing, too large or damaged, has unknown or wrong settings, or names a path outside
            of ``roots``.
    """
    if not os.fspath(path):
        raise ValueError("no dataset is given; name a file or folder, '.' for the one you are in")
    path = Path(path)
    inside = None if roots is None else tuple(Path(root).resolve() for root in roots)
    check_inside(path, inside, "the dataset")
    subsets = _load_subsets(path, inside, side)
    for subset in subsets:
        check_inside(subset.cache_folder, inside, "the cache")
    return DatasetConfig(subsets=subsets, roots=inside)


def _load_subsets(path: Path, roots: tuple[Path, ...] | None, side: int) -> tuple[SubsetConfig, ...]:
    if path.is_dir():
        return (SubsetConfig(image_directory=path, resolution=(side, side), enable_bucket=True),)
    if not path.is_file():
        raise ValueError(f"no dataset at {path}; give a TOML or JSON file, a CSV, JSON or JSONL table, or a folder")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".jsonl") or (suffix == ".json" and _holds_list(path)):
        return (SubsetConfig(metadata_file=path, resolution=(side, side), enable_bucket=True),)
    if suffix not in (".toml", ".json"):
        raise ValueError(
            f"{path} is no dataset; give a .toml or .json with settings, a .csv, .json or .jsonl table, or a folder"
        )
    data = read_settings(path)
    try:
        return _parse(data, path.parent, roots)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _holds_list(path: Path) -> bool:
    """Whether a JSON file is a table rather than settings: told from its first sign, as tables may be large."""
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON file with settings.

    Raises:
        ValueError: it is too large, not valid, or no object.
    """
    content = read_limited(path, MAX_JSON_BYTES)
    try:
        text = content.decode("utf-8-sig")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path} is not valid {kind} ({error}); correct it there") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object, got {type(data).__name__}")
    return data


def _parse(data: Mapping[str, Any], base: Path, roots: tuple[Path, ...] | None) -> tuple[SubsetConfig, ...]:
    for key in data:
        if key not in ("general", "datasets"):
            hint = "put it into [general] or [[datasets]]" if key in READERS else _nearest(key, ("general", "datasets"))
            raise ValueError(f"unknown key {key!r} at the top; {hint}")
    general = data.get("general", {})
    entries = data.get("datasets")
    if not isinstance(general, dict):
        raise ValueError("general must be a table: [general]")
    if isinstance(entries, dict):
        raise ValueError("[datasets] is one table, and a list is needed; write [[datasets]]")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("there is no [[datasets]]; add one for each folder or table of pictures")
    if len(entries) > MAX_SUBSETS:
        raise ValueError(f"there are {len(entries)} [[datasets]]; at most {MAX_SUBSETS} are read")
    shared = _named(lambda: _read_keys(general, PLACE_KEYS), "[general]")
    return tuple(
        _named(lambda entry=entry: _make_subset(shared | _read_keys(entry), base, roots), f"[[datasets]] {number}")
        for number, entry in enumerate(entries, start=1)
    )


def _named(make: Callable[[], Any], where: str) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_keys(table: Mapping[str, Any], misplaced: Sequence[str] = ()) -> dict[str, Any]:
    """Checked values by key, with deprecated names replaced."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = DEPRECATED_KEYS.get(key, key)
        if name != key:
            logger.warning("the dataset key %s is deprecated; write %s", key, name)
            if name in table:
                raise ValueError(f"both {key} and {name} are given; keep {name}")
        if name in misplaced:
            raise ValueError(f"{name} belongs into [[datasets]], since each entry has its own")
        if name not in READERS:
            raise ValueError(_say_unknown(name))
        try:
            values[name] = READERS[name](value)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
    return values


def _say_unknown(key: str) -> str:
    if key in VIDEO_KEYS:
        return f"{key} is for video, and FLUX.2 makes pictures; leave it out"
    if key in FRAMEPACK_KEYS:
        return f"{key} is for FramePack, another model; leave it out"
    if key == "subsets":
        return "subsets belong to the schema of sd-scripts; make every folder a [[datasets]] of its own"
    return f"unknown key {key!r}; {_nearest(key, tuple(READERS))}"


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def _make_subset(values: dict[str, Any], base: Path, roots: tuple[Path, ...] | None) -> SubsetConfig:
    values = dict(values)
    if values.pop("multiple_target", False):
        raise ValueError(
            "multiple_target trains several layers of one picture, which FLUX.2 does not make; leave it out, and give "
            "every picture a line of its own"
        )
    no_resize = values.pop("no_resize_control", False)
    has_resolution = values.get("control_resolution") is not None
    fit = values.setdefault("control_fit", "original" if no_resize else "area" if has_resolution else "inference")
    if no_resize and fit != "original":
        raise ValueError(f'no_resize_control and control_fit = "{fit}" contradict each other; keep one of them')
    for key in PLACE_KEYS:
        if values.get(key) is not None:
            values[key] = resolve_named(values[key], base, roots, key)
    if values.get("cache_directory") is not None:
        values["cache_directory"] = resolve_named(values["cache_directory"], base, roots, "cache_directory", new=True)
    if "resolution" not in values:
        logger.warning("no resolution is given; pictures are trained at %dx%d px", *SubsetConfig.resolution)
    return SubsetConfig(**values)


def _read_resolution(value: Any) -> tuple[int, int]:
    sides = (value, value) if _is_int(value) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(_is_int, sides)):
        raise ValueError(f"must be a side or [width, height] in pixels, got {value!r}")
    return (sides[0], sides[1])


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text, got {value!r}")
    return value


def _read_path(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a path, got {value!r}")
    return value


def _read_extension(value: Any) -> str:
    text = _read_text(value)
    return f".{text}" if text.isalnum() else text


def _read_int(value: Any) -> int:
    if not _is_int(value):
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("is too large a number") from None


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys((*PLACE_KEYS, "cache_directory"), _read_path),
    "caption_extension": _read_extension,
    "resolution": _read_resolution,
    "batch_size": _read_int,
    "num_repeats": _read_int,
    "enable_bucket": _read_bool,
    "bucket_no_upscale": _read_bool,
    "multiple_target": _read_bool,
    "no_resize_control": _read_bool,
    "control_resolution": _read_resolution,
    "control_fit": _read_text,
    "caption_dropout": _read_float,
    "shuffle_caption": _read_bool,
    "caption_separator": _read_text,
    "keep_parts": _read_int,
    "num_caption_orders": _read_int,
    "trigger_word": _read_text,
    "flip": _read_bool,
    "validation_fraction": _read_float,
}
"""Every key of ``[[datasets]]``, with what checks its value."""


def _check_resolution(name: str, sides: tuple[int, int]) -> None:
    if min(sides) < MIN_SIDE or max(sides) > MAX_SIDE:
        raise ValueError(f"{name} is {sides[0]}x{sides[1]} px; each side must be {MIN_SIDE} to {MAX_SIDE}")
    assert MIN_SIDE % PIXELS_PER_LATENT == 0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is not either
        raise ValueError(f"{name} is {value}; it must be {low} to {high}")
