"""Flow matching as FLUX.2 is trained (pure functions).

``x_sigma = (1 - sigma) x0 + sigma noise``; the network learns ``noise - x0``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flux2_core.dit import Flux2DiT
from ..flux2_core.latents import image_ids, latents_to_tokens, reference_tokens, text_ids

TRAINING_GUIDANCE = 1.0
"""What a guidance embedder is fed in training: the plain, unguided velocity is what the data shows."""


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
    height, width = latents.shape[-2:]
    device, dtype = dit.device, dit.dtype
    noisy, target = add_noise(latents, noise, sigma), latents_to_tokens(velocity_target(latents, noise))
    tokens, ids = latents_to_tokens(noisy), image_ids(height, width)
    if references:
        extra_tokens, extra_ids = reference_tokens(references)
        tokens, ids = torch.cat((tokens, extra_tokens), dim=1), torch.cat((ids, extra_ids))
    guidance = torch.full_like(sigma, TRAINING_GUIDANCE) if dit.config.has_guidance_embedder else None
    velocity = dit(
        tokens.to(dtype), ids.to(device), text.to(dtype), text_ids(text.shape[1]).to(device), sigma, guidance
    )
    errors = (velocity[:, : target.shape[1]].float() - target).square().mean(dim=-1)  # [B, h * w]
    if mask is None:
        return errors.mean(dim=1)
    weights = mask.flatten(1)
    return (errors * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(torch.finfo(weights.dtype).eps)
