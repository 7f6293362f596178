"""FLUX.2 Sample on native LATENT, and pictures as LATENT: sizes, batches, masks, noise, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core.latents import seed_noise
from flux2_kit.flux2_core.pipeline import SamplingConfig, sample_latents

TINY = "tiny (bundled)"
WIDGETS = {
    **{"width": 0, "height": 0, "num_steps": 2, "cfg_scale": 1.0, "guidance": 0.0, "flow_shift": 0.0},
    **{"seed": 3, "num_images": 1},
}


@pytest.fixture
def models(nodes):
    (dit,) = nodes["Flux2KitLoadDiT"].load(TINY, "auto", "default")
    (ae,) = nodes["Flux2KitLoadAE"].load(TINY)
    (text_encoder,) = nodes["Flux2KitLoadTextEncoder"].load(TINY, "default")
    (positive,) = nodes["Flux2KitEncodePrompt"].encode(text_encoder, "a red circle")
    return SimpleNamespace(dit=dit, ae=ae, positive=positive)


@pytest.fixture
def sample(nodes, models):
    def run(**changed):
        inputs = {**WIDGETS, "dit": models.dit, "positive": models.positive, **changed}
        return nodes["Flux2KitSample"].sample(**inputs)[0]

    return run


@pytest.fixture
def encoded(nodes, models):
    """Two pictures of 96x64 px as LATENT."""
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    return nodes["Flux2KitEncodeImage"].encode(models.ae, pictures, tiling=False)[0]


def core(models, **options):
    settings = {"width": 96, "height": 64, "num_steps": 2, "cfg_scale": 1.0, "seed": 3, "num_images": 2}
    settings |= options.pop("settings", {})
    text = models.positive[0][0]
    return sample_latents(models.dit.dit, models.dit.variant, SamplingConfig(**settings), text, **options)


def test_an_empty_latent_sets_size_and_number(sample, nodes):
    latent, _, _ = nodes["Flux2KitEmptyLatent"].make("custom", 1.0, 96, 64, 2)
    expected = sample(width=96, height=64, num_images=2)["samples"]
    assert expected.shape == (2, 128, 4, 6) and torch.equal(sample(latent=latent)["samples"], expected)
    assert torch.equal(sample(latent=latent, width=96, height=64, num_images=2)["samples"], expected)


def test_a_picture_is_changed_as_far_as_denoise_says(sample, models, encoded):
    ours = sample(latent=encoded, denoise=0.4)["samples"]
    assert torch.equal(ours, core(models, settings={"strength": 0.4}, initial=encoded["samples"]))
    near = sample(latent=encoded, denoise=0.01)["samples"]
    assert (near - encoded["samples"]).norm() < (ours - encoded["samples"]).norm()
    assert torch.equal(sample(latent=encoded)["samples"], sample(width=96, height=64, num_images=2)["samples"])


def test_one_picture_becomes_several(sample, encoded):
    one = {"samples": encoded["samples"][:1]}
    two = sample(latent=one, denoise=0.5, num_images=2)["samples"]
    assert two.shape[0] == 2 and not torch.equal(two[0], two[1])
    torch.testing.assert_close(two[:1], sample(latent=one, denoise=0.5)["samples"])


@pytest.mark.parametrize("batch_index", [[4, 1], [2]])
def test_batch_index_chooses_the_noise(sample, models, encoded, batch_index):
    """As native nodes that cut and repeat batches mean it."""
    latent = {"samples": encoded["samples"][: len(batch_index)], "batch_index": batch_index}
    ours = sample(latent=latent, denoise=0.5, num_images=2)
    indices = batch_index if len(batch_index) == 2 else [2, 3]
    noise = seed_noise(3, 5, 64, 96)[indices]
    expected = core(models, settings={"strength": 0.5}, initial=latent["samples"], noise=noise)
    assert torch.equal(ours["samples"], expected) and ours["batch_index"] == indices


@pytest.mark.parametrize("shape", [(64, 96), (1, 64, 96), (2, 1, 64, 96), (2, 4, 6), (1, 37, 11)])
def test_a_mask_keeps_what_is_outside_of_it(sample, models, encoded, shape):
    mask = torch.zeros(shape)
    mask[..., shape[-1] // 2 :] = 1
    ours = sample(latent={**encoded, "noise_mask": mask}, denoise=0.7)
    small = F.interpolate(mask.reshape(-1, 1, *shape[-2:]), size=(4, 6), mode="bilinear")
    assert torch.equal(
        ours["samples"], core(models, settings={"strength": 0.7}, initial=encoded["samples"], mask=small)
    )
    kept, made = (ours["samples"] - encoded["samples"]).split([2, 4], dim=-1)
    assert kept.abs().max() < 1e-5 < made.abs().max()
    assert ours["noise_mask"] is mask


def test_an_image_is_cropped_with_its_mask(nodes, models):
    image = torch.rand(1, 80, 100, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 80, 100)
    mask[:, :, 50:] = 1
    encode = nodes["Flux2KitEncodeImage"].encode
    latent = encode(models.ae, image, False, mask)[0]
    assert latent["samples"].shape == (1, 128, 5, 6) and latent["noise_mask"].shape == (1, 1, 80, 96)
    assert latent["noise_mask"][0, 0, 0].tolist() == [0.0] * 48 + [1.0] * 48
    on_white = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    plain, strips = encode(models.ae, on_white, False)[0], encode(models.ae, on_white, True)[0]
    assert set(plain) == {"samples"}
    torch.testing.assert_close(latent["samples"], plain["samples"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strips["samples"], plain["samples"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="100x32 px; each side must be at least 64 px"):
        encode(models.ae, image[:, :32], False)


def test_what_does_not_go_together_is_refused(sample, nodes, encoded):
    empty, _, _ = nodes["Flux2KitEmptyLatent"].make("custom", 1.0, 96, 64, 3)
    for changed, message in (
        ({"denoise": 0.5}, r"denoise\) of 0.5 was given without a picture"),
        ({"latent": empty, "denoise": 0.5}, "the latent is empty; connect an encoded picture"),
        ({"latent": empty, "width": 64}, "width is 64, but that of the latent is 96 px; set width to 0"),
        ({"latent": empty, "num_images": 2}, "num_images is 2, but the latent is a batch of 3"),
        ({"latent": {"samples": torch.zeros(1, 16, 8, 8)}}, r"latent has latents of shape \(1, 16, 8, 8\)"),
        ({"latent": {"samples": torch.zeros(1, 128, 2, 8)}}, "the height is 32 px"),
        ({"latent": {**encoded, "noise_mask": torch.ones(3, 8, 8)}}, "3 masks for 2 pictures"),
        ({"latent": {**encoded, "noise_mask": torch.ones(1, 3, 8, 8)}}, r"\[1, 3, 8, 8\]; it must be"),
        ({"latent": {**encoded, "noise_mask": torch.full((1, 8, 8), 2.0)}}, r"outside of 0\.\.1"),
        ({"latent": {**encoded, "batch_index": [1]}}, r"batch_index is \[1\] for a batch of 2"),
        ({"latent": {"samples": [encoded["samples"]]}}, "several latents of different sizes"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            sample(**changed)
        assert "\n" not in str(error.value)
