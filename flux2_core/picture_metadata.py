"""How a picture was made, kept in its PNG file and beside saved latents, and read back from there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import SamplingConfig
    from .variants import Variant

DISTRIBUTION = "comfyui-flux2-kit"
RECORD_KEY = "flux2_kit"
"""PNG text chunk and safetensors metadata key of the JSON record."""
TEXT_KEY = "parameters"
"""PNG text chunk for people; image browsers show it."""
LISTS = ("references", "lora_include", "lora_exclude")
"""Fields that JSON holds as lists of texts."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """The parameters of one picture, or of a batch of latents; files by name, without their folders."""

    prompt: str
    negative_prompt: str | None = None
    """None where classifier-free guidance was off."""
    seed: int
    num_images: int = 1
    image_index: int = 0
    """Which of the seed's pictures this is, from 0."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    num_steps: int
    cfg_scale: float
    guidance: float | None = None
    flow_shift: float | None = None
    """None where the shift followed from size and steps."""
    references: tuple[str, ...] = ()
    resize_references: bool = True
    reference_cache: str | None = None
    """Whether references were computed once for all steps; None where that was as the variant does by itself."""
    initial_image: str | None = None
    """What the picture was made from, by image to image."""
    strength: float | None = None
    """None where there was no initial image."""
    variant: str
    dit: str
    autoencoder: str
    text_encoder: str
    loras: tuple[tuple[str, float], ...] = ()
    """File name and strength of each."""
    lora_include: tuple[str, ...] = ()
    lora_exclude: tuple[str, ...] = ()
    """Patterns of layers, for all LoRAs."""
    version: str
    """Of FLUX.2 Kit."""

    def to_json(self) -> str:
        """One line of JSON, read by `parse_record`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_text(self) -> str:
        """For people: prompts, then settings, in the order that image browsers expect."""
        settings = {
            "Steps": self.num_steps,
            "Sampler": "Euler",
            "CFG scale": self.cfg_scale,
            "Guidance": self.guidance,
            "Flow shift": self.flow_shift,
            "Seed": self.seed,
            "Image of the seed": f"{self.image_index + 1} of {self.num_images}" if self.num_images > 1 else None,
            "Size": f"{self.width}x{self.height}",
            "Model": self.variant,
            "LoRAs": " + ".join(f"{name} {strength:g}" for name, strength in self.loras) or None,
            "Denoising strength": self.strength,
            "References": len(self.references) or None,
            "Reference cache": self.reference_cache,
            "Version": f"FLUX.2 Kit {self.version}",
        }
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
        return "\n".join(lines)

    def latent_metadata(self) -> dict[str, str]:
        """Metadata of a latent file: the record, and the single values under musubi-tuner's names."""
        values = {
            "seeds": self.seed,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
            "infer_steps": self.num_steps,
            "guidance_scale": self.cfg_scale,
            "embedded_cfg_scale": self.guidance,
            "flow_shift": self.flow_shift,
        }
        return {RECORD_KEY: self.to_json()} | {name: str(value) for name, value in values.items() if value is not None}


def make_record(
    sampling: SamplingConfig,
    variant: Variant,
    *,
    prompt: str,
    negative_prompt: str | None,
    references: Iterable[str | os.PathLike[str]] = (),
    initial_image: Path | None = None,
    dit: Path,
    autoencoder: Path,
    text_encoder: Path,
    loras: Iterable[tuple[str, float]] = (),
    lora_include: Iterable[str] = (),
    lora_exclude: Iterable[str] = (),
) -> GenerationRecord:
    """The record of pictures from resolved settings; paths are kept without their folders."""
    assert sampling.width and sampling.height and sampling.num_steps and sampling.cfg_scale is not None
    names, default = tuple(Path(path).name for path in references), variant.reference_cache
    return GenerationRecord(
        prompt=prompt,
        negative_prompt=(negative_prompt or "") if sampling.cfg_scale != 1 else None,
        seed=sampling.seed,
        num_images=sampling.num_images,
        width=sampling.width,
        height=sampling.height,
        num_steps=sampling.num_steps,
        cfg_scale=sampling.cfg_scale,
        guidance=sampling.guidance,
        flow_shift=sampling.flow_shift,
        references=names,
        resize_references=sampling.resize_references,
        reference_cache=sampling.reference_cache if names and sampling.reference_cache != default else None,
        initial_image=initial_image.name if initial_image is not None else None,
        strength=sampling.strength if initial_image is not None else None,
        variant=variant.name,
        dit=dit.name,
        autoencoder=autoencoder.name,
        text_encoder=text_encoder.name,
        loras=tuple(loras),
        lora_include=tuple(lora_include),
        lora_exclude=tuple(lora_exclude),
        version=kit_version(),
    )


def parse_record(metadata: Mapping[str, object]) -> GenerationRecord | None:
    """The record in the text of a PNG or the metadata of a latent file; None where there is none, or a broken one."""
    text = metadata.get(RECORD_KEY)
    if not isinstance(text, str):
        return None
    try:
        values = json.loads(text)
        known = {field.name for field in fields(GenerationRecord)}
        values = {name: value for name, value in values.items() if name in known}
        lists: dict[str, Any] = {name: tuple(values.get(name, ())) for name in LISTS}
        lists["loras"] = tuple((str(name), float(strength)) for name, strength in values.get("loras", ()))
        record = GenerationRecord(**values | lists)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    texts = (
        record.prompt,
        record.variant,
        record.reference_cache or "",
        *record.references,
        *record.lora_include,
        *record.lora_exclude,
    )
    numbers = (record.seed, record.width, record.height, record.num_steps, record.num_images, record.image_index)
    valid = all(isinstance(value, str) for value in texts) and all(type(value) is int for value in numbers)
    return record if valid else None


def read_png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG; empty for other pictures.

    Raises:
        ValueError: no picture, or a damaged one.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            found = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); give a whole PNG file") from error
    return found


def write_png(path: str | os.PathLike[str], image: Image.Image, record: GenerationRecord | None) -> Path:
    """Writes a PNG file with its record, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if record is not None:
        info.add_text(RECORD_KEY, record.to_json())
        info.add_text(TEXT_KEY, record.to_text())
    return write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def kit_version() -> str:
    """Version of FLUX.2 Kit; read from pyproject.toml where the folder runs without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        text = project.read_text(encoding="utf-8") if project.is_file() else ""
        found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
        return found[1] if found else "unknown"
