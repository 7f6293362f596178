"""The tiny model's pictures, captions and judge."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from flux2_kit.training.tiny.captions import (
    combination_of,
    edit_of,
    full_caption,
    random_caption,
    random_combination,
    random_edit,
)
from flux2_kit.training.tiny.evaluate import (
    held_out_combinations,
    held_out_edits,
    held_out_prompts,
    judge,
    score,
)
from flux2_kit.training.tiny.pictures import (
    COLORS,
    KINDS,
    PICTURE_SIZE,
    SIZES,
    Scene,
    all_scenes,
    draw_scenes,
    held_out_scenes,
    scene_masks,
)
from flux2_kit.training.tiny.train_dit import DiTTrainConfig, TaskSampler

SCENE = Scene(kind="circle", color="red", size="large", position="top left", background="blue")


def test_the_domain_has_every_combination_once() -> None:
    assert len(set(all_scenes())) == len(all_scenes()) == 6 * 3 * 9 * 8 * 7


def test_a_drawn_scene_has_its_colors() -> None:
    (picture,) = (draw_scenes([SCENE]) * 255).round()
    assert picture.shape == (3, PICTURE_SIZE, PICTURE_SIZE)
    assert tuple(picture[:, 22, 22].int().tolist()) == COLORS["red"]
    assert tuple(picture[:, 60, 60].int().tolist()) == COLORS["blue"]


def test_shapes_have_their_size_and_stay_inside() -> None:
    masks = scene_masks()
    assert masks[:, 0].max() < 0.01 and masks[:, -1].max() < 0.01
    widths = (masks.amax(1) > 0.5).sum(1).reshape(len(KINDS), len(SIZES), -1)
    for index, size in enumerate(SIZES.values()):
        assert widths[:, index].max() <= size and widths[KINDS.index("circle"), index].min() >= size - 1


def test_the_judge_reads_every_mask_through_noise() -> None:
    scenes = all_scenes()[:: len(COLORS) * (len(COLORS) - 1) // 2]
    noise = 0.1 * torch.randn(len(scenes), 3, PICTURE_SIZE, PICTURE_SIZE, generator=torch.Generator().manual_seed(0))
    assert judge(draw_scenes(scenes) + noise) == list(scenes)


def test_a_score_counts_each_attribute() -> None:
    wrong = replace(SCENE, kind="ring", position="center")
    result = score([SCENE, wrong], [SCENE, SCENE])
    assert (result.kind, result.position, result.color, result.size, result.all) == (0.5, 0.5, 1.0, 1.0, 0.5)


def test_captions() -> None:
    assert full_caption(SCENE) == "a large red circle at the top left on a blue background"
    rng = random.Random(0)
    captions = {random_caption(SCENE, rng) for _ in range(2000)}
    assert len(captions) > 100
    assert {"red circle", "a red circle", "a large circle", full_caption(SCENE)} <= captions
    assert all("circle" in caption and "None" not in caption and "  " not in caption for caption in captions)


@pytest.mark.parametrize(
    ("attribute", "value", "prompt"),
    [
        ("color", "green", "make the circle green"),
        ("background", "yellow", "make the background yellow"),
        ("kind", "star", "turn the circle into a star"),
        ("position", "bottom right", "move the circle to the bottom right"),
    ],
)
def test_edits(attribute: str, value: str, prompt: str) -> None:
    rng = random.Random(0)
    examples = [edit_of(SCENE, attribute, rng, value) for _ in range(60)]
    assert prompt in {example.prompt for example in examples}
    assert {example.target for example in examples} == {replace(SCENE, **{attribute: value})}


def test_an_edit_never_hides_the_shape() -> None:
    rng = random.Random(0)
    targets = [random_edit(rng.choice(all_scenes()), rng).target for _ in range(500)]
    assert all(target.color != target.background for target in targets)


def test_combinations() -> None:
    second = replace(SCENE, kind="ring", color="green", background="white")
    example = combination_of(SCENE, second, random.Random(0))
    assert example.target == replace(SCENE, color="green") and example.references == (SCENE, second)
    assert random_combination(SCENE, replace(SCENE, color="blue", background="red"), random.Random(0)) is None


def test_training_never_shows_a_held_out_scene() -> None:
    held_out, tasks = set(held_out_scenes()), TaskSampler(DiTTrainConfig())
    shown = {scene for seed in range(60) for example in tasks.sample(seed) for scene in _scenes(example)}
    assert len(shown) > 3000 and not shown & held_out


@pytest.mark.parametrize("make", [held_out_prompts, held_out_edits, held_out_combinations])
def test_the_evaluation_asks_for_held_out_scenes_from_seen_references(make) -> None:
    examples, held_out = make(), set(held_out_scenes())
    assert [example.target for example in examples] == list(held_out_scenes())
    assert not {scene for example in examples for scene in example.references} & held_out


def _scenes(example) -> tuple[Scene, ...]:
    return (*example.references, example.target)
