"""Tables of pictures: musubi-tuner's JSONL, DiffSynth-Studio's CSV, JSON and JSONL, Hugging Face's imagefolder."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..flux2_core.files import read_limited
from .dataset_paths import MAX_FILES, resolve_named

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".jsonl", ".csv", ".json")
MAX_TABLE_BYTES = 256 * 2**20
MAX_SHOWN = 10
"""Problems of one kind that are named; the rest is counted."""
IMAGE_KEYS = ("image", "image_path", "file_name")
CAPTION_KEYS = ("prompt", "caption", "text")
REFERENCES_KEYS = ("edit_image", "control_path")
MASK_KEY = "mask_path"
USED_KEYS = frozenset((*IMAGE_KEYS, *CAPTION_KEYS, *REFERENCES_KEYS, MASK_KEY))
NUMBERED_REFERENCE = re.compile(r"control_path_(\d{1,4})")
REFUSED_KEYS = {
    "video": "this table is for video, and FLUX.2 makes pictures",
    "video_path": "this table is for video, and FLUX.2 makes pictures",
    "image_path_0": "several targets to one caption are layers of a picture, which FLUX.2 does not make",
}


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One picture of a table, its files found."""

    where: str
    """For messages, such as "line 3"."""
    image: Path
    caption: str
    references: tuple[Path, ...]
    mask: Path | None


class Problems:
    """Collects what is wrong, so that it is all told at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        self.texts.append(text)

    def raise_if_any(self, where: str) -> None:
        """Raises ValueError with the first of them and the number of the rest."""
        if not self.texts:
            return
        more = len(self.texts) - MAX_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise ValueError(f"{where}: {'; '.join(self.texts[:MAX_SHOWN])}{rest}")


def shorten_names(names: Sequence[str]) -> str:
    """Up to ten names, and the number of the rest."""
    more = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_table(path: Path, roots: Sequence[Path] | None) -> list[TableRow]:
    """The rows of a table, in its order.

    Columns are image (or image_path, file_name), prompt (or caption, text), edit_image (a path or a list of paths; or
    control_path, or control_path_0, control_path_1, ...) and mask_path; others are logged as not used. Paths are
    relative to the table.

    Raises:
        ValueError: the table is too large or damaged; or rows are incomplete or name files that are missing or outside
            of ``roots``, told together with their lines.
    """
    if not path.is_file() or (path.suffix.lower() not in TABLE_SUFFIXES):
        raise ValueError(f"{path} is no table; give a file ending in {', '.join(TABLE_SUFFIXES)}")
    rows: list[TableRow] = []
    problems = Problems()
    unused: set[str] = set()
    for where, fields in _read_fields(path):
        if len(rows) >= MAX_FILES:
            raise ValueError(f"{path} has more than {MAX_FILES} pictures; split it into several")
        try:
            rows.append(_read_row(where, fields, path.parent, roots))
        except ValueError as error:
            problems.add(f"{where}: {error}")
        unused |= {key for key in fields.keys() - USED_KEYS if key and not NUMBERED_REFERENCE.fullmatch(key)}
    problems.raise_if_any(str(path))
    if not rows:
        raise ValueError(f"{path} names no pictures; write one a line")
    if unused:
        logger.warning("%s: columns that are not used: %s", path, shorten_names(sorted(unused)))
    return rows


def _read_fields(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = read_limited(path, MAX_TABLE_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _read_csv(path, text)
    elif suffix == ".json":
        entries = _load_json(text, str(path))
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a list of objects, got {type(entries).__name__}")
        for number, entry in enumerate(entries, start=1):
            yield _checked_fields(f"entry {number}", entry, path)
    else:
        # Not splitlines(), which also splits at signs that may stand inside of a caption.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _checked_fields(f"line {number}", _load_json(line, f"{path}, line {number}"), path)


def _load_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); correct it there") from error


def _checked_fields(where: str, entry: Any, path: Path) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}, {where}: must be an object with the key image, got {type(entry).__name__}")
    return where, entry


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            where = f"line {reader.line_num}"
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{path}, {where}: the number of cells is not that of the header; put texts with commas in quotes"
                )
            yield where, {name.strip(): value for name, value in fields.items()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no valid CSV ({error}); correct it there") from error


def _read_row(where: str, fields: Mapping[str, Any], base: Path, roots: Sequence[Path] | None) -> TableRow:
    for key, reason in REFUSED_KEYS.items():
        if fields.get(key):
            raise ValueError(f"{key}: {reason}; leave it out")
    image = _first(fields, IMAGE_KEYS)
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"there is no picture; give its path as {_say_keys(IMAGE_KEYS, fields)}")
    caption = _first(fields, CAPTION_KEYS)
    if not isinstance(caption, str):
        raise ValueError(f"there is no text for {image}; give it as {_say_keys(CAPTION_KEYS, fields)}")
    mask = fields.get(MASK_KEY) or None
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"{MASK_KEY} must be a path, got {mask!r}")
    return TableRow(
        where=where,
        image=resolve_named(image.strip(), base, roots, "the picture"),
        caption=caption,
        references=tuple(resolve_named(text, base, roots, "a reference") for text in _read_references(fields)),
        mask=None if mask is None else resolve_named(mask.strip(), base, roots, "the mask"),
    )


def _say_keys(names: Sequence[str], fields: Mapping[str, Any]) -> str:
    found = shorten_names([repr(key) for key in fields if key]) or "none"
    return f"{names[0]} (or {', '.join(names[1:])}); the keys here are {found}"


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _read_references(fields: Mapping[str, Any]) -> list[str]:
    """Paths of the references of a row, in the order in which prompts count them."""
    numbered = {
        int(match[1]): value for key, value in fields.items() if (match := NUMBERED_REFERENCE.fullmatch(key)) and value
    }
    given = [key for key in REFERENCES_KEYS if fields.get(key)]
    if len(given) + bool(numbered) > 1:
        names = [*given, *(["control_path_0, ..."] if numbered else [])]
        raise ValueError(f"references are given twice, as {' and as '.join(names)}; keep one")
    value: Any = [numbered[number] for number in sorted(numbered)] if numbered else fields[given[0]] if given else []
    if isinstance(value, str):
        value = _read_list(value.strip()) if value.strip().startswith("[") and value.strip().endswith("]") else [value]
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"references must be a path or a list of paths, got {str(value)[:200]!r}")
    return [text.strip() for text in value]


def _read_list(text: str) -> Any:
    """A list in a cell, as JSON or as Python writes it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f'{text[:200]!r} is no list; write ["a.png", "b.png"]') from error
