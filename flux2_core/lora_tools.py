"""What commands and nodes share about LoRAs: the size of DiT that a file fits, and a loaded DiT merged into a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import dit_metadata
from .dit import DiTConfig, Flux2DiT
from .files import stream_safetensors
from .lora import LoraSetting, merged_tensors
from .lora_factors import Lora
from .lora_files import linear_shapes, read_lora
from .tensor_source import TORCH_DTYPES, TensorSource
from .variants import DIT_4B, DIT_9B, DIT_32B, DIT_TINY, VARIANTS, Variant, get_variant

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


def save_merged_dit(
    path: str | os.PathLike[str],
    dit: Flux2DiT,
    variant: Variant,
    settings: Sequence[LoraSetting],
    dtype: torch.dtype | None = None,
    *,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a loaded DiT with LoRAs merged in as one file in BFL's layout, atomically; the model stays as it is.

    Sums are made in fp32 and cast once.

    Args:
        dtype: type of all weights; None keeps the model's.
        on_tensor: called after each tensor with the number done and the number in all.

    Raises:
        ValueError: a setting is wrong, see `LoraSetting`, or a result is too large for ``dtype``.
    """
    state = dit.state_dict()
    dtype = dtype or dit.dtype
    words = {torch_dtype: word for word, torch_dtype in TORCH_DTYPES.items()}
    layout = {
        name: (words[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize) for name, tensor in state.items()
    }

    def merged() -> Iterator[tuple[str, Tensor]]:
        full = ((name, tensor.float()) for name, tensor in state.items())
        for number, (name, tensor) in enumerate(merged_tensors(full, settings), start=1):
            result = tensor.to(dtype)
            if not result.isfinite().all():
                raise ValueError(f"{name} is too large for {dtype}, or was not finite; save it as bf16 or fp32")
            yield name, result
            if on_tensor is not None:
                on_tensor(number, len(state))

    for setting in settings:
        setting.layer_strengths()  # refused before a file is begun
    metadata = dit_metadata(path, variant)
    metadata["flux2_kit.merged_loras"] = ", ".join(f"{s.lora.name} {s.strength:g}" for s in settings)
    return stream_safetensors(path, layout, merged(), metadata)


def _num_fitting(source: TensorSource, config: DiTConfig) -> int:
    """How many tensors have a side that this shape of DiT has too."""
    sides = {side for shape in linear_shapes(config).values() for side in shape}
    return sum(bool(sides & set(entry.shape)) for entry in source.table.values())
