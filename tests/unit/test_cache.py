"""Caches of a dataset: what is in them, what is encoded again and what is not, and what a wrong one is told as."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Semaphore

import numpy as np
import pytest
import torch
from flux2_kit.flux2_core.checkpoint import load_autoencoder
from flux2_kit.flux2_core.images import image_to_tensor, load_image
from flux2_kit.flux2_core.pipeline import encode_prompt, encode_references
from flux2_kit.flux2_core.placement import place_text_encoder
from flux2_kit.flux2_core.sampling import Stopped
from flux2_kit.flux2_core.text_encoder import TextEncoder, load_text_encoder
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import find_weights
from flux2_kit.training import cache_encoders, cache_manifest, encode
from flux2_kit.training.buckets import fit_target
from flux2_kit.training.cache import CachedDataset, CachedItem, open_cache
from flux2_kit.training.cache_manifest import prune_cache
from flux2_kit.training.cache_plan import plan_pictures, sources, write_cached
from flux2_kit.training.dataset import Dataset, list_dataset
from flux2_kit.training.dataset_config import DatasetConfig, SubsetConfig
from flux2_kit.training.encode import CacheOptions, cache_latents, cache_text
from flux2_kit.training.fingerprint import identify_autoencoder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY = VARIANTS["tiny"]
AUTOENCODER = find_weights(TINY, "autoencoder")
TEXT_ENCODER = find_weights(TINY, "text_encoder")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pictures are so small that threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(path: Path, seed: int, size: tuple[int, int] = (70, 90)) -> Path:
    """A smooth picture of its own, `size` wide and high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def make_folder(place: Path) -> Path:
    """Three pictures with captions, in a folder whose name looks like a pattern."""
    folder = place / "pictures [v1]"
    for seed, name in enumerate(NAMES):
        draw(folder / f"{name}.png", seed)
        (folder / f"{name}.txt").write_text(f"a picture of {name}")
    return folder


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("filled"))
    assert fill(listing(folder)) == (3, 4)
    return folder


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Path:
    """The pictures with their whole cache."""
    return shutil.copytree(filled_once, tmp_path / filled_once.name)


def listing(*folders: Path, **settings) -> Dataset:
    settings = {"resolution": (64, 64), "enable_bucket": True} | settings
    subsets = tuple(SubsetConfig(image_directory=folder, **settings) for folder in folders)
    return list_dataset(DatasetConfig(subsets=subsets))


def fill(dataset: Dataset, **options) -> tuple[int, int]:
    """How many latents and how many texts were encoded."""
    latents = cache_latents(dataset, AUTOENCODER, CacheOptions(**options))
    text = cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, CacheOptions(**options))
    return latents.num_encoded, text.num_encoded


def opened(dataset: Dataset, **weights) -> CachedDataset:
    return open_cache(dataset, TINY, **weights)


def cached_files(folder: Path, kind: str = "") -> set[str]:
    return {path.name for path in (folder / "flux2_cache").iterdir() if path.name.startswith(kind)}


