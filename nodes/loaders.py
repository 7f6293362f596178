"""Nodes that load the three networks."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch

from ..flux2_core.autoencoder import Flux2Autoencoder
from ..flux2_core.device_memory import available_host_bytes, device_budget
from ..flux2_core.dit import Flux2DiT
from ..flux2_core.lora import LoraSetting
from ..flux2_core.memory import MemoryRequest, PlanPrecision, plan_memory, plan_text_encoder
from ..flux2_core.residency import Residence
from ..flux2_core.text_encoder import TextEncoder
from ..flux2_core.variants import VARIANTS, Variant
from ..flux2_core.weights import WeightsComponent
from . import host, patchers

if TYPE_CHECKING:
    from ..flux2_core.placement import PlacedDiT

PRECISIONS: dict[str, torch.dtype | None] = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Types of plain weights."""
LOAD_PRECISIONS: dict[str, PlanPrecision] = {
    "default": "auto",
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "fp8": "fp8",
    "nf4": "nf4",
}
DIT_PRECISION_TOOLTIP = (
    "How the weights of the blocks are kept. default: as in the file where that fits, else fp8. What does not fit into "
    "the memory of the GPU is streamed from host memory. nf4 is the smallest and the least exact."
)
TEXT_ENCODER_PRECISION_TOOLTIP = (
    "How the weights of the layers are kept. default: as in the file; what does not fit into the memory of the GPU is "
    "streamed from host memory, which takes little time, since a prompt is encoded once."
)
BUDGET_TOOLTIP = (
    "Memory of the GPU that this network and its work may take, in GiB: the most that ComfyUI gives it. 0: no limit "
    "but what other models leave."
)
MAX_BUDGET = 1024.0

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
    placed: PlacedDiT | None = None
    """Where its blocks are."""

    def run(self, work: Callable[[], Loaded]) -> Loaded:
        """Does some work with the DiT; where memory runs out, others leave the device, then some of its blocks."""
        from ..flux2_core.placement import retry

        if self.placed is None or self.placed.device.type == "cpu":
            return work()
        return retry(work, self._lower(self.placed), self.placed.device)

    def _lower(self, placed: PlacedDiT) -> Iterator[bool]:
        if patchers.make_others_leave(self.dit):
            yield True
        yield from iter(placed.lower, False)


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
                "precision": (list(LOAD_PRECISIONS), {"default": "default", "tooltip": DIT_PRECISION_TOOLTIP}),
            },
            "optional": {"vram_budget": budget_input()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, dit_name: str | None = None) -> bool | str:
        return _validate("dit", dit_name)

    @classmethod
    def IS_CHANGED(cls, dit_name: str | None = None, **_: object) -> str:
        return _fingerprint("dit", dit_name)

    @classmethod
    def load(cls, dit_name: str, variant: str, precision: str, vram_budget: float = 0.0) -> tuple[LoadedDiT]:
        load = partial(_load_dit, variant=variant, precision=_precision(precision), vram_budget=vram_budget)
        return (_load_once("dit", dit_name, load, variant, precision, vram_budget),)


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
        return (_load_once("autoencoder", ae_name, _load_autoencoder),)


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
                "precision": (
                    list(LOAD_PRECISIONS),
                    {"default": "default", "tooltip": TEXT_ENCODER_PRECISION_TOOLTIP},
                ),
            },
            "optional": {"vram_budget": budget_input()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoder_name: str | None = None) -> bool | str:
        return _validate("text_encoder", text_encoder_name)

    @classmethod
    def IS_CHANGED(cls, text_encoder_name: str | None = None, **_: object) -> str:
        return _fingerprint("text_encoder", text_encoder_name)

    @classmethod
    def load(cls, text_encoder_name: str, precision: str, vram_budget: float = 0.0) -> tuple[TextEncoder]:
        load = partial(_load_text_encoder, precision=_precision(precision), vram_budget=vram_budget)
        return (_load_once("text_encoder", text_encoder_name, load, precision, vram_budget),)


