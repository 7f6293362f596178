"""Gradients of one flow-matching step against PEFT on diffusers' transformer: whole tensors, fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.lora_files import diffusers_steps
from flux2_kit.flux2_core.state_dict import convert
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters, lokr_shapes
from flux2_kit.training.batches import Draw
from flux2_kit.training.cache import Sample
from flux2_kit.training.flow_matching import velocity_losses
from flux2_kit.training.loader import by_shape
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

LIMIT = 1e-5
KLEIN = DiTConfig(
    hidden_size=128,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
DEV = replace(KLEIN, has_guidance_embedder=True)


@dataclass(frozen=True)
class Item:
    """One picture of a batch with its own noise level; all sizes in latents."""

    latents: Tensor
    references: tuple[Tensor, ...]
    text: Tensor
    noise: Tensor
    sigma: float


def make_item(seed: int, size: tuple[int, int], reference_sizes: Sequence[tuple[int, int]], sigma: float) -> Item:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(128, *size, generator=generator) for _ in range(2))
    references = tuple(torch.randn(128, *size, generator=generator) for size in reference_sizes)
    return Item(latents, references, torch.randn(9, 48, generator=generator), noise, sigma)


BATCHES = {
    "one": [make_item(0, (3, 5), [(2, 3)], 0.71)],
    "0, 1 and 2 references": [
        make_item(0, (3, 5), [], 0.71),
        make_item(1, (3, 5), [(2, 3)], 0.13),
        make_item(2, (4, 2), [(3, 2), (1, 4)], 0.95),
    ],
    "two of one shape": [
        make_item(0, (3, 5), [(2, 3), (1, 4)], 0.71),
        make_item(1, (3, 5), [(2, 3), (1, 4)], 0.13),
        make_item(2, (4, 2), [], 0.95),
    ],
}


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values


def build_pair(dit_config: DiTConfig, config: AdapterConfig) -> tuple[Flux2DiT, TrainableAdapters, nn.Module]:
    """Our DiT with adapters, and diffusers' with PEFT's: equal weights, equal random factors."""
    generator = torch.Generator().manual_seed(0)
    ours = Flux2DiT(dit_config).requires_grad_(False)
    randomize(ours, generator)
    adapters = TrainableAdapters(ours, config, generator=generator)
    for name, parameter in adapters.named_parameters():
        if name.endswith("magnitude"):
            parameter.data *= 0.6 + 0.8 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    adapters.attach()

    theirs = diffusers.Flux2Transformer2DModel(
        num_layers=dit_config.num_double_blocks,
        num_single_layers=dit_config.num_single_blocks,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=dit_config.context_dim,
        axes_dims_rope=dit_config.rope_axes,
        guidance_embeds=dit_config.has_guidance_embedder,
    )
    theirs.load_state_dict(convert(ours.state_dict(), "dit", "bfl", "diffusers"), strict=True)
    theirs.requires_grad_(False)
    modules = {step.target.removesuffix(".weight") for layer in adapters.linears for step in diffusers_steps(layer)}
    options = {"lora_alpha": config.alpha, "use_rslora": config.rank_stabilized, "use_dora": config.dora}
    theirs.add_adapter(
        peft.LoraConfig(r=config.rank, target_modules=sorted(modules), init_lora_weights=False, **options)
    )
    parameters = dict(theirs.named_parameters())
    for layer in adapters.linears:
        own = dict(adapters.adapter(layer).named_parameters())
        for step in diffusers_steps(layer):
            for name, their_name in their_names(step.target, own).items():
                value = own[name] if name == "lora_A" else step.apply([own[name]])
                parameters[their_name].data = value.detach().clone().reshape(parameters[their_name].shape)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert len(trained) == len(modules) * (3 if config.dora else 2)
    return ours, adapters, theirs


def their_names(target: str, names: Sequence[str]) -> dict[str, str]:
    """PEFT's names of the parameters on one of diffusers' Linears, by ours."""
    module = target.removesuffix(".weight")
    return {name: f"{module}.{name.replace('magnitude', 'lora_magnitude_vector')}.default.weight" for name in names}


def our_step(dit: Flux2DiT, items: Sequence[Item]) -> float:
    """As the recipe does it: samples of one shape together, the loss the mean over all of them."""
    samples = [Sample(latents=i.latents, references=i.references, text=i.text, mask=None) for i in items]
    total = 0.0
    for group in by_shape([(Draw(item=index, index=index), sample) for index, sample in enumerate(samples)]):
        found = [sample for _, sample in group]
        losses = velocity_losses(
            dit,
            torch.stack([sample.latents for sample in found]),
            torch.stack([sample.text for sample in found]),
            torch.stack([items[draw.item].noise for draw, _ in group]),
            torch.tensor([items[draw.item].sigma for draw, _ in group]),
            references=[torch.stack(same) for same in zip(*(sample.references for sample in found), strict=True)],
        )
        loss = losses.sum() / len(items)
        loss.backward()
        total += loss.item()
    return total


def their_step(transformer: nn.Module, items: Sequence[Item], has_guidance: bool) -> float:
    """One item at a time, written out; gradients add up."""
    total = 0.0
    for item in items:
        _, height, width = item.latents.shape
        noisy = (1 - item.sigma) * item.latents + item.sigma * item.noise
        pieces = [noisy, *item.references]
        tokens = torch.cat([piece.flatten(1).T for piece in pieces])[None]
        ids = torch.cat(
            [
                torch.cartesian_prod(
                    torch.tensor([10.0 * index]), torch.arange(h).float(), torch.arange(w).float(), torch.tensor([0.0])
                )
                for index, (h, w) in enumerate(tuple(piece.shape[1:]) for piece in pieces)
            ]
        )
        words = torch.zeros(item.text.shape[0], 4)
        words[:, 3] = torch.arange(item.text.shape[0])
        velocity = transformer(
            hidden_states=tokens,
            encoder_hidden_states=item.text[None],
            timestep=torch.tensor([item.sigma]),
            img_ids=ids,
            txt_ids=words,
            guidance=torch.tensor([1.0]) if has_guidance else None,
            return_dict=False,
        )[0][0, : height * width]
        loss = (velocity - (item.noise - item.latents).flatten(1).T).square().mean() / len(items)
        loss.backward()
        total += loss.item()
    return total


def check_gradients(adapters: TrainableAdapters, transformer: nn.Module) -> int:
    """Of our lora_A the gradient is the sum over the parts of a layer, of the others the same rows; how many agree."""
    theirs = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    count = 0
    for layer in adapters.linears:
        own = {name: parameter.grad for name, parameter in adapters.adapter(layer).named_parameters()}
        parts = [(step, their_names(step.target, list(own))) for step in diffusers_steps(layer)]
        lora_A = sum(theirs[names["lora_A"]] for _, names in parts)
        assert lora_A.count_nonzero() and relative_l2(own["lora_A"], lora_A) <= LIMIT, layer
        for name in own.keys() - {"lora_A"}:
            for step, names in parts:
                got, expected = step.apply([own[name]]), theirs[names[name]]
                assert expected.count_nonzero(), names[name]
                assert relative_l2(got.reshape(expected.shape), expected) <= LIMIT, (layer, name)
        count += 1
    return count


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dit_config", [KLEIN, DEV], ids=["klein", "dev"])
def test_gradients_of_a_step_equal_peft(dit_config, batch):
    ours, adapters, theirs = build_pair(dit_config, AdapterConfig(rank=4, alpha=6.0))
    loss = our_step(ours, BATCHES[batch])
    assert loss == pytest.approx(their_step(theirs, BATCHES[batch], dit_config.has_guidance_embedder), rel=1e-6)
    assert check_gradients(adapters, theirs) == 20


@pytest.mark.parametrize("checkpointing", ["blocks", "offload"])
def test_gradients_of_a_step_with_checkpointing_equal_peft(checkpointing):
    ours, adapters, theirs = build_pair(DEV, AdapterConfig(rank=4, alpha=6.0))
    ours.checkpointing = checkpointing
    our_step(ours, BATCHES["0, 1 and 2 references"])
    their_step(theirs, BATCHES["0, 1 and 2 references"], has_guidance=True)
    assert check_gradients(adapters, theirs) == 20


OPTIONS = {
    "rsLoRA": AdapterConfig(rank=4, alpha=3.0, rank_stabilized=True),
    "DoRA": AdapterConfig(rank=4, alpha=6.0, dora=True),
    "DoRA, rsLoRA": AdapterConfig(rank=4, alpha=6.0, dora=True, rank_stabilized=True),
    "every Linear": AdapterConfig(rank=4, alpha=6.0, include=("",)),
    "every Linear, DoRA": AdapterConfig(rank=4, alpha=6.0, include=("",), dora=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_those_of_peft(name):
    ours, adapters, theirs = build_pair(DEV, OPTIONS[name])
    our_step(ours, BATCHES["one"])
    their_step(theirs, BATCHES["one"], has_guidance=True)
    assert check_gradients(adapters, theirs) == (31 if "every" in name else 20)


def test_matrices_of_lokr_are_split_as_in_peft():
    from peft.tuners.lokr.layer import factorization

    for factor in (-1, 2, 4, 6, 16, 128):
        for side in (127, 128, 250, 360, 3072, 4096, 6144, 9216, 27648, 36864, 55296):
            shapes = lokr_shapes((side, side), AdapterConfig(kind="lokr", rank=10**6, lokr_factor=factor))
            assert [shapes["w1"][0], shapes["w2"][0]] == sorted(factorization(side, factor)), (side, factor)
