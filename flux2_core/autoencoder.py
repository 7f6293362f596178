"""The FLUX.2 autoencoder (AE): pictures to normalised latents and back.

Architecture and parameter names follow Black Forest Labs' reference
(github.com/black-forest-labs/flux2, ``src/flux2/autoencoder.py``), so a BFL ``ae.safetensors`` loads without renaming.

Pictures are ``[B, 3, H, W]`` in -1..1, H and W multiples of 16. Latents are ``[B, 128, H/16, W/16]``: 32 channels at
1/8 resolution, packed 2x2 into channels in the order (c, pi, pj), then normalised by a BatchNorm without affine part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PIXELS_PER_LATENT = 16
"""Side, in pixels, of the square that one packed latent position covers."""

TILE_LATENTS = 48
"""Side of a tile where none is named, in latent positions (768 px)."""
TILE_OVERLAP_LATENTS = 8
"""How far neighbouring tiles overlap; they are blended linearly there."""

BATCH_NORM_EPS = 1e-4
GROUP_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of an autoencoder; the default is the public FLUX.2 one."""

    encoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the encoder at 1/1, 1/2, 1/4 and 1/8 resolution."""
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the decoder at the same resolutions; (96, 192, 384, 384) is BFL's small decoder."""
    num_res_blocks: int = 2
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    latent_channels: int = 32
    """Channels before the 2x2 packing."""
    num_norm_groups: int = 32
    """Groups of every GroupNorm."""
    reference_sides: tuple[int, int] = (2024, 1024)
    """A single reference, or each of several, is scaled down to the area of a square of this side in pixels."""

    @property
    def packed_channels(self) -> int:
        """Channels of the latents that the DiT sees."""
        return self.latent_channels * 4


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=GROUP_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=GROUP_NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[-2]
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c").contiguous() for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=height))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The reference pads right and bottom only; a symmetric pad would shift the picture by half a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the change to the next one where there is one."""

    def __init__(
        self, blocks: list[ResnetBlock], *, downsample: Downsample | None = None, upsample: Upsample | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.encoder_widths, config.num_norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = widths[0]
        for index, width in enumerate(widths):
            blocks = []
            for _ in range(config.num_res_blocks):
                blocks.append(ResnetBlock(channels, width, groups))
                channels = width
            self.down.append(Level(blocks, downsample=Downsample(width) if index < len(widths) - 1 else None))
        self.mid = Middle(channels, groups)
        self.norm_out = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return self.quant_conv(h)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.decoder_widths, config.num_norm_groups
        channels = widths[-1]
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups)
        levels = []
        for index in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, widths[index], groups))
                channels = widths[index]
            # Stored by resolution, run from coarse to fine.
            levels.insert(0, Level(blocks, upsample=Upsample(channels) if index > 0 else None))
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(self.post_quant_conv(z))
        h = self.mid(h)
        for index in reversed(range(len(self.up))):
            h = self.up[index](h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Flux2Autoencoder(nn.Module):
    """Encoder, decoder and the running statistics that normalise the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.bn = nn.BatchNorm2d(config.packed_channels, eps=BATCH_NORM_EPS, affine=False)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in -1..1 to normalised latents ``[B, 128, H/16, W/16]``, fp32.

        The posterior mean is taken, as BFL and diffusers do: encoding is deterministic.
        """
        check_sides(images)
        weight = self.encoder.conv_in.weight
        moments = self.encoder(images.to(weight.device, weight.dtype))
        mean = moments.chunk(2, dim=1)[0].float()
        return self.normalize(pack_2x2(mean))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[B, 128, h, w]`` to pictures ``[B, 3, 16 h, 16 w]`` around -1..1, fp32, not clamped."""
        weight = self.decoder.conv_in.weight
        z = unpack_2x2(self.denormalize(latents.to(weight.device, torch.float32)))
        return self.decoder(z.to(weight.dtype)).float()

    def encode_tiled(self, images: Tensor, tile: int | None = None) -> Tensor:
        """Like `encode`, in overlapping tiles of ``tile`` latent positions; memory does not grow with the picture."""
        check_sides(images)  # before the cut: a tile of a wrong size may look right
        return blend_tiles(images, self.encode, size_in=PIXELS_PER_LATENT, size_out=1, tile=tile)

    def decode_tiled(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Like `decode`, in overlapping tiles of ``tile`` latent positions; memory does not grow with the picture."""
        return blend_tiles(latents, self.decode, size_in=1, size_out=PIXELS_PER_LATENT, tile=tile)

    def normalize(self, packed: Tensor) -> Tensor:
        """Subtracts the running mean and divides by the running deviation of each packed channel."""
        mean, std = self._statistics()
        return (packed - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._statistics()
        return latents * std + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None
        std = torch.sqrt(variance.float() + BATCH_NORM_EPS)
        return mean.float().view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def check_sides(images: Tensor) -> None:
    """Refuses pictures ``[B, 3, H, W]`` that do not fall into whole latent positions.

    Raises:
        ValueError: H or W is no multiple of 16.
    """
    height, width = images.shape[-2:]
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        raise ValueError(
            f"the autoencoder got a picture of {width}x{height} px; both sides must be multiples of "
            f"{PIXELS_PER_LATENT}. Resize or crop it first."
        )


def blend_tiles(
    x: Tensor, fn: Callable[[Tensor], Tensor], *, size_in: int, size_out: int, tile: int | None = None
) -> Tensor:
    """Applies `fn` to overlapping tiles of ``[B, C, H, W]`` and blends the results with linear ramps.

    Args:
        x: input.
        fn: maps a tile ``[B, C, h * size_in, w * size_in]`` to ``[B, C', h * size_out, w * size_out]``.
        size_in: elements of `x` per latent position and side.
        size_out: elements of the result per latent position and side.
    """
    side_of_tile = TILE_LATENTS if tile is None else tile
    rows, columns = (tile_starts(side // size_in, side_of_tile) for side in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return fn(x)
    height, width = (side // size_in * size_out for side in x.shape[-2:])
    total = weights = None
    for row in rows:
        for column in columns:
            top, left = row * size_in, column * size_in
            part = fn(x[..., top : top + side_of_tile * size_in, left : left + side_of_tile * size_in])
            if total is None or weights is None:
                total = torch.zeros(*part.shape[:2], height, width, dtype=part.dtype, device=part.device)
                weights = torch.zeros(height, width, dtype=part.dtype, device=part.device)
            weight = _ramp(part.shape[-2], size_out)[:, None] * _ramp(part.shape[-1], size_out)[None]
            weight = weight.to(part)
            place = (slice(row * size_out, row * size_out + part.shape[-2]),)
            place += (slice(column * size_out, column * size_out + part.shape[-1]),)
            total[..., place[0], place[1]] += part * weight
            weights[place] += weight
    assert total is not None and weights is not None
    return total.div_(weights)


def tile_starts(length: int, tile: int) -> list[int]:
    """First positions of tiles that cover `length` latent positions, the last one flush with the end."""
    if length <= tile:
        return [0]
    stride = tile - TILE_OVERLAP_LATENTS
    return [*range(0, length - tile, stride), length - tile]


def _ramp(length: int, size_out: int) -> Tensor:
    overlap = TILE_OVERLAP_LATENTS * size_out
    rise = (torch.arange(length) + 1).clamp(max=overlap) / overlap
    return torch.minimum(rise, rise.flip(0))


def pack_2x2(z: Tensor) -> Tensor:
    """``[B, C, 2h, 2w]`` to ``[B, 4C, h, w]``, channel order (c, pi, pj)."""
    return rearrange(z, "b c (h pi) (w pj) -> b (c pi pj) h w", pi=2, pj=2)


def unpack_2x2(packed: Tensor) -> Tensor:
    """The inverse of `pack_2x2`."""
    return rearrange(packed, "b (c pi pj) h w -> b c (h pi) (w pj)", pi=2, pj=2)
