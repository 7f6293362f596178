"""A 3x3 convolution of a picture that is enlarged twice before, with 4/9 of the multiplications.

Of the nine places that the kernel covers in a picture whose pixels are all doubled, four are different. So each of the
four places of a doubled pixel is a 2x2 convolution of the small picture, whose weights are sums of the kernel's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upsampled_convolution(padded: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(interpolate(x, scale_factor=2))`` with the nearest pixel, up to rounding.

    Args:
        padded: ``x`` ``[N, C, H, W]`` with one more row and column on each side: of zeros where the picture ends.
        conv: 3x3, padded by 1.

    Returns:
        ``[N, C', 2 H, 2 W]``.
    """
    num, height, width = padded.shape[0], padded.shape[-2] - 2, padded.shape[-1] - 2
    layout = memory_format(padded)
    shape = (num, conv.out_channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=padded.dtype, device=padded.device, memory_format=layout)
    for place, kernel in enumerate(split_kernel(conv.weight)):
        row, column = divmod(place, 2)
        part = F.conv2d(padded, kernel.contiguous(memory_format=layout), conv.bias)
        out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return out


def split_kernel(weight: Tensor) -> list[Tensor]:
    """The kernels ``[C', C, 2, 2]`` of the four places, by rows, of a kernel ``[C', C, 3, 3]``; summed in fp32."""
    top, middle, bottom = weight.float().unbind(2)
    kernels = []
    for rows in ((top, middle + bottom), (top + middle, bottom)):
        left, centre, right = torch.stack(rows, dim=2).unbind(3)
        for columns in ((left, centre + right), (left + centre, right)):
            kernels.append(torch.stack(columns, dim=3).to(weight.dtype))
    return kernels


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Whether a tensor lies with its channels last."""
    is_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
