"""What a training run tells while it goes on, and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What a step callback is told."""

    step: int
    """Steps done, from 1."""
    num_steps: int
    epoch: int
    """From 1."""
    loss: float
    """Not finite where the step was skipped."""
    average_loss: float
    learning_rate: float
    seconds_per_step: float
    seconds_left: float


@dataclass(kw_only=True)
class TrainResult:
    """What a run leaves behind."""

    lora_path: Path | None = None
    """The last LoRA that was written."""
    state_path: Path | None = None
    """Folder to go on from."""
    num_steps: int = 0
    """Steps done in all."""
    stopped: bool = False
    """Whether it was stopped before its end."""
    samples: list[Path] = field(default_factory=list)
    """Sample pictures, oldest first."""
    metrics_path: Path | None = None
    curves_path: Path | None = None
    validation_losses: dict[int, float] = field(default_factory=dict)
    """By steps done."""
    num_bad_steps: int = 0
    """Steps that were skipped since their loss was not finite."""


StepCallback = Callable[[TrainStep], None]
SampleCallback = Callable[[int, Image.Image], None]
"""Told the steps done and a finished sample picture."""


def describe_step(step: TrainStep) -> str:
    """One line about a step, for logs and nodes."""
    loss = f"{step.average_loss:.4f}" if math.isfinite(step.average_loss) else "not finite"
    seconds = step.seconds_per_step
    pace = f"{seconds:.1f} s/step" if seconds > 1 else f"{1 / seconds if seconds else math.inf:.2f} steps/s"
    return f"step {step.step}/{step.num_steps}, loss {loss}, {pace}, {clock(step.seconds_left)} left"


def clock(seconds: float) -> str:
    """A time as 0:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
