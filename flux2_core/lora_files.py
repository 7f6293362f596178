"""LoRA files of every dialect, decided tensor by tensor: what a name says, and the factors that a layer's tensors make.

A name is a prefix, a module in BFL's or diffusers' name (dots or underscores), and a role. Modules are looked up in the
real layers of the DiT through the tables of `state_dict`. Sources of the names and of the rules for alpha: kohya-ss and
musubi-tuner ``networks/lora.py``, LyCORIS ``modules/``, PEFT ``tuners/lora``, diffusers ``loaders/lora_base.py``,
ComfyUI ``comfy/lora.py``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .detect import describe_other, detect
from .dit import DiTConfig, Flux2DiT
from .files import read_json_object
from .linear import Linear
from .lora_factors import (
    DiffFactors,
    Factors,
    LohaFactors,
    LokrFactors,
    Lora,
    LoraFactors,
    LoraReport,
    fuse_parts,
    group_layers,
    swap_halves,
)
from .quantization import FLOAT8_DTYPES, FLOAT_DTYPES
from .state_dict import Step, from_bfl
from .tensor_source import TensorSource
from .variants import VARIANTS

PREFIXES = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
"""What may stand before a module's name, and the dialect that it is the mark of."""
TEXT_ENCODER_PREFIXES = ("lora_te", "lycoris_te", "text_encoder", "text_model.", "clip_l.", "t5xxl.")
ROLE = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_mid|lora_magnitude_vector"
    r"|magnitude|dora_scale|alpha|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t[12]|diff_b|diff)"
    r"(?:\.(?P<adapter>[\w-]+))??(?:\.(?P<kind>weight|bias))?"
)
"""A tensor's name: PEFT puts the adapter's name, such as ``default``, before ``weight`` when its state is saved raw."""
SAME_ROLES = {
    "lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude",
}  # fmt: skip
CONVOLUTION_ROLES = ("lora_mid", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2")
"""Factors of a convolution's kernel: the DiT has none."""
FUSED_NAMES = {"to_q": "to_qkv", "add_q_proj": "to_added_qkv"}
"""What diffusers calls the projection that ``fuse_qkv_projections`` makes, by the first of its parts."""
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration: JSON in the safetensors metadata."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a module's name stands for."""

    layer: str
    """BFL name."""
    naming: str
    """"BFL" or "diffusers"."""
    rows: tuple[int, int] | None = None
    """Rows of the layer, where the module is a part of it."""
    swapped: bool = False
    """Whether the halves of the rows are the other way round there."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file whose module is known."""

    name: str
    module: str
    """As in the file, without prefix."""
    target: Target


@lru_cache
def linear_shapes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every Linear of a DiT, by BFL name."""
    with torch.device("meta"):
        dit = Flux2DiT(config)
    return {name: (m.out_features, m.in_features) for name, m in dit.named_modules() if isinstance(m, Linear)}


def diffusers_steps(layer: str) -> list[Step]:
    """How diffusers' weights are made from a layer's; names with ``.weight``."""
    return from_bfl([f"{layer}.weight"], "dit", "diffusers")


@lru_cache
def module_targets(config: DiTConfig) -> dict[str, Target]:
    """Every name of a layer in BFL's and diffusers' layout, with underscores for dots, and what it stands for."""
    targets: dict[str, Target] = {}

    def add(name: str, target: Target) -> None:
        key = name.replace(".", "_")
        assert key not in targets, key
        targets[key] = target

    for layer, (out_features, _) in linear_shapes(config).items():
        add(layer, Target(layer=layer, naming="BFL"))
        for step in diffusers_steps(layer):
            name = step.target.removesuffix(".weight")
            index, count = step.part
            height = out_features // count
            rows = (index * height, (index + 1) * height) if count > 1 else None
            swapped = step.operation == "swap_halves"
            add(name, Target(layer=layer, naming="diffusers", rows=rows, swapped=swapped))
            parent, _, last = name.rpartition(".")
            if last in FUSED_NAMES:
                add(f"{parent}.{FUSED_NAMES[last]}", Target(layer=layer, naming="diffusers"))
    return targets


def read_lora(path: str | os.PathLike[str] | TensorSource, config: DiTConfig, *, allow_unmatched: bool = False) -> Lora:
    """Reads a LoRA file of any known dialect for a DiT.

    Alpha is the module's ``.alpha`` tensor, else PEFT's ``lora_alpha`` in the metadata key ``lora_adapter_metadata`` or
    in an ``adapter_config.json`` beside an ``adapter_model.safetensors``, else the rank. PEFT's ``use_rslora`` scales
    by ``alpha / sqrt(rank)``; it is read into an alpha that gives the same scale.

    Args:
        config: shape of the DiT it is for.
        allow_unmatched: whether tensors that belong to no layer of the DiT are left out and named in the report; they
            are an error otherwise.

    Raises:
        ValueError: the file is damaged or no LoRA, for another model or size, incomplete or ambiguous, holds values
            that are not finite, or nothing in it matches.
    """
    source = path if isinstance(path, TensorSource) else TensorSource(path)
    groups, unmatched, dialects = _sort_names(source, config)
    _check_sizes(source, groups, config)
    if not groups or (unmatched and not allow_unmatched):
        raise ValueError(_unmatched_message(source, unmatched, bool(groups), config))
    peft = _read_peft_config(source)
    shapes = linear_shapes(config)
    parts: dict[str, list[Factors]] = {}
    for (layer, rows), entries in groups.items():
        out_features, in_features = shapes[layer]
        shape = (out_features if rows is None else rows[1] - rows[0], in_features)
        with torch.inference_mode(False):
            if (factors := _make_factors(source, entries, rows, shape, peft)) is not None:
                parts.setdefault(layer, []).append(factors)
    if not parts:
        raise ValueError(f"{source.path} holds no change of any weight; give a LoRA that was trained")
    layers = {name: _join(source, name, parts[name], shapes[name][0]) for name in shapes if name in parts}
    report = LoraReport(
        dialects=tuple(name for name, _ in dialects.most_common()),
        groups=group_layers(layers),
        unmatched=tuple(unmatched),
    )
    return Lora(name=source.path.name, config=config, layers=layers, report=report, metadata=dict(source.metadata))


def _join(source: TensorSource, layer: str, parts: list[Factors], num_rows: int) -> tuple[Factors, ...]:
    if len(parts) > 1 and any(part.rows is None for part in parts):
        raise ValueError(f"{source.path} adapts {layer} both whole and as separate q, k, v; keep one of the two")
    return tuple(parts) if parts[0].rows is None else fuse_parts(parts, num_rows)


def _sort_names(
    source: TensorSource, config: DiTConfig
) -> tuple[dict[tuple[str, tuple[int, int] | None], dict[str, Entry]], list[str], Counter[str]]:
    """Tensors by layer (or part of one) and role; names that match nothing; how often each dialect occurs."""
    targets = module_targets(config)
    groups: dict[tuple[str, tuple[int, int] | None], dict[str, Entry]] = {}
    unmatched: list[str] = []
    dialects: Counter[str] = Counter()
    for name in source.names:
        found = ROLE.fullmatch(name)
        module, dialect = _strip_prefix(found["module"]) if found else ("", "")
        target = targets.get(module.replace(".", "_"))
        if found is None or target is None:
            unmatched.append(name)
            continue
        role = SAME_ROLES.get(found["role"], found["role"])
        role = f"{role}.bias" if found["kind"] == "bias" else role
        entries = groups.setdefault((target.layer, target.rows), {})
        if role in entries:
            raise ValueError(f"{source.path} holds {entries[role].name!r} and {name!r} for one layer; keep one of them")
        entries[role] = Entry(name=name, module=module, target=target)
        dialects[f"{dialect} ({target.naming} names)"] += 1
    return groups, unmatched, dialects


def _check_sizes(
    source: TensorSource, groups: Mapping[tuple[str, tuple[int, int] | None], dict[str, Entry]], config: DiTConfig
) -> None:
    """A LoRA of another size has layers that this DiT does not have too; that it is one says more than their names."""
    for (layer, rows), entries in groups.items():
        if "lora_A" in entries and "lora_B" in entries:
            down, up = (source.table[entries[role].name].shape for role in ("lora_A", "lora_B"))
            out_features, in_features = linear_shapes(config)[layer]
            shape = (out_features if rows is None else rows[1] - rows[0], in_features)
            if len(down) == len(up) == 2 and (up[0], down[1]) != shape:
                raise ValueError(_shape_message(source, entries["lora_A"], "LoRA", (up[0], down[1]), shape))


def _strip_prefix(module: str) -> tuple[str, str]:
    """The module's own name and the dialect; prefixes may be nested, and the innermost one tells the dialect."""
    dialect = "no prefix"
    while (prefix := next((p for p in PREFIXES if module.startswith(p)), None)) is not None:
        module, dialect = module.removeprefix(prefix), PREFIXES[prefix]
    return module, dialect


def _unmatched_message(source: TensorSource, unmatched: list[str], some_match: bool, config: DiTConfig) -> str:
    if not some_match and not any(ROLE.fullmatch(name) for name in source.names):
        if not source.names:
            return f"{source.path} holds no tensors; give a LoRA file"
        return describe_other(source, detect(source), "a LoRA")
    text_encoder = [name for name in unmatched if name.startswith(TEXT_ENCODER_PREFIXES)]
    if len(text_encoder) == len(unmatched) and not some_match:
        return (
            f"{source.path} only adapts a text encoder ({_few(unmatched)}), which is not read; give a LoRA of the DiT"
        )
    for name in VARIANTS:
        other = module_targets(VARIANTS[name].dit)
        found = (ROLE.fullmatch(n) for n in unmatched)
        keys = [_strip_prefix(match["module"])[0].replace(".", "_") if match else "" for match in found]
        if VARIANTS[name].dit != config and all(key in other for key in keys):
            return (
                f"{source.path} adapts layers that this model does not have ({_few(unmatched)}) and {name} has; "
                "give a LoRA of this model's size"
            )
    what = f"{len(unmatched)} tensors of {source.path} match no layer of the DiT"
    if text_encoder:
        what += f", {len(text_encoder)} of them a text encoder's"
    if not some_match:
        return f"nothing in {source.path} matches a layer of FLUX.2: {_few(unmatched)}; give a FLUX.2 LoRA"
    return f"{what}: {_few(unmatched)}; allow unmatched names to apply the rest"


def _make_factors(
    source: TensorSource,
    entries: dict[str, Entry],
    rows: tuple[int, int] | None,
    shape: tuple[int, int],
    peft: Mapping[str, Any],
) -> Factors | None:
    """The factors that one module's tensors make, in BFL's order of rows; None for a bias of zeros."""
    _check_zero_biases(source, entries)
    roles = {role: entry for role, entry in entries.items() if role != "diff_b" and not role.endswith(".bias")}
    if not roles:
        return None
    first = next(iter(roles.values()))
    if kernels := [roles[role].name for role in CONVOLUTION_ROLES if role in roles]:
        raise ValueError(f"{source.path}: {kernels[0]} is a factor of a convolution, and FLUX.2 has none")
    make = {"lora_A": _make_lora, "lora_B": _make_lora, "diff": _make_diff}
    makers = {
        make.get(r) or (_make_loha if r[:4] == "hada" else _make_lokr if r[:4] == "lokr" else None) for r in roles
    }
    makers.discard(None)
    if len(makers) != 1:
        what = "holds several kinds of factors" if makers else "has no factors beside it"
        raise ValueError(f"{source.path}: the layer of {first.name} {what}; save the LoRA again")
    (maker,) = makers
    assert maker is not None
    tensors = {role: _read(source, entry.name) for role, entry in roles.items()}
    alpha = float(tensors.pop("alpha")) if "alpha" in tensors and tensors["alpha"].numel() == 1 else None
    if alpha == 0 or "alpha" in tensors:
        raise ValueError(f"{source.path}: {roles['alpha'].name} must be one number other than 0; save the LoRA again")
    magnitude = tensors.pop("magnitude", None)
    if magnitude is not None:
        magnitude = magnitude[:, None] if magnitude.dim() == 1 else magnitude
        if tuple(magnitude.shape) not in ((shape[0], 1), (1, shape[1])):
            raise ValueError(
                _shape_message(source, roles["magnitude"], "DoRA magnitude", tuple(magnitude.shape), shape)
            )
    factors = maker(source, roles, tensors, shape, {"rows": rows, "magnitude": magnitude})
    if factors.rank is not None:
        alpha = _peft_alpha(source, peft, first.module, factors.rank) if alpha is None else alpha
        factors = replace(factors, alpha=alpha)
    return swap_halves(factors) if first.target.swapped else factors


def _make_lora(
    source: TensorSource, roles: dict[str, Entry], tensors: dict[str, Tensor], shape: tuple[int, int], common: Any
) -> LoraFactors:
    down, up = _need(source, roles, tensors, ("lora_A", "lora_B"))
    _check_product(source, roles, ("lora_A", "lora_B"), up, down, shape)
    return LoraFactors(lora_A=down, lora_B=up, **common)


def _make_loha(
    source: TensorSource, roles: dict[str, Entry], tensors: dict[str, Tensor], shape: tuple[int, int], common: Any
) -> LohaFactors:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    w1_a, w1_b, w2_a, w2_b = _need(source, roles, tensors, names)
    _check_product(source, roles, names[:2], w1_a, w1_b, shape)
    _check_product(source, roles, names[2:], w2_a, w2_b, shape)
    if w1_b.shape[0] != w2_b.shape[0]:
        raise ValueError(
            f"{source.path}: ranks of {roles[names[0]].name} ({w1_b.shape[0]}) and {roles[names[2]].name} "
            f"({w2_b.shape[0]}) differ; save the LoRA again"
        )
    return LohaFactors(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, **common)


def _make_lokr(
    source: TensorSource, roles: dict[str, Entry], tensors: dict[str, Tensor], shape: tuple[int, int], common: Any
) -> LokrFactors:
    fields: dict[str, Tensor] = {}
    size = (1, 1)
    for factor in ("w1", "w2"):
        names = (f"lokr_{factor}",) if f"lokr_{factor}" in tensors else (f"lokr_{factor}_a", f"lokr_{factor}_b")
        found = _need(source, roles, tensors, names)
        if (
            any(tensor.dim() != 2 for tensor in found)
            or found[0].shape[-1] != found[-1].shape[0 if len(found) > 1 else -1]
        ):
            raise ValueError(
                f"{source.path}: {roles[names[0]].name} is not a matrix that fits its counterpart; save it again"
            )
        fields |= {name.removeprefix("lokr_"): tensor for name, tensor in zip(names, found, strict=True)}
        size = (size[0] * found[0].shape[0], size[1] * found[-1].shape[1])
    if size != shape:
        raise ValueError(_shape_message(source, next(iter(roles.values())), "LoKr", size, shape))
    return LokrFactors(**fields, **common)


def _make_diff(
    source: TensorSource, roles: dict[str, Entry], tensors: dict[str, Tensor], shape: tuple[int, int], common: Any
) -> DiffFactors:
    (diff,) = _need(source, roles, tensors, ("diff",))
    if tuple(diff.shape) != shape:
        raise ValueError(_shape_message(source, roles["diff"], "difference", tuple(diff.shape), shape))
    return DiffFactors(diff=diff, **common)


def _need(
    source: TensorSource, roles: dict[str, Entry], tensors: dict[str, Tensor], names: tuple[str, ...]
) -> list[Tensor]:
    missing = [name for name in names if name not in tensors]
    extra = [name for name in tensors if name not in names and name[:4] != "lokr"]
    if missing or extra:
        first = next(iter(roles.values()))
        wrong = f"no {' and no '.join(missing)}" if missing else f"{' and '.join(extra)} too many"
        raise ValueError(f"{source.path}: the layer of {first.name} has {wrong}; the file is incomplete, save it again")
    return [tensors[name] for name in names]


def _check_product(
    source: TensorSource,
    roles: dict[str, Entry],
    names: tuple[str, ...],
    left: Tensor,
    right: Tensor,
    shape: tuple[int, int],
) -> None:
    entry = roles[names[0]]
    if left.dim() != 2 or right.dim() != 2 or not left.shape[1]:
        raise ValueError(f"{source.path}: {entry.name} and its counterpart must be matrices; save the LoRA again")
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"{source.path}: {entry.name} and its counterpart have different ranks, shapes {list(right.shape)} and "
            f"{list(left.shape)}; save the LoRA again"
        )
    if (left.shape[0], right.shape[1]) != shape:
        raise ValueError(_shape_message(source, entry, "LoRA", (left.shape[0], right.shape[1]), shape))


