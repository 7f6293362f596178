"""Writes small datasets of the striped style, for LoRAs of the bundled tiny model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...flux2_core.files import write_atomically, write_text
from ...flux2_core.images import tensor_to_images
from ..dataset import validation_order
from .captions import full_caption
from .pictures import COLORS, KINDS, PICTURE_SIZE, POSITIONS, SIZES, Scene, draw_scenes, held_out_scenes
from .styles import INSTRUCTION, STYLE

NUM_PICTURES = 24
"""To train on."""
NUM_VALIDATION_PICTURES = 8
VALIDATION_FRACTION = NUM_VALIDATION_PICTURES / (NUM_PICTURES + NUM_VALIDATION_PICTURES)
BATCH_SIZE = 12
CAPTION_DROPOUT = 0.1
"""So that the unguided picture of classifier-free guidance is trained as well."""


def write_style_dataset(directory: Path) -> Path:
    """Writes striped pictures with plain captions; the returned TOML puts the style's word in front of them."""
    scenes, names = style_scenes(), _names()
    images = _make_folder(directory / "images")
    _write_pictures(images, names, draw_scenes(scenes, STYLE))
    for name, scene in zip(names, scenes, strict=True):
        write_text(images / f"{name}.txt", full_caption(scene) + "\n")
    return _write_config(directory, {"image_directory": "images", "trigger_word": STYLE})


def write_edit_dataset(directory: Path) -> Path:
    """Writes striped pictures, each with the plain one as its reference and the instruction as its caption."""
    scenes, names = style_scenes(), _names()
    images, references = _make_folder(directory / "images"), _make_folder(directory / "references")
    _write_pictures(images, names, draw_scenes(scenes, STYLE))
    _write_pictures(references, names, draw_scenes(scenes))
    for name in names:
        write_text(images / f"{name}.txt", INSTRUCTION + "\n")
    return _write_config(directory, {"image_directory": "images", "control_directory": "references"})


def style_scenes() -> list[Scene]:
    """The scenes to train on and then those for validation: each word about equally often, none of the evaluation's."""
    rng, held_out = random.Random(5), set(held_out_scenes())
    scenes: list[Scene] = []
    for count in (NUM_PICTURES, NUM_VALIDATION_PICTURES):
        while True:
            columns = [_spread(words, count, rng) for words in (KINDS, list(COLORS), list(SIZES), POSITIONS)]
            backgrounds = _spread(list(COLORS), count, rng)
            drawn = [
                Scene(kind=kind, color=color, size=size, position=position, background=background)
                for kind, color, size, position, background in zip(*columns, backgrounds, strict=True)
            ]
            are_allowed = all(scene.color != scene.background and scene not in held_out for scene in drawn)
            if are_allowed and len({*scenes, *drawn}) == len(scenes) + count:
                scenes += drawn
                break
    return scenes


def _spread(words: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """So many words, each as often as any other or once more, in random order."""
    rest = rng.sample(words, count % len(words))
    spread = [*words] * (count // len(words)) + rest
    rng.shuffle(spread)
    return spread


def _names() -> list[str]:
    """Names of the pictures: a dataset's split goes by name, so they are chosen to be on the right side of it."""
    kept: dict[bool, list[str]] = {False: [], True: []}
    for number in itertools.count(1):
        name = f"{number:03d}"
        kept[validation_order(f"{name}.png") < VALIDATION_FRACTION].append(name)
        if len(kept[False]) >= NUM_PICTURES and len(kept[True]) >= NUM_VALIDATION_PICTURES:
            break
    return kept[False][:NUM_PICTURES] + kept[True][:NUM_VALIDATION_PICTURES]


def _make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_pictures(folder: Path, names: Sequence[str], pictures: Tensor) -> None:
    for name, image in zip(names, tensor_to_images(pictures * 2 - 1), strict=True):
        write_atomically(folder / f"{name}.png", image.save)


def _write_config(directory: Path, paths: dict[str, str]) -> Path:
    settings = "".join(f'{key} = "{value}"\n' for key, value in paths.items())
    text = (
        f"[general]\nresolution = {PICTURE_SIZE}\nbatch_size = {BATCH_SIZE}\n"
        f"caption_dropout = {CAPTION_DROPOUT}\nvalidation_fraction = {VALIDATION_FRACTION}\n\n[[datasets]]\n{settings}"
    )
    return write_text(directory / "dataset.toml", text)
