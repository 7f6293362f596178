"""Nodes that load the three networks."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from ..flux2_core.autoencoder import Flux2Autoencoder
from ..flux2_core.dit import Flux2DiT
from ..flux2_core.lora import LoraSetting
from ..flux2_core.text_encoder import TextEncoder
from ..flux2_core.variants import VARIANTS, Variant
from ..flux2_core.weights import WeightsComponent
from . import host

PRECISIONS: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
PRECISION_TOOLTIP = "Precision of weights and computation. default: as in the file; 8-bit weights become bf16."

Loaded = TypeVar("Loaded")

# Weak: networks live as long as a node's output holds them, and a second loader of the same file shares them.
_in_use: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedDiT:
    """What goes over a FLUX2_DIT link."""

    dit: Flux2DiT
    """Shared by all links from one loader, and without LoRAs."""
    variant: Variant
    loras: tuple[LoraSetting, ...] = ()
    """To be applied while this link's DiT runs."""


class LoadDiT:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Loads a FLUX.2 diffusion transformer: dev or any klein, from Black Forest Labs', diffusers' and ComfyUI's "
        "files, 8-bit ones included. The bundled tiny model needs no download."
    )
    SEARCH_ALIASES = ("load diffusion model", "unet loader", "flux2 model", "klein", "checkpoint")
    FUNCTION = "load"
    RETURN_TYPES = ("FLUX2_DIT",)
    RETURN_NAMES = ("dit",)
    OUTPUT_TOOLTIPS = ("The diffusion transformer with its variant, for FLUX.2 Sample.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "dit_name": (
                    host.model_names("dit"),
                    {"tooltip": "File in models/diffusion_models (of shards the first), or the bundled tiny model."},
                ),
                "variant": (
                    ["auto", *VARIANTS],
                    {
                        "default": "auto",
                        "tooltip": "Which FLUX.2 it is: decides steps, guidance and size where those are left at 0. "
                        "auto tells it from the file; name it where the file could be the base or the distilled model.",
                    },
                ),
                "precision": (list(PRECISIONS), {"default": "default", "tooltip": PRECISION_TOOLTIP}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, dit_name: str | None = None) -> bool | str:
        return _validate("dit", dit_name)

    @classmethod
    def IS_CHANGED(cls, dit_name: str | None = None, **_: object) -> str:
        return _fingerprint("dit", dit_name)

    @classmethod
    def load(cls, dit_name: str, variant: str, precision: str) -> tuple[LoadedDiT]:
        from ..flux2_core.checkpoint import load_dit

        def load(path: str, **settings: Any) -> LoadedDiT:
            dit, found = load_dit(path, variant, **settings)
            return LoadedDiT(dit=dit, variant=found)

        return (_load_once("dit", dit_name, precision, load, variant),)


class LoadAutoencoder:
    CATEGORY = host.CATEGORY
    DESCRIPTION = "Loads the FLUX.2 autoencoder (AE, VAE), which all variants share; the small decoder works as well."
    SEARCH_ALIASES = ("load vae", "vae loader", "autoencoder", "flux2 vae")
    FUNCTION = "load"
    RETURN_TYPES = ("FLUX2_AE",)
    RETURN_NAMES = ("ae",)
    OUTPUT_TOOLTIPS = ("The autoencoder, for FLUX.2 Encode Reference, FLUX.2 Decode, and previews in FLUX.2 Sample.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ae_name": (
                    host.model_names("autoencoder"),
                    {"tooltip": "File in models/vae, or the bundled tiny one, which goes with the tiny DiT alone."},
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, ae_name: str | None = None) -> bool | str:
        return _validate("autoencoder", ae_name)

    @classmethod
    def IS_CHANGED(cls, ae_name: str | None = None, **_: object) -> str:
        return _fingerprint("autoencoder", ae_name)

    @classmethod
    def load(cls, ae_name: str) -> tuple[Flux2Autoencoder]:
        from ..flux2_core.checkpoint import load_autoencoder

        return (_load_once("autoencoder", ae_name, "default", load_autoencoder),)


class LoadTextEncoder:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Loads the text encoder: Mistral Small for dev, Qwen3-8B for klein 9B, Qwen3-4B for klein 4B. Only the layers "
        "that FLUX.2 reads are loaded."
    )
    SEARCH_ALIASES = ("load clip", "clip loader", "mistral", "qwen3", "flux2 text encoder")
    FUNCTION = "load"
    RETURN_TYPES = ("FLUX2_TEXT_ENCODER",)
    RETURN_NAMES = ("text_encoder",)
    OUTPUT_TOOLTIPS = ("The text encoder with its tokenizer, for FLUX.2 Encode Prompt.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder_name": (
                    host.model_names("text_encoder"),
                    {"tooltip": "File in models/text_encoders (of shards the first), or the bundled tiny one."},
                ),
                "precision": (list(PRECISIONS), {"default": "default", "tooltip": PRECISION_TOOLTIP}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoder_name: str | None = None) -> bool | str:
        return _validate("text_encoder", text_encoder_name)

    @classmethod
    def IS_CHANGED(cls, text_encoder_name: str | None = None, **_: object) -> str:
        return _fingerprint("text_encoder", text_encoder_name)

    @classmethod
    def load(cls, text_encoder_name: str, precision: str) -> tuple[TextEncoder]:
        from ..flux2_core.text_encoder import load_text_encoder

        load = partial(load_text_encoder, last_tokenizer_directories=host.tokenizer_directories())
        return (_load_once("text_encoder", text_encoder_name, precision, load),)


def _load_once(
    component: WeightsComponent, name: str, precision: str, load: Callable[..., Loaded], *settings: object
) -> Loaded:
    """Loads a combo entry's weights, unless they are in use already with these settings."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    path, device = host.model_path(component, name), host.device()
    key = (component, host.fingerprint(path), precision, str(device), *settings)
    if (found := _in_use.get(key)) is not None:
        return found
    host.make_room(host.num_bytes(path))
    # ComfyUI runs nodes in inference mode; weights made there could never be trained on.
    with torch.inference_mode(False):
        loaded = load(str(path), dtype=PRECISIONS[precision], device=device)
    _in_use[key] = loaded
    return loaded


def _validate(component: WeightsComponent, name: str | None) -> bool | str:
    """None stands for a link, whose value is not known before the run."""
    try:
        if name is not None:
            host.check_model_name(component, name)
    except ValueError as error:
        return str(error)
    return True


def _fingerprint(component: WeightsComponent, name: str | None) -> str:
    try:
        return host.fingerprint(host.model_path(component, name)) if name is not None else ""
    except (ValueError, OSError) as error:  # the load itself will say so on the node
        return str(error)
