"""Text encoders of FLUX.2: prompts to the text embedding that the DiT reads.

The networks are transformers' own Mistral and Qwen3, built with only the layers whose states are used: 30 of 40 in
Mistral Small, 27 of 36 in Qwen3; no vision tower and no output head.

The DiT attends to padding too, so states of pad tokens count: they depend on the pad token, on the padding side and,
for left padding (rows that attend to nothing), on the attention implementation. All three are as in BFL's and
diffusers' pipelines; attention is PyTorch's scaled dot product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .files import read_json_object
from .host_memory import trim_host_memory
from .linear import FORMATS, Linear, Precision, WeightFormat, split_precision
from .quantization import (
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    ROLES,
    check_format,
    dequantise,
    has_row_scale,
    row_scale,
    split_quantisation,
)
from .tensor_source import TensorSource
from .tokenizer import Family, PromptTokenizer, find_tokenizer
from .variants import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, QWEN3_TINY, TextEncoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where the language model's tensors sit in the layouts that are read. The longest that fits is taken.
PREFIXES = (
    "language_model.model.",  # Mistral3ForConditionalGeneration as transformers saves it
    "model.language_model.",  # the same, under the names of its modules
    "language_model.",
    "model.",  # causal language models, ComfyUI
    "",
)
# Parts of a checkpoint, after any prefix, that are not needed for text embeddings.
UNUSED_PARTS: dict[Family, tuple[str, ...]] = {
    "mistral": ("lm_head.", "norm.", "vision_tower.", "multi_modal_projector."),
    "qwen3": ("lm_head.", "norm."),
}
# Single tensors ComfyUI puts into its files: a tokenizer, and the mark of its fp8 format.
UNUSED_NAMES = ("tekken_model", "scaled_fp8")


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings:
    """What a language model's tensor shapes do not tell, or not alone."""

    rope_theta: float
    rms_norm_eps: float
    num_heads: int
    num_key_value_heads: int
    head_dim: int


# ComfyUI's single files bring no config.json. Keyed by family and hidden size.
# Sources: config.json of mistralai/Mistral-Small-3.2-24B-Instruct-2506, Qwen/Qwen3-4B, Qwen/Qwen3-8B.
KNOWN_SETTINGS: dict[tuple[Family, int], LanguageModelSettings] = {
    ("mistral", 5120): LanguageModelSettings(
        rope_theta=1e9, rms_norm_eps=1e-5, num_heads=32, num_key_value_heads=8, head_dim=128
    ),
    ("qwen3", 2560): LanguageModelSettings(
        rope_theta=1e6, rms_norm_eps=1e-6, num_heads=32, num_key_value_heads=8, head_dim=128
    ),
    ("qwen3", 4096): LanguageModelSettings(
        rope_theta=1e6, rms_norm_eps=1e-6, num_heads=32, num_key_value_heads=8, head_dim=128
    ),
}
MODEL_NAMES: dict[tuple[Family, int], str] = {
    ("mistral", 5120): "Mistral Small 3 (24B)",
    ("qwen3", 2560): "Qwen3-4B",
    ("qwen3", 4096): "Qwen3-8B",
}
CONFIGS = (MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, QWEN3_TINY)


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """Text embeddings of a batch of prompts."""

    embeddings: Tensor
    """``[B, max_tokens, len(layers) * hidden_size]`` in the encoder's dtype; channels grouped by layer."""
    attention_mask: Tensor
    """int64 ``[B, max_tokens]``, 0 on padding. The DiT takes no mask; this tells prompt from padding."""
    num_cut: tuple[int, ...]
    """Tokens cut off the end of each prompt because it was too long, template included."""


