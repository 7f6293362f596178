"""Options about speed: our own, and musubi-tuner's, which stand for them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import Acceleration

BACKENDS = ("auto", "sdpa", "cudnn", "flash", "efficient", "flash3", "sage")
"""`attention_backends.AttentionBackend`, which cannot be asked without torch."""
MUSUBI_ATTENTION = {"torch": "sdpa", "sdpa": "sdpa", "flash": "flash", "flash3": "flash3", "sageattn": "sage"}
"""musubi-tuner's ``--attn_mode``."""


def add_acceleration_options(group: argparse._ActionsContainer) -> None:
    """Adds them to a command that makes pictures."""
    group.add_argument("--attention", choices=BACKENDS, help="kernel; default: auto, the fastest exact one there is")
    group.add_argument("--attn_mode", choices=tuple(MUSUBI_ATTENTION), help=argparse.SUPPRESS)
    group.add_argument(
        "--compile", action="store_true", help="compile the DiT's blocks: a slow first step, faster ones after it"
    )


def read_acceleration_options(args: argparse.Namespace) -> Acceleration:
    """What they stand for.

    Raises:
        ValueError: two of them contradict each other.
    """
    from .acceleration import Acceleration

    theirs = MUSUBI_ATTENTION.get(args.attn_mode)
    if theirs is not None and args.attention not in (None, theirs):
        raise ValueError(
            f"--attention {args.attention} and --attn_mode {args.attn_mode} contradict each other; leave one out"
        )
    attention: Any = args.attention or theirs or Acceleration.attention
    return Acceleration(attention=attention, compile=args.compile)
