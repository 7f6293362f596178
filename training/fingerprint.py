"""Which encoder made a cached file: told from its weights without loading them.

Two files get one fingerprint where they encode alike, so the autoencoder's decoder and the layout do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..flux2_core.checkpoint import autoencoder_config
from ..flux2_core.detect import component_steps, describe_other, detect
from ..flux2_core.files import read_json_object
from ..flux2_core.placement import NAMES
from ..flux2_core.quantization import FLOAT8_DTYPES, FLOAT_DTYPES, split_quantisation
from ..flux2_core.tensor_source import TORCH_DTYPES, TensorEntry, TensorSource, spread_samples
from ..flux2_core.tokenizer import PromptTokenizer, find_tokenizer
from ..flux2_core.variants import TextEncoderConfig
from ..flux2_core.weights import WeightsComponent

MAX_WHOLE_BYTES = 64 * 2**20
"""Weights up to this size are read whole; of larger ones `NUM_SAMPLES` places in every tensor."""
NUM_SAMPLES = 4
SAMPLE_BYTES = 1024

LANGUAGE_MODEL_KEYS = (
    "rope_theta", "rope_parameters", "rope_scaling", "rms_norm_eps", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "sliding_window", "use_sliding_window",
)  # fmt: skip
"""What of a text encoder's config.json decides its output."""


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """All that decides what an encoder gives."""

    fingerprint: str
    """32 hexadecimal digits."""
    dtype: str
    """It computes in, as torch names it: "float32", "bfloat16", "float16"."""
    file: str
    """For people."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for torch."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def parts(self) -> dict[str, Any]:
        """What goes into the key of a cached file."""
        return {"encoder": self.fingerprint, "dtype": self.dtype}

    @property
    def description(self) -> str:
        """For people: the file's name and what tells two of one name apart."""
        return f"{self.file} ({self.fingerprint[:8]}, {self.dtype})"


@dataclass(frozen=True, kw_only=True)
class AutoencoderIdentity(EncoderIdentity):
    """An autoencoder, with what the preparation of pictures depends on."""

    channels: int
    """Of the latents."""
    reference_sides: tuple[int, int]
    """See `AutoencoderConfig.reference_sides`."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderIdentity(EncoderIdentity):
    """A text encoder with its tokenizer, and the shape of what it gives: ``[max_tokens, context_dim]``."""

    family: str
    context_dim: int
    max_tokens: int

    @property
    def parts(self) -> dict[str, Any]:
        return super().parts | {"max_tokens": self.max_tokens, "context_dim": self.context_dim}


def identify_autoencoder(path: str | Path, dtype: torch.dtype | None = None) -> AutoencoderIdentity:
    """The identity of an autoencoder that computes in `dtype`; None: in that of the file.

    Raises:
        ValueError: the file is missing, damaged, or something else than a FLUX.2 autoencoder.
    """
    source = TensorSource(path, component="autoencoder")
    description = detect(source)
    if description.kind != "autoencoder":
        raise ValueError(describe_other(source, description, "a FLUX.2 autoencoder"))
    steps = component_steps(source, description, "autoencoder")
    stored = {step.target: [source.table[description.prefix + name] for name in step.sources] for step in steps}
    shapes = {step.target: step.shape([entry.shape for entry in stored[step.target]]) for step in steps}
    config = autoencoder_config(source, shapes)
    scales = split_quantisation(source.names).scales
    parts: dict[str, TensorEntry] = {}
    for step in steps:
        if step.target.startswith("decoder.") or step.target == "bn.num_batches_tracked":
            continue
        for index, name in enumerate(step.sources):
            part = f"{step.target} {shapes[step.target]} {step.operation if len(step.sources) > 1 else ''} {index}"
            parts[part] = source.table[description.prefix + name]
            if (scale := scales.get(description.prefix + name)) is not None:
                parts[f"{part} scale"] = source.table[scale]
    settings = (config.encoder_widths, config.num_res_blocks, config.latent_channels, config.num_norm_groups)
    return AutoencoderIdentity(
        fingerprint=_fingerprint(parts, settings),
        dtype=_name(dtype or _common_dtype(entry for entries in stored.values() for entry in entries)),
        file=source.path.name,
        channels=config.packed_channels,
        reference_sides=config.reference_sides,
    )


def identify_text_encoder(
    path: str | Path,
    config: TextEncoderConfig,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> TextEncoderIdentity:
    """The identity of a text encoder that computes in `dtype`; None: in that of the file, bfloat16 for fp8.

    Args:
        config: what the DiT needs.
        tokenizer: as in `load_text_encoder`.

    Raises:
        ValueError: weights or tokenizer are missing, damaged, or of another model than `config` needs.
    """
    source = TensorSource(path, component="text_encoder")
    description = detect(source)
    if description.kind != "text_encoder":
        raise ValueError(describe_other(source, description, "a FLUX.2 text encoder"))
    prefix = description.prefix
    embedding = source.table.get(f"{prefix}embed_tokens.weight")
    family = "qwen3" if f"{prefix}layers.0.self_attn.q_norm.weight" in source.table else "mistral"
    if embedding is None or embedding.shape[-1] != config.hidden_size or family != config.family:
        raise ValueError(
            f"{source.path} is {description.what}, but this FLUX.2 model needs {config.tokenizer_id} "
            f"({config.family} of width {config.hidden_size})"
        )
    prompt_tokenizer = read_tokenizer_of(source, config, tokenizer=tokenizer, vocab_size=embedding.shape[0])
    parts = {
        f"{name.removeprefix(prefix)} {entry.shape}": entry
        for name, entry in source.table.items()
        if name.startswith(prefix) and _is_used(name.removeprefix(prefix), config.num_layers)
    }
    settings = (config.family, config.layers, _language_model_settings(source), _describe_tokenizer(prompt_tokenizer))
    stored = source.dtype(f"{prefix}layers.0.self_attn.q_proj.weight")
    return TextEncoderIdentity(
        fingerprint=_fingerprint(parts, settings),
        dtype=_name(dtype or (stored if stored is not None and stored in NAMES else torch.bfloat16)),
        file=source.path.name,
        family=config.family,
        context_dim=config.context_dim,
        max_tokens=config.max_tokens,
    )


def read_tokenizer_of(
    source: TensorSource,
    config: TextEncoderConfig,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 2**31,
) -> PromptTokenizer:
    """The tokenizer that belongs to a text encoder's weights; no weights are read.

    Args:
        source: of the text encoder.
        config: what the DiT needs.
        tokenizer: as in `load_text_encoder`.
        vocab_size: ids from here on do not fit; the default takes any.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    embedded = source.get("tekken_model") if "tekken_model" in source.table else None
    return find_tokenizer(
        config.family,
        explicit=None if tokenizer is None else Path(tokenizer),
        embedded=None if embedded is None else embedded.numpy().tobytes(),
        directories=(source.folder, source.folder / "tokenizer", source.folder.parent / "tokenizer"),
        repository=config.tokenizer_id,
        vocab_size=vocab_size,
    )


