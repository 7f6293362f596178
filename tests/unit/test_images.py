"""Pictures in and out: levels, orientation, modes, reference sizes."""

from __future__ import annotations

import struct

import numpy as np
import PIL
import pytest
import torch
from flux2_kit.flux2_core import images as images_module
from flux2_kit.flux2_core.images import (
    MAX_FILE_PIXELS,
    check_picture_side,
    fit_picture,
    fit_reference,
    image_to_tensor,
    initial_size,
    load_image,
    read_picture_size,
    reference_size,
    tensor_to_images,
    to_rgb,
)
from PIL import ExifTags, Image, ImageOps

EXIF_ORIENTATION = 0x0112
needs_avif = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow reads no AVIF")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def noise_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_all_256_levels_survive_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1))
    tensor = image_to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(pixels(tensor_to_images(tensor)[0]), pixels(image))


def test_levels_are_rounded_and_clamped():
    values = torch.tensor([-3.0, 0.6 / 127.5 - 1, 1.4 / 127.5 - 1, 5.0])
    (image,) = tensor_to_images(values.view(1, 1, 2, 2).expand(1, 3, 2, 2))
    assert pixels(image)[..., 0].flatten().tolist() == [0, 1, 1, 255]


def test_rows_of_a_batch_are_pictures():
    images = [noise_picture(20, 12), noise_picture(20, 12).rotate(180)]
    back = tensor_to_images(torch.cat([image_to_tensor(image) for image in images]))
    assert all(np.array_equal(pixels(ours), pixels(image)) for ours, image in zip(back, images, strict=True))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.transpose(1, 0, 2)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: stored[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda stored: np.rot90(stored, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, upright):
    stored = noise_picture(7, 5)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored.save(tmp_path / "picture.png", exif=exif)
    read = load_image(tmp_path / "picture.png")
    assert np.array_equal(pixels(read), upright(pixels(stored)))
    assert np.array_equal(pixels(to_rgb(read)), pixels(read)), "it is turned twice"


@pytest.mark.parametrize("orientation", [0, 9, 2**15])
def test_an_orientation_that_is_none_is_not_applied(tmp_path, orientation):
    stored = noise_picture(64, 80)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored.save(tmp_path / "picture.png", exif=exif)
    assert np.array_equal(pixels(load_image(tmp_path / "picture.png")), pixels(stored))
    assert read_picture_size(tmp_path / "picture.png") == (64, 80)


@pytest.mark.parametrize("number_tag", [ExifTags.Base.ImageWidth, ExifTags.Base.XResolution])
def test_exif_that_cannot_be_written_again_is_no_harm(tmp_path, number_tag):
    stored = noise_picture(64, 80)
    # Little endian; orientation 6, and a number that claims to be text.
    entries = struct.pack("<HHIHH", EXIF_ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHI4s", number_tag, 2, 3, b"ab\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    stored.save(tmp_path / "picture.png", exif=exif)
    with Image.open(tmp_path / "picture.png") as image, pytest.raises((struct.error, TypeError)):
        ImageOps.exif_transpose(image)
    assert load_image(tmp_path / "picture.png").size == read_picture_size(tmp_path / "picture.png") == (80, 64)


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 1), (0, 100, 200, 0))
    image.putpixel((1, 0), (0, 100, 200, 128))
    assert pixels(to_rgb(image)).tolist() == [[[255, 255, 255], [127, 177, 227]]]


def test_grey_with_alpha_is_composited_on_white():
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    assert pixels(to_rgb(image)).tolist() == [[[40, 40, 40], [255, 255, 255]]]


