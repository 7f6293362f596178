"""Adapters that are trained beside the frozen Linears of a DiT: LoRA, DoRA and LoKr.

Parameters are fp32 masters whatever the type of the base; what runs is a cast of them to the type of the activations,
so that a step that is smaller than that type resolves is not lost. No dense change of a weight is ever made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux2_core.dit import Flux2DiT
from ..flux2_core.linear import Linear, LowRank
from ..flux2_core.lora import linear_layers, matching_layers
from ..flux2_core.lora_factors import Factors, LokrFactors, Lora, LoraFactors, LoraReport, group_layers
from ..flux2_core.lora_files import linear_shapes

AdapterKind = Literal["lora", "lokr"]
DEFAULT_LAYERS = ("double_blocks.", "single_blocks.")
"""Beginnings of the names of the layers that are adapted where no pattern says which."""
CHUNK_BYTES = 2**26
"""Rows of a weight that DoRA's norms read at once, as fp32."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained on which layers.

    Raises:
        ValueError: a number is out of its range.
    """

    kind: AdapterKind = "lora"
    rank: int = 32
    alpha: float | None = None
    """The change is multiplied by ``alpha / rank``; None is the rank. LoKr's layers without a rank are not scaled."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training, as PEFT does it. The base sees all of its input, and
    with DoRA so does the part of the change that scales the base's output, which PEFT computes from what is left."""
    rank_stabilized: bool = False
    """Multiplies by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732)."""
    dora: bool = False
    """A trained magnitude for every row of the adapted weight (arXiv:2402.09353)."""
    lokr_factor: int = -1
    """LoKr: the smaller side of both Kronecker factors is the largest divisor up to this, -1 the most even split. A
    factor whose sides are at most twice the rank is trained whole, the other one always; as LyCORIS does it."""
    include: tuple[str, ...] = ()
    """Regular expressions; when there are any, exactly the Linears of the DiT whose BFL name one of them is found in
    are adapted. Without, those of all blocks."""
    exclude: tuple[str, ...] = ()
    """Regular expressions; layers whose BFL name one of them is found in are not adapted."""
    max_norm: float | None = None
    """LoRA alone: after every step the change of a layer whose Frobenius norm is above this is scaled down to it."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(AdapterKind):
            raise ValueError(f"the adapter must be one of {', '.join(get_args(AdapterKind))}, got {self.kind!r}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number from 1 up, got {self.rank!r}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be greater than 0, got {self.alpha}; leave it out for the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")
        if self.lokr_factor != -1 and self.lokr_factor < 1:
            raise ValueError(f"lokr_factor must be -1 (the most even split) or from 1 up, got {self.lokr_factor}")
        if self.max_norm is not None and not (math.isfinite(self.max_norm) and self.max_norm > 0):
            raise ValueError(f"the longest norm of a layer's change must be above 0, such as 1, got {self.max_norm}")
        if self.max_norm is not None and (self.kind != "lora" or self.dora):
            raise ValueError("norms are limited for plain LoRA alone; leave scale_weight_norms out, or DoRA and LoKr")

    @property
    def scale(self) -> float:
        """What the change of a layer that has a rank is multiplied by."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class TrainedAdapter(nn.Module):
    """The change of one layer: an adapter of `Linear` whose tensors are parameters."""

    zero_name: str
    """The parameter that begins as zero, so that training begins at the base."""
    scaled_name: str
    """The parameter that the scale is multiplied into in files."""
    base_norm: Tensor | None
    """``[out]``, fp32: the norm of each row of the base's weight, for DoRA."""
    magnitude: nn.Parameter | None
    """``[out, 1]`` for DoRA."""

    def __init__(self, weight: Tensor, tensors: Mapping[str, Tensor], scale: float, config: AdapterConfig) -> None:
        super().__init__()
        self.needs_weight = config.dora
        """Whether a quantised weight has to be multiplied out for this adapter."""
        self.scale = scale
        self.dropout = config.dropout
        self.factor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.to(weight.device)))
        norm = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32) if config.dora else None
        self.register_buffer("base_norm", norm, persistent=False)
        self.register_parameter("magnitude", None if norm is None else nn.Parameter(norm[:, None].clone()))

    def forward(self, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The change of ``output``, see `flux2_core.linear.Adapter`."""
        factors = self.factors().map(lambda tensor: tensor.to(x.dtype))
        change = factors.apply(F.dropout(x, self.dropout, self.training), self.scale)
        if self.magnitude is None:
            return change
        gain = self.magnitude[:, 0] / self.adapted_norm(weight)
        # The gain is near 1: cast itself, it would lose in bf16 what it differs by.
        return change + (gain - 1).to(output.dtype) * (output + change)

    def factors(self) -> Factors:
        """The parameters themselves, magnitude aside; unscaled."""
        raise NotImplementedError

    @torch.no_grad()
    def saved_factors(self, dtype: torch.dtype) -> Factors:
        """A copy on the CPU as a file holds it, the scale multiplied in. Magnitudes stay fp32: in bf16 they would lose
        most of what they have learned, and they are few."""
        factors = self.factors()
        tensors = factors.tensors()
        tensors[self.scaled_name] = tensors[self.scaled_name] * self.scale
        tensors = {name: tensor.to("cpu", dtype, copy=True) for name, tensor in tensors.items()}
        if self.magnitude is not None:
            tensors["magnitude"] = self.magnitude.to("cpu", copy=True)
        return replace(factors, alpha=None if factors.rank is None else float(factors.rank), **tensors)

    def load_factors(self, factors: Factors, where: str) -> dict[str, Tensor]:
        """What the parameters have to be to make the change that was read; see `TrainableAdapters.load_lora`.

        Raises:
            ValueError: the kinds or shapes differ; ``where`` says of what.
        """
        wanted = dict(self.named_parameters())
        found = factors.tensors()
        if type(factors) is not type(self.factors()) or found.keys() != wanted.keys():
            raise ValueError(
                f"{where} is a {factors.kind} of {', '.join(found)}, and the adapter that is to start from it one of "
                f"{', '.join(wanted)}; take kind, rank and factor from the file"
            )
        result = {}
        for name, tensor in found.items():
            tensor = tensor.detach().to(wanted[name])
            if name == self.scaled_name:
                tensor = tensor * (factors.scale / self.scale)
            if tensor.shape != wanted[name].shape:
                tensor = self._widened(name, tensor)
            if tensor.shape != wanted[name].shape:
                raise ValueError(
                    f"{where} has {name} {list(found[name].shape)}, and the adapter that is to start from it "
                    f"{list(wanted[name].shape)}; take kind, rank and factor from the file"
                )
            result[name] = tensor
        return result

    def _widened(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter of this adapter's rank that makes the change which one of a smaller rank makes."""
        return tensor

    @torch.no_grad()
    def adapted_norm(self, weight: Tensor) -> Tensor:
        """The norm ``[out]`` of each row of ``W + delta``, fp32; a constant in the backward pass (section 4.3 there).

        ``norm^2 = |W|^2 + 2 scale <W, D> + scale^2 |D|^2``, from the factors of ``D`` without making it.
        """
        assert self.base_norm is not None
        with torch.autocast(weight.device.type, enabled=False):
            product, square = self._row_products(weight.detach())
            squared = self.base_norm.square() + 2 * self.scale * product + self.scale**2 * square
            return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _row_products(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``<W, D>`` and ``|D|^2`` of each row, ``[out]``, fp32."""
        raise NotImplementedError


class TrainedLora(TrainedAdapter):
    """``D = lora_B lora_A``."""

    zero_name = scaled_name = "lora_B"
    lora_A: nn.Parameter
    """``[rank, in]``"""
    lora_B: nn.Parameter
    """``[out, rank]``"""

    def __init__(self, weight: Tensor, config: AdapterConfig, generator: torch.Generator) -> None:
        lora_A = _kaiming(config.rank, weight.shape[1], generator)
        tensors = {"lora_A": lora_A, "lora_B": torch.zeros(weight.shape[0], config.rank)}
        super().__init__(weight, tensors, config.scale, config)
        self.held: dict[torch.dtype, tuple[Tensor, ...]] = {}
        """Both parameters in another type, see `TrainableAdapters.cast_once`."""

    def factors(self) -> LoraFactors:
        return LoraFactors(lora_A=self.lora_A, lora_B=self.lora_B)

    def low_rank(self, x: Tensor) -> LowRank | None:
        """The change as products alone, see `flux2_core.linear.Adapter`; None with DoRA or dropout."""
        if self.magnitude is not None or (self.dropout and self.training):
            return None
        factors = (self.lora_A, self.lora_B)
        running = self.held.get(x.dtype) or tuple(factor.detach().to(x.dtype) for factor in factors)
        return LowRank(
            lora_A=factors[0], lora_B=factors[1], running_A=running[0], running_B=running[1], scale=self.scale
        )

    def _widened(self, name: str, tensor: Tensor) -> Tensor:
        if name == "lora_A" and tensor.shape[0] < self.lora_A.shape[0]:
            return torch.cat((tensor, self.lora_A.detach()[tensor.shape[0] :]))
        if name == "lora_B" and tensor.shape[1] < self.lora_B.shape[1]:
            return F.pad(tensor, (0, self.lora_B.shape[1] - tensor.shape[1]))
        return tensor

    def _row_products(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows_at_once = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
        products = [
            (rows.float() @ self.lora_A.T * factor).sum(dim=1)
            for rows, factor in zip(weight.split(rows_at_once), self.lora_B.split(rows_at_once), strict=True)
        ]
        return torch.cat(products), (self.lora_B @ (self.lora_A @ self.lora_A.T) * self.lora_B).sum(dim=1)


class TrainedLokr(TrainedAdapter):
    """``D = kron(w1, w2)``, w2 whole or ``w2_a w2_b``."""

    scaled_name = "w1"
    w1: nn.Parameter

    def __init__(self, weight: Tensor, config: AdapterConfig, generator: torch.Generator) -> None:
        shapes = lokr_shapes((weight.shape[0], weight.shape[1]), config)
        self.zero_name = "w2" if "w2" in shapes else "w2_b"
        tensors = {
            name: torch.zeros(shape) if name == self.zero_name else _kaiming(*shape, generator)
            for name, shape in shapes.items()
        }
        super().__init__(weight, tensors, 1.0 if "w2" in shapes else config.scale, config)

    def factors(self) -> LokrFactors:
        return LokrFactors(**{name: getattr(self, name) for name in self.factor_names})

    def _row_products(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        w1, w2 = self.factors().factors()
        # Row (i, j) of the weight [out1, out2, in1, in2] against w1[i] x w2[j].
        blocks = weight.view(w1.shape[0], w2.shape[0], w1.shape[1], w2.shape[1])
        at_once = max(1, CHUNK_BYTES // (4 * w2.shape[0] * weight.shape[1]))
        products = [
            (torch.einsum("ijpq,ip->ijq", block.float(), factor) * w2).sum(dim=-1).flatten()
            for block, factor in zip(blocks.split(at_once), w1.split(at_once), strict=True)
        ]
        square = torch.outer(w1.square().sum(dim=1), w2.square().sum(dim=1)).flatten()
        return torch.cat(products), square


class TrainableAdapters(nn.Module):
    """An adapter for every chosen Linear of a DiT. The DiT is no submodule: it is neither saved nor moved with them.

    They act between `attach` and `detach`. Their state dict is complete for a given base and config.
    """

    def __init__(self, dit: Flux2DiT, config: AdapterConfig, *, generator: torch.Generator) -> None:
        """Makes them on the devices of the layers; until they are trained they change nothing.

        Args:
            dit: the base, with its final weights: DoRA begins at their norms.
            generator: on the CPU; the same one gives the same parameters on every device.

        Raises:
            ValueError: a pattern is invalid, or no layer is left.
        """
        super().__init__()
        self.config = config
        self.dit_config = dit.config
        linears = linear_layers(dit)
        self.linears = {name: linears[name] for name in target_layers(linears, config)}
        """The adapted layers, by BFL name."""
        make = TrainedLora if config.kind == "lora" else TrainedLokr
        with torch.inference_mode(False):  # made under inference mode, parameters would be barred from training
            self.layers = nn.ModuleDict(
                {_key(name): make(_base_weight(linear), config, generator) for name, linear in self.linears.items()}
            )

    def adapter(self, layer: str) -> TrainedAdapter:
        """The adapter of a layer, by the layer's BFL name."""
        adapter = self.layers[_key(layer)]
        assert isinstance(adapter, TrainedAdapter)
        return adapter

    def attach(self) -> None:
        """Lets every adapter act on its layer, after the adapters that are there already, which stay."""
        self.detach()
        for name, linear in self.linears.items():
            linear.adapters = (*linear.adapters, self.adapter(name))

    def detach(self) -> None:
        """Takes them off again; other adapters stay."""
        for name, linear in self.linears.items():
            linear.adapters = tuple(adapter for adapter in linear.adapters if adapter is not self.adapter(name))

    @contextmanager
    def cast_once(self, dtype: torch.dtype) -> Iterator[None]:
        """LoRAs are cast to a type once for all passes inside of the block, in which the parameters must not change.

        Elsewhere they are cast in every pass, and twice where activations are computed again.
        """
        layers = [layer for layer in self.layers.values() if isinstance(layer, TrainedLora)]
        if dtype == torch.float32 or self.config.dora or self.config.dropout or not layers:
            yield
            return
        parameters: list[Tensor] = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
        flat = torch.empty(sum(map(Tensor.numel, parameters)), dtype=dtype, device=parameters[0].device)
        parts = flat.split([parameter.numel() for parameter in parameters])
        casts = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        with torch.no_grad():
            torch._foreach_copy_(casts, parameters)  # pyright: ignore[reportPrivateImportUsage]
        for number, layer in enumerate(layers):
            layer.held = {dtype: (casts[2 * number], casts[2 * number + 1])}
        try:
            yield
        finally:
            for layer in layers:
                layer.held = {}

    @torch.no_grad()
    def limit_norms(self, is_taken: Tensor) -> None:
        """Scales both factors of each LoRA alike, so that its change has no longer norm than the config's.

        The norm is told from matrices of rank x rank: ``|B A|^2`` is the sum of ``(B^T B) * (A A^T)``.

        Args:
            is_taken: bool ``[]`` on the device; where it is False nothing changes.
        """
        if self.config.max_norm is None:
            return
        for layer in self.layers.values():
            assert isinstance(layer, TrainedLora)
            square = ((layer.lora_B.T @ layer.lora_B) * (layer.lora_A @ layer.lora_A.T)).sum()
            norm = layer.scale * square.clamp_min(0).sqrt()
            factor = (self.config.max_norm / norm.clamp_min(self.config.max_norm)).sqrt()
            factor = torch.where(is_taken, factor, 1)
            layer.lora_A.mul_(factor)
            layer.lora_B.mul_(factor)

    def parameter_groups(self, learning_rate: float, loraplus_ratio: float | None = None) -> list[dict[str, Any]]:
        """For an optimiser: ``params``, ``lr`` and a ``name`` each.

        Args:
            loraplus_ratio: LoRA+ (arXiv:2402.12354): the factors that begin as zero (lora_B; w2 or w2_b of LoKr) learn
                at this many times the rate, as a group of their own.

        Raises:
            ValueError: the ratio is not greater than 0.
        """
        if loraplus_ratio is None:
            return [{"name": "adapters", "params": list(self.parameters()), "lr": learning_rate}]
        if not (math.isfinite(loraplus_ratio) and loraplus_ratio > 0):
            raise ValueError(f"the LoRA+ ratio must be greater than 0, got {loraplus_ratio}")
        fast = [adapter.get_parameter(adapter.zero_name) for adapter in map(self.adapter, self.linears)]
        fast_ids = {id(parameter) for parameter in fast}
        slow = [parameter for parameter in self.parameters() if id(parameter) not in fast_ids]
        return [
            {"name": "adapters", "params": slow, "lr": learning_rate},
            {"name": "adapters_loraplus", "params": fast, "lr": learning_rate * loraplus_ratio},
        ]

    def to_lora(self, name: str, dtype: torch.dtype = torch.float32, metadata: Mapping[str, str] | None = None) -> Lora:
        """A copy, exactly as `read_lora` gives it back from the file that `write_lora` makes of it.

        The scale is multiplied into lora_B (LoKr: w1) in fp32 and alpha is the rank. Magnitudes of DoRA stay fp32.

        Args:
            name: for messages.
            dtype: type of the factors.
        """
        with torch.inference_mode(False):
            layers = {layer: (self.adapter(layer).saved_factors(dtype),) for layer in self.linears}
        report = LoraReport(dialects=("trained",), groups=group_layers(layers))
        return Lora(name=name, config=self.dit_config, layers=layers, report=report, metadata=dict(metadata or {}))

    def load_lora(self, lora: Lora) -> None:
        """Makes the adapters what a LoRA is, so that training goes on from it, whatever scale it was saved with.

        Layers of a smaller rank than the file's largest (such as those cut short by an extraction, or beside fused
        q, k, v, which have three times the rank of the others) are widened by columns of zeros. Layers that the LoRA
        does not have keep what they are.

        Raises:
            ValueError: it is for another size of DiT, adapts layers that are not trained here, or is of another kind,
                rank or shape; nothing is changed then.
        """
        if lora.config != self.dit_config:
            raise ValueError(f"{lora.name} is for another size of DiT; give a LoRA of this model's size")
        if others := [layer for layer in lora.layers if layer not in self.linears]:
            raise ValueError(
                f"{lora.name} adapts {len(others)} layers that are not trained ({_few(others)}); include them, or "
                "take the layers from the file"
            )
        rank = max((part.rank or 0 for parts in lora.layers.values() for part in parts), default=0)
        if self.config.kind == "lora" and rank not in (0, self.config.rank):
            raise ValueError(
                f"{lora.name} has rank {rank}, and rank {self.config.rank} is to be trained; set the rank to {rank}, "
                "or take it from the file"
            )
        values = {
            layer: self.adapter(layer).load_factors(_only_part(lora, layer), f"{layer} of {lora.name}")
            for layer in lora.layers
        }
        with torch.no_grad():
            for layer, tensors in values.items():
                for name, tensor in tensors.items():
                    self.adapter(layer).get_parameter(name).copy_(tensor)


def config_from_lora(lora: Lora) -> AdapterConfig:
    """The config whose adapters can be started from a LoRA: its kind, its largest rank, its scale and its layers.

    Raises:
        ValueError: it is of a kind that is not trained, or of several.
    """
    parts = {layer: _only_part(lora, layer) for layer in lora.layers}
    kinds = {(type(part), part.magnitude is not None) for part in parts.values()}
    if len(kinds) != 1 or next(iter(kinds))[0] not in (LoraFactors, LokrFactors):
        found = ", ".join(lora.report.kinds)
        raise ValueError(f"{lora.name} is of kind {found}; training starts from LoRA, DoRA or LoKr, one in a file")
    ((_, dora),) = kinds
    is_default = set(parts) == set(target_layers(linear_shapes(lora.config), AdapterConfig()))
    include = () if is_default else tuple(f"^{re.escape(name)}$" for name in parts)
    ranks = [part.rank for part in parts.values() if part.rank is not None]
    scales = {part.scale for part in parts.values() if part.rank is not None}
    lokrs = {layer: part for layer, part in parts.items() if isinstance(part, LokrFactors)}
    # Without any rank: the smallest at which every factor is whole.
    rank = max(ranks or [-(-max(part.factors()[1].shape) // 2) for part in lokrs.values()])
    alpha = rank * scales.pop() if len(scales) == 1 else None
    config = AdapterConfig(
        kind="lokr" if lokrs else "lora", rank=rank, alpha=None if alpha == rank else alpha, dora=dora, include=include
    )
    return replace(config, lokr_factor=_find_lokr_factor(lora, lokrs, config)) if lokrs else config


def _base_weight(linear: Linear) -> Tensor:
    """The plain weight itself; a quantised one multiplied out, in fp32 for the sake of DoRA's norms."""
    return linear.dense_weight(None if linear.weight_format is None else torch.float32)


def target_layers(names: Iterable[str], config: AdapterConfig) -> list[str]:
    """The layers that a config adapts, of all Linears of a DiT by BFL name.

    Raises:
        ValueError: a pattern is invalid, or no layer is left.
    """
    names = list(names)
    examples = _few([name for name in names if name.startswith(DEFAULT_LAYERS)] or names)
    candidates = names if config.include else [name for name in names if name.startswith(DEFAULT_LAYERS)]
    try:
        chosen = matching_layers(candidates, config.include, config.exclude)
    except ValueError as error:
        raise ValueError(f"{error}; layers are named like {examples}") from None
    if not chosen:
        advice = "; leave out exclude, which takes away from include" if config.include and config.exclude else ""
        raise ValueError(
            f"include {list(config.include)} and exclude {list(config.exclude)} leave no layer to adapt{advice}; "
            f"layers are named like {examples}"
        )
    return chosen


def count_parameters(shapes: Mapping[str, tuple[int, int]], config: AdapterConfig) -> int:
    """How many values a config trains.

    Args:
        shapes: ``(out, in)`` of every Linear of the DiT, from `linear_shapes`.
    """
    count = 0
    for out, into in (shapes[name] for name in target_layers(shapes, config)):
        factors = [(out, config.rank), (config.rank, into)]
        if config.kind == "lokr":
            factors = list(lokr_shapes((out, into), config).values())
        count += sum(math.prod(factor) for factor in factors) + (out if config.dora else 0)
    return count


def lokr_shapes(shape: tuple[int, int], config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """Shapes of the factors of a weight ``[out, in]``: w1, and w2 or w2_a and w2_b."""
    (out1, out2), (in1, in2) = (_split(side, config.lokr_factor) for side in shape)
    if max(out2, in2) <= 2 * config.rank:
        return {"w1": (out1, in1), "w2": (out2, in2)}
    return {"w1": (out1, in1), "w2_a": (out2, config.rank), "w2_b": (config.rank, in2)}


def _split(side: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``side``, the smaller one first; see `AdapterConfig.lokr_factor`."""
    if factor > 0 and side % factor == 0:
        return min(factor, side // factor), max(factor, side // factor)
    limit = math.isqrt(side) if factor < 0 else min(factor, math.isqrt(side))
    small = next(divisor for divisor in range(limit, 0, -1) if side % divisor == 0)
    return small, side // small


def _find_lokr_factor(lora: Lora, lokrs: Mapping[str, LokrFactors], config: AdapterConfig) -> int:
    """The lokr_factor that gives the shapes which a file has."""
    shapes = linear_shapes(lora.config)
    found = {
        layer: {n: tuple(t.shape) for n, t in part.tensors().items() if n != "magnitude"}
        for layer, part in lokrs.items()
    }
    sides = {side for layer in found.values() for shape in layer.values() for side in shape}
    for factor in (-1, *sorted(sides)):
        config = replace(config, lokr_factor=factor)
        if all(lokr_shapes(shapes[layer], config) == found[layer] for layer in found):
            return factor
    raise ValueError(
        f"{lora.name} is a LoKr of shapes that are not trained here, such as {next(iter(found.values()))} for "
        f"{next(iter(found))}; trained are a whole w1 and one factor for all layers"
    )


def _only_part(lora: Lora, layer: str) -> Factors:
    first, *others = lora.layers[layer]
    if others or first.rows is not None:
        raise ValueError(
            f"{lora.name} changes separate rows of {layer} by {first.kind}s that do not make one of all rows; "
            "training cannot start from it"
        )
    return first


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5), generator=generator)


def _key(layer: str) -> str:
    """A layer's name as that of a submodule, where dots are not allowed."""
    return layer.replace(".", "_")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
