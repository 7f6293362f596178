"""GroupNorm with SiLU that keeps the order of channels.

On CUDA PyTorch's own GroupNorm (2.13 included, https://github.com/pytorch/pytorch/issues/111824) answers in the order
``[N, C, H, W]`` whatever it is given, and the convolution after it turns that into channels-last again, in which the
tensor cores work. Here the statistics come from the kernel of SyncBatchNorm, which reads channels-last and accumulates
in fp32, and the rest is a BatchNorm with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STATISTICS_EPS = 1e-12
"""The kernel gives 1 / sqrt(variance + eps); this one is taken off again."""
MAX_KERNEL_ELEMENTS = 2**31 - 1
"""The kernels index channels-last tensors with 32 bits."""


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``silu(norm(x))`` of ``[N, C, H, W]``, in the same order of channels."""
    return F.silu(group_norm(x, norm), inplace=True)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``norm(x)`` of ``[N, C, H, W]``, in the same order of channels."""
    if not has_kernel(x):
        return norm(x)
    parts = [apply_group_norm(row, norm, *group_moments(norm, *channel_moments(row))) for row in x.split(1)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def has_kernel(x: Tensor) -> bool:
    """Whether the statistics of a tensor are taken by the kernel for CUDA."""
    return (
        x.is_cuda
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() <= MAX_KERNEL_ELEMENTS
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[C]``, fp32, of each channel of ``[1, C, H, W]``."""
    if has_kernel(x):
        mean, inverse = torch.batch_norm_stats(x, STATISTICS_EPS)
        return mean, (inverse.double().pow(-2) - STATISTICS_EPS).clamp(min=0).float()
    variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    return mean, variance


def group_moments(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's group, fp32 ``[C]``, from those of all of the picture's channels."""
    means = mean.double().view(norm.num_groups, -1)
    centre = means.mean(dim=1, keepdim=True)
    spread = variance.double().view(norm.num_groups, -1).mean(dim=1, keepdim=True)
    spread = spread + (means - centre).square().mean(dim=1, keepdim=True)
    return centre.expand_as(means).flatten().float(), spread.expand_as(means).flatten().float()


def apply_group_norm(x: Tensor, norm: nn.GroupNorm, centre: Tensor, spread: Tensor) -> Tensor:
    """The GroupNorm of ``[1, C, H, W]``, or of a part of it, with the moments of `group_moments`."""
    return F.batch_norm(x, centre, spread, norm.weight.float(), norm.bias.float(), training=False, eps=norm.eps)
