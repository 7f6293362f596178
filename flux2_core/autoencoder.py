"""The FLUX.2 autoencoder (AE): pictures to normalised latents and back.

Architecture and parameter names follow Black Forest Labs' reference
(github.com/black-forest-labs/flux2, ``src/flux2/autoencoder.py``), so a BFL ``ae.safetensors`` loads without renaming.

Pictures are ``[B, 3, H, W]`` in -1..1, H and W multiples of 16. Latents are ``[B, 128, H/16, W/16]``: 32 channels at
1/8 resolution, packed 2x2 into channels in the order (c, pi, pj), then normalised by a BatchNorm without affine part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .autoencoder_strips import Strips
from .group_norm import group_norm, norm_silu
from .upsampled_convolution import upsampled_convolution

PIXELS_PER_LATENT = 16
"""Side, in pixels, of the square that one packed latent position covers."""

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
        h = self.conv1(norm_silu(x, self.norm1))
        h = self.conv2(norm_silu(h, self.norm2))
        h += x if self.nin_shortcut is None else self.nin_shortcut(x)
        return h


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
        h = group_norm(x, self.norm)
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
        return upsampled_convolution(F.pad(x, (1, 1, 1, 1)), self.conv)


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
        h = self.conv_out(norm_silu(h, self.norm_out))
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
        return self.conv_out(norm_silu(h, self.norm_out))


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

    def encode_tiled(self, images: Tensor, tile: int | None = None, *, store: torch.device | None = None) -> Tensor:
        """`encode`, in strips: the same numbers in less memory, see `autoencoder_strips`.

        Args:
            tile: a strip covers about as much as a square of this side, in latent positions; None: what is fast.
            store: where whole tensors are kept; None: where the weights are.
        """
        check_sides(images)
        weight, strips = self.encoder.conv_in.weight, _strips(tile, store)
        moments = [strips.encode(self.encoder, row.to(weight.device, weight.dtype)) for row in images.split(1)]
        mean = torch.cat(moments).chunk(2, dim=1)[0].float()
        return self.normalize(pack_2x2(mean))

    def decode_tiled(self, latents: Tensor, tile: int | None = None, *, store: torch.device | None = None) -> Tensor:
        """`decode`, in strips; as `encode_tiled`."""
        weight, strips = self.decoder.conv_in.weight, _strips(tile, store)
        z = unpack_2x2(self.denormalize(latents.to(weight.device, torch.float32))).to(weight.dtype)
        pictures = [strips.decode(self.decoder, row).float() for row in z.split(1)]
        return torch.cat(pictures) if len(pictures) > 1 else pictures[0]

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


# Under inference mode, as inside a ComfyUI node, the weights would be barred from any later training.
@torch.inference_mode(False)
def arrange_channels(autoencoder: Flux2Autoencoder) -> Flux2Autoencoder:
    """Puts the weights' channels last where convolutions are faster so; what they compute lies as the weights do.

    That is with 16-bit floats on CPUs, and on CUDA's tensor cores, which take these from compute capability 7.0 on and
    32-bit ones, as TF32, from 8.0 on. PyTorch's GroupNorm for CPUs loses digits of fp32 with channels last.
    """
    weight = autoencoder.decoder.conv_in.weight
    is_faster = weight.device.type == "cpu" and weight.itemsize < 4
    if weight.device.type == "cuda" and torch.version.hip is None:
        is_faster = torch.cuda.get_device_capability(weight.device) >= ((8, 0) if weight.itemsize == 4 else (7, 0))
    for parameter in autoencoder.parameters():
        if is_faster and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return autoencoder


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


def _strips(tile: int | None, store: torch.device | None) -> Strips:
    return Strips(store, None if tile is None else (tile * PIXELS_PER_LATENT) ** 2)


def pack_2x2(z: Tensor) -> Tensor:
    """``[B, C, 2h, 2w]`` to ``[B, 4C, h, w]``, channel order (c, pi, pj)."""
    return rearrange(z, "b c (h pi) (w pj) -> b (c pi pj) h w", pi=2, pj=2)


def unpack_2x2(packed: Tensor) -> Tensor:
    """The inverse of `pack_2x2`."""
    return rearrange(packed, "b (c pi pj) h w -> b c (h pi) (w pj)", pi=2, pj=2)