def _shape_message(source: TensorSource, entry: Entry, what: str, got: tuple[int, ...], wanted: tuple[int, int]) -> str:
    """For factors that do not fit the layer: names the variants whose layer they would fit."""
    fitting = []
    for name, variant in VARIANTS.items():
        shape = linear_shapes(variant.dit).get(entry.target.layer)
        if shape is not None and entry.target.rows is not None:
            shape = (shape[0] // 3, shape[1])
        if shape == got:
            fitting.append(name)
    size = f"it is a LoRA of another size, {' or '.join(fitting)}" if fitting else "it is of another size or model"
    return (
        f"{source.path}: {entry.name} makes a {what} of shape {list(got)} and this model's layer is {list(wanted)}: "
        f"{size}; give a LoRA of this model's size"
    )


def _check_zero_biases(source: TensorSource, entries: dict[str, Entry]) -> None:
    for role, entry in entries.items():
        if (role == "diff_b" or role.endswith(".bias")) and _read(source, entry.name).count_nonzero():
            raise ValueError(
                f"{source.path}: {entry.name} changes a bias, and no layer of FLUX.2 has one; retrain without"
            )


def _read(source: TensorSource, name: str) -> Tensor:
    """A tensor as stored, 8-bit floats as bf16, checked to be finite."""
    tensor = source.get(name)
    if tensor.dtype in FLOAT8_DTYPES:
        tensor = tensor.bfloat16()
    if tensor.dtype not in FLOAT_DTYPES and tensor.numel() > 1:
        raise ValueError(f"{source.path}: {name} has the type {tensor.dtype}; factors must be floating-point")
    if not tensor.isfinite().all():
        raise ValueError(f"{source.path}: {name} holds values that are not finite; the training went wrong, retrain")
    return tensor


def _read_peft_config(source: TensorSource) -> dict[str, Any]:
    """PEFT's configuration of the transformer's adapter; empty where the file has none."""
    if METADATA_KEY in source.metadata:
        try:
            data = json.loads(source.metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source.path}: the metadata {METADATA_KEY} is no valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"{source.path}: the metadata {METADATA_KEY} must be a JSON object")
        own = {key.removeprefix("transformer."): value for key, value in data.items() if key.startswith("transformer.")}
        return own or {key: value for key, value in data.items() if "." not in key}
    beside = source.folder / "adapter_config.json"
    if source.files[0].name == "adapter_model.safetensors" and beside.is_file():
        return read_json_object(beside)
    return {}


def _peft_alpha(source: TensorSource, peft: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha that PEFT's configuration gives a module of this rank; the rank where it says nothing."""
    alpha = peft.get("lora_alpha")
    patterns = peft.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source.path}: alpha_pattern in PEFT's configuration must map names to numbers")
    alpha = next((value for pattern, value in patterns.items() if _pattern_matches(source, pattern, module)), alpha)
    if alpha is None:
        return float(rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(
            f"{source.path}: lora_alpha of {module} must be a number other than 0, got {str(alpha)[:40]!r}"
        )
    return float(alpha) * (math.sqrt(rank) if peft.get("use_rslora") else 1.0)


def _pattern_matches(source: TensorSource, pattern: str, module: str) -> bool:
    """PEFT's rule: a regular expression that the module's name is or, after a dot, ends with."""
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    # A stranger's expression must not be able to take exponential time.
    if len(pattern) > 300 or re.search(r"[)}\]*+?][*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise ValueError(f"{source.path}: the alpha_pattern {pattern[:60]!r} is too complicated to be read safely")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise ValueError(
            f"{source.path}: the alpha_pattern {pattern[:60]!r} is no regular expression: {error}"
        ) from None


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
