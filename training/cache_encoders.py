"""The encoders that fill a cache: loaded when first used, with batches that get smaller where memory is short."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.checkpoint import load_autoencoder
from ..flux2_core.command_errors import is_out_of_memory
from ..flux2_core.device_memory import available_host_bytes, device_budget
from ..flux2_core.images import image_to_tensor, open_picture
from ..flux2_core.memory import MemoryRequest, plan_text_encoder
from ..flux2_core.placement import NAMES, place_text_encoder, text_encoder_facts, text_encoder_variant
from ..flux2_core.streaming import BlockStreamer, stream_text_encoder
from ..flux2_core.text_encoder import TextEncoder, load_text_encoder
from ..flux2_core.variants import TextEncoderConfig
from .cache_plan import PictureFile
from .fingerprint import AutoencoderIdentity, TextEncoderIdentity

logger = logging.getLogger(__name__)

MAX_BATCH = 16
"""Pictures in a batch on a GPU where nothing else is asked for; more are no faster."""
USED_MEMORY = 0.8
"""Share of the GPU's free memory that a batch may take."""
LIVE_ACTIVATIONS = 8
"""Tensors of the first level's size that the autoencoder's encoder has in memory at a time, at most."""


class PictureEncoder:
    """An autoencoder for fitted pictures; masks pass through.

    Args:
        path: of the weights.
        identity: of the same.
        device: where it runs.
        batch_size: None: by free memory on CUDA, else one by one.
    """

    def __init__(
        self,
        path: str | Path,
        identity: AutoencoderIdentity,
        *,
        device: torch.device | str,
        batch_size: int | None = None,
    ) -> None:
        self.path = path
        self.identity = identity
        self.device = torch.device(device)
        self.max_batch = batch_size or (MAX_BATCH if self.device.type == "cuda" else 1)
        self.max_pixels = math.inf
        """Of a batch."""
        self.tile_from = math.inf
        """Pixels of a picture from which it is encoded in tiles."""
        self._measures_memory = batch_size is None and self.device.type == "cuda"
        self._autoencoder: Flux2Autoencoder | None = None

    def batch_size(self, picture: Tensor) -> int:
        """How many inputs like this one go together."""
        if picture.dim() == 2:
            return 1
        if self._measures_memory:
            self._load()
        return max(1, int(min(self.max_pixels / (picture.shape[-2] * picture.shape[-1]), self.max_batch)))

    def encode(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Pictures ``[1, 3, H, W]`` of one size to latents ``[128, H/16, W/16]``, fp32 on the CPU.

        Raises:
            ValueError: even one picture does not fit into memory.
        """
        if pictures[0].dim() == 2:
            return list(pictures)
        latents: list[Tensor] = []
        while len(latents) < len(pictures):
            count = self.batch_size(pictures[0])
            chunk = torch.cat(list(pictures[len(latents) : len(latents) + count]))
            pixels = chunk.shape[-2] * chunk.shape[-1]
            result = unless_out_of_memory(lambda chunk=chunk: self._encode(chunk))
            if result is not None:
                latents += list(result)
            elif len(chunk) > 1:
                self.max_pixels = pixels * (len(chunk) // 2)
            elif pixels < self.tile_from:
                self.tile_from = pixels
            else:
                raise ValueError(
                    f"a picture of {chunk.shape[-1]}x{chunk.shape[-2]} px does not fit into memory, in tiles neither; "
                    "take --vae_dtype bf16 or --device cpu, or a smaller resolution"
                )
        return latents

    def _encode(self, chunk: Tensor) -> Tensor:
        autoencoder = self._load()
        is_tiled = chunk.shape[-2] * chunk.shape[-1] >= self.tile_from
        with torch.inference_mode():
            images = chunk.to(self.device)
            return (autoencoder.encode_tiled(images) if is_tiled else autoencoder.encode(images)).cpu()

    def _load(self) -> Flux2Autoencoder:
        if self._autoencoder is None:
            self._autoencoder = load_autoencoder(self.path, dtype=self.identity.torch_dtype, device=self.device)
            if self._measures_memory:
                width = self._autoencoder.config.encoder_widths[0]
                bytes_per_pixel = LIVE_ACTIVATIONS * width * self.identity.torch_dtype.itemsize
                self.max_pixels = USED_MEMORY * torch.cuda.mem_get_info(self.device)[0] / bytes_per_pixel
        return self._autoencoder


class CaptionEncoder:
    """A text encoder for captions; layers that do not fit on the device are streamed, which changes no bit.

    Args:
        path: of the weights.
        config: of the variant.
        identity: of the weights.
        device: where it runs.
        batch_size: None: one by one, which gives the same bits as encoding a prompt at run time.
        tokenizer: as in `load_text_encoder`.
    """

    def __init__(
        self,
        path: str | Path,
        config: TextEncoderConfig,
        identity: TextEncoderIdentity,
        *,
        device: torch.device | str,
        batch_size: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.config = config
        self.identity = identity
        self.device = torch.device(device)
        self.max_batch = batch_size or 1
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.cut: list[str] = []
        """Captions that lost tokens at the end."""
        self._text_encoder: TextEncoder | None = None
        self._streamer: BlockStreamer | None = None

    def batch_size(self, caption: str) -> int:
        """How many captions go together."""
        return self.max_batch

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions to embeddings ``[max_tokens, context_dim]`` on the CPU.

        Raises:
            ValueError: even one caption does not fit into memory.
        """
        embeddings: list[Tensor] = []
        while len(embeddings) < len(captions):
            chunk = captions[len(embeddings) : len(embeddings) + self.max_batch]
            result = unless_out_of_memory(lambda chunk=chunk: self._encode(chunk))
            if result is not None:
                embeddings += list(result)
            elif len(chunk) > 1:
                self.max_batch = len(chunk) // 2
            elif not self._keep_less():
                raise ValueError("one caption does not fit into memory; take --text_encoder_dtype bf16 or --device cpu")
        return embeddings

    def _encode(self, captions: Sequence[str]) -> Tensor:
        if self._text_encoder is None:
            self._text_encoder, self._streamer = self._load()
        encoding = self._text_encoder.encode(captions)
        self.cut += [caption for caption, num_cut in zip(captions, encoding.num_cut, strict=True) if num_cut]
        return encoding.embeddings.cpu()

    def _load(self) -> tuple[TextEncoder, BlockStreamer | None]:
        dtype, variant = self.identity.torch_dtype, text_encoder_variant(self.path)
        if variant is None:  # memory is planned for the widths of variants
            settings: dict[str, Any] = {"tokenizer": self.tokenizer, "dtype": dtype, "device": self.device}
            return load_text_encoder(self.path, self.config, **settings), None
        facts = text_encoder_facts(self.path)
        request = MemoryRequest(
            variant=variant,
            text_encoder_precision=NAMES[dtype],
            text_encoder_file=facts,
            device_type=self.device.type,
        )
        plan = plan_text_encoder(request, device_budget(self.device), available_host_bytes())
        return place_text_encoder(self.path, self.config, plan, self.device, facts=facts, tokenizer=self.tokenizer)

    def _keep_less(self) -> bool:
        """Leaves the layers in host memory; whether that is less than before."""
        if self._text_encoder is None:
            return False
        if self._streamer is None:
            self._streamer = stream_text_encoder(self._text_encoder, self.device, num_resident=0)
        elif self._streamer.num_resident:
            self._streamer.set_num_resident(0)
        else:
            return False
        return True


def unless_out_of_memory(compute: Callable[[], Tensor]) -> Tensor | None:
    """What `compute` gives, or None where memory was too small for it; memory is freed then."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the error's traceback kept the tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def prepare_picture(file: PictureFile) -> Tensor:
    """A picture fitted for the autoencoder, ``[1, 3, H, W]`` in -1..1, or a mask's weights ``[h, w]`` in 0..1, fp32.

    Raises:
        ValueError: it cannot be read, or changed since the dataset was listed.
    """
    with open_picture(file.source) as image:
        image.load()
        try:
            fitted = file.fit(image)
        except ValueError as error:
            raise ValueError(f"{file.source}: {error}") from error
    if file.mirrored:
        fitted = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = (side * PIXELS_PER_LATENT for side in file.shape[-2:])
    if fitted.size != (width, height):
        raise ValueError(f"{file.source} changed while the dataset was cached; run the command again")
    if file.kind != "mask":
        return image_to_tensor(fitted)
    weights = image_to_tensor(fitted)[:, :1] / 2 + 0.5
    return F.avg_pool2d(weights, PIXELS_PER_LATENT)[0, 0].clamp(0, 1)
