"""Manifests of caches: what was tampered with or cannot be read, and what pruning deletes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from caches import (
    AUTOENCODER,
    cached_files,
    fill,
    listing,
    opened,
    the_manifest,
)
from flux2_kit.flux2_core.sampling import Stopped
from flux2_kit.training import cache_manifest
from flux2_kit.training.cache_manifest import prune_cache
from flux2_kit.training.encode import CacheOptions, cache_latents


def test_pruning_keeps_what_is_named_and_what_is_not_ours(filled):
    small, large = listing(filled), listing(filled, resolution=(96, 96))
    fill(large)
    cache = filled / "flux2_cache"
    foreign = [cache / "notes.txt", cache / "latents-mine.safetensors", cache / "text-.safetensors", cache / "sub"]
    for path in foreign[:3]:
        path.write_text("mine")
    foreign[3].mkdir()
    (foreign[3] / f"latents-{'0' * 32}.safetensors").write_text("mine")
    stale = cache / f".latents-{'0' * 32}-abcdefgh.safetensors"
    fresh = cache / f".text-{'0' * 32}-abc_efgh.safetensors"
    unnamed = cache / f"text-{'0' * 32}.safetensors"
    for path in (stale, fresh, unnamed):
        path.write_text("x")
    os.utime(stale, (1, 1))
    (filled / "b.txt").write_text("edited")
    fill(listing(filled))
    before = cached_files(filled)
    report = prune_cache(small)
    gone = before - cached_files(filled)
    assert {stale.name, unnamed.name} < gone and report.num_deleted == len(gone) == 3
    assert {name[:4] for name in gone} == {".lat", "text"}  # the third is the caption that was edited
    assert fresh.exists() and all(path.exists() for path in foreign) and any(foreign[3].iterdir())
    for dataset in (listing(filled), listing(filled, resolution=(96, 96))):
        assert fill(dataset) == (0, 0)


@pytest.mark.parametrize(
    "tamper",
    [
        {"items": [{"picture": "../a.png", "files": ["../../secret.safetensors"]}]},
        {"items": [{"picture": "../a.png", "files": ["/etc/passwd"]}]},
        {"items": [{"picture": "../a.png", "files": [3]}]},
        {"version": 2},
        {"encoder": {}},
        {"encoder": {"fingerprint": "0" * 32, "dtype": "load", "file": "x", "channels": 1, "reference_sides": [1, 1]}},
        {"pictures": {"../a.png": [1, 2, "not a digest"]}},
        {"what": "text"},
    ],
)
def test_a_manifest_that_was_tampered_with(filled, tamper):
    dataset = listing(filled)
    (manifest,) = (filled / "flux2_cache" / name for name in cached_files(filled, "manifest-latents"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | tamper))
    for use in (opened, prune_cache):
        with pytest.raises(ValueError, match=r"manifest-latents-.*(is damaged|is a manifest of version '2')"):
            use(dataset)
    assert fill(dataset) == (0, 0)
    opened(dataset)


def test_a_manifest_is_written_before_anything_is_encoded(folder):
    cache = folder / "flux2_cache"
    with pytest.raises(Stopped, match="stopped after 0 of 3 pictures"):
        cache_latents(listing(folder), AUTOENCODER, CacheOptions(should_stop=cache.exists))
    assert len(cached_files(folder)) == len(cached_files(folder, "manifest-latents")) == 1
    cached = (
        cache / f"latents-{'0' * 32}.safetensors",
        cache / json.loads(the_manifest(cache).read_text())["items"][0]["files"][0],
    )
    for path in cached:
        path.write_text("of a run that is under way")
    prune_cache(listing(folder))
    assert [path.exists() for path in cached] == [False, True]


def test_a_manifest_that_cannot_be_read(filled, monkeypatch):
    path = the_manifest(filled / "flux2_cache", "latents")
    read = Path.read_bytes

    def refuse(self):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"manifest-latents.* cannot be read \(Permission denied\); check its"):
        opened(listing(filled))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"format": NaN}', b'{"a":' * 10**5])
def test_a_manifest_that_is_none(filled, content):
    path = the_manifest(filled / "flux2_cache", "latents")
    whole = path.read_bytes()
    path.write_bytes(content)
    for use in (opened, prune_cache):
        with pytest.raises(ValueError, match=r"manifest-latents.*delete it and run `flux2 cache` again$"):
            use(listing(filled))
    assert fill(listing(filled)) == (0, 0)
    assert path.read_bytes() == whole


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_link_in_the_place_of_a_manifest(filled):
    path = the_manifest(filled / "flux2_cache", "latents")
    outside = path.rename(filled / "elsewhere.json")
    before = outside.read_bytes()
    path.symlink_to(outside)
    with pytest.raises(ValueError, match="are not cached"):
        opened(listing(filled))
    assert fill(listing(filled)) == (0, 0)
    opened(listing(filled))
    assert not path.is_symlink() and outside.read_bytes() == before


def test_pruning_beside_a_run_that_has_just_begun(filled, monkeypatch):
    """Its manifest and its files come when the manifests were listed."""
    large = listing(filled, resolution=(96, 96))
    real = cache_manifest.list_manifests

    def list_late(folder):
        monkeypatch.undo()
        manifests = real(folder)
        fill(large)
        return manifests

    monkeypatch.setattr(cache_manifest, "list_manifests", list_late)
    assert prune_cache(listing(filled)).num_deleted == 0
    assert fill(large) == (0, 0)


def test_pruning_what_another_run_has_pruned(filled, monkeypatch):
    unnamed = filled / "flux2_cache" / f"text-{'0' * 32}.safetensors"
    unnamed.write_text("x")
    real = cache_manifest.list_manifests
    monkeypatch.setattr(cache_manifest, "list_manifests", lambda folder: (unnamed.unlink(), real(folder))[1])
    assert prune_cache(listing(filled)).num_deleted == 0
