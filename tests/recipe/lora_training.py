"""A small cached dataset of drawn pictures, and short trainings on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux2_kit.flux2_core.images import tensor_to_images
from flux2_kit.flux2_core.variants import get_variant
from flux2_kit.flux2_core.weights import find_weights
from flux2_kit.training.adapters import AdapterConfig
from flux2_kit.training.cache import CachedDataset, open_cache
from flux2_kit.training.config import MonitorConfig, OutputConfig, TrainConfig
from flux2_kit.training.dataset import Dataset, list_dataset
from flux2_kit.training.dataset_config import DatasetConfig, SubsetConfig
from flux2_kit.training.encode import cache_latents, cache_text
from flux2_kit.training.lora_recipe import train_lora
from flux2_kit.training.optimizers import OptimizerConfig
from flux2_kit.training.tiny.captions import full_caption
from flux2_kit.training.tiny.pictures import Scene, draw_scenes, seen_scenes
from flux2_kit.training.train_files import find_train_files
from flux2_kit.training.train_progress import TrainResult

TINY = get_variant("tiny")


def draw(scenes: Sequence[Scene]) -> list[Any]:
    """RGB pictures, 64x64 px."""
    return tensor_to_images(draw_scenes(list(scenes)) * 2 - 1)


def write_pictures(folder: Path, num_pictures: int, *, num_references: Sequence[int] = (0,)) -> Path:
    """Drawn pictures with captions, and as many references as the numbers say in turn, in ``folder / references``."""
    references = folder / "references"
    folder.mkdir(parents=True)
    scenes = seen_scenes()[:: len(seen_scenes()) // num_pictures][:num_pictures]
    for index, (scene, picture) in enumerate(zip(scenes, draw(scenes), strict=True)):
        picture.save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(full_caption(scene))
        for place in range(num_references[index % len(num_references)]):
            references.mkdir(exist_ok=True)
            draw([seen_scenes()[97 * (index + 1) + place]])[0].resize((64, 64 + 32 * place)).save(
                references / f"{index:02d}_{place}.png"
            )
    return folder


def make_dataset(folder: Path, **subset: Any) -> Dataset:
    """A dataset of one folder at 64x64 px."""
    settings = {"resolution": (64, 64), "enable_bucket": True, **subset}
    return list_dataset(DatasetConfig(subsets=(SubsetConfig(image_directory=folder, **settings),)))


def cached(dataset: Dataset) -> CachedDataset:
    """The dataset with its caches filled by the bundled model."""
    cache_latents(dataset, find_weights(TINY, "autoencoder"))
    cache_text(dataset, find_weights(TINY, "text_encoder"), TINY.text_encoder)
    return open_cache(dataset, TINY)


def make_config(folder: Path, **settings: Any) -> TrainConfig:
    """A short run in fp32."""
    output = OutputConfig(output_dir=folder, **settings.pop("output", {}))
    monitor = MonitorConfig(**{"validate_every_n_steps": 6, **settings.pop("monitor", {})})
    defaults = TrainConfig(
        max_train_steps=12,
        mixed_precision="no",
        adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        output=output,
        monitor=monitor,
    )
    return replace(defaults, **settings)


def train(config: TrainConfig, dataset: CachedDataset, **options: Any) -> TrainResult:
    """Trains on the bundled model."""
    files = find_train_files(TINY, makes_samples=config.monitor.sample_prompts is not None)
    return train_lora(config, dataset, files, **options)
