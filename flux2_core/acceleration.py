"""How a DiT computes, where that is a matter of speed alone: the attention kernel, and torch.compile."""

from __future__ import annotations

from dataclasses import dataclass

from .attention_backends import AttentionBackend, check_backend
from .compilation import compile_blocks
from .dit import Flux2DiT


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What may be chosen about speed."""

    attention: AttentionBackend = "auto"
    compile: bool = False
    """Compile the blocks with torch.compile: the first step takes some seconds longer, others less."""


def accelerate(dit: Flux2DiT, acceleration: Acceleration) -> None:
    """Sets up a DiT, before or after LoRAs are put on it, its weights are quantised, or its blocks are streamed.

    Raises:
        ValueError: something that was asked for does not run here.
    """
    check_backend(acceleration.attention, dit.device, dit.dtype, dit.config.head_dim)
    for block in dit.blocks:
        block.attention_backend = acceleration.attention
    if acceleration.compile:
        compile_blocks(dit)