def fingerprint_weights(path: str | Path, component: WeightsComponent | None = None) -> str:
    """32 hexadecimal digits that change when anything in the weights does; the file's name does not count.

    Raises:
        ValueError: the file is missing or damaged.
    """
    table = TensorSource(path, component=component).table
    return _fingerprint({f"{name} {entry.shape}": entry for name, entry in table.items()}, None)


def _is_used(name: str, num_layers: int) -> bool:
    """Whether a text encoder's output depends on a tensor, named without prefix."""
    if name.startswith("layers."):
        return int(name.split(".")[1]) < num_layers
    return name.startswith("embed_tokens.")


def _language_model_settings(source: TensorSource) -> dict[str, Any]:
    file = source.folder / "config.json"
    if not file.is_file():
        return {}
    data = read_json_object(file)
    inner = data.get("text_config", data)
    return {key: inner[key] for key in LANGUAGE_MODEL_KEYS if key in inner} if isinstance(inner, dict) else {}


def _describe_tokenizer(tokenizer: PromptTokenizer) -> tuple[Any, ...]:
    vocabulary = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    chat = tokenizer.format
    return vocabulary, tokenizer.chat_template or chat.template, tokenizer.pad_id, chat.padding_side


def _fingerprint(parts: dict[str, TensorEntry], settings: object) -> str:
    """Digest of settings, names, types, and bytes: all of them, or samples of every tensor where there are many."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    whole = sum(entry.num_bytes for entry in parts.values()) <= MAX_WHOLE_BYTES
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {entry.file for entry in parts.values()}}
        for name, entry in sorted(parts.items()):
            digest.update(f"\n{name} {entry.dtype} {entry.num_bytes}\n".encode())
            sampled = spread_samples(entry.num_bytes, NUM_SAMPLES, SAMPLE_BYTES)
            for begin, end in [(0, entry.num_bytes)] if whole else sampled:
                files[entry.file].seek(entry.begin + begin)
                digest.update(files[entry.file].read(end - begin))
    return digest.hexdigest()[:32]


def _common_dtype(entries: Iterable[TensorEntry]) -> torch.dtype:
    """The type that most weights have, as `load_autoencoder` chooses it."""
    counts: Counter[torch.dtype] = Counter()
    for entry in entries:
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype in FLOAT8_DTYPES:
            dtype = torch.bfloat16
        if dtype in FLOAT_DTYPES and dtype is not None:
            counts[dtype] += entry.num_elements
    return counts.most_common(1)[0][0] if counts else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
