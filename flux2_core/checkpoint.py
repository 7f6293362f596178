"""Checkpoints in and out: safetensors files as one table of tensors, strict loading, saving.

Files come from strangers, so a header is checked against the file before anything is allocated, an index may name only
files of its own folder, and nothing but safetensors and JSON is read. What a file holds is found by `detect.detect`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, Flux2Autoencoder, arrange_channels
from .detect import FileDescription, component_steps, describe_other, detect, resolve_variant
from .dit import Flux2DiT
from .files import write_safetensors
from .host_memory import trim_host_memory
from .linear import FORMATS, Precision, WeightFormat, split_precision
from .quantization import (
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    check_format,
    dequantise,
    has_row_scale,
    row_scale,
    split_quantisation,
)
from .state_dict import COMFYUI_DIT_PREFIX, Component, Layout, Step, convert
from .tensor_source import TensorSource
from .variants import VARIANTS, Variant

if TYPE_CHECKING:
    from .lora import LoraSetting

AUTOENCODER_MISSING_ALLOWED = frozenset({"bn.num_batches_tracked"})
"""A counter that only training uses; diffusers' files and ComfyUI's leave it out. A DiT may miss nothing."""
MAPPED_FROM_BYTES = 2**30
"""Files of this size or more are mapped where they can be. Smaller ones are copied: that costs a fraction of a second,
and memory of our own is aligned, so that a CPU computes the same last bits from a file as from a fresh model."""
QUANTISED_PARTS = ("double_blocks.", "single_blocks.")
"""Where a DiT's Linears are quantised: the blocks hold 95 to 97 % of the weights. The others stay plain, since they
would add more error than all the blocks: on the tiny model's velocity the blocks make 3.2 % in fp8 and 11 % in nf4, the
embedders, modulations and last layer alone 3.8 % and 14 %."""


def load_dit(
    path: str | os.PathLike[str],
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    precision: Precision | None = None,
    merge: Sequence[LoraSetting] = (),
    variants: Mapping[str, Variant] = VARIANTS,
) -> tuple[Flux2DiT, Variant]:
    """Loads a DiT from a file, the first of its shards, an index, or a folder, in any known layout.

    The model is in eval mode and takes no gradients. All its plain weights have one type: ``dtype``, or the one most
    weights of the file have, where 8-bit floats count as bf16 (they are multiplied by their scales). On the CPU,
    weights of a large file (`MAPPED_FROM_BYTES`) that need no conversion stay mapped to it: they take memory as they
    are used, which the system may take back, and the file must not be overwritten in place while the model lives.

    Args:
        variant: a name of ``variants``; None or "auto" finds it, see `resolve_variant`.
        dtype: type of all plain weights, and so of the activations.
        device: where the weights go; they pass through host memory one tensor at a time.
        precision: "fp8" or "nf4" quantise the Linears of the blocks, one after the other; fp8 numbers of a file with
            a scale per tensor or per row are taken as they are. "bf16" is ``dtype`` bf16. None keeps plain weights.
        merge: LoRAs that are added to the weights, in fp32, before these are cast or quantised.

    Raises:
        ValueError: the file is missing, damaged, something else than a FLUX.2 DiT, or of another variant; a LoRA does
            not fit; ``dtype`` contradicts ``precision``, or nf4 cannot be computed here.
    """
    dtype, weight_format = split_precision(precision, dtype)
    reader = DiTReader(path, variant, dtype, device, variants=variants)
    return _load_dit(reader, weight_format, merge), reader.variant


# Under inference mode, as inside a ComfyUI node, the weights would be barred from any later training.
@torch.inference_mode(False)
@torch.no_grad()
def _load_dit(reader: DiTReader, weight_format: WeightFormat | None, merge: Sequence[LoraSetting]) -> Flux2DiT:
    # lora.py reads checkpoints, so it cannot be there when this module is imported.
    from .lora import collect_changes, linear_layers, merged_weight

    dit = reader.make_empty()
    layers = linear_layers(dit)
    changes = collect_changes(merge, layers)
    state: dict[str, Tensor] = {}
    for name in reader.names:
        layer = name.removesuffix(".weight")
        format_of_layer = weight_format if is_quantised_layer(name) else None
        if format_of_layer == "fp8" and layer not in changes and reader.has_fp8(name):
            layers[layer].set_quantised("fp8", *reader.get_fp8(name))
            continue
        if layer in changes:
            tensor = merged_weight(reader.get(name, torch.float32), changes[layer], in_place=True)
            check_merged(tensor, name, torch.float32 if format_of_layer else reader.dtype)
        else:
            tensor = reader.get(name, reader.dense_dtype(name) if format_of_layer else None)
        if format_of_layer:
            layers[layer].set_quantised(format_of_layer, *FORMATS[format_of_layer].quantise(tensor))
        else:
            state[name] = tensor.to(reader.dtype)
        del tensor  # before the next one is read
        if format_of_layer:
            trim_host_memory()
    state |= {name: tensor for name, tensor in dit.state_dict().items() if not tensor.is_meta}
    dit.load_state_dict(state, strict=True, assign=True)
    return dit.requires_grad_(False).eval()


def is_quantised_layer(name: str) -> bool:
    """Whether a DiT's weight of this BFL name is kept in a weight format where one is asked for."""
    return name.startswith(QUANTISED_PARTS) and name.endswith(".weight")


