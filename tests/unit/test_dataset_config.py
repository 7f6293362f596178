"""Settings of datasets: musubi-tuner's schema, our own keys, tables and folders, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flux2_kit.training.dataset import list_dataset
from flux2_kit.training.dataset_config import READERS, SubsetConfig, load_dataset_config
from PIL import Image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (80, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("a caption")
    return folder


def write_json(folder: Path, dataset: dict[str, Any], general: dict[str, Any] | None = None) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps({"general": general or {}, "datasets": [dataset]}))
    return path


def load_one(folder: Path, general: dict[str, Any] | None = None, **dataset: Any) -> SubsetConfig:
    dataset = {"image_directory": "pictures"} | dataset
    return load_dataset_config(write_json(folder, dataset, general)).subsets[0]


def test_defaults_are_those_of_musubi_tuner(pictures):
    subset = load_one(pictures.parent)
    assert subset.resolution == (960, 544)
    assert (subset.batch_size, subset.num_repeats) == (1, 1)
    assert (subset.enable_bucket, subset.bucket_no_upscale) == (False, False)
    assert (subset.control_directory, subset.control_resolution, subset.cache_directory) == (None, None, None)


def test_general_falls_through_into_every_entry(pictures):
    (pictures.parent / "more [v1]").mkdir()
    path = pictures.parent / "dataset.toml"
    path.write_text(
        """
        [general]
        resolution = 512
        caption_extension = "txt"
        batch_size = 4
        enable_bucket = true
        bucket_no_upscale = true
        [[datasets]]
        image_directory = "pictures"
        [[datasets]]
        image_directory = "more [v1]"
        resolution = [640, 384]
        batch_size = 2
        num_repeats = 3
        cache_directory = "made later"
        """
    )
    first, second = load_dataset_config(path).subsets
    assert (first.resolution, first.batch_size, first.num_repeats) == ((512, 512), 4, 1)
    assert (first.caption_extension, first.enable_bucket, first.bucket_no_upscale) == (".txt", True, True)
    assert (second.resolution, second.batch_size, second.num_repeats) == ((640, 384), 2, 3)
    assert second.image_directory == path.parent / "more [v1]"
    assert second.cache_folder == path.parent / "made later"
    assert first.cache_folder == pictures / "flux2_cache"


def test_paths_are_taken_from_the_settings_folder_first_then_from_the_working_directory(
    pictures, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pictures").mkdir(parents=True)
    (elsewhere / "only here").mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_one(tmp_path).image_directory == pictures
    assert load_one(tmp_path, image_directory="only here").image_directory == elsewhere / "only here"
    assert load_one(tmp_path, image_directory=str(pictures)).image_directory == pictures
    assert load_one(tmp_path, cache_directory="only here").cache_directory == tmp_path / "only here"


@pytest.mark.parametrize(
    ("keys", "fit", "resolution"),
    [
        ({}, "inference", None),
        ({"no_resize_control": False}, "inference", None),
        ({"no_resize_control": True}, "original", None),
        ({"control_resolution": [512, 256]}, "area", (512, 256)),
        ({"no_resize_control": True, "control_resolution": 512}, "original", (512, 512)),
        ({"control_fit": "target"}, "target", None),
        ({"control_fit": "area"}, "area", None),
        ({"control_fit": "original", "control_resolution": 512}, "original", (512, 512)),
    ],
)
def test_keys_of_references(pictures, keys, fit, resolution):
    subset = load_one(pictures.parent, **keys)
    assert (subset.control_fit, subset.control_resolution) == (fit, resolution)


@pytest.mark.parametrize(
    ("old", "new", "value", "fit"),
    [
        ("flux_kontext_no_resize_control", "no_resize_control", True, "original"),
        ("qwen_image_edit_no_resize_control", "no_resize_control", True, "original"),
        ("qwen_image_edit_control_resolution", "control_resolution", [512, 512], "area"),
    ],
)
def test_deprecated_names_work_with_a_warning(pictures, caplog, old, new, value, fit):
    with caplog.at_level(logging.WARNING):
        assert load_one(pictures.parent, **{old: value}).control_fit == fit
    assert f"{old} is deprecated; write {new}" in caplog.text
    with pytest.raises(ValueError, match=f"both {old} and {new}"):
        load_one(pictures.parent, **{old: value, new: value})


def test_our_own_keys(pictures):
    keys = {
        "caption_dropout": 0.1,
        "shuffle_caption": True,
        "caption_separator": ";",
        "keep_parts": 1,
        "num_caption_orders": 3,
        "trigger_word": "sks",
        "flip": True,
        "validation_fraction": 0.25,
    }
    subset = load_one(pictures.parent, **keys)
    assert {key: getattr(subset, key) for key in keys} == keys
    assert not {key for key in READERS if not hasattr(subset, key)} - {"multiple_target", "no_resize_control"}


VIDEO = ["video_directory", "video_jsonl_file", "target_frames", "frame_extraction", "frame_stride", "frame_sample"]
FRAMEPACK = ["fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"]


@pytest.mark.parametrize("key", [*VIDEO, "max_frames", "source_fps"])
@pytest.mark.parametrize("in_general", [False, True])
def test_keys_of_video_are_refused_by_name(pictures, key, in_general):
    with pytest.raises(ValueError, match=f"{key} is for video"):
        load_one(pictures.parent, **({"general": {key: 1}} if in_general else {key: 1}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        *(({key: 1}, f"{key} is for FramePack") for key in FRAMEPACK),
        ({"multiple_target": True}, "multiple_target trains several layers"),
        ({"bath_size": 1}, r"unknown key 'bath_size'; did you mean batch_size\?"),
        ({"subsets": []}, "sd-scripts"),
        ({"resolution": "big"}, r"resolution must be a side or \[width, height\]"),
        ({"resolution": [1, 2, 3]}, "resolution must be a side"),
        ({"resolution": True}, "resolution must be a side"),
        ({"resolution": 32}, "each side must be 64 to"),
        ({"control_resolution": [64, 99999]}, "control_resolution is 64x99999"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"num_repeats": -1}, "num_repeats is -1"),
        ({"enable_bucket": 1}, "enable_bucket must be true or false"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"caption_dropout": "x"}, "caption_dropout must be a number"),
        ({"caption_dropout": float("nan")}, "caption_dropout is nan"),
        ({"num_repeats": 10**400}, "num_repeats is 1000"),
        ({"caption_dropout": 10**400}, "caption_dropout is too large"),
        ({"cache_directory": "a\0b"}, "cache_directory is .* no path"),
        ({"validation_fraction": 1}, "validation_fraction is 1"),
        ({"num_caption_orders": 0}, "num_caption_orders is 0"),
        ({"caption_separator": " "}, "caption_separator is blank"),
        ({"trigger_word": ""}, "trigger_word is blank"),
        ({"caption_extension": "../x"}, "caption_extension is '../x'"),
        ({"control_fit": "stretch"}, "allowed are inference, target, original, area"),
        ({"control_fit": "target", "no_resize_control": True}, "contradict"),
        ({"control_fit": "target", "control_resolution": 512}, "does not use it"),
        ({"control_directory": ""}, "control_directory must be a path"),
        ({"control_directory": "nowhere"}, "control_directory: nothing is at"),
        ({"image_directory": "https://example.org/a"}, "download it first"),
        ({"image_jsonl_file": "pictures/a.txt"}, "image_directory and image_jsonl_file"),
        ({"image_directory": "a\x00b"}, "image_directory"),
        ({"image_directory": "x" * 5000}, "no path|nothing is at"),
    ],
)
def test_wrong_settings_are_refused_with_file_and_entry(pictures, keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_one(pictures.parent, **keys)
    assert str(caught.value).startswith(f"{pictures.parent / 'dataset.json'}: [[datasets]] 1: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[datasets]\n", "not valid TOML"),
        ("[general]\nresolution = 512\n", r"no \[\[datasets\]\]"),
        ('[datasets]\nimage_directory = "x"\n', r"write \[\[datasets\]\]"),
        ("datasets = []\n", r"no \[\[datasets\]\]"),
        ("datasets = [1]\n", r"no \[\[datasets\]\]"),
        ("general = 1\n[[datasets]]\n", "general must be a table"),
        ("batch_size = 1\n[[datasets]]\n", r"put it into \[general\] or \[\[datasets\]\]"),
        ("[[dataset]]\n", "did you mean datasets"),
        ("[[datasets]]\nbatch_size = 1\n", "exactly one of image_directory"),
        ('[general]\nimage_directory = "x"\n[[datasets]]\n', r"image_directory belongs into \[\[datasets\]\]"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    path = tmp_path / "dataset.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset_config(path)
    assert str(path) in str(caught.value)


def test_damaged_and_oversized_files_are_refused(tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        load_dataset_config(deep)
    large = tmp_path / "large.toml"
    with large.open("wb") as file:
        file.truncate(9 * 2**20)
    with pytest.raises(ValueError, match="more than"):
        load_dataset_config(large)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_dataset_config(binary)
    with pytest.raises(ValueError, match="no dataset at"):
        load_dataset_config(tmp_path / "missing.toml")
    other = tmp_path / "picture.png"
    other.touch()
    with pytest.raises(ValueError, match="is no dataset"):
        load_dataset_config(other)


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(ValueError, match="no dataset is given"):
        load_dataset_config("")


def test_settings_may_begin_with_a_byte_order_mark(pictures):
    path = pictures.parent / "dataset.toml"
    path.write_text('\ufeff[[datasets]]\nimage_directory = "pictures"\n', encoding="utf-8")
    assert load_dataset_config(path).subsets[0].image_directory == pictures


def test_a_folder_or_table_needs_no_settings(pictures):
    table = pictures / "table.json"
    table.write_text('\ufeff [{"image": "a.png", "prompt": "x"}]', encoding="utf-8")
    for path, key in [(pictures, "image_directory"), (table, "metadata_file")]:
        subset = load_dataset_config(path).subsets[0]
        assert getattr(subset, key) == path
        assert (subset.resolution, subset.enable_bucket) == ((1024, 1024), True)
        assert load_dataset_config(path, side=64).subsets[0].resolution == (64, 64)


class TestRoots:
    """A graph from a stranger names paths; nothing outside of the folders that it may use is read."""

    @pytest.fixture
    def inside(self, tmp_path: Path) -> Path:
        folder = tmp_path / "inside" / "pictures"
        folder.mkdir(parents=True)
        Image.new("RGB", (80, 64)).save(folder / "a.png")
        (folder / "a.txt").write_text("x")
        outside = tmp_path / "outside"
        outside.mkdir()
        Image.new("RGB", (80, 64)).save(outside / "secret.png")
        (outside / "secret.txt").write_text("secret")
        return tmp_path / "inside"

    def test_what_lies_inside_is_read(self, inside):
        config = load_dataset_config(write_json(inside, {"image_directory": "pictures"}), roots=[inside])
        assert config.roots == (inside.resolve(),)
        assert len(list_dataset(config).items) == 1
        assert len(list_dataset(load_dataset_config(inside / "pictures", roots=[inside])).items) == 1

    def test_the_dataset_itself_is_checked(self, inside):
        for path in (inside.parent / "outside", inside / ".." / "outside", Path("/"), inside.parent / "none.toml"):
            with pytest.raises(ValueError, match=r"the dataset leads to .* outside of what may be read"):
                load_dataset_config(path, roots=[inside])
        with pytest.raises(ValueError, match=r"the dataset leads to .* outside of what may be read"):
            load_dataset_config(inside, roots=[])

    @pytest.mark.parametrize("key", ["image_directory", "control_directory", "mask_directory", "cache_directory"])
    @pytest.mark.parametrize("named", ["../outside", "pictures/../../outside", "absolute", "link"])
    def test_paths_in_settings_are_checked(self, inside, key, named):
        (inside / "link").symlink_to(inside.parent / "outside")
        value = str(inside.parent / "outside") if named == "absolute" else named
        path = write_json(inside, {"image_directory": "pictures"} | {key: value})
        with pytest.raises(ValueError, match=f"{key} leads to .* outside of what may be read"):
            load_dataset_config(path, roots=[inside])

    def test_the_working_directory_is_no_way_out(self, inside, monkeypatch):
        monkeypatch.chdir(inside.parent)
        with pytest.raises(ValueError, match=r"nothing is at|outside of what may be read"):
            load_dataset_config(write_json(inside, {"image_directory": "outside"}), roots=[inside])

    @pytest.mark.parametrize("settings", [False, True])
    def test_the_cache_beside_the_pictures_is_no_link_out(self, inside, settings):
        path = write_json(inside, {"image_directory": "pictures"}) if settings else inside / "pictures"
        (inside / "pictures" / "flux2_cache").symlink_to(inside.parent / "outside")
        with pytest.raises(ValueError, match=r"the cache leads to .* outside of what may be read"):
            load_dataset_config(path, roots=[inside])

    @pytest.mark.parametrize("row", [{"image": "../outside/secret.png"}, {"edit_image": ["../outside/secret.png"]}])
    def test_paths_in_tables_are_checked(self, inside, row):
        table = inside / "table.jsonl"
        table.write_text(json.dumps({"image": "pictures/a.png", "prompt": "x"} | row))
        with pytest.raises(ValueError, match=r"line 1: .* outside of what may be read"):
            list_dataset(load_dataset_config(table, roots=[inside]))

    @pytest.mark.parametrize("name", ["b.png", "a.txt", "b.txt"])
    def test_links_in_a_folder_are_checked(self, inside, name):
        folder = inside / "pictures"
        if name == "b.txt":
            Image.new("RGB", (80, 64)).save(folder / "b.png")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(inside.parent / "outside" / f"secret{Path(name).suffix}")
        with pytest.raises(ValueError, match="outside of what may be read"):
            list_dataset(load_dataset_config(folder, roots=[inside]))
        assert list_dataset(load_dataset_config(folder)).items

    @pytest.mark.parametrize("key", ["control_directory", "mask_directory"])
    def test_links_to_references_and_masks_are_checked(self, inside, key):
        (inside / "more").mkdir()
        (inside / "more" / "a.png").symlink_to(inside.parent / "outside" / "secret.png")
        path = write_json(inside, {"image_directory": "pictures", key: "more"})
        with pytest.raises(ValueError, match="outside of what may be read"):
            list_dataset(load_dataset_config(path, roots=[inside]))
