"""LoRAs on a DiT: live beside its weights, merged into them, and extracted from the difference of two checkpoints."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import DiTReader, dit_metadata, fits_type
from .dit import Flux2DiT
from .files import stream_safetensors
from .linear import Linear, LowRank
from .lora_factors import Factors, Lora, LoraFactors, LoraReport, group_layers
from .lora_files import linear_shapes
from .tensor_source import TORCH_DTYPES
from .variants import VARIANTS, Variant

TensorCallback = Callable[[int, int], None]
"""Told the number of tensors done and the number in all."""
EXACT_SVD_SIDE = 1024
"""Matrices whose shorter side is longer than this are decomposed by randomised subspace iteration."""
SVD_OVERSAMPLING = 16
SVD_ITERATIONS = 6


@dataclass(frozen=True, kw_only=True)
class LoraSetting:
    """A LoRA and how strongly it acts on which layers."""

    lora: Lora
    strength: float = 1.0
    include: Sequence[str] = ()
    """Regular expressions; when there are any, only layers whose BFL name one of them is found in are adapted."""
    exclude: Sequence[str] = ()
    """Regular expressions; layers whose BFL name one of them is found in are not adapted."""
    block_strengths: Mapping[str, float] = field(default_factory=dict)
    """What the strength is multiplied by, by the beginning of a BFL name up to a dot, such as ``single_blocks.3`` or
    ``double_blocks``. The longest beginning that fits a layer decides."""

    def layer_strengths(self) -> dict[str, float]:
        """The strength of every layer that is adapted at all, by BFL name.

        Raises:
            ValueError: a number is not finite, a pattern is invalid, a block unknown, or no layer is left.
        """
        for number in (self.strength, *self.block_strengths.values()):
            if not math.isfinite(number):
                raise ValueError(f"strengths of {self.lora.name} must be finite, got {number}")
        chosen = matching_layers(self.lora.layers, self.include, self.exclude)
        known = linear_shapes(self.lora.config)
        for block in self.block_strengths:
            if not any(_begins(layer, block) for layer in known):
                raise ValueError(
                    f"block_strengths of {self.lora.name} names {block!r}, which no layer begins with; "
                    f"names look like double_blocks.0, single_blocks.{self.lora.config.num_single_blocks - 1}, img_in"
                )
        if not chosen:
            raise ValueError(
                f"the include and exclude patterns leave no layer of {self.lora.name}; its layers are named like "
                f"{next(iter(self.lora.layers))}"
            )
        strengths = {}
        for layer in chosen:
            block = max((b for b in self.block_strengths if _begins(layer, b)), key=len, default=None)
            strengths[layer] = self.strength * (1.0 if block is None else self.block_strengths[block])
        return {layer: strength for layer, strength in strengths.items() if strength != 0}


def matching_layers(layers: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Names that one of `include` is found in (all, where it is empty), less those that one of `exclude` is found in.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    included, excluded = _compile(include), _compile(exclude)
    return [
        layer
        for layer in layers
        if (not included or any(pattern.search(layer) for pattern in included))
        and not any(pattern.search(layer) for pattern in excluded)
    ]


class LiveFactors:
    """Factors acting on a `Linear`: an adapter.

    They are kept as they were given; what runs is a copy in the type and on the device of the activations.
    """

    def __init__(self, factors: Factors, strength: float, weight: Tensor) -> None:
        self.factors = factors
        self.strength = strength
        self.out_features = weight.shape[0]
        self._running = factors
        self._gain: Tensor | None = None
        self._running_gain: tuple[Tensor, Tensor] | None = None
        if factors.magnitude is not None:
            self._gain = _to(factors, weight.device).gain(_rows(weight, factors))
        self.needs_weight = self._gain is not None and self._gain.shape[1] > 1

    def __call__(self, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        factors = self._prepare(x)
        if self._gain is None:
            change = factors.apply(x, self.strength)
        elif self._gain.shape[1] == 1:  # gain of each output: gain (W + delta) x - W x
            base = output if factors.rows is None else output[..., slice(*factors.rows)]
            change = factors.apply(x, self.strength)
            # Near 1 the gain itself would lose in bf16 what it differs by.
            change = change + self._prepare_gain(x)[1] * (change + self.strength * base)
        else:  # gain of each input: (W + delta) (gain x) - W x
            gain, above_one = self._prepare_gain(x)
            base = F.linear(above_one * x, _rows(weight, factors).to(x.dtype))
            change = factors.apply(gain * x, self.strength) + self.strength * base
        if factors.rows is None:
            return change
        start, stop = factors.rows
        return F.pad(change, (start, self.out_features - stop))

    def low_rank(self, x: Tensor) -> LowRank | None:
        """A plain LoRA as products alone, see `linear.Adapter`."""
        if self._gain is not None or not isinstance(self.factors, LoraFactors):
            return None
        running = self._prepare(x)
        assert isinstance(running, LoraFactors)
        return LowRank(
            lora_A=running.lora_A,
            lora_B=running.lora_B,
            running_A=running.lora_A,
            running_B=running.lora_B,
            scale=running.scale * self.strength,
            rows=running.rows,
        )

    def _prepare(self, x: Tensor) -> Factors:
        """The factors in the type and on the device of ``x``."""
        if all(t.dtype == x.dtype and t.device == x.device for t in self._running.tensors().values()):
            return self._running
        running = _to(self.factors, x.device, x.dtype)
        if not any(tensor.requires_grad for tensor in self.factors.tensors().values()):
            self._running = running  # those in training change, and a copy would not
        return running

    def _prepare_gain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gain, and how far it is above 1, in the type and on the device of ``x``: made where the weight was."""
        assert self._gain is not None
        found = self._running_gain
        if found is None or (found[0].dtype, found[0].device) != (x.dtype, x.device):
            with torch.inference_mode(False):
                gain = self._gain.flatten()
                found = self._running_gain = gain.to(x), (gain - 1).to(x)
        return found


