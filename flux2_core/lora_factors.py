"""What a LoRA file holds for a layer: the factors of a change of weights, as LoRA, LoHa, LoKr or dense.

``W`` is a layer's weight ``[out, in]``. Without a magnitude the adapted weight is ``W + strength * delta``. With one
(DoRA, arXiv:2402.09353) it is ``W + strength * (gain * (W + delta) - W)``, ``gain = magnitude / norm(W + delta)``; so
the change is linear in the strength for every kind, and changes of several adapters add up.

Norm axis of DoRA by tool: PEFT's ``lora_magnitude_vector`` ``[out]`` and the ``dora_scale`` ``[out, 1]`` of LyCORIS
(``wd_on_out``) and OneTrainer take the norm of each row; ``dora_scale`` ``[1, in]`` (older LyCORIS and kohya) that of
each column. All of them norm ``W + delta``, and so do we; ComfyUI norms ``W`` alone for ``[out, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

    from .dit import DiTConfig

Kind = Literal["LoRA", "LoHa", "LoKr", "diff"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """A change of a layer's weight, or of some of its rows."""

    kind: Kind
    rows: tuple[int, int] | None = None
    """First row and the one after the last, for a part of a fused layer; None for all rows."""
    magnitude: Tensor | None = None
    """``[rows, 1]`` or ``[1, in]`` for DoRA."""
    alpha: float | None = None
    """The change is multiplied by ``alpha / rank``; None where there is no rank."""

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors, None where there is none."""
        return None

    @property
    def scale(self) -> float:
        """``alpha / rank``, 1 where there is no rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change ``[rows, in]``, dense, fp32 and in memory of its own, before any magnitude."""
        raise NotImplementedError

    def apply(self, x: Tensor, strength: float = 1.0) -> Tensor:
        """``strength * x delta^T``: ``[..., in]`` to ``[..., rows]``, in the type of ``x``, which the factors have."""
        raise NotImplementedError

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with ``function`` applied to every tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Factors and magnitude, by the name of the field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def gain(self, weight: Tensor) -> Tensor:
        """DoRA's ``magnitude / norm(W + delta)`` in fp32, shaped as the magnitude; ``weight`` is ``[rows, in]``."""
        assert self.magnitude is not None
        return self._gain_of(weight.float() + self.delta())

    def change(self, weight: Tensor) -> Tensor:
        """The change of ``weight`` ``[rows, in]`` at strength 1, magnitude included: dense, fp32."""
        if self.magnitude is None:
            return self.delta()
        base = weight.float()
        # In place: there are two dense matrices beside the weight at most.
        merged = self.delta().add_(base)
        return merged.mul_(self._gain_of(merged)).sub_(base)

    def _gain_of(self, merged: Tensor) -> Tensor:
        assert self.magnitude is not None
        norm = merged.norm(dim=1 if self.magnitude.shape[1] == 1 else 0, keepdim=True)
        return self.magnitude.float() / norm.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFactors(Factors):
    """``delta = alpha / rank * lora_B lora_A`` (arXiv:2106.09685)."""

    kind: Kind = "LoRA"
    lora_A: Tensor
    """``[rank, in]``"""
    lora_B: Tensor
    """``[rows, rank]``"""

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        return (self.lora_B.float() @ self.lora_A.float()).mul_(self.scale)

    def apply(self, x: Tensor, strength: float = 1.0) -> Tensor:
        return F.linear(F.linear(x, self.lora_A) * (self.scale * strength), self.lora_B)


@dataclass(frozen=True, kw_only=True, eq=False)
class LohaFactors(Factors):
    """``delta = alpha / rank * (w1_a w1_b) * (w2_a w2_b)``, two matrices multiplied elementwise (arXiv:2108.06098)."""

    kind: Kind = "LoHa"
    w1_a: Tensor
    """``[rows, rank]``"""
    w1_b: Tensor
    """``[rank, in]``"""
    w2_a: Tensor
    w2_b: Tensor

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def delta(self) -> Tensor:
        first, second = self.w1_a.float() @ self.w1_b.float(), self.w2_a.float() @ self.w2_b.float()
        return first.mul_(second).mul_(self.scale)

    def apply(self, x: Tensor, strength: float = 1.0) -> Tensor:
        return F.linear(x, (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)) * (self.scale * strength)


