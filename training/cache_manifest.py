"""Manifests: which files of a cache folder belong to which dataset, and what the pictures were when they were encoded.

A folder may hold the caches of several datasets, settings and encoders. Each has a manifest of its own per subset and
encoder, which lists exactly the subset's pictures with the names of their files. It is written before anything is
encoded: it protects the files of a run that is under way or was killed, and pictures are not read a second time to
find out that they did not change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..flux2_core.files import read_json_object, write_text
from ..flux2_core.sampling import Stopped
from .dataset import Dataset, DatasetItem
from .dataset_config import SubsetConfig
from .fingerprint import AutoencoderIdentity, EncoderIdentity, TextEncoderIdentity
from .read_ahead import read_ahead

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 512 * 2**20
"""Some hundred bytes per picture."""
STALE_SECONDS = 3600
"""A temporary file that was not written to for so long belongs to no running process."""

MANIFEST_NAME = re.compile(r"manifest-(latents|text)-[0-9a-f]{16}-[0-9a-f]{16}\.json")
FILE_NAME = re.compile(r"(latents|mask|text)-[0-9a-f]{32}\.safetensors")
TEMPORARY_NAME = re.compile(
    r"\.(?:(?:latents|mask|text)-[0-9a-f]{32}|manifest-(?:latents|text)-[0-9a-f-]{1,33})-[a-z0-9_]{8}"
    r"\.(?:safetensors|json)"
)

What = Literal["latents", "text"]
Progress = Callable[[str, int, int], None]
"""Told what is counted ("pictures read", "pictures encoded", "captions encoded"), how many are done, and how many
there are."""

SOURCE_FIELDS = ("image_directory", "image_jsonl_file", "metadata_file")
LATENTS_FIELDS = (
    *("resolution", "enable_bucket", "bucket_no_upscale", "control_directory", "mask_directory", "control_fit"),
    *("control_resolution", "flip"),
)
TEXT_FIELDS = (
    *("caption_extension", "shuffle_caption", "caption_separator", "keep_parts", "num_caption_orders", "trigger_word"),
)
"""Settings of a subset that decide what is cached."""


@dataclass(frozen=True, kw_only=True)
class PictureHash:
    """A file's content, and by which signs it is known to be unchanged."""

    num_bytes: int
    mtime_ns: int
    sha256: str

    def is_of(self, path: Path) -> bool:
        """Whether the file is as it was, by these signs."""
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.num_bytes, self.mtime_ns)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one subset needs of one encoder."""

    what: What
    encoder: AutoencoderIdentity | TextEncoderIdentity
    settings: dict[str, Any]
    """Of the subset, for people; their digest is in the name."""
    items: tuple[tuple[str, tuple[str, ...]], ...]
    """Path of each picture and the names of its files; the empty caption belongs to a picture named ""."""
    pictures: dict[str, PictureHash] = field(default_factory=dict)
    """By path, relative to the folder of the manifest where that is possible."""

    @property
    def file_names(self) -> set[str]:
        """All files that belong to it."""
        return {name for _, names in self.items for name in names}


def cache_folder(subset: SubsetConfig) -> Path:
    """Where the caches of a subset are."""
    return Path(os.path.abspath(subset.cache_folder))  # noqa: PTH100 - links are not followed


def manifest_settings(subset: SubsetConfig, what: What) -> dict[str, Any]:
    """The settings that decide what is cached, as JSON holds them; paths relative to the cache folder if possible."""
    folder = cache_folder(subset)
    fields = SOURCE_FIELDS + (LATENTS_FIELDS if what == "latents" else TEXT_FIELDS)
    values = {name: getattr(subset, name) for name in fields}
    values = {key: portable(value, folder) if isinstance(value, Path) else value for key, value in values.items()}
    return json.loads(json.dumps(values))


def manifest_prefix(subset: SubsetConfig, what: What) -> str:
    """How the names of a subset's manifests begin; what follows depends on the encoder."""
    return f"manifest-{what}-{_digest(manifest_settings(subset, what))}-"


def manifest_path(subset: SubsetConfig, what: What, encoder: EncoderIdentity) -> Path:
    """Where the manifest of a subset and an encoder is."""
    return cache_folder(subset) / f"{manifest_prefix(subset, what)}{_digest(encoder.parts)}.json"


