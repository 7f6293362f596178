"""Nodes that make latents from noise and pictures from latents."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.images import MIN_SIDE
from ..flux2_core.latents import MAX_SEED
from ..flux2_core.pipeline import MAX_STEPS, SamplingConfig, decode_latents, sample_latents
from ..flux2_core.preview import PreviewFactors, fit_preview, preview_images
from ..flux2_core.reference_cache import ReferenceCacheMode
from ..flux2_core.sampling import DenoiseStep, StepCallback
from ..flux2_core.schedule import MIN_STRENGTH
from ..flux2_core.variants import VARIANTS
from . import host, patchers
from .conditioning import Conditioning, NativePrompt, References, read_conditioning
from .loaders import LoadedDiT
from .lora import live_loras
from .native_latents import Latent, read_latent
from .strips import DECODE_TOOLTIP, in_strips_where_needed

MAX_SIDE = 16384
"""Largest side that the widgets offer, in pixels: ComfyUI's own limit."""
MAX_IMAGES = 64
MAX_GUIDANCE = 100.0

_preview_factors: WeakKeyDictionary[Flux2Autoencoder, PreviewFactors] = WeakKeyDictionary()


class Sample:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Makes latents with a FLUX.2 DiT: text to image, editing where references are connected, image to image and "
        "inpainting from a latent. A setting left at 0 takes the value that the variant was made for."
    )
    SEARCH_ALIASES = ("ksampler", "sampler", "generate", "text to image", "image edit", "denoise", "img2img", "inpaint")
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Native latents [B, 128, height / 16, width / 16], for FLUX.2 Decode or a native VAE Decode.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": widget_value(SamplingConfig.width), "min": 0, "max": MAX_SIDE, "step": PIXELS_PER_LATENT}
        size = f"of the picture in pixels, a multiple of {PIXELS_PER_LATENT} from {MIN_SIDE} on."
        scale = {"min": 0.0, "max": MAX_GUIDANCE, "step": 0.1}
        return {
            "required": {
                "dit": ("FLUX2_DIT", {"tooltip": "The diffusion transformer."}),
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "The prompt, from FLUX.2 Encode Prompt or from native nodes."},
                ),
                "width": ("INT", {**side, "tooltip": f"Width {size} {variant_values('default_size')}"}),
                "height": ("INT", {**side, "tooltip": f"Height {size} {variant_values('default_size')}"}),
                "num_steps": (
                    "INT",
                    {
                        "default": widget_value(SamplingConfig.num_steps),
                        "min": 0,
                        "max": MAX_STEPS,
                        "tooltip": f"Euler steps. {variant_values('num_steps')}",
                    },
                ),
                "cfg_scale": (
                    "FLOAT",
                    {
                        **scale,
                        "default": widget_value(SamplingConfig.cfg_scale),
                        "tooltip": "Classifier-free guidance: above 1 it needs a negative prompt and doubles the time. "
                        f"1: off. {variant_values('cfg_scale')}",
                    },
                ),
                "guidance": (
                    "FLOAT",
                    {
                        **scale,
                        "default": widget_value(SamplingConfig.guidance),
                        "tooltip": "Embedded guidance, an input of dev alone; other variants refuse it. 0: that of a "
                        f"FluxGuidance node, else the variant's own ({_values('guidance')}).",
                    },
                ),
                "flow_shift": flow_shift_widget(),
                "seed": (
                    "INT",
                    {
                        "default": SamplingConfig.seed,
                        "min": 0,
                        "max": MAX_SEED,
                        "control_after_generate": True,
                        "tooltip": "The noise to start from: the same seed and settings give the same picture.",
                    },
                ),
                "num_images": (
                    "INT",
                    {
                        "default": SamplingConfig.num_images,
                        "min": 1,
                        "max": MAX_IMAGES,
                        "tooltip": "Pictures made at once from one seed; the first is the one that 1 would give.",
                    },
                ),
            },
            "optional": {
                "negative": (
                    "CONDITIONING",
                    {"tooltip": "What to steer away from; may be an empty prompt. Used where cfg_scale is not 1."},
                ),
                "references": ("FLUX2_REFERENCES", {"tooltip": "Pictures to edit, from FLUX.2 Encode Reference."}),
                "ae": ("FLUX2_AE", {"tooltip": "Connect the autoencoder to see a preview of every step."}),
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "What to start from. An empty latent sets size and number of pictures; an encoded "
                        "picture is changed as far as denoise says; with a mask, only inside of it. Leave width and "
                        "height at 0 and num_images at 1."
                    },
                ),
                "denoise": (
                    "FLOAT",
                    {
                        "default": SamplingConfig.strength,
                        "min": MIN_STRENGTH,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "How much of the latent is made anew; 1 keeps only its size, and what its mask "
                        "keeps. All num_steps are run, as in KSampler.",
                    },
                ),
                "reference_cache": (
                    ["auto", "off", "approximate"],
                    {
                        "default": SamplingConfig.reference_cache,
                        "tooltip": "Compute references once for all steps. auto: so for klein-9b-kv, which was trained "
                        "for it, and in every step for others. approximate: once for others too, which is faster, but "
                        "edits go wrong more often. off: in every step.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width: int | None = None, height: int | None = None) -> bool | str:
        try:
            SamplingConfig(width=width or None, height=height or None)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def sample(
        cls,
        dit: LoadedDiT,
        positive: Conditioning,
        *,
        negative: Conditioning | None = None,
        references: References | None = None,
        ae: Flux2Autoencoder | None = None,
        latent: Latent | None = None,
        denoise: float = SamplingConfig.strength,
        reference_cache: ReferenceCacheMode = SamplingConfig.reference_cache,
        unique_id: str | None = None,
        **settings: Any,
    ) -> tuple[Latent]:
        prompt = read_conditioning(positive, "positive", dit.variant.text_encoder)
        against = read_conditioning(negative, "negative", dit.variant.text_encoder) if negative is not None else None
        check_agreement(prompt, against)
        settings |= {"strength": denoise, "reference_cache": reference_cache}
        start = read_latent(latent, settings) if latent is not None else None
        settings = start.settings if start is not None else settings
        sampling = sampling_config(settings, prompt.guidance).resolved(dit.variant)
        host.show_text(describe(sampling, dit.variant.name, len(dit.loras)), unique_id)
        reference_latents = all_references(prompt.references, references)
        on_step = show_steps(sampling.num_steps or 0, ae, unique_id)

        def work() -> Tensor:
            patchers.use(dit.dit, patchers.sampling_bytes(dit, sampling, prompt.text, reference_latents))
            with live_loras(dit):
                return sample_latents(
                    dit.dit,
                    dit.variant,
                    sampling,
                    prompt.text,
                    negative_text=against.text if against is not None else None,
                    references=reference_latents,
                    noise=start.noise(sampling) if start is not None else None,
                    initial=start.samples if start is not None else None,
                    mask=start.mask if start is not None else None,
                    on_step=on_step,
                    should_stop=host.should_stop,
                )

        samples = dit.run(work).cpu()
        return ({"samples": samples} if start is None or latent is None else start.result(latent, samples),)


class Decode:
    CATEGORY = host.CATEGORY
    DESCRIPTION = "Decodes FLUX.2 latents to pictures with the autoencoder."
    SEARCH_ALIASES = ("vae decode", "latent to image", "decode")
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("Native pictures, one for each latent of the batch.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ae": ("FLUX2_AE", {"tooltip": "The autoencoder that belongs to the DiT which made the latents."}),
                "latent": ("LATENT", {"tooltip": "Latents of FLUX.2 Sample, or of native FLUX.2 nodes."}),
                "tiling": (
                    "BOOLEAN",
                    {
                        "default": SamplingConfig.tile_autoencoder,
                        "tooltip": DECODE_TOOLTIP,
                    },
                ),
            }
        }

    @classmethod
    def decode(cls, ae: Flux2Autoencoder, latent: dict[str, Tensor], tiling: bool) -> tuple[Tensor]:
        latents = latent["samples"]
        sizes = [patchers.latent_size(latents)]
        patchers.use(ae, patchers.picture_bytes(ae, sizes, decodes=True, tiled=tiling))
        pictures = in_strips_where_needed(partial(decode_latents, ae, latents), tiled=tiling)
        return (torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255,)


def flow_shift_widget() -> tuple[str, dict[str, Any]]:
    """The widget for the shift of the noise schedule."""
    return (
        "FLOAT",
        {
            "default": widget_value(SamplingConfig.flow_shift),
            "min": 0.0,
            "max": 100.0,
            "step": 0.01,
            "tooltip": "Shift of the noise schedule: a larger one spends more steps on composition. 0: what follows "
            "from size and steps, as in the reference implementation.",
        },
    )


def widget_value(default: Any) -> Any:
    """The core's "left open" as a number, since a widget cannot be empty."""
    return 0 if default is None else default


def variant_values(attribute: str) -> str:
    """A sentence for tooltips: what a variant takes where the widget is left at 0."""
    return f"0: the variant's own ({_values(attribute)})."


def sampling_config(settings: dict[str, Any], guidance_of_prompt: float | None) -> SamplingConfig:
    """Widget values to the core's settings: 0 stands for "left open" wherever the core knows such a thing."""
    opened: dict[str, Any] = {
        name: None if value == 0 and getattr(SamplingConfig, name) is None else value
        for name, value in settings.items()
    }
    if opened.get("guidance") is None:
        opened["guidance"] = guidance_of_prompt
    return SamplingConfig(**opened)


def check_agreement(positive: NativePrompt, negative: NativePrompt | None) -> None:
    """Refuses a negative prompt with guidance or references of its own: both prompts run as one batch."""
    if negative is None:
        return
    if negative.guidance is not None and negative.guidance != positive.guidance:
        raise ValueError(
            f"positive has guidance {positive.guidance} and negative {negative.guidance}; FLUX.2 Sample takes one, "
            "from positive"
        )
    same = len(positive.references) == len(negative.references) and all(
        map(torch.equal, positive.references, negative.references)
    )
    if negative.references and not same:
        raise ValueError(
            f"positive has {len(positive.references)} references and negative {len(negative.references)} others; "
            "FLUX.2 Sample gives those of positive to both, so connect ReferenceLatent to positive alone"
        )


def all_references(latents: list[Tensor], references: References | None) -> list[Tensor]:
    """References of the native conditioning or of ours."""
    if latents and references is not None:
        raise ValueError(
            f"positive carries {len(latents)} references and {len(references.pictures)} more are connected; use "
            "ReferenceLatent or FLUX.2 Encode Reference, not both: their order and size would be undefined"
        )
    return latents if references is None else references.latents


def show_steps(num_steps: int, ae: Flux2Autoencoder | None, node_id: str | None) -> StepCallback:
    """Moves the node's progress bar, with a preview of the first picture where there is an autoencoder."""
    progress = host.Progress(num_steps, node_id)
    if ae is not None and ae not in _preview_factors:
        patchers.use(ae, 0)
        _preview_factors[ae] = fit_preview(ae)

    def on_step(step: DenoiseStep) -> None:
        preview = preview_images(step.denoised[:1], ae, _preview_factors[ae])[0] if ae is not None else None
        progress.update(step.index, preview)

    return on_step


def describe(sampling: SamplingConfig, variant: str, num_loras: int = 0) -> str:
    """One line with what the settings left at 0 became."""
    parts = [variant, f"{sampling.width}x{sampling.height}", f"{sampling.num_steps} steps"]
    parts += [f"cfg {sampling.cfg_scale:g}"] if sampling.cfg_scale not in (None, 1) else []
    parts += [f"guidance {sampling.guidance:g}"] if sampling.guidance is not None else []
    parts += [f"denoise {sampling.strength:g}"] if sampling.strength != 1 else []
    parts += ["references approximate"] if sampling.reference_cache == "approximate" else []
    parts += [f"{num_loras} LoRA{'s' if num_loras > 1 else ''}"] if num_loras else []
    return ", ".join(parts)


def _values(attribute: str) -> str:
    """The variants' values, those that agree together: "50: dev, klein-base-4b; 4: klein-4b"."""
    names: dict[str, list[str]] = {}
    for variant in VARIANTS.values():
        value = getattr(variant, attribute)
        if value is not None:
            names.setdefault(f"{value:g}", []).append(variant.name)
    return "; ".join(f"{value} for {', '.join(group)}" for value, group in names.items())
