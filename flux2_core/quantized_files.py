"""Writes DiT checkpoints whose blocks are fp8: our own, with a scale per row, and one that ComfyUI reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import fp8
from .checkpoint import DiTReader, check_merged, dit_metadata, is_quantised_layer
from .files import stream_safetensors
from .lora import LoraSetting, TensorCallback, collect_changes, linear_layers, merged_weight
from .lora_factors import Factors
from .quantization import WEIGHT_FORMAT_KEY
from .tensor_source import TORCH_DTYPES
from .variants import VARIANTS, Variant

FileFormat = Literal["fp8", "fp8-comfy"]
"""``fp8``: one scale per output row. ``fp8-comfy``: one scale per weight, and the metadata by which ComfyUI
(0.3.75 and later) knows the layers; its QUANTIZATION.md describes them. Both have BFL's names."""
COMFYUI_KEY = "_quantization_metadata"
PLAIN_DTYPE = torch.bfloat16
"""Of what is not quantised, so that nothing has to be converted when the file is loaded."""


def quantise_checkpoint(
    source_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    file_format: FileFormat = "fp8",
    settings: Sequence[LoraSetting] = (),
    *,
    variant: str | None = None,
    device: str | torch.device = "cpu",
    variants: Mapping[str, Variant] = VARIANTS,
    on_tensor: TensorCallback | None = None,
) -> Path:
    """Writes a DiT with its blocks in fp8 as one file, atomically and layer by layer, LoRAs merged in before.

    Weights that are fp8 already keep their numbers where the format can hold their scales.

    Args:
        source_path: a DiT in any layout that `load_dit` reads.
        device: where it is computed.
        on_tensor: called after each weight with the number done and the number in all.

    Raises:
        ValueError: as `load_dit`, or a LoRA does not fit.
    """
    reader = DiTReader(source_path, variant, PLAIN_DTYPE, device, variants=variants)
    changes = collect_changes(settings, linear_layers(reader.make_empty()))
    weights = _Weights(reader, changes, per_tensor=file_format == "fp8-comfy")
    words = {dtype: word for word, dtype in TORCH_DTYPES.items()}
    layout = {
        name: (words[dtype], shape, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in weights.layout()
    }
    metadata = dit_metadata(out_path, reader.variant)
    if file_format == "fp8-comfy":
        layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in weights.quantised}
        metadata[COMFYUI_KEY] = json.dumps({"format_version": "1.0", "layers": layers})
    else:
        metadata[WEIGHT_FORMAT_KEY] = "fp8"
    if settings:
        metadata["flux2_kit.merged_loras"] = ", ".join(f"{s.lora.name} {s.strength:g}" for s in settings)
    return stream_safetensors(out_path, layout, weights.tensors(on_tensor), metadata)


class _Weights:
    """The tensors of the file to write, one weight of the reader at a time."""

    def __init__(
        self, reader: DiTReader, changes: Mapping[str, list[tuple[Factors, float]]], *, per_tensor: bool
    ) -> None:
        self.reader = reader
        self.changes = {f"{layer}.weight": change for layer, change in changes.items()}
        self.per_tensor = per_tensor
        self.quantised = [name for name in reader.shapes if is_quantised_layer(name)]
        self.kept = {name: dtype for name in self.quantised if (dtype := self._kept_dtype(name)) is not None}

    def _kept_dtype(self, name: str) -> torch.dtype | None:
        """The type of stored numbers that are written as they are; None where they are rounded anew."""
        if name in self.changes or not self.reader.has_fp8(name, per_tensor=self.per_tensor):
            return None
        dtype = self.reader.fp8_dtype(name)
        return dtype if dtype == fp8.E4M3 or not self.per_tensor else None

    def layout(self) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """Name, type and shape of every tensor, in the order of `tensors`."""
        quantised = set(self.quantised)
        for name, shape in self.reader.shapes.items():
            if name not in quantised:
                yield name, (PLAIN_DTYPE, shape)
                continue
            yield name, (self.kept.get(name, fp8.E4M3), shape)
            yield f"{name}_scale", (torch.float32, () if self.per_tensor else (shape[0], 1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def tensors(self, on_tensor: Callable[[int, int], None] | None) -> Iterator[tuple[str, Tensor]]:
        quantised, number = set(self.quantised), len(self.reader.shapes)
        for index, name in enumerate(self.reader.shapes, start=1):
            if name in self.kept:
                weight, scale = self.reader.get_fp8(name)
                yield name, weight
                del weight  # before the next one is read
                yield f"{name}_scale", scale[0, 0] if self.per_tensor else scale
            elif name in quantised:
                quantise = fp8.quantise_per_tensor if self.per_tensor else fp8.quantise
                weight, scale = quantise(self._dense(name, self.reader.dense_dtype(name)))
                yield name, weight
                del weight
                yield f"{name}_scale", scale
            else:
                yield name, self._dense(name, PLAIN_DTYPE).to(PLAIN_DTYPE)
            if on_tensor is not None:
                on_tensor(index, number)

    def _dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in ``dtype``, or with its LoRAs in fp32."""
        if name not in self.changes:
            return self.reader.get(name, dtype)
        merged = merged_weight(self.reader.get(name, torch.float32), self.changes[name], in_place=True)
        check_merged(merged, name, torch.float32 if is_quantised_layer(name) else PLAIN_DTYPE)
        return merged