def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one is an error from here on."""

    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(cache_encoders, "load_autoencoder", refuse)
    monkeypatch.setattr(cache_encoders, "place_text_encoder", refuse)


# What is in the files


def test_latents_are_those_of_the_fitted_picture(filled):
    cache = opened(listing(filled))
    autoencoder = load_autoencoder(AUTOENCODER)
    assert [cached.item.image.name for cached in cache.items] == ["a.png", "b.png", "c.png"]
    for cached in cache.items:
        fitted = image_to_tensor(fit_target(load_image(cached.item.image), cached.item.bucket))
        with torch.inference_mode():
            expected = autoencoder.encode(fitted)[0]
        latents = cache.load(cached).latents
        assert torch.equal(latents, expected) and latents.dtype == torch.float32
        assert cached.latents_size == latents.shape[1:]


@pytest.mark.parametrize("count", [1, 2])
def test_references_are_those_of_inference(folder, count):
    control = folder.parent / "control"
    for name in NAMES:
        for index in range(count):
            draw(control / f"{name}_{index}.png", 10 + index, (100 + 40 * index, 66))
    dataset = listing(folder, control_directory=control)
    fill(dataset)
    cache = opened(dataset)
    autoencoder = load_autoencoder(AUTOENCODER)
    for cached in cache.items:
        expected = encode_references(autoencoder, [load_image(path) for path in cached.item.references])
        references = cache.load(cached).references
        assert len(references) == count
        assert all(torch.equal(one, other[0]) for one, other in zip(references, expected, strict=True))
        assert cached.reference_sizes == tuple(one.shape[1:] for one in references)
    assert len(cached_files(folder, "latents")) == 3 + count  # the references of all pictures are the same


def test_how_references_are_fitted_decides_what_is_encoded(folder):
    control = folder.parent / "control"
    for name in NAMES:
        draw(control / f"{name}.png", 10, (160, 96))
    sizes = {}
    for fit, resolution in (("inference", None), ("target", None), ("original", None), ("area", (128, 128))):
        dataset = listing(folder, control_directory=control, control_fit=fit, control_resolution=resolution)
        fill(dataset)
        sizes[fit] = opened(dataset).items[0].reference_sizes[0]
    bucket = listing(folder).items[0].bucket
    target = bucket[1] // 16, bucket[0] // 16
    assert sizes == {"inference": (3, 5), "target": target, "original": (6, 10), "area": (6, 10)}
    # "area" enlarges to 165x99 before the crop: of the same size, but another picture than "original".
    assert len(cached_files(folder, "latents")) == 3 + 4


def test_a_reference_alone_is_another_one_than_among_several(folder):
    control = folder.parent / "control"
    for name in NAMES:
        draw(control / f"{name}_0.png", 10, (160, 96))
    draw(control / "c_1.png", 11, (160, 96))
    dataset = listing(folder, control_directory=control)
    identity = replace(identify_autoencoder(AUTOENCODER), reference_sides=(128, 64))
    digests = {path: str(path.stat().st_size) for item in dataset.items for path in sources(item)}
    plans = [plan_pictures(item, dataset.config.subsets[0], identity, digests) for item in dataset.items]
    alone, also_alone, among_two = (plan.references[0] for plan in plans)
    assert alone.key == also_alone.key != among_two.key
    assert (alone.shape, among_two.shape) == ((128, 6, 10), (128, 3, 5))


@pytest.mark.parametrize("weights", ["bundled", "random"])
def test_text_is_bit_equal_to_encoding_at_run_time(folder, random_tiny_files, weights):
    path = TEXT_ENCODER if weights == "bundled" else random_tiny_files.text_encoder
    (folder / "b.txt").write_text("word " * 60)
    dataset = listing(folder)
    cache_latents(dataset, AUTOENCODER)
    report = cache_text(dataset, path, TINY.text_encoder)
    assert report.num_encoded == 4 and report.num_cut == 1
    cache = opened(dataset, text_encoder=path)
    encoder = load_text_encoder(path, TINY.text_encoder)
    for cached in cache.items:
        for drop_caption in (False, True):
            expected = encode_prompt(encoder, "" if drop_caption else cached.item.captions[0])[0]
            text = cache.load(cached, drop_caption=drop_caption).text
            assert text.shape == (24, 192) and text.dtype == expected.dtype == torch.float32
            assert torch.equal(text, expected)
    assert cache.text_dim == 192


def test_text_in_another_precision(filled):
    dataset = listing(filled)
    (manifest,) = cached_files(filled, "manifest-text")
    (filled / "flux2_cache" / manifest).unlink()
    assert cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, dtype=torch.bfloat16).num_encoded == 4
    cache = opened(dataset, text_encoder=TEXT_ENCODER)
    expected = encode_prompt(load_text_encoder(TEXT_ENCODER, TINY.text_encoder, dtype=torch.bfloat16), "a picture of a")
    assert torch.equal(cache.load(cache.items[0]).text, expected[0])
    # Cached in both, training takes what run time has, and refuses to guess without the weights.
    cache_text(dataset, TEXT_ENCODER, TINY.text_encoder)
    assert opened(dataset, text_encoder=TEXT_ENCODER).text_encoder.dtype == "float32"
    with pytest.raises(ValueError, match=r"captions are cached with 2 encoders.*bfloat16.*name the text encoder"):
        opened(dataset)


def test_a_batch_of_captions_only_when_asked_for(filled):
    dataset = listing(filled)
    cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, CacheOptions(batch_size=3, skip_existing=False))
    text = opened(dataset).load(opened(dataset).items[0]).text
    expected = encode_prompt(load_text_encoder(TEXT_ENCODER, TINY.text_encoder), "a picture of a")[0]
    torch.testing.assert_close(text, expected, rtol=1e-4, atol=1e-4)


def test_captions_go_one_by_one_unless_asked_for(filled, monkeypatch):
    counts = []

    class Recorder(TextEncoder):
        def encode(self, prompts):
            counts.append(len(prompts))
            return super().encode(prompts)

    def place(*arguments, **settings):
        loaded, streamer = place_text_encoder(*arguments, **settings)
        return Recorder(loaded.model, loaded.tokenizer, loaded.config), streamer

    monkeypatch.setattr(cache_encoders, "place_text_encoder", place)
    for batch_size in (None, 3):
        options = CacheOptions(batch_size=batch_size, skip_existing=False)
        cache_text(listing(filled), TEXT_ENCODER, TINY.text_encoder, options)
    assert counts == [1, 1, 1, 1, 3, 1]


def test_layers_that_do_not_fit_are_streamed_to_the_same_bits(filled, monkeypatch):
    whole = {name: (filled / "flux2_cache" / name).read_bytes() for name in cached_files(filled)}
    plans = []

    def place(path, config, plan, device, **settings):
        plans.append(plan)
        return place_text_encoder(path, config, plan, device, **settings)

    monkeypatch.setattr(cache_encoders, "place_text_encoder", place)
    for budget in (None, 600_000, 300_000):
        monkeypatch.setattr(cache_encoders, "device_budget", lambda _device, budget=budget: budget)
        cache_text(listing(filled), TEXT_ENCODER, TINY.text_encoder, CacheOptions(skip_existing=False))
        assert {name: (filled / "flux2_cache" / name).read_bytes() for name in cached_files(filled)} == whole
    assert [plan.num_resident for plan in plans] == [3, 2, 0]


def test_layers_leave_where_memory_runs_out_after_all(filled, monkeypatch):
    whole = {name: (filled / "flux2_cache" / name).read_bytes() for name in cached_files(filled)}
    num_failures = 1

    class Large(TextEncoder):
        def encode(self, prompts):
            nonlocal num_failures
            if num_failures:
                num_failures -= 1
                raise torch.OutOfMemoryError("out of memory")
            return super().encode(prompts)

    def place(*arguments, **settings):
        loaded, streamer = place_text_encoder(*arguments, **settings)
        return Large(loaded.model, loaded.tokenizer, loaded.config), streamer

    monkeypatch.setattr(cache_encoders, "place_text_encoder", place)
    cache_text(listing(filled), TEXT_ENCODER, TINY.text_encoder, CacheOptions(skip_existing=False))
    assert {name: (filled / "flux2_cache" / name).read_bytes() for name in cached_files(filled)} == whole
    num_failures = 2
    with pytest.raises(ValueError, match="one caption does not fit into memory"):
        cache_text(listing(filled), TEXT_ENCODER, TINY.text_encoder, CacheOptions(skip_existing=False))


def test_batches_of_pictures_are_close_to_single_ones(filled):
    dataset = listing(filled)
    single = {name: load_file(filled / "flux2_cache" / name)["latents"] for name in cached_files(filled, "latents")}
    cache_latents(dataset, AUTOENCODER, CacheOptions(batch_size=3, skip_existing=False))
    for name, latents in single.items():
        torch.testing.assert_close(load_file(filled / "flux2_cache" / name)["latents"], latents, rtol=0, atol=1e-5)


def test_flipped_pictures_references_and_masks(folder):
    control, masks = folder.parent / "control", folder.parent / "masks"
    for name in NAMES:
        draw(control / f"{name}.png", 10, (80, 64))
        masks.mkdir(exist_ok=True)
        gradient = np.tile(np.linspace(0, 255, 70).astype(np.uint8), (90, 1))
        Image.fromarray(gradient).save(masks / f"{name}.png")
    dataset = listing(folder, control_directory=control, mask_directory=masks, flip=True)
    fill(dataset)
    cache = opened(dataset)
    cached = cache.items[0]
    plain, flipped = cache.load(cached), cache.load(cached, flipped=True)
    autoencoder = load_autoencoder(AUTOENCODER)
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    fitted = fit_target(load_image(cached.item.image), cached.item.bucket)
    with torch.inference_mode():
        assert torch.equal(flipped.latents, autoencoder.encode(image_to_tensor(fitted.transpose(mirror)))[0])
    assert not torch.equal(flipped.latents, plain.latents)
    assert not torch.equal(flipped.references[0], plain.references[0])
    assert plain.mask is not None and flipped.mask is not None
    assert torch.equal(flipped.mask, plain.mask.flip(-1)) and (plain.mask[0].diff() > 0.1).all()
    unflipped = listing(folder, control_directory=control, mask_directory=masks)
    fill(unflipped)
    with pytest.raises(ValueError, match="not cached mirrored"):
        opened(unflipped).load(opened(unflipped).items[0], flipped=True)


def test_masks_are_averaged_by_area(folder):
    masks = folder.parent / "masks"
    masks.mkdir()
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, :24] = 255  # one and a half latents
    for name in NAMES:
        draw(folder / f"{name}.png", 3, (64, 64))
        Image.fromarray(mask).save(masks / f"{name}.png")
    dataset = listing(folder, mask_directory=masks)
    assert fill(dataset) == (2, 4)  # the picture, which is three times the same, and the mask
    loaded = opened(dataset).load(opened(dataset).items[0]).mask
    assert loaded is not None and loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, torch.tensor([1, 0.5, 0, 0]).repeat(4, 1))


def test_a_changed_mask_alone_loads_no_autoencoder(folder, monkeypatch):
    masks = folder.parent / "masks"
    for name in NAMES:
        draw(masks / f"{name}.png", 20, (70, 90))
    dataset = listing(folder, mask_directory=masks)
    fill(dataset)
    no_encoder(monkeypatch)
    draw(masks / "a.png", 21, (70, 90))
    assert fill(dataset) == (1, 0)


def test_samples_can_be_trained_on_when_read_in_inference_mode(filled):
    dataset = listing(filled)
    cache = opened(dataset)
    with torch.inference_mode():
        sample = cache.load(cache.items[0])
    assert not sample.latents.is_inference() and not sample.text.is_inference()


# What is encoded again


def test_nothing_to_do_loads_nothing(filled, monkeypatch):
    dataset = listing(filled)
    no_encoder(monkeypatch)
    assert fill(dataset) == (0, 0)
    assert cache_latents(dataset, AUTOENCODER).num_kept == 3


def test_an_edited_caption_encodes_only_that_caption(filled):
    (filled / "b.txt").write_text("something else")
    dataset = listing(filled)
    with pytest.raises(ValueError, match=r"3 pictures: 1 with an edited caption \(b.png\).*flux2 cache"):
        opened(dataset)
    told = []
    assert fill(dataset, on_progress=lambda *state: told.append(state)) == (0, 1)
    assert told == [("captions encoded", 0, 1), ("captions encoded", 1, 1)]
    opened(dataset)


def test_a_changed_picture_encodes_only_that_picture(filled):
    dataset = listing(filled)
    digest = opened(dataset).digest
    os.utime(filled / "a.png", (1, 1))  # touched, not changed
    assert opened(dataset).digest == digest and fill(dataset) == (0, 0)
    draw(filled / "c.png", 7)
    with pytest.raises(ValueError, match=r"1 changed \(c.png\)"):
        opened(dataset)
    assert fill(dataset) == (1, 0)
    assert opened(dataset).digest != digest


def test_new_and_removed_pictures(filled):
    (filled / "a.png").unlink()
    draw(filled / "d.png", 8)
    (filled / "d.txt").write_text("a picture of b")
    with pytest.raises(ValueError, match=r"1 new since the cache was made \(d.png\)"):
        opened(listing(filled))
    assert fill(listing(filled)) == (1, 0)  # the caption is cached: it is another picture's as well
    assert [cached.item.image.name for cached in opened(listing(filled)).items] == ["b.png", "c.png", "d.png"]


def test_another_resolution_is_encoded_beside_the_first(filled):
    small, large = listing(filled), listing(filled, resolution=(96, 96))
    with pytest.raises(ValueError, match=r"not cached with the present settings.*resolution was \[64, 64\], is \[96"):
        opened(large)
    assert fill(large) == (3, 0)
    assert opened(large).items[0].latents_size != opened(small).items[0].latents_size
    assert fill(small) == (0, 0)


def test_pictures_are_not_read_again_for_another_resolution(filled):
    counted = []
    cache_latents(
        listing(filled, resolution=(96, 96)),
        AUTOENCODER,
        CacheOptions(on_progress=lambda what, done, total: counted.append((what, done, total))),
    )
    assert counted == [("pictures encoded", done, 3) for done in range(4)]


def test_the_same_stem_in_two_folders_and_one_cache(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        draw(folder / "001.png", seed)
        (folder / "001.txt").write_text(f"caption {seed}")
    dataset = listing(*folders, cache_directory=tmp_path / "cache")
    assert fill(dataset) == (2, 3)
    one, two = (opened(dataset).load(cached) for cached in opened(dataset).items)
    assert not torch.equal(one.latents, two.latents) and not torch.equal(one.text, two.text)


def test_equal_pictures_and_captions_are_encoded_once_even_into_two_folders(tmp_path):
    for name in ("one/a", "one/b", "two/a"):
        draw(tmp_path / f"{name}.png", 0)
        (tmp_path / f"{name}.txt").write_text("the same")
    dataset = listing(tmp_path / "one", tmp_path / "two")
    assert fill(dataset) == (1, 2)
    assert cached_files(tmp_path / "one", "latents") == cached_files(tmp_path / "two", "latents")
    assert len(opened(dataset).items) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "replaced", "deleted"])
def test_a_damaged_file_is_found_and_made_again(filled, damage):
    dataset = listing(filled)
    whole = {name: (filled / "flux2_cache" / name).read_bytes() for name in cached_files(filled)}
    victims = [sorted(cached_files(filled, kind))[0] for kind in ("latents", "text")]
    for name in victims:
        path = filled / "flux2_cache" / name
        if damage == "deleted":
            path.unlink()
        elif damage == "replaced":
            other = max(cached_files(filled, name.split("-")[0]))
            path.write_bytes(whole[other])
        else:
            path.write_bytes(path.read_bytes()[: -100 if damage == "truncated" else 0])
    with pytest.raises(ValueError, match="files missing from" if damage == "deleted" else "damaged files in the cache"):
        opened(dataset)
    assert fill(dataset) == (1, 1)
    assert {name: (filled / "flux2_cache" / name).read_bytes() for name in cached_files(filled)} == whole


def test_a_file_damaged_while_it_is_trained_on(filled):
    dataset = listing(filled)
    cache = opened(dataset)
    path = cache.items[0].folder / cache.items[0].files.latents.name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cut off or damaged .*Delete it and run `flux2 cache` again"):
        cache.load(cache.items[0])
    path.unlink()
    with pytest.raises(ValueError, match="deleted while it was in use"):
        cache.load(cache.items[0])


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_one_flipped_bit_is_found_when_the_file_is_read(filled, kind):
    cache = opened(listing(filled))
    path = filled / "flux2_cache" / min(cached_files(filled, kind))
    content = bytearray(path.read_bytes())
    content[-len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is no whole file of a cache: its content is not what was writ"):
        for cached in opened(listing(filled)).items:
            cache.load(cached)
            cache.load(cached, drop_caption=True)
    path.unlink()
    fill(listing(filled))
    for cached in opened(listing(filled)).items:
        cache.load(cached)


def hostile(path: Path, what: str) -> None:
    """Puts another file in the place of a cached one, as a stranger could have made it."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as source:
        metadata = source.metadata()
    (kind,) = tensors
    if what == "link":
        path.rename(path.parent.parent / "elsewhere.safetensors")
        path.symlink_to(path.parent.parent / "elsewhere.safetensors")
    elif what == "shape":
        save_file({kind: tensors[kind][:, :1].contiguous()}, path, metadata)
    elif what == "dtype":
        save_file({kind: tensors[kind].half()}, path, metadata)
    elif what == "large header":
        save_file(tensors, path, metadata | {"more": "x" * 10**6})
    elif what == "no checksum":
        save_file(tensors, path, {"flux2_kit.cache_key": metadata["flux2_kit.cache_key"]})
    elif what == "second tensor":
        save_file(tensors | {"other": torch.zeros(1)}, path, metadata)


