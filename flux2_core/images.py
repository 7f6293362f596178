"""Pictures in and out: files, PIL, tensors, and how a reference is brought to a size that the model takes."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .autoencoder import PIXELS_PER_LATENT

MIN_SIDE = 64
"""Smallest side of a picture or reference, in pixels."""
MAX_ASPECT = 8.0
"""Largest ratio of a reference's sides."""
MAX_FILE_PIXELS = 12_288 * 12_288
"""A picture file that claims more is refused before it is decoded (Pillow refuses from 1.2 times this on by itself)."""


PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "AVIF", "GIF", "TIFF", "JPEG2000", "PPM")
"""What is read, whatever a file's name ends in. Pillow knows more, and for one of them it starts Ghostscript."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of an EXIF orientation upright; from 5 on width and height change places."""


@contextmanager
def open_picture(path: str | os.PathLike[str], what: str | None = None) -> Iterator[Image.Image]:
    """Opens a picture file: its header at once, its pixels when they are asked for inside of the ``with``.

    Args:
        path: of the file.
        what: it is, for messages; None: the path.

    Raises:
        ValueError: the file is missing, no picture, damaged, or larger than `MAX_FILE_PIXELS`.
    """
    path = Path(path)
    what = what or str(path)
    if not path.is_file():
        raise ValueError(f"no picture at {path}; check the path")
    try:
        with Image.open(path, formats=_formats()) as image:
            if image.width * image.height > MAX_FILE_PIXELS:
                raise ValueError(
                    f"{what} claims {image.width}x{image.height} px; at most {MAX_FILE_PIXELS} px are read. "
                    "Scale it down."
                )
            yield image
    except (OSError, SyntaxError, RuntimeError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{what} cannot be read as a picture ({error}); give a whole PNG, JPEG or WebP file"
        ) from error


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a picture as RGB: EXIF orientation applied, transparency composited on white.

    Raises:
        ValueError: as `open_picture`.
    """
    with open_picture(path) as image:
        image.load()
        return to_rgb(image)


def read_picture_size(path: str | os.PathLike[str], what: str | None = None) -> tuple[int, int]:
    """Width and height in pixels, EXIF orientation applied, from the header alone where that tells both.

    Raises:
        ValueError: as `open_picture`, which also explains ``what``.
    """
    with open_picture(path, what) as image:
        # Pillow's PNG reader decodes the picture to look for EXIF behind it; few files have it there.
        is_told_in_header = image.format != "PNG" or "exif" in image.info or _png_has_late_text(Path(path))
        exif = image.getexif() if is_told_in_header else Image.Image.getexif(image)
        width, height = image.size
    return (height, width) if _orientation(exif) >= 5 else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """A picture with its EXIF orientation applied, and no longer told.

    `PIL.ImageOps.exif_transpose` does the same, but writes the EXIF anew, which fails for some cameras' pictures.
    """
    turn = UPRIGHT.get(_orientation(image.getexif()))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as 8-bit RGB: EXIF orientation applied, 16-bit grey scaled, transparency composited on white."""
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files keep their full range; Pillow opens some of them as "I", which may hold 8-bit levels as well.
        if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255):
            values = values / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """`PICTURE_FORMATS` as far as this Pillow has them."""
    Image.init()
    return tuple(name for name in PICTURE_FORMATS if name in Image.OPEN)


def _orientation(exif: Image.Exif) -> int:
    orientation = exif.get(ExifTags.Base.Orientation)
    return orientation if orientation in UPRIGHT else 1


def _png_has_late_text(path: Path) -> bool:
    """Whether a PNG has chunks behind its pixels that may hold EXIF or XMP."""
    with path.open("rb") as file:
        position, behind_pixels = 8, False
        while True:
            file.seek(position)
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            behind_pixels |= head[4:] == b"IDAT"
            if behind_pixels and head[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            position += 12 + int.from_bytes(head[:4], "big")


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to ``[1, 3, H, W]`` in -1..1, fp32; all 256 levels come back through `tensor_to_images`."""
    values = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1


def tensor_to_images(pictures: Tensor) -> list[Image.Image]:
    """``[B, 3, H, W]`` around -1..1 to RGB pictures, clamped and rounded (truncation would darken by half a level)."""
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def reference_size(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """The size (width, height) to which a reference is scaled before the crop to multiples of 16.

    The aspect stays; nothing is ever scaled up; None for `max_pixels` keeps any size. Rule:
    github.com/black-forest-labs/flux2, ``src/flux2/sampling.py``.

    Raises:
        ValueError: a side under 64 px, or sides of a ratio above 8.
    """
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"a reference is {width}x{height} px; each side must be at least {MIN_SIDE} px")
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise ValueError(
            f"a reference is {width}x{height} px, a ratio of {aspect:.1f}; "
            f"at most {MAX_ASPECT:.0f} is allowed. Crop it."
        )
    if max_pixels is None or width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    return int(width * scale), int(height * scale)


def fit_reference(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Scales a reference down to `max_pixels` (LANCZOS) and crops its centre to multiples of 16."""
    image = to_rgb(image)
    size = reference_size(*image.size, max_pixels)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = (max(side // PIXELS_PER_LATENT, 1) * PIXELS_PER_LATENT for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def initial_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The size (width, height) of what is made from a picture: its own in multiples of 16, of at most `max_pixels`.

    Sides under 64 px become 64 px, whatever the aspect.
    """
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    sides = (int(side * scale + 1e-6) // PIXELS_PER_LATENT * PIXELS_PER_LATENT for side in (width, height))
    width, height = (max(side, MIN_SIDE) for side in sides)
    return width, height


def fit_picture(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scales a picture (LANCZOS) until it covers a size in pixels, and crops its centre to that size."""
    return ImageOps.fit(to_rgb(image), (width, height), method=Image.Resampling.LANCZOS)


def check_picture_side(name: str, side: int) -> None:
    """Refuses a width or height, in pixels, that the model cannot make.

    Raises:
        ValueError: it is under 64 px or not a multiple of 16.
    """
    if side < MIN_SIDE or side % PIXELS_PER_LATENT:
        near = max(MIN_SIDE, round(side / PIXELS_PER_LATENT) * PIXELS_PER_LATENT)
        raise ValueError(
            f"the {name} is {side} px; it must be a multiple of {PIXELS_PER_LATENT} and at least {MIN_SIDE}. "
            f"The nearest is {near}."
        )