def portable(path: Path, folder: Path) -> str:
    """A path relative to a folder, so that both can be moved together; absolute on another drive of Windows."""
    absolute = os.path.abspath(path)  # noqa: PTH100 - links are not followed
    with contextlib.suppress(ValueError):
        return Path(os.path.relpath(absolute, folder)).as_posix()
    return Path(absolute).as_posix()


def write_manifest(path: Path, manifest: Manifest) -> bool:
    """Writes a manifest, whole or not at all; answers False where the same one is there already."""
    data = {
        "format": "flux2_kit.cache",
        "version": FORMAT_VERSION,
        "what": manifest.what,
        "encoder": asdict(manifest.encoder),
        "settings": manifest.settings,
        "items": [{"picture": picture, "files": list(names)} for picture, names in manifest.items],
        "pictures": {name: [p.num_bytes, p.mtime_ns, p.sha256] for name, p in sorted(manifest.pictures.items())},
    }
    text = json.dumps(data, indent=1, ensure_ascii=True)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        # A link is replaced: manifests are listed without links.
        if path.lstat().st_size == len(text) and path.read_text(encoding="utf-8") == text:
            return False
    write_text(path, text)
    return True


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest and checks it: whoever may write into the folder may have written anything.

    Raises:
        ValueError: it is no manifest of this version, or names a file outside of the folder.
    """
    advice = "delete it and run `flux2 cache` again"
    try:
        data = read_json_object(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions, or {advice}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no manifest; {advice}") from error
    if data.get("format") != "flux2_kit.cache" or data.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is a manifest of version {str(data.get('version'))[:20]!r}; only {FORMAT_VERSION} is read. "
            f"Update FLUX.2 Kit, or {advice}"
        )
    try:
        what = data["what"]
        match = MANIFEST_NAME.fullmatch(path.name)
        if match is None or match[1] != what:
            raise ValueError(f"its name does not fit a manifest of {what!r}")
        items = tuple((_text(item["picture"]), tuple(map(_file_name, item["files"]))) for item in data["items"])
        return Manifest(
            what=what,
            encoder=_parse_encoder(what, data["encoder"]),
            settings=dict(data["settings"]),
            items=items,
            pictures={name: _parse_hash(*value) for name, value in data["pictures"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from error


def list_manifests(folder: Path) -> list[Path]:
    """The manifests of a folder, of any dataset."""
    return [Path(entry.path) for entry in _scan(folder) if MANIFEST_NAME.fullmatch(entry.name)]


def read_manifests(dataset: Dataset) -> dict[Path, Manifest | ValueError]:
    """All manifests in the cache folders of a dataset, by path; what cannot be read is there with the reason."""
    found: dict[Path, Manifest | ValueError] = {}
    for folder in dict.fromkeys(cache_folder(subset) for subset in dataset.config.subsets):
        for path in list_manifests(folder):
            try:
                found[path] = read_manifest(path)
            except ValueError as error:
                found[path] = error
    return found


def known_hashes(manifests: Mapping[Path, Manifest | ValueError]) -> dict[Path, PictureHash]:
    """All that manifests know of pictures, by absolute path."""
    known: dict[Path, PictureHash] = {}
    for path, manifest in manifests.items():
        if not isinstance(manifest, ValueError):
            for name, picture in manifest.pictures.items():
                known[Path(os.path.normpath(path.parent / name))] = picture
    return known


def hash_pictures(
    paths: Iterable[Path],
    known: Mapping[Path, PictureHash],
    *,
    num_workers: int = 1,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[Path, PictureHash]:
    """The sha256 of every file; those of known size and time of change are not read.

    Raises:
        ValueError: a file is missing or cannot be read.
        Stopped: `should_stop` answered True.
    """
    found: dict[Path, PictureHash] = {}
    changed: list[Path] = []
    for path in dict.fromkeys(paths):
        before = known.get(Path(os.path.abspath(path)))  # noqa: PTH100 - links are not followed
        try:
            is_known = before is not None and before.is_of(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); check the dataset") from error
        if before is not None and is_known:
            found[path] = before
        else:
            changed.append(path)
    with contextlib.closing(read_ahead(_hash_picture, changed, num_workers)) as hashed:
        for index, (path, picture) in enumerate(hashed):
            if should_stop is not None and should_stop():
                raise Stopped(f"stopped after {index} of {len(changed)} pictures were read")
            found[path] = picture
            if on_progress is not None:
                on_progress("pictures read", index + 1, len(changed))
    return found


def _hash_picture(path: Path) -> PictureHash:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            # What was read is what counts: a picture that is replaced meanwhile differs from these signs.
            stat = os.fstat(file.fileno())
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the dataset") from error
    return PictureHash(num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What `prune_cache` did."""

    num_deleted: int
    num_bytes: int
    other_manifests: tuple[Path, ...]
    """Of other datasets, settings or encoders: their files were kept."""


