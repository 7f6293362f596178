"""What is trained on: the list of a dataset's pictures with all that belongs to them.

Of pictures only the headers are read, and whole files where equal ones could come to both sides of a validation split.
Settings are in `dataset_config`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..flux2_core.files import read_limited
from ..flux2_core.images import MAX_ASPECT, MIN_SIDE, read_picture_size, reference_size
from ..flux2_core.pipeline import check_num_references
from .buckets import choose_bucket
from .dataset_config import DatasetConfig, SubsetConfig, load_dataset_config
from .dataset_paths import check_inside, comparable, list_files
from .dataset_tables import Problems, read_table, shorten_names

__all__ = ["Dataset", "DatasetConfig", "DatasetItem", "SubsetConfig", "list_dataset", "load_dataset_config"]

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
OTHER_PICTURE_SUFFIXES = (".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff")
"""Told as left out, where a folder has them."""
CAPTION_SUFFIXES = (".txt", ".caption", ".cap")
"""Ends of names that tools give to captions; looked for where the dataset's own finds none."""
TABLE_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
TRIGGER_PLACEHOLDER = "[trigger]"
"""Stands for the trigger word in captions written for ai-toolkit."""
MAX_CAPTION_BYTES = 2**20
MAX_MASK_ASPECT_ERROR = 0.02
"""How far the aspect of a mask may be from its picture's."""


@dataclass(frozen=True, kw_only=True)
class DatasetItem:
    """A picture with all that belongs to it."""

    subset: int
    """Index in `DatasetConfig.subsets`."""
    name: str = ""
    """Path of the picture relative to the subset's folder, with forward slashes: for messages and the split."""
    image: Path
    size: tuple[int, int]
    """Width and height in pixels, EXIF orientation applied."""
    bucket: tuple[int, int]
    """Width and height in pixels at which it is trained, multiples of 16."""
    captions: tuple[str, ...]
    """With trigger word; more than one where parts are shuffled, the first in the original order."""
    caption_is_missing: bool = False
    """There is no caption file, or an empty text; it is trained with the trigger word or the empty caption."""
    references: tuple[Path, ...] = ()
    """In the order in which prompts count them."""
    reference_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height in pixels of their files, EXIF orientation applied."""
    mask: Path | None = None
    is_validation: bool = False


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Settings and pictures."""

    config: DatasetConfig
    items: tuple[DatasetItem, ...] = ()
    """In the order of the subsets; repeats are not expanded."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A picture as it was found, before any picture file is opened."""

    image: Path
    where: str
    """For messages: its name, and in a table its line."""
    caption: str | None
    references: tuple[Path, ...] = ()
    mask: Path | None = None


def list_dataset(config: DatasetConfig, *, seed: int = 0) -> Dataset:
    """Finds every picture with its caption, references and mask, and the bucket that it is trained in.

    Pictures without caption, unclaimed references and files of kinds that are not read are logged as warnings.

    Args:
        config: settings.
        seed: decides in which orders the parts of captions are shuffled.

    Raises:
        ValueError: there are no pictures; or pictures, captions, references or masks are missing, unreadable, too
            small, too long, or outside of ``config.roots``. All that is found wrong is told together.
    """
    if not config.subsets:
        raise ValueError("the dataset names no pictures; add a folder or table")
    items: list[DatasetItem] = []
    for index, subset in enumerate(config.subsets):
        items += _list_subset(index, subset, config.roots, seed)
    return Dataset(config=config, items=tuple(_hold_out(config, items)))


