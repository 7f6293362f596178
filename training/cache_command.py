"""``flux2 cache-latents``, ``cache-text`` and ``cache``: encodes a dataset before it is trained on."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ..flux2_core.command_options import DTYPES, models_folder
from ..flux2_core.detect import describe_other, detect
from ..flux2_core.memory_options import LONG_DTYPES
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.variants import VARIANTS, Variant, get_variant
from ..flux2_core.weights import WeightsComponent, find_weights
from .cache_manifest import prune_cache
from .dataset import Dataset, list_dataset, load_dataset_config
from .dataset_config import FOLDER_SIDE
from .encode import CacheOptions, CacheReport, cache_latents, cache_text
from .foreign_options import (
    REFUSED_IN_CACHING,
    WITHOUT_EFFECT_IN_CACHING,
    describe_without_effect,
    refuse_foreign_options,
)
from .processes import Processes, join_processes

logger = logging.getLogger(__name__)

UNITS = {"pictures read": "file", "pictures encoded": "img", "captions encoded": "caption"}


def run_cache(args: argparse.Namespace) -> int:
    """Carries out the options of `cli.add_commands`; 0 when the caches are whole.

    Raises:
        ValueError: weights or pictures that are missing or cannot be read, or a cache that cannot be written.
    """
    # 1. Everything that can be refused is refused before anything is encoded.
    refuse_foreign_options(vars(args), REFUSED_IN_CACHING)
    if args.prune and args.keep_cache:
        raise ValueError("--prune and --keep_cache contradict each other; give one of them")
    for line in describe_without_effect(vars(args), WITHOUT_EFFECT_IN_CACHING):
        logger.info(line)
    makes_latents, makes_text = args.what != "cache-text", args.what != "cache-latents"
    variant = find_variant(args)
    autoencoder = _find(args, variant, "autoencoder", args.vae) if makes_latents else None
    text_encoder = _find(args, variant, "text_encoder", args.text_encoder) if makes_text else None
    side = FOLDER_SIDE if variant is None else variant.default_size
    dataset = list_dataset(load_dataset_config(args.dataset_config, side=side))
    with join_processes(args.device) as processes:
        fill_caches(args, dataset, variant, autoencoder, text_encoder, processes)
    return 0


def fill_caches(
    args: argparse.Namespace,
    dataset: Dataset,
    variant: Variant | None,
    autoencoder: Path | None,
    text_encoder: Path | None,
    processes: Processes,
) -> None:
    """One process's part of `run_cache`: pictures with the autoencoder, captions with the text encoder, if given."""
    bar = ProgressBar(is_shown=processes.is_main)
    options = CacheOptions(
        device=processes.device,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        skip_existing=args.skip_existing,
        on_progress=bar.show,
        process_index=processes.index,
        num_processes=processes.count,
        barrier=processes.barrier if processes.count > 1 else None,
    )

    # 1. Pictures, then captions: one network in memory at a time.
    reports: list[CacheReport] = []
    with contextlib.closing(bar):
        if autoencoder is not None:
            reports.append(cache_latents(dataset, autoencoder, options, dtype=_dtype(args.vae_dtype)))
            bar.close()
            _tell(reports[-1], processes)
        if text_encoder is not None:
            assert variant is not None
            config, dtype = variant.text_encoder, _dtype(args.text_encoder_dtype)
            reports.append(cache_text(dataset, text_encoder, config, options, tokenizer=args.tokenizer, dtype=dtype))
            bar.close()
            _tell(reports[-1], processes)

    # 2. What no dataset names any more.
    if args.prune and processes.is_main:
        pruned = prune_cache(dataset, [path for report in reports for path in report.manifests])
        print(f"pruned: {pruned.num_deleted} files, {pruned.num_bytes / 1e6:.1f} MB", flush=True)
        if pruned.other_manifests:
            shown = ", ".join(map(str, pruned.other_manifests[:3]))
            logger.info(
                "the files of %d other datasets, settings or encoders were kept (%s); delete a manifest and prune "
                "again to be rid of its files",
                len(pruned.other_manifests),
                shown,
            )


def find_variant(args: argparse.Namespace) -> Variant | None:
    """The variant whose text encoder is meant; None where only pictures are encoded, with an autoencoder that is given.

    Raises:
        ValueError: it is unknown, or nothing tells it.
    """
    name, vae, text_encoder = args.model_version, getattr(args, "vae", None), getattr(args, "text_encoder", None)
    if models_folder(args.models_dir) is not None and name in (None, "tiny"):
        raise ValueError(
            "--models_dir was given, but tiny comes with the package; name the variant to look for with --model_version"
        )
    if name is not None and name not in VARIANTS:
        raise ValueError(f"--model_version is {name!r}; allowed are {', '.join(VARIANTS)}")
    if name is not None:
        return get_variant(name)
    if text_encoder is not None and (vae is not None or args.what == "cache-text"):
        source = TensorSource(text_encoder, component="text_encoder")
        description = detect(source)
        if not description.variants or description.kind != "text_encoder":
            raise ValueError(describe_other(source, description, "a FLUX.2 text encoder"))
        return get_variant(description.variants[0])
    if vae is not None and args.what == "cache-latents":
        return None
    if vae is not None or text_encoder is not None:
        missing = "--text_encoder" if text_encoder is None else "--vae"
        raise ValueError(f"without {missing} it is looked up by variant; give it, or name the --model_version")
    return get_variant("tiny")


class ProgressBar:
    """A bar over each kind of work on stderr, where that is a terminal: count, rate and time left."""

    def __init__(self, *, is_shown: bool) -> None:
        self.is_shown = is_shown
        self.what: str | None = None
        self.bar: tqdm | None = None

    def show(self, what: str, num_done: int, num_all: int) -> None:
        """Moves the bar; another kind of work starts a new one."""
        if what != self.what or self.bar is None:
            self.close()
            disable = None if self.is_shown else True
            self.what = what
            self.bar = tqdm(total=num_all, desc=what, unit=UNITS[what], disable=disable, leave=False, file=sys.stderr)
        self.bar.update(num_done - self.bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()
        self.what = self.bar = None


def _tell(report: CacheReport, processes: Processes) -> None:
    """One line on stdout, with the counts of all processes."""
    counts = torch.tensor([report.num_encoded, report.num_kept], dtype=torch.float64)
    num_encoded, num_kept = (int(count) for count in processes.sum_(counts))
    if processes.is_main:
        name = "latents" if report.what == "latents" else "text"
        folders = ", ".join(map(str, report.folders))
        print(f"{name}: {num_encoded} encoded, {num_kept} kept in {folders}", flush=True)


def _find(args: argparse.Namespace, variant: Variant | None, component: WeightsComponent, given: str | None) -> Path:
    explicit = None if given is None else Path(given)
    return find_weights(variant or get_variant("tiny"), component, explicit, models_folder(args.models_dir))


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[LONG_DTYPES.get(name, name)]
