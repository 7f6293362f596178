"""The denoise loop: Euler steps over the sigma schedule, with embedded or classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dit import Flux2DiT
from .latents import image_ids, latents_to_tokens, reference_tokens, text_ids, tokens_to_latents
from .reference_cache import ReferenceCacheMode, reference_caches


class Stopped(Exception):  # noqa: N818 - no error: the user asked for it
    """`should_stop` answered yes; nothing was written."""


@dataclass(frozen=True, kw_only=True)
class DenoiseStep:
    """What a step callback is told."""

    index: int
    """Steps done, from 1."""
    num_steps: int
    sigma: float
    """Noise level of `latents` after the step."""
    latents: Tensor
    """``[B, 128, h, w]``, still noisy."""
    denoised: Tensor
    """``[B, 128, h, w]``: the clean picture as predicted at this step."""


StepCallback = Callable[[DenoiseStep], None]


@torch.inference_mode()
def denoise(
    dit: Flux2DiT,
    noise: Tensor,
    text: Tensor,
    sigmas: Tensor,
    *,
    references: Sequence[Tensor] = (),
    reference_cache: ReferenceCacheMode = "off",
    guidance: float | None = None,
    cfg_scale: float = 1.0,
    negative_text: Tensor | None = None,
    initial: Tensor | None = None,
    mask: Tensor | None = None,
    on_step: StepCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Integrates ``d latents / d sigma = velocity`` from the first sigma to 0 and returns clean latents, fp32.

    Args:
        dit: the network; activations run in its dtype on its device.
        noise: ``[B, 128, h, w]``.
        text: ``[B, L, C]``, or ``[1, L, C]`` for the whole batch.
        sigmas: ``[num_steps + 1]`` from `schedule.sigma_schedule`.
        references: latents ``[B or 1, 128, h_i, w_i]``, in the order in which prompts count them.
        reference_cache: off computes their tokens in every step, exact and approximate as `reference_cache` says.
        guidance: embedded guidance, for networks with a guidance embedder.
        cfg_scale: classifier-free guidance ``negative + cfg_scale * (positive - negative)``; both run as one batch.
        negative_text: like `text`; required when `cfg_scale` is not 1.
        initial: clean latents ``[B or 1, 128, h, w]`` to start from, ``sigma * noise + (1 - sigma) * initial``.
        mask: ``[B or 1, 1, h, w]``, 1 where the picture is made anew and 0 where it stays `initial`; in between, both
            are blended in every step, before and behind the network, as ComfyUI's samplers do.
        on_step: told after every step.
        should_stop: asked before every step; True raises `Stopped`.
    """
    batch, _, height, width = noise.shape
    use_cfg = cfg_scale != 1.0
    assert not use_cfg or negative_text is not None, "cfg_scale needs negative_text"
    assert reference_cache != "auto", "the variant decides, see `pipeline.SamplingConfig.resolved`"
    device, dtype = dit.device, dit.dtype

    # 1. What stays the same over all steps.
    ids = ids_of_image = image_ids(height, width)
    extra_tokens = cached = None
    if references and reference_cache == "exact":
        cached = reference_caches(dit).exact(dit, references, guidance)
    elif references:
        extra_tokens, extra_ids = reference_tokens([latents.expand(batch, -1, -1, -1) for latents in references])
        ids = torch.cat((ids, extra_ids))
        extra_tokens = extra_tokens.to(device, dtype)
    text = text.expand(batch, -1, -1)
    if use_cfg and negative_text is not None:
        text = torch.cat((negative_text.expand(batch, -1, -1), text))
        extra_tokens = torch.cat((extra_tokens, extra_tokens)) if extra_tokens is not None else None
    text = text.to(device, dtype)
    num_rows = text.shape[0]
    ids, ids_of_text = ids.to(device), text_ids(text.shape[1]).to(device)
    guidance_vector = torch.full((num_rows,), guidance, device=device) if guidance is not None else None
    prepared = dit.prepare(ids, text, ids_of_text, guidance_vector)
    if extra_tokens is not None and reference_cache == "approximate":
        cached = reference_caches(dit).new(dit, extra_tokens.shape[1], num_rows)
    levels = sigmas.tolist()
    level_vectors = torch.tensor(levels, dtype=torch.float32, device=device)[:, None].expand(-1, num_rows)

    # 2. Euler steps; the state stays fp32 so that many small steps lose nothing. Nothing here waits for the device.
    pure_noise = latents_to_tokens(noise).to(device, torch.float32)
    known = None if initial is None else latents_to_tokens(initial).to(device, torch.float32)
    free = None if mask is None else latents_to_tokens(mask).to(device, torch.float32)
    state = pure_noise if known is None else add_noise(known, pure_noise, levels[0])
    num_image_tokens = state.shape[1]
    num_steps = len(levels) - 1
    for step in range(num_steps):
        if should_stop is not None and should_stop():
            raise Stopped(f"stopped after {step} of {num_steps} steps")
        sigma, next_sigma = levels[step], levels[step + 1]
        noisy = state
        if known is not None and free is not None:
            noisy = free * state + (1 - free) * add_noise(known, pure_noise, sigma)
        tokens = noisy.to(dtype)
        if use_cfg:
            tokens = torch.cat((tokens, tokens))
        if extra_tokens is not None:
            tokens = torch.cat((tokens, extra_tokens), dim=1)
        velocity = dit.velocity(tokens, level_vectors[step], prepared, cached)[:, :num_image_tokens].float()
        if extra_tokens is not None and cached is not None:  # from now on they are in the cache
            prepared = dit.prepare(ids_of_image.to(device), text, ids_of_text, guidance_vector)
            extra_tokens = None
        if use_cfg:
            negative, positive = velocity.chunk(2)
            velocity = negative + cfg_scale * (positive - negative)
        clean = noisy - sigma * velocity
        if known is not None and free is not None:
            clean = free * clean + (1 - free) * known
            velocity = (state - clean) / sigma
        state = state + (next_sigma - sigma) * velocity
        if on_step is not None:
            latents = tokens_to_latents(state, height, width)
            denoised = tokens_to_latents(clean, height, width)
            on_step(
                DenoiseStep(index=step + 1, num_steps=num_steps, sigma=next_sigma, latents=latents, denoised=denoised)
            )
    return tokens_to_latents(state, height, width)


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents at a noise level, 0 for clean ones and 1 for pure noise."""
    return sigma * noise + (1 - sigma) * clean
