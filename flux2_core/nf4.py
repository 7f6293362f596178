"""The nf4 format of frozen weights (arXiv:2305.14314), computed by bitsandbytes.

Two 4-bit numbers a byte, and the largest magnitude of every 64 weights in a row. That one is kept in bf16, half the
size of fp32: 4.25 bits a weight, and an error of 0.0920 instead of 0.0918 on Gaussian weights.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Weights that share a scale; they follow each other through the rows of the matrix."""
SLICE = 2**20
"""Weights are quantised so many at a time: on the CPU, bitsandbytes takes 12 bytes and more for each of them."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` to bytes ``[out, in / 2]`` and bf16 scales ``[out * in / 64]``, rounded up.

    Raises:
        ValueError: bitsandbytes cannot be used.
    """
    assert weight.shape[1] % 2 == 0, weight.shape
    functional = _functional()
    numbers = weight.reshape(-1)
    packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(-(-numbers.numel() // BLOCK), dtype=torch.bfloat16, device=weight.device)
    for begin in range(0, numbers.numel(), SLICE):
        part, state = functional.quantize_4bit(
            numbers[begin : begin + SLICE].float(), blocksize=BLOCK, quant_type="nf4"
        )
        packed.view(-1)[begin // 2 : begin // 2 + part.numel()] = part.view(-1)
        scale[begin // BLOCK : begin // BLOCK + state.absmax.numel()] = state.absmax
    return packed, scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in ``dtype``."""
    functional = _functional()
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    # As a vector: on the CPU, bitsandbytes begins a new block with every row of a matrix, unlike when it quantises.
    shape = torch.Size((rows * columns,))
    state = functional.QuantState(scale.float(), shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(weight.view(-1, 1), state).view(rows, columns)


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x weight^T`` in the type of ``x``."""
    return F.linear(x, dequantise(weight, scale, x.dtype))


def multiply_back(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``gradient weight`` in the type of the gradient ``[M, out]``: that of what `multiply` was given."""
    return gradient @ dequantise(weight, scale, gradient.dtype)


def _functional() -> ModuleType:
    try:
        import bitsandbytes.functional as functional
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"nf4 needs bitsandbytes, which cannot be used here ({error}); `pip install bitsandbytes`, or choose fp8"
        ) from error
    return functional
