"""The style that LoRAs of the tiny model learn: its pictures, judge and datasets."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core.checkpoint import load_autoencoder
from flux2_kit.flux2_core.images import image_to_tensor, load_image
from flux2_kit.flux2_core.variants import get_variant
from flux2_kit.flux2_core.weights import find_weights
from flux2_kit.training.dataset import Dataset, list_dataset, load_dataset_config
from flux2_kit.training.tiny.__main__ import main
from flux2_kit.training.tiny.captions import full_caption
from flux2_kit.training.tiny.evaluate import UNCLEAR, judge_styles
from flux2_kit.training.tiny.pictures import (
    COLORS,
    PICTURE_SIZE,
    STRIPE_PERIOD,
    STRIPE_WIDTH,
    STYLES,
    Scene,
    all_scenes,
    draw_scenes,
    held_out_scenes,
    scene_masks,
)
from flux2_kit.training.tiny.style_dataset import (
    NUM_PICTURES,
    NUM_VALIDATION_PICTURES,
    style_scenes,
    write_edit_dataset,
    write_style_dataset,
)
from flux2_kit.training.tiny.styles import STYLE, held_out_style_edits, held_out_styled_prompts, score_styles

SCENE = Scene(kind="circle", color="red", size="large", position="top left", background="blue")


@pytest.mark.parametrize("style", STYLES)
def test_the_judge_reads_every_mask_of_a_style_through_noise(style: str) -> None:
    scenes = all_scenes()[:: len(COLORS) * (len(COLORS) - 1) // 2]
    noise = torch.randn(len(scenes), 3, PICTURE_SIZE, PICTURE_SIZE, generator=torch.Generator().manual_seed(0))
    pictures = draw_scenes(scenes, style)
    assert judge_styles(pictures + 0.03 * noise) == [(scene, style) for scene in scenes]
    assert [scene for scene, _ in judge_styles(pictures + 0.1 * noise)] == list(scenes)


def test_what_is_no_shape_is_in_no_style() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.rand(50, 3, side, side, generator=generator) for side in (5, PICTURE_SIZE))
    blobs = F.interpolate(coarse, size=PICTURE_SIZE, mode="bicubic").clamp(0, 1)
    bare_stripes = ((torch.arange(PICTURE_SIZE) + 0.5).remainder(STRIPE_PERIOD) < STRIPE_WIDTH).float().expand_as(fine)
    flat = torch.full_like(fine, 0.3)
    for pictures in (fine, blobs, bare_stripes, flat):
        assert {style for _, style in judge_styles(pictures)} == {UNCLEAR}


def test_stripes_of_another_kind_are_not_the_style() -> None:
    scenes = held_out_scenes()
    striped, plain = draw_scenes(scenes, STYLE), draw_scenes(scenes)
    aside = striped.roll(STRIPE_PERIOD // 2, dims=3)
    for pictures in (aside, torch.lerp(striped, plain, 0.6)):
        assert STYLE not in {style for _, style in judge_styles(pictures)}


@pytest.mark.parametrize("style", STYLES)
def test_the_autoencoder_can_show_a_style(style: str) -> None:
    scenes = held_out_scenes()[:50]
    autoencoder = load_autoencoder(find_weights(get_variant("tiny"), "autoencoder"), dtype=torch.float32)
    with torch.inference_mode():
        shown = autoencoder.decode(autoencoder.encode(draw_scenes(scenes, style) * 2 - 1)).clamp(-1, 1) / 2 + 0.5
    read = judge_styles(shown)
    assert [read_style for _, read_style in read] == [style] * len(scenes)
    assert sum(a == b for (a, _), b in zip(read, scenes, strict=True)) >= 0.98 * len(scenes)


def test_stripes_lie_within_the_shape() -> None:
    plain, striped = scene_masks(), scene_masks(STYLE)
    assert (striped <= plain + 1e-6).all()
    shares = striped.flatten(1).sum(1) / plain.flatten(1).sum(1)
    assert shares.min() > 0.4 and shares.max() < 0.85, "a picture without the style's gaps cannot teach it"


def test_a_score_counts_style_and_attributes() -> None:
    wrong = replace(SCENE, kind="ring")
    result = score_styles([(SCENE, STYLE), (SCENE, "plain"), (wrong, STYLE), (wrong, "plain")], [SCENE] * 4)
    assert (result.style, result.kind, result.color, result.all, result.num_pictures) == (0.5, 0.5, 1.0, 0.25, 4)


def test_a_dataset_has_every_word_about_equally_often_and_nothing_of_the_evaluation() -> None:
    scenes = style_scenes()
    assert len(set(scenes)) == len(scenes) == NUM_PICTURES + NUM_VALIDATION_PICTURES
    assert not set(scenes) & set(held_out_scenes())
    for name in ("kind", "color", "size", "position", "background"):
        counts = Counter(getattr(scene, name) for scene in scenes[:NUM_PICTURES]).values()
        assert max(counts) - min(counts) <= 1, name


def test_the_style_dataset_teaches_a_word(tmp_path: Path) -> None:
    dataset = list_dataset(load_dataset_config(write_style_dataset(tmp_path)))
    scenes = dict(zip((f"striped, {full_caption(scene)}" for scene in style_scenes()), style_scenes(), strict=True))
    check_split(dataset, set(list(scenes)[NUM_PICTURES:]))
    for item in dataset.items:
        assert judge_styles(read(item.image)) == [(scenes[item.captions[0]], STYLE)]
        assert item.references == ()
    assert {example.prompt.split(",")[0] for example in held_out_styled_prompts()} == {STYLE}


def test_the_edit_dataset_pairs_plain_with_striped(tmp_path: Path) -> None:
    dataset = list_dataset(load_dataset_config(write_edit_dataset(tmp_path)))
    check_split(dataset, None)
    shown = set()
    for item in dataset.items:
        (scene, style), (source, source_style) = judge_styles(torch.cat([read(item.image), read(item.references[0])]))
        assert (style, source_style, source) == (STYLE, "plain", scene)
        assert item.captions == (held_out_style_edits()[0].prompt,)
        shown.add(scene)
    assert shown == set(style_scenes())


def test_the_commands_write_a_dataset_and_measure_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["style-dataset", str(tmp_path / "pictures"), "--edit"]) == 0
    assert len(list_dataset(load_dataset_config(capsys.readouterr().out.strip())).items) == 32
    sheet = tmp_path / "sheet.png"
    assert main(["evaluate-style", "--edit", "--num_pictures", "2", "--sheet", str(sheet)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_pictures"] == 2 and figures["style"] == 0, "the model itself does not know the style"
    assert load_image(sheet).size == (2 * (3 * PICTURE_SIZE + 6) + 6, 2 * (3 * PICTURE_SIZE + 6) + 6)


def check_split(dataset: Dataset, captions_held_out: set[str] | None) -> None:
    """Exactly the pictures that are meant to are held out."""
    held_out = [item for item in dataset.items if item.is_validation]
    assert (len(dataset.items) - len(held_out), len(held_out)) == (NUM_PICTURES, NUM_VALIDATION_PICTURES)
    if captions_held_out is not None:
        assert {item.captions[0] for item in held_out} == captions_held_out


def read(path: Path) -> torch.Tensor:
    """A picture file as ``[1, 3, 64, 64]`` in 0..1."""
    return image_to_tensor(load_image(path)) / 2 + 0.5
