"""LoRA files out: ComfyUI's dialect by default; kohya's, diffusers' and DiffSynth-Studio's on request."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .files import in_file_order, tensor_bytes, write_safetensors
from .lora_factors import DiffFactors, Factors, LohaFactors, LokrFactors, Lora, LoraFactors
from .lora_files import METADATA_KEY, diffusers_steps

Dialect = Literal["comfy", "kohya", "diffusers", "diffsynth"]

MODULATIONS = (
    "double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin",
    "final_layer.adaLN_modulation.1",
)  # fmt: skip
UNREAD_BY_DIFFUSERS: Mapping[Dialect, tuple[str, ...]] = {
    "comfy": ("final_layer.adaLN_modulation.1",),
    "kohya": (*MODULATIONS, "guidance_in.in_layer", "guidance_in.out_layer"),
}
"""Layers that diffusers' converters (0.42) get wrong, by the dialect of the file."""
DROPPED_METADATA = (METADATA_KEY, "format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Written anew, or a hash of tensors that are no longer the same."""


@dataclass(frozen=True)
class _Module:
    """One LoRA under diffusers' name."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None


def write_lora(
    path: str | os.PathLike[str],
    lora: Lora,
    dialect: Dialect = "comfy",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a LoRA as one safetensors file, atomically.

    ``comfy`` is ``diffusion_model.<BFL name>.lora_A/lora_B.weight`` with ``alpha / rank`` multiplied into lora_B: every
    program reads that, at the right strength, but for what `reading_notes` names. ``kohya`` is
    ``lora_unet_<BFL_name>.lora_down/lora_up.weight`` with ``.alpha``. ``diffusers`` is
    ``transformer.<diffusers name>.lora_A/lora_B.weight`` with separate q, k, v and alpha
    in the metadata, where only diffusers and PEFT look for it. ``diffsynth`` is
    ``<diffusers name>.lora_A/lora_B.default.weight`` with alpha multiplied in, all that DiffSynth-Studio reads.

    Args:
        dtype: type of the factors; None keeps what they have, the widest of them in ``diffusers``. Alpha is fp32.
        metadata: added to the LoRA's own and wins over it.

    Raises:
        ValueError: the dialect is unknown, or cannot express a layer, which is named; or values overflow in ``dtype``.
    """
    if dialect not in get_args(Dialect):
        raise ValueError(f"unknown LoRA dialect {dialect!r}; known dialects: {', '.join(get_args(Dialect))}")
    kept = {key: value for key, value in lora.metadata.items() if key not in DROPPED_METADATA}
    ours = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": Path(path).stem}
    tensors: dict[str, Tensor] = {}
    if dialect == "diffsynth":
        for layer, parts in lora.layers.items():
            for module in _diffusers_modules(lora, layer, parts):
                tensors |= _diffsynth_tensors(lora, module)
    elif dialect == "diffusers":
        modules = [module for layer, parts in lora.layers.items() for module in _diffusers_modules(lora, layer, parts)]
        plain = [module.name for module in modules if module.magnitude is None]
        if 0 < len(plain) < len(modules):
            raise ValueError(
                f"{lora.name}: {plain[0]} has no DoRA and others have, PEFT's use_dora is for all; write comfy"
            )
        for module in modules:
            tensors |= _diffusers_tensors(module)
        # Of one type: safetensors sorts by it, and diffusers (0.42) takes a file for another dialect, and fails, where
        # the first tensor is a magnitude.
        widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        tensors = {name: tensor.to(widest) for name, tensor in tensors.items()}
        ours[METADATA_KEY] = json.dumps(_peft_config(modules), indent=2, sort_keys=True)
    else:
        for layer, parts in lora.layers.items():
            tensors |= _bfl_tensors(lora, layer, parts, dialect)
    if dtype is not None:
        tensors = {name: t if name.endswith(".alpha") else t.to(dtype) for name, t in tensors.items()}
    if overflown := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{overflown[0]} has values too large for {dtype or 'its type'}; write fp32 or bf16")
    return write_safetensors(path, tensors, ours | kept | dict(metadata or {}) | content_hashes(tensors))


def content_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata by which other programs recognise a LoRA whatever its file's metadata: SHA-256 of the data behind the
    header, as modelspec 1.0.0 and kohya's scripts write it."""
    digest = hashlib.sha256()
    for tensor in in_file_order(tensors).values():
        digest.update(tensor_bytes(tensor))
    return {"modelspec.hash_sha256": f"0x{digest.hexdigest()}", "sshs_model_hash": digest.hexdigest()}


def reading_notes(lora: Lora, dialect: Dialect = "comfy") -> tuple[str, ...]:
    """What programs make of a LoRA's file in this dialect where it is not what the LoRA is; none where all agree.

    Measured with diffusers 0.38 to 0.42, ComfyUI 0.3.75, and ai-toolkit and musubi-tuner of summer 2026.
    """
    if dialect in ("diffusers", "diffsynth"):
        return ()
    parts = [part for factors in lora.layers.values() for part in factors]
    notes = []
    if any(part.magnitude is not None for part in parts):
        notes.append(
            "diffusers, ai-toolkit and musubi-tuner leave out the magnitudes of DoRA; for diffusers, convert the LoRA "
            "to the diffusers dialect"
        )
    if any(part.magnitude is not None and part.magnitude.shape[1] == 1 for part in parts):
        notes.append(
            "ComfyUI's own LoRA loaders divide the magnitudes of DoRA by other norms, which changes some per cent of "
            "its effect; FLUX.2 Apply LoRA and a merged checkpoint are exact"
        )
    read = (LoraFactors, LokrFactors) if dialect == "comfy" else (LoraFactors,)
    if others := sorted({part.kind for part in parts if not isinstance(part, read)}):
        advice = "; for it, write comfy" if others == ["LoKr"] else ""
        notes.append(f"diffusers does not read {' and '.join(others)} of the {dialect} dialect{advice}")
    elif any(isinstance(part, LokrFactors) for part in parts):
        notes.append("diffusers reads LoKr from version 0.42 on")
    if len({part.rank for part in parts if isinstance(part, LoraFactors)}) > 1:
        notes.append(
            "diffusers before 0.40 takes layers of another rank at another strength; for it, convert the LoRA to the "
            "diffusers dialect"
        )
    wrong = [layer for layer in lora.layers if layer in UNREAD_BY_DIFFUSERS[dialect]]
    if wrong:
        what = "swaps the halves of" if dialect == "comfy" else "leaves out"
        notes.append(f"diffusers {what} {', '.join(wrong)}; for it, convert the LoRA to the diffusers dialect")
    return tuple(notes)


def _bfl_tensors(lora: Lora, layer: str, parts: tuple[Factors, ...], dialect: Dialect) -> dict[str, Tensor]:
    """A layer's tensors under BFL's name, alpha multiplied in or beside them."""
    (factors,) = parts if len(parts) == 1 else (None,)
    if factors is None or factors.rows is not None:
        raise ValueError(
            f"{lora.name}: {parts[0].kind} of separate q, k, v in {layer} cannot be written for the fused layer; "
            "merge it into a checkpoint, or extract a LoRA from the merged checkpoint"
        )
    kohya = dialect == "kohya"
    stem = f"lora_unet_{layer.replace('.', '_')}" if kohya else f"diffusion_model.{layer}"
    scale = 1.0 if kohya else factors.scale
    tensors: dict[str, Tensor] = {}
    if isinstance(factors, LoraFactors):
        names = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        tensors = {f"{names[0]}.weight": factors.lora_A, f"{names[1]}.weight": _scaled(factors.lora_B, scale)}
    elif isinstance(factors, LohaFactors):
        tensors = {f"hada_{name}": value for name, value in factors.tensors().items() if name != "magnitude"}
        tensors["hada_w1_a"] = _scaled(factors.w1_a, scale)
    elif isinstance(factors, LokrFactors):
        tensors = {f"lokr_{name}": value for name, value in factors.tensors().items() if name != "magnitude"}
        name = "lokr_w1" if factors.w1 is not None else "lokr_w1_a"
        tensors[name] = _scaled(tensors[name], scale)
    elif isinstance(factors, DiffFactors):
        tensors = {"diff": factors.diff}
    if kohya and factors.rank is not None and factors.alpha is not None:
        tensors["alpha"] = torch.tensor(factors.alpha, dtype=torch.float32)
    if factors.magnitude is not None:
        tensors["dora_scale"] = factors.magnitude
    return {f"{stem}.{name}": tensor for name, tensor in tensors.items()}


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)


