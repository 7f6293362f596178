"""The autoencoder on a GPU: the same numbers as on the CPU, with channels last."""

from __future__ import annotations

import copy

import pytest
import torch
from flux2_kit.flux2_core import autoencoder_strips
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, arrange_channels
from flux2_kit.flux2_core.block_memory import HostBuffer
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = AutoencoderConfig(encoder_widths=(32, 64, 64, 64), decoder_widths=(32, 64, 64, 64), num_norm_groups=8)


def build() -> Flux2Autoencoder:
    torch.manual_seed(0)
    model = Flux2Autoencoder(CONFIG).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
@torch.no_grad()
def test_a_gpu_computes_what_the_cpu_does(dtype, limit, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = build()
    there = arrange_channels(copy.deepcopy(exact).to("cuda", dtype))
    latents, images = torch.randn(2, 128, 6, 9), torch.rand(2, 3, 96, 144) * 2 - 1
    orders = []
    for module in there.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            module.register_forward_hook(
                lambda _, given, __: orders.append(given[0].is_contiguous(memory_format=torch.channels_last))
            )
    for expected, made in (
        (exact.decode(latents), there.decode(latents)),
        (exact.decode(latents), there.decode_tiled(latents)),
        (exact.decode(latents), there.decode_tiled(latents, store=torch.device("cpu"))),
        (exact.encode(images), there.encode(images)),
        (exact.encode(images), there.encode_tiled(images)),
    ):
        assert (made.cpu() - expected).norm() <= limit * expected.norm()
    assert sum(orders) > 0.9 * len(orders)


@pytest.mark.parametrize("is_last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "pinning refused"])
@torch.no_grad()
def test_strips_pass_through_host_memory_beside_the_computation(is_pinned, is_last, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(autoencoder_strips, "STRIP_ELEMENTS", 2**15)
    if not is_pinned:
        monkeypatch.setattr(HostBuffer, "pin", lambda self: None)
    exact = build()
    there = copy.deepcopy(exact).to("cuda")
    if is_last:
        arrange_channels(there)
    z, images = torch.randn(1, 32, 24, 36), torch.rand(1, 3, 192, 288) * 2 - 1
    for _ in range(3):
        strips = autoencoder_strips.Strips(torch.device("cpu"))
        for expected, made in (
            (exact.decoder(z), strips.decode(there.decoder, z.cuda())),
            (exact.encoder(images), strips.encode(there.encoder, images.cuda())),
        ):
            assert made.is_cuda and (made.cpu() - expected).norm() <= 1e-4 * expected.norm()
        assert all(buffer.bytes.is_pinned() == is_pinned for buffer in strips._memory)
