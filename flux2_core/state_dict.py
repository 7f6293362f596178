"""Parameter names of the three layouts in use, as tables, and the conversion of state dicts between them.

``bfl`` is the layout of Black Forest Labs' own files and of `Flux2DiT` and `Flux2Autoencoder`. ``diffusers`` is that of
`Flux2Transformer2DModel` and `AutoencoderKLFlux2`. ``comfyui`` is what ComfyUI saves: BFL's names under
``model.diffusion_model.`` for the DiT, the older top-level ``quant_conv`` for the autoencoder.

A conversion is planned by name first (`to_bfl`, `from_bfl`), one `Step` per tensor to make, so that a loader needs the
sources of one tensor in memory at a time. Names given to the planning functions carry no prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Component = Literal["dit", "autoencoder"]
Layout = Literal["bfl", "diffusers", "comfyui"]
Shape = tuple[int, ...]

COMFYUI_DIT_PREFIX = "model.diffusion_model."


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a family of BFL tensors is named and laid out elsewhere; ``{i}`` and ``{j}`` stand for indices."""

    bfl: str
    other: tuple[str, ...]
    """One name, or the names whose tensors, joined along dimension 0, make the BFL one."""
    relation: Literal["same", "join", "swap_halves", "convolution_to_linear"] = "same"
    """``swap_halves``: the two halves of dimension 0 change places. ``convolution_to_linear``: BFL's 1x1 convolution
    ``[C, C, 1, 1]`` is a Linear ``[C, C]`` there."""
    reversed_levels: bool = False
    """Whether ``{i}`` counts from the other end: BFL stores the decoder's levels by resolution, others as they run."""


@dataclass(frozen=True)
class Step:
    """One tensor to make from tensors of another layout."""

    target: str
    sources: tuple[str, ...]
    operation: Literal["same", "join", "part", "swap_halves", "to_linear", "to_convolution"] = "same"
    part: tuple[int, int] = (0, 1)
    """For ``part``: index and number of equal parts along dimension 0."""

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        """The target; where no data has to move it shares memory with the source."""
        if self.operation == "join":
            return torch.cat(list(tensors), dim=0)
        (tensor,) = tensors
        if self.operation == "part":
            return tensor.chunk(self.part[1], dim=0)[self.part[0]]
        if self.operation == "swap_halves":
            first, second = tensor.chunk(2, dim=0)
            return torch.cat((second, first), dim=0)
        if self.operation == "to_linear":
            return tensor.flatten(1)
        if self.operation == "to_convolution":
            return tensor[:, :, None, None]
        return tensor

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The target's shape from the sources' shapes.

        Raises:
            ValueError: tensors to join are not of one shape.
        """
        first = shapes[0]
        if self.operation == "join":
            if len(set(shapes)) > 1 or not first:
                raise ValueError(f"{', '.join(self.sources)} must have one shape, got {', '.join(map(str, shapes))}")
            return (sum(shape[0] for shape in shapes), *first[1:])
        if self.operation == "part":
            return (first[0] // self.part[1], *first[1:])
        if self.operation == "to_linear":
            return first[:2]
        if self.operation == "to_convolution":
            return (*first, 1, 1)
        return first


def _dit_rules_diffusers() -> tuple[Rule, ...]:
    modules = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        "double_blocks.{i}.img_attn.proj": "transformer_blocks.{i}.attn.to_out.0",
        "double_blocks.{i}.txt_attn.proj": "transformer_blocks.{i}.attn.to_add_out",
        "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.linear_in",
        "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.linear_out",
        "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.linear_in",
        "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.linear_out",
        "single_blocks.{i}.linear1": "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj",
        "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.attn.to_out",
    }
    norms = {
        "double_blocks.{i}.img_attn.norm.query_norm": "transformer_blocks.{i}.attn.norm_q",
        "double_blocks.{i}.img_attn.norm.key_norm": "transformer_blocks.{i}.attn.norm_k",
        "double_blocks.{i}.txt_attn.norm.query_norm": "transformer_blocks.{i}.attn.norm_added_q",
        "double_blocks.{i}.txt_attn.norm.key_norm": "transformer_blocks.{i}.attn.norm_added_k",
        "single_blocks.{i}.norm.query_norm": "single_transformer_blocks.{i}.attn.norm_q",
        "single_blocks.{i}.norm.key_norm": "single_transformer_blocks.{i}.attn.norm_k",
    }
    fused = {
        "double_blocks.{i}.img_attn.qkv": ("to_q", "to_k", "to_v"),
        "double_blocks.{i}.txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    return (
        *(Rule(bfl=f"{bfl}.weight", other=(f"{other}.weight",)) for bfl, other in modules.items()),
        *(Rule(bfl=f"{bfl}.scale", other=(f"{other}.weight",)) for bfl, other in norms.items()),
        *(
            Rule(
                bfl=f"{bfl}.weight",
                other=tuple(f"transformer_blocks.{{i}}.attn.{name}.weight" for name in names),
                relation="join",
            )
            for bfl, names in fused.items()
        ),
        # BFL's modulation of the last layer is (shift, scale), diffusers' is (scale, shift).
        Rule(bfl="final_layer.adaLN_modulation.1.weight", other=("norm_out.linear.weight",), relation="swap_halves"),
    )


def _dit_rules_comfyui() -> tuple[Rule, ...]:
    """BFL's names, with the norms under either of the two names ComfyUI has saved them by."""
    names = [rule.bfl for rule in DIT_RULES_DIFFUSERS]
    renamed = [name for name in names if name.endswith("_norm.scale")]
    return (
        *(Rule(bfl=name, other=(name,)) for name in names),
        *(Rule(bfl=name, other=(f"{name.removesuffix('.scale')}.weight",)) for name in renamed),
    )


