"""Nodes that tell what files are, and write LoRAs in other dialects."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from ..flux2_core.lora_writer import Dialect, reading_notes, write_lora
from . import host
from .loaders import PRECISIONS
from .lora import LoraFile

SUFFIX = ".safetensors"


class InspectFile:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Tells what a model or LoRA file is: variant, layout, precision, size, a LoRA's dialect and rank, metadata. "
        "Nothing is loaded."
    )
    SEARCH_ALIASES = ("model info", "lora info", "metadata", "what is this file", "checkpoint info", "dialect")
    FUNCTION = "inspect"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("facts",)
    OUTPUT_TOOLTIPS = ("The facts, one a line.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "file_name": (
                    host.file_names(),
                    {"tooltip": f"A file in one of models' folders {', '.join(host.MODEL_KINDS)}."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str | None = None) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if file_name is not None:
                host.check_file_name(file_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, file_name: str | None = None, **_: object) -> str:
        try:
            return host.fingerprint(host.file_path(file_name)) if file_name is not None else ""
        except (ValueError, OSError) as error:  # the run itself will say so on the node
            return str(error)

    @classmethod
    def inspect(cls, file_name: str, unique_id: str | None = None) -> tuple[str]:
        from ..flux2_core.inspect_command import as_block, inspect_path

        # Where the models folder lies is nobody's business in a workflow.
        found = [{**facts, "path": file_name} for facts in inspect_path(host.file_path(file_name))]
        facts = "\n\n".join(map(as_block, found))
        host.show_text(facts, unique_id)
        return (facts,)


class ConvertLoRA:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Writes a LoRA in another dialect, for other programs, as a new file in models/loras. Nothing is overwritten. "
        "FLUX.2 Apply LoRA reads every dialect as it is."
    )
    SEARCH_ALIASES = ("convert lora", "kohya", "diffusers lora", "peft", "diffsynth", "lora format", "save lora")
    FUNCTION = "convert"
    OUTPUT_NODE = True
    RETURN_TYPES = ("FLUX2_LORA", "STRING")
    RETURN_NAMES = ("lora", "lora_name")
    OUTPUT_TOOLTIPS = ("The new LoRA, for FLUX.2 Apply LoRA.", "Its name in models/loras.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name": (
                    host.lora_names(),
                    {"tooltip": f"File in models/loras; {host.NO_LORA}: take the one that is connected to lora."},
                ),
                "dialect": (
                    list(get_args(Dialect)),
                    {
                        "default": "comfy",
                        "tooltip": "comfy: read by ComfyUI, ai-toolkit and diffusers. kohya: the names of "
                        "musubi-tuner. diffusers: diffusers and PEFT, with q, k and v apart. diffsynth: "
                        "DiffSynth-Studio.",
                    },
                ),
                "precision": (
                    list(PRECISIONS),
                    {
                        "default": "default",
                        "tooltip": "Precision of the factors in the new file. default: as they are.",
                    },
                ),
                "output_name": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Name of the new file inside models/loras, without its ending. Empty: the old name "
                        "with the dialect. Where it is taken, a number is put behind it.",
                    },
                ),
            },
            "optional": {
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
    def VALIDATE_INPUTS(cls, lora_name: str | None = None, output_name: str | None = None) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if lora_name is not None:
                host.check_lora_name(lora_name)
            if output_name:
                host.check_new_lora_name(output_name)
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
    def convert(
        cls,
        lora_name: str,
        dialect: Dialect,
        precision: str,
        output_name: str,
        allow_unmatched: bool = False,
        lora: LoraFile | None = None,
        unique_id: str | None = None,
    ) -> tuple[LoraFile, str]:
        from ..flux2_core.lora_tools import SIZES, read_fitting_lora

        source = _source(host.lora_path(lora_name), lora)
        read = read_fitting_lora(source, allow_unmatched=allow_unmatched)
        path = host.free_lora_path(output_name or _name_beside(source, dialect), SUFFIX)
        write_lora(path, read, dialect, PRECISIONS[precision])
        name = str(path.relative_to(host.lora_directory().resolve()))
        text = "\n".join(
            (f"{name}: {read.report.summary()}, for FLUX.2 {SIZES[read.config]}", *reading_notes(read, dialect))
        )
        host.show_text(text, unique_id)
        return (LoraFile(path=path), name)


def _source(file: Path | None, linked: LoraFile | None) -> Path:
    if file is not None and linked is not None:
        raise ValueError(
            f"lora_name is {file.name}, and {linked.path.name} is connected to lora as well; choose {host.NO_LORA!r}, "
            "or disconnect lora"
        )
    path = file if linked is None else linked.path
    if path is None:
        raise ValueError("there is no LoRA to convert; choose a file in lora_name, or connect lora")
    return path


def _name_beside(source: Path, dialect: str) -> str:
    """The old name with the dialect, in the same folder of LoRAs where it lies in the first one."""
    root, folder = host.lora_directory().resolve(), source.parent.resolve()
    place = folder.relative_to(root) if folder.is_relative_to(root) else Path()
    return (place / f"{source.stem}_{dialect}").as_posix()
