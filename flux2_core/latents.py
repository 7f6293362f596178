"""Latents to tokens and back, position ids, noise (pure functions).

Latents are ``[B, 128, h, w]``; tokens are ``[B, h * w, 128]`` in row-major order. A position id is (t, h, w, l):
t = 0 for the picture and 10, 20, ... for references; l counts text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .autoencoder import PIXELS_PER_LATENT

REFERENCE_TIME_STEP = 10
"""Reference i (from 0) sits at t = 10 * (i + 1)."""
NUM_LATENT_CHANNELS = 128
MAX_SEED = 2**64 - 1


def latents_to_tokens(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` to ``[B, h * w, C]``."""
    return rearrange(latents, "b c h w -> b (h w) c")


def tokens_to_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[B, h * w, C]`` to ``[B, C, h, w]``."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)


def image_ids(height: int, width: int, time: int = 0) -> Tensor:
    """Position ids ``[height * width, 4]`` of a latent grid, row-major."""
    axes = torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0])
    return torch.cartesian_prod(*axes)


def text_ids(num_tokens: int) -> Tensor:
    """Position ids ``[num_tokens, 4]`` of text: only l counts."""
    zero = torch.tensor([0])
    return torch.cartesian_prod(zero, zero, zero, torch.arange(num_tokens))


def reference_tokens(references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All references as one run of tokens.

    Args:
        references: latents ``[B, 128, h_i, w_i]``, sizes may differ.

    Returns:
        tokens ``[B, sum(h_i * w_i), 128]`` and their ids ``[sum(h_i * w_i), 4]``.
    """
    tokens = torch.cat([latents_to_tokens(latents) for latents in references], dim=1)
    ids = [
        image_ids(latents.shape[-2], latents.shape[-1], time=REFERENCE_TIME_STEP * (index + 1))
        for index, latents in enumerate(references)
    ]
    return tokens, torch.cat(ids)


def seed_noise(seed: int, num_images: int, height: int, width: int) -> Tensor:
    """Noise ``[num_images, 128, height / 16, width / 16]``, fp32 on the CPU: the same for a seed on every machine.

    Args:
        seed: 0 to 2**64 - 1.
        num_images: image i of the batch takes the i-th sample of the seed.
        height: picture height in pixels.
        width: picture width in pixels.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed is {seed}; it must lie in 0..{MAX_SEED}")
    # torch accepts seeds from -2**63 on and reads the upper half of the range as negative numbers.
    generator = torch.Generator("cpu").manual_seed(seed if seed < 2**63 else seed - 2**64)
    shape = (num_images, NUM_LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=generator)
