"""Quick pictures of latents while sampling: a linear map from the 32 latent channels to RGB, without the decoder.

The map is fitted on the autoencoder that is loaded, by least squares over smooth colour fields, so it fits every
autoencoder and needs no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .autoencoder import Flux2Autoencoder, unpack_2x2
from .images import tensor_to_images

NUM_FIELDS = 8
FIELD_SIZE = 128
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
    """Fits the factors: eight colour fields of 128x128 px are encoded and regressed on their 8x8 means."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_FIELDS, 3, 5, 5, generator=generator)
    fields = F.interpolate(coarse, size=(FIELD_SIZE, FIELD_SIZE), mode="bicubic", align_corners=True).clamp(0, 1)
    fields = fields * 2 - 1
    latents = torch.cat([autoencoder.encode(field[None]) for field in fields])
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
