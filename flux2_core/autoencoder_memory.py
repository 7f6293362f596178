"""How many bytes the autoencoder takes, by walking through its forward pass.

Counted are the tensors that are alive at a time, as in `memory_estimates`. A convolution of cuDNN takes as much again
as its input and output, which it turns into another order of channels where they are not in that already.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from .autoencoder import AutoencoderConfig, Flux2Autoencoder
from .autoencoder_strips import STRIP_ELEMENTS

Tiling = Literal["whole", "strips", "host"]
"""How a picture runs through the autoencoder: at once, in strips, or in strips of tensors that are in host memory."""
STRIP_COPIES = 3
"""Tensors of a strip's size at a time: normed, padded, and convolved, or its result in fp32."""
STRIPS_UNDER_WAY = 3
"""With whole tensors in host memory, beside those: the next strip and its skip, and the result of the one before. The
skip of a strip takes the place of the third copy."""


@lru_cache
def autoencoder_bytes(config: AutoencoderConfig, item_bytes: int) -> int:
    """Bytes of the weights; the statistics of the latents are fp32."""
    with torch.device("meta"):
        autoencoder = Flux2Autoencoder(config)
    return sum(parameter.numel() for parameter in autoencoder.parameters()) * item_bytes


class _Walk:
    """Counts elements; `held` are those that callers keep, `peak` is the most there were."""

    def __init__(self, *, is_cuda: bool) -> None:
        self.is_cuda = is_cuda
        self.held = 0
        self.peak = 0

    def alive(self, *elements: int) -> None:
        self.peak = max(self.peak, self.held + sum(elements))

    def convolve(self, source: int, target: int, *others: int) -> None:
        self.alive(source, target, *others, (source + target) if self.is_cuda else 0)

    def resnet(self, source: int, target: int, *, has_shortcut: bool) -> None:
        """A block of which `held` includes the input, given by its elements and those of its output."""
        self.convolve(source, target)
        self.convolve(target, target, target)
        if has_shortcut:
            workspace = source + target if self.is_cuda else 0
            self.alive(target, target, workspace)

    def middle(self, size: int) -> None:
        """Both blocks and the attention between them; the input is held by the caller throughout."""
        self.resnet(size, size, has_shortcut=False)
        self.held += size
        self.alive(*[size] * 6)
        self.held += size
        self.resnet(size, size, has_shortcut=False)
        self.held -= 2 * size


def decoding_bytes(config: AutoencoderConfig, width: int, height: int, item_bytes: int, *, is_cuda: bool = True) -> int:
    """Peak of decoding one picture at once, weights aside.

    Args:
        width, height: of the picture, in pixels.
        item_bytes: of a weight and an activation.
        is_cuda: whether convolutions take memory of their own.
    """
    pixels = width * height
    walk, widths = _Walk(is_cuda=is_cuda), config.decoder_widths
    scale = 4 ** (len(widths) - 1)
    size = widths[-1] * pixels // scale
    walk.held = size
    walk.middle(size)
    channels = widths[-1]
    for index in reversed(range(len(widths))):
        area = pixels // 4**index
        walk.held = before = channels * area  # the level's input, to its end
        for number in range(config.num_res_blocks + 1):
            target = widths[index] * area
            walk.held = before + (channels * area if number else 0)
            walk.resnet(channels * area, target, has_shortcut=channels != widths[index])
            channels = widths[index]
        walk.held = before + channels * area
        if index:
            # More than the four convolutions of the small picture need: their workspace has not been measured.
            walk.convolve(4 * channels * area, 4 * channels * area)
    walk.held = channels * pixels
    walk.convolve(channels * pixels, 3 * pixels)
    return walk.peak * item_bytes


def encoding_bytes(config: AutoencoderConfig, width: int, height: int, item_bytes: int, *, is_cuda: bool = True) -> int:
    """Peak of encoding one picture at once; as `decoding_bytes`."""
    pixels = width * height
    walk, widths = _Walk(is_cuda=is_cuda), config.encoder_widths
    walk.convolve(3 * pixels, widths[0] * pixels)
    channels = widths[0]
    for index, level_width in enumerate(widths):
        area = pixels // 4**index
        before = channels * area
        for number in range(config.num_res_blocks):
            walk.held = before + (channels * area if number else 0)
            walk.resnet(channels * area, level_width * area, has_shortcut=channels != level_width)
            channels = level_width
        walk.held = before + channels * area
        if index < len(widths) - 1:
            walk.convolve(channels * area, channels * area // 4)
    walk.held = channels * pixels // 4 ** (len(widths) - 1)
    walk.middle(walk.held)
    cast = 3 * item_bytes * pixels if item_bytes != 4 else 0
    return walk.peak * item_bytes + cast + 3 * 4 * width * height


def strip_bytes(
    config: AutoencoderConfig, width: int, height: int, item_bytes: int, *, decodes: bool, is_cuda: bool = True
) -> tuple[int, int]:
    """Peak of one picture in strips, see `autoencoder_strips`: with whole tensors on the device, and the part of that
    which these take, and which can be in host memory; weights aside."""
    pixels, copies = width * height, STRIP_COPIES + (2 if is_cuda else 0)
    widths = config.decoder_widths if decodes else config.encoder_widths
    smallest = pixels // 4 ** (len(widths) - 1) * widths[-1]
    # The attention in the middle sees its input whole: as such, normed, as q, k, v, and a copy of one of these.
    peak, largest = 6 * smallest, smallest
    channels = widths[-1] if decodes else widths[0]
    order = list(enumerate(widths))
    for index, width_of_level in reversed(order) if decodes else order:
        area = pixels // 4**index
        kept = (channels + width_of_level) * area
        if decodes and index < len(widths) - 1:  # what the level is enlarged from, beside its input
            kept = max(kept, channels * area + channels * area // 4)
        if not decodes and index:
            kept = max(kept, channels * area + channels * area * 4)
        strip = min(STRIP_ELEMENTS, max(channels, width_of_level) * area)
        peak, largest = max(peak, kept + copies * strip), max(largest, kept)
        channels = width_of_level
    picture = 3 * pixels * (4 if decodes else 4 + item_bytes)
    return peak * item_bytes + picture, largest * item_bytes


def host_strip_bytes(
    config: AutoencoderConfig, width: int, height: int, item_bytes: int, *, decodes: bool, is_cuda: bool = True
) -> int:
    """Peak on the device with whole tensors in host memory; as `strip_bytes`."""
    copies = STRIP_COPIES + STRIPS_UNDER_WAY + (2 if is_cuda else 0)
    widths = config.decoder_widths if decodes else config.encoder_widths
    smallest = width * height // 4 ** (len(widths) - 1) * widths[-1]
    strip = min(STRIP_ELEMENTS, 2 * max(widths) * width * height)
    return max(6 * smallest, copies * strip) * item_bytes + 3 * width * height * (4 + item_bytes)
