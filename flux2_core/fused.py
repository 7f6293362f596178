"""The elementwise work between the matrix products of a DiT block.

Each function is plain PyTorch, which is what runs on most devices, in training and under torch.compile. On CUDA, for
inference, one Triton kernel (`triton_kernels`) takes its place where that gives the same result on a small input, tried
once for each device, type and width; otherwise a warning says so once and PyTorch goes on.

Shapes: B batch, N tokens, D channels, H heads. Modulations are ``[B, 1, D]``, or ``[B, N, D]`` for tokens that are
modulated differently. Where a function is told ``into`` which Linear its result goes, and that one multiplies in fp8,
the result is already rounded to rows of fp8.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8
from .attention import apply_rope
from .attention_backends import is_capturing
from .fp8 import Fp8Rows
from .linear import Linear

logger = logging.getLogger(__name__)

NORM_EPS = 1e-6
KERNEL_TYPES = (torch.bfloat16, torch.float16, torch.float32)
PROBE_TOKENS = 5
LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Relative L2 distance of a kernel to PyTorch that is still rounding."""
LARGEST_FP8_ERROR = 0.03
"""The same where both round to e4m3, from values that may differ in their last bit."""

_probed: dict[tuple[Any, ...], bool] = {}
"""Whether a kernel works, by name, device, type and widths."""


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, into: Linear | None = None) -> Tensor | Fp8Rows:
    """LayerNorm without affine part of ``[B, N, D]``, then ``scale * x + shift``; a block's scale is near 1."""
    widths = (x.shape[-1],)
    if into is not None and into.takes_rows(x):
        if (kernels := _kernels("modulated_norm_rows", x, widths)) is not None:
            return _rows(kernels.modulated_norm_rows(x, shift, scale, NORM_EPS), x)
    elif (kernels := _kernels("modulated_norm", x, widths)) is not None:
        return kernels.modulated_norm(x, shift, scale, NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale)


def swiglu(mlp: Tensor, into: Linear | None = None) -> Tensor | Fp8Rows:
    """``silu(gate) * up`` of ``[B, N, 2 M]`` laid out as [gate, up]: ``[B, N, M]``."""
    return joined_swiglu(None, mlp, into)


def joined_swiglu(left: Tensor | None, mlp: Tensor, into: Linear | None = None) -> Tensor | Fp8Rows:
    """``left`` ``[B, N, D]`` and, behind it, `swiglu`: ``[B, N, D + M]``."""
    widths = (0 if left is None else left.shape[-1], mlp.shape[-1])
    if into is not None and into.takes_rows(mlp):
        if (kernels := _kernels("joined_swiglu_rows", mlp, widths)) is not None:
            return _rows(kernels.joined_swiglu_rows(left, mlp), mlp)
    elif (kernels := _kernels("joined_swiglu", mlp, widths)) is not None:
        return kernels.joined_swiglu(left, mlp)
    gate, up = mlp.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if left is None else torch.cat((left, product), dim=-1)


def fp8_rows(x: Tensor, into: Linear) -> Tensor | Fp8Rows:
    """``x`` as ``into`` takes it best."""
    if into.takes_rows(x) and (kernels := _kernels("fp8_rows", x, (x.shape[-1],))) is not None:
        return _rows(kernels.joined_swiglu_rows(x, None), x)
    return x


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``x + gate * update`` of ``[B, N, D]``."""
    if (kernels := _kernels("gated_residual", x, (x.shape[-1],))) is not None:
        return kernels.gated_residual(x, gate, update)
    return torch.addcmul(x, gate, update)


def heads(
    qkvs: Sequence[Tensor], scales: Sequence[tuple[Tensor, Tensor]], rope: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all streams together, normed by RMSNorm and rotated: ``[B, H, N, head_dim]`` each.

    Args:
        qkvs: the projections of each stream, ``[B, N_i, 3 D]``; streams follow each other along N.
        scales: RMSNorm's weights ``[head_dim]`` of each stream, for queries and for keys.
        rope: `attention.rope_table` of all N tokens.
        num_heads: H.
    """
    hidden = qkvs[0].shape[-1] // 3
    if (kernels := _kernels("heads", qkvs[0], (num_heads, hidden // num_heads, len(qkvs)))) is not None:
        return kernels.heads(list(qkvs), list(scales), rope, num_heads, NORM_EPS)
    qkv = (qkvs[0] if len(qkvs) == 1 else torch.cat(tuple(qkvs), dim=1)).unflatten(-1, (3, num_heads, -1))
    weights = [torch.stack(scale)[None, :, None] for scale in scales]  # [1, 2, 1, head_dim]
    if len(weights) > 1:
        sizes = [qkv.shape[1] for qkv in qkvs]
        weights = [weight.expand(size, -1, -1, -1) for weight, size in zip(weights, sizes, strict=True)]
    weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(qkv.dtype)
    normed = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:], eps=NORM_EPS)
    q, k = apply_rope(normed.mul_(weight) if not normed.requires_grad else normed * weight, rope).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)


