"""``flux2 dataset``: its table and its contact sheet."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flux2_kit.training import contact_sheet
from flux2_kit.training.cli import main
from flux2_kit.training.contact_sheet import FRAME, SHEET_WIDTH, draw_contact_sheet
from flux2_kit.training.dataset import Dataset, list_dataset, load_dataset_config
from flux2_kit.training.dataset_report import format_report, report_dataset
from PIL import Image

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def save(path: Path, size: tuple[int, int], color: tuple[int, int, int] = RED, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Five pictures in two subsets: one long, one small, one without caption, some with references."""
    save(tmp_path / "one [v1]" / "long.png", (400, 64), caption="a " + "very " * 40 + "long caption")
    save(tmp_path / "one [v1]" / "plain.png", (240, 240), caption="red")  # grows by 7 % only
    save(tmp_path / "one [v1]" / "silent.png", (300, 300))
    save(tmp_path / "control" / "long_0.png", (100, 100), GREEN)
    save(tmp_path / "control" / "long_1.png", (100, 100), GREEN)
    save(tmp_path / "control" / "plain.png", (100, 100), GREEN)
    save(tmp_path / "control" / "silent.png", (100, 100), GREEN)
    for index in range(3):
        save(tmp_path / "two" / f"{index}.png", (300, 200), (0, index, 255), caption="blue")
    first: dict[str, Any] = {"image_directory": "one [v1]", "control_directory": "control", "num_repeats": 3}
    second: dict[str, Any] = {"image_directory": "two", "enable_bucket": False, "resolution": [128, 64]}
    path = tmp_path / "dataset.json"
    general = {"resolution": 256, "enable_bucket": True, "batch_size": 2}
    path.write_text(json.dumps({"general": general, "datasets": [first, second]}))
    return path


def listed(settings: Path) -> Dataset:
    return list_dataset(load_dataset_config(settings))


def test_the_report_counts_each_subset(settings):
    report = report_dataset(listed(settings), count_cut=lambda captions: [max(len(text) - 100, 0) for text in captions])
    first, second = report.subsets
    assert first.buckets == (((256, 256), 2), ((512, 128), 1))
    assert (first.num_pictures, first.num_captions, first.missing) == (3, 2, ("silent.png",))
    assert first.reference_counts == ((1, 2), (2, 1))
    assert first.cropped == (("long.png", pytest.approx(1 - 4 / 6.25)),)
    assert first.upscaled == (("long.png", 2),)
    assert first.cut == (("long.png", len("a " + "very " * 40 + "long caption") - 100),)
    assert (second.buckets, second.num_captions) == ((((128, 64), 3),), 1)
    assert [name for name, _ in second.cropped] == ["0.png", "1.png", "2.png"]
    assert second.upscaled == second.cut == ()
    # 2 pictures x 3 in batches of 2 are 3 steps, 1 x 3 are 2; 3 x 1 of the second subset are 2.
    assert report.num_steps_per_epoch == 3 + 2 + 2


def test_pictures_held_out_are_no_steps(settings):
    data = json.loads(settings.read_text())
    settings.write_text(json.dumps(data | {"general": data["general"] | {"validation_fraction": 0.4}}))
    dataset = listed(settings)
    report = report_dataset(dataset)
    held_out = [sum(item.is_validation for item in dataset.items if item.subset == subset) for subset in (0, 1)]
    assert [subset.num_validation for subset in report.subsets] == held_out and min(held_out) > 0
    assert report.num_steps_per_epoch < 7


