"""Flow matching as FLUX.2 is trained (pure functions).

``x_sigma = (1 - sigma) x0 + sigma noise``; the network learns ``noise - x0``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..flux2_core.dit import Flux2DiT
from ..flux2_core.latents import REFERENCE_TIME_STEP, image_ids, latents_to_tokens, text_ids

TRAINING_GUIDANCE = 1.0
"""What a guidance embedder is fed in training: the plain, unguided velocity is what the data shows."""

MAX_PRODUCT_TOKENS = 1024
"""Up to so many tokens attention is done by products on a CPU: its weights are tokens x tokens for every head."""


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents at noise level sigma ``[B]``, 0 clean and 1 pure noise."""
    sigma = sigma.view(-1, *[1] * (latents.dim() - 1))
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the DiT learns to predict."""
    return noise - latents


def velocity_losses(
    dit: Flux2DiT,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    references: Sequence[Tensor] = (),
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity for each sample, ``[B]``, fp32.

    Args:
        dit: the network; its activations run in its own dtype. A guidance embedder is fed `TRAINING_GUIDANCE`.
        latents: ``[B, 128, h, w]``, clean.
        text: ``[B, L, C]``.
        noise: as `latents`.
        sigma: ``[B]``; the network is told exactly this number.
        references: latents ``[B, 128, h_i, w_i]``, in the order in which captions count them.
        mask: ``[B, h, w]``, weight of each place; the mean is weighted, so a small mask does not train slower.
    """
    noisy, target = add_noise(latents, noise, sigma), latents_to_tokens(velocity_target(latents, noise))
    tokens = torch.cat([latents_to_tokens(picture) for picture in (noisy, *references)], dim=1)
    sizes = tuple((picture.shape[-2], picture.shape[-1]) for picture in (latents, *references))
    ids, words = positions(sizes, text.shape[1], dit.device)
    guidance = torch.full_like(sigma, TRAINING_GUIDANCE) if dit.config.has_guidance_embedder else None
    velocity = dit(tokens.to(dit.dtype), ids, text.to(dit.dtype), words, sigma, guidance)
    errors = (velocity[:, : target.shape[1]].float() - target).square().mean(dim=-1)  # [B, h * w]
    if mask is None:
        return errors.mean(dim=1)
    weights = mask.flatten(1)
    return (errors * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(torch.finfo(weights.dtype).eps)


@contextmanager
def training_attention(dit: Flux2DiT, num_tokens: int) -> Iterator[None]:
    """Forward and backward inside of the block use the attention that trains fastest for so many tokens.

    The backward pass of torch's flash attention for CPUs takes a quarter of a step in 16 bits, products 3 %.
    """
    if dit.device.type == "cpu" and dit.dtype.itemsize == 2 and num_tokens <= MAX_PRODUCT_TOKENS:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@lru_cache(maxsize=64)
def positions(sizes: tuple[tuple[int, int], ...], num_words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position ids of image tokens ``[N, 4]`` and of text ``[num_words, 4]``, kept on the device for later steps.

    Args:
        sizes: height and width in latents of the picture, then of its references.
    """
    with torch.inference_mode(False):
        times = range(0, REFERENCE_TIME_STEP * len(sizes), REFERENCE_TIME_STEP)
        ids = torch.cat([image_ids(height, width, time) for (height, width), time in zip(sizes, times, strict=True)])
        return ids.to(device), text_ids(num_words).to(device)
