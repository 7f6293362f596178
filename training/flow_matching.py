"""Flow matching as FLUX.2 is trained (pure functions).

``x_sigma = (1 - sigma) x0 + sigma noise``; the network learns ``noise - x0``.
"""

from __future__ import annotations

from torch import Tensor


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents at noise level sigma ``[B]``, 0 clean and 1 pure noise."""
    sigma = sigma.view(-1, *[1] * (latents.dim() - 1))
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the DiT learns to predict."""
    return noise - latents
