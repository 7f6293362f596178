"""Paths that settings and tables name: where they are looked for, what they may lead to, and what lies in a folder."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

MAX_FILES = 1_000_000
"""Files in one folder, or lines of one table."""


def resolve_named(text: str, base: Path, roots: Sequence[Path] | None, what: str, *, new: bool = False) -> Path:
    """The path that a file means by ``text``: from ``base``, its folder, or else from the working directory.

    Args:
        text: as it stands in the file. Backslashes separate folders, as where it was written on Windows, unless a file
            is really called so.
        base: the file's folder.
        roots: resolved folders in which it must lie; None allows any place.
        what: for messages, such as the key.
        new: it need not exist; only ``base`` counts then.

    Raises:
        ValueError: nothing is there, or it lies outside of ``roots``.
    """
    if "://" in text:
        raise ValueError(f"{what} is {text!r}; nothing is fetched, so download it first and give its path")
    if "\0" in text:
        raise ValueError(f"{what} is {text[:200]!r}, which is no path; correct it")
    try:
        spellings = [Path(spelling).expanduser() for spelling in dict.fromkeys((text.replace("\\", "/"), text))]
        if new:
            places = [base / spellings[0]]
        else:
            places = list(dict.fromkeys(folder / path for path in spellings for folder in (base, Path.cwd())))
        allowed = [place for place in places if is_inside(place, roots)]
        found = next((place for place in allowed if place.exists()), None)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{what} is {text[:200]!r}, which is no path ({error}); correct it") from error
    if not allowed:
        check_inside(places[0], roots, what)
    if found is None and not new:
        raise ValueError(f"{what}: nothing is at {' or '.join(map(str, allowed))}; check the path")
    return found or allowed[0]


def is_inside(path: Path, roots: Sequence[Path] | None) -> bool:
    """Whether a path, with links and ``..`` followed, lies in one of the roots (which are resolved)."""
    return roots is None or any(path.resolve().is_relative_to(root) for root in roots)


def check_inside(path: Path, roots: Sequence[Path] | None, what: str) -> None:
    """Refuses a path that leads out of the roots.

    Raises:
        ValueError: it does.
    """
    if not is_inside(path, roots):
        assert roots is not None
        allowed = ", ".join(map(str, roots)) or "no folder"
        raise ValueError(f"{what} leads to {path}, outside of what may be read here ({allowed}); move it in there")


def list_files(folder: Path) -> list[Path]:
    """The files of a folder by name, hidden ones left out. Links that lead nowhere are listed, so that they are told.

    Raises:
        ValueError: it is no folder, cannot be read, or holds more than `MAX_FILES`.
    """
    try:
        with os.scandir(folder) as entries:
            files = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and _is_file(entry)]
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}); give a folder with pictures") from error
    if len(files) > MAX_FILES:
        raise ValueError(f"{folder} holds {len(files)} files; at most {MAX_FILES} are read. Split it into several.")
    return sorted(files, key=lambda file: comparable(file.name))


def _is_file(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_file()
    target = Path(entry.path)
    return target.is_file() or not target.exists()


def comparable(name: str) -> str:
    """A name as it is compared: macOS writes accents as signs of their own."""
    return unicodedata.normalize("NFC", name)
