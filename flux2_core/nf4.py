"""The nf4 format of frozen weights (arXiv:2305.14314), computed by bitsandbytes.

Two 4-bit numbers a byte, and a scale for every 64 weights in a row, in bf16: 4.25 bits a weight. QLoRA's scale is the
largest magnitude of the 64. Here it is that or a little less, which cuts off the largest, whichever leaves the smaller
error: on Gaussian weights 0.088 instead of 0.092.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Weights that share a scale; they follow each other through the rows of the matrix."""
SHARES = (1.0, 0.9)
"""Scales that are tried, as shares of the largest magnitude. Thirty of them would bring the error to 0.086."""
SLICE = 2**19
"""Weights are quantised so many at a time: on the CPU, bitsandbytes takes 12 bytes and more for each of them."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` to bytes ``[out, in / 2]`` and bf16 scales ``[out * in / 64]``, rounded up.

    Raises:
        ValueError: bitsandbytes cannot be used.
    """
    assert weight.shape[1] % 2 == 0, weight.shape
    numbers = weight.reshape(-1)
    packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(-(-numbers.numel() // BLOCK), dtype=torch.bfloat16, device=weight.device)
    for begin in range(0, numbers.numel(), SLICE):
        part = numbers[begin : begin + SLICE].float()
        blocks = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        found, scale[begin // BLOCK : begin // BLOCK + len(blocks)] = _quantise_blocks(blocks)
        packed.view(-1)[begin // 2 : (begin + part.numel()) // 2] = found.view(-1)[: part.numel() // 2]
    return packed, scale


def _quantise_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes ``[N, 32]`` and scales ``[N]`` of blocks ``[N, 64]``, fp32."""
    largest = blocks.abs().amax(dim=1, keepdim=True)
    tried = [_quantise_within(blocks, share * largest) for share in SHARES]
    errors, packed, scales = (torch.stack(same) for same in zip(*tried, strict=True))
    best, rows = errors.argmin(dim=0), torch.arange(len(blocks), device=blocks.device)
    return packed[best, rows], scales[best, rows]


def _quantise_within(blocks: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors ``[N]``, bytes and scales of blocks cut off at a magnitude ``[N, 1]``, which is their scale."""
    numbers = blocks.clamp(-limit, limit).view(-1)
    packed, state = _functional().quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4")
    packed, scale = packed.view(-1, BLOCK // 2), state.absmax.bfloat16()
    return (dequantise(packed, scale, torch.float32) - blocks).square().sum(dim=1), packed, scale


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
