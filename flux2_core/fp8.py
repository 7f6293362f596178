"""The fp8 format of frozen weights: e4m3 numbers, and one fp32 scale per output row.

The matrix product runs in 8 bits (`torch._scaled_mm`, each row of the activations scaled by its own maximum) where the
GPU has it, which is tried once, and on weights multiplied out elsewhere. A file's scale per tensor is spread over the
rows: the numbers stay the file's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SLICE_BYTES = 2**22
"""Weights are quantised through fp32 slices of about this size, so that no fp32 copy of a layer is made."""
MULTIPLE = 16
"""`torch._scaled_mm` takes matrices whose sides are multiples of this."""

ScaledMM = Literal["rows", "tensor"]
"""Which scales `torch._scaled_mm` takes on a GPU: one per row, or one per tensor only (older GPUs, Windows)."""
_scaled_mm: dict[int, ScaledMM | None] = {}
"""What was found on each CUDA device, by index; -1 stands for all that is not CUDA."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8Rows:
    """Activations ``[..., K]`` that were rounded to e4m3 where they were made, each row with a scale of its own."""

    codes: Tensor
    """e4m3 ``[..., K]``"""
    scale: Tensor
    """fp32 ``[..., 1]``"""
    dtype: torch.dtype
    """What they were before, and what a product with them is given in."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., K]`` to e4m3 ``[..., K]`` and fp32 scales ``[..., 1]``: ``x`` is about their product.

    Scaled in the type of ``x``, without an fp32 copy: the reciprocal is rounded to that type, and the scale is its
    exact inverse.
    """
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    largest = torch.maximum(-low, high).abs().float()  # of zeros it would be -0
    reciprocal = (E4M3_MAX / largest).clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
    return (x * reciprocal).to(E4M3), reciprocal.float().reciprocal()


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` to e4m3 ``[out, in]`` and fp32 scales ``[out, 1]``."""
    quantised = torch.empty_like(weight, dtype=E4M3)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for part in row_slices(weight):
        quantised[part], scale[part] = quantise_rows(weight[part].float())
    return quantised, scale


def quantise_per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` to e4m3 ``[out, in]`` and one fp32 scale ``[]``, as ComfyUI's files have it."""
    largest = max(float(weight[part].abs().amax()) for part in row_slices(weight))
    scale = torch.tensor(largest / E4M3_MAX or 1.0, dtype=torch.float32, device=weight.device)
    quantised = torch.empty_like(weight, dtype=E4M3)
    for part in row_slices(weight):
        quantised[part] = (weight[part].float() / scale).to(E4M3)
    return quantised, scale


def row_slices(weight: Tensor) -> Iterator[slice]:
    """Slices of rows that take about `SLICE_BYTES` in fp32."""
    rows_at_once = max(1, SLICE_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows_at_once):
        yield slice(start, start + rows_at_once)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * scale`` in ``dtype``, rounded once."""
    return weight.to(dtype).mul_(scale)


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x (weight * scale)^T`` in the type of ``x``; in 8 bits where the device can."""
    mode = scaled_mm(x.device)
    fits = weight.dtype == E4M3 and weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0
    if mode is None or not fits:
        return F.linear(x, dequantise(weight, scale, x.dtype))
    codes, x_scale = quantise_rows(x)
    return multiply_rows(Fp8Rows(codes=codes, scale=x_scale, dtype=x.dtype), weight, scale)


def takes_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight ``[out, in]`` can be multiplied by `Fp8Rows` of ``x``: in 8 bits, and not for a gradient."""
    if torch.is_grad_enabled() or not x.is_cuda or weight.dtype != E4M3:
        return False
    return weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0 and scaled_mm(x.device) is not None


def multiply_rows(x: Fp8Rows, weight: Tensor, scale: Tensor) -> Tensor:
    """`multiply` of activations that are in 8 bits already, on a device that has the product."""
    mode = scaled_mm(x.codes.device)
    assert mode is not None
    codes, x_scale = x.codes.reshape(-1, x.codes.shape[-1]), x.scale.reshape(-1, 1)
    product = _multiply_scaled(codes, x_scale, weight, scale, mode)
    return product.to(x.dtype).view(*x.codes.shape[:-1], weight.shape[0])


def multiply_back(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``gradient (weight * scale)``, the gradient of what `multiply` was given; in 8 bits where the device can.

    The weight's scales lie along the sum of this product, where `torch._scaled_mm` takes none, so they are multiplied
    into the gradient. That is rounded row by row to e4m3, not e5m2: with a scale for every row the range of e4m3 is
    enough, and its third bit of mantissa halves the error (0.026 instead of 0.053 for normal numbers, 0.033 instead of
    0.051 for what comes out in the tiny model). The weight is transposed for the time of the product.

    Args:
        gradient: ``[M, out]``, of the output.
        weight: ``[out, in]``
        scale: ``[out, 1]``
    """
    mode = scaled_mm(gradient.device)
    fits = weight.dtype == E4M3 and weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0
    if mode is None or not fits:
        return gradient @ dequantise(weight, scale, gradient.dtype)
    # fp16 has not the range for the reciprocal of small gradients.
    wide = gradient.float() if gradient.dtype == torch.float16 else gradient
    quantised, row_scale = quantise_rows(wide * scale.t().to(wide.dtype))
    ones = torch.ones(weight.shape[1], 1, device=weight.device)
    return _multiply_scaled(quantised, row_scale, weight.t().contiguous(), ones, mode).to(gradient.dtype)


def _multiply_scaled(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, mode: ScaledMM) -> Tensor:
    """``(x * x_scale) (weight * scale)^T`` in bf16, the one type that every such GPU gives, for e4m3 ``[M, K]``."""
    one = None if mode == "rows" else torch.ones((), device=x.device)
    product: Tensor = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.contiguous(),  # rounding keeps the layout of what it is given, and a gradient may lie by columns
        weight.t(),
        scale_a=x_scale.contiguous() if one is None else one,
        scale_b=scale.t() if one is None else one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product if mode == "rows" else product.mul_(x_scale).mul_(scale.t())


def scaled_mm(device: torch.device) -> ScaledMM | None:
    """Which 8-bit product the device has, None for none; tried once, and then said once in a warning.

    While torch.compile traces, a device that was not tried before counts as one without: trying is no part of a graph.
    """
    index = -1
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _scaled_mm:
        if torch.compiler.is_compiling():
            return None
        _scaled_mm[index] = _probe(device) if device.type == "cuda" else None
        if _scaled_mm[index] is None:
            logger.warning(
                "%s cannot multiply in fp8: weights are multiplied out to the type of the activations, which saves the "
                "same memory but no time",
                torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device.type}",
            )
    return _scaled_mm[index]


def _probe(device: torch.device) -> ScaledMM | None:
    """Tries a small product with each kind of scales; what a GPU has depends on torch's version and platform too."""
    x = torch.full((MULTIPLE, MULTIPLE), 2.0, device=device).to(E4M3)
    scale = torch.full((MULTIPLE, 1), 0.5, device=device)
    modes: tuple[ScaledMM, ...] = ("rows", "tensor")
    for mode in modes:
        try:
            product = _multiply_scaled(x, scale, x, scale, mode)
            if (product == MULTIPLE).all():
                return mode
        except (RuntimeError, ValueError) as error:  # which one of them depends on torch's version
            logger.debug("fp8 with scales per %s: %s", mode.removesuffix("s"), error)
    return None
