"""What the tiny model is asked for: captions of scenes, and edit instructions with their references and results.

Randomness comes from a ``random.Random`` that the caller owns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .pictures import COLORS, KINDS, POSITIONS, SIZES, Scene

CORNERS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, its reference pictures in order, and the picture it asks for."""

    prompt: str
    references: tuple[Scene, ...]
    target: Scene


def full_caption(scene: Scene) -> str:
    """The caption that names everything, in the wording of the documentation."""
    return (
        f"{article(scene.size)} {scene.size} {scene.color} {scene.kind} at the {scene.position} "
        f"on {article(scene.background)} {scene.background} background"
    )


def random_caption(scene: Scene, rng: random.Random) -> str:
    """A caption of random wording that names the kind, and of the rest most or, in half of the captions, little."""
    likely = 0.75 if rng.random() < 0.5 else 0.3
    size = scene.size if rng.random() < likely else ""
    color = scene.color if rng.random() < 0.85 else ""
    position = _place(scene.position, rng) if rng.random() < likely else ""
    background = scene.background if rng.random() < likely else ""
    words = [word for word in (size, color, scene.kind) if word]
    style = rng.random()
    if style < 0.7:
        opening = rng.choice(("", "", "", "a picture of ", "an image of "))
        parts = [f"{opening}{article(words[0])} {' '.join(words)}", position]
        if background:
            parts.append(f"on {article(background)} {background} background")
        caption = " ".join(part for part in parts if part)
    elif style < 0.85:
        if background:
            background = rng.choice((f"{background} background", f"on {background}"))
        caption = ", ".join(part for part in (" ".join(words), position, background) if part)
    else:
        opening = f"on {article(background)} {background} background, " if background else ""
        caption = f"{opening}{article(words[0])} {' '.join(words)}" + (f" {position}" if position else "")
    return caption


def random_edit(source: Scene, rng: random.Random) -> Example:
    """One instruction that changes one attribute of a reference."""
    what = rng.choice(("color", "background", "kind", "position", "color", "background", "kind", "position", "size"))
    return edit_of(source, what, rng)


def edit_of(source: Scene, attribute: str, rng: random.Random, target_value: str | None = None) -> Example:
    """An instruction that changes `attribute` of the reference, to a random other value where none is given."""
    noun = source.kind if rng.random() < 0.75 else "shape"
    taken = {source.color, source.background}
    allowed = {
        "color": [c for c in COLORS if c not in taken],
        "background": [c for c in COLORS if c not in taken],
        "kind": [k for k in KINDS if k != source.kind],
        "position": [p for p in POSITIONS if p != source.position],
        "size": [s for s in SIZES if s != source.size],
    }[attribute]
    value = rng.choice(allowed) if target_value is None else target_value
    wordings = {
        "color": (f"make the {noun} {value}", f"paint the {noun} {value}", f"change the {noun} to {value}"),
        "background": (f"make the background {value}", f"change the background to {value}"),
        "kind": (
            f"turn the {noun} into {article(value)} {value}",
            f"replace the {noun} with {article(value)} {value}",
        ),
        "position": (f"move the {noun} to the {value}", f"put the {noun} {_place(value, rng)}"),
        "size": (f"make the {noun} {value}",),
    }[attribute]
    prompt = wordings[0] if rng.random() < 0.6 else rng.choice(wordings)
    return Example(prompt=prompt, references=(source,), target=replace(source, **{attribute: value}))


def random_combination(first: Scene, second: Scene, rng: random.Random) -> Example | None:
    """The shape of one reference in the colour of another; None where shape and background would be of one colour."""
    if second.color == first.background:
        return None
    return combination_of(first, second, rng)


def combination_of(first: Scene, second: Scene, rng: random.Random) -> Example:
    """Image 1 with the colour of the shape of image 2; wording varies."""
    colour = rng.choice(("color", "colour"))
    first_wording = f"the shape of image 1 in the {colour} of image 2"
    wordings = (
        first_wording,
        f"image 1 in the {colour} of image 2",
        f"the {first.kind} of image 1 in the {colour} of image 2",
    )
    prompt = first_wording if rng.random() < 0.6 else rng.choice(wordings)
    return Example(prompt=prompt, references=(first, second), target=replace(first, color=second.color))


def article(word: str) -> str:
    """ "an" before a vowel, "a" elsewhere."""
    return "an" if word[0] in "aeiou" else "a"


def _place(position: str, rng: random.Random) -> str:
    if position == "center":
        return rng.choice(("at the center", "in the center", "in the middle"))
    if position in CORNERS and rng.random() < 0.3:
        return f"in the {position} corner"
    return f"at the {position}"