class TextEncoder:
    """A language model cut to the layers that are used, with its tokenizer.

    Args:
        model: transformers' ``MistralModel`` or ``Qwen3Model`` without final norm.
        tokenizer: of the same family.
        config: layers that are stacked, and the number of tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PromptTokenizer, config: TextEncoderConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and embeddings."""
        return self.model.get_input_embeddings().weight.dtype  # pyright: ignore[reportReturnType]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        # Neither layers nor the token embedding need to be there, see `streaming`.
        return self.model.rotary_emb.inv_freq.device  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    def to(self, device: str | torch.device) -> TextEncoder:
        """Moves the weights and returns itself."""
        nn.Module.to(self.model, device)
        return self

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        """Embeds prompts, empty ones included, without gradients.

        The result can be used in training even when called inside ``torch.inference_mode``.

        Raises:
            ValueError: ``prompts`` is a single string or holds nothing.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
        with torch.inference_mode(False), torch.no_grad():
            tokens = self.tokenizer(prompts, self.config.max_tokens)
            attention_mask = tokens.attention_mask.to(self.device)
            output = self.model(
                input_ids=tokens.ids.to(self.device),
                attention_mask=attention_mask,
                output_hidden_states=True,
                use_cache=False,
            )
            states = output.hidden_states  # state 0 is the token embedding, state k the output of layer k
            embeddings = torch.cat([states[layer] for layer in self.config.layers], dim=-1)
        return TextEncoding(embeddings=embeddings, attention_mask=attention_mask, num_cut=tokens.num_cut)


def load_text_encoder(
    path: str | Path,
    config: TextEncoderConfig | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
    last_tokenizer_directories: Iterable[Path] = (),
) -> TextEncoder:
    """Loads a text encoder and its tokenizer.

    Args:
        path: a Hugging Face folder, a diffusers repository with ``text_encoder`` and ``tokenizer`` in it, a shard, or
            a single file as ComfyUI uses it. Layers that are not used may be missing; fp8 weights with scales
            are multiplied out.
        config: what the DiT needs; None takes what fits the file.
        tokenizer: folder or file; None looks into and beside the weights, then into the local Hugging Face cache.
        dtype: of the plain weights, and so of the embeddings; None keeps the file's, bfloat16 for fp8.
        device: where the weights go; they pass through host memory one tensor at a time.
        precision: "fp8" or "nf4" quantise the Linears of the layers, one after the other; fp8 numbers of a file with a
            scale per tensor or per row are taken as they are. "bf16" is ``dtype`` bf16. None keeps plain weights.
        last_tokenizer_directories: where a tokenizer may lie that did not come with the weights; searched last.

    Raises:
        ValueError: the weights or the tokenizer are missing, incomplete, or of another model than ``config`` needs;
            ``dtype`` contradicts ``precision``, or nf4 cannot be computed here.
    """
    dtype, weight_format = split_precision(precision, dtype)
    with torch.inference_mode(False), torch.no_grad():
        source = TensorSource(path, component="text_encoder")
        weights = LanguageModelWeights(source)
        config = matching_config(weights, config)
        settings = language_model_settings(weights, config)
        embedded = source.get("tekken_model") if "tekken_model" in source.table else None
        prompt_tokenizer = find_tokenizer(
            weights.family,
            explicit=None if tokenizer is None else Path(tokenizer),
            embedded=None if embedded is None else embedded.numpy().tobytes(),
            directories=(source.folder, source.folder / "tokenizer", source.folder.parent / "tokenizer"),
            repository=config.tokenizer_id,
            vocab_size=weights.vocab_size,
            last_directories=last_tokenizer_directories,
        )
        model = build_language_model(weights, settings, config.num_layers)
        _load_weights(model, weights, dtype or weights.dtype, torch.device(device), weight_format)
    return TextEncoder(model, prompt_tokenizer, config)


class LanguageModelWeights:
    """The language model's tensors in a checkpoint, under the names that transformers' bare models use."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.path = path = source.path
        names = set(source.names)
        found = [prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in names]
        if not found or f"{found[0]}layers.0.self_attn.q_proj.weight" not in names:
            raise ValueError(
                f"{path} is not a FLUX.2 text encoder: no embed_tokens.weight and layers.0 in it; "
                "expected a Mistral Small 3 or Qwen3 checkpoint in safetensors"
            )
        self.prefix = found[0]
        self.names = {name.removeprefix(self.prefix): name for name in names if name.startswith(self.prefix)}
        self.others = [name for name in names if not name.startswith(self.prefix)]
        self.quantisation = split_quantisation(self.names)
        self.family: Family = "qwen3" if "layers.0.self_attn.q_norm.weight" in self.names else "mistral"
        shape = self.shape("embed_tokens.weight")
        if len(shape) != 2:
            raise ValueError(f"{path}: {self.prefix}embed_tokens.weight has shape {list(shape)}, expected two axes")
        self.vocab_size, self.hidden_size = shape

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.names:
            raise ValueError(f"{self.path} is incomplete: {self.prefix}{name} is missing")
        return self.source.table[self.names[name]].shape

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: the dtype of the weights, bfloat16 where they are fp8."""
        stored = self.source.dtype(self.names["layers.0.self_attn.q_proj.weight"])
        return stored if stored in FLOAT_DTYPES else torch.bfloat16

    @property
    def num_layers(self) -> int:
        """Layers that are there, used or not."""
        return len({name.split(".")[1] for name in self.names if name.startswith("layers.")})

    def stored(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...] | None]:
        """The type of a tensor in the file, and the shape of its scale; None where there is none."""
        scale = self.quantisation.scales.get(name)
        return self.source.dtype(self.names[name]), None if scale is None else self.shape(scale)

    def dense_dtype(self, name: str) -> torch.dtype:
        """The type in which a weight loses nothing that matters: the stored one, bf16 for 8-bit floats."""
        stored = self.source.dtype(self.names[name])
        return stored if stored in FLOAT_DTYPES else torch.bfloat16

    def check(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights of a model, in its order, after comparing them with the file's.

        Raises:
            ValueError: tensors are missing, of another shape, or not understood.
        """
        needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.check_names(set(needed), model.config.num_hidden_layers)
        for name, expected in needed.items():
            if (shape := self.shape(name)) != expected:
                raise ValueError(
                    f"{self.prefix}{name} in {self.path} has shape {list(shape)}, expected {list(expected)} for "
                    f"{self.description}"
                )
        return needed

    @property
    def description(self) -> str:
        return _describe(self.family, self.hidden_size)

    def check_names(self, needed: set[str], num_layers: int) -> None:
        """Raises ValueError unless all needed tensors are there and every other one is known."""
        missing = sorted(needed - set(self.names))
        if missing:
            raise ValueError(
                f"{self.path} is incomplete: {len(missing)} tensors of its first {num_layers} layers are missing, "
                f"{self.prefix}{missing[0]} among them"
            )
        modules = {name.removesuffix(".weight") for name in needed if name.endswith(".weight")}
        unknown = [
            self.names[name] for name in set(self.names) - needed if not self._is_known(name, modules, num_layers)
        ]
        unknown += [name for name in self.others if not self._is_unused(name)]
        if unknown:
            raise ValueError(
                f"{self.path} holds {len(unknown)} tensors that are not understood, {min(unknown)} among them; "
                "supported are plain weights and fp8 weights with scales"
            )

    def _is_known(self, name: str, modules: set[str], num_layers: int) -> bool:
        module, _, last = name.rpartition(".")
        if module in modules:
            return ROLES.get(last) in ("scale", "activation_scale", "format")
        layer = name.removeprefix("layers.").partition(".")[0]
        beyond = name.startswith("layers.") and layer.isdecimal() and int(layer) >= num_layers
        return beyond or self._is_unused(name)

    def _is_unused(self, name: str) -> bool:
        parts = UNUSED_PARTS[self.family]
        return name in UNUSED_NAMES or name.startswith(tuple(prefix + part for prefix in PREFIXES for part in parts))

    def get(self, name: str, dtype: torch.dtype, device: torch.device, *, to_keep: bool = True) -> Tensor:
        """A tensor, multiplied out if it is fp8. One to keep stays mapped to the file where it needs no conversion."""
        stored = self.source.dtype(self.names[name])
        if stored not in FLOAT_DTYPES | FLOAT8_DTYPES:
            raise ValueError(
                f"{self.names[name]} in {self.path} has the type {self.source.table[self.names[name]].dtype}; "
                "text encoders are read in F64, F32, BF16, F16, and in F8 with scales"
            )
        marker = f"{name.removesuffix('.weight')}.comfy_quant"
        if marker in self.quantisation.formats:
            check_format(self.source, self.names[marker])
        mapped = to_keep and stored == dtype and device.type == "cpu"
        weight = self.source.get(self.names[name], mapped=mapped, device=device)
        if name not in self.quantisation.scales:
            return weight.to(dtype)
        scale = self.names[self.quantisation.scales[name]]
        try:
            if stored not in FLOAT8_DTYPES:
                raise ValueError(f"a scale on {stored} weights is not supported")
            return dequantise(weight, self.source.get(scale, device=device), dtype)
        except ValueError as error:
            raise ValueError(f"{scale} in {self.path}: {error}") from error

    def get_quantised(self, name: str, weight_format: WeightFormat, device: torch.device) -> tuple[Tensor, Tensor]:
        """A Linear's weight and scale in a format; fp8 numbers of the file are kept where their scales allow it."""
        (stored, scale_shape), shape = self.stored(name), self.shape(name)
        kept = weight_format == "fp8" and stored in FLOAT8_DTYPES
        if kept and (scale_shape is None or has_row_scale(shape, scale_shape)):
            scale = self.names.get(self.quantisation.scales.get(name, ""))
            scales = torch.ones(()) if scale is None else self.source.get(scale)
            weight = self.source.get(self.names[name], mapped=True, device=device)
            return weight, row_scale(scales, shape[0]).to(device)
        return FORMATS[weight_format].quantise(self.get(name, self.dense_dtype(name), device, to_keep=False))