def caption_orders(caption: str, subset: SubsetConfig, *, seed: int = 0) -> tuple[str, ...]:
    """The texts a caption is trained with: trigger word put in, other orders of its parts where they are shuffled.

    The trigger word takes the place of ``[trigger]``, else it comes in front, unless the caption has it already.

    The same caption, settings and seed give the same texts on every machine.
    """
    orders = [caption]
    join = subset.caption_separator if subset.caption_separator[-1].isspace() else f"{subset.caption_separator} "
    if subset.shuffle_caption:
        parts = [part.strip() for part in caption.split(subset.caption_separator.strip()) if part.strip()]
        fixed, free = parts[: subset.keep_parts], parts[subset.keep_parts :]
        limit = min(subset.num_caption_orders, math.factorial(min(len(free), 12)))
        # Parts that stand twice make equal orders, so there may be fewer than the limit.
        for number in range(16 * limit):
            if len(orders) >= limit:
                break
            keys = [_fraction(f"{seed}/{number}/{index}/{caption}") for index in range(len(free))]
            shuffled = join.join([*fixed, *(part for _, part in sorted(zip(keys, free, strict=True)))])
            if shuffled not in (join.join(parts), *orders):
                orders.append(shuffled)
    return tuple(_with_trigger(text, subset.trigger_word, join) for text in orders)


def validation_order(name: str) -> float:
    """A picture's place, 0..1, in the order in which pictures are held out for validation.

    It follows from the name alone: when pictures come or go, few of the others change sides.
    """
    return _fraction(name)


def _list_subset(index: int, subset: SubsetConfig, roots: Sequence[Path] | None, seed: int) -> list[DatasetItem]:
    if subset.image_directory is not None:
        entries = _entries_of_folder(subset, subset.image_directory, roots)
    else:
        entries = _entries_of_table(subset.place, roots)
    if subset.control_directory is not None:
        entries = _add_references(entries, subset, subset.control_directory, roots)
    if subset.mask_directory is not None:
        entries = _add_masks(entries, subset, subset.mask_directory, roots)

    problems = Problems()
    items: list[DatasetItem] = []
    sizes: dict[Path, tuple[int, int]] = {}
    for entry in entries:
        try:
            items.append(_make_item(index, subset, entry, seed, sizes))
        except ValueError as error:
            problems.add(f"{entry.where}: {error}")
    problems.raise_if_any(str(subset.place))
    _tell_missing_captions(subset, items)
    if not subset.trigger_word and any(TRIGGER_PLACEHOLDER in item.captions[0] for item in items):
        logger.warning("%s: %s in captions stays, as there is no trigger_word", subset.place, TRIGGER_PLACEHOLDER)
    return items


def _entries_of_folder(subset: SubsetConfig, folder: Path, roots: Sequence[Path] | None) -> list[_Entry]:
    files = list_files(folder)
    images = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    folders_inside = _folders_inside(subset, folder)
    if not images:
        raise ValueError(_say_no_pictures(folder, files, folders_inside))
    _tell_left_out(folder, files, folders_inside)
    extension = subset.caption_extension.lower()
    captions = {
        comparable(file.name)[: -len(extension)]: file for file in files if file.name.lower().endswith(extension)
    }
    problems = Problems()
    entries: list[_Entry] = []
    for image in images:
        try:
            check_inside(image, roots, "it")
            file = captions.get(comparable(image.stem))
            caption = None if file is None else _read_caption(file, roots)
            entries.append(_Entry(image=image, where=image.name, caption=caption))
        except ValueError as error:
            problems.add(f"{image.name}: {error}")
    problems.raise_if_any(str(folder))
    return entries


def _entries_of_table(table: Path, roots: Sequence[Path] | None) -> list[_Entry]:
    return [
        _Entry(
            image=row.image,
            where=f"{row.where}, {row.image.name}",
            caption=row.caption,
            references=row.references,
            mask=row.mask,
        )
        for row in read_table(table, roots)
    ]


def _read_caption(file: Path, roots: Sequence[Path] | None) -> str:
    check_inside(file, roots, f"its caption {file.name}")
    try:
        return read_limited(file, MAX_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {file.name} is no UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"its caption {file.name} cannot be read ({error.strerror}); check its permissions") from error


