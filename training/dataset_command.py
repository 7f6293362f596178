"""``flux2 dataset``: what a dataset amounts to, before hours are spent on it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..flux2_core.autoencoder import AutoencoderConfig
from ..flux2_core.files import write_atomically
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.tokenizer import PromptTokenizer, find_tokenizer
from ..flux2_core.variants import Variant, get_variant
from ..flux2_core.weights import find_weights
from .contact_sheet import draw_contact_sheet
from .dataset import list_dataset, load_dataset_config
from .dataset_config import FOLDER_SIDE, DatasetConfig
from .dataset_report import CountCut, format_report, report_dataset

logger = logging.getLogger(__name__)

PREVIEW_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


def run_dataset(args: argparse.Namespace) -> int:
    """Prints the table of a dataset, and draws its contact sheet where that is asked for.

    Raises:
        ValueError: something is wrong with the dataset or the options.
    """
    preview = None if args.preview is None else _check_preview(Path(args.preview))
    if args.model_version is None and (args.text_encoder or args.models_dir):
        raise ValueError("--text_encoder and --models_dir need to know the variant; add --model_version NAME")
    variant = None if args.model_version is None else get_variant(args.model_version)
    side = FOLDER_SIDE if variant is None else variant.default_size
    config = load_dataset_config(args.dataset_config, side=side)
    if preview is not None:
        _check_apart(preview, config)
    dataset = list_dataset(config)
    count_cut, reason = _find_counter(args, variant)
    print(format_report(report_dataset(dataset, count_cut=count_cut), args.dataset_config, not_counted=reason))
    if preview is not None:
        autoencoder = AutoencoderConfig() if variant is None else variant.autoencoder
        sheet = draw_contact_sheet(dataset, reference_sides=autoencoder.reference_sides)
        kind = PREVIEW_FORMATS[preview.suffix.lower()]
        write_atomically(preview, lambda temporary: sheet.save(temporary, format=kind, quality=90))
        logger.info("contact sheet: %s", preview)
    return 0


def _check_preview(path: Path) -> Path:
    if path.suffix.lower() not in PREVIEW_FORMATS:
        raise ValueError(f"--preview is {path}; its name must end in {', '.join(PREVIEW_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--preview is {path}, but {path.absolute().parent} is no folder; make it first")
    return path


def _check_apart(preview: Path, config: DatasetConfig) -> None:
    """Refuses a contact sheet among the pictures: the next run would train on it."""
    for subset in config.subsets:
        for folder in (subset.image_directory, subset.control_directory, subset.mask_directory):
            if folder is not None and preview.absolute().parent.resolve() == folder.resolve():
                raise ValueError(f"--preview is {preview}, among the pictures of the dataset; give another folder")


def _find_counter(args: argparse.Namespace, variant: Variant | None) -> tuple[CountCut | None, str]:
    """What counts the tokens that are cut, or None and why there is none."""
    if variant is None:
        return None, "give --model_version to count them"
    try:
        tokenizer = _find_tokenizer(args, variant)
    except ValueError as error:
        if args.text_encoder:
            raise
        logger.debug("%s", error)
        return None, f"no tokenizer of {variant.name} is on this machine; give --text_encoder"
    max_tokens = variant.text_encoder.max_tokens
    return (lambda captions: tokenizer(captions, max_tokens).num_cut), ""


def _find_tokenizer(args: argparse.Namespace, variant: Variant) -> PromptTokenizer:
    """The variant's tokenizer, from its text encoder's files or the local cache; no weights are loaded."""
    config = variant.text_encoder
    explicit = Path(args.text_encoder) if args.text_encoder else None
    embedded = None
    directories: tuple[Path, ...] = ()
    try:
        models_dir = Path(args.models_dir) if args.models_dir else None
        source = TensorSource(find_weights(variant, "text_encoder", explicit, models_dir), component="text_encoder")
        directories = (source.folder, source.folder / "tokenizer", source.folder.parent / "tokenizer")
        embedded = source.get("tekken_model").numpy().tobytes() if "tekken_model" in source.table else None
    except ValueError:
        # A tokenizer can be there without the weights.
        if explicit is not None:
            raise
    return find_tokenizer(
        config.family,
        explicit=None,
        embedded=embedded,
        directories=directories,
        repository=config.tokenizer_id,
        vocab_size=2**31,  # the weights, which it has to fit, are not looked at
    )
