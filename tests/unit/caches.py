"""Small datasets with their caches, for the tests of those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import find_weights
from flux2_kit.training.cache import CachedDataset, open_cache
from flux2_kit.training.dataset import Dataset, list_dataset
from flux2_kit.training.dataset_config import DatasetConfig, SubsetConfig
from flux2_kit.training.encode import CacheOptions, cache_latents, cache_text
from PIL import Image

TINY = VARIANTS["tiny"]
AUTOENCODER = find_weights(TINY, "autoencoder")
TEXT_ENCODER = find_weights(TINY, "text_encoder")
NAMES = ("a", "b", "c")


def draw(path: Path, seed: int, size: tuple[int, int] = (70, 90)) -> Path:
    """A smooth picture of its own, `size` wide and high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def make_folder(place: Path) -> Path:
    """Three pictures with captions, in a folder whose name looks like a pattern."""
    folder = place / "pictures [v1]"
    for seed, name in enumerate(NAMES):
        draw(folder / f"{name}.png", seed)
        (folder / f"{name}.txt").write_text(f"a picture of {name}")
    return folder


def listing(*folders: Path, **settings) -> Dataset:
    settings = {"resolution": (64, 64), "enable_bucket": True} | settings
    subsets = tuple(SubsetConfig(image_directory=folder, **settings) for folder in folders)
    return list_dataset(DatasetConfig(subsets=subsets))


def fill(dataset: Dataset, **options) -> tuple[int, int]:
    """How many latents and how many texts were encoded."""
    latents = cache_latents(dataset, AUTOENCODER, CacheOptions(**options))
    text = cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, CacheOptions(**options))
    return latents.num_encoded, text.num_encoded


def opened(dataset: Dataset, **weights) -> CachedDataset:
    return open_cache(dataset, TINY, **weights)


def cached_files(folder: Path, kind: str = "") -> set[str]:
    return {path.name for path in (folder / "flux2_cache").iterdir() if path.name.startswith(kind)}


def the_manifest(cache: Path, what: str = "") -> Path:
    """The one manifest of a folder."""
    (manifest,) = (path for path in cache.iterdir() if path.name.startswith(f"manifest-{what}"))
    return manifest