def _kernels(name: str, x: Tensor, widths: tuple[int, ...]) -> ModuleType | None:
    """The kernels, where this one may stand in for PyTorch."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype not in KERNEL_TYPES:
        return None
    key = (name, x.device, x.dtype, widths)
    if key not in _probed:
        if is_capturing():
            return None
        _probed[key] = _works(name, x.device, x.dtype, widths)
    if not _probed[key]:
        return None
    from . import triton_kernels

    return triton_kernels


def _works(name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Whether a kernel compiles and gives on random numbers what PyTorch gives."""
    if not _has_triton():
        return False
    try:
        from . import triton_kernels

        error = compare(triton_kernels, name, device, dtype, widths)
    except Exception as failure:  # whatever goes wrong in a compiler, PyTorch can do it
        _warn(name, device, f"{type(failure).__name__}: {failure}")
        return False
    limit = LARGEST_FP8_ERROR if name.endswith("rows") else LARGEST_ERROR[dtype]
    if not error <= limit:
        _warn(name, device, f"its result is off by {error:.2g}")
    return error <= limit


@functools.cache
def _has_triton() -> bool:
    """Whether the kernels can be imported; told once where they cannot, and not for each of them."""
    try:
        from . import triton_kernels  # noqa: F401
    except Exception as failure:
        logger.warning(
            "the fused kernels need Triton, which cannot be used (%s: %s); PyTorch's own are used, which is slower",
            type(failure).__name__,
            " ".join(str(failure).split())[:300],
        )
        return False
    return True


def _warn(name: str, device: torch.device, why: str) -> None:
    logger.warning(
        "the fused kernel %s does not run on %s (%s); PyTorch's own are used, which is slower",
        name,
        device,
        why.strip().partition("\n")[0][:300],
    )


def compare(
    kernels: ModuleType,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, ...],
    num_tokens: int = PROBE_TOKENS,
) -> float:
    """Largest relative L2 distance of a kernel's results to PyTorch's, for two pictures of random numbers.

    Args:
        kernels: the module `triton_kernels`.
        name: of the function here; with ``_rows`` behind it where the result is rounded to fp8.
        device, dtype: of the numbers.
        widths: as the functions here give them.
        num_tokens: N.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def stored(result: tuple[Tensor, Tensor]) -> Tensor:
        return result[0].float() * result[1]

    def rounded(x: Tensor) -> Tensor:
        return stored(fp8.quantise_rows(x.float()))

    def wide(x: Tensor) -> Tensor:
        # What is rounded to fp8 is not rounded to 16 bits before, which makes many codes others: 0.027 in all.
        return x.float() if name.endswith("rows") else x

    got: Sequence[Tensor]
    with torch.enable_grad():  # what keeps the functions of this module from running the kernels
        if name.startswith("modulated_norm"):
            x, (shift, scale, _) = random(2, num_tokens, *widths), random(2, 1, 3 * widths[0]).chunk(3, dim=-1)
            scale = 1 + scale  # not a part of what holds both any more, as in a block
            expected = [_plain(modulated_norm(wide(x), wide(shift), wide(scale)))]
            if name == "modulated_norm":
                got = [kernels.modulated_norm(x, shift, scale, NORM_EPS)]
            else:
                got, expected = [stored(kernels.modulated_norm_rows(x, shift, scale, NORM_EPS))], [rounded(expected[0])]
        elif name.startswith("joined_swiglu"):
            left = random(2, num_tokens, widths[0]) if widths[0] else None
            mlp = random(2, num_tokens, widths[0] + widths[1])[..., widths[0] :]
            expected = [_plain(joined_swiglu(None if left is None else wide(left), wide(mlp)))]
            if name == "joined_swiglu":
                got = [kernels.joined_swiglu(left, mlp)]
            else:
                got, expected = [stored(kernels.joined_swiglu_rows(left, mlp))], [rounded(expected[0])]
        elif name == "fp8_rows":
            x = random(2, num_tokens, *widths)
            got, expected = [stored(kernels.joined_swiglu_rows(x, None))], [rounded(x)]
        elif name == "gated_residual":
            x, update, (gate, _) = *random(2, 2, num_tokens, *widths), random(2, 1, 2 * widths[0]).chunk(2, dim=-1)
            got, expected = [kernels.gated_residual(x, gate, update)], [gated_residual(x, gate, update)]
        else:
            got, expected = _compare_heads(kernels, random, widths, num_tokens)
    errors = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(got, expected, strict=True)]
    return float(torch.stack(errors).max())


def _compare_heads(
    kernels: ModuleType, random: Callable[..., Tensor], widths: tuple[int, ...], num_tokens: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    num_heads, head_dim, num_streams = widths
    hidden = num_heads * head_dim
    qkvs = [random(2, num_tokens + i, 5 * hidden)[..., : 3 * hidden] for i in range(num_streams)]
    scales = [(random(head_dim), random(head_dim)) for _ in range(num_streams)]
    angles = random(sum(qkv.shape[1] for qkv in qkvs), head_dim // 2).float()
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return kernels.heads(qkvs, scales, rope, num_heads, NORM_EPS), heads(qkvs, scales, rope, num_heads)


def _plain(result: Tensor | Fp8Rows) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def _rows(result: tuple[Tensor, Tensor], like: Tensor) -> Fp8Rows:
    return Fp8Rows(codes=result[0], scale=result[1], dtype=like.dtype)
