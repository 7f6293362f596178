"""What a dataset amounts to, for people: the table of ``flux2 dataset`` and of the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .batches import Schedule, Trainee
from .buckets import cover_scale, cropped_fraction
from .dataset import Dataset, DatasetItem, SubsetConfig
from .dataset_tables import shorten_names

MUCH_CROPPED = 0.1
"""Pictures that lose more than this share of their area are named."""
MUCH_UPSCALED = 1.1
"""Pictures that grow by more than this factor are named; buckets have steps, so a few percent are common."""
MAX_BUCKETS_SHOWN = 40
"""Without upscaling, every picture may have a bucket of its own."""
CONTROL_FIT_TEXTS = {
    "inference": "scaled as when generating",
    "target": "scaled to the picture's bucket",
    "original": "at their own size",
    "area": "scaled to one area",
}

Number = TypeVar("Number", int, float)
CountCut = Callable[[Sequence[str]], Sequence[int]]
"""Captions to the number of tokens that are cut off each."""


@dataclass(frozen=True, kw_only=True)
class SubsetReport:
    """One subset in numbers; pictures are counted once, whatever their repeats."""

    config: SubsetConfig
    num_pictures: int
    num_validation: int
    buckets: tuple[tuple[tuple[int, int], int], ...]
    """Width and height in pixels, and pictures; the fullest first."""
    num_captions: int
    """Distinct ones that are not empty, orders of shuffled parts not counted."""
    missing: tuple[str, ...]
    """Names of pictures without caption."""
    reference_counts: tuple[tuple[int, int], ...]
    """References of a picture, and how many pictures have so many."""
    num_masks: int
    cropped: tuple[tuple[str, float], ...]
    """Name and share of the area that is cut off, where it is over `MUCH_CROPPED`; the most first."""
    upscaled: tuple[tuple[str, float], ...]
    """Name and factor, where it is over `MUCH_UPSCALED`; the most first."""
    cut: tuple[tuple[str, int], ...] | None
    """Name and tokens that are cut off its caption; the most first. None: not counted."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """A dataset in numbers."""

    subsets: tuple[SubsetReport, ...]
    num_steps_per_epoch: int
    """With one process and no gradient accumulation."""

    @property
    def num_pictures(self) -> int:
        """Of all subsets."""
        return sum(subset.num_pictures for subset in self.subsets)


def report_dataset(dataset: Dataset, *, count_cut: CountCut | None = None) -> DatasetReport:
    """Counts a dataset.

    Args:
        dataset: as it was listed.
        count_cut: tells how many tokens of captions are cut off; None leaves that out.
    """
    subsets = tuple(
        _report_subset(config, [item for item in dataset.items if item.subset == index], count_cut)
        for index, config in enumerate(dataset.config.subsets)
    )
    trainees = [
        Trainee(
            group=(item.subset, *item.bucket),
            batch_size=dataset.config.subsets[item.subset].batch_size,
            num_repeats=dataset.config.subsets[item.subset].num_repeats,
        )
        for item in dataset.items
        if not item.is_validation
    ]
    return DatasetReport(subsets=subsets, num_steps_per_epoch=Schedule(trainees=trainees, seed=0).num_steps_per_epoch)


def _report_subset(config: SubsetConfig, items: Sequence[DatasetItem], count_cut: CountCut | None) -> SubsetReport:
    buckets = Counter(item.bucket for item in items)
    cropped = [(item.name, cropped_fraction(item.size, item.bucket)) for item in items]
    upscaled = [(item.name, cover_scale(item.size, item.bucket)) for item in items]
    cut = None
    if count_cut is not None:
        captions = list(dict.fromkeys(item.captions[0] for item in items))
        num_cut = dict(zip(captions, count_cut(captions), strict=True))
        cut = [(item.name, num_cut[item.captions[0]]) for item in items]
    return SubsetReport(
        config=config,
        num_pictures=len(items),
        num_validation=sum(item.is_validation for item in items),
        buckets=tuple(sorted(buckets.items(), key=lambda pair: (-pair[1], pair[0]))),
        num_captions=len({item.captions[0] for item in items if not item.caption_is_missing}),
        missing=tuple(item.name for item in items if item.caption_is_missing),
        reference_counts=tuple(sorted(Counter(len(item.references) for item in items).items())),
        num_masks=sum(item.mask is not None for item in items),
        cropped=_above(cropped, MUCH_CROPPED),
        upscaled=_above(upscaled, MUCH_UPSCALED),
        cut=None if cut is None else _above(cut, 0),
    )


def _above(pairs: Sequence[tuple[str, Number]], limit: float) -> tuple[tuple[str, Number], ...]:
    return tuple(sorted((pair for pair in pairs if pair[1] > limit), key=lambda pair: (-pair[1], pair[0])))


def format_report(report: DatasetReport, source: Path | str, *, not_counted: str = "") -> str:
    """The table as text.

    Args:
        report: the numbers.
        source: the file or folder that was given, for the first line.
        not_counted: why tokens were not counted, where they were not.
    """
    num_missing = sum(len(subset.missing) for subset in report.subsets)
    head = (
        f"{source}: {_count(report.num_pictures, 'picture')} in {_count(len(report.subsets), 'subset')}, "
        f"{_count(num_missing, 'caption')} missing, {_count(report.num_steps_per_epoch, 'step')} an epoch"
    )
    blocks = [head]
    for number, subset in enumerate(report.subsets, start=1):
        rows = _rows(subset, not_counted)
        width = max(len(name) for name, _ in rows) + 1
        lines = [f"  {f'{name}:':<{width}} {text}" for name, text in rows]
        blocks.append("\n".join([f"[{number}] {subset.config.place}", *lines]))
    return "\n\n".join(blocks)


def _rows(subset: SubsetReport, not_counted: str) -> list[tuple[str, str]]:
    config = subset.config
    pictures = str(subset.num_pictures)
    if subset.num_validation:
        pictures += f", {subset.num_validation} of them for validation"
    shown = subset.buckets[:MAX_BUCKETS_SHOWN]
    buckets = ", ".join(f"{width}x{height}: {count}" for (width, height), count in shown)
    if len(shown) < len(subset.buckets):
        buckets += f", and {len(subset.buckets) - len(shown)} more buckets"
    captions = f"{subset.num_captions} distinct, {len(subset.missing)} missing"
    if subset.missing:
        captions += f": {shorten_names(subset.missing)}"
    if subset.cut is None:
        cut = f"not counted: {not_counted}" if not_counted else "not counted"
    else:
        cut = _list([(name, f"{number:.0f}") for name, number in subset.cut])
    rows = [
        ("pictures", pictures),
        ("repeats", f"{config.num_repeats}, in batches of {config.batch_size}"),
        ("buckets" if config.enable_bucket else "size", buckets),
        ("captions", captions),
        ("references", _say_references(subset)),
    ]
    if subset.num_masks:
        rows.append(("masks", str(subset.num_masks)))
    rows += [
        ("cropped by more than 10 %", _list([(name, f"{share:.0%}") for name, share in subset.cropped])),
        ("upscaled by more than 10 %", _list([(name, f"{factor:.2f}x") for name, factor in subset.upscaled])),
        ("tokens cut", cut),
    ]
    return rows


def _say_references(subset: SubsetReport) -> str:
    if subset.reference_counts in ((), ((0, subset.num_pictures),)):
        return "none"
    counts = [f"{number} for {_count(pictures, 'picture')}" for number, pictures in subset.reference_counts]
    return f"{', '.join(counts)}; {CONTROL_FIT_TEXTS[subset.config.control_fit]}"


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    if not pairs:
        return "none"
    return f"{len(pairs)}: {shorten_names([f'{name} ({text})' for name, text in pairs])}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
