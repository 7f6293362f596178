"""Nodes that let native nodes use our networks: samplers, VAE nodes, and those that encode prompts."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.images import MIN_SIDE
from ..flux2_core.pipeline import MAX_STEPS, SamplingConfig
from ..flux2_core.schedule import MIN_STRENGTH, empirical_mu, sigma_schedule
from ..flux2_core.text_encoder import TextEncoder
from . import host
from .loaders import LoadedDiT
from .native_encoders import BridgedCLIP, BridgedVAE
from .native_model import to_model
from .sampling import MAX_SIDE, flow_shift_widget, sampling_config, variant_values, widget_value


class ToModel:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Makes a native MODEL of a FLUX.2 DiT and its LoRAs: KSampler, SamplerCustomAdvanced, guiders, FluxGuidance "
        "and ReferenceLatent work with it. Native LoRA loaders and block patches do not."
    )
    SEARCH_ALIASES = ("ksampler", "native model", "bridge", "model", "samplercustomadvanced")
    FUNCTION = "convert"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The DiT for native samplers and guiders. Latents are those of FLUX.2, natively as well.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "dit": ("FLUX2_DIT", {"tooltip": "The diffusion transformer, with or without LoRAs."}),
                **schedule_widgets(),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, width: int | None = None, height: int | None = None, num_steps: int | None = None
    ) -> bool | str:
        return validate_schedule(width, height, num_steps)

    @classmethod
    def convert(cls, dit: LoadedDiT, **settings: Any) -> tuple[Any]:
        sampling = sampling_config(settings, None).resolved(dit.variant)
        return (to_model(dit, shift_exponent(sampling)),)


class Sigmas:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Computes the noise schedule of FLUX.2 Sample as SIGMAS, for SamplerCustomAdvanced and other native samplers."
    )
    SEARCH_ALIASES = ("scheduler", "basicscheduler", "flux2scheduler", "sigmas", "noise schedule")
    FUNCTION = "compute"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = ("Noise levels down to 0, one more than there are steps.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "dit": ("FLUX2_DIT", {"tooltip": "Its variant decides what is left at 0."}),
                **schedule_widgets(),
            },
            "optional": {
                "denoise": (
                    "FLOAT",
                    {
                        "default": SamplingConfig.strength,
                        "min": MIN_STRENGTH,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Below 1 for image to image: the last num_steps of a schedule that is longer by as "
                        "much, as in FLUX.2 Sample and KSampler.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, width: int | None = None, height: int | None = None, num_steps: int | None = None
    ) -> bool | str:
        return validate_schedule(width, height, num_steps)

    @classmethod
    def compute(cls, dit: LoadedDiT, *, denoise: float = SamplingConfig.strength, **settings: Any) -> tuple[Tensor]:
        sampling = sampling_config({**settings, "strength": denoise}, None).resolved(dit.variant)
        assert sampling.num_steps is not None
        sigmas = sigma_schedule(
            sampling.num_steps, num_tokens(sampling), sampling.flow_shift, strength=sampling.strength
        )
        return (sigmas.float(),)


class ToVAE:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Makes a native VAE of a FLUX.2 autoencoder, for VAE Encode, VAE Decode, their tiled forms and inpainting."
    )
    SEARCH_ALIASES = ("vae", "native vae", "bridge", "vae decode", "vae encode")
    FUNCTION = "convert"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The autoencoder for native nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ae": ("FLUX2_AE", {"tooltip": "The autoencoder, from Load FLUX.2 AE."})}}

    @classmethod
    def convert(cls, ae: Flux2Autoencoder) -> tuple[BridgedVAE]:
        return (BridgedVAE(ae),)


class ToCLIP:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Makes a native CLIP of a FLUX.2 text encoder, for CLIP Text Encode. Prompts encoded with it work in native "
        "samplers and in FLUX.2 Sample."
    )
    SEARCH_ALIASES = ("clip", "native clip", "bridge", "clip text encode")
    FUNCTION = "convert"
    RETURN_TYPES = ("CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("The text encoder for native nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "The text encoder, from Load FLUX.2 Text Encoder."
        return {"required": {"text_encoder": ("FLUX2_TEXT_ENCODER", {"tooltip": tooltip})}}

    @classmethod
    def convert(cls, text_encoder: TextEncoder) -> tuple[BridgedCLIP]:
        return (BridgedCLIP(text_encoder),)


def schedule_widgets() -> dict[str, Any]:
    """Widgets of everything that the noise schedule follows from."""
    side = {"default": widget_value(SamplingConfig.width), "min": 0, "max": MAX_SIDE, "step": PIXELS_PER_LATENT}
    size = (
        f"of the picture in pixels, a multiple of {PIXELS_PER_LATENT} from {MIN_SIDE} on: the noise schedule follows "
        f"it. {variant_values('default_size')}"
    )
    return {
        "width": ("INT", {**side, "tooltip": f"Width {size}"}),
        "height": ("INT", {**side, "tooltip": f"Height {size}"}),
        "num_steps": (
            "INT",
            {
                "default": widget_value(SamplingConfig.num_steps),
                "min": 0,
                "max": MAX_STEPS,
                "tooltip": f"Steps of the sampler: the noise schedule follows them. {variant_values('num_steps')}",
            },
        ),
        "flow_shift": flow_shift_widget(),
    }


def validate_schedule(width: int | None, height: int | None, num_steps: int | None) -> bool | str:
    """None stands for a link, whose value is not known before the run; 0 for the variant's own."""
    try:
        SamplingConfig(width=width or None, height=height or None, num_steps=num_steps or None)
    except ValueError as error:
        return str(error)
    return True


def num_tokens(sampling: SamplingConfig) -> int:
    """Image tokens of one picture."""
    assert sampling.width and sampling.height
    return (sampling.width // PIXELS_PER_LATENT) * (sampling.height // PIXELS_PER_LATENT)


def shift_exponent(sampling: SamplingConfig) -> float:
    """The mu with which ComfyUI's schedule for FLUX is that of `sigma_schedule`; the settings are resolved."""
    assert sampling.num_steps is not None
    if sampling.flow_shift is not None:
        return math.log(sampling.flow_shift)
    return empirical_mu(num_tokens(sampling), sampling.num_steps)
