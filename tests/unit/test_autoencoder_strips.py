"""The autoencoder in strips gives what it gives at once: no seam, no shift of colour, less memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from flux2_kit.flux2_core import autoencoder_strips
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.autoencoder_memory import strip_bytes
from flux2_kit.flux2_core.block_memory import Transfers
from flux2_kit.flux2_core.checkpoint import load_autoencoder
from flux2_kit.flux2_core.weights import TINY_FOLDER
from flux2_kit.training.tiny.pictures import draw_scenes, seen_scenes
from torch import Tensor

ELSEWHERE = torch.device("cpu", 0)
"""Memory that is not told to be where the weights are, on the CPU."""
CONFIG = AutoencoderConfig(
    encoder_widths=(8, 16, 32, 32), decoder_widths=(8, 16, 32, 24), num_res_blocks=2, num_norm_groups=4
)
GREY_LEVELS = 127.5
"""In one unit of a picture in -1..1."""


def tiny() -> Flux2Autoencoder:
    return load_autoencoder(TINY_FOLDER / "autoencoder.safetensors", dtype=torch.float32)


def random() -> Flux2Autoencoder:
    torch.manual_seed(0)
    model = Flux2Autoencoder(CONFIG).eval().requires_grad_(False)
    assert model.bn.running_mean is not None and model.bn.running_var is not None
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    for parameter in model.parameters():  # GroupNorms that scale and shift
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=[tiny, random])
def autoencoder(request) -> Flux2Autoencoder:
    return request.param()


@pytest.fixture(autouse=True)
def narrow_strips(monkeypatch) -> None:
    monkeypatch.setattr(autoencoder_strips, "STRIP_ELEMENTS", 2**13)


def picture() -> Tensor:
    """176x144 px, dark above and full of drawings below: tiles of it would each be normalised differently."""
    scenes = torch.cat(list(draw_scenes(seen_scenes()[:6:2]) * 2 - 1), dim=-1)
    return torch.cat((torch.full((3, 80, 176), -0.9), scenes[:, :64, :176]), dim=1)[None]


@torch.inference_mode()
def test_strips_give_what_the_picture_gives_at_once(autoencoder):
    images = picture()
    latents = autoencoder.encode(images)
    for strips, whole in (
        (autoencoder.encode_tiled(images), latents),
        (autoencoder.decode_tiled(latents), autoencoder.decode(latents)),
    ):
        assert (strips - whole).abs().max() < 1e-5 * whole.abs().max()


@torch.inference_mode()
def test_the_order_of_channels_changes_nothing():
    images, plain, arranged = picture(), random(), random().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = plain.encode_tiled(images)
    torch.testing.assert_close(arranged.encode_tiled(images), latents, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(arranged.decode_tiled(latents), plain.decode_tiled(latents), rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_there_is_no_seam(autoencoder, monkeypatch):
    """Differences of neighbouring rows are no larger where strips meet than they are in the picture made at once."""
    latents = autoencoder.encode(picture())
    starts: set[int] = set()
    rows = autoencoder_strips.Strips._rows

    def watched(self, out, channels):
        found = rows(self, out, channels)
        starts.update(start for start, _ in found if out.shape[-2] == 144 and start)
        return found

    monkeypatch.setattr(autoencoder_strips.Strips, "_rows", watched)
    steps = [
        image.diff(dim=-2).abs().mean(dim=(0, 1, 3))[[start - 1 for start in sorted(starts)]]
        for image in (autoencoder.decode_tiled(latents), autoencoder.decode(latents))
    ]
    assert len(starts) > 10
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_in_bf16_strips_are_as_exact_as_the_whole(autoencoder):
    latents = autoencoder.encode(picture())
    exact = autoencoder.decode(latents)
    autoencoder.bfloat16()
    whole, strips = (
        (fn(latents) - exact).abs().mean() * GREY_LEVELS for fn in (autoencoder.decode, autoencoder.decode_tiled)
    )
    assert strips < 1.05 * whole and strips < 2


@pytest.mark.parametrize("size", [(16, 16), (16, 160), (208, 16), (48, 80)])
@torch.inference_mode()
def test_any_size_and_every_picture_of_a_batch(size):
    autoencoder = random()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = autoencoder.encode(images)
    torch.testing.assert_close(autoencoder.encode_tiled(images), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(autoencoder.decode_tiled(latents), autoencoder.decode(latents), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_size_of_strips_changes_nothing_but_memory(monkeypatch):
    autoencoder, sizes = random(), []
    latents = autoencoder.encode(picture())
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(autoencoder_strips, "STRIP_ELEMENTS", 2**30)
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, *args, **kw: sizes.append(x.shape[-2:].numel()) or convolve(x, *args, **kw),
    )
    once = autoencoder.decode_tiled(latents)
    largest = max(sizes)
    sizes.clear()
    # Two rows more than the places that a tile of two latent positions has.
    torch.testing.assert_close(autoencoder.decode_tiled(latents, tile=2), once, rtol=1e-5, atol=2e-5)
    assert max(sizes) <= 32 * 32 + 2 * 176 < largest


@torch.inference_mode()
def test_whole_tensors_share_memory_elsewhere_and_results_do_not(monkeypatch):
    autoencoder, strips, sizes = random(), autoencoder_strips.Strips(ELSEWHERE), []
    take = strips._host_memory

    def watched(num_bytes, reads, device):
        memory = take(num_bytes, reads, device)
        assert device.type == "cpu" and memory in strips._memory
        sizes.append(sum(buffer.bytes.numel() for buffer in strips._memory))
        return memory

    monkeypatch.setattr(strips, "_host_memory", watched)
    latents = torch.randn(2, 32, 6, 4, generator=torch.Generator().manual_seed(1))
    pictures = [strips.decode(autoencoder.decoder, row) for row in latents.split(1)]
    torch.testing.assert_close(torch.cat(pictures), autoencoder.decoder(latents), rtol=1e-5, atol=1e-5)
    assert max(sizes) == strip_bytes(CONFIG, 32, 48, 4, decodes=True)[1]
    held = {buffer.bytes.untyped_storage().data_ptr() for buffer in strips._memory}
    assert not held & {picture.untyped_storage().data_ptr() for picture in pictures}
    sizes.clear()
    strips = autoencoder_strips.Strips(ELSEWHERE)
    take = strips._host_memory
    monkeypatch.setattr(strips, "_host_memory", watched)
    strips.encode(autoencoder.encoder, pictures[0])
    assert max(sizes) == strip_bytes(CONFIG, 32, 48, 4, decodes=False)[1]


class Late(Transfers):
    """Copies happen when they are waited for, in their order, and keep no strip alive until then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.copies: list[tuple] = []
        self.num_done = 0
        self.most_under_way = 0

    def mark(self) -> str:
        return "mark"

    def copy(self, target, source, after) -> int:
        assert after == "mark", "memory may still be in use"
        is_load = target._base is None
        self.log.append("load" if is_load else "store")
        self.copies.append((weakref.ref(target), source) if is_load else (target, weakref.ref(source)))
        self.most_under_way = max(self.most_under_way, len(self.copies) - self.num_done)
        return len(self.copies)

    def wait(self, event) -> None:
        for target, source in self.copies[self.num_done : event]:
            given = [one() if isinstance(one, weakref.ref) else one for one in (target, source)]
            assert all(one is not None for one in given), "a strip went before its copy was over"
            super().copy(*given, None)
        self.num_done = max(self.num_done, event or 0)

    wait_on_host = wait

    def finish(self) -> None:
        self.wait(len(self.copies))
        self.log.append("end")


