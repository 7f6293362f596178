"""What a checkpoint holds, told by its tensors' names and shapes, never by its file name.

Only which of several variants of one shape it is (base, distilled, KV) cannot be seen in the tensors: `resolve_variant`
takes that from the user, the metadata, the files around it, and the file name, in this order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .files import read_json_object
from .quantization import WEIGHT_FORMAT_KEY, Quantisation, has_row_scale, split_quantisation
from .state_dict import Component, Layout, Step, to_bfl
from .variants import VARIANTS, Variant

if TYPE_CHECKING:
    from .tensor_source import TensorSource

Kind = Literal["dit", "autoencoder", "text_encoder", "lora", "other"]

DIT_ANCHORS: dict[str, Layout] = {
    "double_stream_modulation_img.lin.weight": "bfl",
    "double_stream_modulation_img.linear.weight": "diffusers",
}
"""Tensors that only FLUX.2 has: FLUX.1 and its relatives modulate each block by weights of its own."""
AUTOENCODER_ANCHORS: dict[str, Layout] = {
    "encoder.down_blocks.0.resnets.0.conv1.weight": "diffusers",
    "encoder.down.0.block.0.conv1.weight": "bfl",
}
OTHER_PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "transformer.", "vae.", "first_stage_model.", "text_encoders.",
    "cond_stage_model.", "conditioner.", "model_ema.",
)  # fmt: skip
"""How the parts of an all-in-one checkpoint begin; beside the part that is asked for, the others are left alone."""
LORA_ENDINGS = (
    ".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora_down.default.weight", ".lora.down.weight",
)  # fmt: skip
LYCORIS_ENDINGS = (".lokr_w1", ".lokr_w1_a", ".hada_w1_a")

FOREIGN_MODELS: tuple[tuple[str, str], ...] = (
    ("a FLUX.1 DiT", r"double_blocks\.0\.img_mod\.lin\.weight|single_transformer_blocks\.0\.norm\.linear\.weight"),
    ("a Chroma DiT", r"distilled_guidance_layer\."),
    ("a HunyuanVideo DiT", r"txt_in\.individual_token_refiner\."),
    ("a Qwen-Image DiT", r"transformer_blocks\.0\.img_mod\.1\.weight"),
    ("a Stable Diffusion 3 checkpoint", r"joint_blocks\.0\.(x_block|context_block)\."),
    ("a Z-Image DiT", r"cap_pad_token|x_pad_token"),
    ("a Lumina 2 DiT", r"noise_refiner\.0\."),
    ("a Wan DiT", r"blocks\.0\.self_attn\.q\.weight|blocks\.0\.attn2\.add_k_proj\.weight"),
    ("an LTX-Video DiT", r"patchify_proj\.weight"),
    ("an SDXL checkpoint", r"conditioner\.embedders\.|label_emb\.0\.0\.weight|add_embedding\.linear_1\.weight"),
    ("a Stable Diffusion 2 checkpoint", r"cond_stage_model\.model\."),
    (
        "a Stable Diffusion 1.5 checkpoint",
        r"cond_stage_model\.transformer\.|input_blocks\.1\.1\.|down_blocks\.0\.attentions\.0\.",
    ),
    ("a T5 text encoder", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"),
    ("a CLIP text encoder", r"text_model\.encoder\.layers\.0\.|transformer\.resblocks\.0\."),
)
"""What other models look like: description and a pattern that one of their names begins with, after any prefix."""


@dataclass(frozen=True, kw_only=True)
class FileDescription:
    """What a checkpoint holds."""

    kind: Kind
    what: str
    """For people, with an article: "a FLUX.2 DiT", "an SDXL checkpoint"."""
    layout: Literal["bfl", "diffusers", "comfyui", "comfyui-scaled-fp8", "unknown"] = "unknown"
    names: Layout = "bfl"
    """Whose names the tensors have; "comfyui-scaled-fp8" files come in any."""
    prefix: str = ""
    """What stands before every name of the component."""
    size: str = ""
    """Parameters in short, such as "9B"."""
    precision: str = ""
    """Types of the weights, largest share first, such as "fp8 scaled + bf16"."""
    num_parameters: int
    num_bytes: int
    """As stored, scales included."""
    rank: int | None = None
    """Largest rank of a LoRA."""
    num_targets: int | None = None
    """Number of layers a LoRA adapts."""
    variants: tuple[str, ...] = ()
    """Names of the variants that have this shape."""


def detect(source: TensorSource, *, variants: Mapping[str, Variant] = VARIANTS) -> FileDescription:
    """Describes a checkpoint; of one that holds several components, the one the source was opened for or the DiT."""
    wanted: tuple[Component, ...] = (
        ("autoencoder", "dit") if source.component == "autoencoder" else ("dit", "autoencoder")
    )
    if (lora := _detect_lora(source)) is not None:
        return lora
    for component in wanted:
        if (found := _detect_component(source, component, variants)) is not None:
            return found
    if (text_encoder := _detect_text_encoder(source, variants)) is not None:
        return text_encoder
    common: dict[str, Any] = _counts(source, source.names)
    for what, pattern in FOREIGN_MODELS:
        expression = re.compile(rf"(?:.*\.)?(?:{pattern})")
        if any(expression.match(name) for name in source.names):
            return FileDescription(kind="other", what=what, **common)
    if any(name.endswith("decoder.conv_in.weight") for name in source.names):
        channels = next(source.table[n].shape[1] for n in source.names if n.endswith("decoder.conv_in.weight"))
        what = f"an autoencoder with {channels} latent channels, of another model than FLUX.2"
        return FileDescription(kind="other", what=what, **common)
    return FileDescription(kind="other", what=f"an unknown checkpoint ({_few_names(source)})", **common)


def resolve_variant(
    source: TensorSource, requested: str | None = None, *, variants: Mapping[str, Variant] = VARIANTS
) -> Variant:
    """The variant of a DiT checkpoint.

    The shapes leave a few candidates. Among them decide, in this order: ``requested``; the metadata; the
    ``model_index.json`` and ``config.json`` of a diffusers folder; the name of the file, then of its folders.

    Args:
        requested: a name of ``variants``; None and "auto" leave it to the file.

    Raises:
        ValueError: ``requested`` is unknown or of other shapes, or nothing tells the candidates apart.
    """
    description = detect(source, variants=variants)
    if description.kind != "dit":
        raise ValueError(describe_other(source, description, "a FLUX.2 DiT"))
    candidates = description.variants
    requested = None if requested == "auto" else requested
    if requested is not None and requested not in variants:
        raise ValueError(f"unknown variant {requested!r}; known variants: auto, {', '.join(variants)}")
    if not candidates:
        raise ValueError(
            f"{source.path} is {description.what} of no known variant's shape ({_shape_summary(source, description)}); "
            f"known variants: {', '.join(variants)}"
        )
    if requested is not None:
        if requested not in candidates:
            raise ValueError(
                f"{source.path} is {description.what} of the shape of {' or '.join(candidates)}, not of {requested}; "
                "choose auto or a variant that fits"
            )
        return variants[requested]
    if len(candidates) == 1:
        return variants[candidates[0]]
    for text in (_metadata_text(source), _diffusers_text(source, candidates, variants), *_path_texts(source)):
        if (name := _variant_in_text(text, candidates)) is not None:
            return variants[name]
    raise ValueError(
        f"{source.path} has the shape of {', '.join(candidates)} and nothing in it tells them apart; name the variant"
    )


def describe_other(source: TensorSource, description: FileDescription, wanted: str) -> str:
    """The message for a file of another kind than was asked for."""
    return f"{source.path} is {description.what}, not {wanted}; give {wanted} as a .safetensors file or a model folder"


def component_steps(source: TensorSource, description: FileDescription, component: Component) -> list[Step]:
    """How to make the component's BFL tensors from the file's, by names without the prefix.

    Raises:
        ValueError: the file holds names that are no part of the component.
    """
    names = []
    for name in split_quantisation(source.names).weights:
        if name.startswith(description.prefix):
            names.append(name.removeprefix(description.prefix))
        elif not name.startswith(OTHER_PREFIXES):
            raise ValueError(f"{source.path} holds {name!r} beside {description.what}; give an unmodified checkpoint")
    try:
        return to_bfl(names, component, description.names)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None


def _detect_component(
    source: TensorSource, component: Component, variants: Mapping[str, Variant]
) -> FileDescription | None:
    anchors = DIT_ANCHORS if component == "dit" else AUTOENCODER_ANCHORS
    anchor, found = next(((a, n) for a in anchors for n in source.names if n == a or n.endswith(f".{a}")), (None, None))
    if anchor is None or found is None:
        return None
    prefix, layout = found.removesuffix(anchor), anchors[anchor]
    if component == "autoencoder" and f"{prefix}bn.running_mean" not in source.table:
        return None  # FLUX.1, SD: the same blocks without the statistics of packed latents

    quantisation = split_quantisation(source.names)
    names = [name for name in quantisation.weights if name.startswith(prefix)]
    if layout == "bfl" and (
        any(name.endswith("_norm.weight") for name in names)
        if component == "dit"
        else f"{prefix}quant_conv.weight" in source.table
    ):
        layout = "comfyui"
    scaled = [weight for weight in quantisation.scales if weight in source.table and weight.startswith(prefix)]
    from_comfyui = layout == "bfl" and prefix.endswith("diffusion_model.")
    from_here = WEIGHT_FORMAT_KEY in source.metadata
    shown = "comfyui-scaled-fp8" if scaled and not from_here else "comfyui" if from_comfyui else layout
    counts: dict[str, Any] = _counts(source, names, quantisation)
    counts["num_bytes"] = sum(entry.num_bytes for name, entry in source.table.items() if name.startswith(prefix))
    what = "a FLUX.2 DiT" if component == "dit" else "a FLUX.2 autoencoder"
    description = FileDescription(kind=component, what=what, layout=shown, names=layout, prefix=prefix, **counts)
    if component == "autoencoder":
        return description
    candidates = _dit_candidates(source, description, variants)
    return replace(description, variants=candidates)


def _dit_candidates(
    source: TensorSource, description: FileDescription, variants: Mapping[str, Variant]
) -> tuple[str, ...]:
    try:
        shape = _dit_shape(source, description)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return ()  # to describe a damaged file is no error; to load it is, and says what is wrong
    return tuple(
        name for name, variant in variants.items() if all(getattr(variant.dit, key) == shape[key] for key in shape)
    )


def _dit_shape(source: TensorSource, description: FileDescription) -> dict[str, Any]:
    """The fields of `DiTConfig` that can be seen in the shapes."""
    steps = component_steps(source, description, "dit")
    shapes = {
        step.target: step.shape([source.table[description.prefix + name].shape for name in step.sources])
        for step in steps
    }
    hidden, in_channels = shapes["img_in.weight"]
    head_dim = shapes["single_blocks.0.norm.query_norm.scale"][0]
    return {
        "hidden_size": hidden,
        "num_heads": hidden // head_dim,
        "num_double_blocks": _count_blocks(shapes, "double_blocks"),
        "num_single_blocks": _count_blocks(shapes, "single_blocks"),
        "context_dim": shapes["txt_in.weight"][1],
        "has_guidance_embedder": "guidance_in.in_layer.weight" in shapes,
        "in_channels": in_channels,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.2.weight"][1] // hidden,
    }


def _shape_summary(source: TensorSource, description: FileDescription) -> str:
    try:
        return ", ".join(f"{key} {value}" for key, value in _dit_shape(source, description).items())
    except (KeyError, IndexError, ZeroDivisionError) as error:
        return f"incomplete, at {error}"
    except ValueError as error:
        return str(error)


def _count_blocks(shapes: Mapping[str, Any], stem: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{stem}.")})


def _detect_lora(source: TensorSource) -> FileDescription | None:
    down = [name for name in source.names if name.endswith(LORA_ENDINGS)]
    lycoris = [name for name in source.names if name.endswith(LYCORIS_ENDINGS)]
    if not down and not lycoris:
        return None
    ranks = [source.table[name].shape[0] for name in down if source.table[name].shape]
    what = "a LoRA" if down else "a LyCORIS adapter (LoKr or LoHa)"
    counts: dict[str, Any] = _counts(source, source.names)
    return FileDescription(
        kind="lora", what=what, rank=max(ranks, default=None), num_targets=len(down) + len(lycoris), **counts
    )


def _detect_text_encoder(source: TensorSource, variants: Mapping[str, Variant]) -> FileDescription | None:
    """Mistral and Qwen3 language models, by their first layer; a T5 or a CLIP has other names."""
    query = next((n for n in source.names if n.endswith("layers.0.self_attn.q_proj.weight")), None)
    embedding = next((n for n in source.names if n.endswith("embed_tokens.weight")), None)
    if query is None or embedding is None or "text_model.encoder" in query:
        return None
    prefix = query.removesuffix("layers.0.self_attn.q_proj.weight")
    hidden = source.table[embedding].shape[-1]
    family = "qwen3" if f"{prefix}layers.0.self_attn.q_norm.weight" in source.table else "mistral"
    layers = {
        n.removeprefix(f"{prefix}layers.").split(".")[0] for n in source.names if n.startswith(f"{prefix}layers.")
    }
    fitting = tuple(
        name
        for name, variant in variants.items()
        if variant.text_encoder.family == family
        and variant.text_encoder.hidden_size == hidden
        and variant.text_encoder.num_layers <= len(layers)
    )
    quantisation = split_quantisation(source.names)
    counts: dict[str, Any] = _counts(source, list(quantisation.weights), quantisation)
    named = {"qwen3": "a Qwen3", "mistral": "a Mistral or Llama"}[family]
    return FileDescription(
        kind="text_encoder",
        what=f"{named} language model of {len(layers)} layers and width {hidden}",
        layout="comfyui-scaled-fp8" if quantisation.scales else "unknown",
        prefix=prefix,
        variants=fitting,
        **counts,
    )


PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8 e5m2"}


def _counts(source: TensorSource, names: list[str], quantisation: Quantisation | None = None) -> dict[str, Any]:
    scales = quantisation.scales if quantisation else {}
    elements: Counter[str] = Counter()
    for name in names:
        entry = source.table[name]
        precision = PRECISIONS.get(entry.dtype, entry.dtype.lower())
        if name in scales:
            scale = source.table[scales[name]]
            rows, blocks = has_row_scale(entry.shape, scale.shape), scale.num_elements > 1
            precision += " scaled" + ("" if not blocks else " by row" if rows else " by block")
        elements[precision] += entry.num_elements
    total = sum(elements.values())
    # A few norms or counters of another type are not worth a mention.
    shown = [name for name, count in elements.most_common() if count >= total / 1000]
    return {
        "num_parameters": total,
        "num_bytes": source.num_bytes,
        "size": _short_count(total),
        "precision": " + ".join(shown),
    }


def _short_count(count: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.0f}{letter}"
    return str(count)


def _metadata_text(source: TensorSource) -> str:
    """What the file says about itself, most telling first; our own key names the variant outright."""
    keys = ("flux2_kit.variant", "modelspec.architecture", "modelspec.title")
    return "\n".join(source.metadata[key] for key in keys if key in source.metadata)


def _diffusers_text(source: TensorSource, candidates: tuple[str, ...], variants: Mapping[str, Variant]) -> str:
    """A variant's name, when the JSON files of a diffusers folder leave one; else what they are called after."""
    index = _read_json(source.folder.parent / "model_index.json") or _read_json(source.folder / "model_index.json")
    class_name = index.get("_class_name")
    if isinstance(class_name, str) and "KV" in class_name:
        matching = [name for name in candidates if name.endswith("-kv")]
    else:
        distilled = index.get("is_distilled")
        matching = [
            name
            for name in candidates
            if isinstance(distilled, bool) and variants[name].distilled is distilled and not name.endswith("-kv")
        ]
    if len(matching) == 1:
        return matching[0]
    config = _read_json(source.folder / "config.json")
    return "\n".join(str(data.get("_name_or_path", "")) for data in (config, index))