@pytest.mark.parametrize("what", ["link", "shape", "dtype", "large header", "no checksum", "second tensor"])
def test_a_file_of_a_stranger_is_made_again(filled, what):
    names = [min(cached_files(filled, kind)) for kind in ("latents", "text")]
    whole = {name: (filled / "flux2_cache" / name).read_bytes() for name in names}
    for name in names:
        hostile(filled / "flux2_cache" / name, what)
    with pytest.raises(ValueError, match=r"files missing|damaged files in the cache"):
        opened(listing(filled))
    assert fill(listing(filled)) == (1, 1)
    for name in names:
        path = filled / "flux2_cache" / name
        assert path.read_bytes() == whole[name] and not path.is_symlink()


def test_values_that_are_not_finite_are_not_trained(filled):
    cache = opened(listing(filled))
    for bad in (torch.nan, torch.inf, -torch.inf):
        tensor = torch.zeros(cache.items[0].files.latents.shape)
        tensor[5, 0, 1] = bad
        write_cached(cache.items[0].folder, cache.items[0].files.latents, tensor)
        with pytest.raises(ValueError, match="no whole file of a cache: it holds values that are not finite"):
            cache.load(cache.items[0])


def test_everything_again_when_asked_for(filled):
    dataset = listing(filled)
    assert fill(dataset, skip_existing=False) == (3, 4)


