"""Nodes that give latents to start from: an empty one of a size, and that of a picture."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.images import MIN_SIDE
from ..flux2_core.latents import NUM_LATENT_CHANNELS
from ..flux2_core.pipeline import SamplingConfig
from ..flux2_core.variants import VARIANTS
from . import host
from .native_encoders import BridgedVAE
from .sampling import MAX_IMAGES, MAX_SIDE
from .strips import ENCODE_TOOLTIP

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
        "Chooses the size of a picture by aspect ratio and megapixels. Connect the latent to FLUX.2 Sample or a native "
        "sampler; width and height go where only they are asked for."
    )
    SEARCH_ALIASES = ("empty latent image", "aspect ratio", "resolution", "megapixels", "image size", "width height")
    FUNCTION = "make"
    RETURN_TYPES = ("LATENT", "INT", "INT")
    RETURN_NAMES = ("latent", "width", "height")
    OUTPUT_TOOLTIPS = (
        "Zeros [batch, 128, height / 16, width / 16], as of the native Empty Flux 2 Latent.",
        "Width in pixels, for FLUX.2 Sample and FLUX.2 Sigmas.",
        "Height in pixels, for FLUX.2 Sample and FLUX.2 Sigmas.",
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
                        "tooltip": "Latents in the batch: pictures made at once, from one seed.",
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
        host.show_text(f"{width}x{height} px, {width * height / PIXELS_PER_MEGAPIXEL:.3g} megapixels", unique_id)
        shape = (config.num_images, NUM_LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        return ({"samples": torch.zeros(shape)}, width, height)


class EncodeImage:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Encodes pictures to latents, for image to image and inpainting in FLUX.2 Sample or a native sampler. For "
        "edits by prompt use FLUX.2 Encode Reference."
    )
    SEARCH_ALIASES = ("vae encode", "image to latent", "img2img", "image to image", "inpaint", "encode")
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Native latents [B, 128, height / 16, width / 16], with the mask where there is one.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ae": ("FLUX2_AE", {"tooltip": "The autoencoder that belongs to the DiT."}),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": f"One picture or a batch, with sides of at least {MIN_SIDE} px; the centre is "
                        f"cropped to multiples of {PIXELS_PER_LATENT}. Transparency becomes white."
                    },
                ),
                "tiling": (
                    "BOOLEAN",
                    {
                        "default": SamplingConfig.tile_autoencoder,
                        "tooltip": ENCODE_TOOLTIP,
                    },
                ),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "What is made anew (white) and what stays (black), for the whole picture before the "
                        "crop. The picture below it is kept: denoise 1 makes the inside wholly anew."
                    },
                ),
            },
        }

    @classmethod
    def encode(
        cls, ae: Flux2Autoencoder, image: Tensor, tiling: bool, mask: Tensor | None = None
    ) -> tuple[dict[str, Tensor]]:
        if image.dim() != 4 or image.shape[-1] not in (3, 4):
            raise ValueError(
                f"an image has shape {tuple(image.shape)}; it must be [batch, height, width, 3 or 4 channels]"
            )
        height, width = image.shape[1:3]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"the image is {width}x{height} px; each side must be at least {MIN_SIDE} px, scale it up")
        colours, alpha = image[..., :3], image[..., 3:]
        if alpha.shape[-1]:
            colours = colours * alpha + (1 - alpha)
        vae = BridgedVAE(ae)
        latent = {"samples": vae.encode_tiled(colours) if tiling else vae.encode(colours)}
        if mask is not None:
            masks = F.interpolate(mask.float().reshape(-1, 1, *mask.shape[-2:]), size=(height, width), mode="bilinear")
            latent["noise_mask"] = vae.vae_encode_crop_pixels(masks.movedim(1, -1)).movedim(-1, 1).clamp(0, 1)
        return (latent,)


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
