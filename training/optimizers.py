"""Learning rates over a training run (pure functions)."""

from __future__ import annotations

import math


def one_cycle(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """The factor of the learning rate: linear up over the warm-up, times a cosine from 1 to 0 over all steps."""
    warmup = min(1.0, (step + 1) / num_warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