def test_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=1)
    assert pixels(load_image(tmp_path / "palette.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_transparent_colour_of_an_opaque_mode_becomes_white(tmp_path):
    image = Image.new("RGB", (2, 1), (9, 8, 7))
    image.putpixel((1, 0), (1, 2, 3))
    image.save(tmp_path / "colour.png", transparency=(1, 2, 3))
    assert pixels(load_image(tmp_path / "colour.png")).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_sixteen_bit_grey_keeps_its_whole_range(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    assert pixels(load_image(tmp_path / "grey.png"))[..., 0].tolist() == [[0, 1, 128, 255]]


def test_a_dark_sixteen_bit_picture_stays_dark():
    levels = np.array([[0, 200]], dtype=np.uint16)
    assert pixels(to_rgb(Image.fromarray(levels))).max() <= 1


def test_one_bit_pictures_are_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(to_rgb(image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_cmyk_is_converted():
    assert pixels(to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"],
)
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


@pytest.mark.parametrize("size", [(800, 1300), (1024, 1024), (64, 64), (512, 64)])
def test_a_small_reference_is_never_scaled(size):
    assert reference_size(*size, 1024**2) == size


@pytest.mark.parametrize(
    ("size", "max_pixels"), [((3000, 2000), 1024**2), ((5000, 700), 2024**2), ((1025, 1024), 1024**2)]
)
def test_a_large_reference_is_scaled_down_to_the_area_and_keeps_its_aspect(size, max_pixels):
    width, height = reference_size(*size, max_pixels)
    if size[0] * size[1] <= max_pixels:
        assert (width, height) == size
    assert max_pixels - (width + height + 1) <= width * height <= max_pixels or (width, height) == size
    assert width / height == pytest.approx(size[0] / size[1], rel=2 / min(width, height))


def test_without_a_limit_only_the_edges_are_cropped():
    assert fit_reference(noise_picture(1100, 150), None).size == (1088, 144)


def test_the_crop_takes_the_centre():
    image = noise_picture(91, 77)
    fitted = fit_reference(image, 1024**2)
    assert fitted.size == (80, 64)
    assert np.array_equal(pixels(fitted), pixels(image)[6 : 6 + 64, 5 : 5 + 80])


def test_a_reference_that_fits_is_untouched():
    image = noise_picture(96, 64)
    assert np.array_equal(pixels(fit_reference(image, 1024**2)), pixels(image))


def test_a_reference_is_scaled_with_lanczos():
    image = noise_picture(300, 200)
    expected = image.resize((122, 81), Image.Resampling.LANCZOS).crop((5, 0, 117, 80))
    assert np.array_equal(pixels(fit_reference(image, 100 * 100)), pixels(expected))


def test_a_turned_reference_is_measured_upright():
    image = noise_picture(96, 64)
    image.getexif()[EXIF_ORIENTATION] = 6
    assert fit_reference(image, None).size == (64, 96)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10, 3000), "10x3000 px; each side must be at least 64"),
        ((63, 64), "63x64 px; each side must be at least 64"),
        ((3000, 100), "3000x100 px, a ratio of 30.0; at most 8 is allowed"),
        ((521, 65), "at most 8 is allowed"),
    ],
)
def test_a_reference_too_small_or_too_long_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        fit_reference(Image.new("RGB", size), 1024**2)


@pytest.mark.parametrize("side", [64, 144, 768, 2048])
def test_sides_that_the_model_makes(side):
    check_picture_side("width", side)


@pytest.mark.parametrize(("side", "nearest"), [(100, 96), (48, 64), (0, 64), (-16, 64), (1023, 1024), (63, 64)])
def test_sides_that_the_model_does_not_make_name_the_nearest(side, nearest):
    with pytest.raises(ValueError, match=f"the height is {side} px; .* multiple of 16 .*nearest is {nearest}"):
        check_picture_side("height", side)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no picture at .*absent\.png; check the path"):
        load_image(tmp_path / "absent.png")


def test_a_file_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    noise_picture(40, 30).save(tmp_path / "large.png")
    monkeypatch.setattr(images_module, "MAX_FILE_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="claims 40x30 px; at most 1000 px are read"):
        load_image(tmp_path / "large.png")


def test_the_limit_of_pixels_is_below_that_of_pillow():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_FILE_PIXELS < 2 * Image.MAX_IMAGE_PIXELS


def test_a_file_that_is_no_picture_is_one_clear_error(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
        load_image(tmp_path / "text.png")


def test_a_file_that_another_program_would_have_to_read_is_refused(tmp_path):
    noise_picture(64, 48).save(tmp_path / "postscript.png", format="EPS")  # Pillow starts Ghostscript for these
    for read in (load_image, read_picture_size):
        with pytest.raises(ValueError, match=r"postscript\.png cannot be read as a picture"):
            read(tmp_path / "postscript.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tiff", pytest.param(".avif", marks=needs_avif)]
)
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_picture_is_refused_or_read_but_never_a_foreign_error(tmp_path, suffix, damage):
    path = tmp_path / f"picture{suffix}"
    if suffix not in Image.registered_extensions():
        pytest.skip(f"Pillow {PIL.__version__} does not have {suffix}")
    noise_picture(64, 48).save(path)
    content = bytearray(path.read_bytes())
    for offset in range(8, len(content) - 40, len(content) // 12):
        broken = (
            content[:offset] if damage == "cut" else content[:offset] + b"\xff\x00\x7f" * 9 + content[offset + 27 :]
        )
        path.write_bytes(broken)
        try:
            assert load_image(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error)


@needs_avif
def test_a_damaged_avif_is_refused(tmp_path):
    path = tmp_path / "broken.avif"
    noise_picture(64, 48).save(path)
    path.write_bytes(path.read_bytes().replace(b"iloc", b"free"))
    with pytest.raises(RuntimeError):
        Image.open(path)
    for read in (load_image, read_picture_size):
        with pytest.raises(ValueError, match=r"broken\.avif cannot be read as a picture"):
            read(path)


def test_a_cut_png_is_refused(tmp_path):
    path = tmp_path / "cut.png"
    noise_picture(64, 48).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as a picture"):
        load_image(path)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (96, 64)), ((2048, 1024), (1440, 720)), ((1024, 1024), (1024, 1024))]
)
def test_size_of_what_is_made_from_a_picture(size, expected):
    assert initial_size(*size, 1024**2) == (expected[0], expected[1] // 16 * 16)


def test_a_picture_to_start_from_covers_the_size():
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (0, 0, 10, 20))  # what does not fit is cut off at both sides
    fitted = pixels(fit_picture(picture, 64, 64))
    assert fitted.shape == (64, 64, 3) and (fitted[:, 12:] == (0, 0, 255)).all()
