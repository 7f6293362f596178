"""Numbers of training steps on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What is told about a step once it is known."""

    step: int
    """Steps done, from 1."""
    loss: float
    """NaN where the step was skipped, since its loss or gradient was not finite."""
    gradient_norm: float
    learning_rate: float
    seconds_per_step: float


class StepReports:
    """Loss and gradient norm of the last steps, read without making the host wait for the step it has just ordered.

    On CUDA a step is told when the next one has been ordered, so that the device always has work; elsewhere at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        """Steps that are not told before others have been ordered."""
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, int, float, float]] = deque()

    def put(self, numbers: Tensor, *, step: int, learning_rate: float, seconds_per_step: float) -> None:
        """Takes loss and gradient norm ``[2]`` of a step that may still be under way."""
        event = None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
            numbers = host
        self._waiting.append((numbers, event, step, learning_rate, seconds_per_step))

    def take(self, *, wait: bool) -> Iterator[StepNumbers]:
        """Steps that have not been told, oldest first; with ``wait`` all, else without the one ordered last."""
        while len(self._waiting) > (0 if wait else self.lag):
            numbers, event, step, rate, seconds = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, norm = numbers.tolist()
            yield StepNumbers(step=step, loss=loss, gradient_norm=norm, learning_rate=rate, seconds_per_step=seconds)