def check_merged(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    """Refuses a merged weight that is not finite in ``dtype``.

    Raises:
        ValueError: it is not.
    """
    if not fits_type(tensor, dtype):
        raise ValueError(
            f"merging makes {name} too large for {dtype}, or not finite; merge into bf16, or less strongly"
        )


def fits_type(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers are finite, and stay so in ``dtype``; without a copy of the tensor."""
    if not tensor.numel():
        return True
    low, high = (float(number) for number in torch.aminmax(tensor))  # not a number, where one of them is none
    return -low <= torch.finfo(dtype).max and high <= torch.finfo(dtype).max


class DiTReader:
    """The weights of a DiT checkpoint in BFL's names and layout, read one at a time; checked as `load_dit` does.

    Arguments and errors are those of `load_dit`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        *,
        variants: Mapping[str, Variant] = VARIANTS,
    ) -> None:
        self.source, description, self.variant, dit = _open_dit(path, variant, variants)
        self.device = torch.device(device)
        expected = dit.state_dict()
        steps = component_steps(self.source, description, "dit")
        _check_quantisation(self.source, description, steps)
        _check_names_and_shapes(self.source, description, steps, expected)
        self.dtype = dtype or _common_dtype(self.source, description, steps)
        """Type of all weights."""
        self.shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        """Of every weight, in the order of the model."""
        self.names = tuple(step.target for step in steps)
        """Of every weight, in the order of the file."""
        self._description = description
        self._scales = split_quantisation(self.source.names).scales
        self._steps = {step.target: step for step in steps}

    def make_empty(self) -> Flux2DiT:
        """The model these weights belong into, on the meta device."""
        with torch.device("meta"):
            return Flux2DiT(self.variant.dit)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One weight, by its BFL name, in `dtype` or in another type."""
        return _make(self.source, self._description, self._steps[name], self._scales, dtype or self.dtype, self.device)

    def dense_dtype(self, name: str) -> torch.dtype:
        """The type in which a weight loses nothing that matters: the stored one, bf16 for 8-bit floats."""
        stored = {self.source.dtype(source) for source in self._sources(name)} & FLOAT_DTYPES
        return max((dtype for dtype in stored if dtype), key=lambda dtype: dtype.itemsize, default=torch.bfloat16)

    def has_fp8(self, name: str, *, per_tensor: bool = False) -> bool:
        """Whether a weight is stored as 8-bit floats of one type with scales that `get_fp8` can give.

        Args:
            per_tensor: ask for one scale for the whole weight.
        """
        sources = self._sources(name)
        if len({self.source.dtype(source) for source in sources}) > 1 or (per_tensor and len(sources) > 1):
            return False
        shapes = {source: self.source.table[self._scales[source]].shape for source in sources if source in self._scales}
        fitting = (
            math.prod(shape) == 1 if per_tensor else has_row_scale(self.source.table[source].shape, shape)
            for source, shape in shapes.items()
        )
        return self.source.dtype(sources[0]) in FLOAT8_DTYPES and all(fitting)

    def fp8_dtype(self, name: str) -> torch.dtype:
        """The type of the 8-bit floats that `get_fp8` gives."""
        stored = self.source.dtype(self._sources(name)[0])
        assert stored is not None and self.has_fp8(name), name
        return stored

    def get_fp8(self, name: str) -> tuple[Tensor, Tensor]:
        """The stored 8-bit floats of a weight, and their scales as fp32 ``[out, 1]``."""
        step = self._steps[name]
        scales = []
        for source in self._sources(name):
            rows = self.source.table[source].shape[0]
            scale = self.source.get(self._scales[source]) if source in self._scales else torch.ones(())
            scales.append(row_scale(scale, rows).to(self.device))
        weight = _make(self.source, self._description, step, {}, self.fp8_dtype(name), self.device)
        return weight, step.apply(scales)

    def _sources(self, name: str) -> list[str]:
        return [self._description.prefix + source for source in self._steps[name].sources]


def _open_dit(
    path: str | os.PathLike[str], variant: str | None, variants: Mapping[str, Variant]
) -> tuple[TensorSource, FileDescription, Variant, Flux2DiT]:
    """A DiT checkpoint, its description, its variant, and the model it belongs into, on the meta device."""
    source = TensorSource(path, component="dit")
    description = detect(source, variants=variants)
    if description.kind != "dit":
        raise ValueError(describe_other(source, description, "a FLUX.2 DiT"))
    found = resolve_variant(source, variant, variants=variants)
    with torch.device("meta"):
        return source, description, found, Flux2DiT(found.dit)


def load_autoencoder(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Flux2Autoencoder:
    """Loads an autoencoder as `load_dit` loads a DiT; its shape is read from the file.

    The running statistics of the latents stay fp32 whatever ``dtype`` is. The number of normalisation groups cannot be
    seen in the shapes: it is 32 unless the file's metadata key ``flux2_kit.num_norm_groups`` says otherwise.

    Raises:
        ValueError: the file is missing, damaged, or something else than a FLUX.2 autoencoder.
    """
    source = TensorSource(path, component="autoencoder")
    description = detect(source)
    if description.kind != "autoencoder":
        raise ValueError(describe_other(source, description, "a FLUX.2 autoencoder"))
    steps = component_steps(source, description, "autoencoder")
    config = autoencoder_config(source, {step.target: _target_shape(source, description, step) for step in steps})
    with torch.device("meta"):
        autoencoder = Flux2Autoencoder(config)
    _load_weights(autoencoder, source, description, "autoencoder", dtype, torch.device(device))
    return arrange_channels(autoencoder)


def autoencoder_config(source: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderConfig:
    """The config of an autoencoder with these tensor shapes, in BFL names.

    Raises:
        ValueError: tensors that tell the shape are missing, or the number of groups does not fit.
    """
    text = source.metadata.get("flux2_kit.num_norm_groups", "32")
    try:
        encoder_levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
        decoder_levels = _count(shapes, "decoder.up.{}.block.0.conv1.weight")
        config = AutoencoderConfig(
            encoder_widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(encoder_levels)),
            decoder_widths=tuple(shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in range(decoder_levels)),
            num_res_blocks=_count(shapes, "encoder.down.0.block.{}.conv1.weight"),
            latent_channels=shapes["decoder.conv_in.weight"][1],
            num_norm_groups=int(text),
        )
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{source.path} is an incomplete FLUX.2 autoencoder: it has no {error}; download it again"
        ) from None
    except ValueError:
        raise ValueError(
            f"{source.path}: flux2_kit.num_norm_groups must be a whole number, got {text[:40]!r}"
        ) from None
    widths = (*config.encoder_widths, *config.decoder_widths)
    if not encoder_levels or not decoder_levels or config.num_norm_groups < 1:
        raise ValueError(
            f"{source.path} is an incomplete FLUX.2 autoencoder: it has no residual blocks; download it again"
        )
    if any(width % config.num_norm_groups for width in widths):
        raise ValueError(
            f"{source.path}: widths {sorted(set(widths))} are no multiples of {config.num_norm_groups} normalisation "
            "groups; the metadata key flux2_kit.num_norm_groups must name a number that divides them"
        )
    # How large a reference may be is no matter of shapes: the tiny model's limit comes from the table.
    known = (variant.autoencoder for variant in VARIANTS.values())
    return next((k for k in known if replace(config, reference_sides=k.reference_sides) == k), config)


def save_dit(
    path: str | os.PathLike[str],
    dit: Flux2DiT,
    variant: Variant,
    layout: Layout = "bfl",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the DiT's weights as one safetensors file, atomically; ``metadata`` is added to ours and wins over it.

    Raises:
        ValueError: the model has parameters that no plain checkpoint has, such as adapters or quantised weights.
    """
    tensors = convert(dit.state_dict(), "dit", "bfl", layout)
    if layout == "comfyui":
        tensors = {f"{COMFYUI_DIT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    return write_safetensors(path, tensors, dit_metadata(path, variant) | dict(metadata or {}))


def dit_metadata(path: str | os.PathLike[str], variant: Variant) -> dict[str, str]:
    """What a DiT checkpoint of ours says about itself."""
    return {
        "format": "pt",
        "flux2_kit.variant": variant.name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"Flux.2-{variant.name}",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": Path(path).stem,
        "modelspec.license": variant.license,
    }


def save_autoencoder(
    path: str | os.PathLike[str],
    autoencoder: Flux2Autoencoder,
    layout: Layout = "bfl",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the autoencoder's weights as one safetensors file, atomically."""
    tensors = convert(autoencoder.state_dict(), "autoencoder", "bfl", layout)
    ours = {
        "format": "pt",
        "flux2_kit.num_norm_groups": str(autoencoder.config.num_norm_groups),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Flux.2/vae",
        "modelspec.title": Path(path).stem,
    }
    return write_safetensors(path, tensors, ours | dict(metadata or {}))


def iterate_bfl(
    source: TensorSource,
    description: FileDescription,
    component: Component,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a component in BFL's name and layout; sources are read one target at a time.

    Args:
        dtype_of: the type a target (BFL name) shall have.
        device: where it shall be.
    """
    quantisation = split_quantisation(source.names)
    for step in component_steps(source, description, component):
        yield step.target, _make(source, description, step, quantisation.scales, dtype_of(step.target), device)


def _make(
    source: TensorSource,
    description: FileDescription,
    step: Step,
    scales: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    names = [description.prefix + name for name in step.sources]
    return step.apply([_read(source, name, scales.get(name), step, dtype, device) for name in names])


def _read(
    source: TensorSource, name: str, scale: str | None, step: Step, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One source tensor, dequantised, on its device.

    It is mapped where the result is the file's own bytes and copied otherwise: pages that were mapped only to be
    converted would count as memory of the process for as long as any other tensor of the file is in use.
    """
    stored = source.dtype(name)
    moves = step.operation in ("join", "swap_halves")
    kept_as_is = stored == dtype and scale is None and not moves and device.type == "cpu"
    kept_as_is = kept_as_is and source.num_bytes >= MAPPED_FROM_BYTES
    tensor = source.get(name, mapped=kept_as_is, device=device)
    if scale is not None:
        try:
            return dequantise(tensor, source.get(scale, device=device), dtype)
        except ValueError as error:
            raise ValueError(f"{scale} in {source.path}: {error}; give the bf16 file") from error
    return tensor.to(dtype)


# Under inference mode, as inside a ComfyUI node, the weights would be barred from any later training.
@torch.inference_mode(False)
def _load_weights(
    module: nn.Module,
    source: TensorSource,
    description: FileDescription,
    component: Component,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Puts the file's tensors in place of the meta tensors of ``module``, strictly."""
    expected = module.state_dict()
    steps = component_steps(source, description, component)
    _check_quantisation(source, description, steps)
    _check_names_and_shapes(source, description, steps, expected)
    common = dtype or _common_dtype(source, description, steps)

    def dtype_of(name: str) -> torch.dtype:
        # Every latent goes through these statistics, and they take no room: they keep their precision.
        return expected[name].dtype if name.startswith("bn.") else common

    state = dict(iterate_bfl(source, description, component, dtype_of, device))
    for name in AUTOENCODER_MISSING_ALLOWED & (expected.keys() - state.keys()):
        state[name] = torch.zeros((), dtype=expected[name].dtype, device=device)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _check_names_and_shapes(
    source: TensorSource, description: FileDescription, steps: list[Step], expected: Mapping[str, Tensor]
) -> None:
    shapes = {step.target: _target_shape(source, description, step) for step in steps}
    missing = sorted(expected.keys() - shapes.keys() - AUTOENCODER_MISSING_ALLOWED)
    unexpected = sorted(shapes.keys() - expected.keys())
    wrong = sorted(name for name in shapes.keys() & expected.keys() if shapes[name] != tuple(expected[name].shape))
    if missing or unexpected:
        raise ValueError(
            f"{source.path} does not fit the model: {len(missing)} tensors are missing ({_few(missing)}) and "
            f"{len(unexpected)} are too many ({_few(unexpected)}); give a complete, unmodified checkpoint"
        )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source.path}: {name} has shape {list(shapes[name])}, the model needs {list(expected[name].shape)}; "
            "give a checkpoint of the variant that was asked for"
        )


def _check_quantisation(source: TensorSource, description: FileDescription, steps: list[Step]) -> None:
    """Refuses number formats that are not plain floats or 8-bit floats times a scale."""
    quantisation = split_quantisation(source.names)
    advice = "give a bf16, fp16, fp32 or fp8 file of the model"
    for step in steps:
        for name in (description.prefix + name for name in step.sources):
            if step.target != "bn.num_batches_tracked" and source.dtype(name) not in FLOAT_DTYPES | FLOAT8_DTYPES:
                stored = source.table[name].dtype
                raise ValueError(f"{source.path}: {name} is quantised ({stored}) in a way that is not read; {advice}")
            scale = quantisation.scales.get(name)
            if scale is not None and source.dtype(scale) not in FLOAT_DTYPES:
                stored = source.table[scale].dtype
                raise ValueError(f"{source.path}: {name} has scales ({stored}) of a kind that is not read; {advice}")
    for name in quantisation.formats:
        if name.startswith(description.prefix):
            check_format(source, name)


def _common_dtype(source: TensorSource, description: FileDescription, steps: list[Step]) -> torch.dtype:
    """The type that most of the weights have, by number of elements; 8-bit floats are computed with as bf16."""
    counts: Counter[torch.dtype] = Counter()
    for step in steps:
        for name in step.sources:
            entry = source.table[description.prefix + name]
            stored = source.dtype(description.prefix + name)
            if stored in FLOAT_DTYPES | FLOAT8_DTYPES:
                counts[torch.bfloat16 if stored in FLOAT8_DTYPES else stored] += entry.num_elements
    return counts.most_common(1)[0][0]


def _target_shape(source: TensorSource, description: FileDescription, step: Step) -> tuple[int, ...]:
    return step.shape([source.table[description.prefix + name].shape for name in step.sources])


def _count(shapes: Mapping[str, tuple[int, ...]], template: str) -> int:
    """Number of names ``template.format(0)``, ``template.format(1)``, ... without a gap."""
    index = 0
    while template.format(index) in shapes:
        index += 1
    return index


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
