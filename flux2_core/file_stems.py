"""Names of generated files, which several processes may be looking for at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIM = ".{}.claim"
"""Name of the empty file that keeps a stem while its files are made."""


def free_stem(folder: Path, name: str) -> str:
    """``{timestamp}_{name}``, the timestamp numbered where files of this second and name are there already."""
    timestamp = time.strftime("%Y%m%d-%H%M%S")
    number, stem = 1, f"{timestamp}_{name}"
    while _is_taken(folder, stem) or (folder / CLAIM.format(stem)).exists():
        number += 1
        stem = f"{timestamp}-{number}_{name}"
    return stem


@contextmanager
def claim_stem(folder: Path, name: str) -> Iterator[str]:
    """`free_stem`, which no other process takes before this one has written its files."""
    while True:
        stem = free_stem(folder, name)
        claim = folder / CLAIM.format(stem)
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            if not _is_taken(folder, stem):  # by one that has written and given its claim back since we looked
                yield stem
                return
        finally:
            claim.unlink(missing_ok=True)


def _is_taken(folder: Path, stem: str) -> bool:
    return any(path.name.startswith((f"{stem}.", f"{stem}_")) for path in folder.iterdir())
