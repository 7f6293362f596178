"""What a run writes: it fits, it writes over nothing, and of its saves the last are kept."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.dit import Flux2DiT
from flux2_kit.flux2_core.lora_files import linear_shapes
from flux2_kit.flux2_core.variants import get_variant
from flux2_kit.training import run_files
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters, count_parameters
from flux2_kit.training.config import OutputConfig
from flux2_kit.training.run_files import RunFiles, metrics_beside


def files(folder: Path, **settings) -> RunFiles:
    return RunFiles(OutputConfig(output_dir=folder, output_name="cat", **settings), writes=True)


@pytest.mark.parametrize(
    "name",
    ["cat.safetensors", "cat-000003.safetensors", "cat-step00000007.safetensors", "cat-state/state.safetensors"],
)
def test_a_new_run_writes_over_no_other(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("hours of work")
    told = path.relative_to(tmp_path).parts[0]
    with pytest.raises(ValueError, match=rf"has a run named cat already \({told}\); go on with it \(resume\), choose"):
        files(tmp_path).make_folders(is_new=True)
    files(tmp_path).make_folders(is_new=False)
    assert path.read_text() == "hours of work"


def test_a_name_leaves_room_for_what_is_behind_it(tmp_path):
    longest = RunFiles(OutputConfig(output_dir=tmp_path, output_name="n" * 200), writes=True)
    longest.lora_path("step", 12_345_678).write_text("")
    longest.curves_path.write_text("")
    with pytest.raises(ValueError, match="output_name has 201 bytes; it may have 200"):
        OutputConfig(output_name="n" * 199 + "ü")


def test_what_belongs_to_others_does_not_hinder(tmp_path):
    for name in ("cats.safetensors", "black-cat.safetensors", "cat-metrics.jsonl", "cat-1.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "cat-state").mkdir()
    files(tmp_path).make_folders(is_new=True)
    assert len(list(tmp_path.iterdir())) == 5


def test_what_a_killed_run_has_half_written_is_taken_away(tmp_path):
    (tmp_path / "cat-state").mkdir()
    left = [
        ".cat-0123abcd.safetensors",
        ".cat-step00000002-0123abcd.safetensors",
        "cat-state/.state-0123abcd.safetensors",
        ".cat-curves-0123abcd.png",
    ]
    kept = [
        ".cats-0123abcd.safetensors",
        ".dog-0123abcd.png",
        "cat-state/state.safetensors",
        ".cat-black-0123abcd.safetensors",
    ]
    for name in (*left, *kept):
        (tmp_path / name).write_text("")
    files(tmp_path).make_folders(is_new=False)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in kept)


def test_a_place_where_nothing_can_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"nothing can be written into .*file.*; choose another"):
        files(tmp_path / "file" / "out").make_folders(is_new=True)
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="nothing can be written into /proc/self"):
            files(Path("/proc/self")).make_folders(is_new=True)
    if os.name == "posix" and os.geteuid() != 0:
        (tmp_path / "mine").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            files(tmp_path / "mine").make_folders(is_new=True)


@pytest.mark.parametrize(
    ("settings", "num_loras"),
    [
        ({}, 2),
        ({"save_every_n_steps": 10}, 2 + 100),
        ({"save_every_n_steps": 10, "save_last_n_steps": 25}, 2 + 3),
        ({"save_every_n_epochs": 2}, 2 + 10),
        ({"save_every_n_epochs": 2, "save_last_n_epochs": 3}, 2 + 3),
    ],
)
def test_space_is_needed_for_every_file_that_is_kept(tmp_path, monkeypatch, settings, num_loras):
    num_values = 10**9
    needed = num_loras * 2 * num_values + 2 * 16 * num_values + run_files.SPARE_BYTES
    usage = shutil.disk_usage(tmp_path)
    output = files(tmp_path, **settings)
    monkeypatch.setattr(run_files.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    output.check_space(num_values, num_steps=1000, num_epochs=20)
    monkeypatch.setattr(run_files.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match="free some space, save less often, keep fewer"):
        output.check_space(num_values, num_steps=1000, num_epochs=20)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dora": True}, {"kind": "lokr", "rank": 2}, {"kind": "lokr", "lokr_factor": 8, "exclude": ("mlp",)}],
)
def test_what_is_counted_before_anything_is_loaded_is_what_is_trained(settings):
    config, tiny = AdapterConfig(**{"rank": 4, **settings}), get_variant("tiny").dit
    adapters = TrainableAdapters(Flux2DiT(tiny), config, generator=torch.Generator())
    assert count_parameters(linear_shapes(tiny), config) == sum(value.numel() for value in adapters.parameters())


def test_saves_are_counted_on_by_a_run_that_goes_on_and_nothing_else_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "write_lora", lambda path, lora: path.write_text(lora))
    first = files(tmp_path, save_every_n_steps=2, save_last_n_steps=4)
    for step in (2, 4, 6):
        first.save_lora(lambda: "", "step", step)
    first.save_lora(lambda: "", "stopped", 7)
    second = files(tmp_path, save_every_n_steps=2, save_last_n_steps=4)
    second.load_state_dict(first.state_dict())
    second.save_lora(lambda: "", "step", 8)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == [f"cat-step0000000{step}.safetensors" for step in (6, 7, 8)]
    for state in ([["../../home", 3]], [["step", "3"]], [["step"]], 3):
        with pytest.raises((ValueError, TypeError)):
            second.load_state_dict(state)


def test_the_metrics_of_a_state_lie_beside_it(tmp_path, monkeypatch):
    assert metrics_beside(tmp_path / "cat-state") == tmp_path / "cat-metrics.jsonl"
    (tmp_path / "cat-state").mkdir()
    monkeypatch.chdir(tmp_path / "cat-state")
    assert metrics_beside(Path()) == tmp_path / "cat-metrics.jsonl"
