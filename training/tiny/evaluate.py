"""How well the bundled tiny model does what it is asked, on combinations it never saw in training.

The judge is exact, not learned: a picture is taken for the scene whose mask explains it best with any two colours
(least squares over the 162 masks of each style), and each colour for the nearest of the palette. A picture that no mask
explains by half is in no style.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ...flux2_core.autoencoder import Flux2Autoencoder
from ...flux2_core.images import image_to_tensor, tensor_to_images
from ...flux2_core.pipeline import Flux2Pipeline, SamplingConfig, sample_latents
from .captions import Example, article, combination_of, edit_of, full_caption
from .pictures import (
    COLORS,
    KINDS,
    POSITIONS,
    SIZES,
    STYLES,
    Scene,
    color_values,
    draw_scenes,
    held_out_scenes,
    scene_masks,
    seen_scenes,
)

BATCH_SIZE = 50
MIN_EXPLAINED = 0.5
"""Share of a picture's variance that a mask with two colours must explain for the picture to be in its style. Of drawn
pictures that went through the autoencoder it is more than 0.7; of noise, or stripes without a shape, less than 0.2."""
FLAT_VARIANCE = 1e-6
"""Of a picture that shows nothing: a quarter of a grey level of 256."""
UNCLEAR = "unclear"
"""In the place of a style, where there is none."""
EDITED_ATTRIBUTES = ("color", "background", "kind", "position")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares, 0..1, of pictures in which an attribute is as asked."""

    num_pictures: int
    kind: float
    color: float
    background: float
    size: float
    position: float
    all: float
    """Every attribute right at once."""


def judge(pictures: Tensor) -> list[Scene]:
    """The scene that each picture ``[N, 3, 64, 64]`` in 0..1 shows, where all shapes are plain."""
    return [scene for scene, _ in judge_styles(pictures, ("plain",))]


def judge_styles(pictures: Tensor, styles: Sequence[str] = STYLES) -> list[tuple[Scene, str]]:
    """The scene that each picture ``[N, 3, 64, 64]`` in 0..1 shows, and in which of the styles, or `UNCLEAR`."""
    masks = torch.cat([scene_masks(style) for style in styles]).flatten(1)  # [M, P]
    pixels = pictures.flatten(2)  # [N, 3, P]
    # Least squares of pixels = background + mask * (foreground - background), in closed form per mask and channel.
    mean_mask, mean_pixel = masks.mean(1), pixels.mean(2)
    covariance = torch.einsum("mp,ncp->nmc", masks, pixels) / masks.shape[1] - mean_mask[:, None] * mean_pixel[:, None]
    variance = masks.square().mean(1) - mean_mask.square()
    explained = (covariance.square() / variance[:, None]).sum(-1)  # [N, M]
    most, best = explained.max(1)
    variances = pixels.var(2, correction=0).sum(1).clamp_min(FLAT_VARIANCE)
    is_clear = (most > MIN_EXPLAINED * variances).tolist()
    rows = torch.arange(len(pictures))
    difference = covariance[rows, best] / variance[best, None]
    backgrounds = mean_pixel - mean_mask[best, None] * difference
    palette, names = color_values(), list(COLORS)
    nearest = [torch.cdist(colors, palette).argmin(1).tolist() for colors in (backgrounds + difference, backgrounds)]
    shapes = [
        (style, kind, size, position) for style in styles for kind in KINDS for size in SIZES for position in POSITIONS
    ]
    shown = []
    for index, clear, color, background in zip(best.tolist(), is_clear, *nearest, strict=True):
        style, kind, size, position = shapes[index]
        scene = Scene(kind=kind, size=size, position=position, color=names[color], background=names[background])
        shown.append((scene, style if clear else UNCLEAR))
    return shown


def held_out_prompts() -> list[Example]:
    """The full caption of each of the 200 held-out scenes."""
    return [Example(prompt=full_caption(scene), references=(), target=scene) for scene in held_out_scenes()]


