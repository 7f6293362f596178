"""What one forward pass of training is given, made on the CPU beside the computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import Sample
from .timesteps import loss_weights, noise_generator, schedule_steps, sigmas_from_uniform, uniform_numbers

if TYPE_CHECKING:
    from ..flux2_core.variants import Variant
    from .batches import Draw
    from .config import TrainConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """Samples of one shape, with what was drawn for them."""

    latents: Tensor
    """``[B, 128, h, w]``, fp32."""
    references: tuple[Tensor, ...]
    """``[B, 128, h_i, w_i]`` each, fp32."""
    text: Tensor
    """``[B, L, C]``"""
    mask: Tensor | None
    """``[B, h, w]``, fp32."""
    noise: Tensor
    """As `latents`."""
    sigma: Tensor
    """``[B]``, fp32."""
    weights: Tensor
    """``[B]``, fp32: of the losses."""

    @property
    def num_tokens(self) -> int:
        """Of one sample: picture, references and text."""
        pictures = (self.latents, *self.references)
        return sum(picture.shape[-2] * picture.shape[-1] for picture in pictures) + self.text.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        """A copy with ``function`` applied to every tensor."""
        return TrainBatch(
            latents=function(self.latents),
            references=tuple(map(function, self.references)),
            text=function(self.text),
            mask=None if self.mask is None else function(self.mask),
            noise=function(self.noise),
            sigma=function(self.sigma),
            weights=function(self.weights),
        )

    def to(self, device: torch.device) -> TrainBatch:
        """A copy on a device; from pinned memory the host does not wait for it."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class BatchMaker:
    """Makes batches of samples; what it draws follows from the seed and the draws' numbers alone.

    Args:
        pinned: into pinned memory, for copies to a GPU that the host does not wait for.
    """

    def __init__(self, config: TrainConfig, variant: Variant, *, pinned: bool) -> None:
        self.seed, self.timesteps, self.pinned = config.seed, config.timesteps, pinned
        self.num_schedule_steps = schedule_steps(variant)

    def __call__(self, group: Sequence[tuple[Draw, Sample]]) -> TrainBatch:
        """The batch of samples of one shape."""
        indices, samples = [draw.index for draw, _ in group], [sample for _, sample in group]
        uniform = uniform_numbers(indices, seed=self.seed, num_strata=self.timesteps.num_timestep_buckets)
        return self.make(samples, indices, uniform)

    def make(self, samples: Sequence[Sample], indices: Sequence[int], uniform: Tensor) -> TrainBatch:
        """The batch of samples of one shape.

        Args:
            indices: numbers that the noise follows from.
            uniform: quantiles of the noise levels ``[B]``, fp64.
        """
        latents = torch.stack([sample.latents for sample in samples])
        noise = [torch.randn(latents.shape[1:], generator=noise_generator(self.seed, index, 0)) for index in indices]
        num_tokens = latents.shape[-2] * latents.shape[-1]
        sigma = sigmas_from_uniform(uniform, num_tokens, self.timesteps, self.num_schedule_steps)
        mask = None
        if any(sample.mask is not None for sample in samples):
            whole = torch.ones(latents.shape[-2:])
            mask = torch.stack([whole if sample.mask is None else sample.mask for sample in samples])
        references = zip(*(sample.references for sample in samples), strict=True)
        batch = TrainBatch(
            latents=latents,
            references=tuple(torch.stack(same) for same in references),
            text=torch.stack([sample.text for sample in samples]),
            mask=mask,
            noise=torch.stack(noise),
            sigma=sigma,
            weights=loss_weights(sigma, self.timesteps),
        )
        return batch.map(Tensor.pin_memory) if self.pinned else batch