def _pictures_beside(subset: SubsetConfig, folder: Path, key: str, roots: Sequence[Path] | None) -> list[Path]:
    """The pictures of a folder that belong to those of the subset."""
    if folder.resolve() == subset.folder.resolve():
        raise ValueError(f"{key} is the folder of the pictures themselves, {folder}; use a folder of its own")
    files = [file for file in list_files(folder) if file.suffix.lower() in PICTURE_SUFFIXES]
    for file in files:
        check_inside(file, roots, f"{key}: {file.name}")
    return files


def _unique_stems(entries: Sequence[_Entry], key: str) -> dict[str, _Entry]:
    stems: dict[str, _Entry] = {}
    for entry in entries:
        first = stems.setdefault(comparable(entry.image.stem), entry)
        if first.image != entry.image:
            raise ValueError(
                f"{key} goes by the names of pictures, but {first.image} and {entry.image} have the same; rename one "
                "of them"
            )
    return stems


def _add_references(
    entries: Sequence[_Entry], subset: SubsetConfig, folder: Path, roots: Sequence[Path] | None
) -> list[_Entry]:
    stems = _unique_stems(entries, "control_directory")
    claimed: dict[str, dict[int, Path]] = {stem: {} for stem in stems}
    unclaimed: list[str] = []
    problems = Problems()
    for file in _pictures_beside(subset, folder, "control_directory", roots):
        stem = comparable(file.stem)
        numbered = re.fullmatch(r"(.+)_(\d{1,9})", stem, re.DOTALL)
        # The longest stem goes first: where a picture is called "a_1", the reference "a_1" is its, and not that of "a".
        if stem in stems:
            owner, number = stem, -1
        elif numbered and numbered[1] in stems:
            owner, number = numbered[1], int(numbered[2])
        else:
            unclaimed.append(file.name)
            continue
        first = claimed[owner].setdefault(number, file)
        if first is not file:
            problems.add(f"{first.name} and {file.name} are both the same reference of {owner}; remove one")
    missing = [stems[stem].where for stem, files in claimed.items() if not files]
    if missing:
        problems.add(
            f"no reference for {shorten_names(missing)}; every picture needs one of its own stem, such as "
            f"{Path(missing[0]).stem}.png or {Path(missing[0]).stem}_0.png"
        )
    problems.raise_if_any(f"control_directory {folder}")
    if unclaimed:
        logger.warning(
            "%s: references that belong to no picture are left out (%d): %s",
            folder,
            len(unclaimed),
            shorten_names(unclaimed),
        )
    result: list[_Entry] = []
    for entry in entries:
        files = claimed[comparable(entry.image.stem)]
        if entry.references:
            problems.add(f"{entry.where}: it has references in the table and in control_directory; keep one")
        result.append(replace(entry, references=tuple(files[number] for number in sorted(files))))
    problems.raise_if_any(str(subset.place))
    return result


def _add_masks(
    entries: Sequence[_Entry], subset: SubsetConfig, folder: Path, roots: Sequence[Path] | None
) -> list[_Entry]:
    stems = _unique_stems(entries, "mask_directory")
    masks: dict[str, Path] = {}
    problems = Problems()
    for file in _pictures_beside(subset, folder, "mask_directory", roots):
        first = masks.setdefault(comparable(file.stem), file)
        if first is not file:
            problems.add(f"{first.name} and {file.name} are both the mask of {file.stem}; remove one")
    missing = [entry.where for stem, entry in stems.items() if stem not in masks and entry.mask is None]
    if missing:
        problems.add(
            f"no mask for {shorten_names(missing)}; give each one of the same stem, all white to train all of it"
        )
    twice = [entry.where for stem, entry in stems.items() if stem in masks and entry.mask is not None]
    if twice:
        problems.add(f"masks in the table and in the folder for {shorten_names(twice)}; keep one of each")
    problems.raise_if_any(f"mask_directory {folder}")
    unclaimed = [file.name for stem, file in masks.items() if stem not in stems]
    if unclaimed:
        logger.warning(
            "%s: masks that belong to no picture are left out (%d): %s",
            folder,
            len(unclaimed),
            shorten_names(unclaimed),
        )
    return [replace(entry, mask=entry.mask or masks[comparable(entry.image.stem)]) for entry in entries]


