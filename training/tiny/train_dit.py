"""Trains the DiT of the bundled tiny model with its text encoder. Run through ``python -m flux2_kit.training.tiny``.

All 9072 pictures of the domain are encoded once; a step then only picks latents, captions and noise.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...flux2_core.autoencoder import Flux2Autoencoder
from ...flux2_core.dit import Flux2DiT
from ...flux2_core.schedule import empirical_mu, shift_sigmas
from ...flux2_core.variants import DIT_TINY, QWEN3_TINY
from ..flow_matching import velocity_losses
from ..optimizers import one_cycle
from ..train_state import load_train_state, save_train_state
from .captions import Example, random_caption, random_combination, random_edit
from .pictures import Scene, all_scenes, draw_scenes, held_out_scenes, seen_scenes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DiTTrainConfig:
    """How the tiny DiT and text encoder are trained."""

    num_steps: int = 14_500
    batch_sizes: tuple[int, int, int] = (128, 96, 80)
    """Pictures in a step without, with one and with two references: about the same number of tokens each."""
    task_weights: tuple[float, float, float] = (0.50, 0.35, 0.15)
    """How often a step trains without, with one and with two references."""
    matrix_learning_rate: float = 2e-3
    """Muon's rate, for the matrices inside blocks."""
    learning_rate: float = 2e-3
    """AdamW's rate, for everything else."""
    num_warmup_steps: int = 200
    caption_dropout: float = 0.1
    """Share of empty captions, so that classifier-free guidance works."""
    uniform_sigma_fraction: float = 0.4
    """Share of sigmas drawn uniformly; the others follow the density of the 20-step inference schedule."""
    reference_noise: float = 0.15
    """References get normal noise of up to this deviation, so that a picture which the model itself made serves as well
    as a drawn one."""
    ema_decay: float = 0.998
    save_every_steps: int = 500
    seed: int = 0
    compile: bool = False
    """Compiles the DiT: two minutes at the start, then a fifth faster on two CPU cores."""


class TaskSampler:
    """Draws batches of examples; no held-out scene is ever a target or a reference."""

    def __init__(self, config: DiTTrainConfig) -> None:
        self.config = config
        self.held_out = set(held_out_scenes())
        self.scenes = seen_scenes()

    def sample(self, seed: int) -> list[Example]:
        """One batch, all with the same number of references. The seed decides everything."""
        rng = random.Random(seed)
        num_references = rng.choices((0, 1, 2), self.config.task_weights)[0]
        make = (self._picture, self._edit, self._combination)[num_references]
        examples: list[Example] = []
        while len(examples) < self.config.batch_sizes[num_references]:
            example = make(rng)
            if example is not None and example.target not in self.held_out:
                examples.append(example)
        return examples

    def _picture(self, rng: random.Random) -> Example:
        scene = rng.choice(self.scenes)
        return self._with_dropout(Example(prompt=random_caption(scene, rng), references=(), target=scene), rng)

    def _edit(self, rng: random.Random) -> Example:
        return self._with_dropout(random_edit(rng.choice(self.scenes), rng), rng)

    def _combination(self, rng: random.Random) -> Example | None:
        example = random_combination(rng.choice(self.scenes), rng.choice(self.scenes), rng)
        return self._with_dropout(example, rng) if example else None

    def _with_dropout(self, example: Example, rng: random.Random) -> Example:
        if rng.random() >= self.config.caption_dropout:
            return example
        return Example(prompt="", references=example.references, target=example.target)


