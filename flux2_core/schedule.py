"""The sigma schedule of FLUX.2 (pure functions).

Formulas: github.com/black-forest-labs/flux2, ``src/flux2/sampling.py`` (``compute_empirical_mu``, ``get_schedule``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_INTERPOLATED_TOKENS = 4300
"""Above this number of tokens the reference uses the 200-step line for every number of steps."""
MIN_STRENGTH = 0.01
"""Smallest part of the schedule that is worth a run."""


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """The shift exponent that BFL fitted on the number of output tokens (references not counted) and of steps."""
    mu_10 = 8.73809524e-05 * num_tokens + 1.89833333
    mu_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > MAX_INTERPOLATED_TOKENS:
        return mu_200
    slope = (mu_200 - mu_10) / 190
    return slope * num_steps + mu_200 - 200 * slope


def sigma_schedule(
    num_steps: int, num_tokens: int, flow_shift: float | None = None, *, strength: float = 1.0
) -> Tensor:
    """Sigmas ``[num_steps + 1]``, fp64, from 1 down to 0; with a strength, from below 1.

    Args:
        num_steps: Euler steps, at least 1.
        num_tokens: output image tokens.
        flow_shift: replaces exp(empirical mu) as the shift s in ``s x / (1 + (s - 1) x)``; 1 leaves sigmas linear.
        strength: above 0, up to 1: the last `num_steps` of ``num_steps / strength`` steps of the same shift, as
            `denoise` of ComfyUI's KSampler has it.
    """
    if num_steps < 1:
        raise ValueError(f"the number of steps is {num_steps}; it must be at least 1")
    if flow_shift is not None and not (math.isfinite(flow_shift) and flow_shift > 0):
        raise ValueError(f"flow_shift is {flow_shift}; it must be a number above 0")
    check_strength(strength)
    shift = math.exp(empirical_mu(num_tokens, num_steps)) if flow_shift is None else flow_shift
    num_all = int(num_steps / strength)
    return shift_sigmas(torch.linspace(1, 0, num_all + 1, dtype=torch.float64)[-num_steps - 1 :], shift)


def check_strength(strength: float) -> None:
    """Refuses a part of the schedule that is none, or so small that its steps could not be told apart.

    Raises:
        ValueError: it is below `MIN_STRENGTH` or above 1.
    """
    if not MIN_STRENGTH <= strength <= 1:
        raise ValueError(
            f"the strength (denoise) is {strength}; it must lie in {MIN_STRENGTH}..1, where 1 makes the picture anew"
        )


def shift_sigmas(linear: Tensor, shift: float) -> Tensor:
    """``s x / (1 + (s - 1) x)`` of numbers in 0..1, written so that the ends are exactly 0 and 1 for every shift."""
    return shift * linear / (shift * linear + (1 - linear))
