"""How many bytes the autoencoder takes, by walking through its forward pass.

Counted are the tensors that are alive at a time, as in `memory_estimates`. A convolution of cuDNN takes as much again
as its input and output, which it turns into another order of channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .autoencoder import PIXELS_PER_LATENT, TILE_OVERLAP_LATENTS, AutoencoderConfig, Flux2Autoencoder

TILES = (96, 64, 48, 32, 24, 16)
"""Sides of tiles, in latent positions, that a plan chooses from; below three overlaps a picture is mostly seams."""
assert min(TILES) >= 2 * TILE_OVERLAP_LATENTS


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
        self.alive(source, source)
        self.convolve(source, target)
        self.alive(target, target, target)
        self.convolve(target, target, target)
        if has_shortcut:
            workspace = source + target if self.is_cuda else 0
            self.alive(target, target, workspace)
        self.alive(target, target, target if has_shortcut else 0)

    def middle(self, size: int) -> None:
        """Both blocks and the attention between them; the input is held by the caller throughout."""
        self.resnet(size, size, has_shortcut=False)
        self.held += size
        self.alive(*[size] * 6)
        self.held += size
        self.resnet(size, size, has_shortcut=False)
        self.held -= 2 * size


def decoding_bytes(
    config: AutoencoderConfig,
    width: int,
    height: int,
    item_bytes: int,
    *,
    is_cuda: bool = True,
    tile: int | None = None,
) -> int:
    """Peak of decoding one picture, weights aside.

    Args:
        width, height: of the picture, in pixels.
        tile: side of the tiles, in latent positions; None decodes the picture at once.
    """
    pixels, collected = _tile_pixels(width, height, tile)
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
            walk.convolve(4 * channels * area, 4 * channels * area)
    walk.held = channels * pixels
    walk.alive(channels * pixels, channels * pixels)
    walk.convolve(channels * pixels, 3 * pixels)
    return walk.peak * item_bytes + (4 * 4 * width * height if collected else 0)


def encoding_bytes(
    config: AutoencoderConfig,
    width: int,
    height: int,
    item_bytes: int,
    *,
    is_cuda: bool = True,
    tile: int | None = None,
) -> int:
    """Peak of encoding one picture; as `decoding_bytes`."""
    pixels, _ = _tile_pixels(width, height, tile)
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


def _tile_pixels(width: int, height: int, tile: int | None) -> tuple[int, bool]:
    """Pixels that run at once, and whether they are tiles of a larger picture."""
    if tile is None:
        return width * height, False
    side = tile * PIXELS_PER_LATENT
    return min(width, side) * min(height, side), width > side or height > side