def _diffusers_modules(lora: Lora, layer: str, parts: tuple[Factors, ...]) -> list[_Module]:
    """A layer's LoRA under diffusers' names; a fused layer becomes separate q, k, v."""
    (factors,) = parts if len(parts) == 1 else (None,)
    if not isinstance(factors, LoraFactors) or factors.rows is not None:
        raise ValueError(
            f"{lora.name}: {layer} is a {parts[0].kind}, and the dialects of diffusers and DiffSynth-Studio are for "
            "LoRA and DoRA; write comfy or kohya"
        )
    magnitude = factors.magnitude
    if magnitude is not None and magnitude.shape[1] != 1:
        raise ValueError(
            f"{lora.name}: the DoRA of {layer} has a magnitude per column, and PEFT's is per row; write comfy or kohya"
        )
    steps = diffusers_steps(layer)
    columns = _columns(factors.lora_B, len(steps))
    modules = []
    for step, (start, stop) in zip(steps, columns, strict=True):
        if start == stop:
            continue
        width = stop - start
        modules.append(
            _Module(
                step.target.removesuffix(".weight"),
                factors.lora_A[start:stop],
                step.apply([factors.lora_B])[:, start:stop],
                factors.alpha * width / factors.rank if factors.alpha is not None else float(width),
                None if magnitude is None else step.apply([magnitude])[:, 0],
            )
        )
    return modules


