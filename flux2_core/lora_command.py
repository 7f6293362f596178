"""LoRAs on the command line: the options of ``flux2 generate``, and the commands that merge, convert and extract."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .command_options import DTYPES, choose_device
from .detect import resolve_variant
from .dit import DiTConfig
from .lora import LoraSetting, TensorCallback, extract_lora, merge_checkpoint
from .lora_files import read_lora
from .lora_tools import SIZES, fitting_variants, read_fitting_lora
from .lora_writer import reading_notes, write_lora
from .tensor_source import TensorSource

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


def read_lora_settings(args: argparse.Namespace, config: DiTConfig) -> list[LoraSetting]:
    """The LoRAs of ``--lora_weight`` with their strengths and patterns; tells in one line each what was found.

    Raises:
        ValueError: a file, a strength or a pattern is wrong, or strengths and files differ in number.
    """
    check_lora_options(args)
    settings = []
    for path, strength in zip(args.lora_weight or (), lora_strengths(args), strict=True):
        setting = LoraSetting(
            lora=read_lora(path, config, allow_unmatched=args.allow_unmatched),
            strength=strength,
            include=args.include_patterns or (),
            exclude=args.exclude_patterns or (),
        )
        setting.layer_strengths()
        settings.append(setting)
    for setting in settings:
        logger.info("%s", describe_setting(setting))
    return settings


def check_lora_options(args: argparse.Namespace) -> None:
    """Refuses what can be refused without opening a file.

    Raises:
        ValueError: options without a LoRA, strengths that are not one for all or one each, or a wrong pattern.
    """
    if not args.lora_weight:
        names = ("lora_multiplier", "include_patterns", "exclude_patterns", "allow_unmatched")
        given = [name for name in names if getattr(args, name)]
        if given:
            raise ValueError(f"--{given[0]} was given without a LoRA; add --lora_weight or leave it out")
        return
    for strength in lora_strengths(args):
        if not math.isfinite(strength):
            raise ValueError(f"--lora_multiplier is {strength}; it must be a finite number, such as 0.8")
    for option in ("include_patterns", "exclude_patterns"):
        for pattern in getattr(args, option) or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"--{option} {pattern!r} is no regular expression: {error}; correct it") from None


def lora_strengths(args: argparse.Namespace) -> list[float]:
    """One strength for each LoRA; a single one is for all of them.

    Raises:
        ValueError: there is another number of them.
    """
    weights, strengths = args.lora_weight or [], args.lora_multiplier or [1.0]
    if len(strengths) not in (1, len(weights)) and weights:
        raise ValueError(
            f"--lora_multiplier has {len(strengths)} values for {len(weights)} LoRAs; give one for each, or one for all"
        )
    return list(strengths) if len(strengths) == len(weights) else strengths[:1] * len(weights)


def describe_setting(setting: LoraSetting) -> str:
    """One line: file, strength, what the file holds, and how many layers the patterns leave."""
    lora = setting.lora
    text = f"{lora.name} at {setting.strength:g}: {lora.report.summary()}"
    num_active = len(setting.layer_strengths())
    if setting.strength != 0 and num_active < len(lora.layers):
        text += f"; patterns leave {num_active} of {len(lora.layers)} layers"
    return text


def run_merge_lora(args: argparse.Namespace) -> int:
    """``flux2 merge-lora``: writes the merged DiT and its path; 0 when it is written.

    Raises:
        ValueError: as `save_merged`.
    """
    check_lora_options(args)
    variant = resolve_variant(TensorSource(args.dit, component="dit"), args.model_version).name
    save_merged(args, dit=Path(args.dit), variant=variant, out_path=args.output)
    return 0


def save_merged(args: argparse.Namespace, *, dit: Path, variant: str, out_path: str) -> None:
    """Merges the LoRAs of ``--lora_weight`` into a DiT, written as one file in BFL's layout.

    Raises:
        ValueError: there are no LoRAs or they do not fit, or the output is no place to write to; nothing is written.
    """
    if not args.lora_weight:
        raise ValueError("there is nothing to merge; give --lora_weight")
    device = choose_device(args.device)
    source = TensorSource(dit, component="dit")
    path = check_output(out_path, [*source.files, *args.lora_weight])
    settings = read_lora_settings(args, resolve_variant(source, variant).dit)
    dtype = DTYPES[args.dtype] if args.dtype else None
    make_parent(path)
    with tensor_bar() as on_tensor:
        merge_checkpoint(dit, settings, path, dtype, variant=variant, device=device, on_tensor=on_tensor)
    print(path, flush=True)


@contextmanager
def tensor_bar() -> Iterator[TensorCallback]:
    """A bar over the tensors of a checkpoint on stderr, where that is a terminal."""
    with tqdm(unit="tensor", disable=None, leave=False, file=sys.stderr) as bar:

        def show(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        yield show


def run_convert_lora(args: argparse.Namespace) -> int:
    """``flux2 convert-lora``: writes a LoRA in another dialect, and its path; 0 when it is written.

    Raises:
        ValueError: the file is no LoRA of FLUX.2, or the dialect cannot express it.
    """
    source = TensorSource(args.input)
    path = check_output(args.output, source.files)
    lora = read_fitting_lora(source, args.model_version, allow_unmatched=args.allow_unmatched)
    logger.info("%s (%s): %s", lora.name, SIZES[lora.config], lora.report.summary())
    for note in reading_notes(lora, args.to):
        logger.warning("%s: %s", path.name, note)
    make_parent(path)
    print(write_lora(path, lora, args.to, DTYPES[args.dtype] if args.dtype else None), flush=True)
    return 0


def run_extract_lora(args: argparse.Namespace) -> int:
    """``flux2 extract-lora``: writes the LoRA nearest to the difference of two DiTs, and its path.

    Raises:
        ValueError: the checkpoints are of different shapes or do not differ, or the rank is below 1.
    """
    device = choose_device(args.device)
    sources = [TensorSource(path, component="dit") for path in (args.base, args.tuned)]
    path = check_output(args.output, [file for source in sources for file in source.files])
    with tensor_bar() as on_tensor:
        lora = extract_lora(
            args.base,
            args.tuned,
            args.rank,
            device,
            variant=args.model_version,
            allow_unmatched=args.allow_unmatched,
            on_tensor=on_tensor,
        )
    logger.info("%s: %s", path.name, lora.report.summary())
    make_parent(path)
    print(write_lora(path, lora, "comfy", DTYPES[args.dtype] if args.dtype else None), flush=True)
    return 0


def check_output(path: str, inputs: Iterable[str | Path]) -> Path:
    """The path of a file to be written.

    Raises:
        ValueError: it is a folder, has another suffix, or is one of the files that are read.
    """
    output = Path(path)
    if output.suffix != SUFFIX:
        raise ValueError(f"the output {output} must end in {SUFFIX}, or no program will find it; add that")
    if output.is_dir():
        raise ValueError(f"the output {output} is a folder; give the name of a file in it")
    for name in inputs:
        if output.exists() and Path(name).exists() and output.samefile(name):
            raise ValueError(f"the output {output} is one of the files that are read; give another name")
    return output


def make_parent(path: Path) -> None:
    """Makes the folder of a file to be written.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder of {path} cannot be made ({error.strerror}); give a folder of yours") from error


def lora_facts(source: TensorSource) -> dict[str, Any] | None:
    """What ``flux2 inspect`` tells of a LoRA; None where nothing can be read as one.

    Layers that are not FLUX.2's are named as unmatched, not refused.
    """
    try:
        lora = read_fitting_lora(source, allow_unmatched=True)
    except ValueError:
        return None
    report = lora.report
    return {
        "dialect": ", ".join(report.dialects),
        "kinds": ", ".join(report.kinds),
        "fits": f"{SIZES[lora.config]}: {', '.join(fitting_variants(lora.config))}",
        "rank": _one_or_all([group.rank for group in report.groups]),
        "alpha": _one_or_all([group.alpha for group in report.groups]),
        "num_layers": len(report.matched),
        "unmatched": list(report.unmatched) or None,
    }


def _one_or_all(values: Sequence[float | None]) -> float | list[float] | None:
    """The one value that all groups have, or each that occurs, in order of size."""
    known = sorted({value for value in values if value is not None})
    return None if not known else known[0] if len(known) == 1 else known
