"""Which pictures a dataset has, and what belongs to each: captions, references, masks, the part held out."""

from __future__ import annotations

import json
import logging
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pytest
from flux2_kit.flux2_core.images import load_image, read_picture_size
from flux2_kit.training.dataset import (
    Dataset,
    DatasetConfig,
    SubsetConfig,
    caption_orders,
    list_dataset,
    load_dataset_config,
    validation_order,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TURNED = 6
"""EXIF orientation of a picture that is shown after a quarter turn."""


def save(path: Path, size: tuple[int, int] = (80, 64), mode: str = "RGB", orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new(mode, size).save(path, **({} if path.suffix.lower() == ".bmp" else {"exif": exif}))
    return path


def caption(path: Path, text: str = "x") -> Path:
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def list_folder(folder: Path, **settings: Any) -> Dataset:
    """The pictures in `folder`/pictures, with paths in settings relative to `folder`."""
    path = folder / "dataset.json"
    path.write_text(json.dumps({"datasets": [{"image_directory": "pictures", "resolution": 64} | settings]}))
    return list_dataset(load_dataset_config(path))


def list_rows(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    table = folder / "table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    return list_dataset(load_dataset_config(table, side=64))


class TestFolders:
    def test_every_kind_of_picture_is_listed_by_name(self, tmp_path):
        folder = tmp_path / "pictures"
        for name in ["e.PNG", "b.jpg", "c.JPEG", "d.webp", "a.bmp", "f.avif"]:
            if name.endswith("avif") and ".avif" not in Image.registered_extensions():
                continue
            caption(save(folder / name))
        (folder / ".hidden.png").touch()
        (folder / "notes.md").touch()
        (folder / "inner.png").mkdir()
        names = [item.name for item in list_folder(tmp_path).items]
        assert names[:5] == ["a.bmp", "b.jpg", "c.JPEG", "d.webp", "e.PNG"]
        assert {item.size for item in list_folder(tmp_path).items} == {(80, 64)}

    @pytest.mark.parametrize("name", ["set [v1]", "a * b?", "with space ", "größe 写真", "{x}"])
    def test_any_name_of_a_folder_is_a_name(self, tmp_path, name):
        caption(save(tmp_path / name / f"{name}.png"), name)
        (item,) = list_dataset(load_dataset_config(tmp_path / name)).items
        assert item.captions == (name.strip(),) and item.image == tmp_path / name / f"{name}.png"

    def test_composed_and_decomposed_accents_are_the_same_name(self, tmp_path):
        composed, decomposed = (unicodedata.normalize(form, "für") for form in ("NFC", "NFD"))
        assert composed != decomposed
        save(tmp_path / "pictures" / f"{composed}.png")
        (tmp_path / "pictures" / f"{decomposed}.txt").write_text("found")
        save(tmp_path / "control" / f"{decomposed}_0.png")
        (item,) = list_folder(tmp_path, control_directory="control").items
        assert item.captions == ("found",) and len(item.references) == 1

    def test_the_same_name_in_two_folders_is_two_pictures(self, tmp_path):
        for name, size in [("one", (80, 64)), ("two", (64, 96))]:
            caption(save(tmp_path / name / "a.png", size), name)
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({"datasets": [{"image_directory": "one"}, {"image_directory": "two"}]}))
        items = list_dataset(load_dataset_config(path)).items
        assert [(item.subset, item.name, item.captions, item.size) for item in items] == [
            (0, "a.png", ("one",), (80, 64)),
            (1, "a.png", ("two",), (64, 96)),
        ]

    def test_a_folder_without_pictures_is_refused_naming_the_folders_in_it(self, tmp_path):
        save(tmp_path / "pictures" / "inner" / "a.png")
        with pytest.raises(ValueError, match=r"no pictures in .*Folders inside are not searched.*inner"):
            list_folder(tmp_path)
        (tmp_path / "pictures" / "metadata.csv").touch()
        with pytest.raises(ValueError, match=r"no pictures in .*, or give .*pictures.metadata\.csv as the dataset"):
            list_folder(tmp_path)

    def test_a_folder_of_pictures_of_other_kinds_only_is_refused_naming_them(self, tmp_path):
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "a.heic").touch()
        with pytest.raises(ValueError, match=r"no pictures in .*save them as PNG: a\.heic"):
            list_folder(tmp_path)

    def test_folders_inside_are_told_unless_they_belong_to_it(self, tmp_path, caplog):
        caption(save(tmp_path / "pictures" / "a.png"))
        for name in ("flux2_cache", "before", "masks", ".hidden"):
            save(tmp_path / "pictures" / name / "a.png")
        list_folder(tmp_path, control_directory="pictures/before", mask_directory="pictures/masks")
        assert not caplog.records
        save(tmp_path / "pictures" / "more" / "b.png")
        list_folder(tmp_path)
        assert "folders inside are not searched: before, masks, more" in caplog.text

    def test_links_that_lead_nowhere_are_told(self, tmp_path):
        save(tmp_path / "elsewhere" / "a.png")
        caption(save(tmp_path / "pictures" / "b.png"))
        (tmp_path / "pictures" / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
        (tmp_path / "pictures" / "folder.png").symlink_to(tmp_path / "elsewhere")
        assert [item.name for item in list_folder(tmp_path).items] == ["a.png", "b.png"]
        (tmp_path / "elsewhere" / "a.png").unlink()
        (tmp_path / "pictures" / "loop.png").symlink_to("loop.png")
        with pytest.raises(ValueError, match=r"a\.png: no picture at .*; loop\.png: no picture at"):
            list_folder(tmp_path)

    def test_pictures_of_other_kinds_are_told(self, tmp_path, caplog):
        caption(save(tmp_path / "pictures" / "a.png"))
        (tmp_path / "pictures" / "b.heic").touch()
        list_folder(tmp_path)
        assert "b.heic" in caplog.text


class TestSizes:
    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_is_applied_as_when_the_picture_is_read(self, tmp_path, name, orientation):
        path = save(tmp_path / "pictures" / name, (96, 64), orientation=orientation)
        assert read_picture_size(path) == load_image(path).size == ((96, 64) if orientation < 5 else (64, 96))

    def test_png_orientation_behind_the_pixels_or_in_xmp_is_found(self, tmp_path):
        path = save(tmp_path / "late.png", (96, 64), orientation=TURNED)
        content = path.read_bytes()
        start = content.index(b"eXIf") - 4
        length = 12 + int.from_bytes(content[start : start + 4], "big")
        chunk, rest = content[start : start + length], content[:start] + content[start + length :]
        path.write_bytes(rest[:-12] + chunk + rest[-12:])
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{TURNED}"/>')
        Image.new("RGB", (96, 64)).save(tmp_path / "xmp.png", pnginfo=info)
        for file in (path, tmp_path / "xmp.png"):
            assert read_picture_size(file) == load_image(file).size == (64, 96)

    def test_headers_suffice(self, tmp_path, monkeypatch):
        from PIL import ImageFile

        caption(save(tmp_path / "pictures" / "a.png"))
        caption(save(tmp_path / "pictures" / "b.jpg", orientation=TURNED))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
        assert [item.size for item in list_folder(tmp_path).items] == [(80, 64), (64, 80)]

    def test_a_turned_picture_goes_to_the_turned_bucket(self, tmp_path):
        for name, orientation in [("a", 1), ("b", TURNED)]:
            caption(save(tmp_path / "pictures" / f"{name}.jpg", (960, 640), orientation=orientation))
        first, second = list_folder(tmp_path, resolution=512, enable_bucket=True).items
        assert first.bucket == second.bucket[::-1] and first.bucket[0] > first.bucket[1]

    def test_transparent_pictures_are_listed(self, tmp_path):
        caption(save(tmp_path / "pictures" / "a.png", mode="RGBA"))
        assert len(list_folder(tmp_path).items) == 1

    def test_all_bad_pictures_are_told_together(self, tmp_path):
        folder = tmp_path / "pictures"
        save(folder / "fine.png")
        save(folder / "small.png", (63, 640))
        save(folder / "long.png", (1000, 100))
        (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
        (folder / "empty.png").touch()
        (folder / "text.webp").write_text("x")
        with pytest.raises(ValueError) as caught:
            list_folder(tmp_path)
        text = str(caught.value)
        assert "small.png: is 63x640 px; each side must be at least 64" in text
        assert "long.png: is 1000x100 px, a ratio of 10.0; at most 8 is allowed" in text
        assert all(f"{name}: it cannot be read" in text for name in ("broken.jpg", "empty.png", "text.webp"))
        assert "fine.png" not in text

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(("side", "message"), [(12_500, "px are read. Scale"), (60_000, "exceeds limit")])
    def test_pictures_that_claim_too_much_are_refused_before_they_are_decoded(self, tmp_path, side, message):
        path = save(tmp_path / "pictures" / "bomb.png")
        content = bytearray(path.read_bytes())
        content[16:24] = side.to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bomb.png: .*{message}"):
            list_folder(tmp_path)

    def test_many_problems_are_counted(self, tmp_path):
        for index in range(25):
            save(tmp_path / "pictures" / f"{index:02}.png", (32, 32))
        with pytest.raises(ValueError, match=r"09.png: .*; and 15 more$"):
            list_folder(tmp_path)


class TestCaptions:
    def test_byte_order_mark_and_blanks_around_are_dropped(self, tmp_path):
        caption(save(tmp_path / "pictures" / "a.png"), "\ufeff two words\nand a line \n")
        assert list_folder(tmp_path).items[0].captions == ("two words\nand a line",)

    @pytest.mark.parametrize("extension", [".caption", "_c.txt", "caption", ".CAPTION"])
    def test_the_extension_is_the_end_of_the_name(self, tmp_path, extension):
        path = save(tmp_path / "pictures" / "a.b.png")
        end = f".{extension}" if extension.isalnum() else extension
        path.with_name(f"a.b{end}").write_text("right")
        caption(path, "wrong")
        assert list_folder(tmp_path, caption_extension=extension).items[0].captions == ("right",)

    def test_missing_captions_are_told_together_and_trained_empty(self, tmp_path, caplog):
        for name in "abc":
            save(tmp_path / "pictures" / f"{name}.png")
        caption(tmp_path / "pictures" / "a.png")
        caption(tmp_path / "pictures" / "b.png", " \n")
        items = list_folder(tmp_path).items
        assert [(item.captions, item.caption_is_missing) for item in items] == [
            (("x",), False),
            (("",), True),
            (("",), True),
        ]
        assert "without caption (2 of 3) are trained with the empty caption: b.png, c.png" in caplog.text
        assert list_folder(tmp_path, trigger_word="sks").items[2].captions == ("sks",)
        assert "the trigger word 'sks'" in caplog.text

    def test_another_ending_of_all_captions_is_an_error_that_names_it(self, tmp_path):
        save(tmp_path / "pictures" / "a.png").with_suffix(".caption").write_text("x")
        with pytest.raises(ValueError, match=r'set caption_extension = "\.caption"'):
            list_folder(tmp_path)
        assert list_folder(tmp_path, caption_extension=".caption").items[0].captions == ("x",)

    def test_a_table_in_a_folder_without_captions_is_an_error_that_names_it(self, tmp_path):
        save(tmp_path / "pictures" / "a.png")
        (tmp_path / "pictures" / "metadata.csv").write_text("image,prompt\na.png,x\n")
        with pytest.raises(ValueError, match=r"no picture has a caption, but there is metadata\.csv"):
            list_folder(tmp_path)
        caption(tmp_path / "pictures" / "a.png")
        assert list_folder(tmp_path).items[0].captions == ("x",)

    def test_lines_end_alike_whatever_system_wrote_them(self, tmp_path):
        save(tmp_path / "pictures" / "a.png").with_suffix(".txt").write_bytes(b"one\r\ntwo\rthree\n\nfour\r\n")
        assert list_folder(tmp_path).items[0].captions == ("one\ntwo\nthree\n\nfour",)

    def test_captions_that_are_no_text_are_refused(self, tmp_path):
        save(tmp_path / "pictures" / "a.png").with_suffix(".txt").write_bytes("ä".encode("utf-16"))
        save(tmp_path / "pictures" / "b.png").with_suffix(".txt").write_bytes(b"x" * (2**20 + 1))
        with pytest.raises(ValueError, match=r"a.png: its caption a.txt is no UTF-8 text.*; b.png: .*1048577 bytes"):
            list_folder(tmp_path)

    @pytest.mark.parametrize(
        ("text", "result"),
        [
            ("a cat", "sks, a cat"),
            ("a sks cat", "a sks cat"),
            ("a sksy cat", "sks, a sksy cat"),
            ("it asks", "sks, it asks"),
            ("", "sks"),
            ("a photo of [trigger], red; [trigger]", "a photo of sks, red; sks"),
            ("[trigger]", "sks"),
        ],
    )
    def test_the_trigger_word_comes_first_where_it_is_not_there_already(self, text, result):
        subset = SubsetConfig(image_directory=Path("x"), trigger_word="sks")
        assert caption_orders(text, subset) == (result,)

    def test_a_placeholder_without_trigger_word_is_told(self, tmp_path, caplog):
        caption(save(tmp_path / "pictures" / "a.png"), "a [trigger]")
        assert list_folder(tmp_path).items[0].captions == ("a [trigger]",)
        assert "[trigger] in captions stays" in caplog.text

    def test_empty_parts_are_no_parts(self):
        subset = SubsetConfig(image_directory=Path("x"), shuffle_caption=True, num_caption_orders=64)
        assert caption_orders("a, , b,", subset) == ("a, , b,", "b, a")

    def test_parts_are_shuffled_by_seed_and_caption(self):
        subset = SubsetConfig(
            image_directory=Path("x"), shuffle_caption=True, keep_parts=1, num_caption_orders=6, trigger_word="sks"
        )
        orders = caption_orders("first, b, c,d, e", subset, seed=1)
        assert orders[0] == "sks, first, b, c,d, e"
        assert len(set(orders)) == 6
        assert all(order.startswith("sks, first, ") for order in orders)
        assert {tuple(sorted(order.replace(" ", "").split(","))) for order in orders} == {
            ("b", "c", "d", "e", "first", "sks")
        }
        assert orders == caption_orders("first, b, c,d, e", subset, seed=1)
        assert orders != caption_orders("first, b, c,d, e", subset, seed=2)

    @pytest.mark.parametrize(("text", "count"), [("a", 1), ("a, b", 2), ("a, b, c", 6), ("a, a, a", 1), ("", 1)])
    def test_there_are_no_more_orders_than_parts_have(self, text, count):
        subset = SubsetConfig(image_directory=Path("x"), shuffle_caption=True, num_caption_orders=64)
        assert len(caption_orders(text, subset)) == count

    def test_no_order_is_missed(self):
        subset = SubsetConfig(image_directory=Path("x"), shuffle_caption=True, num_caption_orders=64)
        assert {len(caption_orders(f"a{index}, b, c", subset)) for index in range(200)} == {6}

    def test_shuffled_orders_are_the_same_on_every_machine(self):
        subset = SubsetConfig(
            image_directory=Path("x"), shuffle_caption=True, num_caption_orders=3, caption_separator="; "
        )
        assert caption_orders("a; b; c", subset) == ("a; b; c", "a; c; b", "b; c; a")


class TestReferences:
    def test_suffixes_count_from_nothing_then_by_number(self, tmp_path):
        caption(save(tmp_path / "pictures" / "a.png"))
        names = ["a_10.png", "a.jpg", "a_2.webp", "a_0.png"]
        for index, name in enumerate(names):
            save(tmp_path / "control" / name, (64 + index, 64))
        (item,) = list_folder(tmp_path, control_directory="control").items
        assert [path.name for path in item.references] == ["a.jpg", "a_0.png", "a_2.webp", "a_10.png"]
        assert item.reference_sizes == ((65, 64), (67, 64), (66, 64), (64, 64))

    def test_the_longest_stem_claims_first(self, tmp_path):
        for name in ["a", "a_1", "a_1_2"]:
            caption(save(tmp_path / "pictures" / f"{name}.png"))
        for name in ["a_0", "a_1", "a_1_1", "a_1_2"]:
            save(tmp_path / "control" / f"{name}.png")
        items = list_folder(tmp_path, control_directory="control").items
        assert {item.name: [path.stem for path in item.references] for item in items} == {
            "a.png": ["a_0"],
            "a_1.png": ["a_1", "a_1_1"],
            "a_1_2.png": ["a_1_2"],
        }

    def test_a_picture_without_reference_is_an_error_that_names_it(self, tmp_path):
        for name in "abc":
            caption(save(tmp_path / "pictures" / f"{name}.png"))
        save(tmp_path / "control" / "b_0.png")
        with pytest.raises(ValueError, match=r"no reference for a\.png, c\.png; .*such as a\.png or a_0\.png"):
            list_folder(tmp_path, control_directory="control")

    def test_references_of_no_picture_are_told(self, tmp_path, caplog):
        caption(save(tmp_path / "pictures" / "a.png"))
        for name in ["a", "b", "a_x", "a_0_1"]:
            save(tmp_path / "control" / f"{name}.png")
        (item,) = list_folder(tmp_path, control_directory="control").items
        assert len(item.references) == 1
        assert "left out (3): a_0_1.png, a_x.png, b.png" in caplog.text

    def test_two_files_for_one_reference_are_refused(self, tmp_path):
        caption(save(tmp_path / "pictures" / "a.png"))
        for name in ["a_0.png", "a_00.png", "a.jpg", "a.png"]:
            save(tmp_path / "control" / name)
        with pytest.raises(ValueError, match=r"a\.jpg and a\.png are both.*; a_0\.png and a_00\.png are both"):
            list_folder(tmp_path, control_directory="control")

    @pytest.mark.parametrize(
        ("size", "message"), [((60, 80), "reference a.png: .*at least 64"), ((999, 99), "reference a.png: .*Crop it")]
    )
    def test_references_of_a_wrong_shape_are_refused(self, tmp_path, size, message):
        caption(save(tmp_path / "pictures" / "a.png"))
        save(tmp_path / "control" / "a.png", size)
        with pytest.raises(ValueError, match=message):
            list_folder(tmp_path, control_directory="control")

    def test_more_references_than_the_model_takes_are_refused(self, tmp_path):
        caption(save(tmp_path / "pictures" / "a.png"))
        for index in range(11):
            save(tmp_path / "control" / f"a_{index}.png")
        with pytest.raises(ValueError, match=r"a\.png: 11 references were given; at most 10"):
            list_folder(tmp_path, control_directory="control")

    @pytest.mark.parametrize("key", ["control_directory", "mask_directory"])
    def test_the_folder_of_the_pictures_is_no_folder_of_references(self, tmp_path, key):
        caption(save(tmp_path / "pictures" / "a.png"))
        with pytest.raises(ValueError, match=f"{key} is the folder of the pictures"):
            list_folder(tmp_path, **{key: "pictures"})


class TestMasks:
    def test_masks_go_by_stem(self, tmp_path, caplog):
        caption(save(tmp_path / "pictures" / "a.jpg", (800, 600)))
        save(tmp_path / "masks" / "a.png", (400, 300), mode="L")
        save(tmp_path / "masks" / "other.png")
        (item,) = list_folder(tmp_path, mask_directory="masks").items
        assert item.mask == tmp_path / "masks" / "a.png"
        assert "masks that belong to no picture are left out (1): other.png" in caplog.text

    def test_missing_and_misshapen_masks_are_refused(self, tmp_path):
        for name in "ab":
            caption(save(tmp_path / "pictures" / f"{name}.png"))
        save(tmp_path / "masks" / "a.png", (64, 80))
        with pytest.raises(ValueError, match=r"no mask for b\.png"):
            list_folder(tmp_path, mask_directory="masks")
        save(tmp_path / "masks" / "b.png", (160, 128))
        with pytest.raises(ValueError, match=r"a\.png: mask a\.png is 64x80 px, the picture 80x64"):
            list_folder(tmp_path, mask_directory="masks")


class TestTables:
    def test_musubi_rows(self, tmp_path):
        for name in ["one/a.png", "two/a.png", "c0.png", "c1.png", "c10.png", "m.png"]:
            save(tmp_path / name)
        table = tmp_path / "rows.jsonl"
        rows = [
            {"image_path": "one/a.png", "caption": "red\u2028line"},
            {"image_path": str(tmp_path / "two/a.png"), "caption": "blue", "control_path": "c0.png"},
            {
                "image_path": "one/a.png",
                "caption": "three",
                "control_path_10": "c10.png",
                "control_path_2": "c1.png",
                "control_path_0": "c0.png",
                "mask_path": "m.png",
            },
        ]
        table.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({"datasets": [{"image_jsonl_file": "rows.jsonl"}]}))
        dataset = list_dataset(load_dataset_config(path))
        assert [item.captions[0] for item in dataset.items] == ["red\u2028line", "blue", "three"]
        assert [item.name for item in dataset.items] == ["one/a.png", "two/a.png", "one/a.png"]
        assert [[path.name for path in item.references] for item in dataset.items] == [
            [],
            ["c0.png"],
            ["c0.png", "c1.png", "c10.png"],
        ]
        assert dataset.items[2].mask == tmp_path / "m.png"
        assert dataset.config.subsets[0].cache_folder == tmp_path / "flux2_cache"

    def test_csv_with_a_list_of_edit_images(self, tmp_path):
        for name in ["a.png", "x, y.png", "z.png", "it's.png", "[v1].png"]:
            save(tmp_path / name)
        table = tmp_path / "metadata.csv"
        table.write_text(
            "\ufeffimage, prompt ,edit_image,other\r\n"
            'a.png,"one, two\nlines","[""x, y.png"", ""z.png""]",1\r\n'
            'a.png,"he said ""hi""","[\'z.png\', ""it\'s.png""]",2\r\n'
            "a.png,three,z.png,3\r\n"
            "a.png,four,[v1].png,4\r\n"
            "a.png,five,,5\r\n",
            encoding="utf-8",
        )
        items = list_dataset(load_dataset_config(table)).items
        assert [item.captions[0] for item in items] == ["one, two\nlines", 'he said "hi"', "three", "four", "five"]
        assert [[path.name for path in item.references] for item in items] == [
            ["x, y.png", "z.png"],
            ["z.png", "it's.png"],
            ["z.png"],
            ["[v1].png"],
            [],
        ]

    def test_json_with_a_list_of_edit_images(self, tmp_path):
        for name in ["a.png", "b.png"]:
            save(tmp_path / name)
        table = tmp_path / "metadata.json"
        table.write_text(json.dumps([{"image": "a.png", "prompt": "x", "edit_image": ["b.png", "a.png"]}]))
        path = tmp_path / "dataset.toml"
        path.write_text('[[datasets]]\nmetadata_file = "metadata.json"\nresolution = 256\n')
        for source in (table, path):
            (item,) = list_dataset(load_dataset_config(source)).items
            assert [reference.name for reference in item.references] == ["b.png", "a.png"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metadata.csv", "file_name,text,id\r\ntrain/a.png,one,7\r\n"),
            ("metadata.jsonl", '{"file_name": "train/a.png", "text": "one", "id": 7}\n'),
        ],
    )
    def test_imagefolder_of_hugging_face(self, tmp_path, caplog, name, content):
        save(tmp_path / "train" / "a.png")
        (tmp_path / name).write_bytes(content.encode())
        (item,) = list_dataset(load_dataset_config(tmp_path / name)).items
        assert (item.name, item.captions, item.references) == ("train/a.png", ("one",), ())
        assert f"{name}: columns that are not used: id" in caplog.text

    def test_columns_that_are_used_are_not_told(self, tmp_path, caplog):
        save(tmp_path / "a.png")
        list_rows(tmp_path, [{"image_path": "a.png", "caption": "x", "control_path_0": "a.png", "mask_path": "a.png"}])
        assert not caplog.records

    def test_backslashes_separate_folders(self, tmp_path):
        save(tmp_path / "one" / "a.png")
        (item,) = list_rows(tmp_path, [{"image": "one\\a.png", "prompt": "x"}]).items
        assert item.image == tmp_path / "one" / "a.png"
        save(tmp_path / "odd\\name.png")
        (item,) = list_rows(tmp_path, [{"image": "odd\\name.png", "prompt": "x"}]).items
        assert item.image == tmp_path / "odd\\name.png"

    def test_tables_may_go_with_a_folder_of_references(self, tmp_path):
        save(tmp_path / "one" / "a.png")
        save(tmp_path / "control" / "a_0.png")
        (tmp_path / "rows.jsonl").write_text('{"image": "one/a.png", "prompt": "x"}')
        path = tmp_path / "dataset.toml"
        path.write_text('[[datasets]]\nimage_jsonl_file = "rows.jsonl"\ncontrol_directory = "control"\n')
        assert list_dataset(load_dataset_config(path)).items[0].references == (tmp_path / "control" / "a_0.png",)
        save(tmp_path / "two" / "a.png")
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('\n{"image": "two/a.png", "prompt": "x"}')
        with pytest.raises(ValueError, match="control_directory goes by the names of pictures"):
            list_dataset(load_dataset_config(path))

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"image": "missing.png", "prompt": "x"}, "line 2: the picture: nothing is at"),
            ({"Image": "a.png", "prompt": "x"}, "line 2: there is no picture.*the keys here are 'Image', 'prompt'"),
            ({"image": "a\0.png", "prompt": "x"}, "line 2: the picture is .* no path"),
            ({"image": 3, "prompt": "x"}, "line 2: there is no picture"),
            ({"image": "a.png"}, "line 2: there is no text for a.png"),
            ({"image": "a.png", "prompt": "x", "edit_image": [3]}, "line 2: references must be a path or a list"),
            ({"image": "a.png", "prompt": "x", "edit_image": "[a.png]"}, "line 2: .* is no list"),
            ({"image": "a.png", "prompt": "x", "edit_image": ["b.png"]}, "line 2: a reference: nothing is at"),
            ({"image": "a.png", "prompt": "x", "control_path": "a.png", "control_path_0": "a.png"}, "given twice"),
            ({"image": "a.png", "prompt": "half: \ud83d"}, "line 2, a.png: its caption holds half a character"),
            ({"video": "a.mp4", "prompt": "x"}, "line 2: video: this table is for video"),
            ({"image_path_0": "a.png", "caption": "x"}, "line 2: image_path_0: several targets"),
            ({"image": "http://example.org/a.png", "prompt": "x"}, "line 2: .*download it first"),
            ({"image": "a.png", "prompt": "x", "mask_path": 1}, "line 2: mask_path must be a path"),
            ([], "line 2: must be an object"),
        ],
    )
    def test_wrong_rows_are_told_with_their_line(self, tmp_path, row, message):
        save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=message):
            list_rows(tmp_path, [{"image": "a.png", "prompt": "x"}, row])

    def test_wrong_pictures_are_told_with_their_line(self, tmp_path):
        save(tmp_path / "a.png", (32, 32))
        (tmp_path / "b.png").touch()
        with pytest.raises(ValueError, match=r"line 1, a\.png: is 32x32 px.*; line 2, b\.png: it cannot be read"):
            list_rows(tmp_path, [{"image": "a.png", "prompt": "x"}, {"image": "b.png", "prompt": "x"}])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.jsonl", b'{"image": "a.png"\n', "line 1 is not valid JSON"),
            ("t.jsonl", b"\n \n", "names no pictures"),
            ("t.jsonl", b"\xff\xfe", "no UTF-8 text"),
            ("t.jsonl", b"[" * 100_000, "not valid JSON"),
            ("t.json", b"[1]", "entry 1: must be an object"),
            ("t.json", b"[", "not valid JSON"),
            ("t.csv", b"image,prompt\na.png,one, two\n", "line 2: the number of cells is not that of the header"),
            ("t.csv", b"image,prompt\na.png\n", "line 2: the number of cells is not that of the header"),
            ("t.csv", b'image,prompt\na.png,"open\n', "no valid CSV"),
            ("t.csv", b"image,prompt\na.png," + b"x" * 200_000, "no valid CSV"),
            ("t.csv", b"prompt\nx\n", "line 2: there is no picture"),
            ("t.csv", b"", "names no pictures"),
        ],
    )
    def test_damaged_tables_are_refused(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            list_dataset(load_dataset_config(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)

    @pytest.mark.parametrize("name", ["folder.jsonl", "table.parquet"])
    def test_what_is_no_table_is_refused(self, tmp_path, name):
        (tmp_path / "folder.jsonl").mkdir()
        (tmp_path / "table.parquet").touch()
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({"datasets": [{"metadata_file": name}]}))
        with pytest.raises(ValueError, match=f"{name} is no table"):
            list_dataset(load_dataset_config(path))
        with pytest.raises(ValueError, match="names no pictures"):
            list_dataset(DatasetConfig(subsets=()))

    def test_oversized_tables_are_refused_unread(self, tmp_path):
        with (tmp_path / "t.jsonl").open("wb") as file:
            file.truncate(2**30)
        with pytest.raises(ValueError, match="more than the 268435456"):
            list_dataset(load_dataset_config(tmp_path / "t.jsonl"))


class TestValidation:
    def held_out(self, folder: Path, fraction: float) -> set[str]:
        items = list_folder(folder, validation_fraction=fraction).items
        return {item.name for item in items if item.is_validation}

    def test_few_change_sides_when_pictures_are_added(self, tmp_path, caplog):
        caplog.set_level(logging.ERROR)
        for index in range(40):
            save(tmp_path / "pictures" / f"{index}.png", (80 + index, 64))
        before = self.held_out(tmp_path, 0.25)
        assert len(before) == 10
        assert before == self.held_out(tmp_path, 0.25)
        for index in range(40, 44):
            save(tmp_path / "pictures" / f"{index}.png", (80 + index, 64))
        after = self.held_out(tmp_path, 0.25)
        assert len(after) == 11 and len(before & after) >= 7
        assert self.held_out(tmp_path, 0.1) < after

    def test_the_share_is_what_was_asked_for_in_small_folders_too(self, tmp_path, caplog):
        caplog.set_level(logging.ERROR)
        for index in range(10):
            save(tmp_path / "pictures" / f"{index}.png", (80 + index, 64))
        for fraction, count in ((0.1, 1), (0.2, 2), (0.5, 5), (0.9, 9)):
            assert len(self.held_out(tmp_path, fraction)) == count

    def test_at_least_one_is_held_out_and_one_is_trained(self, tmp_path):
        for index in range(2):
            caption(save(tmp_path / "pictures" / f"{index}.png", (80 + index, 64)))
        for fraction in (0.001, 0.5, 0.9):
            assert len(self.held_out(tmp_path, fraction)) == 1
        assert not self.held_out(tmp_path, 0)
        (tmp_path / "pictures" / "0.png").unlink()
        with pytest.raises(ValueError, match="has one picture to tell apart"):
            self.held_out(tmp_path, 0.5)

    @pytest.mark.parametrize("side", ["first", "second"])
    def test_what_is_held_out_is_trained_nowhere(self, tmp_path, side):
        """The same content under another name, and the same folder in another subset."""
        for index in range(12):
            caption(save(tmp_path / "pictures" / f"{index}.png", (80 + index, 64)))
        alone = list_dataset(load_dataset_config(self.settings(tmp_path, [0.3]))).items
        held_out = {item.name for item in alone if item.is_validation}
        assert len(held_out) == 4
        for name in held_out:
            caption(tmp_path / "pictures" / f"copy of {name}").with_suffix(".png").write_bytes(
                (tmp_path / "pictures" / name).read_bytes()
            )
        items = list_dataset(
            load_dataset_config(self.settings(tmp_path, [0.3, 0] if side == "first" else [0, 0.3]))
        ).items
        assert len(items) == 32
        trained = {item.image.read_bytes() for item in items if not item.is_validation}
        tested = {item.image.read_bytes() for item in items if item.is_validation}
        assert (len(trained), len(tested)) == (8, 4) and not trained & tested

    def test_files_of_the_same_length_are_compared_by_content(self, tmp_path):
        for index in range(8):
            Image.new("RGB", (80, 64), (index, 0, 0)).save(tmp_path / f"{index}.bmp")
        assert len({path.stat().st_size for path in tmp_path.iterdir()}) == 1
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({"datasets": [{"image_directory": ".", "validation_fraction": 0.25}]}))
        assert sum(item.is_validation for item in list_dataset(load_dataset_config(path)).items) == 2

    def test_subsets_that_hold_out_each_others_pictures_are_refused(self, tmp_path):
        sizes = {"a": (80, 64), "b": (64, 80)}
        first, second = sorted(sizes, key=validation_order)
        for folder, names in [("one", (first, second)), ("two", (second, first))]:
            for name, content in zip("ab", names, strict=True):
                caption(save(tmp_path / folder / f"{name}.png", sizes[content]))
        path = tmp_path / "dataset.json"
        entries = [{"image_directory": folder, "validation_fraction": 0.5} for folder in ("one", "two")]
        path.write_text(json.dumps({"datasets": entries}))
        with pytest.raises(ValueError, match="every picture is held out"):
            list_dataset(load_dataset_config(path))

    def settings(self, folder: Path, fractions: list[float]) -> Path:
        path = folder / "dataset.json"
        entries = [{"image_directory": "pictures", "validation_fraction": fraction} for fraction in fractions]
        path.write_text(json.dumps({"datasets": entries}))
        return path

    def test_rows_of_one_picture_stay_together(self, tmp_path):
        for index, name in enumerate("abcdefgh"):
            save(tmp_path / f"{name}.png", (80 + index, 64))
        table = tmp_path / "rows.jsonl"
        rows = [{"image": f"{name}.png", "prompt": text} for name in "abcdefgh" for text in "12"]
        table.write_text("\n".join(map(json.dumps, rows)))
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({"datasets": [{"metadata_file": "rows.jsonl", "validation_fraction": 0.5}]}))
        items = list_dataset(load_dataset_config(path)).items
        sides: dict[str, set[bool]] = {}
        for item in items:
            sides.setdefault(item.name, set()).add(item.is_validation)
        assert all(len(side) == 1 for side in sides.values()) and len({*map(frozenset, sides.values())}) == 2