@torch.inference_mode(False)
@torch.no_grad()
def apply_loras(dit: Flux2DiT, settings: Sequence[LoraSetting]) -> None:
    """Makes these, and no others, the live LoRAs of a model: ``W x + sum of strength * change(W) x``.

    Base weights are not touched. Called again with other strengths it re-weights, with an empty list it removes; a
    layer that nothing acts on runs as if there never had been a LoRA. Types need not agree: a LoRA runs in the type of
    the activations.

    Raises:
        ValueError: a LoRA is for another shape of DiT, or a setting is wrong, see `LoraSetting`; the model is left as
            it was.
    """
    layers = linear_layers(dit)
    changes = collect_changes(settings, layers)
    live = {
        name: tuple(
            # Only a magnitude looks at the numbers of a weight, and a quantised one has to be multiplied out for it.
            LiveFactors(factors, strength, layer.weight if factors.magnitude is None else layer.dense_weight())
            for factors, strength in changes.get(name, ())
        )
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.adapters = live[name]


def remove_loras(dit: Flux2DiT) -> None:
    """Removes all live LoRAs; the model computes bit by bit what it computed before."""
    apply_loras(dit, [])


@torch.inference_mode(False)
@torch.no_grad()
def merge_loras(dit: Flux2DiT, settings: Sequence[LoraSetting]) -> None:
    """Adds LoRAs to the weights, in fp32 and cast once; to undo it, load the model again.

    Raises:
        ValueError: as `apply_loras`, or the model has live LoRAs; the model is left as it was.
    """
    layers = linear_layers(dit)
    changes = collect_changes(settings, layers)
    if any(layer.adapters for layer in layers.values()):
        raise ValueError("the model has live LoRAs, which a merge would apply to other weights; remove them first")
    _check_plain(layers)
    for name, factors in changes.items():
        layers[name].weight.data = merged_weight(layers[name].weight, factors)
        torch.autograd.graph.increment_version(layers[name].weight)  # results of the old weight are told by that


def merged_weight(weight: Tensor, changes: Iterable[tuple[Factors, float]], *, in_place: bool = False) -> Tensor:
    """``W + sum of strength * change(W)`` for ``W`` ``[out, in]``, computed in fp32, in the type of ``weight``.

    Args:
        in_place: an fp32 weight may be written to, so that no second one is in memory.
    """
    changes = [(_to(factors, weight.device), strength) for factors, strength in changes]
    result = weight.detach().to(torch.float32, copy=not in_place)
    # A magnitude looks at the weight as it was, which the first change still finds there.
    base = result.clone() if any(factors.magnitude is not None for factors, _ in changes[1:]) else result
    for factors, strength in changes:
        rows = _rows(result, factors)
        if isinstance(factors, LoraFactors) and factors.magnitude is None:  # without a dense change in memory
            rows.addmm_(factors.lora_B.float(), factors.lora_A.float(), alpha=strength * factors.scale)
        else:
            rows.add_(factors.change(_rows(base, factors)), alpha=strength)
    return result.to(weight.dtype)


def merged_tensors(
    tensors: Iterable[tuple[str, Tensor]], settings: Sequence[LoraSetting], *, in_place: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a DiT in BFL's names with LoRAs added, one at a time.

    Args:
        in_place: fp32 tensors may be written to.

    Raises:
        ValueError: a setting is wrong, or a result is not finite in the type of the weight.
    """
    changes = collect_changes(settings)
    for name, tensor in tensors:
        factors = changes.get(name.removesuffix(".weight"))
        if factors:
            with torch.inference_mode(False), torch.no_grad():
                tensor = merged_weight(tensor, factors, in_place=in_place)
            if not fits_type(tensor, tensor.dtype):
                raise ValueError(f"merging makes {name} too large for {tensor.dtype}; merge into bf16 or fp32")
        yield name, tensor
        del tensor  # before the next one is read


def merge_checkpoint(
    source_path: str | os.PathLike[str],
    settings: Sequence[LoraSetting],
    out_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    device: str | torch.device = "cpu",
    variants: Mapping[str, Variant] = VARIANTS,
    on_tensor: TensorCallback | None = None,
) -> Path:
    """Writes a DiT checkpoint with LoRAs merged in as one file in BFL's layout, atomically and layer by layer.

    Args:
        source_path: a DiT in any layout that `load_dit` reads.
        dtype: type of all weights; None keeps the source's (bf16 for an fp8 file).
        device: where the sums are computed.
        on_tensor: called after each tensor with the number done and the number in all.

    Raises:
        ValueError: as `load_dit` and `apply_loras`.
    """
    reader = DiTReader(source_path, variant, None, device, variants=variants)
    dtype = dtype or reader.dtype
    # One cast, at the end: the sum is made of weights that keep all of the file's precision.
    reader.dtype = torch.float32
    tensors = ((name, reader.get(name)) for name in reader.shapes)
    return write_merged(
        out_path, reader.variant, tensors, reader.shapes, settings, dtype, in_place=True, on_tensor=on_tensor
    )


def save_merged_dit(
    path: str | os.PathLike[str],
    dit: Flux2DiT,
    variant: Variant,
    settings: Sequence[LoraSetting],
    dtype: torch.dtype | None = None,
    *,
    on_tensor: TensorCallback | None = None,
) -> Path:
    """Like `merge_checkpoint`, for a model that is loaded already; the model stays as it is."""
    _check_plain(linear_layers(dit))
    state = dit.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tensors = ((name, tensor.float()) for name, tensor in state.items())
    return write_merged(path, variant, tensors, shapes, settings, dtype or dit.dtype, on_tensor=on_tensor)


def write_merged(
    path: str | os.PathLike[str],
    variant: Variant,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    settings: Sequence[LoraSetting],
    dtype: torch.dtype,
    *,
    in_place: bool = False,
    on_tensor: TensorCallback | None = None,
) -> Path:
    """Streams a DiT's fp32 weights, by BFL name, with LoRAs merged in into one file; each sum is cast once.

    Args:
        in_place: the weights may be written to, so that one of them is in memory at a time.

    Raises:
        ValueError: a LoRA is for another shape of DiT, a setting is wrong, see `LoraSetting`, or a result is too large
            for ``dtype``.
    """
    for setting in settings:  # refused before a file is begun
        _check_shapes(setting.lora, linear_shapes(variant.dit))
        setting.layer_strengths()
    words = {torch_dtype: word for word, torch_dtype in TORCH_DTYPES.items()}
    layout = {name: (words[dtype], shape, math.prod(shape) * dtype.itemsize) for name, shape in shapes.items()}
    metadata = dit_metadata(path, variant)
    metadata["flux2_kit.merged_loras"] = ", ".join(f"{s.lora.name} {s.strength:g}" for s in settings)

    def merged() -> Iterator[tuple[str, Tensor]]:
        numbers = itertools.count(1)  # beside the loop: enumerate() keeps what it gave last
        for name, tensor in merged_tensors(tensors, settings, in_place=in_place):
            result = _cast(name, tensor, dtype)
            del tensor  # before it is written, and the next one is read
            yield name, result
            del result
            if on_tensor is not None:
                on_tensor(next(numbers), len(shapes))

    return stream_safetensors(path, layout, merged(), metadata)


def extract_lora(
    base_path: str | os.PathLike[str],
    tuned_path: str | os.PathLike[str],
    rank: int,
    device: str | torch.device = "cpu",
    *,
    variant: str | None = None,
    allow_unmatched: bool = False,
    variants: Mapping[str, Variant] = VARIANTS,
    on_tensor: TensorCallback | None = None,
) -> Lora:
    """The LoRA of this rank that is nearest to the difference of two checkpoints, by truncated SVD, layer by layer.

    ``tuned - base = U S V^T``; ``lora_B = U sqrt(S)``, ``lora_A = sqrt(S) V^T``, both fp32, alpha = rank. The rank of a
    layer is at most its shorter side, and layers that do not differ are left out.

    Args:
        allow_unmatched: whether differences that a LoRA cannot hold, in the norms, are left out and named in the
            report; they are an error otherwise.
        on_tensor: called before each tensor with the number done and the number in all.

    Raises:
        ValueError: as `load_dit`; the checkpoints are of different shapes, or do not differ; the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be 1 or more, got {rank}")
    base = DiTReader(base_path, variant, torch.float32, device, variants=variants)
    tuned = DiTReader(tuned_path, variant, torch.float32, device, variants=variants)
    if base.shapes != tuned.shapes:
        raise ValueError(
            f"{base_path} is {base.variant.name} and {tuned_path} is {tuned.variant.name}; "
            "give two checkpoints of one shape"
        )
    linear = linear_shapes(base.variant.dit)
    layers: dict[str, tuple[Factors, ...]] = {}
    unmatched = []
    with torch.inference_mode(False), torch.no_grad():
        for number, name in enumerate(base.shapes):
            if on_tensor is not None:
                on_tensor(number, len(base.shapes))
            difference = tuned.get(name) - base.get(name)
            if not difference.isfinite().all():
                raise ValueError(f"{name} of {base_path} or {tuned_path} is not finite; give undamaged checkpoints")
            layer = name.removesuffix(".weight")
            if not difference.count_nonzero():
                continue
            if layer in linear:
                layers[layer] = (_truncated_svd(difference, rank),)
            else:
                unmatched.append(name)
    if unmatched and not allow_unmatched:
        raise ValueError(
            f"{tuned_path} differs in {len(unmatched)} tensors that a LoRA cannot hold: {', '.join(unmatched[:4])}; "
            "allow unmatched names to leave them out"
        )
    if not layers:
        raise ValueError(f"{base_path} and {tuned_path} do not differ in any layer; give a base and a tuned checkpoint")
    report = LoraReport(dialects=("extracted",), groups=group_layers(layers), unmatched=tuple(unmatched))
    metadata = {"modelspec.architecture": base.variant.lora_architecture}
    return Lora(name=Path(tuned_path).name, config=base.variant.dit, layers=layers, report=report, metadata=metadata)


def _truncated_svd(matrix: Tensor, rank: int) -> LoraFactors:
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(EXACT_SVD_SIDE, rank + SVD_OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + SVD_OVERSAMPLING, niter=SVD_ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()
    lora_A, lora_B = (root[:, None] * vh[:rank]).contiguous().cpu(), (u[:, :rank] * root).contiguous().cpu()
    return LoraFactors(lora_A=lora_A, lora_B=lora_B, alpha=float(rank))


def collect_changes(
    settings: Sequence[LoraSetting], layers: Mapping[str, Linear] | None = None
) -> dict[str, list[tuple[Factors, float]]]:
    """Factors and strengths by layer.

    Raises:
        ValueError: a LoRA does not fit ``layers``, or a setting is wrong, see `LoraSetting`.
    """
    changes: dict[str, list[tuple[Factors, float]]] = {}
    for setting in settings:
        if layers is not None:
            _check_shapes(setting.lora, {n: (m.out_features, m.in_features) for n, m in layers.items()})
        for layer, strength in setting.layer_strengths().items():
            changes.setdefault(layer, []).extend((factors, strength) for factors in setting.lora.layers[layer])
    return changes


def _check_plain(layers: Mapping[str, Linear]) -> None:
    quantised = next((layer.weight_format for layer in layers.values() if layer.weight_format), None)
    if quantised:
        raise ValueError(
            f"the model's weights are {quantised}, and merging into them would round them a second time; merge into "
            "the checkpoint, or name the LoRAs when the model is loaded"
        )


def _check_shapes(lora: Lora, shapes: Mapping[str, tuple[int, int]]) -> None:
    own = linear_shapes(lora.config)
    wrong = next((layer for layer in lora.layers if shapes.get(layer) != own[layer]), None)
    if wrong is not None:
        has = list(shapes[wrong]) if wrong in shapes else "no such layer"
        raise ValueError(
            f"{lora.name} was read for a DiT whose {wrong} is {list(own[wrong])}, and this model has {has}; "
            "give a LoRA of this model's size"
        )


def linear_layers(dit: Flux2DiT) -> dict[str, Linear]:
    """Every Linear of a DiT by its BFL name."""
    return {name: module for name, module in dit.named_modules() if isinstance(module, Linear)}


def _rows(tensor: Tensor, factors: Factors) -> Tensor:
    return tensor if factors.rows is None else tensor[slice(*factors.rows)]


def _to(factors: Factors, device: torch.device, dtype: torch.dtype | None = None) -> Factors:
    with torch.inference_mode(False):  # made under inference mode, copies would be barred from training
        return factors.map(lambda tensor: tensor.to(device=device, dtype=dtype or tensor.dtype))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if not fits_type(result, dtype):
        raise ValueError(f"{name} is too large for {dtype}, or was not finite; merge into bf16 or fp32")
    return result


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list of regular expressions, got the text {patterns!r}")
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is no regular expression: {error}") from None


def _begins(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")
