"""Nodes that adapt a DiT with LoRAs, and save one with its LoRAs merged in."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..flux2_core.lora import LoraSetting, apply_loras, remove_loras, save_merged_dit
from ..flux2_core.lora_files import read_lora
from . import host
from .loaders import PRECISIONS, LoadedDiT

MAX_STRENGTH = 10.0


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What goes over a FLUX2_LORA link."""

    path: Path


class ApplyLoRA:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Adapts a FLUX.2 DiT with a LoRA, LoHa, LoKr or DoRA file of any dialect. Chain it for several: the order does "
        "not matter. The loaded weights are not changed, so other branches of the workflow keep theirs."
    )
    SEARCH_ALIASES = ("lora loader", "load lora", "loraloadermodelonly", "lokr", "lycoris", "dora")
    FUNCTION = "apply"
    RETURN_TYPES = ("FLUX2_DIT",)
    RETURN_NAMES = ("dit",)
    OUTPUT_TOOLTIPS = ("The DiT with this LoRA and those before it, for FLUX.2 Sample or the next FLUX.2 Apply LoRA.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = "A regular expression over layer names such as double_blocks.0.img_attn.qkv or single_blocks.3.linear1"
        return {
            "required": {
                "dit": ("FLUX2_DIT", {"tooltip": "The diffusion transformer, of the size the LoRA was trained on."}),
                "lora_name": (
                    host.lora_names(),
                    {"tooltip": f"File in models/loras; {host.NO_LORA}: the DiT passes through as it is."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": LoraSetting.strength,
                        "min": -MAX_STRENGTH,
                        "max": MAX_STRENGTH,
                        "step": 0.05,
                        "tooltip": "How strongly the LoRA acts: 1 as it was trained, 0 not at all, below 0 the "
                        "opposite way.",
                    },
                ),
            },
            "optional": {
                "include": (
                    "STRING",
                    {"default": "", "tooltip": f"{names}: only layers it is found in are adapted. Empty: all."},
                ),
                "exclude": (
                    "STRING",
                    {"default": "", "tooltip": f"{names}: layers it is found in are not adapted. Empty: none."},
                ),
                "allow_unmatched": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Leave out tensors that belong to no layer of the DiT, such as those of a text "
                        "encoder. Off: they are an error.",
                    },
                ),
                "lora": (
                    "FLUX2_LORA",
                    {"tooltip": f"A LoRA from FLUX.2 Train LoRA, in place of a file; lora_name is {host.NO_LORA}."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, lora_name: str | None = None, include: str | None = None, exclude: str | None = None
    ) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if lora_name is not None:
                host.check_lora_name(lora_name)
            patterns(include or "")
            patterns(exclude or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, **_: object) -> str:
        try:
            path = host.lora_path(lora_name) if lora_name is not None else None
            return host.fingerprint(path) if path is not None else ""
        except (ValueError, OSError) as error:  # the run itself will say so on the node
            return str(error)

    @classmethod
    def apply(
        cls,
        dit: LoadedDiT,
        lora_name: str,
        strength: float,
        include: str = "",
        exclude: str = "",
        allow_unmatched: bool = False,
        lora: LoraFile | None = None,
        unique_id: str | None = None,
    ) -> tuple[LoadedDiT]:
        path = host.lora_path(lora_name)
        if lora is not None and path is not None:
            raise ValueError(
                f"lora_name is {lora_name!r}, and {lora.path.name} is connected to lora as well; choose "
                f"{host.NO_LORA!r}, or disconnect lora and use a second FLUX.2 Apply LoRA for it"
            )
        path = path if lora is None else lora.path
        if path is None:
            host.show_text("no LoRA", unique_id)
            return (dit,)
        read = read_lora(path, dit.variant.dit, allow_unmatched=allow_unmatched)
        setting = LoraSetting(lora=read, strength=strength, include=patterns(include), exclude=patterns(exclude))
        setting.layer_strengths()  # refused on this node and not in Sample
        host.show_text(describe(setting), unique_id)
        return (replace(dit, loras=(*dit.loras, setting)),)


class SaveMergedDiT:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Saves a FLUX.2 DiT with its LoRAs merged in, as one file in Black Forest Labs' layout that FLUX.2 Kit and "
        "native ComfyUI load. Nothing is overwritten."
    )
    SEARCH_ALIASES = ("merge lora", "save model", "modelsave", "export checkpoint", "bake lora")
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("Where the file is.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "dit": ("FLUX2_DIT", {"tooltip": "The diffusion transformer, from FLUX.2 Apply LoRA."}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "diffusion_models/flux2_merged",
                        "tooltip": "Name of the file inside ComfyUI's output folder; a number is put behind it. From "
                        "its folder diffusion_models the loaders find it.",
                    },
                ),
                "precision": (
                    list(PRECISIONS),
                    {
                        "default": "default",
                        "tooltip": "Precision of the weights in the file. default: that of the loaded DiT.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if filename_prefix is not None:
                host.check_output_prefix(filename_prefix)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def save(cls, dit: LoadedDiT, filename_prefix: str, precision: str, unique_id: str | None = None) -> tuple[str]:
        path = host.free_output_path(filename_prefix, ".safetensors")
        progress = host.Progress(len(dit.dit.state_dict()), unique_id)

        def on_tensor(done: int, _total: int) -> None:
            host.should_stop()
            progress.update(done)

        save_merged_dit(path, dit.dit, dit.variant, dit.loras, PRECISIONS[precision], on_tensor=on_tensor)
        host.show_text(f"{len(dit.loras)} LoRAs merged into {path.name}", unique_id)
        return (str(path),)


@contextmanager
def live_loras(dit: LoadedDiT) -> Iterator[None]:
    """The link's own LoRAs, and no others, act on the shared DiT for as long as this lasts."""
    apply_loras(dit.dit, dit.loras)
    try:
        yield
    finally:
        remove_loras(dit.dit)


def patterns(text: str) -> tuple[str, ...]:
    """A widget's regular expression; none where the widget is empty.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}; correct it, or leave it empty") from None
    return (text,) if text.strip() else ()


def describe(setting: LoraSetting) -> str:
    """One line: what the file holds and on how many layers it acts."""
    num_active, num_layers = len(setting.layer_strengths()), len(setting.lora.layers)
    left = f"; acts on {num_active} of {num_layers} layers" if setting.strength and num_active < num_layers else ""
    return f"{setting.lora.report.summary()}{left}"
