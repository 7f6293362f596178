"""The node that encodes a dataset for training."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..flux2_core.autoencoder import PIXELS_PER_LATENT
from ..flux2_core.detect import describe_other, detect
from ..flux2_core.images import MIN_SIDE
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.tokenizer import PromptTokenizer
from ..flux2_core.variants import VARIANTS, TextEncoderConfig, Variant, get_variant
from ..training.dataset import Dataset, list_dataset
from ..training.dataset_config import MAX_BATCH_SIZE, MAX_SIDE, load_dataset_config
from ..training.train_progress import clock
from . import host

BUNDLED_DATASET = "tiny style (bundled)"
"""Stands for a small dataset for the tiny model, written into the input folder where it is not there yet."""
BUNDLED_FOLDER = Path(host.OWN_FOLDER) / "tiny_style"
"""In the input folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkedDataset:
    """What goes over a FLUX2_DATASET link."""

    dataset: Dataset
    variant: Variant
    """Any with the same encoders can be trained."""
    autoencoder: Path
    text_encoder: Path
    tokenizer: Path | None = None
    """For a text encoder that has none beside it."""


class CacheDataset:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Reads a dataset for training - pictures with captions, and references where there are some - and encodes it "
        "once: what is there already is not encoded again."
    )
    SEARCH_ALIASES = ("dataset", "cache latents", "training data", "image folder", "captions", "prepare training")
    FUNCTION = "cache"
    OUTPUT_NODE = True
    RETURN_TYPES = ("FLUX2_DATASET", "IMAGE", "STRING")
    RETURN_NAMES = ("dataset", "contact_sheet", "table")
    OUTPUT_TOOLTIPS = (
        "The encoded dataset, for FLUX.2 Train LoRA.",
        "Pictures of every size that is trained: what is framed is trained, what is dark is cropped off.",
        "What the dataset amounts to: pictures, sizes, missing captions, references, what is cropped.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "dataset": (
                    "STRING",
                    {
                        "default": BUNDLED_DATASET,
                        "tooltip": "In ComfyUI's input folder (or in a folder of extra_model_paths.yaml called "
                        f"{host.DATASET_KIND}): a folder of pictures with captions in .txt files of the same name, a "
                        "TOML or JSON with settings as of musubi-tuner, or a table (CSV, JSON, JSONL) with the columns "
                        f"image and prompt. {BUNDLED_DATASET}: 32 drawn pictures for the tiny model.",
                    },
                ),
                "ae_name": (
                    host.model_names("autoencoder"),
                    {"tooltip": "File in models/vae: encodes the pictures. The bundled one goes with tiny alone."},
                ),
                "text_encoder_name": (
                    host.model_names("text_encoder"),
                    {"tooltip": "File in models/text_encoders that belongs to the DiT to be trained."},
                ),
                "variant": (
                    ["auto", *VARIANTS],
                    {"default": "auto", "tooltip": "What will be trained. auto tells it from the text encoder."},
                ),
                "resolution": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_SIDE,
                        "step": PIXELS_PER_LATENT,
                        "tooltip": "Of a folder or table: pictures are scaled to the area of a square of this side in "
                        "pixels, at about their own aspect. 0: the variant's own size. A TOML or JSON has its own.",
                    },
                ),
            },
            "optional": {
                "batch_size": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_BATCH_SIZE,
                        "tooltip": "Of a folder or table: pictures in a step. 0: one. A TOML or JSON has its own.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        dataset: str | None = None,
        ae_name: str | None = None,
        text_encoder_name: str | None = None,
        resolution: int | None = None,
        unique_id: str | None = None,
    ) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if dataset is not None and dataset.strip() != BUNDLED_DATASET:
                host.find_dataset(dataset)
            if ae_name is not None:
                host.check_model_name("autoencoder", ae_name)
            if text_encoder_name is not None:
                host.check_model_name("text_encoder", text_encoder_name)
            if resolution and not MIN_SIDE <= resolution <= MAX_SIDE:
                raise ValueError(f"resolution is {resolution}; it must be 0, or {MIN_SIDE} to {MAX_SIDE} pixels")
        except (ValueError, OSError) as error:
            return host.refusal(error, unique_id)
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        dataset: str | None = None,
        ae_name: str | None = None,
        text_encoder_name: str | None = None,
        variant: str | None = None,
        resolution: int | None = None,
        batch_size: int | None = 0,
        **_: object,
    ) -> str:
        if dataset is None or ae_name is None or text_encoder_name is None or variant is None:
            return ""
        if resolution is None or batch_size is None:
            return ""
        try:
            found = read_dataset(dataset, ae_name, text_encoder_name, variant, resolution, batch_size)
            return "\n".join(_state(found))
        except (ValueError, OSError) as error:  # the run itself will say so on the node
            return str(error)

    @classmethod
    def cache(
        cls,
        dataset: str,
        ae_name: str,
        text_encoder_name: str,
        variant: str,
        resolution: int,
        batch_size: int = 0,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        from ..training.contact_sheet import draw_contact_sheet
        from ..training.dataset_report import format_report, report_dataset

        found = read_dataset(dataset, ae_name, text_encoder_name, variant, resolution, batch_size)
        folder, tokenizer = _find_tokenizer(found.text_encoder, found.variant.text_encoder)
        found, max_tokens = replace(found, tokenizer=folder), found.variant.text_encoder.max_tokens
        report = report_dataset(found.dataset, count_cut=lambda captions: tokenizer(captions, max_tokens).num_cut)
        table = format_report(report, dataset)
        fill_cache(found, unique_id)
        sheet = draw_contact_sheet(found.dataset, reference_sides=found.variant.autoencoder.reference_sides)
        host.show_text(table, unique_id)
        shown = {"images": [host.shown_preview(sheet, "contact_sheet")], "text": [table]}
        return {"ui": shown, "result": (found, picture_batch([sheet]), table)}


def read_dataset(
    dataset: str, ae_name: str, text_encoder_name: str, variant: str, resolution: int, batch_size: int
) -> LinkedDataset:
    """The dataset that the widgets name, with the encoders for it; pictures are only listed.

    Raises:
        ValueError: something is missing, wrong, or outside of ComfyUI's folders.
    """
    text_encoder = host.model_path("text_encoder", text_encoder_name)
    found = _find_variant(variant, text_encoder)
    path = _bundled_dataset() if dataset.strip() == BUNDLED_DATASET else None
    path = path or host.find_dataset(dataset)
    config = load_dataset_config(path, roots=host.dataset_directories(), side=resolution or found.default_size)
    for name, value in (("resolution", resolution), ("batch_size", batch_size)):
        if value and config.subsets[0].place != path:
            raise ValueError(
                f"{name} is {value}, but {path.name} has settings of its own; set it there, and 0 on the node"
            )
    if batch_size:
        config = replace(config, subsets=tuple(replace(subset, batch_size=batch_size) for subset in config.subsets))
    return LinkedDataset(
        dataset=list_dataset(config),
        variant=found,
        autoencoder=host.model_path("autoencoder", ae_name),
        text_encoder=text_encoder,
    )


def fill_cache(linked: LinkedDataset, node_id: str | None) -> None:
    """Encodes what is not encoded yet, pictures and then captions: one network in memory at a time.

    Raises:
        ValueError: a picture or an encoder cannot be read, or the cache cannot be written.
    """
    from ..training.encode import CacheOptions, cache_latents, cache_text

    progress = _ShowProgress(node_id)
    options = CacheOptions(device=host.device(), on_progress=progress.show, should_stop=host.should_stop)
    try:
        host.make_room(host.num_bytes(linked.autoencoder))
        latents = cache_latents(linked.dataset, linked.autoencoder, options)
        host.make_room(host.num_bytes(linked.text_encoder))
        text = cache_text(
            linked.dataset, linked.text_encoder, linked.variant.text_encoder, options, tokenizer=linked.tokenizer
        )
    except BaseException:
        progress.tell_stopped()
        raise
    if latents.num_encoded or text.num_encoded:
        host.release_memory()


def picture_batch(images: list[Image.Image]) -> Tensor:
    """Pictures as ComfyUI's IMAGE ``[B, H, W, 3]``, 0..1; smaller ones in the middle of a black frame."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    batch = np.zeros((len(images), height, width, 3), dtype=np.float32)
    for canvas, image in zip(batch, images, strict=True):
        left, top = (width - image.width) // 2, (height - image.height) // 2
        canvas[top : top + image.height, left : left + image.width] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(batch / 255)


class _ShowProgress:
    """Moves a node's bar and tells how fast it goes."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.text = host.LiveText(node_id)
        self.progress = host.Progress(1, node_id)
        self.what = self.last = ""
        self.num_first = 0
        self.started = 0.0

    def show(self, what: str, num_done: int, num_all: int) -> None:
        if what != self.what or not self.num_first:
            # The first may have waited for the encoder to load: the rate is that of the others.
            self.what, self.num_first, self.started = what, num_done, time.monotonic()
            self.progress = host.Progress(num_all, self.node_id)
        self.progress.update(num_done)
        seconds = time.monotonic() - self.started
        rate = (num_done - self.num_first) / seconds if seconds > 0 else 0.0
        told = f", {rate:.2f} a second, {clock((num_all - num_done) / rate)} left" if rate else ""
        self.last = f"{what}: {num_done} of {num_all}"
        self.text.show(f"{self.last}{told}", is_last=num_done == num_all)

    def tell_stopped(self) -> None:
        if self.last:
            host.show_text(f"stopped, {self.last}: queue again to go on", self.node_id)


def _bundled_dataset() -> Path:
    """The TOML of the bundled dataset; it is written where it is not there yet."""
    from ..training.tiny.style_dataset import write_style_dataset

    folder = host.input_directory() / BUNDLED_FOLDER
    if not (path := folder / "dataset.toml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        written = write_style_dataset(folder)
        assert written == path
    return path


def _find_variant(name: str, text_encoder: Path) -> Variant:
    if name != "auto":
        return get_variant(name)
    source = TensorSource(text_encoder, component="text_encoder")
    description = detect(source)
    if description.kind != "text_encoder" or not description.variants:
        raise ValueError(describe_other(source, description, "a FLUX.2 text encoder"))
    return get_variant(description.variants[0])


def _find_tokenizer(text_encoder: Path, config: TextEncoderConfig) -> tuple[Path | None, PromptTokenizer]:
    """The tokenizer, with its folder where that is ComfyUI's own copy of Qwen's: its text encoders come without one."""
    from ..training.fingerprint import read_tokenizer_of

    source = TensorSource(text_encoder, component="text_encoder")
    try:
        return None, read_tokenizer_of(source, config)
    except ValueError:
        last = [folder for folder in host.tokenizer_directories() if folder.is_dir()]
        if not last or config.family != "qwen3":
            raise
        return last[0], read_tokenizer_of(source, config, tokenizer=last[0])


def _state(linked: LinkedDataset) -> Iterator[str]:
    """What changes when anything that is read for the dataset does, without reading pictures."""
    digest = hashlib.sha256(repr(linked.dataset.config).encode())
    for item in linked.dataset.items:
        digest.update(f"\n{item}".encode("utf-8", "surrogateescape"))
        for path in (item.image, *item.references, *([item.mask] if item.mask else [])):
            stat = path.stat()
            digest.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
    yield digest.hexdigest()
    yield host.fingerprint(linked.autoencoder)
    yield host.fingerprint(linked.text_encoder)
    yield linked.variant.name