def test_a_picture_that_hides_its_change_is_seen_when_all_is_encoded_again(filled):
    before = opened(listing(filled)).digest
    path = filled / "a.bmp"  # without compression: another picture has as many bytes
    (filled / "a.png").unlink()
    for seed in (5, 6):
        draw(path, seed)
        os.utime(path, (1, 1))
        fill(listing(filled), skip_existing=False)
        cache = opened(listing(filled))
        with torch.inference_mode():
            fitted = image_to_tensor(fit_target(load_image(path), cache.items[0].item.bucket))
            expected = load_autoencoder(AUTOENCODER).encode(fitted)[0]
        assert torch.equal(cache.load(cache.items[0]).latents, expected)
        assert cache.digest != before
        before = cache.digest


def test_a_picture_that_changes_while_it_is_encoded(filled, monkeypatch):
    """What it holds now must not get the name of what it held before."""
    draw(filled / "a.png", 20)
    dataset = listing(filled)
    prepare = encode.prepare_picture

    def edit_first(file):
        draw(file.source, 21)
        return prepare(file)

    monkeypatch.setattr(encode, "prepare_picture", edit_first)
    with pytest.raises(ValueError, match=r"a.png changed while the dataset was cached; run the command again"):
        fill(dataset)
    monkeypatch.undo()
    assert fill(listing(filled)) == (1, 0)


