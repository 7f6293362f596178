"""Options about precision and memory: our own, and musubi-tuner's, which stand for them."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .memory import AutoencoderPrecision, PlanPrecision

logger = logging.getLogger(__name__)

LONG_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""musubi-tuner's names."""
PRECISIONS = ("auto", "bf16", "fp8", "nf4", "fp32")


def add_memory_options(group: argparse._ActionsContainer) -> None:
    """Adds them to a command that makes pictures."""
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of the DiT's blocks; default: auto, the most exact one that runs fast"
    )
    group.add_argument(
        "--text_encoder_precision", choices=PRECISIONS, help="of its layers; default: auto, as in the file"
    )
    group.add_argument(
        "--vae_dtype",
        choices=("auto", "bf16", "fp16", "fp32", *LONG_DTYPES),
        default="auto",
        help="of the autoencoder; default: auto, as in the file, but bf16 for an fp32 file on a GPU that has it",
    )
    group.add_argument(
        "--vram_budget", type=float, metavar="GB", help="memory of the device to use, in GiB; default: what is free"
    )
    group.add_argument(
        "--blocks_to_swap", type=int, metavar="N", help="stream so many blocks; default: as few as fit the budget"
    )
    group.add_argument("--fp8_scaled", action="store_true", help="the same as --precision fp8")
    group.add_argument("--fp8", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--fp8_text_encoder", action="store_true", help="the same as --text_encoder_precision fp8")


def read_memory_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `pipeline.load_pipeline` that they stand for.

    Raises:
        ValueError: two of them contradict each other.
    """
    if args.fp8 and not args.fp8_scaled:
        logger.info("--fp8 runs as --fp8_scaled: with a scale for every row, which is as fast and more exact")
    precision = choose_precision("precision", args.precision, fp8_scaled=args.fp8_scaled or args.fp8)
    text_encoder = choose_precision(
        "text_encoder_precision", args.text_encoder_precision, fp8_text_encoder=args.fp8_text_encoder
    )
    return {
        "precision": precision,
        "text_encoder_precision": text_encoder,
        "autoencoder_dtype": autoencoder_dtype(args),
        "vram_budget_gib": args.vram_budget,
    }


def autoencoder_dtype(args: argparse.Namespace) -> AutoencoderPrecision:
    """What ``--vae_dtype`` stands for."""
    return cast("AutoencoderPrecision", LONG_DTYPES.get(args.vae_dtype, args.vae_dtype))


def choose_precision(name: str, asked: str | None, **flags: bool | None) -> PlanPrecision:
    """The precision of an option, or fp8 where one of the flags is set.

    Raises:
        ValueError: both, and they differ.
    """
    flag = next((flag for flag, is_set in flags.items() if is_set), None)
    if flag is not None and asked not in (None, "auto", "fp8"):
        raise ValueError(f"--{name} {asked} and --{flag} contradict each other; leave one of them out")
    return "fp8" if flag is not None else cast("PlanPrecision", asked or "auto")
