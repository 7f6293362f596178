"""``flux2 inspect``: what files are, told from headers; only LoRAs, which are small, are read."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .command_errors import describe_error
from .detect import FileDescription, detect, resolve_variant
from .lora_command import lora_facts
from .picture_metadata import GenerationRecord, parse_record, read_png_text
from .tensor_source import SUBFOLDERS, TensorSource
from .weights import WeightsComponent

logger = logging.getLogger(__name__)

PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
"""PNG, JPEG, WebP."""
MAX_SHOWN_TEXT = 100
"""Characters of a metadata value that are shown to people; `--json` gives all."""
COMPONENTS: tuple[WeightsComponent, ...] = ("dit", "autoencoder", "text_encoder")


def run_inspect(args: argparse.Namespace) -> int:
    """Prints a block for each file, or a JSON list; 1 when one of them cannot be read."""
    found: list[dict[str, Any]] = []
    num_failed = 0
    for text in args.files:
        try:
            found += inspect_path(Path(text))
        except (ValueError, OSError) as error:
            if args.json:
                found.append({"path": text, "error": describe_error(error)})
            logger.error("%s", describe_error(error))
            num_failed += 1
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(as_block(facts) for facts in found if "error" not in facts))
    return 1 if num_failed else 0


def inspect_path(path: Path) -> list[dict[str, Any]]:
    """The facts about a file, one dict; of a diffusers folder, one for each component.

    Raises:
        ValueError: nothing is there, or it is damaged or of a kind that is not read.
    """
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4)
        if start.startswith(PICTURE_STARTS):
            return [inspect_picture(path)]
        return [inspect_tensors(TensorSource(path))]
    components: list[WeightsComponent] = [
        component for component in COMPONENTS if any((path / folder).is_dir() for folder in SUBFOLDERS[component])
    ]
    sources = [TensorSource(path, component=component) for component in components] or [TensorSource(path)]
    return [inspect_tensors(source) for source in sources]


def inspect_picture(path: Path) -> dict[str, Any]:
    """A picture's parameters, where it was made here."""
    text = read_png_text(path)
    record = parse_record(text)
    facts: dict[str, Any] = {"path": str(path), "what": "a picture made by FLUX.2 Kit" if record else "a picture"}
    if record:
        return facts | {"parameters": _parameters(record)}
    return facts | {"metadata": text}


def inspect_tensors(source: TensorSource) -> dict[str, Any]:
    """What a checkpoint, LoRA or latent file holds."""
    record = parse_record(source.metadata)
    shape = source.table["latent"].shape if "latent" in source.table else None
    if shape is not None and len(source.table) == 1:
        facts: dict[str, Any] = {"path": str(source.path), "what": "saved latents", "shape": list(shape)}
        if len(shape) >= 2:
            facts["picture"] = f"{shape[-1] * 16}x{shape[-2] * 16} px"
        return facts | ({"parameters": _parameters(record)} if record else {"metadata": source.metadata})
    description = detect(source)
    facts = {
        "path": str(source.path if len(source.files) > 1 else source.files[0]),
        "what": description.what,
        "kind": description.kind,
        "variant": _variants(source, description),
        "layout": description.layout if description.layout != "unknown" else None,
        "prefix": description.prefix or None,
        "precision": description.precision or None,
        "num_parameters": description.num_parameters,
        "size_gib": round(description.num_bytes / 2**30, 4),
        "num_tensors": len(source.table),
        "num_files": len(source.files) if len(source.files) > 1 else None,
        "rank": description.rank,
        "num_targets": description.num_targets,
    }
    if description.kind in ("lora", "other") and (lora := lora_facts(source)) is not None:
        facts |= {"kind": "lora", "what": "a FLUX.2 LoRA", **lora, "num_targets": None}
    facts["metadata"] = source.metadata
    return {name: value for name, value in facts.items() if value is not None}


def as_block(facts: Mapping[str, Any]) -> str:
    """Facts as aligned lines under the path."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name in ("path", "kind"):
            continue
        if name in ("metadata", "parameters"):
            rows += [(key, _shorten(text)) for key, text in value.items() if text is not None]
        elif name == "num_parameters":
            rows.append(("parameters", _count(value)))
        elif name == "unmatched":
            rows.append((name, _shorten(f"{len(value)} tensors: {', '.join(value)}")))
        elif name in ("rank", "alpha"):
            rows.append((name, _numbers(value)))
        elif name == "size_gib":
            rows.append(("size", f"{value:.2f} GiB" if value >= 0.1 else f"{value * 1024:.1f} MiB"))
        elif name == "variant" and isinstance(value, list):
            rows.append(("variant", f"{' or '.join(value)}; nothing in it tells which"))
        else:
            rows.append((name.removeprefix("num_"), str(value)))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([str(facts["path"]), *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _variants(source: TensorSource, description: FileDescription) -> str | list[str] | None:
    """The variant's name, or the candidates where nothing tells them apart."""
    if not description.variants:
        return None
    if description.kind != "dit":
        return ", ".join(description.variants)
    try:
        return resolve_variant(source).name
    except ValueError:
        return list(description.variants)


def _parameters(record: GenerationRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value not in (None, (), [], "")}


def _shorten(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN_TEXT else f"{text[:MAX_SHOWN_TEXT]}... ({len(text)} characters)"


def _numbers(value: float | list[float]) -> str:
    return ", ".join(f"{number:g}" for number in (value if isinstance(value, list) else [value]))


def _count(number: int) -> str:
    for limit, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)
