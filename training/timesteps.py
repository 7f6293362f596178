"""At which noise levels a DiT is trained, and how much each of them counts (pure functions).

A noise level is one uniform number sent through the inverse distribution function of the chosen density. That number
depends on the seed and on the position of the draw in the whole run alone, so that neither the number of processes
nor a resume changes it, and stratification is exact. Everything is computed in fp64, each sample by itself.

Names of settings are those of musubi-tuner. Sources: Esser et al. 2024 (arXiv 2403.03206) for logit-normal, mode and
cosmap; `flux2_core.schedule` for the shift of FLUX.2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..flux2_core.schedule import empirical_mu

if TYPE_CHECKING:
    from ..flux2_core.variants import Variant

TimestepSampling = Literal[
    "flux2", "flux2_shift", "shift", "uniform", "sigmoid", "logit_normal", "mode", "logsnr", "sigma"
]
Weighting = Literal["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"]

MIN_WEIGHTED_SIGMA = 0.05
"""`sigma_sqrt` takes lower noise levels for this one: a weight is 400 at most, where 1 / sigma^2 has no bound."""
MAX_MODE_SCALE = 2 / (math.pi - 2)
"""Above it, or below -1, the mode density would not be one: its map of uniform numbers turns back."""
MAX_TIMESTEP_BUCKETS = 65536
BASE_NUM_STEPS = 50
"""Steps of the schedule whose density stands for a distilled variant: its own few steps are no density to train on."""


@dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """The density of noise levels, and their weights in the loss."""

    timestep_sampling: TimestepSampling = "flux2"
    """N is a standard normal number, U a uniform one, `shift(x, k) = k x / (1 + (k - 1) x)`, n the output tokens:

    - flux2: shift(U, exp(empirical mu of n)), how often the sampler visits each noise level at this very size
    - flux2_shift: shift(sigmoid(sigmoid_scale N), exp(mu)), mu on the line through (256, 0.5) and (4096, 1.15) at n
    - shift: shift(sigmoid(sigmoid_scale N), discrete_flow_shift)
    - uniform: U
    - sigmoid: sigmoid(sigmoid_scale N)
    - logit_normal: sigmoid(logit_mean + logit_std N)
    - mode: the density of Esser et al., section 3.1, with mode_scale
    - logsnr: sigmoid(-(logit_mean + logit_std N) / 2)
    - sigma: shift(1 - V, discrete_flow_shift), where weighting_scheme gives V: sigmoid(logit_mean + logit_std N) for
      logit_normal, the mode density for mode, else U. musubi-tuner rounds to 1000 levels, here they are continuous.
    """
    discrete_flow_shift: float = 1.0
    """k of shift and sigma, above 0; more than 1 means more noise."""
    sigmoid_scale: float = 1.0
    """Width of sigmoid, shift and flux2_shift, above 0."""
    logit_mean: float = 0.0
    """Of logit_normal, logsnr, and sigma with logit_normal."""
    logit_std: float = 1.0
    """As logit_mean, above 0."""
    mode_scale: float = 1.29
    """Of mode, -1 to 1.75; 0 is uniform, more prefers the middle, less prefers the ends."""
    weighting_scheme: Weighting = "none"
    """Weights of the loss: none (1), sigma_sqrt (1 / sigma^2), cosmap (2 / (pi (1 - 2 sigma + 2 sigma^2))).
    logit_normal and mode are densities, for timestep_sampling "sigma" alone."""
    min_sigma: float = 0.0
    """Lowest noise level, 0..1: musubi-tuner's min_timestep / 1000."""
    max_sigma: float = 1.0
    """Highest noise level, 0..1: musubi-tuner's max_timestep / 1000. Both bounds are noise levels for every density;
    musubi-tuner counts from the noisy end where timestep_sampling is "sigma"."""
    preserve_distribution_shape: bool = False
    """Between the bounds: cut the density off there, instead of squeezing the whole of it in between."""
    num_timestep_buckets: int | None = None
    """Stratified sampling: of every so many consecutive draws each falls into another quantile of the density, in
    random order. None: draws are independent."""

    def __post_init__(self) -> None:
        for name, kind in (("timestep_sampling", TimestepSampling), ("weighting_scheme", Weighting)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"logit_mean is {self.logit_mean}; it must be a finite number")
        if not -1 <= self.mode_scale <= MAX_MODE_SCALE:
            raise ValueError(f"mode_scale is {self.mode_scale}; it must be between -1 and {MAX_MODE_SCALE:.5f}")
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise ValueError(
                f"noise levels go from {self.min_sigma} to {self.max_sigma} (min_timestep and max_timestep / 1000); "
                "they must be within 0..1, the lower one first"
            )
        buckets = self.num_timestep_buckets
        if buckets is not None and not 2 <= buckets <= MAX_TIMESTEP_BUCKETS:
            raise ValueError(f"num_timestep_buckets is {buckets}; give 2 to {MAX_TIMESTEP_BUCKETS}, or leave it out")
        self._refuse_what_has_no_effect()

    @property
    def density(self) -> str:
        """What the settings of a density belong to: timestep_sampling, or for "sigma" what weighting_scheme says."""
        if self.timestep_sampling != "sigma":
            return self.timestep_sampling
        return self.weighting_scheme if self.weighting_scheme in ("logit_normal", "mode") else "uniform"

    def _refuse_what_has_no_effect(self) -> None:
        sampling = self.timestep_sampling
        if self.weighting_scheme in ("logit_normal", "mode") and sampling != "sigma":
            raise ValueError(
                f"weighting_scheme {self.weighting_scheme} has no effect with timestep_sampling {sampling}: it is a "
                f'density; give timestep_sampling "{self.weighting_scheme}" or "sigma"'
            )
        used_by = {
            "discrete_flow_shift": sampling in ("shift", "sigma"),
            "sigmoid_scale": sampling in ("sigmoid", "shift", "flux2_shift"),
            "logit_mean": self.density in ("logit_normal", "logsnr"),
            "logit_std": self.density in ("logit_normal", "logsnr"),
            "mode_scale": self.density == "mode",
            "preserve_distribution_shape": (self.min_sigma, self.max_sigma) != (0, 1),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and not used_by.get(field.name, True):
                raise ValueError(
                    f"{field.name} is {value}, which has no effect with timestep_sampling {sampling} and "
                    f"weighting_scheme {self.weighting_scheme} between sigma {self.min_sigma} and {self.max_sigma}; "
                    "leave it out or choose another timestep_sampling"
                )


def schedule_steps(variant: Variant) -> int:
    """Steps of the sampler whose density `flux2` takes: the variant's own, for a distilled one those of its base."""
    return BASE_NUM_STEPS if variant.distilled else variant.num_steps


def sigmas_from_uniform(u: Tensor, num_tokens: Tensor | int, config: TimestepConfig, num_steps: int) -> Tensor:
    """Noise levels ``[B]``, fp32: the inverse distribution function of the density, rising with ``u``.

    Args:
        u: ``[B]``, fp64, uniform in 0..1 with neither end.
        num_tokens: ``[B]`` or one for all: output image tokens of each sample, height x width in latents.
        num_steps: of the schedule that `flux2` takes its density from; see `schedule_steps`.

    Raises:
        ValueError: the density has nothing between the bounds.
    """
    assert u.dim() == 1 and u.dtype == torch.float64 and bool(((u > 0) & (u < 1)).all())
    locations = _locations(u, num_tokens, config, num_steps)
    low, high = config.min_sigma, config.max_sigma
    if config.preserve_distribution_shape:
        first, last = (_cumulative(bound, locations, config) for bound in (low, high))
        if bool((last - first < 1e-9).any()):
            raise ValueError(
                f"timestep_sampling {config.timestep_sampling} has practically no noise levels between {low} and "
                f"{high}; choose wider bounds or leave out preserve_distribution_shape"
            )
        sigma = _quantile(first + u * (last - first), locations, config).clamp(low, high)
    else:
        sigma = low + (high - low) * _quantile(u, locations, config)
    return sigma.float()


def _locations(u: Tensor, num_tokens: Tensor | int, config: TimestepConfig, num_steps: int) -> Tensor:
    """What is added to the logit of a noise level ``[B]``: a shift by k adds log(k)."""
    tokens = torch.as_tensor(num_tokens).flatten().tolist()
    match config.timestep_sampling:
        case "flux2":
            values = [empirical_mu(count, num_steps) for count in tokens]
        case "flux2_shift":
            values = [0.5 + (count - 256) * (1.15 - 0.5) / (4096 - 256) for count in tokens]
        case "shift" | "sigma":
            values = [math.log(config.discrete_flow_shift)] * len(tokens)
        case _:
            values = [0.0] * len(tokens)
    return torch.tensor(values, dtype=torch.float64, device=u.device).expand(u.shape)


def _quantile(u: Tensor, locations: Tensor, config: TimestepConfig) -> Tensor:
    """The inverse distribution function over the whole of 0..1."""
    match config.density:
        case "logit_normal":
            # "sigma" counts from the noisy end, which turns the sign of the mean.
            sign = -1 if config.timestep_sampling == "sigma" else 1
            logits = sign * config.logit_mean + config.logit_std * torch.special.ndtri(u)
        case "logsnr":
            logits = (config.logit_std * torch.special.ndtri(u) - config.logit_mean) / 2
        case "sigmoid" | "shift" | "flux2_shift":
            logits = config.sigmoid_scale * torch.special.ndtri(u)
        case "mode":
            # Symmetric: counted from the noisy end it is the same density.
            logits = (u - config.mode_scale * (torch.sin(math.pi / 2 * u).square() - u)).logit()
        case _:
            logits = u.logit()
    return torch.sigmoid(logits + locations)


def _cumulative(sigma: float, locations: Tensor, config: TimestepConfig) -> Tensor:
    """The distribution function ``[B]`` at one noise level: the inverse of `_quantile`, by bisection."""
    low, high = torch.zeros_like(locations), torch.ones_like(locations)
    for _ in range(60):  # more than the bits of a number in fp64
        middle = (low + high) / 2
        below = _quantile(middle, locations, config) < sigma
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def loss_weights(sigma: Tensor, config: TimestepConfig) -> Tensor:
    """The factor of each sample's loss ``[B]``, fp32, for its noise level ``[B]``; not scaled to a mean of 1."""
    assert sigma.dim() == 1
    sigma = sigma.float()
    match config.weighting_scheme:
        case "sigma_sqrt":
            return sigma.clamp(min=MIN_WEIGHTED_SIGMA).square().reciprocal()
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        case _:
            return torch.ones_like(sigma)


def uniform_numbers(draws: Sequence[int], *, seed: int, num_strata: int | None = None) -> Tensor:
    """Uniform numbers ``[B]`` in 0..1 with neither end, fp64; each depends on the seed and its own draw alone.

    Args:
        draws: positions in the whole run: optimiser step x samples of one step (over all processes and accumulated
            batches) + position in the step.
        num_strata: if given, the draws of every window ``[k num_strata, (k + 1) num_strata)`` hit each of as many
            equal parts of 0..1 exactly once, in an order of their own for each window.
    """
    numbers = []
    for draw in draws:
        # 52 bits and a half: the largest number that comes out is still below 1 in fp64.
        number = ((_mix("timestep", seed, draw) >> 12) + 0.5) / 2**52
        if num_strata is not None:
            window, position = divmod(draw, num_strata)
            number = (_stratum_order(seed, window, num_strata)[position] + number) / num_strata
        numbers.append(min(number, 1 - 2**-53))
    return torch.tensor(numbers, dtype=torch.float64)


def noise_generator(seed: int, step: int, slot: int) -> torch.Generator:
    """A generator on the CPU for the noise of one sample.

    Args:
        step: optimiser step of the whole run.
        slot: the sample's position in that step, over all processes and accumulated batches.

    The three numbers are hashed, so that neighbours share nothing. Of the 64 bits torch's generator for the CPU takes
    32: in a run of 100 000 samples about one pair shares its noise, at different steps.
    """
    return torch.Generator().manual_seed(_mix("noise", seed, step, slot))


def _mix(purpose: str, *numbers: int) -> int:
    """64 bits that look random, the same on every machine and in every version."""
    text = "/".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=4)
def _stratum_order(seed: int, window: int, num_strata: int) -> list[int]:
    return sorted(range(num_strata), key=lambda stratum: _mix("stratum", seed, window, stratum))