def _autoencoder_rules(layout: Literal["diffusers", "comfyui"]) -> tuple[Rule, ...]:
    same = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    plain = {name: name for name in same}
    plain |= {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    reversed_modules: dict[str, str] = {}
    attention: dict[str, str] = {}
    resnet = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    projections = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid"
        plain[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        plain[f"{middle}.attn_1.norm"] = f"{side}.mid_block.attentions.0.group_norm"
        for bfl, other in projections.items():
            attention[f"{middle}.attn_1.{bfl}"] = f"{side}.mid_block.attentions.0.{other}"
        for bfl, other in resnet.items():
            for index in (0, 1):
                plain[f"{middle}.block_{index + 1}.{bfl}"] = f"{side}.mid_block.resnets.{index}.{other}"
    for bfl, other in resnet.items():
        plain[f"encoder.down.{{i}}.block.{{j}}.{bfl}"] = f"encoder.down_blocks.{{i}}.resnets.{{j}}.{other}"
        reversed_modules[f"decoder.up.{{i}}.block.{{j}}.{bfl}"] = f"decoder.up_blocks.{{i}}.resnets.{{j}}.{other}"
    plain["encoder.down.{i}.downsample.conv"] = "encoder.down_blocks.{i}.downsamplers.0.conv"
    reversed_modules["decoder.up.{i}.upsample.conv"] = "decoder.up_blocks.{i}.upsamplers.0.conv"

    statistics = tuple(
        Rule(bfl=name, other=(name,)) for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    )
    if layout == "comfyui":
        moved = {"encoder.quant_conv", "decoder.post_quant_conv"}
        renamed = {
            name: name.split(".", 1)[1] if name in moved else name for name in plain | reversed_modules | attention
        }
        return statistics + tuple(
            Rule(bfl=f"{bfl}.{kind}", other=(f"{other}.{kind}",))
            for bfl, other in renamed.items()
            for kind in ("weight", "bias")
        )
    return (
        *statistics,
        *(Rule(bfl=f"{b}.{kind}", other=(f"{o}.{kind}",)) for b, o in plain.items() for kind in ("weight", "bias")),
        *(
            Rule(bfl=f"{b}.{kind}", other=(f"{o}.{kind}",), reversed_levels=True)
            for b, o in reversed_modules.items()
            for kind in ("weight", "bias")
        ),
        *(Rule(bfl=f"{b}.bias", other=(f"{o}.bias",)) for b, o in attention.items()),
        *(
            Rule(bfl=f"{b}.weight", other=(f"{o}.weight",), relation="convolution_to_linear")
            for b, o in attention.items()
        ),
    )


DIT_RULES_DIFFUSERS = _dit_rules_diffusers()
"""Every tensor of a DiT, in BFL's and in diffusers' name."""
AUTOENCODER_RULES_DIFFUSERS = _autoencoder_rules("diffusers")
"""Every tensor of an autoencoder, in BFL's and in diffusers' name."""


@lru_cache
def rules(component: Component, layout: Layout) -> tuple[Rule, ...]:
    """The table between ``bfl`` and ``layout``; where a BFL name occurs twice, the first entry is the one written."""
    if component == "dit":
        if layout == "comfyui":
            return _dit_rules_comfyui()
        table = DIT_RULES_DIFFUSERS
    else:
        if layout == "comfyui":
            return _autoencoder_rules("comfyui")
        table = AUTOENCODER_RULES_DIFFUSERS
    if layout == "diffusers":
        return table
    if layout == "bfl":
        return tuple(Rule(bfl=rule.bfl, other=(rule.bfl,)) for rule in table)
    raise ValueError(f"unknown layout {layout!r}; known layouts: {', '.join(get_args(Layout))}")


def to_bfl(names: Iterable[str], component: Component, layout: Layout) -> list[Step]:
    """Plans the BFL tensors that ``names`` of ``layout`` make, in BFL names sorted as given.

    Raises:
        ValueError: a name is unknown, two of them mean one tensor, or a part of a fused tensor is missing.
    """
    names = list(names)
    table = _compiled(component, layout, "other")
    levels = _count_levels(names)
    unknown: list[str] = []
    parts: dict[str, dict[int, str]] = {}
    chosen: dict[str, Rule] = {}
    for name in names:
        found = _match(name, table)
        if found is None:
            unknown.append(name)
            continue
        rule, position, indices = found
        target = _fill(rule.bfl, indices, levels if rule.reversed_levels else None)
        if position in parts.setdefault(target, {}):
            raise ValueError(
                f"{name!r} and {parts[target][position]!r} are the same tensor; the file must hold one of them"
            )
        parts[target][position] = name
        chosen[target] = rule
    if unknown:
        raise ValueError(_unknown_message(unknown, component, layout))

    steps = []
    for target, by_position in parts.items():
        rule = chosen[target]
        if len(by_position) != len(rule.other):
            raise ValueError(
                f"{' and '.join(by_position.values())} came without its counterpart: {target} needs all of "
                f"{', '.join(name.rsplit('.', 2)[-2] for name in rule.other)}; the file is incomplete"
            )
        sources = tuple(by_position[position] for position in range(len(rule.other)))
        operation = "to_convolution" if rule.relation == "convolution_to_linear" else rule.relation
        steps.append(Step(target, sources, operation))
    return steps


def from_bfl(names: Iterable[str], component: Component, layout: Layout) -> list[Step]:
    """Plans the tensors of ``layout`` that BFL ``names`` make.

    Raises:
        ValueError: a name is unknown.
    """
    names = list(names)
    table = _compiled(component, layout, "bfl")
    levels = _count_levels(names)
    steps: list[Step] = []
    unknown: list[str] = []
    for name in names:
        found = _match(name, table)
        if found is None:
            unknown.append(name)
            continue
        rule, _, indices = found
        if layout == "diffusers" and name == "bn.num_batches_tracked":
            continue
        count = len(rule.other)
        for position, template in enumerate(rule.other):
            target = _fill(template, indices, levels if rule.reversed_levels else None)
            if rule.relation == "join":
                steps.append(Step(target, (name,), "part", (position, count)))
            elif rule.relation == "convolution_to_linear":
                steps.append(Step(target, (name,), "to_linear"))
            else:
                steps.append(Step(target, (name,), rule.relation))
    if unknown:
        raise ValueError(_unknown_message(unknown, component, "bfl"))
    return steps


def convert(tensors: Mapping[str, Tensor], component: Component, source: Layout, target: Layout) -> dict[str, Tensor]:
    """A state dict in another layout, without prefixes; tensors that need no change are shared, not copied.

    Raises:
        ValueError: a name is unknown in ``source``.
    """
    steps = to_bfl(tensors, component, source)
    bfl = {step.target: step.apply([tensors[name] for name in step.sources]) for step in steps}
    steps = from_bfl(bfl, component, target)
    return {step.target: step.apply([bfl[name] for name in step.sources]) for step in steps}


def _compiled(
    component: Component, layout: Layout, side: Literal["bfl", "other"]
) -> list[tuple[re.Pattern[str], Rule, int]]:
    return _compile(rules(component, layout), side)


@lru_cache
def _compile(table: tuple[Rule, ...], side: Literal["bfl", "other"]) -> list[tuple[re.Pattern[str], Rule, int]]:
    compiled = []
    for rule in table:
        for position, template in enumerate((rule.bfl,) if side == "bfl" else rule.other):
            pattern = re.escape(template).replace(r"\{i\}", r"(?P<i>\d{1,4})").replace(r"\{j\}", r"(?P<j>\d{1,4})")
            compiled.append((re.compile(pattern), rule, position))
    return compiled


def _match(name: str, table: list[tuple[re.Pattern[str], Rule, int]]) -> tuple[Rule, int, dict[str, int]] | None:
    for pattern, rule, position in table:
        if found := pattern.fullmatch(name):
            return rule, position, {key: int(value) for key, value in found.groupdict().items()}
    return None


def _fill(template: str, indices: dict[str, int], levels: int | None) -> str:
    if levels is not None:
        indices = indices | {"i": levels - 1 - indices["i"]}
    return template.format(**indices)


def _count_levels(names: Iterable[str]) -> int:
    """Resolutions of an autoencoder's decoder, in any layout."""
    found = (re.match(r"decoder\.up(?:_blocks)?\.(\d{1,4})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _unknown_message(unknown: Sequence[str], component: Component, layout: Layout) -> str:
    what = "DiT" if component == "dit" else "autoencoder"
    shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
    return (
        f"{len(unknown)} of the names are no part of a FLUX.2 {what} in {layout} layout: {shown}; "
        "give an unmodified FLUX.2 checkpoint"
    )
