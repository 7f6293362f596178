"""Nodes that encode what a picture is made from: prompts and references; and native CONDITIONING in and out."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, AutoencoderConfig, Flux2Autoencoder
from ..flux2_core.images import MAX_ASPECT, MIN_SIDE, reference_size, tensor_to_images, to_rgb
from ..flux2_core.pipeline import (
    MAX_REFERENCES,
    SamplingConfig,
    check_num_references,
    encode_fitted,
    encode_prompt,
    fit_references,
)
from ..flux2_core.reference_store import reference_store
from ..flux2_core.text_encoder import TextEncoder
from ..flux2_core.variants import TextEncoderConfig
from . import host, patchers
from .strips import ENCODE_TOOLTIP, in_strips_where_needed

Conditioning = list[list[Any]]
"""Native CONDITIONING: ``[[embeddings [B, L, C], options], ...]``."""

SINGLE_SIDE, SEVERAL_SIDE = AutoencoderConfig.reference_sides

UNSUPPORTED_OPTIONS = {
    "area": "an area",
    "mask": "a mask",
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
    "concat_latent_image": "an inpainting latent (connect a latent with a mask to latent for inpainting)",
}
"""Options of native CONDITIONING that FLUX.2 Sample has no way to carry out, for people."""


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """What goes over a FLUX2_REFERENCES link.

    It holds pictures, not latents: to which size a picture is scaled depends on how many there are in the end.
    """

    autoencoder: Flux2Autoencoder
    pictures: tuple[Image.Image, ...]
    resize: bool
    tiled: bool

    @cached_property
    def latents(self) -> list[Tensor]:
        """Encoded when first asked for; a picture that this autoencoder has encoded before is not encoded again."""
        autoencoder, known = self.autoencoder, reference_store(self.autoencoder)
        fitted = fit_references(self.pictures, autoencoder.config, resize=self.resize)
        if (found := known.get_all(fitted, tiled=self.tiled)) is not None:
            return found  # the autoencoder need not even be on the device
        sizes = [picture.size for picture in fitted]
        patchers.use(autoencoder, patchers.picture_bytes(autoencoder, sizes, decodes=False, tiled=self.tiled))
        encode = partial(encode_fitted, autoencoder, fitted, known=known)
        return in_strips_where_needed(encode, tiled=self.tiled)


@dataclass(frozen=True, kw_only=True, eq=False)
class NativePrompt:
    """What native CONDITIONING says."""

    text: Tensor
    """``[B, L, C]``, padded."""
    guidance: float | None
    references: list[Tensor]
    """Latents ``[1, 128, h_i, w_i]``."""


class EncodePrompt:
    CATEGORY = host.CATEGORY
    DESCRIPTION = "Encodes a prompt. The result also works in native nodes, and native prompts work in FLUX.2 Sample."
    SEARCH_ALIASES = ("clip text encode", "prompt", "text", "negative prompt", "conditioning")
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for positive or negative of FLUX.2 Sample.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": ("FLUX2_TEXT_ENCODER", {"tooltip": "The text encoder of the DiT's variant."}),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "What the picture shows, or how to change the references, which are called image 1, "
                        f"image 2, ... It may be empty. Beyond {TextEncoderConfig.max_tokens} tokens it is cut, with a "
                        "warning in the log.",
                    },
                ),
            }
        }

    @classmethod
    def encode(cls, text_encoder: TextEncoder, prompt: str) -> tuple[Conditioning]:
        patchers.use_text_encoder(text_encoder)
        # Native nodes combine conditionings on the CPU, and native samplers ask for a pooled output.
        return ([[encode_prompt(text_encoder, prompt).cpu(), {"pooled_output": None}]],)


class EncodeReference:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        f"Adds reference pictures for editing: one image or a batch, chained up to {MAX_REFERENCES}. Prompts call them "
        "image 1, image 2, ... in the order of the chain."
    )
    SEARCH_ALIASES = ("reference latent", "edit image", "kontext", "image edit", "multi reference")
    FUNCTION = "encode"
    RETURN_TYPES = ("FLUX2_REFERENCES",)
    RETURN_NAMES = ("references",)
    OUTPUT_TOOLTIPS = ("All references up to here, for FLUX.2 Sample or the next FLUX.2 Encode Reference.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ae": ("FLUX2_AE", {"tooltip": "The autoencoder that belongs to the DiT."}),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "One picture or a batch, each a reference. Any size, but sides of at least "
                        f"{MIN_SIDE} px and at most {MAX_ASPECT:g} : 1."
                    },
                ),
                "resize": (
                    "BOOLEAN",
                    {
                        "default": SamplingConfig.resize_references,
                        "tooltip": f"Scale large references down: one to the area of {SINGLE_SIDE}x{SINGLE_SIDE} px, "
                        f"several to that of {SEVERAL_SIDE}x{SEVERAL_SIDE} px each. Off: only crop to multiples of "
                        f"{PIXELS_PER_LATENT}. Small ones are never scaled up.",
                    },
                ),
                "tiling": (
                    "BOOLEAN",
                    {
                        "default": SamplingConfig.tile_autoencoder,
                        "tooltip": ENCODE_TOOLTIP,
                    },
                ),
            },
            "optional": {
                "references": ("FLUX2_REFERENCES", {"tooltip": "References that come before these ones."}),
            },
        }

    @classmethod
    def encode(
        cls, ae: Flux2Autoencoder, image: Tensor, resize: bool, tiling: bool, references: References | None = None
    ) -> tuple[References]:
        pictures = image_to_pictures(image)
        for picture in pictures:
            reference_size(*picture.size, None)  # refuses here what would fail only in Sample
        if references is not None:
            before = (references.autoencoder, references.resize, references.tiled)
            if before != (ae, resize, tiling):
                raise ValueError(
                    "the references in one chain need the same ae, resize and tiling, and those before this node have "
                    f"resize {references.resize}, tiling {references.tiled}; set all nodes of the chain alike"
                )
            pictures = [*references.pictures, *pictures]
        check_num_references(len(pictures))
        return (References(autoencoder=ae, pictures=tuple(pictures), resize=resize, tiled=tiling),)


def image_to_pictures(image: Tensor) -> list[Image.Image]:
    """Native IMAGE ``[B, H, W, C]`` in 0..1 to RGB pictures; transparency is composited on white."""
    if image.dim() != 4 or image.shape[-1] not in (3, 4):
        raise ValueError(f"an image has shape {tuple(image.shape)}; it must be [batch, height, width, 3 or 4 channels]")
    colours, alpha = image[..., :3], image[..., 3:]
    pictures = tensor_to_images(colours.permute(0, 3, 1, 2) * 2 - 1)
    if alpha.shape[-1]:
        for picture, mask in zip(pictures, alpha[..., 0].clamp(0, 1).mul(255).round().to(torch.uint8), strict=True):
            picture.putalpha(Image.fromarray(mask.cpu().numpy()))
    return [to_rgb(picture) for picture in pictures]


def read_conditioning(conditioning: Conditioning, name: str, config: TextEncoderConfig) -> NativePrompt:
    """What FLUX.2 Sample needs of native CONDITIONING.

    Raises:
        ValueError: it asks for what FLUX.2 Sample does not do, such as areas or several prompts at once.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"{name} combines {len(conditioning)} conditionings; FLUX.2 Sample takes one. Write all into one prompt."
        )
    embeddings, options = conditioning[0]
    unsupported = [what for key, what in UNSUPPORTED_OPTIONS.items() if options.get(key) is not None]
    if options.get("start_percent", 0) > 0 or options.get("end_percent", 1) < 1:
        unsupported.append("a range of steps")
    if unsupported:
        raise ValueError(f"{name} carries {', '.join(unsupported)}, which FLUX.2 Sample does not do; leave it out")
    # Native prompts are not padded; ComfyUI's FLUX.2 fills them up with zeros on the left.
    missing = max(config.max_tokens - embeddings.shape[1], 0)
    return NativePrompt(
        text=F.pad(embeddings, (0, 0, missing, 0)),
        guidance=options.get("guidance"),
        references=list(options.get("reference_latents") or []),
    )