class TinyTextEncoder(nn.Module):
    """A small Qwen3 with its tokenizer, run exactly as the inference code runs a Qwen3 text encoder."""

    def __init__(self, tokenizer_directory: Path) -> None:
        super().__init__()
        from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

        self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_directory), local_files_only=True)
        self.model = Qwen3Model(
            Qwen3Config(
                vocab_size=len(self.tokenizer),
                hidden_size=QWEN3_TINY.hidden_size,
                intermediate_size=2 * QWEN3_TINY.hidden_size,
                # One layer more than is stacked: transformers puts the final norm on the last state only.
                num_hidden_layers=QWEN3_TINY.num_layers + 1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=512,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                bos_token_id=None,
                tie_word_embeddings=True,
            )
        )
        self.trained_layers = nn.ModuleList(list(self.model.layers[: QWEN3_TINY.num_layers]))
        self._cache: dict[str, list[int]] = {}

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings ``[B, 24, 192]``."""
        rows = [self._tokenize(prompt) for prompt in prompts]
        length = QWEN3_TINY.max_tokens
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        device = self.model.embed_tokens.weight.device
        states = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in QWEN3_TINY.layers], dim=-1)

    def _tokenize(self, prompt: str) -> list[int]:
        if prompt not in self._cache:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._cache[prompt] = ids[: QWEN3_TINY.max_tokens]
        return self._cache[prompt]


class LatentTable:
    """The latents of every scene of the domain."""

    def __init__(self, autoencoder: Flux2Autoencoder, device: torch.device) -> None:
        scenes = all_scenes()
        self.rows = {scene: row for row, scene in enumerate(scenes)}
        chunks = [scenes[start : start + 256] for start in range(0, len(scenes), 256)]
        with torch.inference_mode():
            encoded = [autoencoder.encode((draw_scenes(chunk) * 2 - 1).to(device)) for chunk in chunks]
        self.latents = torch.cat(encoded).clone()

    def __call__(self, scenes: Sequence[Scene]) -> Tensor:
        return self.latents[[self.rows[scene] for scene in scenes]]


def train_dit(
    config: DiTTrainConfig, directory: Path, autoencoder: Flux2Autoencoder, device: torch.device
) -> tuple[Flux2DiT, TinyTextEncoder]:
    """Trains to the end and returns the averaged weights; goes on from ``directory/dit-state.safetensors``."""
    torch.manual_seed(config.seed)
    dit = init_weights(Flux2DiT(DIT_TINY)).to(device)
    text_encoder = TinyTextEncoder(directory / "tokenizer").to(device)
    model = nn.ModuleDict({"dit": dit, "text_encoder": text_encoder})
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
    )
    optimizers = make_optimizers(model, config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    latents, tasks = LatentTable(autoencoder, device), TaskSampler(config)
    state: dict[str, Any] = {
        "modules": {"model": model, "average": average},
        "optimizers": optimizers,
        "generators": {"noise": generator},
    }
    state_path = directory / "dit-state.safetensors"
    first_step = load_train_state(state_path, **state) if state_path.exists() else 0
    if config.compile:
        dit.compile(dynamic=False)
    rates = {"muon": config.matrix_learning_rate, "adamw": config.learning_rate}
    started, losses = time.monotonic(), {0: 0.0, 1: 0.0, 2: 0.0}
    for step in range(first_step, config.num_steps):
        factor = one_cycle(step, config.num_steps, config.num_warmup_steps)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * factor
        examples = tasks.sample(config.seed * 10_000_019 + step)
        with training_precision(device):
            loss = flow_matching_loss(dit, text_encoder, latents, examples, config, generator)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        done, num_references = step + 1, len(examples[0].references)
        losses[num_references] += 0.02 * (loss.item() - losses[num_references])
        if done % config.save_every_steps == 0 or done == config.num_steps:
            save_train_state(state_path, step=done, **state)
            seconds = (time.monotonic() - started) / (done - first_step)
            shown = " ".join(f"{value:.4f}" for value in losses.values())
            logger.info("step %d losses by references %s %.3f s/step", done, shown, seconds)
    averaged = dict(average.module.items())  # type: ignore[operator]
    return averaged["dit"].eval(), averaged["text_encoder"].eval()


@contextmanager
def training_precision(device: torch.device) -> Iterator[None]:
    """bf16 autocast; on the CPU also plain matrix products for attention.

    The backward of torch's flash attention for CPUs takes 30 % of a step at these 40 to 72 tokens, products 3 %.
    """
    with torch.autocast(device.type, dtype=torch.bfloat16), ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def flow_matching_loss(
    dit: Flux2DiT,
    text_encoder: TinyTextEncoder,
    latents: LatentTable,
    examples: Sequence[Example],
    config: DiTTrainConfig,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity over one batch of examples with equally many references."""
    target = latents([example.target for example in examples])
    batch, _, height, width = target.shape
    device = target.device
    noise = torch.randn(target.shape, generator=generator).to(device)
    sigma = sample_sigmas(batch, height * width, config, generator).to(device)
    num_references = len(examples[0].references)
    references = [latents([example.references[i] for example in examples]) for i in range(num_references)]
    if references:
        level = config.reference_noise * torch.rand(batch, 1, 1, 1, generator=generator)
        references = [r + (level * torch.randn(r.shape, generator=generator)).to(device) for r in references]
    text = text_encoder([example.prompt for example in examples])
    return velocity_losses(dit, target, text, noise, sigma, references=references).mean()


def sample_sigmas(batch: int, num_tokens: int, config: DiTTrainConfig, generator: torch.Generator) -> Tensor:
    """Noise levels ``[B]``: a mixture of the inference schedule's density and a uniform one, each stratified."""
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    uniform = uniform[torch.randperm(batch, generator=generator)]
    num_uniform = int(batch * config.uniform_sigma_fraction)
    shifted = shift_sigmas(uniform[num_uniform:], math.exp(empirical_mu(num_tokens, 20)))
    return torch.cat((uniform[:num_uniform], shifted))


def make_optimizers(model: nn.Module, config: DiTTrainConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for embeddings, outer layers and norms."""
    inside, outside = [], []
    for name, parameter in model.named_parameters():
        in_block = any(part in name for part in ("_blocks.", "layers.", "_modulation_", "single_stream_modulation"))
        (inside if in_block and parameter.dim() == 2 else outside).append(parameter)
    muon = torch.optim.Muon(
        inside, lr=config.matrix_learning_rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(outside, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return {"muon": muon, "adamw": adamw}


def init_weights(dit: Flux2DiT) -> Flux2DiT:
    """Scaled normal weights; gates and the output start at zero, so that every block starts as the identity."""
    for name, parameter in dit.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name.startswith(("double_stream_modulation", "single_stream_modulation", "final_layer")):
            nn.init.zeros_(parameter)
    return dit