@dataclass(frozen=True, kw_only=True, eq=False)
class LokrFactors(Factors):
    """``delta = alpha / rank * kron(w1, w2)``; each of w1, w2 is whole or a product ``w_a w_b`` (arXiv:2309.14859).

    The rank is that of the product, of w1's where both are products. With w1 and w2 whole there is none and the scale
    is 1 whatever alpha the file gives, as in LyCORIS.
    """

    kind: Kind = "LoKr"
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None

    @property
    def rank(self) -> int | None:
        for factor in (self.w1_b, self.w2_b):
            if factor is not None:
                return factor.shape[0]
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """w1 and w2, multiplied out."""
        return _whole(self.w1, self.w1_a, self.w1_b), _whole(self.w2, self.w2_a, self.w2_b)

    def delta(self) -> Tensor:
        w1, w2 = self.map(Tensor.float).factors()
        return torch.kron(w1, w2.contiguous()).mul_(self.scale)

    def apply(self, x: Tensor, strength: float = 1.0) -> Tensor:
        w1, w2 = self.factors()
        y = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)  # [..., columns of w1, rows of w2]
        return (w1 @ y).flatten(-2) * (self.scale * strength)


@dataclass(frozen=True, kw_only=True, eq=False)
class DiffFactors(Factors):
    """A dense ``delta``, as LyCORIS' full fine-tuning and ComfyUI's extraction save it."""

    kind: Kind = "diff"
    diff: Tensor
    """``[rows, in]``"""

    def delta(self) -> Tensor:
        return self.diff.to(torch.float32, copy=True)

    def apply(self, x: Tensor, strength: float = 1.0) -> Tensor:
        return F.linear(x, self.diff) * strength


@dataclass(frozen=True, kw_only=True)
class LoraGroup:
    """Layers that are adapted in the same way."""

    kind: str
    """Kind of the factors; "DoRA" for a LoRA with magnitudes."""
    rank: int | None
    alpha: float | None
    layers: tuple[str, ...]
    """In BFL names."""


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What was found in a LoRA file."""

    dialects: tuple[str, ...]
    """Such as "kohya (BFL names)", most frequent first."""
    groups: tuple[LoraGroup, ...]
    unmatched: tuple[str, ...] = ()
    """Names of tensors that are not applied; only there when the caller allowed it."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that occur, such as "LoRA", "DoRA"."""
        return tuple(dict.fromkeys(group.kind for group in self.groups))

    @property
    def matched(self) -> tuple[str, ...]:
        """Adapted layers, in BFL names."""
        return tuple(dict.fromkeys(layer for group in self.groups for layer in group.layers))

    def summary(self) -> str:
        """One line for people."""
        groups = ", ".join(
            f"{group.kind}{'' if group.rank is None else f' rank {group.rank} alpha {group.alpha:g}'}"
            f" on {len(group.layers)} layers"
            for group in self.groups
        )
        left = f"; {len(self.unmatched)} tensors not applied: {', '.join(self.unmatched)}" if self.unmatched else ""
        return f"{', '.join(self.dialects)}: {groups}{left}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """Adapters of some layers of a DiT, as read from a file."""

    name: str
    """For messages: the file it came from."""
    config: DiTConfig
    """The DiT that it fits."""
    layers: Mapping[str, tuple[Factors, ...]]
    """By BFL name of the layer; several for parts of a fused layer that cannot be put into one."""
    report: LoraReport
    metadata: Mapping[str, str]
    """The file's own, such as ``modelspec.*`` and ``ss_*``."""


def group_layers(layers: Mapping[str, tuple[Factors, ...]]) -> tuple[LoraGroup, ...]:
    """Layers by kind, rank and alpha, in the order of their first occurrence."""
    groups: dict[tuple[str, int | None, float | None], list[str]] = {}
    for layer, parts in layers.items():
        for part in parts:
            kind = "DoRA" if part.magnitude is not None and part.kind == "LoRA" else part.kind
            key = (kind, part.rank, None if part.rank is None else part.alpha)
            members = groups.setdefault(key, [])
            if layer not in members:
                members.append(layer)
    return tuple(LoraGroup(kind=k, rank=r, alpha=a, layers=tuple(names)) for (k, r, a), names in groups.items())


