"""The autoencoder layer by layer, in strips of rows: less memory, and the same result as at once.

Tiles that run through the whole network do not give that: GroupNorm takes its mean and variance from all of the
picture, and so does the attention. Each tile would be normalised by its own, and differ from its neighbours in
brightness and colour wherever their contents do. Here every layer sees all of the picture before the next one runs.
Neighbouring strips share the rows that a convolution reaches over, so there is no seam to hide.

Whole are only the tensors between layers: of the decoder two at a time, of the 1216 channels at full resolution that
decoding at once takes, 384. They can be kept in host memory, and strips then pass through the device: the next one
comes, and the one before goes, while one is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_memory import Event, HostBuffer, Transfers, make_transfers, on_device
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
        self._transfers = Transfers()
        self._memory: list[HostBuffer] = []
        """For whole tensors in host memory: pinning takes longer than a copy, so layers share it."""

    def decode(self, decoder: Decoder, z: Tensor) -> Tensor:
        """`Decoder.forward` for one picture."""
        self._start(decoder.conv_in.weight.device)
        x = self._keep(decoder.conv_in(decoder.post_quant_conv(z)), decoder.conv_in)
        x = self._middle(decoder.mid, x)
        for index in reversed(range(len(decoder.up))):
            level: Any = decoder.up[index]
            for block in level.block:
                x = self._resnet(block, x)
            if level.upsample is not None:
                x = self._upsample(level.upsample, x)
        return self._convolve(x, decoder.conv_out, x.normalise(decoder.norm_out), kept=False).tensor

    def encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        """`Encoder.forward` for one picture."""
        self._start(encoder.conv_in.weight.device)
        x = self._convolve(images, encoder.conv_in)
        levels: Any = encoder.down
        for level in levels:
            for block in level.block:
                x = self._resnet(block, x)
            if level.downsample is not None:
                x = self._downsample(level.downsample, x)
        x = self._middle(encoder.mid, x)
        moments = self._convolve(x, encoder.conv_out, x.normalise(encoder.norm_out), kept=False).tensor
        return encoder.quant_conv(moments)

    def _start(self, device: torch.device) -> None:
        if self.store == device:
            self.store = None  # nothing is elsewhere
        self._transfers = Transfers() if self.store is None else make_transfers(device)

    def _middle(self, middle: Middle, x: Whole) -> Whole:
        x = self._resnet(middle.block_1, x)
        conv = middle.block_1.conv1
        whole = x.tensor.to(conv.weight.device).contiguous(memory_format=memory_format(conv.weight))
        x = self._keep(middle.attn_1(whole), conv)
        return self._resnet(middle.block_2, x)

    def _resnet(self, block: ResnetBlock, x: Whole) -> Whole:
        h = self._convolve(x, block.conv1, x.normalise(block.norm1))
        # The input's memory is used again: its rows are read for the last time before anything is written over them.
        target = _shrink(x.tensor, block.conv2.out_channels)
        return self._convolve(h, block.conv2, h.normalise(block.norm2), skip=(x.tensor, block.nin_shortcut), out=target)

    def _upsample(self, layer: Upsample, x: Whole) -> Whole:
        source, conv = x.tensor, layer.conv
        height, width = 2 * source.shape[-2], 2 * source.shape[-1]
        out = self._empty(conv, height, width, source)

        def read(start: int, stop: int) -> list[Tensor]:
            return [source[:, :, max(0, start // 2 - 1) : stop // 2 + 1]]

        def compute(strips: list[Tensor], start: int, stop: int) -> Tensor:
            strip = F.pad(strips.pop(), (1, 1, int(start == 0), int(stop == height)))
            return upsampled_convolution(strip, conv)

        return self._run(out, conv, source.shape[1], read, compute)

    def _downsample(self, layer: Downsample, x: Whole) -> Whole:
        source, conv = x.tensor, layer.conv
        out = self._empty(conv, source.shape[-2] // 2, source.shape[-1] // 2, source)

        def read(start: int, stop: int) -> list[Tensor]:
            return [source[:, :, 2 * start : 2 * stop + 1]]

        def compute(strips: list[Tensor], start: int, stop: int) -> Tensor:
            strip = strips.pop()
            missing = 2 * (stop - start) + 1 - strip.shape[-2]
            return conv(F.pad(strip, (0, 1, 0, missing)))

        return self._run(out, conv, source.shape[1] * 4, read, compute)

    def _convolve(
        self,
        x: Whole | Tensor,
        conv: nn.Conv2d,
        prepare: Callable[[Tensor], Tensor] | None = None,
        *,
        skip: tuple[Tensor, nn.Conv2d | None] | None = None,
        out: Tensor | None = None,
        kept: bool = True,
    ) -> Whole:
        """A 3x3 convolution of what ``prepare`` makes of the input; plus a skip."""
        source = x.tensor if isinstance(x, Whole) else x
        height, width = source.shape[-2:]
        if out is None:
            out = self._empty(conv, height, width, source, *([] if skip is None else skip[:1]), kept=kept)

        def read(start: int, stop: int) -> list[Tensor]:
            # Rows of the input, with those that the kernel reaches over, as far as there are any.
            strip = source[:, :, max(0, start - 1) : min(height, stop + 1)]
            return [strip] if skip is None else [skip[0][:, :, start:stop], strip]

        def compute(strips: list[Tensor], start: int, stop: int) -> Tensor:
            strip = strips.pop()
            if prepare is not None:
                strip = prepare(strip)
            strip = F.pad(strip, (0, 0, int(start == 0), int(stop == height)))
            part = F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))
            del strip
            if skip is not None:
                beside, shortcut = strips.pop(), skip[1]
                part += beside if shortcut is None else shortcut(beside)
            return part

        channels = source.shape[1]
        if skip is not None and self.store is not None:  # its strips take memory too, then
            channels = max(channels, skip[0].shape[1])
        return self._run(out, conv, channels, read, compute, comes=isinstance(x, Whole), leaves=kept)

    def _run(
        self,
        out: Tensor,
        conv: nn.Conv2d,
        num_source_channels: int,
        read: Callable[[int, int], list[Tensor]],
        compute: Callable[[list[Tensor], int, int], Tensor],
        *,
        comes: bool = True,
        leaves: bool = True,
    ) -> Whole:
        """Makes a tensor strip by strip: of ``read``'s strips, of the layer's input, ``compute`` makes one of it.

        Copies happen in their order, all of a layer's are over at its end, and a strip is loaded before the result of
        the one before is stored. So none overtakes the one that wrote what it reads, or that reads what it overwrites.

        Args:
            comes, leaves: whether the input and the result are where whole tensors are kept.
        """
        moments, transfers, rows = Moments(), self._transfers, self._rows(out, num_source_channels)
        leaving: list[tuple[Event, Tensor]] = []
        coming: tuple[list[Tensor], Event] = [], None
        try:
            for index, (start, stop) in enumerate([(0, 0), *rows]):
                strips, arrival = coming
                if len(leaving) > 1:  # its memory is given up only when it has been copied
                    transfers.wait_on_host(leaving[0][0])
                    del leaving[0]
                if index < len(rows):
                    coming = self._load(read(*rows[index]), conv, comes)
                if not index:
                    continue
                transfers.wait(arrival)
                if comes and self.store is not None:
                    for number in range(len(strips)):
                        strips[number] = strips[number].contiguous(memory_format=memory_format(conv.weight))
                part = compute(strips, start, stop)
                moments.add(part)
                if leaves and self.store is not None:
                    part = part.contiguous(memory_format=torch.channels_last)
                    leaving.append((transfers.copy(out[:, :, start:stop], part, transfers.mark()), part))
                else:
                    out[:, :, start:stop] = part
                del part
        finally:
            transfers.finish()  # also after an error: no strip's memory may go while it is copied
        return moments.describe(out)

    def _rows(self, out: Tensor, num_source_channels: int) -> list[tuple[int, int]]:
        """First and last rows of strips; even, since a layer may double them."""
        pixels = STRIP_ELEMENTS // max(out.shape[1], num_source_channels)
        pixels = pixels if self.max_pixels is None else min(pixels, self.max_pixels)
        rows = max(2, pixels // out.shape[-1] // 2 * 2)
        return [(start, min(start + rows, out.shape[-2])) for start in range(0, out.shape[-2], rows)]

    def _empty(self, conv: nn.Conv2d, height: int, width: int, *reads: Tensor, kept: bool = True) -> Tensor:
        """Memory for a convolution's result, apart from those tensors that it is made of.

        Host memory has channels last, whatever the order of the convolution: rows are then one piece to copy.
        """
        like, shape = reads[0], (1, conv.out_channels, height, width)
        if not kept or self.store is None:
            device, layout = conv.weight.device, memory_format(conv.weight)
            return torch.empty(shape, dtype=like.dtype, device=device, memory_format=layout)
        with torch.inference_mode(False):  # `Transfers` writes to no tensor of inference mode
            if self.store.type != "cpu":
                return torch.empty(shape, dtype=like.dtype, device=self.store, memory_format=torch.channels_last)
            num_bytes = torch.Size(shape).numel() * like.itemsize
            memory = self._host_memory(num_bytes, reads, conv.weight.device).bytes[:num_bytes]
            return memory.view(like.dtype).view(1, height, width, -1).permute(0, 3, 1, 2)

    def _host_memory(self, num_bytes: int, reads: tuple[Tensor, ...], device: torch.device) -> HostBuffer:
        """Host memory in which none of these tensors lies; besides them, no layer's result is needed any more."""
        addresses = [tensor.untyped_storage().data_ptr() for tensor in reads]
        taken = [buffer for buffer in self._memory if buffer.bytes.untyped_storage().data_ptr() in addresses]
        free = [buffer for buffer in self._memory if buffer not in taken]
        fitting = [buffer for buffer in free if num_bytes <= buffer.bytes.numel() <= 2 * num_bytes]
        if fitting:
            return fitting[0]
        del free
        self._memory = taken  # what does not fit goes before there is more
        buffer = HostBuffer(num_bytes)
        if device.type == "cuda":
            with on_device(device):
                buffer.pin()
        self._memory.append(buffer)
        return buffer

    def _load(self, strips: list[Tensor], conv: nn.Conv2d, kept: bool) -> tuple[list[Tensor], Event]:
        """Orders copies of strips to the device; gives them, and the event after which they are there."""
        if not kept or self.store is None:
            return strips, None
        event, device, layout = None, conv.weight.device, torch.channels_last
        with torch.inference_mode(False):
            targets = [torch.empty(one.shape, dtype=one.dtype, device=device, memory_format=layout) for one in strips]
        after = self._transfers.mark()  # whatever had the targets' memory before is over then
        for target, strip in zip(targets, strips, strict=True):
            event = self._transfers.copy(target, strip, after)
        return targets, event

    def _keep(self, tensor: Tensor, conv: nn.Conv2d) -> Whole:
        moments = Moments()
        for rows in tensor.split(max(1, STRIP_ELEMENTS // (tensor.shape[1] * tensor.shape[-1])), dim=2):
            moments.add(rows)
        if self.store is not None:
            whole = self._empty(conv, tensor.shape[2], tensor.shape[3], tensor)
            tensor = whole.copy_(tensor.contiguous(memory_format=torch.channels_last))
        return moments.describe(tensor)


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
