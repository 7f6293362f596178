"""Memory of the released autoencoder on large pictures, counted without taking any: tensors that have only sizes."""

from __future__ import annotations

import torch
from allocations import peak_of
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.autoencoder_memory import autoencoder_bytes, host_strip_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

CONFIG = AutoencoderConfig()
SIDE = 2048
"""Of the picture that is counted; 4096 gives the same ratio and takes four times as long."""


def test_4096_pixels_decode_within_4_gib():
    with FakeTensorMode():
        autoencoder = Flux2Autoencoder(CONFIG).eval().requires_grad_(False)
        for module in autoencoder.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    numbers = torch.empty(parameter.shape, dtype=torch.bfloat16)
                    module._parameters[name] = torch.nn.Parameter(numbers, requires_grad=False)
        latents = torch.empty(1, CONFIG.packed_channels, SIDE // 16, SIDE // 16)
        host = torch.device("meta")  # stands for host memory, so that the CPU can stand for the device
        with torch.inference_mode():
            found = peak_of(lambda: autoencoder.decode_tiled(latents, store=host))
    assert abs(host_strip_bytes(CONFIG, SIDE, SIDE, 2, decodes=True, is_cuda=False) / found - 1) < 0.05
    estimate = host_strip_bytes(CONFIG, 4096, 4096, 2, decodes=True)
    assert estimate + autoencoder_bytes(CONFIG, 2) < 4 * 2**30
