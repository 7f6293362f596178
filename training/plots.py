"""Pictures of a training run: its curves, and the density of its noise levels.

Drawn through matplotlib's objects, so that no state of the process is touched.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..flux2_core.files import write_atomically
from .metrics import RunningAverage, read_metrics
from .timesteps import TimestepConfig, loss_weights, sigmas_from_uniform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#3b6fb6", "#d9762b", "#3d9970", "#8b5fbf", "#9aa3ad", "#2b3440"
DOTS_PER_INCH = 120
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
NUM_QUANTILES = 20_000
NUM_BINS = 120
NUM_ROWS = 20
"""Of a table in text; divides NUM_BINS."""
BAR_LENGTH = 50
"""Of its longest bar, in characters."""
MAX_SIZES = 4
"""Sizes that get a line of their own."""
LINE_LENGTH = 115
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9}


def draw_curves(metrics: Path | Sequence[Mapping[str, Any]], out: Path | None = None) -> Image.Image:
    """Draws loss, validation loss and learning rate over the steps.

    Args:
        metrics: a file of `metrics.MetricsWriter`, or its records.
        out: where the picture is written, atomically; .png, .jpg or .webp.

    Raises:
        ValueError: there is no such file of metrics, or ``out`` has another suffix.
    """
    records = read_metrics(metrics) if isinstance(metrics, Path) else metrics
    losses, validations, rates = (_series(records, name) for name in ("loss", "validation_loss", "learning_rate"))
    figure, (top, bottom) = _figure(height=6.4, ratios=(3, 1))

    # In a short run fewer steps are averaged, about a tenth of it, or the average would hardly move.
    steps, values = losses
    smooth = RunningAverage(weight=max(0.02, min(1.0, 10 / max(1, len(values)))))
    averages = [smooth.update(value) or 0.0 for value in values]
    top.plot(steps, values, color=BLUE, alpha=0.28, linewidth=1, label="loss of each step")
    top.plot(steps, averages, color=BLUE, linewidth=2.2, label="running average")
    top.plot(*validations, color=ORANGE, linewidth=1.6, marker="o", markersize=4, label="validation loss")
    _limit_to_most(top, values + validations[1])
    top.set_ylabel("loss")
    found = [f"{averages[-1]:.4f} average at step {steps[-1]}"] if averages else []
    if validations[1]:
        lowest = min(zip(validations[1], validations[0], strict=True))
        found.append(f"lowest validation loss {lowest[0]:.4f} at step {lowest[1]}")
    _title(top, "Loss", "   ".join(found) or "no records yet")
    handles = [line for line in top.lines if len(line.get_xdata())]  # type: ignore[arg-type]
    if handles:  # beside the title, where it covers no curve
        top.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.06), ncols=3, **LEGEND)

    bottom.plot(*rates, color=GREEN, linewidth=1.8)
    bottom.fill_between(*rates, color=GREEN, alpha=0.12, linewidth=0)
    bottom.set_ylim(0, 1.1 * max(rates[1], default=0) or 1)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    _whole_steps(bottom, steps + validations[0] + rates[0])
    return _finish(figure, out)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Densities:
    """How noise levels spread over the samples of an epoch."""

    counts: dict[int, int]
    """Samples by output tokens."""
    sigmas: dict[int, Tensor]
    """Their noise levels at equally spaced quantiles."""
    heights: dict[int, Tensor]
    """Their density in each of the bins."""

    @classmethod
    def of(cls, config: TimestepConfig, sizes: Mapping[tuple[int, int], int], num_steps: int) -> _Densities:
        if not sizes:
            raise ValueError("there are no pictures whose noise levels could be shown; give at least one size")
        counts: Counter[int] = Counter()
        for (width, height), count in sizes.items():
            counts[width * height // 256] += count
        u = (torch.arange(NUM_QUANTILES, dtype=torch.float64) + 0.5) / NUM_QUANTILES
        sigmas = {n: sigmas_from_uniform(u, n, config, num_steps) for n in sorted(counts)}
        return cls(counts=counts, sigmas=sigmas, heights={n: _density(sigma, u) for n, sigma in sigmas.items()})

    @property
    def num_samples(self) -> int:
        return sum(self.counts.values())

    @property
    def total(self) -> Tensor:
        """The density of all samples."""
        parts = (self.heights[n] * (count / self.num_samples) for n, count in self.counts.items())
        return sum(parts, torch.zeros(NUM_BINS))

    @property
    def depends_on_size(self) -> bool:
        first, *others = self.heights.values()
        return any(not torch.equal(other, first) for other in others)

    def describe(self) -> str:
        """The quartiles of all samples."""
        samples = "1 sample" if self.num_samples == 1 else f"all {self.num_samples} samples of an epoch"
        return f"{samples}: {_quartiles(torch.cat(list(self.sigmas.values())), [self.counts[n] for n in self.sigmas])}"


def describe_timesteps(config: TimestepConfig, sizes: Mapping[tuple[int, int], int], num_steps: int) -> str:
    """What `draw_timesteps` draws, as a table in text: the share of the samples in each range of noise levels."""
    densities = _Densities.of(config, sizes, num_steps)
    shares = densities.total.view(NUM_ROWS, -1).mean(dim=1).div(NUM_ROWS).tolist()
    lines = [_describe(config), f"quartiles of sigma, {densities.describe()}", "sigma        share"]
    for row, share in enumerate(shares):
        bar = "#" * round(BAR_LENGTH * share / max(shares))
        lines.append(f"{row / NUM_ROWS:.2f} - {(row + 1) / NUM_ROWS:.2f} {100 * share:5.1f} %  {bar}".rstrip())
    return "\n".join(lines)


def draw_timesteps(
    config: TimestepConfig, sizes: Mapping[tuple[int, int], int], num_steps: int, out: Path | None = None
) -> Image.Image:
    """Draws how often each noise level is trained, and how much it counts in the loss.

    The density is that of `timesteps.sigmas_from_uniform` itself, over all samples of an epoch.

    Args:
        sizes: how often each width and height in pixels, multiples of 16, comes in an epoch.
        num_steps: of the schedule behind `flux2`; see `timesteps.schedule_steps`.
        out: where the picture is written, atomically; .png, .jpg or .webp.

    Raises:
        ValueError: there are no sizes, or ``out`` has another suffix.
    """
    densities = _Densities.of(config, sizes, num_steps)
    total, heights = densities.total, densities.heights
    middles = ((torch.arange(NUM_BINS) + 0.5) / NUM_BINS).tolist()

    figure, (top, bottom) = _figure(height=6.4, ratios=(2, 1))
    top.fill_between(middles, total.tolist(), color=BLUE, alpha=0.2, linewidth=0, label=densities.describe())
    shown = _shown_sizes(sizes) if densities.depends_on_size else []
    for size, color in zip(shown, (BLUE, ORANGE, GREEN, PURPLE), strict=False):
        n = size[0] * size[1] // 256
        label = f"{size[0]} x {size[1]} px: {_quartiles(densities.sigmas[n], [1])}"
        top.plot(middles, heights[n].tolist(), color=color, linewidth=2, label=label)
    if not shown:
        top.plot(middles, total.tolist(), color=BLUE, linewidth=2)
    top.set_ylim(0, 1.3 * total.max().item())
    top.set_ylabel("density")
    _title(top, "Noise levels in training", _describe(config))
    legend = top.legend(loc="best", title="quartiles of sigma", title_fontsize=9, alignment="left", **LEGEND)
    legend.get_title().set_color(INK)

    weights = loss_weights(torch.tensor(middles), config)
    counted = total * weights / (total * weights).mean()
    bottom.plot(middles, weights.tolist(), color=ORANGE, linewidth=2, label="weight in the loss")
    bottom.fill_between(middles, counted.tolist(), color=GREY, alpha=0.3, linewidth=0, label="density x weight, mean 1")
    if weights.max() > 20 * weights.min():
        bottom.set_yscale("log")
        bottom.minorticks_off()
    else:
        bottom.set_ylim(0, 1.25 * max(weights.max().item(), counted.max().item()))
    bottom.set_ylabel("weight")
    bottom.set_xlabel("noise level sigma    (0 clean, 1 noise)")
    bottom.set_xlim(0, 1)
    bottom.legend(loc="best", **LEGEND)
    return _finish(figure, out)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a finite number under this name."""
    pairs = [(record["step"], record.get(name)) for record in records]
    pairs = [(step, float(value)) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _density(sigma: Tensor, u: Tensor) -> Tensor:
    """Mean density in each of the bins over 0..1, from noise levels and the shares below them."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    below = np.interp(edges, sigma.double().numpy(), u.numpy(), left=0, right=1)
    return torch.from_numpy(np.diff(below) * NUM_BINS).float()


def _quartiles(sigma: Tensor, weights: Sequence[int]) -> str:
    """Of equally long runs of noise levels, each with a weight."""
    order = sigma.argsort()
    shares = torch.tensor(weights).repeat_interleave(len(sigma) // len(weights))[order].double().cumsum(0)
    places = torch.searchsorted(shares, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64) * shares[-1])
    return " / ".join(f"{value:.2f}" for value in sigma[order][places].tolist())


def _shown_sizes(sizes: Mapping[tuple[int, int], int]) -> list[tuple[int, int]]:
    """From small to large: the smallest, the largest and the most common that differ by a fifth from all others."""
    by_tokens: dict[int, tuple[int, int]] = {}
    for size, _ in Counter(sizes).most_common():
        by_tokens.setdefault(size[0] * size[1] // 256, size)
    shown: list[int] = []
    for n in (min(by_tokens), max(by_tokens), *by_tokens):
        if len(shown) < MAX_SIZES and all(abs(math.log(n / other)) > math.log(1.2) for other in shown):
            shown.append(n)
    return [by_tokens[n] for n in sorted(shown)]


def _describe(config: TimestepConfig) -> str:
    """The settings that differ from the defaults, with the two names first."""
    names = ("timestep_sampling", "weighting_scheme")
    given = [f"{name} {getattr(config, name)}" for name in names]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in names and value != field.default:
            given.append(field.name if value is True else f"{field.name} {value:g}")
    return "   ".join(given)


def _figure(*, height: float, ratios: tuple[int, ...]) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), dpi=DOTS_PER_INCH, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.16, h_pad=0.12)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(ratios), 1, sharex=True, gridspec_kw={"height_ratios": ratios}))
    for panel in axes:
        panel.set_facecolor("white")
        panel.grid(True, color="#e6e9ed", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9, length=0)
        panel.xaxis.label.set_color(INK)
        panel.yaxis.label.set_color(INK)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color("#c5ccd4")
    return figure, axes


def _title(panel: Axes, title: str, text: str) -> None:
    lines = textwrap.wrap(text, LINE_LENGTH)
    panel.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=10 + 14 * len(lines))
    panel.text(0, 1.025, "\n".join(lines), transform=panel.transAxes, color="#5d6875", fontsize=9.5)


def _limit_to_most(panel: Axes, values: Sequence[float], share: float = 0.995) -> None:
    """From 0 to a little above nearly all values: a few far ones do not press the rest flat."""
    high = np.quantile(values, share) if len(values) else 0
    panel.set_ylim(0, 1.15 * high if high > 0 else 1)


def _whole_steps(panel: Axes, steps: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    first, last = (min(steps), max(steps)) if steps else (0, 1)
    margin = max(0.5, 0.01 * (last - first))
    panel.set_xlim(first - margin, last + margin)


def _finish(figure: Figure, out: Path | None) -> Image.Image:
    canvas: Any = figure.canvas
    canvas.draw()
    width, height = canvas.get_width_height()
    image = Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")
    if out is not None:
        if out.suffix.lower() not in FORMATS:
            raise ValueError(f"the picture is to be {out}; its name must end in {', '.join(FORMATS)}")
        kind = FORMATS[out.suffix.lower()]
        write_atomically(out, lambda temporary: image.save(temporary, format=kind, quality=92))
    return image