def swap_halves(factors: Factors) -> Factors:
    """The same change with the halves of its rows in each other's place."""

    def swap(tensor: Tensor) -> Tensor:
        return torch.cat(tuple(reversed(tensor.chunk(2, dim=0))), dim=0)

    magnitude = factors.magnitude
    if magnitude is not None and magnitude.shape[1] == 1 and magnitude.shape[0] > 1:
        factors = replace(factors, magnitude=swap(magnitude))
    if isinstance(factors, LoraFactors):
        return replace(factors, lora_B=swap(factors.lora_B))
    if isinstance(factors, LohaFactors):
        return replace(factors, w1_a=swap(factors.w1_a), w2_a=swap(factors.w2_a))
    if isinstance(factors, LokrFactors):
        w1, _ = factors.factors()
        number = 1 if w1.shape[0] % 2 == 0 else 2 if w1.shape[0] == 1 else None
        if number is not None:
            name = f"w{number}" if getattr(factors, f"w{number}") is not None else f"w{number}_a"
            return replace(factors, **{name: swap(getattr(factors, name))})
        # Rows of a product with an odd first factor do not swap within the factors.
        return DiffFactors(diff=swap(factors.delta()), rows=factors.rows, magnitude=factors.magnitude)
    assert isinstance(factors, DiffFactors)
    return replace(factors, diff=swap(factors.diff))


def fuse_parts(parts: list[Factors], num_rows: int) -> tuple[Factors, ...]:
    """Parts of a fused layer as one change of all its rows, exactly; as they are where that is not possible.

    Parts that share one lora_A, as the export of a fused layer makes them, become one LoRA of the same rank. Other
    LoRAs become one of the summed rank: lora_A stacked, lora_B block-diagonal, zeros where a part is missing.
    """
    parts = sorted(parts, key=lambda part: part.rows or (0, num_rows))
    complete = sum(stop - start for start, stop in (part.rows or (0, num_rows) for part in parts)) == num_rows
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    by_row = all(magnitude.shape[1] == 1 for magnitude in magnitudes)
    if magnitudes and not (by_row and complete and len(magnitudes) == len(parts)):
        return tuple(parts)
    magnitude = torch.cat(magnitudes) if magnitudes else None

    if loras := [part for part in parts if isinstance(part, LoraFactors)]:
        if len(loras) < len(parts):
            return tuple(parts)
        first = loras[0]
        if complete and all(part.alpha == first.alpha and torch.equal(part.lora_A, first.lora_A) for part in loras[1:]):
            lora_B = torch.cat([part.lora_B for part in loras])
            return (LoraFactors(lora_A=first.lora_A, lora_B=lora_B, alpha=first.alpha, magnitude=magnitude),)
        scaled, alpha = _common_scale([(part.lora_B, part) for part in loras])
        lora_B = _block_diagonal(scaled, loras, num_rows)
        lora_A = torch.cat([part.lora_A for part in loras])
        return (LoraFactors(lora_A=lora_A, lora_B=lora_B, alpha=alpha, magnitude=magnitude),)

    lohas = [part for part in parts if isinstance(part, LohaFactors)]
    if len(lohas) == len(parts):
        scaled, alpha = _common_scale([(part.w1_a, part) for part in lohas])
        fused = LohaFactors(
            w1_a=_block_diagonal(scaled, lohas, num_rows),
            w1_b=torch.cat([part.w1_b for part in lohas]),
            w2_a=_block_diagonal([part.w2_a for part in lohas], lohas, num_rows),
            w2_b=torch.cat([part.w2_b for part in lohas]),
            alpha=alpha,
            magnitude=magnitude,
        )
        return (fused,)
    diffs = [part for part in parts if isinstance(part, DiffFactors)]
    if len(diffs) == len(parts):
        diff = diffs[0].diff.new_zeros(num_rows, diffs[0].diff.shape[1])
        for part in diffs:
            assert part.rows is not None
            diff[slice(*part.rows)] = part.diff
        return (DiffFactors(diff=diff, magnitude=magnitude),)
    return tuple(parts)


def _whole(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole
    assert a is not None and b is not None
    return a @ b


def _common_scale(parts: list[tuple[Tensor, Factors]]) -> tuple[list[Tensor], float]:
    """Tensors and the alpha of all parts together; where the scales differ, they are multiplied in."""
    ranks = [part.rank or 1 for _, part in parts]
    if len({part.scale for _, part in parts}) == 1:
        return [tensor for tensor, _ in parts], float(sum(part.alpha or 0.0 for _, part in parts))
    return [tensor.float() * part.scale for tensor, part in parts], float(sum(ranks))


def _block_diagonal(tensors: list[Tensor], parts: Sequence[Factors], num_rows: int) -> Tensor:
    columns = sum(tensor.shape[1] for tensor in tensors)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    result = tensors[0].new_zeros(num_rows, columns, dtype=dtype)
    column = 0
    for tensor, part in zip(tensors, parts, strict=True):
        assert part.rows is not None
        result[slice(*part.rows), column : column + tensor.shape[1]] = tensor
        column += tensor.shape[1]
    return result
