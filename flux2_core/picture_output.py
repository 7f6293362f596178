"""Where commands put their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from .files import make_writable
from .picture_metadata import GenerationRecord, write_png


def prepare_folder(path: str) -> Path:
    """Makes the output folder and tries to write into it.

    Raises:
        ValueError: it cannot be made or written into.
    """
    folder = Path(path)
    try:
        make_writable(folder)
    except OSError as error:
        raise ValueError(
            f"--save_path {folder} cannot be written into ({error.strerror}); give a folder of yours"
        ) from error
    return folder


def write_pictures(
    folder: Path, stem: str, images: Sequence[Image.Image], record: GenerationRecord | None
) -> Iterator[Path]:
    """Writes PNG files, each whole or not at all, and gives their paths; several get their index behind the name."""
    for index, image in enumerate(images):
        path = folder / (f"{stem}_{index}.png" if len(images) > 1 else f"{stem}.png")
        yield write_png(path, image, replace(record, image_index=index) if record is not None else None)
