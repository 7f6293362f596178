"""``flux2 download``: shows what would be fetched, asks, and fetches it."""

from __future__ import annotations

import argparse
import sys

from .variants import get_variant
from .weights import DownloadPlan, download, plan_download


def run_download(args: argparse.Namespace) -> int:
    """Fetches a variant's weights into the Hugging Face cache; 0 when all of them are there.

    Raises:
        ValueError: an unknown variant, nobody to ask, refused access, or a failed connection.
    """
    variant = get_variant(args.variant)
    plan = plan_download(variant)
    print(describe_plan(plan))
    if not plan.files:
        return 0
    if not args.yes:
        if not sys.stdin.isatty():
            raise ValueError("there is no terminal to ask on; add --yes to start the download")
        if input("Start the download? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was downloaded.")
            return 1
    for path in download(variant, on_progress=show_progress):
        print(path)
    return 0


def describe_plan(plan: DownloadPlan) -> str:
    """Files, sizes and licence, aligned for people."""
    sizes = [_gib(file.size_bytes) if file.size_bytes else "small" for file in plan.files]
    lines = [f"  {size:>10}  {file.repository}: {file.filename}" for size, file in zip(sizes, plan.files, strict=True)]
    if plan.files:
        lines.insert(0, f"{plan.variant} needs, as far as it is not in the Hugging Face cache yet:")
        lines.append(f"  {_gib(plan.size_bytes):>10}  in all, about")
    lines.append(f"{plan.note}.")
    return "\n".join(lines)


def show_progress(filename: str, num_done: int, num_bytes: int) -> None:
    """Tells on stderr which file is fetched next."""
    print(f"{_gib(num_done)} of {_gib(num_bytes)}: {filename}", file=sys.stderr)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