def _columns(lora_B: Tensor, num_parts: int) -> list[tuple[int, int]]:
    """Which columns of lora_B each of the equal parts of its rows uses.

    Where lora_B is block-diagonal, as LoRAs of separate q, k, v make it, these are the blocks, and a part without one
    is empty; otherwise every part uses all columns.
    """
    rank = lora_B.shape[1]
    blocks = []
    position = 0
    for part in lora_B.chunk(num_parts, dim=0):
        used = part.count_nonzero(dim=0).nonzero().flatten().tolist()
        if used and (used != list(range(used[0], used[-1] + 1)) or used[0] != position):
            return [(0, rank)] * num_parts
        position = used[-1] + 1 if used else position
        blocks.append((used[0], used[-1] + 1) if used else (position, position))
    return blocks if position == rank else [(0, rank)] * num_parts


def _diffusers_tensors(module: _Module) -> dict[str, Tensor]:
    stem = f"transformer.{module.name}"
    # Parts of a fused layer share lora_A; safetensors wants each tensor to have memory of its own.
    tensors = {f"{stem}.lora_A.weight": module.lora_A.clone(), f"{stem}.lora_B.weight": module.lora_B.clone()}
    if module.magnitude is not None:
        tensors[f"{stem}.lora_magnitude_vector"] = module.magnitude.clone()
    return tensors


def _diffsynth_tensors(lora: Lora, module: _Module) -> dict[str, Tensor]:
    if module.magnitude is not None:
        raise ValueError(f"{lora.name}: {module.name} is a DoRA, which DiffSynth-Studio does not have; write diffusers")
    lora_B = _scaled(module.lora_B, module.alpha / module.lora_A.shape[0])
    factors = {"lora_A": module.lora_A, "lora_B": lora_B}
    return {f"{module.name}.{name}.default.weight": tensor.clone() for name, tensor in factors.items()}


def _peft_config(modules: list[_Module]) -> dict[str, Any]:
    """PEFT's configuration as diffusers' writer stores it: the most frequent rank and alpha, and the exceptions."""
    rank = Counter(module.lora_A.shape[0] for module in modules).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m.name: m.lora_A.shape[0] for m in modules if m.lora_A.shape[0] != rank},
        "alpha_pattern": {m.name: m.alpha for m in modules if m.alpha != alpha},
        "target_modules": sorted(m.name for m in modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(m.magnitude is not None for m in modules),
    }
    return {f"transformer.{key}": value for key, value in config.items()}
