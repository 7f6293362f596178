"""Pictures of a run: what is in them, and that drawing them leaves the process alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from flux2_kit.flux2_core.schedule import empirical_mu, shift_sigmas
from flux2_kit.training import plots
from flux2_kit.training.metrics import MetricsWriter
from flux2_kit.training.plots import (
    BLUE,
    GREEN,
    NUM_BINS,
    NUM_ROWS,
    ORANGE,
    PURPLE,
    describe_timesteps,
    draw_curves,
    draw_timesteps,
)
from flux2_kit.training.timesteps import TimestepConfig
from PIL import Image

RECORDS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 30)]


def num_pixels(image: Image.Image, color: str) -> int:
    wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.asarray(image) == wanted).all(axis=-1).sum())


def texts(figure) -> list[str]:
    """Everything that is written into a figure."""
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn."""
    drawn, finish = [], plots._finish
    monkeypatch.setattr(plots, "_finish", lambda figure, out: drawn.append(figure) or finish(figure, out))
    return drawn


def test_curves_show_what_was_measured():
    image = draw_curves(RECORDS)
    assert image.mode == "RGB" and min(image.size) > 700
    assert num_pixels(image, BLUE) > 1000 and num_pixels(image, GREEN) > 500
    assert num_pixels(image, ORANGE) == 0
    assert num_pixels(draw_curves([*RECORDS, {"step": 29, "validation_loss": 0.5}]), ORANGE) > 20


def test_curves_draw_the_numbers_of_the_records(figures):
    validations = [{"step": 10, "validation_loss": 0.4}, {"step": 20, "validation_loss": 0.3}]
    draw_curves([*RECORDS[:12], {"step": 13, "loss": None}, {"step": 14, "loss": math.nan}, *validations])
    raw, average, validation = figures[0].axes[0].lines
    assert list(raw.get_xdata()) == list(range(1, 13)) and list(raw.get_ydata()) == [1 / step for step in range(1, 13)]
    assert average.get_ydata()[0] == 1.0 and average.get_ydata()[-1] > raw.get_ydata()[-1]
    assert list(validation.get_xdata()) == [10, 20] and list(validation.get_ydata()) == [0.4, 0.3]
    assert "lowest validation loss 0.3000 at step 20" in " ".join(texts(figures[0]))


def test_one_far_loss_does_not_press_the_rest_flat(figures):
    draw_curves([{"step": step, "loss": 1000.0 if step == 50 else 0.5} for step in range(1, 1000)])
    assert figures[0].axes[0].get_ylim()[1] < 1


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": 0.5}], [{"step": 3, "validation_loss": 0.5}]])
def test_a_run_that_has_hardly_begun_can_be_drawn(records):
    draw_curves(records)


