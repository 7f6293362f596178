"""Our autoencoder as ComfyUI's VAE, and our text encoder as its CLIP: what native nodes call on them, and no more.

Both stand on their own: ComfyUI's classes build networks of their own when they are made. What native nodes would
change in them is refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.autoencoder_memory import decoding_bytes, encoding_bytes, host_strip_bytes
from ..flux2_core.latents import NUM_LATENT_CHANNELS
from ..flux2_core.pipeline import check_latents, encode_prompt
from ..flux2_core.streaming import HOST
from ..flux2_core.text_encoder import TextEncoder
from . import host, patchers
from .strips import first_that_fits


class BridgedVAE:
    """What VAE Encode, VAE Decode, their tiled forms and inpainting nodes use of a VAE.

    Pictures are ``[B, H, W, 3]`` in 0..1, latents ``[B, 128, H/16, W/16]``.
    """

    latent_channels = NUM_LATENT_CHANNELS
    latent_dim = 2
    output_channels = 3
    downscale_ratio = upscale_ratio = PIXELS_PER_LATENT
    downscale_index_formula = upscale_index_formula = extra_1d_channel = None
    crop_input = True

    def __init__(self, autoencoder: Flux2Autoencoder) -> None:
        self.first_stage_model = autoencoder

    @property
    def vae_dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.first_stage_model.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.first_stage_model.decoder.conv_in.weight.device

    output_device = HOST

    def throw_exception_if_invalid(self) -> None:
        """A loaded autoencoder is always valid."""

    def spacial_compression_encode(self) -> int:
        return PIXELS_PER_LATENT

    def spacial_compression_decode(self) -> int:
        return PIXELS_PER_LATENT

    def temporal_compression_decode(self) -> None:
        """None: pictures, not videos."""

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Crops to multiples of 16 px around the centre, as native VAEs do."""
        for axis in (1, 2):
            side = pixels.shape[axis] // PIXELS_PER_LATENT * PIXELS_PER_LATENT
            pixels = pixels.narrow(axis, (pixels.shape[axis] - side) // 2, side)
        return pixels

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Pictures to latents, one at a time: memory does not grow with the batch."""
        ae = self.first_stage_model
        self._use(encoding_bytes, pixel_samples.shape[2], pixel_samples.shape[1])
        return self._encode(pixel_samples, ae.encode, ae.encode_tiled, partial(ae.encode_tiled, store=HOST))

    def encode_tiled(self, pixel_samples: Tensor, tile_x: int | None = None, **_: object) -> Tensor:
        """As `encode`, in strips: the same numbers in less memory.

        Args:
            tile_x: a strip covers about as much as a square of this side, in pixels. Strips need no overlap.
        """
        tile = None if tile_x is None else max(tile_x // PIXELS_PER_LATENT, 1)
        ae = self.first_stage_model
        self._use(partial(host_strip_bytes, decodes=False), pixel_samples.shape[2], pixel_samples.shape[1])
        return self._encode(
            pixel_samples, partial(ae.encode_tiled, tile=tile), partial(ae.encode_tiled, tile=tile, store=HOST)
        )

    def decode(self, samples_in: Tensor, vae_options: Mapping[str, Any] | None = None) -> Tensor:
        """Latents to pictures, one at a time."""
        ae = self.first_stage_model
        self._use(decoding_bytes, *patchers.latent_size(samples_in))
        return self._decode(samples_in, ae.decode, ae.decode_tiled, partial(ae.decode_tiled, store=HOST))

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, **_: object) -> Tensor:
        """As `decode`, in strips: the same numbers in less memory.

        Args:
            tile_x: a strip covers about as much as a square of this side, in latent positions.
        """
        tile = None if tile_x is None else max(tile_x, 1)
        ae = self.first_stage_model
        self._use(partial(host_strip_bytes, decodes=True), *patchers.latent_size(samples))
        return self._decode(
            samples, partial(ae.decode_tiled, tile=tile), partial(ae.decode_tiled, tile=tile, store=HOST)
        )

    def get_sd(self) -> dict[str, Tensor]:
        """The weights, which Save VAE writes in Black Forest Labs' layout."""
        return self.first_stage_model.state_dict()

    @torch.inference_mode()
    def _encode(self, pixels: Tensor, *ways: Callable[[Tensor], Tensor]) -> Tensor:
        if pixels.dim() != 4 or pixels.shape[-1] < 3:
            raise ValueError(
                f"FLUX.2 encodes pictures [batch, height, width, 3]; it got a tensor of shape {tuple(pixels.shape)}"
            )
        images = self.vae_encode_crop_pixels(pixels[..., :3]).movedim(-1, 1) * 2 - 1
        return _run_rows(ways, images, self.output_device)

    @torch.inference_mode()
    def _decode(self, latents: Tensor, *ways: Callable[[Tensor], Tensor]) -> Tensor:
        check_latents(latents, self.first_stage_model.config.packed_channels, "the input of VAE Decode")
        pictures = _run_rows(ways, latents, self.output_device)
        return ((pictures + 1) / 2).clamp(0, 1).movedim(1, -1)

    def _use(self, num_bytes: Callable[..., int], width: int, height: int) -> None:
        config, is_cuda = self.first_stage_model.config, host.device().type == "cuda"
        work_bytes = num_bytes(config, width, height, self.vae_dtype.itemsize, is_cuda=is_cuda)
        patchers.use(self.first_stage_model, work_bytes)


class Tokens(dict[str, list[str]]):
    """A prompt on its way from tokenize to encode_from_tokens: tokenizing is the text encoder's own work."""

    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(
            f"a native node asks for {key!r} tokens, which FLUX.2 has not; use CLIP Text Encode, with FluxGuidance "
            "behind it for dev"
        )


class BridgedCLIP:
    """What CLIP Text Encode and its like use of a CLIP."""

    PROMPT = "flux2"
    layer_idx = None
    use_clip_schedule = False

    def __init__(self, text_encoder: TextEncoder) -> None:
        self.text_encoder = text_encoder
        self.cond_stage_model = nn.Module()
        """Without weights: LoRA loaders look for theirs in it before they call `add_patches`."""

    def clone(self) -> BridgedCLIP:
        """A second one over the same text encoder."""
        return BridgedCLIP(self.text_encoder)

    def tokenize(self, text: str, return_word_ids: bool = False, **_: object) -> Tokens:
        """Keeps the text: brackets and weights in it mean nothing to FLUX.2's text encoders, natively as well."""
        return Tokens({self.PROMPT: [text]})

    def encode_from_tokens(
        self, tokens: Mapping[str, list[str]], return_pooled: object = False, return_dict: bool = False
    ) -> Any:
        """The embedding ``[1, L, C]``, with a pooled output of None where that is asked for."""
        (text,) = tokens[self.PROMPT]
        patchers.use_text_encoder(self.text_encoder)
        embedding = encode_prompt(self.text_encoder, text).cpu()
        if return_dict:
            return {"cond": embedding, "pooled_output": None}
        return (embedding, None) if return_pooled else embedding

    def encode_from_tokens_scheduled(
        self,
        tokens: Mapping[str, list[str]],
        unprojected: bool = False,
        add_dict: Mapping[str, Any] | None = None,
        show_pbar: bool = True,
    ) -> list[list[Any]]:
        """Native CONDITIONING with the options of ``add_dict``."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def encode(self, text: str) -> Tensor:
        """The embedding of a text."""
        return self.encode_from_tokens(self.tokenize(text))

    def clip_layer(self, layer_idx: int) -> NoReturn:
        """Refused."""
        raise ValueError("FLUX.2 reads three fixed layers of its text encoder; remove CLIP Set Last Layer")

    def add_patches(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused."""
        raise ValueError(
            "a native node patches weights of this CLIP, which comes from FLUX.2 to CLIP; LoRAs of FLUX.2 do not act "
            "on the text encoder: use LoraLoaderModelOnly for a native MODEL, FLUX.2 Apply LoRA for FLUX2_DIT"
        )

    def get_key_patches(self) -> NoReturn:
        """Refused."""
        self.add_patches()

    def load_model(self) -> NoReturn:
        """Refused: native nodes that call it go on to save the weights."""
        raise ValueError("a CLIP from FLUX.2 to CLIP has no weights to save; the file of the text encoder has them")

    def set_tokenizer_option(self, option_name: str, value: object) -> NoReturn:
        """Refused."""
        raise ValueError(f"the text encoder of FLUX.2 has no tokenizer option {option_name!r}; remove that node")


def _run_rows(ways: Sequence[Callable[[Tensor], Tensor]], batch: Tensor, device: torch.device) -> Tensor:
    """Each row of a batch in the first way for which memory is enough."""
    return torch.cat([first_that_fits([partial(way, row) for way in ways]).to(device) for row in batch.split(1)])
