"""References are encoded once: the same picture again leaves the autoencoder alone, and anything else does not."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from flux2_kit.flux2_core import reference_store as store_module
from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
from flux2_kit.flux2_core.checkpoint import load_autoencoder
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.content_store import ContentStore, tensor_digest
from flux2_kit.flux2_core.pipeline import encode_references, load_pipeline
from flux2_kit.flux2_core.reference_store import ReferenceStore, reference_store
from PIL import Image

RED, BLUE = (Image.new("RGB", (80, 64), colour) for colour in ("red", "blue"))


@pytest.fixture
def autoencoder(random_tiny_files) -> Flux2Autoencoder:
    return load_autoencoder(random_tiny_files.autoencoder)


@pytest.fixture
def encodes(monkeypatch) -> list[str]:
    """One entry for every picture that an autoencoder encodes."""
    calls: list[str] = []
    for name in ("encode", "encode_tiled"):
        original: Callable = getattr(Flux2Autoencoder, name)
        monkeypatch.setattr(
            Flux2Autoencoder, name, lambda *args, of=original, name=name, **kw: calls.append(name) or of(*args, **kw)
        )
    return calls


def test_a_picture_is_encoded_once_and_what_is_kept_is_what_was_encoded(autoencoder, encodes):
    fresh = encode_references(autoencoder, [RED, BLUE])
    encodes.clear()
    for pictures in ([RED, BLUE], [BLUE.copy(), RED.copy()], [RED]):
        known = encode_references(autoencoder, pictures, known=reference_store(autoencoder))
        expected = fresh if pictures[0] is RED else fresh[::-1]
        assert all(torch.equal(a, b) for a, b in zip(known, expected, strict=False))
    assert len(encodes) == 2


def test_what_changes_the_numbers_is_encoded_anew(autoencoder, encodes):
    def encode(picture: Image.Image, **settings) -> int:
        encodes.clear()
        encode_references(autoencoder, [picture], **settings, known=reference_store(autoencoder))
        return len(encodes)

    assert [encode(RED), encode(RED)] == [1, 0]
    changed = RED.copy()
    changed.putpixel((40, 32), (254, 0, 0))
    assert encode(changed) == 1, "one grey level of one pixel"
    assert encode(RED.transpose(Image.Transpose.ROTATE_90)) == 1, "the same bytes in another shape"
    large = Image.new("RGB", (128, 128), "red")
    assert [encode(large), encode(large, resize=False), encode(large, resize=False)] == [1, 1, 0]
    assert [encode(RED, tiled=True), encode(RED, tiled=True)] == [1, 0]
    with torch.no_grad():
        autoencoder.encoder.conv_in.bias.add_(1)
    assert encode(RED) == 1, "weights were written into"
    autoencoder.bfloat16()
    assert encode(RED) == 1, "another type"
    assert encode(RED) == 0


def test_the_store_goes_with_its_autoencoder(random_tiny_files):
    autoencoder = load_autoencoder(random_tiny_files.autoencoder)
    encode_references(autoencoder, [RED], known=reference_store(autoencoder))
    number = len(store_module._stores)
    del autoencoder
    gc.collect()
    assert len(store_module._stores) == number - 1


def test_the_least_recently_used_leaves(monkeypatch):
    store: ContentStore[str] = ContentStore(max_items=2, max_bytes=100)
    for name in "ab":
        store.put(name, name, 10)
    assert store.get("a") == "a"
    store.put("c", "c", 10)
    assert [store.get(name) for name in "abc"] == ["a", None, "c"]
    store.put("d", "d", 95)
    assert (len(store), store.num_bytes, store.get("d")) == (1, 95, "d")
    store.put("e", "e", 101)
    assert (len(store), store.get("e"), store.get("d")) == (1, None, "d"), "too large alone: the others stay"
    monkeypatch.setattr(store_module, "MAX_BYTES", 3 * 4)
    references = ReferenceStore()
    for picture in (RED, BLUE):
        references.put(picture, torch.zeros(2), tiled=False)
    assert references.get(RED, tiled=False) is None and references.get(BLUE, tiled=False) is not None


def test_a_digest_tells_type_shape_and_numbers():
    zeros = torch.zeros(4)
    others = [zeros.view(2, 2), zeros.bfloat16(), zeros.int(), zeros + 1e-7, torch.zeros(8)]
    assert len({tensor_digest(tensor) for tensor in [zeros, *others]}) == 6
    assert tensor_digest(zeros.clone()) == tensor_digest(zeros)


def test_a_second_run_of_a_pipeline_needs_no_autoencoder(random_tiny_files, encodes):
    pipeline = load_pipeline(
        dit=random_tiny_files.dit,
        autoencoder=random_tiny_files.autoencoder,
        text_encoder=random_tiny_files.text_encoder,
    )
    first = pipeline.encode_references([RED, BLUE])
    del pipeline._networks["autoencoder"]
    second = pipeline.encode_references([RED, BLUE])
    assert "autoencoder" not in pipeline._networks and len(encodes) == 2
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, pipeline.encode_references([BLUE]), first[1:])), "one of them"
    pipeline.encode_references([RED, RED.transpose(Image.Transpose.ROTATE_90)])
    assert len(encodes) == 3
    assert pipeline.encode_references([]) == []


def test_lines_of_a_prompt_file_share_a_reference(random_tiny_files, encodes, tmp_path):
    RED.save(tmp_path / "a.png")
    RED.save(tmp_path / "b.png", compress_level=0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"x --ci {tmp_path / name}.png\n" for name in "abab"))
    options = ["--from_file", str(prompts), "--infer_steps", "1", "--guidance_scale", "1", "--save_path", str(tmp_path)]
    assert main(["generate", *random_tiny_files.options, *options, "--image_size", "64", "64"]) == 0
    assert len(encodes) == 1
