"""The whole command line ``flux2``: the core's commands, and those of datasets, caches and training.

Nothing heavy is imported before the options are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..flux2_core import cli as core_cli
from .foreign_options import REFUSED_IN_CACHING, WITHOUT_EFFECT_IN_CACHING


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return core_cli.main(argv, add_commands)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return core_cli.build_parser(add_commands)


def add_commands(commands: argparse._SubParsersAction[Any], common: core_cli.Parser) -> None:
    """Adds what this package can do to the commands of the core."""
    _add_dataset(commands, common)
    _add_cache(commands, common)
    _add_train(commands, common)


def _add_dataset(commands: argparse._SubParsersAction[Any], common: core_cli.Parser) -> None:
    parser = commands.add_parser("dataset", parents=[common], help="check a dataset before training")
    parser.description = (
        "Lists a dataset: pictures, buckets, missing captions, references, what would be cropped, tokens cut.\n"
        "FILE is a TOML or JSON in musubi-tuner's schema, a metadata table (CSV, JSON, JSONL), or a folder."
    )
    parser.add_argument("dataset_config", metavar="FILE", help="settings, table or folder")
    parser.add_argument("--preview", metavar="PICTURE", help="write a contact sheet of every bucket, as .jpg or .png")
    parser.add_argument("--model_version", metavar="NAME", help="count the tokens that this variant would cut")
    parser.add_argument("--text_encoder", metavar="PATH", help="whose tokenizer counts; default: looked up by variant")
    parser.add_argument("--models_dir", metavar="DIR", help="ComfyUI's models folder, searched for what is not given")
    parser.set_defaults(run=_run_dataset)


def _add_cache(commands: argparse._SubParsersAction[Any], common: core_cli.Parser) -> None:
    for name, title in (
        ("cache-latents", "encode a dataset's pictures for training"),
        ("cache-text", "encode a dataset's captions for training"),
        ("cache", "encode a dataset's pictures and captions for training"),
    ):
        parser = commands.add_parser(name, parents=[common], help=title)
        parser.description = (
            f"{title[0].upper()}{title[1:]}. What is cached already stays; what changed is encoded again.\n"
            "A killed run goes on where it was. Under `accelerate launch -m flux2_kit.training` all processes share "
            "the work."
        )
        parser.add_argument("--dataset_config", required=True, metavar="FILE", help="settings, table or folder")
        parser.add_argument("--model_version", metavar="NAME", help="a variant; default: tiny without weights")
        if name != "cache-text":
            parser.add_argument("--vae", metavar="PATH", help="autoencoder; default: looked up by variant")
            parser.add_argument(
                "--vae_dtype",
                choices=("bf16", "fp16", "fp32", "bfloat16", "float16", "float32"),
                help="of the autoencoder; default: as in the file",
            )
        if name != "cache-latents":
            parser.add_argument("--text_encoder", metavar="PATH", help="default: looked up by variant")
            parser.add_argument("--tokenizer", metavar="PATH", help="default: beside the text encoder")
            parser.add_argument(
                "--text_encoder_dtype", choices=("bf16", "fp16", "fp32"), help="default: as in the file"
            )
        parser.add_argument(
            "--models_dir", metavar="DIR", help="ComfyUI's models folder, searched for what is not given"
        )
        parser.add_argument("--batch_size", type=int, metavar="N", help="default: by free memory; text: 1, bit-equal")
        parser.add_argument("--num_workers", type=int, metavar="N", help="threads that read pictures; default: by CPU")
        parser.add_argument(
            "--skip_existing",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="keep what is cached and still right; --no-skip_existing encodes everything again",
        )
        parser.add_argument("--prune", action="store_true", help="delete cached files that no dataset names any more")
        parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:0; default: cuda where there is one")
        for foreign in (*WITHOUT_EFFECT_IN_CACHING, *REFUSED_IN_CACHING):
            parser.add_argument(f"--{foreign}", nargs="?", const=True, help=argparse.SUPPRESS)
        parser.set_defaults(run=_run_cache, what=name)


def _add_train(commands: argparse._SubParsersAction[Any], common: core_cli.Parser) -> None:
    parser = commands.add_parser(
        "train", parents=[common], help="train a LoRA on a cached dataset", lazy_options=_add_train_options
    )
    parser.description = (
        "Trains a LoRA on a dataset that `flux2 cache` has encoded. Options may also stand in a TOML, --config_file;\n"
        "those of the command line win. Ctrl-C stops after the step, and --resume goes on from there.\n"
        "On several GPUs: `accelerate launch -m flux2_kit.training train ...`."
    )
    parser.set_defaults(run=_run_train, parser=parser)


def _add_train_options(parser: core_cli.Parser) -> None:
    from .train_options import add_train_options

    add_train_options(parser)


def _run_train(args: argparse.Namespace) -> int:
    from .train_command import run_train

    return run_train(args)


def _run_dataset(args: argparse.Namespace) -> int:
    from .dataset_command import run_dataset

    return run_dataset(args)


def _run_cache(args: argparse.Namespace) -> int:
    from .cache_command import run_cache

    return run_cache(args)
