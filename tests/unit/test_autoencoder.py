"""The autoencoder's shapes; its strips have tests of their own."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core import group_norm
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, Upsample, arrange_channels
from torch import Tensor, nn

CONFIG = AutoencoderConfig(
    encoder_widths=(4, 4, 8, 8), decoder_widths=(4, 4, 8, 8), num_res_blocks=1, num_norm_groups=2
)


@pytest.fixture
def autoencoder() -> Flux2Autoencoder:
    torch.manual_seed(0)
    model = Flux2Autoencoder(CONFIG).eval()
    assert model.bn.running_mean is not None and model.bn.running_var is not None
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    return model


def random_images(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def test_sixteen_pixels_make_one_latent_position(autoencoder):
    latents = autoencoder.encode(random_images(48, 80))
    assert latents.shape == (1, 128, 3, 5)
    assert autoencoder.decode(latents).shape == (1, 3, 48, 80)


@torch.inference_mode()
def test_latents_and_pictures_are_fp32_in_a_bf16_autoencoder(autoencoder):
    autoencoder.bfloat16()
    latents = autoencoder.encode(random_images(32, 32))
    assert latents.dtype == torch.float32
    assert autoencoder.decode(latents).dtype == torch.float32


def channels_are_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@torch.inference_mode()
def test_a_bf16_autoencoder_computes_with_channels_last(autoencoder):
    autoencoder.bfloat16()
    before = autoencoder.decode(torch.ones(1, 128, 2, 3))
    arrange_channels(autoencoder)
    seen = []
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(("post_quant_conv", "conv_in")):
            module.register_forward_hook(
                lambda _, given, made: seen.append(channels_are_last(given[0]) and channels_are_last(made))
            )
    after = autoencoder.decode(torch.ones(1, 128, 2, 3))
    autoencoder.encode(after)
    assert len(seen) > 20 and all(seen)
    assert (after - before).abs().max() < 0.05 * before.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_enlarged_picture_is_convolved_without_enlarging_it(layout):
    torch.manual_seed(0)
    layer = Upsample(5).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 5, 4, 7, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
    expected = layer.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    made = layer(x)
    assert made.stride() == expected.stride()
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(expected)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()]) for y in (made, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_group_norm_by_the_kernel_of_cuda(monkeypatch):
    """With a twin of `torch.batch_norm_stats`, which exists for CUDA only."""

    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
        return mean.float(), (variance + eps).rsqrt().float()

    torch.manual_seed(0)
    norm = nn.GroupNorm(3, 12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 12, 5, 6) * torch.rand(2, 12, 1, 1) * 3 + torch.randn(2, 12, 1, 1) * 5
    x[1, 3:5] = 2.0  # channels without any variance
    x = x.contiguous(memory_format=torch.channels_last)
    expected = nn.functional.silu(norm(x.double().contiguous().float()))
    monkeypatch.setattr(group_norm, "has_kernel", lambda _: True)
    monkeypatch.setattr(torch, "batch_norm_stats", batch_norm_stats)
    with torch.no_grad():
        made = group_norm.norm_silu(x, norm)
    assert channels_are_last(made)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_training_mode_neither_uses_nor_moves_the_statistics_of_the_batch(autoencoder):
    images = random_images(32, 32)
    expected, mean = autoencoder.encode(images), autoencoder.bn.running_mean.clone()
    assert torch.equal(autoencoder.train().encode(images), expected)
    assert torch.equal(autoencoder.bn.running_mean, mean)


@torch.inference_mode()
def test_denormalize_undoes_normalize(autoencoder):
    packed = torch.randn(2, 128, 3, 2)
    torch.testing.assert_close(autoencoder.denormalize(autoencoder.normalize(packed)), packed)


@pytest.mark.parametrize("encode", ["encode", "encode_tiled"])
@pytest.mark.parametrize("size", [(40, 64), (64, 1030), (1500, 64)])
@torch.inference_mode()
def test_a_side_that_is_no_multiple_of_16_is_refused(autoencoder, encode, size):
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} px; both sides must be multiples of 16"):
        getattr(autoencoder, encode)(random_images(*size))
