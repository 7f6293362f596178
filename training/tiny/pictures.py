"""The procedural pictures of the bundled tiny model: one shape on a plain background, 64x64 px.

A picture is fully described by a `Scene`. All masks are drawn once by supersampling; a batch is then composed from
masks and colours, which costs next to nothing.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

PICTURE_SIZE = 64
SUPERSAMPLING = 4
EDGE_SIGMA = 0.6
"""Standard deviation, in pixels, of the Gaussian that softens the edges of a shape."""
MARGIN = 2
"""Pixels between the border of the picture and a shape placed there."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "purple": (140, 50, 180),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, int] = {"small": 24, "medium": 32, "large": 40}
"""Width of a shape in pixels."""
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
STYLES = ("plain", "striped")
"""How a shape is filled: whole, or with stripes. The model knows plain shapes; a LoRA is to learn the other style."""
STRIPE_PERIOD, STRIPE_WIDTH = 16, 10
"""In pixels: vertical stripes, from the left edge of the picture on."""
NUM_HELD_OUT_SCENES = 200


@dataclass(frozen=True, kw_only=True, order=True)
class Scene:
    """One picture of the domain: words out of `KINDS`, `COLORS`, `SIZES` and `POSITIONS`."""

    kind: str
    color: str
    size: str
    position: str
    background: str


@lru_cache(maxsize=1)
def all_scenes() -> tuple[Scene, ...]:
    """All 9072 pictures of the domain, in a fixed order."""
    return tuple(
        Scene(kind=kind, size=size, position=position, color=color, background=background)
        for kind, size, position, color, background in itertools.product(KINDS, SIZES, POSITIONS, COLORS, COLORS)
        if color != background
    )


@lru_cache(maxsize=1)
def held_out_scenes() -> tuple[Scene, ...]:
    """The 200 combinations that no training target ever shows; the evaluation asks for exactly these."""
    return tuple(random.Random(2).sample(all_scenes(), NUM_HELD_OUT_SCENES))


@lru_cache(maxsize=1)
def seen_scenes() -> tuple[Scene, ...]:
    """All scenes that training may show: every one but the held-out, in the order of `all_scenes`."""
    held_out = set(held_out_scenes())
    return tuple(scene for scene in all_scenes() if scene not in held_out)


def scene_center(size: str, position: str) -> tuple[float, float]:
    """Centre (x, y) in pixels of a shape of this size at this position."""
    near = MARGIN + SIZES[size] / 2
    row, column = divmod(POSITIONS.index(position), 3)
    along = (near, PICTURE_SIZE / 2, PICTURE_SIZE - near)
    return along[column], along[row]


def draw_masks(
    kind: str,
    center_x: Tensor,
    center_y: Tensor,
    size: Tensor,
    angle: Tensor,
    picture_size: int = PICTURE_SIZE,
    style: str = "plain",
) -> Tensor:
    """Coverage masks ``[N, S, S]`` in 0..1 of N shapes of one kind; centres and sizes in pixels, angles in radians."""
    side = picture_size * SUPERSAMPLING
    grid = (torch.arange(side) + 0.5) / SUPERSAMPLING
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    dx, dy = x - center_x.view(-1, 1, 1), y - center_y.view(-1, 1, 1)
    cos, sin, radius = (value.view(-1, 1, 1) for value in (angle.cos(), angle.sin(), size / 2))
    u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius  # the shape fits in -1..1
    inside = _inside(kind, u, v)
    if style == "striped":
        inside &= x.remainder(STRIPE_PERIOD) < STRIPE_WIDTH
    return _soften(F.avg_pool2d(inside.float().unsqueeze(1), SUPERSAMPLING)).squeeze(1)


