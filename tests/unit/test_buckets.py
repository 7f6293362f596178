"""Sizes that pictures are trained at, and how they are brought there."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from flux2_kit.flux2_core.images import fit_reference
from flux2_kit.training.buckets import (
    choose_bucket,
    control_size,
    crop_box,
    cropped_fraction,
    fit_control,
    fit_mask,
    fit_target,
    list_buckets,
)
from flux2_kit.training.dataset_config import SubsetConfig
from PIL import Image

SIDES = range(64, 2200, 61)


def subset(**settings) -> SubsetConfig:
    return SubsetConfig(
        image_directory=Path("pictures"), **{"enable_bucket": True, "resolution": (1024, 1024)} | settings
    )


def test_buckets_of_a_megapixel_span_aspects_up_to_four_on_a_step_of_sixteen():
    sizes = list_buckets(1024 * 1024)
    assert (sizes[0], sizes[-1], len(sizes)) == ((512, 2048), (2048, 512), 65)
    assert (1024, 1024) in sizes
    assert all(width % 16 == 0 and height % 16 == 0 and width * height <= 1024**2 for width, height in sizes)
    assert min(width * height for width, height in sizes) > 0.96 * 1024**2


@pytest.mark.parametrize("area", [960 * 544, 728 * 728, 100 * 100, 64 * 64])
def test_every_area_has_a_square_bucket_and_none_too_thin(area):
    sizes = list_buckets(area)
    assert any(width == height for width, height in sizes)
    assert min(min(size) for size in sizes) >= 64


def test_a_quarter_turn_of_a_picture_goes_to_the_mirrored_bucket():
    settings = subset(resolution=(960, 544))
    for width, height in itertools.product(SIDES, SIDES):
        assert choose_bucket(width, height, settings) == choose_bucket(height, width, settings)[::-1]


def test_the_bucket_is_the_nearest_by_ratio():
    # 5:3 lies between 1328x784 (1.694) and 1296x800 (1.62).
    assert choose_bucket(1000, 600, subset()) == (1328, 784)
    for width, height in itertools.product(SIDES, SIDES):
        chosen = choose_bucket(width, height, subset())
        distance = abs(math.log(chosen[0] / chosen[1] * height / width))
        nearest = min(abs(math.log(w / h * height / width)) for w, h in list_buckets(1024**2))
        assert distance == pytest.approx(nearest)


def test_without_buckets_there_is_one_size_floored_to_sixteen():
    settings = subset(enable_bucket=False, resolution=(970, 550))
    assert {choose_bucket(w, h, settings) for w, h in [(100, 900), (2000, 80)]} == {(960, 544)}


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((801, 607), (800, 592)),
        ((1500, 200), (1488, 192)),
        ((2048, 2048), (1024, 1024)),
        ((6000, 400), (2048, 400)),
        ((400, 6000), (400, 2048)),
    ],
)
def test_without_upscaling_small_pictures_keep_their_size(size, bucket):
    assert choose_bucket(*size, subset(bucket_no_upscale=True)) == bucket


def test_without_upscaling_nothing_ever_grows_and_nothing_exceeds_the_area():
    settings = subset(bucket_no_upscale=True, resolution=(512, 512))
    for width, height in itertools.product(SIDES, SIDES):
        bucket = choose_bucket(width, height, settings)
        assert bucket[0] <= width and bucket[1] <= height and bucket[0] * bucket[1] <= 512**2
        assert bucket[0] % 16 == bucket[1] % 16 == 0


def test_cropping_takes_the_centre_of_what_covers_the_bucket():
    assert crop_box((200, 100), (64, 64)) == (50, 0, 150, 100)
    assert cropped_fraction((200, 100), (64, 64)) == pytest.approx(0.5)
    assert cropped_fraction((100, 100), (640, 640)) == 0
    # Left half red, right half blue, with green ends that are cropped off.
    image = Image.new("RGB", (400, 100), (0, 255, 0))
    image.paste((255, 0, 0), (150, 0, 200, 100))
    image.paste((0, 0, 255), (200, 0, 250, 100))
    pixels = np.asarray(fit_target(image, (64, 64)))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, 4:28] == (255, 0, 0)).all() and (pixels[:, 36:60] == (0, 0, 255)).all()


def test_a_crop_without_scaling_keeps_every_level():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 103, 3), dtype=np.uint8))
    assert (np.asarray(fit_target(noise, (96, 96))) == np.asarray(noise)[:, 3:99]).all()
    assert fit_target(noise, noise.size).tobytes() == noise.tobytes()


@pytest.mark.parametrize("factor", [2, 3, 7, 16])
def test_scaling_down_counts_every_pixel_by_its_area(factor):
    """A checkerboard of single pixels is grey from afar; a filter of fixed width would alias."""
    side = 64 * factor
    board = (np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = np.asarray(fit_target(Image.fromarray(board), (64, 64)), dtype=float)
    assert abs(pixels - 127.5).max() < 4
    noise = np.random.default_rng(1).integers(0, 256, (side, side), dtype=np.uint8)
    means = noise.reshape(64, factor, 64, factor).mean((1, 3))
    fitted = np.asarray(fit_target(Image.fromarray(noise), (64, 64)), dtype=float)[..., 0]
    assert 0.7 < fitted.std() / means.std() < 1.1
    assert fitted.mean() == pytest.approx(noise.mean(), abs=0.5)


def test_target_applies_orientation_and_composites_transparency_on_white():
    image = Image.new("RGBA", (128, 64), (255, 0, 0, 0))
    image.getexif()[0x0112] = 6
    fitted = fit_target(image, (64, 128))
    assert fitted.mode == "RGB" and np.asarray(fitted).min() == 255
    assert cropped_fraction((64, 128), (64, 128)) == 0


def test_masks_follow_the_geometry_of_the_picture():
    mask = Image.new("L", (400, 100))
    mask.paste(255, (200, 0, 400, 100))
    fitted = np.asarray(fit_mask(mask, (64, 64)))
    assert fitted.dtype == np.uint8 and fitted.shape == (64, 64)
    assert (fitted[:, :28] == 0).all() and (fitted[:, 36:] == 255).all()
    for mode in ("L", "LA", "RGBA"):
        turned = mask.convert(mode)
        turned.getexif()[0x0112] = 6
        assert (np.asarray(fit_mask(turned, (64, 64)))[:28] == 0).all()


def test_transparent_parts_of_a_mask_are_not_trained():
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 64, 32))
    fitted = np.asarray(fit_mask(mask, (64, 64)))
    assert (fitted[:32] == 255).all() and (fitted[32:] == 0).all()


@pytest.mark.parametrize("num_references", [1, 2])
def test_references_are_fitted_as_when_generating(num_references):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (210, 330, 3), dtype=np.uint8))
    fitted = fit_control(image, subset(), bucket=(64, 64), num_references=num_references, reference_sides=(200, 100))
    expected = fit_reference(image, (200 if num_references == 1 else 100) ** 2)
    assert fitted.size == expected.size and fitted.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"control_fit": "target"}, (128, 96)),
        ({"control_fit": "original"}, (640, 304)),
        ({"control_fit": "original", "control_resolution": (256, 256)}, (368, 176)),
        ({"control_fit": "original", "control_resolution": (2048, 2048)}, (640, 304)),
        ({"control_fit": "area", "control_resolution": (1024, 1024)}, (1472, 704)),
        ({"control_fit": "area", "resolution": (256, 256)}, (368, 176)),
    ],
)
def test_references_are_fitted_as_the_settings_ask(settings, size):
    image = Image.new("RGB", (650, 310))
    fitted = fit_control(image, subset(**settings), bucket=(128, 96), num_references=1, reference_sides=(2024, 1024))
    assert fitted.size == size


@pytest.mark.parametrize("settings", [{}, *({"control_fit": fit} for fit in ("target", "original", "area"))])
def test_the_size_of_a_reference_is_told_without_the_picture(settings):
    where = {"bucket": (128, 96), "num_references": 2, "reference_sides": (300, 200)}
    for size in [(64, 64), (130, 71), (500, 64), (301, 299)]:
        fitted = fit_control(Image.new("RGB", size), subset(**settings), **where)
        assert fitted.size == control_size(size, subset(**settings), **where)


def test_references_that_are_too_small_or_too_long_are_refused():
    where = {"bucket": (128, 96), "num_references": 1, "reference_sides": (2024, 1024)}
    for fit in ("inference", "original", "area"):
        with pytest.raises(ValueError, match="at least 64"):
            fit_control(Image.new("RGB", (60, 100)), subset(control_fit=fit), **where)
        with pytest.raises(ValueError, match="Crop it"):
            control_size((1000, 100), subset(control_fit=fit), **where)
