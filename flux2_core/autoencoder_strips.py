"""The autoencoder layer by layer, in strips of rows: less memory, and the same result as at once.

Tiles that run through the whole network do not give that: GroupNorm takes its mean and variance from all of the
picture, and so does the attention. Each tile would be normalised by its own, and differ from its neighbours in
brightness and colour wherever their contents do. Here every layer sees all of the picture before the next one runs.
Neighbouring strips share the rows that a convolution reaches over, so there is no seam to hide.

Whole are only the tensors between layers: of the decoder two at a time, of the 1216 channels at full resolution that
decoding at once takes, 384. They can be kept in host memory, and strips then pass through the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .group_norm import apply_group_norm, channel_moments, group_moments
from .upsampled_convolution import memory_format, upsampled_convolution

if TYPE_CHECKING:
    from .autoencoder import Decoder, Downsample, Encoder, Middle, ResnetBlock, Upsample

STRIP_ELEMENTS = 2**25
"""Elements of a strip of the larger of a layer's input and output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """A tensor between two layers."""

    tensor: Tensor
    """``[1, C, H, W]`` where such tensors are kept."""
    mean: Tensor
    """``[C]``, fp32 on the device: of each channel."""
    square: Tensor
    """``[C]``, fp64 on the device: mean of the squared distance to it."""

    def normalise(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """The GroupNorm of the whole tensor, as a function of its strips; SiLU after it."""
        centre, spread = group_moments(norm, self.mean, self.square)

        def apply(strip: Tensor) -> Tensor:
            return F.silu(apply_group_norm(strip, norm, centre, spread), inplace=True)

        return apply


class Strips:
    """Runs layers in strips.

    Args:
        store: where whole tensors are kept; None: where the weights are.
        max_pixels: places of a strip, at any resolution; None leaves it to `STRIP_ELEMENTS`, which holds in any case.
    """

    def __init__(self, store: torch.device | None = None, max_pixels: int | None = None) -> None:
        self.store = store
        self.max_pixels = max_pixels

    def decode(self, decoder: Decoder, z: Tensor) -> Tensor:
        """`Decoder.forward` for one picture."""
        x = self._keep(decoder.conv_in(decoder.post_quant_conv(z)))
        x = self._middle(decoder.mid, x)
        for index in reversed(range(len(decoder.up))):
            level: Any = decoder.up[index]
            for block in level.block:
                x = self._resnet(block, x)
            if level.upsample is not None:
                x = self._upsample(level.upsample, x)
        return self._convolve(x, decoder.conv_out, x.normalise(decoder.norm_out), store=z.device).tensor

    def encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        """`Encoder.forward` for one picture."""
        x = self._convolve(images, encoder.conv_in)
        levels: Any = encoder.down
        for level in levels:
            for block in level.block:
                x = self._resnet(block, x)
            if level.downsample is not None:
                x = self._downsample(level.downsample, x)
        x = self._middle(encoder.mid, x)
        moments = self._convolve(x, encoder.conv_out, x.normalise(encoder.norm_out), store=images.device).tensor
        return encoder.quant_conv(moments)

    def _middle(self, middle: Middle, x: Whole) -> Whole:
        x = self._resnet(middle.block_1, x)
        device = middle.block_1.conv1.weight.device
        x = self._keep(middle.attn_1(x.tensor.to(device)))
        return self._resnet(middle.block_2, x)

    def _resnet(self, block: ResnetBlock, x: Whole) -> Whole:
        h = self._convolve(x, block.conv1, x.normalise(block.norm1))
        # The input's memory is used again: its rows are read for the last time before anything is written over them.
        target = _shrink(x.tensor, block.conv2.out_channels)
        return self._convolve(h, block.conv2, h.normalise(block.norm2), skip=(x.tensor, block.nin_shortcut), out=target)

    def _upsample(self, layer: Upsample, x: Whole) -> Whole:
        source, conv = x.tensor, layer.conv
        out = self._empty(source, conv, 2 * source.shape[-2], 2 * source.shape[-1], self.store)
        moments = Moments()
        for start, stop in self._rows(out, source.shape[1]):
            first, last = start // 2, stop // 2
            strip = self._load(source[:, :, max(0, first - 1) : last + 1], conv)
            strip = F.pad(strip, (1, 1, int(first == 0), int(last == source.shape[-2])))
            part = upsampled_convolution(strip, conv)
            moments.add(part)
            out[:, :, start:stop] = part
        return moments.describe(out)

    def _downsample(self, layer: Downsample, x: Whole) -> Whole:
        source, conv = x.tensor, layer.conv
        height, width = source.shape[-2] // 2, source.shape[-1] // 2
        out = self._empty(source, conv, height, width, self.store)
        moments = Moments()
        for start, stop in self._rows(out, source.shape[1] * 4):
            strip = self._load(source[:, :, 2 * start : 2 * stop + 1], conv)
            missing = 2 * (stop - start) + 1 - strip.shape[-2]
            part = conv(F.pad(strip, (0, 1, 0, missing)))
            moments.add(part)
            out[:, :, start:stop] = part
        return moments.describe(out)

    def _convolve(
        self,
        x: Whole | Tensor,
        conv: nn.Conv2d,
        prepare: Callable[[Tensor], Tensor] | None = None,
        *,
        skip: tuple[Tensor, nn.Conv2d | None] | None = None,
        out: Tensor | None = None,
        store: torch.device | None = None,
    ) -> Whole:
        """A 3x3 convolution of what ``prepare`` makes of the input; plus a skip."""
        source = x.tensor if isinstance(x, Whole) else x
        height, width = source.shape[-2:]
        if out is None:
            out = self._empty(source, conv, height, width, store or self.store)
        moments = Moments()
        for start, stop in self._rows(out, source.shape[1]):
            # Rows of the input, with those that the kernel reaches over, as far as there are any.
            first, last = max(0, start - 1), min(height, stop + 1)
            strip = self._load(source[:, :, first:last], conv)
            if prepare is not None:
                strip = prepare(strip)
            strip = F.pad(strip, (0, 0, int(start == 0), int(stop == height)))
            part = F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))
            del strip
            if skip is not None:
                beside, shortcut = self._load(skip[0][:, :, start:stop], conv), skip[1]
                part += beside if shortcut is None else shortcut(beside)
            moments.add(part)
            out[:, :, start:stop] = part
        return moments.describe(out)

    def _rows(self, out: Tensor, num_source_channels: int) -> list[tuple[int, int]]:
        """First and last rows of strips; even, since a layer may double them."""
        pixels = STRIP_ELEMENTS // max(out.shape[1], num_source_channels)
        pixels = pixels if self.max_pixels is None else min(pixels, self.max_pixels)
        rows = max(2, pixels // out.shape[-1] // 2 * 2)
        return [(start, min(start + rows, out.shape[-2])) for start in range(0, out.shape[-2], rows)]

    def _empty(self, like: Tensor, conv: nn.Conv2d, height: int, width: int, store: torch.device | None) -> Tensor:
        """Memory for a convolution's result, in its order of channels: with these last, rows are one piece to copy."""
        shape, layout = (1, conv.out_channels, height, width), memory_format(conv.weight)
        return torch.empty(shape, dtype=like.dtype, device=store or like.device, memory_format=layout)

    def _load(self, strip: Tensor, conv: nn.Conv2d) -> Tensor:
        return strip.to(conv.weight.device)

    def _keep(self, tensor: Tensor) -> Whole:
        moments = Moments()
        for rows in tensor.split(max(1, STRIP_ELEMENTS // (tensor.shape[1] * tensor.shape[-1])), dim=2):
            moments.add(rows)
        return moments.describe(tensor.to(self.store or tensor.device))


class Moments:
    """Mean and variance of each channel, strip by strip."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None
        """Mean of the squared distance to the mean."""

    def add(self, strip: Tensor) -> None:
        """Takes in ``[1, C, rows, W]``; sums are fp32 within a strip and fp64 beyond."""
        mean, square = (moment.double() for moment in channel_moments(strip))
        count = strip.shape[-2:].numel()
        if self.mean is None or self.square is None:
            self.mean, self.square, self.count = mean, square, count
            return
        share = count / (self.count + count)
        distance = mean - self.mean
        self.square = (1 - share) * self.square + share * square + share * (1 - share) * distance.square()
        self.mean = self.mean + share * distance
        self.count += count

    def describe(self, tensor: Tensor) -> Whole:
        """The tensor that all strips make."""
        assert self.mean is not None and self.square is not None
        return Whole(tensor=tensor, mean=self.mean.float(), square=self.square)


def _shrink(tensor: Tensor, channels: int) -> Tensor | None:
    """The beginning of a tensor ``[1, C, H, W]`` as one of fewer channels, so that each row of it lies in the memory of
    that row of the tensor or of one before; None where there are too few."""
    height, width = tensor.shape[-2:]
    if channels > tensor.shape[1]:
        return None
    if memory_format(tensor) == torch.contiguous_format:
        return tensor[:, :channels]
    flat = tensor.permute(0, 2, 3, 1).reshape(-1)[: channels * height * width]
    return flat.view(1, height, width, channels).permute(0, 3, 1, 2)
