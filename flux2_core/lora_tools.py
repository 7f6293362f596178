"""Which size of DiT a LoRA fits."""

from __future__ import annotations

import os

from .dit import DiTConfig
from .lora_factors import Lora
from .lora_files import linear_shapes, read_lora
from .tensor_source import TensorSource
from .variants import DIT_4B, DIT_9B, DIT_32B, DIT_TINY, VARIANTS, get_variant

SIZES: dict[DiTConfig, str] = {DIT_4B: "4B", DIT_9B: "9B", DIT_32B: "32B", DIT_TINY: "tiny"}
"""What people call the shapes of DiT."""


def read_fitting_lora(
    path: str | os.PathLike[str] | TensorSource, variant: str | None = None, *, allow_unmatched: bool = False
) -> Lora:
    """Reads a LoRA for a named variant or, without one, for the size of DiT whose layers it fits.

    Args:
        variant: a name of `variants.VARIANTS`; None and "auto" tell the size from the shapes.

    Raises:
        ValueError: as `read_lora`, for the size that comes nearest.
    """
    source = path if isinstance(path, TensorSource) else TensorSource(path)
    if variant not in (None, "auto"):
        return read_lora(source, get_variant(variant).dit, allow_unmatched=allow_unmatched)
    nearest_first = sorted(SIZES, key=lambda config: -_num_fitting(source, config))
    errors: list[ValueError] = []
    for config in nearest_first:
        try:
            return read_lora(source, config, allow_unmatched=allow_unmatched)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def fitting_variants(config: DiTConfig) -> tuple[str, ...]:
    """Names of the variants that a LoRA of this shape of DiT can be used with."""
    return tuple(name for name, variant in VARIANTS.items() if variant.dit == config)


def _num_fitting(source: TensorSource, config: DiTConfig) -> int:
    """How many tensors have a side that this shape of DiT has too."""
    sides = {side for shape in linear_shapes(config).values() for side in shape}
    return sum(bool(sides & set(entry.shape)) for entry in source.table.values())
