"""``flux2 plan``: what runs within which budget, without any file or device."""

from __future__ import annotations

import argparse

from .memory import GIB, MemoryNeeds, MemoryPlan, MemoryRequest, in_words, plan_memory
from .pipeline import SamplingConfig, check_num_references
from .variants import get_variant

DEFAULT_BUDGETS = (6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 48.0, 80.0)
REFERENCE_SIDE = 1024
DEFAULT_RANK = 32
COLUMNS = ("budget", "precision", "resident", "ring", "text encoder", "autoencoder", "reference cache", "estimate")
TILINGS = {"whole": "at once", "strips": "strips", "host": "host strips"}


def run_plan(args: argparse.Namespace) -> int:
    """Prints a row for each budget; 1 when nothing runs within any of them.

    Raises:
        ValueError: a budget or a setting that cannot be.
    """
    request = plan_request(args)
    if wrong := [budget for budget in args.budgets if not 0 < budget < float("inf")]:
        raise ValueError(f"--budgets has {wrong[0]:g}; give numbers of GiB above 0, such as 8 12 24")
    host_bytes = None if args.host_memory is None else round(args.host_memory * GIB)
    rows: list[tuple[str, ...]] = []
    for budget in args.budgets:
        try:
            plan = plan_memory(request, round(budget * GIB), host_bytes)
            rows.append((f"{budget:g} GiB", *describe_columns(plan, request)))
        except ValueError as error:
            rows.append((f"{budget:g} GiB", refusal(error)))
    whole = [row for row in rows if len(row) == len(COLUMNS)]
    columns = columns_of(request)
    widths = [max(len(row[index]) for row in (COLUMNS, *whole)) for index in range(len(COLUMNS))]
    print(title(request))
    for row in (COLUMNS, *rows):
        shown = (
            [row[index].ljust(widths[index]) for index in columns]
            if len(row) == len(COLUMNS)
            else [
                row[0].ljust(widths[0]),
                row[1],
            ]
        )
        print("  ".join(shown).rstrip())
    return 0 if whole else 1


def plan_request(args: argparse.Namespace) -> MemoryRequest:
    """What is planned for, from the options.

    Raises:
        ValueError: a number that cannot be.
    """
    height, width = args.image_size or (None, None)
    SamplingConfig(width=width, height=height, cfg_scale=args.guidance_scale)  # refuses what generate would
    trains = args.training or args.rank is not None
    rank = DEFAULT_RANK if args.rank is None else args.rank
    for name, number, least in (
        ("references", args.references, 0),
        ("batch_size", args.batch_size, 1),
        ("rank", rank, 1),
    ):
        if number < least:
            raise ValueError(f"--{name} is {number}; give {least} or more")
    check_num_references(args.references)
    if args.host_memory is not None and not 0 <= args.host_memory < float("inf"):
        raise ValueError(f"--host_memory is {args.host_memory:g}; give a number of GiB, such as 16")
    if trains and args.text_encoder_precision is not None:
        raise ValueError(
            "training works on cached captions, without a text encoder; leave --text_encoder_precision out"
        )
    return MemoryRequest(
        variant=get_variant(args.variant),
        precision=args.precision or "auto",
        text_encoder_precision=args.text_encoder_precision or "auto",
        needs=MemoryNeeds(
            width=width,
            height=height,
            reference_sizes=((REFERENCE_SIDE, REFERENCE_SIDE),) * args.references,
            num_images=args.batch_size,
            uses_cfg=None if args.guidance_scale is None else args.guidance_scale != 1,
        ),
        rank=rank if trains else None,
        uses_text_encoder=not trains,
        uses_autoencoder=not trains,
    )


def title(request: MemoryRequest) -> str:
    """What the table is about."""
    width, height = request.size
    parts = [request.variant.name, f"{width}x{height} px"]
    if request.needs.reference_sizes:
        number = len(request.needs.reference_sizes)
        parts.append(f"{number} references" if number > 1 else "1 reference")
    if request.needs.num_images > 1:
        parts.append(f"batch of {request.needs.num_images}")
    if request.rank is not None:
        parts.append(f"training a LoRA of rank {request.rank}")
    elif request.tokens.num_rows > request.needs.num_images:
        parts.append("with a negative prompt")
    return ", ".join(parts)


def columns_of(request: MemoryRequest) -> list[int]:
    """The columns that say something: training uses neither text encoder nor autoencoder, few variants a cache."""
    unused = ["text encoder", "autoencoder"] if request.rank is not None else []
    unused += ["reference cache"] if request.reference_cache == "off" else []
    return [index for index, name in enumerate(COLUMNS) if name not in unused]


def describe_columns(plan: MemoryPlan, request: MemoryRequest) -> tuple[str, ...]:
    """All but the budget."""
    dit, text_encoder = plan.dit, plan.text_encoder
    shown = "-"
    if text_encoder is not None:
        layers = "resident"
        if text_encoder.is_streamed:
            layers = f"streamed{' from disk' if text_encoder.from_disk else ''}"
        shown = f"{text_encoder.precision}, {layers}"
    estimate = in_words(plan.peak_bytes)
    if plan.checkpointing is not None:
        estimate += f", checkpointing {plan.checkpointing}"
    return (
        dit.precision,
        f"{dit.num_resident} of {dit.num_blocks}{' (disk)' if dit.from_disk else ''}",
        str(dit.ring_size or "-"),
        shown,
        TILINGS[plan.tiling] if request.uses_autoencoder else "-",
        plan.reference_cache or "-",
        estimate,
    )


def refusal(error: ValueError) -> str:
    """The part of the planner's message that a row has space for."""
    least = str(error).partition("the least that works is ")[2].partition(";")[0]
    return f"too small; the least is {least}" if least else str(error)