def _inside(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """Whether points of the unit square -1..1 (v downwards) lie in the shape."""
    distance = torch.hypot(u, v)
    if kind == "circle":
        return distance <= 1
    if kind == "ring":
        return (distance <= 1) & (distance >= 0.5)
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) <= 0.9
    if kind == "cross":
        return (torch.minimum(u.abs(), v.abs()) <= 0.3) & (torch.maximum(u.abs(), v.abs()) <= 1)
    if kind == "triangle":
        return (v <= 0.9) & (u.abs() <= (v + 1) / 1.9)
    assert kind == "star", kind
    # Five points: fold the angle into one spike, then test against its straight edge.
    inner_radius, half_spike = 0.42, math.pi / 5
    theta = torch.remainder(torch.atan2(u, -v) + half_spike, 2 * half_spike) - half_spike
    px, py = distance * theta.abs().sin(), distance * theta.cos()
    tip = (0.0, 1.0)
    notch = (inner_radius * math.sin(half_spike), inner_radius * math.cos(half_spike))
    return (notch[0] - tip[0]) * (py - tip[1]) - (notch[1] - tip[1]) * (px - tip[0]) <= 0


def _soften(masks: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / EDGE_SIGMA) ** 2)
    taps = taps / taps.sum()
    padded = F.pad(masks, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, 5)), taps.view(1, 1, 5, 1))


@lru_cache(maxsize=len(STYLES))
def scene_masks(style: str = "plain") -> Tensor:
    """The masks ``[162, 64, 64]`` of all kinds, sizes and positions, ordered by `mask_index`."""
    assert style in STYLES, style
    masks = []
    for kind in KINDS:
        places = [(SIZES[size], *scene_center(size, position)) for size in SIZES for position in POSITIONS]
        size, x, y = (torch.tensor(column, dtype=torch.float32) for column in zip(*places, strict=True))
        masks.append(draw_masks(kind, x, y, size, torch.zeros_like(size), style=style))
    return torch.cat(masks)


def mask_index(scene: Scene) -> int:
    """Row of `scene_masks` that belongs to a scene."""
    num_sizes, num_positions = len(SIZES), len(POSITIONS)
    size_index = list(SIZES).index(scene.size)
    return (KINDS.index(scene.kind) * num_sizes + size_index) * num_positions + POSITIONS.index(scene.position)


def color_values() -> Tensor:
    """The palette ``[8, 3]`` in 0..1."""
    return torch.tensor(list(COLORS.values()), dtype=torch.float32) / 255


def compose(masks: Tensor, foregrounds: Tensor, backgrounds: Tensor) -> Tensor:
    """Masks ``[N, S, S]`` and colours ``[N, 3]`` in 0..1 to pictures ``[N, 3, S, S]`` in 0..1."""
    return torch.lerp(backgrounds[:, :, None, None], foregrounds[:, :, None, None], masks[:, None])


def draw_scenes(scenes: list[Scene] | tuple[Scene, ...], style: str = "plain") -> Tensor:
    """Pictures ``[N, 3, 64, 64]`` in 0..1."""
    palette, names = color_values(), list(COLORS)
    masks = scene_masks(style)[[mask_index(scene) for scene in scenes]]
    foregrounds = palette[[names.index(scene.color) for scene in scenes]]
    backgrounds = palette[[names.index(scene.background) for scene in scenes]]
    return compose(masks, foregrounds, backgrounds)


def draw_random_masks(num_masks: int, generator: torch.Generator) -> Tensor:
    """Masks of random kind, place, width (14 to 56 px) and angle: they teach the autoencoder more than the domain."""
    masks = []
    for kind in KINDS:
        uniform = torch.rand(4, num_masks // len(KINDS), generator=generator)
        size, angle = 14 + 42 * uniform[2], 2 * math.pi * uniform[3]
        for chunk in torch.arange(size.numel()).split(64):
            x, y = (PICTURE_SIZE * uniform[axis, chunk] for axis in (0, 1))
            masks.append(draw_masks(kind, x, y, size[chunk], angle[chunk]))
    return torch.cat(masks)