def test_a_moved_dataset_keeps_its_cache(filled):
    digest = opened(listing(filled)).digest
    moved = filled.parent / "elsewhere"
    filled.rename(moved)
    assert fill(listing(moved)) == (0, 0)
    assert opened(listing(moved)).digest == digest


def test_the_digest_follows_what_is_trained_on(filled):
    dataset = listing(filled)
    digest = opened(dataset).digest
    assert opened(listing(filled)).digest == digest
    for settings in ({"num_repeats": 2}, {"batch_size": 2}, {"caption_dropout": 0.5}, {"validation_fraction": 0.5}):
        assert opened(listing(filled, **settings)).digest != digest


def test_validation_pictures_are_held_out(filled):
    dataset = listing(filled)
    items = (dataset.items[0], replace(dataset.items[1], is_validation=True), dataset.items[2])
    cache = opened(Dataset(config=dataset.config, items=items))
    assert [cached.item.image.name for cached in cache.items] == ["a.png", "c.png"]
    assert [cached.item.image.name for cached in cache.validation] == ["b.png"]


# Other encoders


def test_another_autoencoder(filled, random_tiny_files):
    dataset = listing(filled)
    with pytest.raises(ValueError, match=r"the autoencoder to train with is autoencoder.safetensors \([0-9a-f]{8}"):
        opened(dataset, autoencoder=random_tiny_files.autoencoder)
    assert cache_latents(dataset, random_tiny_files.autoencoder).num_encoded == 3
    with pytest.raises(ValueError, match="pictures are cached with 2 encoders"):
        opened(dataset)
    caches = [opened(dataset, autoencoder=path) for path in (AUTOENCODER, random_tiny_files.autoencoder)]
    one, two = (cache.load(cache.items[0]).latents for cache in caches)
    assert not torch.equal(one, two) and caches[0].digest != caches[1].digest