def _make_item(
    index: int, subset: SubsetConfig, entry: _Entry, seed: int, sizes: dict[Path, tuple[int, int]]
) -> DatasetItem:
    def size_of(path: Path, what: str) -> tuple[int, int]:
        # A reference may belong to many pictures.
        if path not in sizes:
            sizes[path] = read_picture_size(path, what)
        return sizes[path]

    size = size_of(entry.image, "it")
    _check_size(size)
    check_num_references(len(entry.references))
    reference_sizes: list[tuple[int, int]] = []
    for path in entry.references:
        reference_sizes.append(size_of(path, f"reference {path.name}"))
        try:
            reference_size(*reference_sizes[-1], None)
        except ValueError as error:
            raise ValueError(f"reference {path.name}: {error}") from error
    if entry.mask is not None:
        _check_mask(size_of(entry.mask, f"mask {entry.mask.name}"), size, entry.mask.name)
    caption = (entry.caption or "").replace("\r\n", "\n").replace("\r", "\n").strip()
    captions = caption_orders(caption, subset, seed=seed)
    try:
        captions[0].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its caption holds half a character ({error}); correct it there") from error
    return DatasetItem(
        subset=index,
        name=_name_in(subset.folder, entry.image),
        image=entry.image,
        size=size,
        bucket=choose_bucket(*size, subset),
        captions=captions,
        caption_is_missing=not caption,
        references=entry.references,
        reference_sizes=tuple(reference_sizes),
        mask=entry.mask,
    )


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < MIN_SIDE:
        raise ValueError(f"is {size[0]}x{size[1]} px; each side must be at least {MIN_SIDE} px")
    aspect = max(size) / min(size)
    if aspect > MAX_ASPECT:
        raise ValueError(
            f"is {size[0]}x{size[1]} px, a ratio of {aspect:.1f}; at most {MAX_ASPECT:.0f} is allowed. Crop it."
        )


def _check_mask(mask: tuple[int, int], size: tuple[int, int], name: str) -> None:
    if abs(math.log(mask[0] / mask[1] * size[1] / size[0])) > MAX_MASK_ASPECT_ERROR:
        raise ValueError(
            f"mask {name} is {mask[0]}x{mask[1]} px, the picture {size[0]}x{size[1]}; give one of the same shape"
        )


def _tell_missing_captions(subset: SubsetConfig, items: Sequence[DatasetItem]) -> None:
    """Warns; refuses where no picture has a caption, but captions lie beside them in other files.

    Raises:
        ValueError: that is so.
    """
    missing = [item.name for item in items if item.caption_is_missing]
    if not missing:
        return
    if subset.image_directory is not None and len(missing) == len(items):
        stems = {comparable(Path(name).stem) for name in missing}
        files = list_files(subset.image_directory)
        for suffix in CAPTION_SUFFIXES:
            if suffix != subset.caption_extension and any(
                file.suffix.lower() == suffix and comparable(file.stem) in stems for file in files
            ):
                raise ValueError(
                    f"{subset.place}: no picture has a caption ending in {subset.caption_extension}, but there are "
                    f'files ending in {suffix}; set caption_extension = "{suffix}"'
                )
        table = _find_table(files)
        if table is not None:
            raise ValueError(
                f"{subset.place}: no picture has a caption, but there is {table}; give that file as the dataset (in "
                "settings: as metadata_file instead of image_directory), or move it away to train without captions"
            )
    logger.warning(
        "%s: pictures without caption (%d of %d) are trained with %s: %s",
        subset.place,
        len(missing),
        len(items),
        f"the trigger word {subset.trigger_word!r}" if subset.trigger_word else "the empty caption",
        shorten_names(missing),
    )


def _find_table(files: Sequence[Path]) -> str | None:
    names = {file.name for file in files}
    return next((name for name in TABLE_NAMES if name in names), None)


