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


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """A change of a Linear's output that is ``scale * x A^T B^T``."""

    lora_A: Tensor
    """``[rank, in]``, what takes the gradient."""
    lora_B: Tensor
    """``[rows, rank]``"""
    running_A: Tensor
    """The same numbers in the type of the input, what is computed with."""
    running_B: Tensor
    scale: float
    rows: tuple[int, int] | None = None
    """First row of the output that changes, and the one after the last; None for all."""


class Adapter(Protocol):
    """Something that changes the output of a Linear without touching its weight.

    An adapter with an attribute ``needs_weight`` that is False does not look at the weight, which then may come
    quantised. Without that attribute, or where it is True, a quantised weight is multiplied out for every call.

    One with a method ``low_rank(x)`` that gives a `LowRank` for this input is added by products alone and is not
    called, where the other adapters of the layer are of this kind as well; it gives None where it is not.
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
    multiply_back: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Gradient of the output ``[M, out]``, quantised weight and scale to that of the input, in the gradient's type."""


FORMATS: dict[WeightFormat, Functions] = {
    "fp8": Functions(
        quantise=fp8.quantise, dequantise=fp8.dequantise, multiply=fp8.multiply, multiply_back=fp8.multiply_back
    ),
    "nf4": Functions(
        quantise=nf4.quantise, dequantise=nf4.dequantise, multiply=nf4.multiply, multiply_back=nf4.multiply_back
    ),
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

    Kept for the backward pass are the quantised tensors, which are in memory anyway.
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
        rows = gradient.reshape(-1, gradient.shape[-1])
        result = FORMATS[ctx.weight_format].multiply_back(rows, weight, scale)
        return result.view(*gradient.shape[:-1], -1).to(ctx.dtype), None, None, None


class _AdaptedProduct(torch.autograd.Function):
    """``x W^T + sum of scale * x A^T B^T`` with a frozen weight, plain or quantised: one node with no sums of its own.

    Arguments are those of `adapted_product`. Kept are the input, ``scale * x A^T``, and what is in memory anyway:
    weight and factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        weight_format: WeightFormat | None,
        settings: tuple[tuple[float, tuple[int, int] | None], ...],
        *factors: Tensor,
    ) -> Tensor:
        output, inner = adapted_product(x, weight, weight_scale, weight_format, settings, *factors)
        ctx.weight_format, ctx.settings = weight_format, settings
        ctx.types = [factor.dtype for factor in factors]
        ctx.save_for_backward(x, weight, weight_scale, *factors[2::4], *factors[3::4], *inner)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (full,) = gradients
        x, weight, weight_scale, *kept = ctx.saved_tensors
        count = len(ctx.settings)
        rows, gradient = x.reshape(-1, x.shape[-1]), full.reshape(-1, full.shape[-1])
        result: Tensor | None = None
        if ctx.needs_input_grad[0]:
            if ctx.weight_format is None:
                result = gradient @ weight
            else:
                result = FORMATS[ctx.weight_format].multiply_back(gradient, weight, weight_scale)
        found: list[Tensor | None] = []
        for number, (scale, place) in enumerate(ctx.settings):
            running_A, running_B, inner = kept[number::count]
            part = gradient if place is None else gradient[:, slice(*place)]
            needs_A, needs_B = ctx.needs_input_grad[5 + 4 * number : 7 + 4 * number]
            to_A = to_B = back = None
            if needs_A or result is not None:
                back = _times(part @ running_B, scale)
            if needs_A and back is not None:
                to_A = (back.t() @ rows).to(ctx.types[4 * number])
            if needs_B:
                to_B = (part.t() @ inner).to(ctx.types[4 * number + 1])
            if result is not None and back is not None:
                result.addmm_(back, running_A)
            found += [to_A, to_B, None, None]
        return (None if result is None else result.view_as(x)), None, None, None, None, *found


def adapted_product(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_format: WeightFormat | None,
    settings: tuple[tuple[float, tuple[int, int] | None], ...],
    *factors: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The output ``[..., out]`` of a Linear with changes of low rank, and ``scale * x A^T`` ``[M, rank]`` of each.

    Args:
        x: ``[..., in]``
        weight, weight_scale: plain, or of a format.
        settings: scale and rows of each `LowRank`.
        factors: its four tensors, one `LowRank` after the other.
    """
    rows = x.reshape(-1, x.shape[-1])
    if weight_format is None:
        output = rows @ weight.t()
    else:
        assert weight_scale is not None
        output = FORMATS[weight_format].multiply(rows, weight, weight_scale)
    inner = []
    for (scale, place), running_A, running_B in zip(settings, factors[2::4], factors[3::4], strict=True):
        inner.append(_times(rows @ running_A.t(), scale))
        (output if place is None else output[:, slice(*place)]).addmm_(inner[-1], running_B.t())
    return output.view(*x.shape[:-1], -1), inner


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def _low_rank(adapter: Adapter, x: Tensor) -> LowRank | None:
    make = getattr(adapter, "low_rank", None)
    return None if make is None else make(x)


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

    def forward(self, input: Tensor | fp8.Fp8Rows) -> Tensor:
        if isinstance(input, fp8.Fp8Rows):
            assert self.weight_scale is not None and not self.adapters
            return fp8.multiply_rows(input, self.weight, self.weight_scale)
        is_plain = not (self.weight.requires_grad or torch.is_autocast_enabled(input.device.type))
        if self.adapters and is_plain:
            changes = [_low_rank(adapter, input) for adapter in self.adapters]
            if all(change is not None for change in changes):
                return self._multiply_adapted(input, [change for change in changes if change is not None])
        output = result = self._multiply(input)
        for adapter in self.adapters:
            result = result + adapter(input, output, self._weight_for(adapter, input.dtype))
        return result

    def takes_rows(self, x: Tensor) -> bool:
        """Whether `forward` takes `fp8.Fp8Rows` of these activations: adapters see what was not rounded."""
        return self.weight_format == "fp8" and len(self.adapters) == 0 and fp8.takes_rows(x, self.weight)

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

    def _multiply_adapted(self, input: Tensor, changes: list[LowRank]) -> Tensor:
        settings = tuple((change.scale, change.rows) for change in changes)
        factors = [t for c in changes for t in (c.lora_A, c.lora_B, c.running_A, c.running_B)]
        options = (input, self.weight, self.weight_scale, self.weight_format, settings, *factors)
        if not torch.is_grad_enabled():
            return adapted_product(*options)[0]
        return _AdaptedProduct.apply(*options)  # pyright: ignore

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