def test_the_text_cache_of_another_variant(filled):
    dataset = listing(filled)
    (manifest,) = (filled / "flux2_cache" / name for name in cached_files(filled, "manifest-text"))
    data = json.loads(manifest.read_text())
    data["encoder"] |= {"context_dim": 7680, "max_tokens": 512, "file": "qwen_3_4b.safetensors"}
    manifest.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"cached with qwen_3_4b.*no text encoder of tiny.*cache-text"):
        opened(dataset)
    assert fill(dataset) == (0, 0)  # the manifest is made again
    with pytest.raises(ValueError, match=r"no autoencoder of klein-base-4b"):
        open_cache(dataset, VARIANTS["klein-base-4b"])


def test_the_encoder_is_that_of_all_subsets(tmp_path, random_tiny_files):
    for seed, name in enumerate(("one", "two")):
        draw(tmp_path / name / "a.png", seed)
        (tmp_path / name / "a.txt").write_text(name)
    both = listing(tmp_path / "one", tmp_path / "two")
    cache_text(both, TEXT_ENCODER, TINY.text_encoder)
    cache_latents(listing(tmp_path / "one"), AUTOENCODER)
    with pytest.raises(ValueError, match=r"pictures of .*two are not cached with the present settings"):
        opened(both)
    cache_latents(listing(tmp_path / "two"), random_tiny_files.autoencoder)
    with pytest.raises(ValueError, match="those of other subsets with"):
        opened(both)
    cache_latents(both, AUTOENCODER)
    assert len(opened(both).items) == 2


# Manifests and pruning


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


def the_manifest(cache: Path, what: str = "") -> Path:
    """The one manifest of a folder."""
    (manifest,) = (path for path in cache.iterdir() if path.name.startswith(f"manifest-{what}"))
    return manifest


# Interruptions and processes


def test_a_run_that_was_stopped_goes_on(folder):
    dataset = listing(folder)
    done = []
    options = CacheOptions(on_progress=lambda *state: done.append(state), should_stop=lambda: len(done) >= 6)
    with pytest.raises(Stopped, match=r"stopped after 2 of 3 pictures"):  # three were read, begun, and two encoded
        cache_latents(dataset, AUTOENCODER, options)
    with pytest.raises(ValueError, match=r"captions .* are not cached|files missing"):
        opened(dataset)
    assert fill(dataset) == (1, 4)
    assert len(opened(dataset).items) == 3


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from flux2_kit.training.dataset import list_dataset
from flux2_kit.training.dataset_config import DatasetConfig, SubsetConfig
from flux2_kit.training.encode import CacheOptions, cache_latents
folder, autoencoder, num_writes, index, count = sys.argv[1:]
subset = SubsetConfig(image_directory=Path(folder), resolution=(64, 64), enable_bucket=True)
replace, lock, calls = Path.replace, threading.Lock(), []
def dying(*paths):
    with lock:
        calls.append(paths)
        if len(calls) > int(num_writes):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*paths)
