"""The table of FLUX.2 variants: shapes, defaults, and where their weights come from.

Figures and file names: Black Forest Labs' reference code and the model cards at huggingface.co/black-forest-labs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .autoencoder import AutoencoderConfig
from .dit import DiTConfig


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """How a prompt becomes the text embedding ``[B, max_tokens, len(layers) * hidden_size]``."""

    family: Literal["mistral", "qwen3"]
    """Decides the chat template and the side on which prompts are padded."""
    hidden_size: int
    layers: tuple[int, int, int]
    """Hidden states that are stacked; state k is the output of layer k, counted from 1."""
    max_tokens: int = 512
    """Prompts are padded or cut to this length, template included."""
    tokenizer_id: str
    """Hugging Face repository of the tokenizer, for files that come without one."""

    @property
    def num_layers(self) -> int:
        """Layers that have to be loaded and run."""
        return max(self.layers)

    @property
    def context_dim(self) -> int:
        """Channels of the text embedding."""
        return len(self.layers) * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a Hugging Face repository."""

    repository: str
    filename: str
    """Path inside the repository; a trailing ``/*`` stands for every file of the folder."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model that can be loaded by name."""

    name: str
    dit: DiTConfig
    text_encoder: TextEncoderConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    distilled: bool
    """Whether it was distilled to few steps: it then takes no classifier-free guidance and is no base to train on."""
    num_steps: int
    cfg_scale: float
    """Classifier-free guidance; 1 runs one forward a step."""
    guidance: float | None
    """Embedded guidance; None where the network has no such input."""
    reference_cache: Literal["off", "exact"] = "off"
    """exact: it was trained to compute references once for all steps, see `reference_cache`."""
    default_size: int = 1024
    """Side of a picture, in pixels, where the user names none."""
    license: str
    gated: bool
    """Whether the repository asks for an account and consent before a download."""
    dit_file: RemoteFile | None = None
    autoencoder_file: RemoteFile | None = None
    text_encoder_files: RemoteFile | None = None

    @property
    def undistilled_name(self) -> str:
        """The variant of the same network that is the base to train on; the name itself where there is none."""
        return self.name.replace("klein-", "klein-base-").removesuffix("-kv") if self.distilled else self.name

    @property
    def lora_architecture(self) -> str:
        """``modelspec.architecture`` of a LoRA, which fits a base and what was distilled from it."""
        return f"Flux.2-{self.name.replace('klein-base-', 'klein-').removesuffix('-kv')}/lora"


MISTRAL_SMALL = TextEncoderConfig(
    family="mistral",
    hidden_size=5120,
    layers=(10, 20, 30),
    tokenizer_id="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
)
QWEN3_8B = TextEncoderConfig(family="qwen3", hidden_size=4096, layers=(9, 18, 27), tokenizer_id="Qwen/Qwen3-8B")
QWEN3_4B = TextEncoderConfig(family="qwen3", hidden_size=2560, layers=(9, 18, 27), tokenizer_id="Qwen/Qwen3-4B")
QWEN3_TINY = TextEncoderConfig(
    family="qwen3", hidden_size=64, layers=(1, 2, 3), max_tokens=24, tokenizer_id="bundled with FLUX.2 Kit"
)

