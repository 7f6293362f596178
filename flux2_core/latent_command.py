"""``flux2 generate --latent_path``: saved latents to pictures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .autoencoder import Flux2Autoencoder
from .command_options import models_folder
from .file_stems import claim_stem
from .latents import NUM_LATENT_CHANNELS
from .memory_options import autoencoder_dtype
from .picture_metadata import GenerationRecord, parse_record
from .picture_output import prepare_folder, write_pictures
from .pipeline import decode_latents
from .placement import place_autoencoder
from .tensor_source import TensorSource
from .variants import VARIANTS, get_variant
from .weights import find_weights

NOT_FOR_LATENTS = (
    "negative_prompt", "control_image_path", "no_resize_control", "reference_cache", "image_size", "infer_steps",
    "guidance_scale", "embedded_cfg_scale", "flow_shift", "seed", "num_images", "image_path", "strength", "lora_weight",
    "lora_multiplier", "include_patterns", "exclude_patterns", "allow_unmatched", "save_merged_model", "attention",
    "attn_mode", "compile", "dtype", "precision", "text_encoder_precision", "vram_budget", "blocks_to_swap",
    "fp8_scaled", "fp8", "fp8_text_encoder",
)  # fmt: skip
"""Options of sampling and of its networks; latents that are only decoded were sampled already."""


def decode_files(args: argparse.Namespace, device: torch.device) -> int:
    """``--latent_path``: saved latents to pictures; loads autoencoders only.

    Raises:
        ValueError: options that belong to sampling, or a file that holds no latents.
    """
    given = [name for name in NOT_FOR_LATENTS if getattr(args, name) not in (None, False)]
    if args.output_type != "images":
        given.append("output_type")
    if given:
        raise ValueError(f"--{given[0]} has no effect on saved latents, which are only decoded; leave it out")
    sources = [(Path(path), *read_latents(Path(path))) for path in args.latent_path]
    autoencoders = [find_autoencoder(args, path, record) for path, _, record in sources]
    folder = prepare_folder(args.save_path)
    loaded: dict[Path, Flux2Autoencoder] = {}
    for (path, latents, record), weights in zip(sources, autoencoders, strict=True):
        if weights not in loaded:
            loaded = {weights: place_autoencoder(weights, device, autoencoder_dtype(args))}  # one at a time
        images = decode_latents(loaded[weights], latents, tiled=args.vae_tiling)
        kept = replace(record, autoencoder=weights.name) if record and not args.no_metadata else None
        with claim_stem(folder, str(record.seed) if record else path.stem.removesuffix("_latent")) as stem:
            for written in write_pictures(folder, stem, images, kept):
                print(written, flush=True)
    return 0


def read_latents(path: Path) -> tuple[Tensor, GenerationRecord | None]:
    """Latents ``[B, 128, h, w]``, fp32, and how they were made, from a file of ours or of musubi-tuner.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    source = TensorSource(path)
    shape = source.table["latent"].shape if "latent" in source.table else None
    if shape is None or len(shape) not in (3, 4) or shape[-3] != NUM_LATENT_CHANNELS or 0 in shape:
        found = "no tensor 'latent'" if shape is None else f"a latent of shape {list(shape)}"
        raise ValueError(
            f"{path} holds {found}; saved latents are [B, {NUM_LATENT_CHANNELS}, H/16, W/16]. Make them with "
            "--output_type latent"
        )
    latents = source.get("latent").float()
    if not torch.isfinite(latents).all():
        raise ValueError(f"{path} holds values that are not finite; make the latents again")
    return latents[None] if latents.dim() == 3 else latents, parse_record(source.metadata)


def find_autoencoder(args: argparse.Namespace, path: Path, record: GenerationRecord | None) -> Path:
    """The autoencoder for a latent file: as given, else that of the variant that is named or recorded."""
    recorded = record.variant if record and record.variant in VARIANTS else None
    name = args.model_version if args.model_version not in (None, "auto") else recorded
    if name is None and not args.vae:
        raise ValueError(f"{path} does not tell which model it is of; give --vae or --model_version")
    variant = get_variant(name or "tiny")
    return find_weights(variant, "autoencoder", Path(args.vae) if args.vae else None, models_folder(args.models_dir))