def test_the_table_says_it_all_in_words(settings):
    text = format_report(report_dataset(listed(settings)), settings, not_counted="for a reason")
    lines = {line.strip().split(":")[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert f"{settings}: 6 pictures in 2 subsets, 1 caption missing, 7 steps an epoch" in text
    assert "[1] " in text and "one [v1]" in text
    assert "256x256: 2, 512x128: 1" in text
    assert "2 distinct, 1 missing: silent.png" in text
    assert "1 for 2 pictures, 2 for 1 picture; scaled as when generating" in text
    assert "1: long.png (36%)" in text and "1: long.png (2.00x)" in text
    assert "not counted: for a reason" in lines["tokens cut"]
    # In columns, and told apart where spaces are drawn as one, as on ComfyUI's page.
    places = (lines["tokens cut"].index("not"), lines["upscaled by more than 10 %"].index("none"))
    assert places[0] == places[1] and "tokens cut: not counted" in " ".join(text.split())


def test_of_very_many_buckets_the_fullest_are_named(tmp_path):
    for index in range(50):
        save(tmp_path / f"{index}.png", (128 + 16 * index, 128), caption="x")
    save(tmp_path / "same.png", (128 + 16 * 49, 128), caption="x")
    path = tmp_path / "dataset.json"
    entry = {"image_directory": ".", "resolution": 512, "enable_bucket": True, "bucket_no_upscale": True}
    path.write_text(json.dumps({"datasets": [entry]}))
    text = format_report(report_dataset(listed(path)), path)
    assert "912x128: 2, 128x128: 1" in text and text.count("x128: 1") == 39 and ", and 10 more buckets" in text


def test_the_command_counts_tokens_with_the_bundled_tokenizer(settings, capsys):
    assert main(["dataset", str(settings), "--model_version", "tiny"]) == 0
    output = capsys.readouterr().out
    cut = next(line for line in output.splitlines() if "tokens cut" in line)
    # The tiny model takes 24 tokens, template included.
    assert "1: long.png (" in cut and int(cut.split("(")[1].split(")")[0]) > 100
    assert main(["dataset", str(settings)]) == 0
    assert "not counted: give --model_version" in capsys.readouterr().out


def test_tokens_are_not_counted_where_there_is_no_tokenizer(settings, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    assert main(["dataset", str(settings), "--model_version", "dev"]) == 0
    assert "not counted: no tokenizer of dev is on this machine" in capsys.readouterr().out
    assert main(["dataset", str(settings), "--model_version", "dev", "--text_encoder", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_bare_folder_is_taken_at_the_size_of_the_variant(settings, capsys):
    folder = str(settings.parent / "two")
    assert main(["dataset", folder]) == 0
    assert "1248x832: 3" in capsys.readouterr().out
    assert main(["dataset", folder, "--model_version", "tiny"]) == 0
    assert "64x64: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "no dataset at nowhere"),
        (["SETTINGS", "--preview", "out.pdf"], "must end in .jpg"),
        (["SETTINGS", "--preview", "nowhere/out.jpg"], "is no folder"),
        (["SETTINGS", "--preview", "FOLDER/two/out.jpg"], "among the pictures of the dataset"),
        (["SETTINGS", "--preview", "FOLDER/two/../control/out.jpg"], "among the pictures of the dataset"),
        (["SETTINGS", "--text_encoder", "x"], "add --model_version"),
        (["SETTINGS", "--model_version", "big"], "unknown variant 'big'"),
    ],
)
def test_the_command_refuses(settings, capsys, options, message):
    folder = str(settings.parent)
    options = [text.replace("SETTINGS", str(settings)).replace("FOLDER", folder) for text in options]
    assert main(["dataset", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize(("name", "kind"), [("out.jpg", "JPEG"), ("out.png", "PNG")])
def test_the_command_writes_the_contact_sheet(settings, capsys, name, kind):
    path = settings.parent / name
    assert main(["dataset", str(settings), "--model_version", "tiny", "--preview", str(path)]) == 0
    with Image.open(path) as sheet:
        assert sheet.format == kind and sheet.width == SHEET_WIDTH
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for color in (RED, GREEN, BLUE):
        assert (abs(pixels - color).max(-1) < 12).sum() > 5000


@pytest.mark.parametrize("name", ["写真.png", "caf\udce9.png"], ids=["japanese", "latin-1 on disk"])
def test_names_that_the_output_cannot_show_are_escaped(tmp_path, monkeypatch, name):
    if sys.platform == "darwin" and not name.isprintable():
        pytest.skip("macOS keeps names as Unicode")
    save(tmp_path / name, (700, 100))
    (tmp_path / name).with_suffix(".txt").write_text("x")  # a warning would take the name to pytest's other processes
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict"))
    assert main(["dataset", str(tmp_path)]) == 0
    sys.stdout.seek(0)
    assert "10 %: 1: " + name.encode("cp1252", "backslashreplace").decode() in " ".join(sys.stdout.read().split())


def test_the_contact_sheet_shows_what_is_cropped_off_dark(tmp_path):
    """A picture whose trained centre is blue and whose ends are red."""
    image = Image.new("RGB", (384, 128), RED)
    image.paste(BLUE, (128, 0, 256, 128))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"datasets": [{"image_directory": ".", "resolution": 128}]}))
    pixels = np.asarray(draw_contact_sheet(list_dataset(load_dataset_config(path)))).astype(int)
    blue, red = ((abs(pixels - color).max(-1) < 12).sum() for color in (BLUE, RED))
    assert blue > 0.9 * contact_sheet.THUMBNAIL_SIDE**2 and red == 0
    reddish = (pixels[..., 0] > pixels[..., 2] + 30) & (pixels[..., 0] < 120)
    assert reddish.sum() > 1.8 * contact_sheet.THUMBNAIL_SIDE**2
    assert (pixels == FRAME).all(-1).sum() > 4 * 200


def test_captions_are_wrapped_to_the_width_and_cut_with_an_ellipsis():
    font = contact_sheet._font(12)
    for text in ("word " * 200, "w" * 1000, "写真" * 300):
        lines = contact_sheet._wrap(text, 200, 4)
        assert len(lines) == 4 and lines[-1].endswith("…")
        assert max(font.getlength(line) for line in lines) <= 200
    assert contact_sheet._wrap("two words", 200, 4) == ("two words",)
    assert "".join(contact_sheet._wrap("abc " * 30, 200, 9)).replace(" ", "") == "abc" * 30


def test_a_large_dataset_makes_a_sheet_of_bounded_size(tmp_path, monkeypatch):
    for index in range(8):
        save(tmp_path / f"{index}.png", (64 + 30 * index, 64 + 20 * (8 - index)), caption="x")
    dataset = list_dataset(load_dataset_config(tmp_path, side=512))
    whole = draw_contact_sheet(dataset).height
    monkeypatch.setattr(contact_sheet, "MAX_BUCKETS", 2)
    assert len({item.bucket for item in dataset.items}) > 4 and draw_contact_sheet(dataset).height < whole
    same = Dataset(config=dataset.config, items=dataset.items[:1] * 200)
    assert draw_contact_sheet(same).height < 1200
