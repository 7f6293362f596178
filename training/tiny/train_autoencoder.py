"""Trains the autoencoder of the bundled tiny model. Run through ``python -m flux2_kit.training.tiny``."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...flux2_core.autoencoder import Flux2Autoencoder, pack_2x2, unpack_2x2
from ...flux2_core.variants import AUTOENCODER_TINY
from ..train_state import load_train_state, save_train_state
from .evaluate import round_trip_psnr
from .pictures import (
    all_scenes,
    color_values,
    compose,
    draw_random_masks,
    held_out_scenes,
    mask_index,
    scene_masks,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig:
    """How the tiny autoencoder is trained."""

    num_steps: int = 10_000
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
    save_every_steps: int = 500
    seed: int = 0


class PictureSampler:
    """Draws training pictures ``[N, 3, 64, 64]`` in -1..1; held-out scenes never appear."""

    def __init__(self, config: AutoencoderTrainConfig, device: torch.device) -> None:
        scenes = sorted(set(all_scenes()) - set(held_out_scenes()))
        palette, self.config, self.device = color_values(), config, device
        names = list(dict.fromkeys(scene.color for scene in all_scenes()))
        self.scenes = torch.tensor(
            [[mask_index(s), names.index(s.color), names.index(s.background)] for s in scenes], device=device
        )
        self.palette, self.masks = palette.to(device), scene_masks().to(device)
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
    """Trains to the end, going on from ``directory/autoencoder-state.safetensors`` where that file exists."""
    torch.manual_seed(config.seed)
    model = Flux2Autoencoder(AUTOENCODER_TINY).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed + 1)
    pictures = PictureSampler(config, device)
    state = {"modules": {"ae": model}, "optimizers": {"adamw": optimizer}, "generators": {"data": generator}}
    state_path = directory / "autoencoder-state.safetensors"
    first_step = load_train_state(state_path, **state) if state_path.exists() else 0
    started = time.monotonic()
    for step in range(first_step, config.num_steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * _one_cycle(step, config)
        images = pictures.sample(config.batch_size, generator).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(config.batch_size, 128, 4, 4, generator=generator).to(device)
        level = config.latent_noise * torch.rand(config.batch_size, 1, 1, 1, generator=generator).to(device)
        level = torch.where(torch.arange(config.batch_size, device=device).view(-1, 1, 1, 1) % 2 == 0, level, 0.0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = reconstruction_loss(model, images, level * noise, config.kl_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % config.save_every_steps == 0 or done == config.num_steps:
            save_train_state(state_path, step=done, **state)
            seconds = (time.monotonic() - started) / (done - first_step)
            psnr = round_trip_psnr(model.eval())
            model.train()
            logger.info("step %d loss %.5f psnr %.2f dB %.3f s/step", done, loss.item(), psnr, seconds)
    return model.eval()


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


def _one_cycle(step: int, config: AutoencoderTrainConfig) -> float:
    warmup = min(1.0, (step + 1) / config.num_warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
