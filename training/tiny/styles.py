"""What a LoRA of the striped style is asked for on scenes that it never saw, and how well it does it.

The style is learned in two ways: as pictures that a word in front of the caption calls for, and as an edit of a plain
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ...flux2_core.pipeline import Flux2Pipeline, SamplingConfig
from .captions import Example, full_caption
from .evaluate import BATCH_SIZE, Score, generate_batch, judge_styles, score
from .pictures import Scene, held_out_scenes

STYLE = "striped"
INSTRUCTION = f"make it {STYLE}"


@dataclass(frozen=True, kw_only=True)
class StyleScore(Score):
    """Shares, 0..1, of pictures that are in the style, and of pictures in which an attribute is as asked."""

    style: float


def styled_caption(scene: Scene) -> str:
    """The caption of a scene with the word of the style in front."""
    return f"{STYLE}, {full_caption(scene)}"


def held_out_styled_prompts() -> list[Example]:
    """The 200 held-out scenes, asked for in the style."""
    return [Example(prompt=styled_caption(scene), references=(), target=scene) for scene in held_out_scenes()]


def held_out_style_edits() -> list[Example]:
    """The 200 held-out scenes as plain references that are to be brought into the style."""
    return [Example(prompt=INSTRUCTION, references=(scene,), target=scene) for scene in held_out_scenes()]


@torch.inference_mode()
def evaluate_style(
    pipeline: Flux2Pipeline, examples: Sequence[Example], sampling: SamplingConfig | None = None
) -> StyleScore:
    """Generates the picture of every example and counts how many are in the style and show what was asked for."""
    sampling = sampling or SamplingConfig()
    shown: list[tuple[Scene, str]] = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        shown += judge_styles(generate_batch(pipeline, batch, replace(sampling, num_images=len(batch), seed=start)))
    return score_styles(shown, [example.target for example in examples])


def score_styles(shown: Sequence[tuple[Scene, str]], wanted: Sequence[Scene]) -> StyleScore:
    """Shares of pictures in the style and of equal attributes; ``all`` is the whole scene, in the style."""
    scenes = [scene for scene, _ in shown]
    styled = [style == STYLE for _, style in shown]
    whole = [is_styled and a == b for is_styled, a, b in zip(styled, scenes, wanted, strict=True)]
    attributes = replace(score(scenes, wanted), all=sum(whole) / len(whole))
    return StyleScore(style=sum(styled) / len(styled), **asdict(attributes))
