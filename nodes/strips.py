"""Pictures through the autoencoder at once, in strips, or in strips that wait in host memory, as memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ..flux2_core.command_errors import is_out_of_memory
from ..flux2_core.streaming import HOST
from . import host

logger = logging.getLogger(__name__)

WAYS: tuple[dict[str, Any], ...] = ({"tiled": False}, {"tiled": True}, {"tiled": True, "store": HOST})
ENCODE_TOOLTIP = "Encode in strips: the same latents in less memory. It happens by itself where memory runs out."
DECODE_TOOLTIP = "Decode in strips: the same picture in less memory. It happens by itself where memory runs out."

Result = TypeVar("Result")


def first_that_fits(ways: Sequence[Callable[[], Result]]) -> Result:
    """What the first way gives that does not run out of memory."""
    first, *others = ways
    if not others:
        return first()
    try:
        return first()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Behind the handler: the exception holds the tensors that have to go first.
    host.release_memory()
    logger.warning("not enough memory for the picture in one go: it is encoded or decoded in strips, which is slower")
    return first_that_fits(others)


def in_strips_where_needed(work: Callable[..., Result], *, tiled: bool) -> Result:
    """What ``work(tiled=..., store=...)`` gives.

    Args:
        tiled: in strips in any case.
    """
    return first_that_fits([partial(work, **way) for way in WAYS[tiled:]])
