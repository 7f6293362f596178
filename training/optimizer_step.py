"""The end of a training step: gradients are clipped, and parameters move unless something is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizers import Ema


class GuardedStep:
    """Takes the steps of an optimiser. A step whose loss or gradient is not finite changes nothing.

    Whether it is finite is decided on the device, and the host does not wait for that, where the optimiser can skip a
    step there (`torch.optim`'s fused ones can); others make the host wait once a step. In fp16 gradients are scaled.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        max_norm: float,
        ema: Ema | None,
        *,
        fp16: bool,
        limit: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Takes the longest norm that gradients may have, 0 for any, and what limits parameters after a step.

        The limit is told whether the step was taken, bool ``[]`` on the device.
        """
        self.optimizer, self.parameters, self.ema, self.limit = optimizer, parameters, ema, limit
        self.max_norm = max_norm or math.inf
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=fp16)
        self.waits = not getattr(optimizer, "_step_supports_amp_scaling", False)
        """Whether the host waits for the device in every step."""
        self.is_whole = True
        """Whether parameters, state and average belong together: not while they change."""

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        self.scaler.scale(loss).backward()

    def __call__(self, loss: Tensor) -> Tensor:
        """Ends a step whose gradients are whole and whose loss is ``[]``.

        Returns:
            Loss, NaN where the step was skipped, and norm of the gradient before clipping: ``[2]``, fp32, on the
            device.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        is_finite = torch.isfinite(loss) & torch.isfinite(norm)
        self.is_whole = False
        if self.scaler.is_enabled():  # it skips what overflows, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.waits:
            if is_finite:
                self.optimizer.step()
        else:
            setattr(self.optimizer, "found_inf", (~is_finite).float())  # noqa: B010 - an attribute torch reads
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        if self.limit is not None:
            self.limit(is_finite)
        if self.ema is not None:
            self.ema.update(self.parameters, is_finite)
        self.is_whole = True
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((torch.where(is_finite, loss, math.nan), norm)).float()
