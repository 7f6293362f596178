"""Native LATENT as what FLUX.2 Sample starts from: a size, pictures, a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT
from ..flux2_core.latents import NUM_LATENT_CHANNELS, seed_noise
from ..flux2_core.pipeline import SamplingConfig, check_latents

Latent = dict[str, Any]
"""Native LATENT: ``samples`` [B, 128, H/16, W/16], and where nodes set them ``noise_mask`` and ``batch_index``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StartingPoint:
    """What a native LATENT asks a sampler for."""

    settings: dict[str, Any]
    """The widgets of FLUX.2 Sample, with size and number of pictures as the latent has them."""
    samples: Tensor
    """``[1 or num_images, 128, H/16, W/16]``, fp32."""
    mask: Tensor | None
    """``[1 or num_images, 1, H/16, W/16]`` in 0..1, 1 where the picture is made anew."""
    noise_indices: list[int] | None
    """Which pictures of the seed these are; None: the first ones."""

    def noise(self, sampling: SamplingConfig) -> Tensor | None:
        """The noise of these pictures, None where it is that of the seed's first ones."""
        if self.noise_indices is None:
            return None
        assert sampling.width and sampling.height
        noise = seed_noise(sampling.seed, max(self.noise_indices) + 1, sampling.height, sampling.width)
        return noise[self.noise_indices]

    def result(self, latent: Latent, samples: Tensor) -> Latent:
        """The LATENT that goes on: what nodes have set on the one before stays with it."""
        kept = {**latent, "samples": samples}
        return kept if self.noise_indices is None else {**kept, "batch_index": self.noise_indices}


def read_latent(latent: Latent, settings: Mapping[str, Any]) -> StartingPoint:
    """What to start from, with the widgets of FLUX.2 Sample where they agree with it.

    Args:
        settings: the widgets; a width or height of 0 follows the latent, and one picture stands for all of its batch.

    Raises:
        ValueError: latents of another model, a size or number that is set otherwise, an empty latent that is to be
            changed in part only, or a mask that fits nothing.
    """
    samples = latent["samples"]
    if not isinstance(samples, Tensor):
        raise ValueError("latent holds several latents of different sizes; connect a picture's")
    check_latents(samples, NUM_LATENT_CHANNELS, "latent")
    if not samples.any() and settings["strength"] != 1:
        raise ValueError(
            f"denoise is {settings['strength']:g}, but the latent is empty; connect an encoded picture, or set it to 1"
        )
    sides = {"width": samples.shape[-1] * PIXELS_PER_LATENT, "height": samples.shape[-2] * PIXELS_PER_LATENT}
    for name, side in sides.items():
        if settings[name] not in (0, side):
            raise ValueError(f"{name} is {settings[name]}, but that of the latent is {side} px; set {name} to 0")
    batch, num_images = samples.shape[0], settings["num_images"]
    if batch > 1 and num_images not in (1, batch):
        raise ValueError(
            f"num_images is {num_images}, but the latent is a batch of {batch}; set num_images to 1, which stands for "
            "all of them"
        )
    num_images = max(batch, num_images)
    return StartingPoint(
        settings={**settings, **sides, "num_images": num_images},
        samples=samples.float(),
        mask=_read_mask(latent.get("noise_mask"), samples, num_images),
        noise_indices=_noise_indices(latent.get("batch_index"), batch, num_images),
    )


def _read_mask(mask: Tensor | None, samples: Tensor, num_images: int) -> Tensor | None:
    """A native mask ``[H, W]``, ``[B, H, W]`` or ``[B, 1, H, W]`` of any size, brought to that of the latents."""
    if mask is None:
        return None
    if mask.dim() not in (2, 3, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        raise ValueError(f"the mask of the latent has shape {list(mask.shape)}; it must be [batch, height, width]")
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if mask.shape[0] not in (1, num_images):
        raise ValueError(f"the latent has {mask.shape[0]} masks for {num_images} pictures; give one, or one for each")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("the mask of the latent has values outside of 0..1; 1 makes anew, 0 keeps")
    return F.interpolate(mask, size=samples.shape[-2:], mode="bilinear").clamp(0, 1)


def _noise_indices(batch_index: Any, batch: int, num_images: int) -> list[int] | None:
    """Native nodes that cut or repeat batches tell with it which noise a latent keeps."""
    if batch_index is None:
        return None
    indices = [int(index) for index in batch_index]
    if len(indices) != batch or min(indices) < 0:
        raise ValueError(f"the latent's batch_index is {indices} for a batch of {batch}; it must number each of them")
    return indices if num_images == batch else torch.arange(indices[0], indices[0] + num_images).tolist()
