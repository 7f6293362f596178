"""Which size a picture is trained at, and how pictures, masks and references are brought to their sizes. Pure."""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image

from ..flux2_core.autoencoder import PIXELS_PER_LATENT
from ..flux2_core.images import MIN_SIDE, fit_reference, reference_size, to_rgb, upright
from .dataset_config import SubsetConfig

MAX_BUCKET_ASPECT = 4
"""Largest ratio of a bucket's sides, up to the rounding to multiples of 16."""

# Pillow's LANCZOS widens with the factor of reduction, so every source pixel counts by its area: no aliasing at any
# factor, and the same filter up and down. It is also what references get, so target and reference look alike.
FILTER = Image.Resampling.LANCZOS
# A mask must not ring: weights outside of 0..1 would be cut off, which moves edges.
MASK_FILTER = Image.Resampling.BILINEAR


@lru_cache(maxsize=64)
def list_buckets(area: int) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) in pixels on a step of 16 whose area comes near to ``area`` from below, by aspect.

    At the area of 1024x1024 they are 512x2048 to 2048x512; each comes with its mirror image. No side is under 64 px.
    """
    side = math.isqrt(area)
    shortest = max(_floor(int(side / math.sqrt(MAX_BUCKET_ASPECT))), MIN_SIDE)
    tall = {(short, _floor(area // short)) for short in range(shortest, side + 1, PIXELS_PER_LATENT)}
    square = max(_floor(side), MIN_SIDE)
    tall.add((square, square))
    sizes = tall | {(height, width) for width, height in tall}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def choose_bucket(width: int, height: int, subset: SubsetConfig) -> tuple[int, int]:
    """Width and height in pixels, multiples of 16, at which a picture of ``width`` x ``height`` px is trained.

    With buckets it is the one whose aspect is nearest by ratio, so that a picture and its quarter turn go to mirrored
    buckets. With ``bucket_no_upscale`` a picture that would have to grow keeps its size, cropped to multiples of 16.
    """
    if not subset.enable_bucket:
        return _floor(subset.resolution[0]), _floor(subset.resolution[1])
    area = subset.resolution[0] * subset.resolution[1]
    if subset.bucket_no_upscale and width * height <= area:
        return _floor(width), _floor(height)
    long, short = max(width, height), min(width, height)
    aspect = math.log(long / short)
    wide = [size for size in list_buckets(area) if size[0] >= size[1]]
    # On a tie the one nearer to the square.
    size = min(wide, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size[0]))
    if subset.bucket_no_upscale:
        size = min(size[0], _floor(long)), min(size[1], _floor(short))
    return size if width >= height else (size[1], size[0])


def cover_scale(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The factor by which a picture is scaled so that it covers the bucket; above 1 it grows."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def crop_box(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that is trained: left, top, right, bottom in its own pixels; centred."""
    scale = cover_scale(size, bucket)
    if scale == 1:  # nothing is scaled, so the crop begins at a whole pixel
        left, top = (size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2
        return left, top, left + bucket[0], top + bucket[1]
    width, height = min(bucket[0] / scale, size[0]), min(bucket[1] / scale, size[1])
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def cropped_fraction(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """Share of a picture's area that is cut off."""
    left, top, right, bottom = crop_box(size, bucket)
    return 1 - (right - left) * (bottom - top) / (size[0] * size[1])


def fit_target(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """A picture as it is trained: RGB, scaled to cover the bucket (width, height), centre cropped."""
    image = to_rgb(image)
    return _scale(image, bucket, FILTER)


def fit_mask(mask: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """A loss mask in 8-bit grey with the geometry of `fit_target`; transparent parts count as black: not trained."""
    mask = upright(mask)
    if "A" in mask.getbands() or "a" in mask.getbands() or "transparency" in mask.info:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, (0, 0, 0, 255)), mask)
    return _scale(to_rgb(mask).convert("L"), bucket, MASK_FILTER)


def fit_control(
    image: Image.Image,
    subset: SubsetConfig,
    *,
    bucket: tuple[int, int],
    num_references: int,
    reference_sides: tuple[int, int],
) -> Image.Image:
    """A reference as it is trained: RGB, sides multiples of 16, fitted as the subset's ``control_fit`` says.

    Args:
        image: any mode.
        bucket: width and height in pixels of the picture that it belongs to.
        num_references: of that picture; inference makes one larger than each of several.
        reference_sides: of the autoencoder's config.

    Raises:
        ValueError: a side under 64 px, or sides of a ratio above 8.
    """
    image = to_rgb(image)
    if subset.control_fit == "target":
        return fit_target(image, bucket)
    if subset.control_fit != "area":
        return fit_reference(image, _max_pixels(subset, num_references, reference_sides))
    size = control_size(
        image.size, subset, bucket=bucket, num_references=num_references, reference_sides=reference_sides
    )
    return _scale(image, size, FILTER)


def control_size(
    size: tuple[int, int],
    subset: SubsetConfig,
    *,
    bucket: tuple[int, int],
    num_references: int,
    reference_sides: tuple[int, int],
) -> tuple[int, int]:
    """Width and height in pixels that `fit_control` makes of a reference of ``size``, told without it.

    Raises:
        ValueError: a side under 64 px, or sides of a ratio above 8.
    """
    if subset.control_fit == "target":
        return bucket
    if subset.control_fit == "area":
        width, height = reference_size(*size, None)
        sides = subset.control_resolution or subset.resolution
        scale = math.sqrt(sides[0] * sides[1] / (width * height))
        width, height = int(width * scale), int(height * scale)
    else:
        width, height = reference_size(*size, _max_pixels(subset, num_references, reference_sides))
    return max(_floor(width), PIXELS_PER_LATENT), max(_floor(height), PIXELS_PER_LATENT)


def _max_pixels(subset: SubsetConfig, num_references: int, reference_sides: tuple[int, int]) -> int | None:
    """The area to which references are scaled down."""
    if subset.control_fit == "original":
        sides = subset.control_resolution
        return None if sides is None else sides[0] * sides[1]
    assert subset.control_fit == "inference"
    single, several = reference_sides
    return (single if num_references == 1 else several) ** 2


def _scale(image: Image.Image, bucket: tuple[int, int], how: Image.Resampling) -> Image.Image:
    if image.size == bucket:
        return image
    return image.resize(bucket, how, box=crop_box(image.size, bucket))


def _floor(side: int) -> int:
    return side // PIXELS_PER_LATENT * PIXELS_PER_LATENT
