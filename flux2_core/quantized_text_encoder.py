"""Writes text encoders whose layers are fp8: our own, with a scale per row, and one that ComfyUI reads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import fp8
from .files import read_limited, stream_safetensors
from .lora import TensorCallback
from .quantization import FLOAT8_DTYPES, WEIGHT_FORMAT_KEY, has_row_scale
from .quantized_files import COMFYUI_KEY, PLAIN_DTYPE, FileFormat
from .tensor_source import TORCH_DTYPES, TensorSource
from .text_encoder import LanguageModelWeights, build_language_model, language_model_settings, matching_config
from .tokenizer import MAX_TOKENIZER_BYTES
from .variants import TextEncoderConfig

PREFIX = "model."
"""Of the names that are written, as in ComfyUI's files."""
LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
TOKENIZER_FILE, TOKENIZER_NAME = "tekken.json", "tekken_model"
"""Mistral's tokenizer: as a file, and the tensor of its bytes that ComfyUI wants."""


def quantise_text_encoder(
    source_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    file_format: FileFormat = "fp8",
    config: TextEncoderConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    on_tensor: TensorCallback | None = None,
) -> Path:
    """Writes a text encoder with the Linears of its layers in fp8 as one file, atomically and layer by layer.

    Weights that are fp8 already keep their numbers where the format can hold their scales. ``fp8`` holds the layers
    that FLUX.2 reads, ``fp8-comfy`` all that the file has, and for Mistral the tokenizer.

    Args:
        source_path: any text encoder that `load_text_encoder` reads.
        config: what the DiT needs; None takes what fits the file.
        device: where it is computed.
        on_tensor: called after each weight with the number done and the number in all.

    Raises:
        ValueError: as `load_text_encoder`, or ComfyUI's form of Mistral lacks the tokenizer.
    """
    weights = LanguageModelWeights(TensorSource(source_path, component="text_encoder"))
    config = matching_config(weights, config)
    to_write = _Weights(weights, config, torch.device(device), per_tensor=file_format == "fp8-comfy")
    tokenizer = _tokenizer(weights, needed=to_write.per_tensor)
    words = {dtype: word for word, dtype in TORCH_DTYPES.items()}
    layout = {
        name: (words[dtype], shape, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in to_write.layout()
    }
    if tokenizer is not None:
        layout[TOKENIZER_NAME] = (words[torch.uint8], tuple(tokenizer.shape), tokenizer.nbytes)
    metadata = {"format": "pt"}
    if to_write.per_tensor:
        layers = {PREFIX + name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in to_write.linears}
        metadata[COMFYUI_KEY] = json.dumps({"format_version": "1.0", "layers": layers})
    else:
        metadata[WEIGHT_FORMAT_KEY] = "fp8"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from to_write.tensors(on_tensor)
        if tokenizer is not None:
            yield TOKENIZER_NAME, tokenizer

    return stream_safetensors(out_path, layout, tensors(), metadata)


def _tokenizer(weights: LanguageModelWeights, *, needed: bool) -> Tensor | None:
    """The tokenizer in the file, or the one beside it where it is needed in the file."""
    source = weights.source
    if TOKENIZER_NAME in source.table:
        return source.get(TOKENIZER_NAME)
    if weights.family != "mistral" or not needed:
        return None
    for folder in (source.folder, source.folder.parent / "tokenizer", source.folder.parent):
        if (path := folder / TOKENIZER_FILE).is_file():
            return torch.frombuffer(bytearray(read_limited(path, MAX_TOKENIZER_BYTES)), dtype=torch.uint8)
    raise ValueError(
        f"ComfyUI needs Mistral's tokenizer within the file, and neither {weights.path} nor its folder has it; put "
        f"{TOKENIZER_FILE} of Mistral Small 3 beside the weights, or write --format fp8"
    )


class _Weights:
    """The tensors of the file to write, one weight at a time."""

    def __init__(
        self, weights: LanguageModelWeights, config: TextEncoderConfig, device: torch.device, *, per_tensor: bool
    ) -> None:
        self.weights, self.device, self.per_tensor = weights, device, per_tensor
        num_layers = max(config.num_layers, weights.num_layers) if per_tensor else config.num_layers
        model = build_language_model(weights, language_model_settings(weights, config), num_layers)
        self.shapes = weights.check(model)
        if num_layers > config.num_layers and "norm.weight" in weights.names:
            self.shapes["norm.weight"] = weights.shape("norm.weight")  # the whole model, as it came
        self.linears = [name for name in self.shapes if LINEAR.fullmatch(name)]
        self.kept = {name: dtype for name in self.linears if (dtype := self._kept_dtype(name)) is not None}

    def _kept_dtype(self, name: str) -> torch.dtype | None:
        """The type of stored numbers that are written as they are; None where they are rounded anew."""
        stored, scale = self.weights.stored(name)
        if stored not in FLOAT8_DTYPES:
            return None
        if not self.per_tensor:
            return stored if scale is None or has_row_scale(self.shapes[name], scale) else None
        return stored if stored == fp8.E4M3 and (scale is None or math.prod(scale) == 1) else None

    def layout(self) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """Name, type and shape of every tensor, in the order of `tensors`."""
        linears = set(self.linears)
        for name, shape in self.shapes.items():
            if name not in linears:
                yield PREFIX + name, (PLAIN_DTYPE, shape)
                continue
            yield PREFIX + name, (self.kept.get(name, fp8.E4M3), shape)
            yield f"{PREFIX}{name}_scale", (torch.float32, () if self.per_tensor else (shape[0], 1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def tensors(self, on_tensor: TensorCallback | None) -> Iterator[tuple[str, Tensor]]:
        linears = set(self.linears)
        for index, name in enumerate(self.shapes, start=1):
            if name in linears:
                weight, scale = self._quantised(name)
                yield PREFIX + name, weight
                del weight  # before the next one is read
                yield f"{PREFIX}{name}_scale", scale
            else:
                yield PREFIX + name, self.weights.get(name, PLAIN_DTYPE, self.device)
            if on_tensor is not None:
                on_tensor(index, len(self.shapes))

    def _quantised(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self.kept or not self.per_tensor:
            weight, scale = self.weights.get_quantised(name, "fp8", self.device)
            return weight, scale[0, 0] if self.per_tensor else scale
        dtype = self.weights.dense_dtype(name)
        return fp8.quantise_per_tensor(self.weights.get(name, dtype, self.device, to_keep=False))