def _folders_inside(subset: SubsetConfig, folder: Path) -> list[str]:
    """Names of folders in the folder of the pictures that this subset does not know."""
    known = [path.resolve() for path in (subset.control_directory, subset.mask_directory, subset.cache_folder) if path]
    with os.scandir(folder) as entries:
        # Files are told without asking the file system about each.
        others = [Path(entry.path) for entry in entries if not entry.is_file(follow_symlinks=False)]
    folders = [path for path in others if not path.name.startswith(".") and path.is_dir()]
    return sorted(path.name for path in folders if path.resolve() not in known)


def _tell_left_out(folder: Path, files: Sequence[Path], folders_inside: Sequence[str]) -> None:
    names = [file.name for file in files if file.suffix.lower() in OTHER_PICTURE_SUFFIXES]
    if names:
        text = "%s: pictures of kinds that are not read are left out (%d): %s; save them as PNG"
        logger.warning(text, folder, len(names), shorten_names(names))
    if folders_inside:
        logger.warning("%s: folders inside are not searched: %s", folder, shorten_names(folders_inside))


def _say_no_pictures(folder: Path, files: Sequence[Path], folders_inside: Sequence[str]) -> str:
    text = f"no pictures in {folder}; put {', '.join(suffix[1:] for suffix in PICTURE_SUFFIXES)} files there"
    table = _find_table(files)
    if table is not None:
        return f"{text}, or give {folder / table} as the dataset"
    others = [file.name for file in files if file.suffix.lower() in OTHER_PICTURE_SUFFIXES]
    if others:
        text += f". Of these kinds none are read, save them as PNG: {shorten_names(others)}"
    if folders_inside:
        text += (
            f". Folders inside are not searched; make each a [[datasets]] of its own: {shorten_names(folders_inside)}"
        )
    return text


def _hold_out(config: DatasetConfig, items: Sequence[DatasetItem]) -> list[DatasetItem]:
    """Marks the pictures that are held out: of each subset the share that it asks for, at least one, and never all.

    What is held out is trained nowhere, neither from another file of the same content nor in another subset.
    """
    shares = {index: subset.validation_fraction for index, subset in enumerate(config.subsets)}
    if not any(shares.values()):
        return list(items)
    contents = _contents(item.image for item in items)
    places: dict[int, dict[str, float]] = {index: {} for index, share in shares.items() if share}
    for item in items:
        if item.subset in places:
            content, place = contents[item.image], validation_order(item.name)
            places[item.subset][content] = min(place, places[item.subset].get(content, place))
    held_out: set[str] = set()
    for index, place_of in places.items():
        order = sorted(place_of, key=place_of.__getitem__)
        if len(order) < 2:
            raise ValueError(
                f"{config.subsets[index].place} has one picture to tell apart, so none can be held out; "
                "set validation_fraction to 0"
            )
        held_out |= set(order[: min(max(round(shares[index] * len(order)), 1), len(order) - 1)])
    if held_out.issuperset(contents.values()):
        raise ValueError("every picture is held out by one [[datasets]] or another; lower validation_fraction")
    return [replace(item, is_validation=contents[item.image] in held_out) for item in items]


def _contents(paths: Iterable[Path]) -> dict[Path, str]:
    """A text for each file that is the same for files of the same content. Files of a length of their own are not read.

    Raises:
        ValueError: a file cannot be read.
    """
    same_length: dict[int, list[Path]] = {}
    try:
        for path in dict.fromkeys(paths):
            same_length.setdefault(path.stat().st_size, []).append(path)
        return {
            path: str(path) if len(group) == 1 else _digest(path) for group in same_length.values() for path in group
        }
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}); check the dataset") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _with_trigger(caption: str, trigger: str | None, join: str) -> str:
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER_PLACEHOLDER, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}{join}{caption}" if caption else trigger


def _fraction(text: str) -> float:
    """A number in 0..1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _name_in(folder: Path, image: Path) -> str:
    try:
        return comparable(Path(os.path.relpath(image, folder)).as_posix())
    except ValueError:  # another drive
        return comparable(image.as_posix())
