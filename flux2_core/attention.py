"""Attention and rotary positions of the DiT (pure functions)."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_backends import AttentionBackend, attend

COMPLEX_DEVICES = ("cpu", "cuda")
"""Where complex numbers are as fast as others; torch.compile does not join their operations."""


def rope_table(ids: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Cosines and sines of all positions.

    Args:
        ids: positions ``[N, len(axes)]``.
        axes: channels of a head per position axis, each even.
        theta: base of the frequencies.

    Returns:
        ``[N, sum(axes) / 2, 2]``, fp32: cosine and sine of ``position * theta ** (-2 i / axis)``. Angles are taken in
        fp64, as in the reference (github.com/black-forest-labs/flux2, ``src/flux2/model.py``).
    """
    angles = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=ids.device) / channels
        angles.append(ids[:, axis, None].to(torch.float64) * theta**-exponent)
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs of ``[B, N, ..., head_dim]`` by a `rope_table`; computed in fp32."""
    table = table.view(table.shape[0], *(1 for _ in x.shape[2:-1]), *table.shape[1:])
    if x.device.type in COMPLEX_DEVICES and not torch.compiler.is_compiling():
        # One pass over memory: the pair is a complex number, and the rotation a product.
        rotated = torch.view_as_real(
            torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
        )
    else:
        (even, odd), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), table.unbind(-1)
        rotated = torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """Softmax attention of ``[B, H, N, head_dim]``, heads merged: ``[B, N, H * head_dim]``."""
    return attend(q, k, v, backend).transpose(1, 2).flatten(2)
