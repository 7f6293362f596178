"""Trains all parts of the tiny model and writes them in the layouts of the real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ...flux2_core.autoencoder import Flux2Autoencoder
from ...flux2_core.checkpoint import save_autoencoder, save_dit
from ...flux2_core.dit import Flux2DiT
from ...flux2_core.files import write_safetensors, write_text
from ...flux2_core.variants import VARIANTS
from ...flux2_core.weights import TINY_FILES
from .tokenizer import write_tokenizer
from .train_autoencoder import AutoencoderTrainConfig, train_autoencoder, train_decoder
from .train_dit import DiTTrainConfig, TinyTextEncoder, train_dit


def make_tiny_model(
    work_dir: Path,
    output_dir: Path,
    device: torch.device,
    autoencoder_config: AutoencoderTrainConfig | None = None,
    dit_config: DiTTrainConfig | None = None,
) -> None:
    """Runs every stage in order; a stage that a former run finished or began is taken up from `work_dir`."""
    # 1. The autoencoder, then its decoder alone: latents are final after the first stage.
    autoencoder_config = autoencoder_config or AutoencoderTrainConfig()
    autoencoder = train_autoencoder(autoencoder_config, work_dir, device)
    autoencoder = train_decoder(autoencoder_config, work_dir, autoencoder, device)

    # 2. The tokenizer, from the captions alone; trained weights must keep the one that they were trained with.
    if not (work_dir / "tokenizer" / "tokenizer.json").exists():
        write_tokenizer(work_dir / "tokenizer")

    # 3. DiT and text encoder together.
    dit, text_encoder = train_dit(dit_config or DiTTrainConfig(), work_dir, autoencoder, device)

    # 4. The assets.
    write_assets(output_dir, autoencoder, dit, text_encoder, work_dir / "tokenizer")


def write_assets(
    output_dir: Path, autoencoder: Flux2Autoencoder, dit: Flux2DiT, text_encoder: TinyTextEncoder, tokenizer_dir: Path
) -> None:
    """Autoencoder and text encoder in fp32, the DiT in bf16 to stay small."""
    text_dir = output_dir / TINY_FILES["text_encoder"]
    text_dir.mkdir(parents=True, exist_ok=True)
    save_autoencoder(output_dir / TINY_FILES["autoencoder"], autoencoder)
    save_dit(output_dir / TINY_FILES["dit"], dit.to(torch.bfloat16), VARIANTS["tiny"])
    weights = {f"model.{name}": tensor.float() for name, tensor in text_encoder.model.state_dict().items()}
    write_safetensors(text_dir / "model.safetensors", weights, {"format": "pt"})
    config = {**text_encoder.model.config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "float32"}
    write_text(text_dir / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / file, text_dir / file)
