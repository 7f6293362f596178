"""The denoise loop on a small random DiT: guidance, batches, callbacks, stopping."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from flux2_kit.flux2_core import dit as dit_module
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import (
    image_ids,
    latents_to_tokens,
    reference_tokens,
    seed_noise,
    text_ids,
    tokens_to_latents,
)
from flux2_kit.flux2_core.sampling import DenoiseStep, Stopped, denoise
from flux2_kit.flux2_core.schedule import sigma_schedule
from torch import Tensor

CONTEXT_DIM = 24


def build_dit(*, has_guidance_embedder: bool = False) -> Flux2DiT:
    config = DiTConfig(
        hidden_size=32,
        num_heads=1,
        num_double_blocks=1,
        num_single_blocks=1,
        context_dim=CONTEXT_DIM,
        has_guidance_embedder=has_guidance_embedder,
        rope_axes=(8, 8, 8, 8),
    )
    dit = Flux2DiT(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    return dit


@pytest.fixture(scope="module")
def dit() -> Flux2DiT:
    return build_dit()


def random_text(seed: int) -> Tensor:
    return torch.randn(1, 5, CONTEXT_DIM, generator=torch.Generator().manual_seed(seed))


NOISE = seed_noise(1, 1, 48, 64)
REFERENCES = [seed_noise(2, 1, 32, 48), seed_noise(3, 1, 64, 16)]
SIGMAS = sigma_schedule(4, 12)
TEXT, NEGATIVE_TEXT = random_text(4), random_text(5)


@torch.inference_mode()
def denoise_by_hand(dit: Flux2DiT, noise: Tensor, cfg_scale: float, references: list[Tensor]) -> Tensor:
    """One picture, one forward per prompt, fp64 steps."""
    height, width = noise.shape[-2:]
    extra_tokens, extra_ids = reference_tokens(references)
    ids = torch.cat((image_ids(height, width), extra_ids))
    state = latents_to_tokens(noise).double()
    for sigma, next_sigma in pairwise(SIGMAS.tolist()):
        tokens = torch.cat((state.float(), extra_tokens), dim=1)
        positive, negative = (
            dit(tokens, ids, text, text_ids(text.shape[1]), torch.tensor([sigma]))[:, : height * width]
            for text in (TEXT, NEGATIVE_TEXT)
        )
        state = state + (next_sigma - sigma) * (negative + cfg_scale * (positive - negative))
    return tokens_to_latents(state, height, width)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5, 4.0])
def test_guidance_equals_two_forwards_by_hand(dit, cfg_scale):
    ours = denoise(dit, NOISE, TEXT, SIGMAS, references=REFERENCES, cfg_scale=cfg_scale, negative_text=NEGATIVE_TEXT)
    by_hand = denoise_by_hand(dit, NOISE, cfg_scale, REFERENCES)
    torch.testing.assert_close(ours.double(), by_hand, rtol=1e-4, atol=1e-4)


def test_guidance_one_never_reads_the_negative_prompt(dit):
    with_negative = denoise(dit, NOISE, TEXT, SIGMAS, cfg_scale=1.0, negative_text=NEGATIVE_TEXT)
    assert torch.equal(with_negative, denoise(dit, NOISE, TEXT, SIGMAS))


def test_embedded_guidance_reaches_the_network():
    dit = build_dit(has_guidance_embedder=True)
    weak, strong = (denoise(dit, NOISE, TEXT, SIGMAS, guidance=guidance) for guidance in (1.0, 4.0))
    assert (weak - strong).norm() > 1e-2 * weak.norm()


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_each_picture_of_a_batch_equals_the_picture_made_alone(dit, cfg_scale):
    noise = seed_noise(9, 3, 48, 64)
    settings = {"references": REFERENCES, "cfg_scale": cfg_scale, "negative_text": NEGATIVE_TEXT}
    batch = denoise(dit, noise, TEXT, SIGMAS, **settings)
    assert batch.shape == noise.shape
    for row in range(3):
        alone = denoise(dit, noise[row : row + 1], TEXT, SIGMAS, **settings)
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_references_of_one_row_and_of_the_whole_batch_can_be_mixed(dit):
    noise = seed_noise(9, 2, 48, 64)
    wide = [REFERENCES[0].expand(2, -1, -1, -1), REFERENCES[1]]
    mixed = denoise(dit, noise, TEXT, SIGMAS, references=wide)
    assert torch.equal(mixed, denoise(dit, noise, TEXT, SIGMAS, references=REFERENCES))


def test_one_step_goes_from_noise_to_the_end(dit):
    steps: list[DenoiseStep] = []
    latents = denoise(dit, NOISE, TEXT, sigma_schedule(1, 12), on_step=steps.append)
    with torch.inference_mode():
        velocity = dit(latents_to_tokens(NOISE), image_ids(3, 4), TEXT, text_ids(5), torch.ones(1))
    assert torch.equal(latents, NOISE - tokens_to_latents(velocity, 3, 4))
    assert len(steps) == 1


def test_callback_is_told_every_step(dit):
    steps: list[DenoiseStep] = []
    denoise(dit, NOISE, TEXT, SIGMAS, on_step=steps.append)
    assert [step.index for step in steps] == [1, 2, 3, 4]
    assert {step.num_steps for step in steps} == {4}
    assert [step.sigma for step in steps] == SIGMAS[1:].tolist()
    assert all(step.latents.shape == step.denoised.shape == NOISE.shape for step in steps)


def test_latents_and_prediction_of_the_last_step_are_the_result(dit):
    steps: list[DenoiseStep] = []
    latents = denoise(dit, NOISE, TEXT, SIGMAS, on_step=steps.append)
    assert torch.equal(steps[-1].latents, latents)
    assert torch.equal(steps[-1].denoised, latents)


def test_prediction_of_a_step_lies_on_its_line_to_sigma_zero(dit):
    steps: list[DenoiseStep] = []
    denoise(dit, NOISE, TEXT, SIGMAS, on_step=steps.append)
    ratio = steps[0].sigma / 1.0
    expected = steps[0].denoised + ratio * (NOISE - steps[0].denoised)
    torch.testing.assert_close(steps[0].latents, expected, rtol=1e-4, atol=1e-5)


def test_callbacks_change_nothing(dit):
    watched = denoise(dit, NOISE, TEXT, SIGMAS, on_step=lambda step: None, should_stop=lambda: False)
    assert torch.equal(watched, denoise(dit, NOISE, TEXT, SIGMAS))


def test_stops_before_the_step_at_which_it_is_told(dit):
    steps: list[DenoiseStep] = []
    with pytest.raises(Stopped, match="stopped after 2 of 4 steps"):
        denoise(dit, NOISE, TEXT, SIGMAS, on_step=steps.append, should_stop=lambda: len(steps) == 2)
    assert len(steps) == 2


def test_a_bf16_network_keeps_fp32_latents():
    latents = denoise(build_dit().bfloat16(), NOISE, TEXT, SIGMAS)
    assert latents.dtype == torch.float32
    exact = denoise(build_dit(), NOISE, TEXT, SIGMAS)
    assert (latents - exact).norm() < 0.1 * exact.norm()


def test_what_all_steps_have_in_common_is_computed_once(monkeypatch):
    dit, calls = build_dit(has_guidance_embedder=True), []
    for name in ("txt_in", "guidance_in", "time_in"):
        getattr(dit, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    table = dit_module.rope_table
    monkeypatch.setattr(dit_module, "rope_table", lambda *args: (calls.append("rope"), table(*args))[1])
    denoise(dit, NOISE, TEXT, SIGMAS, guidance=4.0)
    assert sorted(calls) == ["guidance_in", "rope", *4 * ["time_in"], "txt_in"]


@torch.inference_mode()
def start_by_hand(dit: Flux2DiT, initial: Tensor, mask: Tensor, sigmas: list[float], cfg_scale: float) -> Tensor:
    """Euler on clean pictures, one forward per prompt, in fp64: what is kept comes back at every noise level."""
    height, width = NOISE.shape[-2:]
    ids, noise, initial, mask = image_ids(height, width), NOISE.double(), initial.double(), mask.double()
    state = sigmas[0] * noise + (1 - sigmas[0]) * initial
    for sigma, next_sigma in pairwise(sigmas):
        seen = mask * state + (1 - mask) * (sigma * noise + (1 - sigma) * initial)
        positive, negative = (
            seen - sigma * tokens_to_latents(
                dit(latents_to_tokens(seen).float(), ids, text, text_ids(text.shape[1]), torch.tensor([sigma])),
                height,
                width,
            )
            for text in (TEXT, NEGATIVE_TEXT)
        )  # fmt: skip
        clean = mask * (negative + cfg_scale * (positive - negative)) + (1 - mask) * initial
        state = clean + (next_sigma / sigma) * (state - clean)
    return state


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("hardness", ["hard", "soft", "none"])
def test_image_to_image_and_inpainting_equal_steps_by_hand(dit, strength, hardness):
    initial, sigmas = 0.7 * seed_noise(6, 1, 48, 64), sigma_schedule(4, 12, strength=strength)
    mask = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(7))
    mask = {"soft": mask, "hard": mask.round(), "none": torch.ones_like(mask)}[hardness]
    ours = denoise(
        dit, NOISE, TEXT, sigmas, cfg_scale=3.0, negative_text=NEGATIVE_TEXT, initial=initial,
        mask=None if hardness == "none" else mask,
    )  # fmt: skip
    torch.testing.assert_close(
        ours.double(), start_by_hand(dit, initial, mask, sigmas.tolist(), 3.0), rtol=1e-4, atol=1e-4
    )
    if hardness == "hard":
        torch.testing.assert_close(ours * (1 - mask), initial * (1 - mask), rtol=0, atol=1e-6)


def test_an_empty_start_is_no_start(dit):
    assert torch.equal(
        denoise(dit, NOISE, TEXT, SIGMAS, initial=torch.zeros_like(NOISE)), denoise(dit, NOISE, TEXT, SIGMAS)
    )
