"""Caches of a dataset: what is in them, what is encoded again and what is not, and what a wrong one is told as."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import (
    AUTOENCODER,
    NAMES,
    TEXT_ENCODER,
    TINY,
    cached_files,
    draw,
    fill,
    listing,
    opened,
)
from flux2_kit.flux2_core.checkpoint import load_autoencoder
from flux2_kit.flux2_core.images import image_to_tensor, load_image
from flux2_kit.flux2_core.pipeline import encode_prompt, encode_references
from flux2_kit.flux2_core.placement import place_text_encoder
from flux2_kit.flux2_core.text_encoder import TextEncoder, load_text_encoder
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.training import cache_encoders, encode
from flux2_kit.training.buckets import fit_target
from flux2_kit.training.cache import open_cache
from flux2_kit.training.cache_plan import plan_pictures, sources, write_cached
from flux2_kit.training.dataset import Dataset
from flux2_kit.training.encode import CacheOptions, cache_latents, cache_text
from flux2_kit.training.fingerprint import identify_autoencoder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


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
