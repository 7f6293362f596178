"""What a LoRA learns from 24 pictures of a style, ours and diffusers' with PEFT: `python benchmarks/learn.py`.

Both train on the bundled model in fp32, with the same pictures, captions, layers, rank, learning rate, cosine schedule
and number of steps. The peer's loop follows diffusers' training script for klein: noise levels logit-normal, as one of
its options, or uniform, its default; weight decay 1e-4; a caption for every picture. Ours is the recipe with its
defaults, and the caption dropout of the dataset. Both LoRAs are measured by our validation loss, at noise levels of our
own density, and by pictures of held-out prompts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import machine_facts

BATCH_SIZE = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--peer_density", choices=("logit_normal", "none"), default="logit_normal", help="none: uniform"
    )
    parser.add_argument("--num_pictures", type=int, default=100, help="made for the judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder) / "dataset")
        trainers: dict[str, Callable[..., Path]] = {"ours": train_ours, "diffusers": train_peer}
        for side, train in trainers.items():
            begin = time.process_time()
            path = train(options, dataset, Path(folder) / side)
            sides[side] = {"train_cpu_s": time.process_time() - begin, **measure(options, dataset, path)}
            print(f"{side:10}", " ".join(f"{name} {value:.4g}" for name, value in sides[side].items()))
    print(json.dumps({"benchmark": "learn", **vars(options), "sides": sides} | machine_facts()))


def make_dataset(folder: Path) -> Any:
    """The striped pictures, cached."""
    from flux2_kit.flux2_core.variants import get_variant
    from flux2_kit.flux2_core.weights import find_weights
    from flux2_kit.training.cache import open_cache
    from flux2_kit.training.dataset import list_dataset, load_dataset_config
    from flux2_kit.training.encode import cache_latents, cache_text
    from flux2_kit.training.tiny.style_dataset import write_style_dataset

    variant = get_variant("tiny")
    dataset = list_dataset(load_dataset_config(write_style_dataset(folder)))
    cache_latents(dataset, find_weights(variant, "autoencoder"))
    cache_text(dataset, find_weights(variant, "text_encoder"), variant.text_encoder)
    return open_cache(dataset, variant)


def run_recipe(options: argparse.Namespace, dataset: Any, folder: Path, num_steps: int, base: tuple[Path, ...]) -> Any:
    """Our recipe, on top of LoRAs."""
    from flux2_kit.flux2_core.variants import get_variant
    from flux2_kit.training.adapters import AdapterConfig
    from flux2_kit.training.config import OutputConfig, TrainConfig
    from flux2_kit.training.lora_recipe import train_lora
    from flux2_kit.training.optimizers import OptimizerConfig, ScheduleConfig
    from flux2_kit.training.train_files import find_train_files

    config = TrainConfig(
        seed=options.seed,
        max_train_steps=num_steps,
        mixed_precision="no",
        base_weights=base,
        adapter=AdapterConfig(rank=options.rank),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
        schedule=ScheduleConfig(lr_scheduler="cosine"),
        output=OutputConfig(output_dir=folder),
    )
    return train_lora(config, dataset, find_train_files(get_variant("tiny"), makes_samples=False))


def train_ours(options: argparse.Namespace, dataset: Any, folder: Path) -> Path:
    return run_recipe(options, dataset, folder, options.steps, ()).lora_path


def train_peer(options: argparse.Namespace, dataset: Any, folder: Path) -> Path:
    import torch
    from diffusers.training_utils import compute_density_for_timestep_sampling
    from flux2_kit.flux2_core.latents import image_ids, latents_to_tokens, text_ids

    torch.manual_seed(options.seed)
    model = make_peer(options.rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=1e-4)
    samples = [dataset.load(item) for item in dataset.items]
    latents = torch.stack([sample.latents for sample in samples])
    text = torch.stack([sample.text.float() for sample in samples])
    ids, words = image_ids(*latents.shape[2:]), text_ids(text.shape[1])
    order: list[Any] = []
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        order = order or list(torch.randperm(len(samples)).split(BATCH_SIZE))
        chosen = order.pop()
        noise = torch.randn_like(latents[chosen])
        quantiles = compute_density_for_timestep_sampling(options.peer_density, len(chosen), logit_mean=0, logit_std=1)
        sigma = 1 - (1000 * quantiles).long() / 1000
        noisy = torch.lerp(latents[chosen], noise, sigma.view(-1, 1, 1, 1))
        velocity = model(
            hidden_states=latents_to_tokens(noisy),
            encoder_hidden_states=text[chosen],
            timestep=sigma,
            img_ids=ids,
            txt_ids=words,
            return_dict=False,
        )[0]
        torch.nn.functional.mse_loss(velocity, latents_to_tokens(noise - latents[chosen])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_lora_adapter(str(folder))
    return folder / "pytorch_lora_weights.safetensors"


def make_peer(rank: int) -> Any:
    """The bundled DiT as diffusers' class, with PEFT's LoRA on every Linear of its blocks."""
    import diffusers
    import peft
    import torch
    from flux2_kit.flux2_core.checkpoint import load_dit
    from flux2_kit.flux2_core.state_dict import convert
    from flux2_kit.flux2_core.variants import get_variant
    from flux2_kit.flux2_core.weights import find_weights

    config = get_variant("tiny").dit
    model = diffusers.Flux2Transformer2DModel(
        num_layers=config.num_double_blocks,
        num_single_layers=config.num_single_blocks,
        attention_head_dim=sum(config.rope_axes),
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        axes_dims_rope=config.rope_axes,
        guidance_embeds=config.has_guidance_embedder,
    )
    dit, _ = load_dit(find_weights(get_variant("tiny"), "dit"), "tiny", dtype=torch.float32)
    model.load_state_dict(convert(dit.state_dict(), "dit", "bfl", "diffusers"))
    model.requires_grad_(False)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    ]
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    return model.train()


def measure(options: argparse.Namespace, dataset: Any, path: Path) -> dict[str, float]:
    """Our validation loss with a LoRA, and the shares of its pictures that are as asked."""
    import torch
    from flux2_kit.flux2_core.lora import LoraSetting, apply_loras
    from flux2_kit.flux2_core.lora_files import read_lora
    from flux2_kit.flux2_core.pipeline import load_pipeline
    from flux2_kit.training.tiny.styles import evaluate_style, held_out_styled_prompts

    result = run_recipe(options, dataset, path.parent / "validation", 1, (path,))
    pipeline = load_pipeline("tiny", dtype=torch.float32)
    apply_loras(pipeline.dit, [LoraSetting(lora=read_lora(path, pipeline.variant.dit))])
    shares = evaluate_style(pipeline, held_out_styled_prompts()[: options.num_pictures])
    return {"validation_loss": result.validation_losses[0], **asdict(shares)}


if __name__ == "__main__":
    main()