def short_prompts() -> list[Example]:
    """Colour and kind of each held-out scene; the model chooses the rest, so only these two can be right or wrong."""
    return [
        Example(prompt=f"{article(scene.color)} {scene.color} {scene.kind}", references=(), target=scene)
        for scene in held_out_scenes()
    ]


def held_out_edits() -> list[Example]:
    """200 edits whose result is a held-out scene, a quarter each of colour, background, kind and position."""
    rng = random.Random(3)
    examples = []
    for index, target in enumerate(held_out_scenes()):
        attribute = EDITED_ATTRIBUTES[index % len(EDITED_ATTRIBUTES)]
        source = _other_source(target, attribute, rng)
        examples.append(edit_of(source, attribute, rng, getattr(target, attribute)))
    return examples


def held_out_combinations() -> list[Example]:
    """200 pairs of references whose combination is a held-out scene."""
    rng = random.Random(4)
    examples = []
    for target in held_out_scenes():
        first = _other_source(target, "color", rng)
        second = rng.choice([s for s in seen_scenes() if s.color == target.color])
        examples.append(combination_of(first, second, rng))
    return examples


def _other_source(target: Scene, attribute: str, rng: random.Random) -> Scene:
    values = {"color": COLORS, "background": COLORS, "kind": KINDS, "position": POSITIONS}[attribute]
    seen = set(seen_scenes())
    sources = (replace(target, **{attribute: value}) for value in values if value != getattr(target, attribute))
    return rng.choice([source for source in sources if source in seen])


@torch.inference_mode()
def evaluate(
    pipeline: Flux2Pipeline,
    examples: Sequence[Example],
    sampling: SamplingConfig | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Score:
    """Generates the picture of every example with the defaults of the variant and counts what came out right."""
    sampling = sampling or SamplingConfig()
    shown: list[Scene] = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        shown += judge(generate_batch(pipeline, batch, replace(sampling, num_images=len(batch), seed=start)))
        if on_batch is not None:
            on_batch(len(shown), len(examples))
    return score(shown, [example.target for example in examples])


def generate_batch(pipeline: Flux2Pipeline, examples: Sequence[Example], sampling: SamplingConfig) -> Tensor:
    """Pictures ``[N, 3, 64, 64]`` in 0..1, rounded to 8 bits, of examples with equally many references."""
    text = torch.cat([pipeline.encode_prompt(example.prompt) for example in examples])
    references = []
    for index in range(len(examples[0].references)):
        pictures = draw_scenes([example.references[index] for example in examples])
        references.append(pipeline.autoencoder.encode((pictures * 255).round() / 127.5 - 1))
    negative = pipeline.encode_prompt("")
    latents = sample_latents(
        pipeline.dit, pipeline.variant, sampling, text, negative_text=negative, references=references
    )
    pictures = [image_to_tensor(image) for image in tensor_to_images(pipeline.autoencoder.decode(latents))]
    return torch.cat(pictures) / 2 + 0.5


def score(shown: Sequence[Scene], wanted: Sequence[Scene]) -> Score:
    """Shares of equal attributes."""
    pairs = list(zip(shown, wanted, strict=True))
    shares = {
        field.name: sum(getattr(a, field.name) == getattr(b, field.name) for a, b in pairs) / len(pairs)
        for field in fields(Scene)
    }
    return Score(num_pictures=len(pairs), all=sum(a == b for a, b in pairs) / len(pairs), **shares)


@torch.inference_mode()
def round_trip_psnr(autoencoder: Flux2Autoencoder) -> float:
    """PSNR in dB of the mean squared error over all held-out pictures, in 8-bit grey levels as a user gets them."""
    pictures = (draw_scenes(held_out_scenes()) * 255).round()
    batches = (batch / 127.5 - 1 for batch in pictures.split(BATCH_SIZE))
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(batch)).cpu() for batch in batches])
    error = (((decoded.clamp(-1, 1) + 1) * 127.5).round() - pictures).square().mean().item()
    return 10 * math.log10(255**2 / error)