def matching_config(weights: LanguageModelWeights, config: TextEncoderConfig | None) -> TextEncoderConfig:
    if config is None:
        for known in CONFIGS:
            if (known.family, known.hidden_size) == (weights.family, weights.hidden_size):
                return known
        needed = ", ".join(_describe(known.family, known.hidden_size) for known in CONFIGS)
        raise ValueError(f"{weights.path} is {weights.description}, no text encoder of FLUX.2; these are: {needed}")
    if (config.family, config.hidden_size) != (weights.family, weights.hidden_size):
        raise ValueError(
            f"{weights.path} is {weights.description}, but this FLUX.2 model needs "
            f"{_describe(config.family, config.hidden_size)}"
        )
    return config


def language_model_settings(weights: LanguageModelWeights, config: TextEncoderConfig) -> LanguageModelSettings:
    """From config.json where that belongs to the weights, else from the table of known models."""
    file = weights.source.folder / "config.json"
    if file.is_file():
        data = read_json_object(file)
        data = data.get("text_config", data)
        same = isinstance(data, dict) and data.get("hidden_size") == weights.hidden_size
        if same and data.get("model_type") == weights.family:
            return _settings_from_json(data, file, config.max_tokens)
    known = KNOWN_SETTINGS.get((weights.family, weights.hidden_size))
    if known is None:
        raise ValueError(f"{weights.path} is {weights.description}; put its config.json beside it")
    return known