def budget_input() -> tuple[str, dict[str, Any]]:
    """The widget for a budget of memory."""
    return ("FLOAT", {"default": 0.0, "min": 0.0, "max": MAX_BUDGET, "step": 0.5, "tooltip": BUDGET_TOOLTIP})


def _load_once(component: WeightsComponent, name: str, load: Callable[..., Loaded], *settings: object) -> Loaded:
    """Loads a combo entry's weights, unless they are in use already with these settings."""
    path, device = host.model_path(component, name), host.device()
    key = (component, host.fingerprint(path), str(device), *settings)
    if (found := _in_use.get(key)) is not None:
        return found
    host.make_room(host.num_bytes(path))
    # ComfyUI runs nodes in inference mode; weights made there could never be trained on.
    with torch.inference_mode(False):
        loaded = load(path, device)
    _in_use[key] = loaded
    return loaded


def _load_dit(
    path: Path, device: torch.device, *, variant: str, precision: PlanPrecision, vram_budget: float
) -> LoadedDiT:
    """A DiT, planned for pictures of its variant's default size."""
    from ..flux2_core.detect import resolve_variant
    from ..flux2_core.placement import dit_facts, log_plan, place_dit
    from ..flux2_core.tensor_source import TensorSource

    found = resolve_variant(TensorSource(path, component="dit"), variant)
    request = MemoryRequest(
        variant=found,
        precision=precision,
        dit_file=dit_facts(path, found),
        uses_text_encoder=False,
        uses_autoencoder=False,
        device_type=device.type,
    )
    whole = plan_memory(request, None)
    budget = device_budget(device, vram_budget or None)
    if budget is not None and whole.peak_bytes > budget:
        if patchers.is_shared():
            host.make_room(min(whole.peak_bytes, budget) if vram_budget else whole.peak_bytes)
        else:
            patchers.stream_all(TextEncoder)
        budget = device_budget(device, vram_budget or None)
    plan = plan_memory(request, budget, available_host_bytes())
    log_plan(plan, request, device, vram_budget or None)
    placed = place_dit(path, found, plan.dit, device, facts=request.dit_file)
    if vram_budget:
        placed.residence.set_limit(plan.dit.num_resident)
    patchers.register(placed.dit, placed.residence, plan.sampling_bytes - plan.dit.device_bytes)
    return LoadedDiT(dit=placed.dit, variant=found, placed=placed)


def _load_autoencoder(path: Path, device: torch.device) -> Flux2Autoencoder:
    from ..flux2_core.placement import place_autoencoder

    autoencoder = place_autoencoder(path, device)
    patchers.register(autoencoder, Residence(autoencoder, device), 0)
    return autoencoder


def _load_text_encoder(
    path: Path, device: torch.device, *, precision: PlanPrecision, vram_budget: float
) -> TextEncoder:
    from ..flux2_core.placement import place_text_encoder, text_encoder_facts, text_encoder_variant
    from ..flux2_core.text_encoder import load_text_encoder

    variant, directories = text_encoder_variant(path), host.tokenizer_directories()
    if variant is None:  # it is none of ours, which loading says in detail
        return load_text_encoder(path, device=device, last_tokenizer_directories=directories)
    facts = text_encoder_facts(path)
    request = MemoryRequest(
        variant=variant, text_encoder_precision=precision, text_encoder_file=facts, device_type=device.type
    )
    plan = plan_text_encoder(request, device_budget(device, vram_budget or None), available_host_bytes())
    encoder, streamer = place_text_encoder(
        path, variant.text_encoder, plan, device, facts=facts, last_tokenizer_directories=directories
    )
    limit = plan.num_resident if vram_budget else None
    residence = Residence(encoder, device, streamer=streamer, limit=limit)
    patchers.register(encoder, residence, patchers.text_bytes(encoder))
    return encoder


def _precision(name: str) -> PlanPrecision:
    if name not in LOAD_PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(LOAD_PRECISIONS)}")
    return LOAD_PRECISIONS[name]


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