def _path_texts(source: TensorSource) -> list[str]:
    """The file's name, then those of its folders up to the one a Hugging Face cache names after the repository."""
    files = [source.path.name, *(file.name for file in source.files[:1])]
    folder = source.folder.absolute()
    return [*files, *(parent.name for parent in [folder, *folder.parents][:4])]


def _variant_in_text(text: str, candidates: tuple[str, ...]) -> str | None:
    """The one candidate that a text names, line by line; names may be written klein-9b, Klein_9B, klein9b.

    A klein that is called neither base nor KV is the distilled one, provided its size is named: BFL's own files are
    called that way.
    """
    for line in text.splitlines():
        words = re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")
        if words in candidates:
            return words
        match = re.search(r"klein-?(base-?)?(4b|9b)?((?:-[a-z0-9]+)*)", words)
        if match is None:
            continue
        rest = match[3].split("-")
        base = bool(match[1]) or "base" in rest
        kv = "kv" in rest
        if not base and not kv and match[2] is None:
            continue
        matching = [
            name
            for name in candidates
            if ("base" in name) == base and name.endswith("-kv") == kv and (match[2] is None or match[2] in name)
        ]
        if len(matching) == 1:
            return matching[0]
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON object beside the weights; a folder without one, or with a broken one, says nothing."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _few_names(source: TensorSource) -> str:
    names = ", ".join(source.names[:3])
    return f"{len(source.names)} tensors, such as {names}" if names else "no tensors"