DIT_32B = DiTConfig(
    hidden_size=6144,
    num_heads=48,
    num_double_blocks=8,
    num_single_blocks=48,
    context_dim=MISTRAL_SMALL.context_dim,
    has_guidance_embedder=True,
)
DIT_9B = DiTConfig(
    hidden_size=4096,
    num_heads=32,
    num_double_blocks=8,
    num_single_blocks=24,
    context_dim=QWEN3_8B.context_dim,
    has_guidance_embedder=False,
)
DIT_4B = DiTConfig(
    hidden_size=3072,
    num_heads=24,
    num_double_blocks=5,
    num_single_blocks=20,
    context_dim=QWEN3_4B.context_dim,
    has_guidance_embedder=False,
)
DIT_TINY = DiTConfig(
    hidden_size=160,
    num_heads=5,
    num_double_blocks=2,
    num_single_blocks=4,
    context_dim=QWEN3_TINY.context_dim,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
AUTOENCODER_TINY = AutoencoderConfig(
    encoder_widths=(16, 32, 64, 96),
    decoder_widths=(16, 32, 64, 96),
    num_res_blocks=1,
    num_norm_groups=8,
    reference_sides=(64, 64),
)

NON_COMMERCIAL = "FLUX Non-Commercial License"
APACHE = "Apache-2.0"
# All variants share one autoencoder. It is taken from klein-4b's repository, which asks for no account.
AUTOENCODER_FILE = RemoteFile(
    repository="black-forest-labs/FLUX.2-klein-4B", filename="vae/diffusion_pytorch_model.safetensors"
)


def _klein(
    name: str,
    repository: str,
    filename: str,
    *,
    dit: DiTConfig,
    distilled: bool,
    license: str,
    reference_cache: Literal["off", "exact"] = "off",
) -> Variant:
    return Variant(
        name=name,
        dit=dit,
        text_encoder=QWEN3_4B if dit is DIT_4B else QWEN3_8B,
        distilled=distilled,
        reference_cache=reference_cache,
        num_steps=4 if distilled else 50,
        cfg_scale=1.0 if distilled else 4.0,
        guidance=None,
        license=license,
        gated=license != APACHE,
        dit_file=RemoteFile(repository=f"black-forest-labs/{repository}", filename=filename),
        autoencoder_file=AUTOENCODER_FILE,
        text_encoder_files=RemoteFile(repository=f"black-forest-labs/{repository}", filename="text_encoder/*"),
    )


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="dev",
            dit=DIT_32B,
            text_encoder=MISTRAL_SMALL,
            distilled=False,
            num_steps=50,
            cfg_scale=1.0,
            guidance=4.0,
            license=NON_COMMERCIAL,
            gated=True,
            dit_file=RemoteFile(repository="black-forest-labs/FLUX.2-dev", filename="flux2-dev.safetensors"),
            autoencoder_file=AUTOENCODER_FILE,
            text_encoder_files=RemoteFile(repository="black-forest-labs/FLUX.2-dev", filename="text_encoder/*"),
        ),
        _klein(
            "klein-4b",
            "FLUX.2-klein-4B",
            "flux-2-klein-4b.safetensors",
            dit=DIT_4B,
            distilled=True,
            license=APACHE,
        ),
        _klein(
            "klein-base-4b",
            "FLUX.2-klein-base-4B",
            "flux-2-klein-base-4b.safetensors",
            dit=DIT_4B,
            distilled=False,
            license=APACHE,
        ),
        _klein(
            "klein-9b",
            "FLUX.2-klein-9B",
            "flux-2-klein-9b.safetensors",
            dit=DIT_9B,
            distilled=True,
            license=NON_COMMERCIAL,
        ),
        _klein(
            "klein-base-9b",
            "FLUX.2-klein-base-9B",
            "flux-2-klein-base-9b.safetensors",
            dit=DIT_9B,
            distilled=False,
            license=NON_COMMERCIAL,
        ),
        _klein(
            "klein-9b-kv",
            "FLUX.2-klein-9b-kv",
            "flux-2-klein-9b-kv.safetensors",
            dit=DIT_9B,
            distilled=True,
            license=NON_COMMERCIAL,
            reference_cache="exact",
        ),
        Variant(
            name="tiny",
            dit=DIT_TINY,
            text_encoder=QWEN3_TINY,
            autoencoder=AUTOENCODER_TINY,
            distilled=False,
            num_steps=20,
            cfg_scale=4.0,
            guidance=None,
            default_size=64,
            license=APACHE,
            gated=False,
        ),
    )
}


def get_variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known variants: {', '.join(VARIANTS)}")
    return VARIANTS[name]