def _settings_from_json(data: dict[str, Any], file: Path, max_tokens: int) -> LanguageModelSettings:
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    window = data.get("sliding_window") if data.get("use_sliding_window", True) else None
    try:
        unsupported = {
            "rope_type": rope.get("rope_type", rope.get("type", "default")) not in ("default", None),
            "sliding_window": window is not None and window < max_tokens,
            "hidden_act": data.get("hidden_act", "silu") != "silu",
        }
        num_heads = int(data["num_attention_heads"])
        settings = LanguageModelSettings(
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else data["rope_theta"]),
            rms_norm_eps=float(data["rms_norm_eps"]),
            num_heads=num_heads,
            num_key_value_heads=int(data.get("num_key_value_heads") or num_heads),
            head_dim=int(data.get("head_dim") or data["hidden_size"] // num_heads),
        )
        valid = all(value > 0 for value in vars(settings).values()) and settings.head_dim % 2 == 0
        valid = valid and settings.num_heads % settings.num_key_value_heads == 0
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is no usable configuration of a language model: {error!r}") from error
    if not valid:
        raise ValueError(f"{file} holds values that no language model can have: {settings}")
    if refused := [name for name, is_unsupported in unsupported.items() if is_unsupported]:
        raise ValueError(f"{file}: {', '.join(refused)} is set to something FLUX.2's text encoders do not use")
    return settings


def build_language_model(
    weights: LanguageModelWeights, settings: LanguageModelSettings, num_layers: int
) -> PreTrainedModel:
    """The network with ``num_layers`` layers, weights on the meta device."""
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

    shape: dict[str, Any] = {
        "vocab_size": weights.vocab_size,
        "hidden_size": weights.hidden_size,
        "intermediate_size": weights.shape("layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_key_value_heads,
        "head_dim": settings.head_dim,
        "rms_norm_eps": settings.rms_norm_eps,
        "rope_theta": settings.rope_theta,
        "sliding_window": None,
        "attn_implementation": "sdpa",
    }
    is_qwen3 = weights.family == "qwen3"
    with torch.device("meta"):
        model: Any = Qwen3Model(Qwen3Config(**shape)) if is_qwen3 else MistralModel(MistralConfig(**shape))
    # transformers puts the final norm on the last state, which here is that of an inner layer.
    model.norm = nn.Identity()
    # Its frequencies are computed, not loaded: they must not stay on the meta device.
    model.rotary_emb = type(model.rotary_emb)(config=model.config)
    lowest = settings.rope_theta ** (2 / settings.head_dim - 1)
    assert math.isclose(model.rotary_emb.inv_freq[-1].item(), lowest, rel_tol=1e-4), "rope_theta was not taken"
    return model


def _load_weights(
    model: PreTrainedModel,
    weights: LanguageModelWeights,
    dtype: torch.dtype,
    device: torch.device,
    weight_format: WeightFormat | None,
) -> None:
    needed = weights.check(model)
    quantised = _replace_linears(model) if weight_format else {}
    state = {name: weights.get(name, dtype, device) for name in needed if name not in quantised}
    for name, linear in quantised.items():
        assert weight_format is not None
        linear.set_quantised(weight_format, *weights.get_quantised(name, weight_format, device))
        trim_host_memory()
    state |= {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    model.load_state_dict(state, strict=True, assign=True)
    model.rotary_emb.to(device)
    model.requires_grad_(False)
    model.eval()


def _replace_linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Puts our `Linear` in the place of every one of the layers; answers them by the names of their weights."""
    replaced = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            assert module.bias is None, f"{name} has a bias"
            with torch.device("meta"):
                linear = Linear(module.in_features, module.out_features)
            model.set_submodule(name, linear)
            replaced[f"{name}.weight"] = linear
    return replaced


def _describe(family: Family, hidden_size: int) -> str:
    text = f"{'Mistral' if family == 'mistral' else 'Qwen3'} with hidden size {hidden_size}"
    name = MODEL_NAMES.get((family, hidden_size))
    return f"{name}, {text}" if name else text
