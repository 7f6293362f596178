"""Quick pictures of latents while sampling: a linear map from the 32 latent channels to RGB, without the decoder.

The map is fitted on the autoencoder that is loaded, by least squares over plain, split and smooth colour fields, so it
suits every autoencoder and needs no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .autoencoder import Flux2Autoencoder, unpack_2x2
from .images import tensor_to_images

FIELD_SIZE = 64
FIELDS = ((32, 1, "nearest"), (32, 2, "nearest"), (12, 2, "bilinear"))
"""Number of colour fields, colours along a side, and how they blend: plain areas, edges, slopes."""
RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PreviewFactors:
    """``rgb = latents @ weight + bias`` for unpacked, denormalised latents."""

    weight: Tensor
    """``[32, 3]``."""
    bias: Tensor
    """``[3]``."""


@torch.inference_mode()
def fit_preview(autoencoder: Flux2Autoencoder) -> PreviewFactors:
    """Fits the factors: 76 colour fields of 64x64 px are encoded and regressed on their 8x8 means."""
    generator = torch.Generator().manual_seed(0)
    fields = torch.cat(
        [
            F.interpolate(torch.rand(number, 3, side, side, generator=generator), size=FIELD_SIZE, mode=mode)
            for number, side, mode in FIELDS
        ]
    )
    fields = fields * 2 - 1
    latents = torch.cat([autoencoder.encode(batch) for batch in fields.split(4)])
    z = unpack_2x2(autoencoder.denormalize(latents)).cpu()
    wanted = F.avg_pool2d(fields, 8)
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
    targets = wanted.permute(0, 2, 3, 1).reshape(-1, 3).double()
    mean, target_mean = rows.mean(0), targets.mean(0)
    centered = rows - mean
    gram = centered.T @ centered + RIDGE * len(rows) * centered.var() * torch.eye(z.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centered.T @ (targets - target_mean))
    return PreviewFactors(weight=weight.float(), bias=(target_mean - mean @ weight).float())


@torch.inference_mode()
def preview_images(latents: Tensor, autoencoder: Flux2Autoencoder, factors: PreviewFactors) -> list[Image.Image]:
    """Latents ``[B, 128, h, w]`` to RGB pictures of 2h x 2w px."""
    device = autoencoder.decoder.conv_in.weight.device
    z = unpack_2x2(autoencoder.denormalize(latents.to(device, torch.float32))).cpu()
    rgb = torch.einsum("bchw,cr->brhw", z, factors.weight) + factors.bias.view(1, 3, 1, 1)
    return tensor_to_images(rgb)
