"""Files are written whole or not at all; small ones are read with a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.files import read_json_object, write_atomically, write_safetensors, write_text
from safetensors import safe_open


def test_a_new_file_is_written(tmp_path):
    target = tmp_path / "note.txt"
    assert write_text(target, "grün") == target
    assert target.read_text(encoding="utf-8") == "grün"
    assert list(tmp_path.iterdir()) == [target]


def test_an_old_file_is_replaced(tmp_path):
    target = tmp_path / "note.txt"
    target.write_text("old and longer")
    write_text(target, "new")
    assert target.read_text() == "new"


def test_the_target_stays_as_it_was_until_the_new_file_is_whole(tmp_path):
    target = tmp_path / "note.txt"
    target.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert target.read_text() == "old"

    write_atomically(target, write)
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    target = tmp_path / "note.txt"
    target.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_without_an_old_file_leaves_an_empty_folder(tmp_path):
    def fail(temporary: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "note.txt", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(OSError):
        write_text(tmp_path / "absent" / "note.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file_is_an_error_and_stays(tmp_path):
    target = tmp_path / "note.txt"
    target.mkdir()
    with pytest.raises(OSError):
        write_text(target, "text")
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_file_keeps_the_suffix_and_the_folder(tmp_path):
    seen: list[Path] = []
    write_atomically(tmp_path / "picture.png", lambda temporary: seen.append(temporary))
    assert (seen[0].suffix, seen[0].parent) == (".png", tmp_path)


def test_a_long_name_is_written(tmp_path):
    target = tmp_path / ("x" * 240 + ".txt")
    write_text(target, "text")
    assert target.read_text() == "text"


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_get_the_mode_that_the_user_set(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "note.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note.txt").stat().st_mode) == mode


def test_the_mode_of_the_process_is_not_touched(tmp_path, monkeypatch):
    """Between two calls of umask, another thread would make files of a mode that nobody asked for."""
    monkeypatch.delattr(os, "umask")
    write_text(tmp_path / "note.txt", "text")


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {
        "a": torch.randn(2, 3).T,
        "b": torch.arange(4, dtype=torch.bfloat16),
        "c": torch.nn.Parameter(torch.ones(1)),
    }
    write_safetensors(tmp_path / "t.safetensors", tensors, {"key": "value"})
    with safe_open(str(tmp_path / "t.safetensors"), framework="pt") as file:
        assert file.metadata() == {"key": "value"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor), name


def test_a_json_object_comes_back(tmp_path):
    write_text(tmp_path / "config.json", '{"name": "grün"}')
    assert read_json_object(tmp_path / "config.json") == {"name": "grün"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xff", "is not valid JSON"),
        (b'{"a":' * 100_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b'{"a": "' + bytes(600_000) + b'"}', "more than the 600000 that such a file may have"),
    ],
    ids=["cut", "no text", "deep", "a list", "large"],
)
def test_files_that_hold_no_json_object_are_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_object(path, max_bytes=600_000)
    assert str(path) in str(caught.value)
