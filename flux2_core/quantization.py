"""Quantised weights in checkpoints: the names of what is stored beside them, and 8-bit floats multiplied out.

What is read is ComfyUI's scaled fp8, old (``scale_weight``) and new (``weight_scale``, ``comfy_quant``), and the fp8 of
Hugging Face releases (``weight_scale_inv``, which is multiplied by as well).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tensor_source import TensorSource

FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
FLOAT8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
ROLES: dict[str, Literal["scale", "second_scale", "activation_scale", "format", "marker"]] = {
    "weight_scale": "scale",
    "scale_weight": "scale",
    "weight_scale_inv": "scale",
    "weight_scale_2": "second_scale",
    "input_scale": "activation_scale",
    "scale_input": "activation_scale",
    "comfy_quant": "format",
    "scaled_fp8": "marker",
}
"""Last parts of the names that a quantised checkpoint adds. A ``second_scale`` belongs to 4-bit formats, which are
refused; a ``format`` is JSON in uint8; the ``marker`` stands once in a file."""
SQUARE_SIDE = 128
"""Side of the square blocks that share a value of ``weight_scale_inv``, in Qwen's fp8 releases."""
DEQUANTISE_BYTES = 2**24
"""Weights are multiplied out in fp32 in slices of about this size: a whole fp32 weight would double the peak."""
WEIGHT_FORMAT_KEY = "flux2_kit.weight_format"
"""Metadata of a file that was quantised here; ComfyUI does not read its scales per row."""
MAX_FORMAT_BYTES = 4096
"""A layer's description of its format is a line of JSON."""


@dataclass(frozen=True)
class Quantisation:
    """What a quantised checkpoint stores beside its weights."""

    weights: tuple[str, ...]
    """The names that are left: weights proper."""
    scales: dict[str, str]
    """From a weight's name to the name of what it is multiplied by."""
    formats: tuple[str, ...]
    """Names of the per-layer descriptions, JSON in uint8."""


def split_quantisation(names: Iterable[str]) -> Quantisation:
    """Tells weights from the scales and markers of a quantised checkpoint, by `ROLES`.

    Scales of activations are left out: weights are multiplied out when they are read. Second scales are left out too:
    their format is refused by the type of its weights.
    """
    weights: list[str] = []
    scales: dict[str, str] = {}
    formats: list[str] = []
    for name in names:
        module, _, last = name.rpartition(".")
        role = ROLES.get(last)
        if role is None:
            weights.append(name)
        elif role == "scale":
            scales[f"{module}.weight"] = name
        elif role == "format":
            formats.append(name)
    return Quantisation(tuple(weights), scales, tuple(formats))


def check_format(source: TensorSource, name: str) -> None:
    """Checks that a layer's description, the tensor ``name``, names a format that is multiplied out: an 8-bit float.

    Raises:
        ValueError: it names another format, or is no description.
    """
    try:
        if source.table[name].num_bytes > MAX_FORMAT_BYTES:
            raise ValueError(f"more than {MAX_FORMAT_BYTES} bytes")
        weight_format = str(json.loads(source.get(name).numpy().tobytes())["format"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{name} in {source.path} is not a description of a weight format: {error}") from error
    if not weight_format.startswith("float8_e"):
        raise ValueError(
            f"{source.path} is quantised as {weight_format[:80]} ({name}), which is not read; "
            "give a bf16, fp16, fp32 or fp8 file of the model"
        )


def has_row_scale(weight_shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> bool:
    """Whether a scale is one for the tensor or one per row, so that `row_scale` can make the latter of it."""
    count = math.prod(scale_shape)
    return count == 1 or scale_shape[:1] == weight_shape[:1] == (count,)


def row_scale(scale: Tensor, rows: int) -> Tensor:
    """A scale that `has_row_scale` as fp32 ``[rows, 1]``."""
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * scale`` in ``dtype``, computed in fp32, a slice of rows at a time.

    Args:
        weight: ``[rows, ...]``; later dimensions count as one, the columns.
        scale: one value for the tensor; one per row, or per row and block of columns, ``[rows, blocks]``; or one per
            square block of `SQUARE_SIDE`, where the last ones may be cut. Trailing dimensions of 1 do not matter.

    Raises:
        ValueError: the scale is of another shape or is no float.
    """
    if scale.dtype not in FLOAT_DTYPES:
        raise ValueError(f"a {scale.dtype} scale on {weight.dtype} weights is not supported")
    rows = weight.shape[0]
    flat = weight.reshape(rows, -1)
    scale, height, width = _blocks(flat, scale)
    result = torch.empty_like(flat, dtype=dtype)
    rows_at_once = max(1, DEQUANTISE_BYTES // (4 * flat.shape[1]))
    for start in range(0, rows, rows_at_once):
        part = slice(start, min(start + rows_at_once, rows))
        factors = scale[torch.arange(part.start, part.stop, device=scale.device) // height]
        if factors.shape[1] > 1:
            factors = factors.repeat_interleave(width, 1)[:, : flat.shape[1]]
        result[part] = flat[part].float().mul_(factors)
    return result.view(weight.shape)


def _blocks(weight: Tensor, scale: Tensor) -> tuple[Tensor, int, int]:
    """The scale as an fp32 matrix, and the height and width of the block that each of its values is for."""
    rows, columns = weight.shape
    count = scale.numel()
    if count == 1:
        return scale.float().reshape(1, 1), rows, columns
    first = scale.shape[0]
    if first == rows and count and count % rows == 0 and columns % (count // rows) == 0:
        return scale.float().reshape(rows, -1), 1, columns * rows // count
    squares = (-(-rows // SQUARE_SIDE), -(-columns // SQUARE_SIDE))
    if first == squares[0] and count == squares[0] * squares[1]:
        return scale.float().reshape(squares), SQUARE_SIDE, SQUARE_SIDE
    raise ValueError(
        f"scales of shape {list(scale.shape)} do not fit weights of shape {[rows, columns]}; read are scales per "
        f"tensor, per row, per block of columns and per block of {SQUARE_SIDE}x{SQUARE_SIDE}"
    )