Path.replace = dying
options = CacheOptions(process_index=int(index), num_processes=int(count))
print(cache_latents(list_dataset(DatasetConfig(subsets=(subset,))), autoencoder, options).num_encoded)
"""


def start(folder: Path, num_writes: int, index: int = 0, count: int = 1) -> subprocess.Popen[str]:
    """A process that caches latents and is killed before it finishes one write too many."""
    arguments = [folder, AUTOENCODER, num_writes, index, count]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_run_goes_on_where_it_was(folder):
    process = start(folder, 3)  # the manifest and two pictures
    assert process.wait(60) == -signal.SIGKILL
    hidden = cached_files(folder, ".latents")
    assert len(cached_files(folder, "latents")) == 2 and hidden
    dataset = listing(folder)
    assert fill(dataset) == (1, 4)
    assert len(opened(dataset).items) == 3
    os.utime(folder / "flux2_cache" / hidden.pop(), (1, 1))
    assert prune_cache(dataset).num_deleted == 1 and cached_files(folder, ".latents") == hidden


def test_two_processes_make_the_files_of_one(filled):
    names = cached_files(filled)
    latents = {name for name in names if not name.startswith(("text", "manifest-text"))}
    shutil.rmtree(filled / "flux2_cache")
    processes = [start(filled, 100, index, 2) for index in (0, 1)]
    counts = sorted(int(process.communicate(timeout=60)[0]) for process in processes)
    assert counts == [1, 2] and cached_files(filled) == latents


def test_independent_runs_on_one_folder_do_no_harm(filled):
    names = cached_files(filled)
    shutil.rmtree(filled / "flux2_cache")
    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(lambda _: cache_latents(listing(filled), AUTOENCODER).num_encoded, range(3)))
    assert 3 <= sum(counts) <= 9
    assert cached_files(filled) == {name for name in names if not name.startswith(("text", "manifest-text"))}
    cache_text(listing(filled), TEXT_ENCODER, TINY.text_encoder)
    assert len(opened(listing(filled)).items) == 3


def test_every_file_belongs_to_one_process(folder):
    dataset = listing(folder)
    waited = []

    def options(index: int) -> CacheOptions:
        return CacheOptions(process_index=index, num_processes=2, barrier=lambda: waited.append(index))

    shares = [cache_latents(dataset, AUTOENCODER, options(index)).num_encoded for index in (0, 1)]
    assert sum(shares) == 3 and min(shares) == 1
    assert waited == [0, 0, 1, 1]
    assert cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, options(0)).num_encoded == 2
    assert cache_text(dataset, TEXT_ENCODER, TINY.text_encoder, options(1)).num_encoded == 2
    assert len(opened(dataset).items) == 3


# Trouble


def test_a_folder_that_cannot_be_made(folder):
    (folder / "flux2_cache").write_text("in the way")
    with pytest.raises(ValueError, match=r"flux2_cache/manifest-latents.* cannot be written .*set cache_directory"):
        fill(listing(folder))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder(folder, monkeypatch):
    dataset = listing(folder)
    cache = folder / "flux2_cache"
    if os.geteuid() == 0:  # nothing is forbidden to root: the system's answer is played

        def refuse(path, _target):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(Path, "replace", refuse)
    else:
        cache.mkdir()
        cache.chmod(0o555)
    with pytest.raises(ValueError, match=r"cannot be written .*; check its permissions, or set cache_directory"):
        fill(dataset)
    monkeypatch.undo()
    cache.chmod(0o755)
    fill(dataset)
    cache.chmod(0o555)
    monkeypatch.setattr(encode, "write_cached", None)
    times = [path.stat().st_mtime_ns for path in sorted(cache.iterdir())]
    assert fill(dataset) == (0, 0)  # a whole cache is used as it is
    assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == times
    assert len(opened(dataset).items) == 3
    cache.chmod(0o755)


def test_a_full_disk_keeps_what_was_written(folder, monkeypatch):
    dataset = listing(folder)
    write = encode.write_cached
    room = Semaphore(2)

    def write_until_full(folder, file, tensor):
        if not room.acquire(blocking=False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / file.name))
        write(folder, file, tensor)

    monkeypatch.setattr(encode, "write_cached", write_until_full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left.*make room there"):
        fill(dataset)
    monkeypatch.undo()
    assert fill(dataset) == (1, 4)


def test_pictures_that_cannot_be_read(folder):
    dataset = listing(folder)
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"some pictures cannot be encoded; the others are cached: ") as caught:
        fill(dataset)
    assert all(f"{name}.png cannot be read as a picture" in str(caught.value) for name in ("a", "b"))
    assert len(cached_files(folder, "latents")) == 1
    (folder / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b.png cannot be read \(No such file"):
        fill(dataset)
    with pytest.raises(ValueError, match=r"not cached|No such file"):
        opened(dataset)


def test_a_reference_that_changed_since_it_was_listed(folder):
    control = folder.parent / "control"
    for name in NAMES:
        draw(control / f"{name}.png", 10, (80, 64))
    dataset = listing(folder, control_directory=control)
    draw(control / "a.png", 10, (64, 96))
    with pytest.raises(ValueError, match=r"a.png changed while the dataset was cached"):
        fill(dataset)


class FakeAutoencoder:
    """Holds as many pixels as it has memory for."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.batches: list[int] = []
        self.config = TINY.autoencoder

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        if images.shape[0] * images.shape[-1] * images.shape[-2] > self.max_pixels:
            raise torch.OutOfMemoryError("out of memory")
        return images[:, :1, ::16, ::16].expand(-1, 128, -1, -1).float()

    def encode_tiled(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(0)
        if self.max_pixels == 0:
            raise torch.OutOfMemoryError("out of memory")
        return torch.zeros(len(images), 128, images.shape[-2] // 16, images.shape[-1] // 16)


@pytest.mark.parametrize(
    ("num_fitting", "batches"),
    [(100, [8, 1]), (5, [8, 4, 4, 1]), (2, [8, 4, 2, 2, 2, 2, 1]), (0.5, [8, 4, 2, 1] + [0] * 9)],
)
def test_batches_are_halved_until_they_fit(folder, monkeypatch, num_fitting, batches):
    for seed in range(3, 9):
        draw(folder / f"p{seed}.png", seed)
        (folder / f"p{seed}.txt").write_text("x")
    dataset = listing(folder)
    width, height = dataset.items[0].bucket
    fake = FakeAutoencoder(int(num_fitting * width * height))
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    assert cache_latents(dataset, AUTOENCODER, CacheOptions(batch_size=8)).num_encoded == 9
    assert fake.batches == batches


def test_pictures_of_one_size_go_together(folder, monkeypatch):
    for seed in range(3, 7):
        draw(folder / f"p{seed}.png", seed, (90, 70) if seed % 2 else (70, 90))
        (folder / f"p{seed}.txt").write_text("x")
    fake = FakeAutoencoder(10**9)
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    dataset = listing(folder, resolution=(96, 96))
    assert cache_latents(dataset, AUTOENCODER, CacheOptions(batch_size=8)).num_encoded == 7
    assert sorted(fake.batches) == [2, 5]
    for cached in open_latents(dataset):
        picture = image_to_tensor(fit_target(load_image(cached.item.image), cached.item.bucket))
        assert torch.equal(load_file(cached.folder / cached.files.latents.name)["latents"], fake.encode(picture)[0])


def test_writing_does_not_hold_up_the_encoder(folder, monkeypatch):
    went_on, waited = Event(), []
    fake = FakeAutoencoder(10**9)
    real_encode, real_write = fake.encode, encode.write_cached

    def encode_and_tell(images):
        if fake.batches:
            went_on.set()
        return real_encode(images)

    def write_when_it_went_on(*arguments):
        waited.append(went_on.wait(10))
        real_write(*arguments)

    fake.encode = encode_and_tell
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    monkeypatch.setattr(encode, "write_cached", write_when_it_went_on)
    cache_latents(listing(folder), AUTOENCODER)
    assert waited == [True] * 3


def open_latents(dataset: Dataset) -> tuple[CachedItem, ...]:
    cache_text(dataset, TEXT_ENCODER, TINY.text_encoder)
    return opened(dataset).items


def test_memory_for_nothing_at_all(folder, monkeypatch):
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: FakeAutoencoder(0))
    with pytest.raises(ValueError, match=r"px does not fit into memory, in tiles neither; take --vae_dtype bf16"):
        fill(listing(folder))


def test_latents_that_are_not_finite(folder, monkeypatch):
    fake = FakeAutoencoder(10**9)
    fake.encode = lambda images: torch.full((1, 128, *[side // 16 for side in images.shape[-2:]]), torch.nan)
    monkeypatch.setattr(cache_encoders, "load_autoencoder", lambda *_, **__: fake)
    with pytest.raises(ValueError, match=r"not finite for .*png; let it compute in bf16 or fp32"):
        fill(listing(folder))
    assert not cached_files(folder, "latents")


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"num_workers": -1}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="must be"):
        CacheOptions(**setting)


def test_foreign_files_are_not_opened(filled):
    dataset = listing(filled)
    path = filled / "flux2_cache" / f"latents-{'1' * 32}.safetensors"
    save_file({"latents": torch.zeros(128, 4, 4)}, path)
    assert len(opened(dataset).items) == 3 and path.exists()
