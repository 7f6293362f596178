"""The one Linear of the DiT and of quantised text encoders: a weight in some format, and adapters on its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fp8, nf4

WeightFormat = Literal["fp8", "nf4"]
Precision = Literal["bf16", "fp8", "nf4"]
"""How weights are kept: plain, or in a `WeightFormat`."""


class Adapter(Protocol):
    """Something that changes the output of a Linear without touching its weight.

    An adapter with an attribute ``needs_weight`` that is False does not look at the weight, which then may come
    quantised. Without that attribute, or where it is True, a quantised weight is multiplied out for every call.
    """

    def __call__(self, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The change ``[..., out]`` to add, from input ``[..., in]``, unadapted output and weight ``[out, in]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Functions:
    """What a weight format is: a pair of tensors, and these functions of it."""

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    """A dense weight to quantised weight and scale."""
    dequantise: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """Both back to a dense weight."""
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Input, quantised weight and scale to the output, in the input's type."""


FORMATS: dict[WeightFormat, Functions] = {
    "fp8": Functions(quantise=fp8.quantise, dequantise=fp8.dequantise, multiply=fp8.multiply),
    "nf4": Functions(quantise=nf4.quantise, dequantise=nf4.dequantise, multiply=nf4.multiply),
}


def split_precision(
    precision: Precision | None, dtype: torch.dtype | None
) -> tuple[torch.dtype | None, WeightFormat | None]:
    """The type of plain weights and the format of the others; None is left to the file and to plain.

    Raises:
        ValueError: the precision is unknown, or ``dtype`` contradicts it.
    """
    if precision is None:
        return dtype, None
    if precision == "bf16":
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"the precision bf16 and the type {dtype} contradict each other; leave one of them out")
        return torch.bfloat16, None
    if precision not in FORMATS:
        raise ValueError(f"the precision is {precision!r}; allowed are {', '.join(get_args(Precision))}")
    return dtype, precision


class _FrozenProduct(torch.autograd.Function):
    """``x W^T`` of a quantised weight that takes no gradient.

    Kept for the backward pass are the quantised tensors, which are in memory anyway; the dense weight is made again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, weight_format: WeightFormat) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.weight_format, ctx.dtype = weight_format, x.dtype
        return FORMATS[weight_format].multiply(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        dense = FORMATS[ctx.weight_format].dequantise(weight, scale, gradient.dtype)
        return (gradient @ dense).to(ctx.dtype), None, None, None


class Linear(nn.Linear):
    """``x W^T`` plus the sum of what the adapters give; without bias, as everywhere in FLUX.2.

    Plain it has the state dict of any Linear; quantised, ``weight`` and ``weight_scale`` are those of its format (see
    `fp8` and `nf4`). Adapters are no part of the module tree.
    """

    weight_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.adapters: tuple[Adapter, ...] = ()
        self.weight_format: WeightFormat | None = None
        """None for a plain weight."""
        self.register_buffer("weight_scale", None)

    def forward(self, input: Tensor) -> Tensor:
        output = result = self._multiply(input)
        for adapter in self.adapters:
            result = result + adapter(input, output, self._weight_for(adapter, input.dtype))
        return result

    def quantise(self, weight_format: WeightFormat) -> None:
        """Replaces the plain weight by a quantised one.

        Raises:
            ValueError: the format needs a library that is not there.
        """
        assert self.weight_format is None, "a weight is quantised once"
        with torch.inference_mode(False), torch.no_grad():
            weight, scale = FORMATS[weight_format].quantise(self.weight.detach())
        self.set_quantised(weight_format, weight, scale)

    def set_quantised(self, weight_format: WeightFormat, weight: Tensor, scale: Tensor) -> None:
        """Takes a weight that is quantised already; it is frozen."""
        self.weight_format = weight_format
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = scale
        self._try_device()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` as one matrix: the plain weight itself, or a quantised one multiplied out.

        Args:
            dtype: None keeps a plain weight's type and gives bf16 for a quantised one.
        """
        if self.weight_format is None:
            return self.weight if dtype is None else self.weight.to(dtype)
        assert self.weight_scale is not None
        dequantise = FORMATS[self.weight_format].dequantise
        return dequantise(self.weight.detach(), self.weight_scale, dtype or torch.bfloat16)

    def _multiply(self, input: Tensor) -> Tensor:
        if self.weight_format is None:
            return F.linear(input, self.weight)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _FrozenProduct.apply(input, self.weight, self.weight_scale, self.weight_format)  # pyright: ignore

    def _weight_for(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        if self.weight_format is None or not getattr(adapter, "needs_weight", True):
            return self.weight
        return self.dense_weight(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Moves the tensors; a quantised weight keeps its type, whatever is asked for."""
        if self.weight_format is None:
            return super()._apply(fn, recurse)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        self._try_device()
        return self

    def _try_device(self) -> None:
        """Tries what the GPU can before torch.compile may trace the layer."""
        if self.weight_format == "fp8" and self.weight.is_cuda:
            fp8.scaled_mm(self.weight.device)