def test_curves_of_a_file_are_written_whole(tmp_path):
    writer = MetricsWriter(tmp_path / "run-metrics.jsonl")
    for step in range(1, 5):
        writer.write(step=step, loss=0.5)
    image = draw_curves(writer.path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as written:
        assert written.format == "PNG" and written.convert("RGB").tobytes() == image.tobytes()
    with pytest.raises(ValueError, match=r"its name must end in \.png, \.jpg"):
        draw_curves(writer.path, tmp_path / "curves.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "run-metrics.jsonl"]


def test_the_drawn_density_is_the_exact_one():
    u = (torch.arange(plots.NUM_QUANTILES, dtype=torch.float64) + 0.5) / plots.NUM_QUANTILES
    shift = math.exp(empirical_mu(1024, 50))
    drawn = plots._density(shift_sigmas(u, shift).float(), u)
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
    exact = shift_sigmas(edges, 1 / shift).diff() * NUM_BINS  # the inverse of a shift is the shift by its inverse
    assert drawn.mean() == pytest.approx(1)
    torch.testing.assert_close(drawn.double(), exact, rtol=2e-2, atol=1e-3)


def test_noise_levels_are_those_of_all_pictures(figures):
    draw_timesteps(TimestepConfig(), {(512, 512): 3, (1024, 1024): 1}, 50)
    written = " ".join(texts(figures[0]))
    low, high = (math.exp(empirical_mu(n, 50)) for n in (1024, 4096))
    for name, shift in (("512 x 512", low), ("1024 x 1024", high)):
        quartiles = " / ".join(f"{shift * q / (1 + (shift - 1) * q):.2f}" for q in (0.25, 0.5, 0.75))
        assert f"{name} px: {quartiles}" in written
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
    exact = {shift: (shift_sigmas(edges, 1 / shift).diff() * NUM_BINS).numpy() for shift in (low, high)}
    small, large = (line.get_ydata() for line in figures[0].axes[0].lines)
    np.testing.assert_allclose(small, exact[low], rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(large, exact[high], rtol=2e-2, atol=1e-3)
    outline = figures[0].axes[0].collections[0].get_paths()[0].vertices
    top_of_area = outline[1 : NUM_BINS + 1, 1] if outline[1, 1] else outline[NUM_BINS + 2 : 2 * NUM_BINS + 2, 1][::-1]
    np.testing.assert_allclose(top_of_area, 0.75 * small + 0.25 * large, rtol=1e-4)
    draws = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.where(torch.arange(400_000) % 4 == 0, shift_sigmas(draws, high), shift_sigmas(draws, low))
    label = next(text for text in texts(figures[0]) if text.startswith("all 4 samples of an epoch: "))
    found = [float(value) for value in label.partition(": ")[2].split(" / ")]
    expected = draws.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    assert found == pytest.approx(expected, abs=0.008)


def test_the_table_in_text_has_the_exact_shares():
    shift = math.exp(empirical_mu(1024, 50))
    lines = describe_timesteps(TimestepConfig(), {(512, 512): 3}, 50).splitlines()
    assert lines[0] == "timestep_sampling flux2   weighting_scheme none"
    assert lines[1].startswith("quartiles of sigma, all 3 samples of an epoch: 0.6")
    edges = torch.linspace(0, 1, NUM_ROWS + 1, dtype=torch.float64)
    exact = (100 * shift_sigmas(edges, 1 / shift).diff()).tolist()
    assert [float(line.split()[3]) for line in lines[3:]] == pytest.approx(exact, abs=0.06)
    assert lines[3].startswith("0.00 - 0.05") and lines[-1].endswith("#" * plots.BAR_LENGTH)


def test_a_density_that_no_size_changes_has_one_line(figures):
    config = TimestepConfig(timestep_sampling="logit_normal", weighting_scheme="sigma_sqrt", logit_mean=0.5)
    image = draw_timesteps(config, {(512, 512): 2, (2048, 2048): 1}, 50)
    assert len(figures[0].axes[0].lines) == 1 and num_pixels(image, PURPLE) == 0
    assert "timestep_sampling logit_normal   weighting_scheme sigma_sqrt   logit_mean 0.5" in texts(figures[0])
    weight = figures[0].axes[1].lines[0]
    x, y = np.asarray(weight.get_xdata()), np.asarray(weight.get_ydata())
    np.testing.assert_allclose(y, np.clip(x, 0.05, 1) ** -2.0, rtol=1e-5)


def test_long_descriptions_leave_the_panels_their_width(figures):
    config = TimestepConfig(
        timestep_sampling="logit_normal",
        weighting_scheme="cosmap",
        logit_mean=-0.25,
        logit_std=1.25,
        min_sigma=0.05,
        max_sigma=0.95,
        preserve_distribution_shape=True,
        num_timestep_buckets=64,
    )
    draw_timesteps(config, {(512, 512): 1}, 50)
    assert figures[0].axes[0].get_position().width > 0.8
    assert "num_timestep_buckets 64" in " ".join(texts(figures[0]))


def test_sizes_with_a_line_differ_and_hold_the_ends():
    sizes = {(1024, 1024): 9, (1008, 1024): 8, (768, 768): 5, (256, 256): 1, (2048, 2048): 1, (512, 512): 2}
    assert plots._shown_sizes(sizes) == [(256, 256), (768, 768), (1024, 1024), (2048, 2048)]


def test_no_sizes_are_refused():
    with pytest.raises(ValueError, match="give at least one size"):
        draw_timesteps(TimestepConfig(), {}, 50)


def test_drawing_leaves_the_process_alone():
    script = """
import json, sys
from flux2_kit.training.plots import draw_curves, draw_timesteps
from flux2_kit.training.timesteps import TimestepConfig
lazy = "matplotlib" not in sys.modules
import matplotlib
def settings():  # asking for the backend would choose one
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
draw_curves([{"step": 1, "loss": 0.5}])
draw_timesteps(TimestepConfig(), {(64, 64): 1}, 50)
print(json.dumps([lazy, settings() == before, "matplotlib.pyplot" not in sys.modules]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [True, True, True]