def prune_cache(dataset: Dataset, own_manifests: Iterable[Path] = ()) -> PruneReport:
    """Deletes, in the cache folders of a dataset, the cached files that no manifest names, and stale temporary files.

    Nothing that has not one of our names is touched.

    Raises:
        ValueError: a manifest cannot be read, so that nobody knows which files belong to it.
    """
    own = set(own_manifests)
    num_deleted = num_bytes = 0
    others: list[Path] = []
    for folder in dict.fromkeys(cache_folder(subset) for subset in dataset.config.subsets):
        # First the files, then who names them: what another run has begun meanwhile is not seen at all.
        entries = list(_scan(folder))
        manifests = list_manifests(folder)
        named = {name for path in manifests for name in read_manifest(path).file_names}
        others += [path for path in manifests if path not in own]
        for entry in entries:
            is_temporary = TEMPORARY_NAME.fullmatch(entry.name)
            if not is_temporary and (entry.name in named or not FILE_NAME.fullmatch(entry.name)):
                continue
            with contextlib.suppress(FileNotFoundError):  # another run was faster
                status = entry.stat(follow_symlinks=False)
                if is_temporary and time.time() - status.st_mtime <= STALE_SECONDS:
                    continue
                Path(entry.path).unlink()
                num_deleted, num_bytes = num_deleted + 1, num_bytes + status.st_size
    return PruneReport(num_deleted=num_deleted, num_bytes=num_bytes, other_manifests=tuple(others))


def group_subsets(dataset: Dataset, what: What) -> Iterator[tuple[SubsetConfig, list[DatasetItem]]]:
    """The items of each manifest: subsets that differ only in what is not cached share one."""
    groups: dict[tuple[Path, str], tuple[SubsetConfig, list[DatasetItem]]] = {}
    for index, subset in enumerate(dataset.config.subsets):
        place = cache_folder(subset), manifest_prefix(subset, what)
        groups.setdefault(place, (subset, []))[1].extend(item for item in dataset.items if item.subset == index)
    yield from groups.values()


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Regular files of a folder, by name; none where it does not exist. No pattern is made of the folder's name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from sorted((entry for entry in entries if entry.is_file(follow_symlinks=False)), key=lambda e: e.name)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _parse_encoder(what: What, data: dict[str, Any]) -> AutoencoderIdentity | TextEncoderIdentity:
    fingerprint, dtype = _text(data["fingerprint"]), _text(data["dtype"])
    if not re.fullmatch(r"[0-9a-f]{32}", fingerprint) or dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"its encoder is {fingerprint[:40]!r} in {dtype[:20]!r}")
    common: dict[str, Any] = {"fingerprint": fingerprint, "dtype": dtype, "file": _text(data["file"])}
    if what == "latents":
        single, several = map(_count, data["reference_sides"])
        return AutoencoderIdentity(**common, channels=_count(data["channels"]), reference_sides=(single, several))
    return TextEncoderIdentity(
        **common,
        family=_text(data["family"]),
        context_dim=_count(data["context_dim"]),
        max_tokens=_count(data["max_tokens"]),
    )


def _parse_hash(num_bytes: object, mtime_ns: object, sha256: object) -> PictureHash:
    if not re.fullmatch(r"[0-9a-f]{64}", _text(sha256)) or type(mtime_ns) is not int:
        raise ValueError(f"a picture has the digest {str(sha256)[:80]!r} and the time {str(mtime_ns)[:40]!r}")
    return PictureHash(num_bytes=_count(num_bytes), mtime_ns=mtime_ns, sha256=_text(sha256))


def _file_name(value: object) -> str:
    if not isinstance(value, str) or not FILE_NAME.fullmatch(value):
        raise ValueError(f"it names the file {str(value)[:100]!r}, which is none of a cache")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:100]!r} is no text")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"{str(value)[:100]!r} is no number of anything")
    return value
