"""The node that gives a picture its size."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT
from ..flux2_core.images import MIN_SIDE
from ..flux2_core.latents import NUM_LATENT_CHANNELS
from ..flux2_core.pipeline import SamplingConfig
from ..flux2_core.variants import VARIANTS
from . import host
from .sampling import MAX_IMAGES, MAX_SIDE

CUSTOM = "custom"
"""Combo entry that takes width and height as they are."""
LANDSCAPE = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (21, 9))
ASPECTS: dict[str, tuple[int, int]] = {
    f"{width}:{height}": (width, height)
    for width, height in (*LANDSCAPE, *((height, width) for width, height in LANDSCAPE[1:]))
}
"""Width and height of the combo's entries."""
PIXELS_PER_MEGAPIXEL = 1024 * 1024
MAX_MEGAPIXELS = 16.0


class EmptyLatent:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Chooses the size of a picture by aspect ratio and megapixels. Connect width and height to FLUX.2 Sample; the "
        "latent is for native samplers."
    )
    SEARCH_ALIASES = ("empty latent image", "aspect ratio", "resolution", "megapixels", "image size", "width height")
    FUNCTION = "make"
    RETURN_TYPES = ("LATENT", "INT", "INT")
    RETURN_NAMES = ("latent", "width", "height")
    OUTPUT_TOOLTIPS = (
        "Zeros [batch, 128, height / 16, width / 16], as of the native Empty Flux 2 Latent.",
        "Width in pixels, for FLUX.2 Sample.",
        "Height in pixels, for FLUX.2 Sample.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": VARIANTS["dev"].default_size, "min": MIN_SIDE, "max": MAX_SIDE, "step": PIXELS_PER_LATENT}
        size = f"in pixels, a multiple of {PIXELS_PER_LATENT}. Used where aspect_ratio is {CUSTOM}."
        return {
            "required": {
                "aspect_ratio": (
                    [*ASPECTS, CUSTOM],
                    {
                        "default": "1:1",
                        "tooltip": f"Width to height. {CUSTOM}: take width and height below, not megapixels.",
                    },
                ),
                "megapixels": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.01,
                        "max": MAX_MEGAPIXELS,
                        "step": 0.01,
                        "tooltip": "Area of the picture; 1 is that of 1024x1024 px. FLUX.2 is made for up to 4. Sides "
                        f"are rounded to multiples of {PIXELS_PER_LATENT}.",
                    },
                ),
                "width": ("INT", {**side, "tooltip": f"Width {size}"}),
                "height": ("INT", {**side, "tooltip": f"Height {size}"}),
                "batch_size": (
                    "INT",
                    {
                        "default": SamplingConfig.num_images,
                        "min": 1,
                        "max": MAX_IMAGES,
                        "tooltip": "Latents in the batch. FLUX.2 Sample has num_images for it.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        aspect_ratio: str | None = None,
        megapixels: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if aspect_ratio == CUSTOM:
                SamplingConfig(width=width, height=height)
            elif aspect_ratio is not None and megapixels is not None:
                picture_size(aspect_ratio, megapixels)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def make(
        cls,
        aspect_ratio: str,
        megapixels: float,
        width: int,
        height: int,
        batch_size: int,
        unique_id: str | None = None,
    ) -> tuple[dict[str, Tensor], int, int]:
        if aspect_ratio != CUSTOM:
            width, height = picture_size(aspect_ratio, megapixels)
        config = SamplingConfig(width=width, height=height, num_images=batch_size)
        host.show_text(f"{width}x{height} px, {width * height / PIXELS_PER_MEGAPIXEL:.2f} megapixels", unique_id)
        shape = (config.num_images, NUM_LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        return ({"samples": torch.zeros(shape)}, width, height)


def picture_size(aspect_ratio: str, megapixels: float) -> tuple[int, int]:
    """Width and height in pixels, the multiples of 16 that come nearest to an aspect ratio and an area.

    Args:
        aspect_ratio: a key of `ASPECTS`.
        megapixels: area in units of 1024x1024 pixels.

    Raises:
        ValueError: the aspect ratio is unknown, or the picture would be too small or too large.
    """
    if aspect_ratio not in ASPECTS:
        raise ValueError(f"unknown aspect_ratio {aspect_ratio!r}; known: {', '.join(ASPECTS)}, {CUSTOM}")
    if not 0 < megapixels <= MAX_MEGAPIXELS:
        raise ValueError(f"megapixels is {megapixels}; it must lie above 0 and be at most {MAX_MEGAPIXELS:g}")
    wide, high = ASPECTS[aspect_ratio]
    scale = math.sqrt(megapixels * PIXELS_PER_MEGAPIXEL / (wide * high))
    width, height = (round(side * scale / PIXELS_PER_LATENT) * PIXELS_PER_LATENT for side in (wide, high))
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{megapixels:g} megapixels at {aspect_ratio} are {width}x{height} px; each side must be at least "
            f"{MIN_SIDE} px, so raise megapixels"
        )
    return width, height
