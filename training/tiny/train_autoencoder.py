"""Trains the autoencoder of the bundled tiny model. Run through ``python -m flux2_kit.training.tiny``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...flux2_core.autoencoder import Flux2Autoencoder, pack_2x2, unpack_2x2
from ...flux2_core.variants import AUTOENCODER_TINY
from ..optimizers import one_cycle
from ..train_state import load_train_state, save_train_state
from .evaluate import round_trip_psnr
from .pictures import (
    COLORS,
    color_values,
    compose,
    draw_random_masks,
    mask_index,
    scene_masks,
    seen_scenes,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig:
    """How the tiny autoencoder is trained."""

    num_steps: int = 7_000
    batch_size: int = 16
    learning_rate: float = 8e-4
    num_warmup_steps: int = 300
    kl_weight: float = 1e-6
    latent_noise: float = 0.3
    """Half of a batch gets normal noise of up to this deviation on its normalised latents. The decoder then forgives
    small errors of the DiT, and what matters in a picture gets the large latents."""
    random_fraction: float = 0.25
    """Share of pictures with a shape of random place, width, angle and colours, outside the domain."""
    num_random_masks: int = 6144
    num_decoder_steps: int = 3_000
    """Steps of a second stage that trains the decoder alone: the latents, and with them the DiT, stay as they are."""
    decoder_learning_rate: float = 5e-4
    decoder_latent_noise: float = 0.1
    save_every_steps: int = 500
    seed: int = 0


class PictureSampler:
    """Draws training pictures ``[N, 3, 64, 64]`` in -1..1; held-out scenes never appear."""

    def __init__(self, config: AutoencoderTrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        names = list(COLORS)
        self.scenes = torch.tensor(
            [[mask_index(s), names.index(s.color), names.index(s.background)] for s in sorted(seen_scenes())],
            device=device,
        )
        self.palette, self.masks = color_values().to(device), scene_masks().to(device)
        drawing = torch.Generator().manual_seed(config.seed)
        self.random_masks = draw_random_masks(config.num_random_masks, drawing).to(device)

    def sample(self, num_pictures: int, generator: torch.Generator) -> Tensor:
        num_random = round(num_pictures * self.config.random_fraction)
        rows = torch.randint(len(self.scenes), (num_pictures - num_random,), generator=generator)
        mask, color, background = self.scenes[rows.to(self.device)].unbind(1)
        domain = compose(self.masks[mask], self.palette[color], self.palette[background])
        rows = torch.randint(len(self.random_masks), (num_random,), generator=generator)
        colors = torch.rand(2, num_random, 3, generator=generator).to(self.device)
        others = compose(self.random_masks[rows.to(self.device)], colors[0], colors[1])
        return torch.cat([domain, others]) * 2 - 1


def train_autoencoder(config: AutoencoderTrainConfig, directory: Path, device: torch.device) -> Flux2Autoencoder:
    """Trains encoder and decoder, going on from ``directory/autoencoder-state.safetensors`` where that file exists."""
    torch.manual_seed(config.seed)
    model = Flux2Autoencoder(AUTOENCODER_TINY).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_fn(images: Tensor, noise: Tensor) -> Tensor:
        return reconstruction_loss(model, images, config.latent_noise * noise, config.kl_weight)

    stage = Stage(name="autoencoder", num_steps=config.num_steps, learning_rate=config.learning_rate)
    run_stage(stage, config, directory, model, model, loss_fn, device)
    return model.eval()


def train_decoder(
    config: AutoencoderTrainConfig, directory: Path, model: Flux2Autoencoder, device: torch.device
) -> Flux2Autoencoder:
    """Trains the decoder on, with the encoder frozen and less noise; the round trip gains, no latent changes."""
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)

    def loss_fn(images: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            latents = model.encode(images)
        packed = model.denormalize(latents + config.decoder_latent_noise * noise)
        return F.mse_loss(model.decoder(unpack_2x2(packed)).float(), images)

    stage = Stage(name="decoder", num_steps=config.num_decoder_steps, learning_rate=config.decoder_learning_rate)
    run_stage(stage, config, directory, model, model.decoder, loss_fn, device)
    return model.eval().requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the two stages differ in."""

    name: str
    num_steps: int
    learning_rate: float


def run_stage(
    stage: Stage,
    config: AutoencoderTrainConfig,
    directory: Path,
    model: Flux2Autoencoder,
    trained: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> None:
    """Runs the steps of one stage that are still to do. `loss_fn` gets pictures and noise of level 0..1 or none."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed + 1)
    state: dict[str, Any] = {
        "modules": {"ae": model},
        "optimizers": {"adamw": optimizer},
        "generators": {"data": generator},
    }
    state_path = directory / f"{stage.name}-state.safetensors"
    first_step = load_train_state(state_path, **state) if state_path.exists() else 0
    if first_step >= stage.num_steps:
        return
    pictures = PictureSampler(config, device)
    even_rows = torch.arange(config.batch_size).view(-1, 1, 1, 1) % 2 == 0
    model.train(trained is model)
    started = time.monotonic()
    for step in range(first_step, stage.num_steps):
        optimizer.param_groups[0]["lr"] = stage.learning_rate * one_cycle(
            step, stage.num_steps, config.num_warmup_steps
        )
        images = pictures.sample(config.batch_size, generator).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(config.batch_size, 128, 4, 4, generator=generator)
        level = torch.rand(config.batch_size, 1, 1, 1, generator=generator) * even_rows
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_fn(images, (level * noise).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % config.save_every_steps == 0 or done == stage.num_steps:
            save_train_state(state_path, step=done, **state)
            seconds = (time.monotonic() - started) / (done - first_step)
            psnr = round_trip_psnr(model.eval())
            model.train(trained is model)
            logger.info("%s step %d loss %.5f psnr %.2f dB %.3f s/step", stage.name, done, loss.item(), psnr, seconds)


def reconstruction_loss(model: Flux2Autoencoder, images: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Squared error of the round trip plus the KL term of the posterior; BatchNorm learns its statistics on the way."""
    mean, log_variance = model.encoder(images).chunk(2, dim=1)
    latents = model.bn(pack_2x2(mean.float())) + noise
    std = torch.sqrt(model.bn.running_var + model.bn.eps).view(1, -1, 1, 1)  # type: ignore[operator]
    packed = latents * std + model.bn.running_mean.view(1, -1, 1, 1)  # type: ignore[union-attr]
    reconstruction = model.decoder(unpack_2x2(packed))
    log_variance = log_variance.float().clamp(-20, 10)
    kl = 0.5 * (mean.float() ** 2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
    return F.mse_loss(reconstruction.float(), images) + kl_weight * kl