@pytest.mark.parametrize("is_last", [False, True], ids=["channels first", "channels last"])
@torch.inference_mode()
def test_strips_come_and_go_while_others_are_computed(is_last, monkeypatch):
    late, autoencoder, images = Late(), random(), picture()
    if is_last:
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = autoencoder.encode(images)
    expected = autoencoder.encode_tiled(images, store=ELSEWHERE), autoencoder.decode_tiled(latents, store=ELSEWHERE)
    torch.testing.assert_close(expected[1], autoencoder.decode(latents), rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(autoencoder_strips, "make_transfers", lambda _: late)
    assert torch.equal(autoencoder.encode_tiled(images, store=ELSEWHERE), expected[0])
    assert torch.equal(autoencoder.decode_tiled(latents, store=ELSEWHERE), expected[1])
    # Two results, and a strip and its skip of two convolutions.
    assert late.most_under_way <= 6
    layers = [layer.split() for layer in " ".join(late.log).split("end")]
    assert sum(layer[:5] == ["load", "load", "store", "load", "store"] for layer in layers) > 10


@torch.inference_mode()
def test_an_error_leaves_no_copy_under_way(monkeypatch):
    late, autoencoder, padded = Late(), random(), []
    pad = torch.nn.functional.pad

    def fail(x, *args):
        padded.append(1)
        if len(padded) == 20:
            raise torch.OutOfMemoryError
        return pad(x, *args)

    monkeypatch.setattr(autoencoder_strips, "make_transfers", lambda _: late)
    monkeypatch.setattr(autoencoder_strips.F, "pad", fail)
    with pytest.raises(torch.OutOfMemoryError):
        autoencoder.encode_tiled(picture(), store=ELSEWHERE)
    assert late.num_done == len(late.copies) > 0
