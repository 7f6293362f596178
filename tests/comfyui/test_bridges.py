"""Native samplers, VAE and prompt nodes on the pack's networks, against the pack's own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_server import API, Server
from comfyui_workflows import asked_for, assert_shows, read_api
from flux2_kit.flux2_core.lora_files import linear_shapes
from flux2_kit.flux2_core.variants import DIT_TINY
from flux2_kit.nodes.host import BUNDLED
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5
"""Relative, fp32: both ways differ in the order of additions."""
OPEN = {"width": 0, "height": 0, "num_steps": 0, "flow_shift": 0.0}
SETTINGS = {**OPEN, "cfg_scale": 0.0, "guidance": 0.0, "seed": 11, "num_images": 2}
TEXT = "a small white square at the left on a red background"
SCALE = 4.0


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A link is the other node's id; what is no id is a widget's value."""
    return {"class_type": class_type, "inputs": inputs}


def base(**others: dict[str, Any]) -> API:
    """Networks in fp32, bridges, prompts, a size."""
    return {
        "dit": node("Flux2KitLoadDiT", dit_name=BUNDLED, variant="auto", precision="fp32"),
        "te": node("Flux2KitLoadTextEncoder", text_encoder_name=BUNDLED, precision="fp32"),
        "ae": node("Flux2KitLoadAE", ae_name=BUNDLED),
        "clip": node("Flux2KitToCLIP", text_encoder=["te", 0]),
        "vae": node("Flux2KitToVAE", ae=["ae", 0]),
        "model": node("Flux2KitToModel", dit=["dit", 0], **OPEN),
        "sigmas": node("Flux2KitSigmas", dit=["dit", 0], **OPEN),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text=TEXT),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text=""),
        "size": node("EmptyFlux2LatentImage", width=64, height=64, batch_size=2),
        **others,
    }


def ksampler(**others: Any) -> dict[str, Any]:
    values = {"seed": 11, "steps": 20, "cfg": SCALE, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    return node("KSampler", **{**values, **links, "latent_image": ["size", 0], **others})


def custom_sampler(prompt: API, guider: dict[str, Any], sigmas: str = "sigmas") -> None:
    """SamplerCustomAdvanced and what it takes."""
    prompt["noise"] = node("RandomNoise", noise_seed=11)
    prompt["euler"] = node("KSamplerSelect", sampler_name="euler")
    prompt["guider"] = guider
    prompt["native"] = node(
        "SamplerCustomAdvanced",
        **{name: [name, 0] for name in ("noise", "guider")},
        sampler=["euler", 0],
        sigmas=[sigmas, 0],
        latent_image=["size", 0],
    )


def sample(**others: Any) -> dict[str, Any]:
    links = {"dit": ["dit", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    return node("Flux2KitSample", **{**links, **SETTINGS, **others})


def difference(server: Server, prompt: API, *, name: str) -> float:
    """Relative distance of the latents of the nodes ``native`` and ``ours``."""
    ids = ("native", "ours")
    for node_id in ids:
        prompt[f"save_{node_id}"] = node("SaveLatent", samples=[node_id, 0], filename_prefix=f"{name}/{node_id}")
    result = server.run(prompt)
    assert result.status == "success", result.messages
    latents = []
    for node_id in ids:
        (path,) = (server.base / "output" / name).glob(f"{node_id}_*.latent")
        latents.append(load_file(path)["latent_tensor"])
    native, ours = latents
    assert native.shape == ours.shape == (2, 128, 4, 4) and torch.isfinite(ours).all()
    return ((native - ours).norm() / ours.norm()).item()


def guider(**others: Any) -> dict[str, Any]:
    links = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    return node("CFGGuider", **{**links, "cfg": SCALE, **others})


def test_ksampler_is_flux2_sample(server):
    assert difference(server, base(native=ksampler(), ours=sample()), name="ksampler") < TOLERANCE


def test_without_cfg(server):
    prompt = base(native=ksampler(cfg=1.0), ours=sample(cfg_scale=1.0))
    assert difference(server, prompt, name="no_cfg") < TOLERANCE


@pytest.mark.parametrize("sigmas", ["sigmas", "flux2_scheduler", "basic_scheduler"])
def test_custom_sampling_is_flux2_sample(server, sigmas):
    prompt = base(
        ours=sample(),
        flux2_scheduler=node("Flux2Scheduler", steps=20, width=64, height=64),
        basic_scheduler=node("BasicScheduler", model=["model", 0], scheduler="simple", steps=20, denoise=1.0),
    )
    custom_sampler(prompt, guider(), sigmas)
    assert difference(server, prompt, name=f"custom_{sigmas}") < TOLERANCE


def test_a_basic_guider_is_flux2_sample_without_cfg(server):
    prompt = base(ours=sample(cfg_scale=1.0))
    custom_sampler(prompt, node("BasicGuider", model=["model", 0], conditioning=["positive", 0]))
    assert difference(server, prompt, name="basic_guider") < TOLERANCE


@pytest.mark.parametrize("way", ["ours", "native"])
def test_references_are_those_of_flux2_sample(server, way):
    """Native ReferenceLatent into both samplers, and into the native one beside FLUX.2 Encode Reference."""
    prompt = base(
        image=node("EmptyImage", width=96, height=64, batch_size=1, color=0x3366CC),
        latent=node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
        edit=node("ReferenceLatent", conditioning=["positive", 0], latent=["latent", 0]),
        against=node("ReferenceLatent", conditioning=["negative", 0], latent=["latent", 0]),
        references=node("Flux2KitEncodeReference", ae=["ae", 0], image=["image", 0], resize=False, tiling=False),
        native=ksampler(positive=["edit", 0], negative=["against", 0]),
    )
    prompt["ours"] = sample(references=["references", 0]) if way == "ours" else sample(positive=["edit", 0])
    # Two encoders round differently, and twenty steps with CFG carry that on.
    tolerance = 1e-4 if way == "ours" else TOLERANCE
    assert difference(server, prompt, name=f"reference_{way}") < tolerance


def test_a_lora_goes_with_its_link(server):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (out_features, in_features) in linear_shapes(DIT_TINY).items():
        stem = f"diffusion_model.{layer}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, in_features, generator=generator) / in_features**0.5
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out_features, 2, generator=generator) * 0.1
    save_file(tensors, server.base / "models" / "loras" / "bridge.safetensors")
    adapted = node("Flux2KitApplyLoRA", dit=["dit", 0], lora_name="bridge.safetensors", strength=0.8)
    prompt = base(
        adapted=adapted,
        adapted_model=node("Flux2KitToModel", dit=["adapted", 0], **OPEN),
        native=ksampler(model=["adapted_model", 0]),
        ours=sample(dit=["adapted", 0]),
    )
    assert difference(server, prompt, name="lora") < TOLERANCE
    plain = base(adapted=adapted, native=ksampler(), ours=sample(dit=["adapted", 0]))
    assert difference(server, plain, name="lora_left_out") > 0.01

    native_loader = node("LoraLoaderModelOnly", model=["model", 0], lora_name="bridge.safetensors", strength_model=1.0)
    refused = base(patched=native_loader, native=ksampler(model=["patched", 0]))
    refused["save"] = node("SaveLatent", samples=["native", 0], filename_prefix="refused")
    error = server.run(refused).error
    assert error["node_id"] == "patched" and "FLUX.2 Apply LoRA, before FLUX.2 to MODEL" in error["exception_message"]


def test_guidance_of_dev_is_refused_on_the_sampler(server):
    prompt = base(
        guided=node("FluxGuidance", conditioning=["positive", 0], guidance=3.5),
        native=ksampler(positive=["guided", 0]),
    )
    prompt["save"] = node("SaveLatent", samples=["native", 0], filename_prefix="refused")
    error = server.run(prompt).error
    assert error["node_id"] == "native" and "remove FluxGuidance" in error["exception_message"]


def test_a_masked_latent_keeps_what_is_outside_of_the_mask(server):
    prompt = base(
        ours=sample(),
        mask=node("SolidMask", value=0.0, width=64, height=64),
        right=node("SolidMask", value=1.0, width=32, height=64),
        half=node("MaskComposite", destination=["mask", 0], source=["right", 0], x=32, y=0, operation="add"),
        masked=node("SetLatentNoiseMask", samples=["ours", 0], mask=["half", 0]),
        other=node("CLIPTextEncode", clip=["clip", 0], text="a large green circle at the right on a black background"),
        native=ksampler(latent_image=["masked", 0], positive=["other", 0], seed=3),
    )
    assert difference(server, prompt, name="masked") > 0.1
    latents = [
        load_file(next((server.base / "output" / "masked").glob(f"{name}_*.latent")))["latent_tensor"]
        for name in ("native", "ours")
    ]
    assert torch.allclose(latents[0][..., :2], latents[1][..., :2], atol=1e-4)


def picture(**others: dict[str, Any]) -> API:
    """Networks and a picture of 64x64 px, encoded by the native node as one latent and repeated."""
    return base(
        image=node("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC),
        encoded=node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
        start=node("RepeatLatentBatch", samples=["encoded", 0], amount=2),
        **others,
    )


@pytest.mark.parametrize("denoise", [0.2, 0.5, 0.8])
def test_image_to_image_is_that_of_ksampler(server, denoise):
    prompt = picture(
        native=ksampler(latent_image=["start", 0], denoise=denoise),
        ours=sample(latent=["start", 0], denoise=denoise, num_images=1),
    )
    assert difference(server, prompt, name=f"denoise_{denoise}") < TOLERANCE


@pytest.mark.parametrize("sigmas", ["part", "basic_scheduler"])
def test_image_to_image_is_that_of_custom_sampling(server, sigmas):
    prompt = picture(
        ours=sample(latent=["start", 0], denoise=0.5),
        part=node("Flux2KitSigmas", dit=["dit", 0], **OPEN, denoise=0.5),
        basic_scheduler=node("BasicScheduler", model=["model", 0], scheduler="simple", steps=20, denoise=0.5),
    )
    custom_sampler(prompt, guider(), sigmas)
    prompt["native"]["inputs"]["latent_image"] = ["start", 0]
    assert difference(server, prompt, name=f"denoise_{sigmas}") < TOLERANCE


@pytest.mark.parametrize("denoise", [0.5, 1.0])
def test_inpainting_is_that_of_ksampler(server, denoise):
    """With a soft mask of the picture's size."""
    prompt = picture(
        mask=node("SolidMask", value=0.25, width=64, height=64),
        right=node("SolidMask", value=0.5, width=24, height=64),
        soft=node("MaskComposite", destination=["mask", 0], source=["right", 0], x=40, y=0, operation="add"),
        masked=node("SetLatentNoiseMask", samples=["start", 0], mask=["soft", 0]),
        native=ksampler(latent_image=["masked", 0], denoise=denoise),
        ours=sample(latent=["masked", 0], denoise=denoise),
    )
    assert difference(server, prompt, name=f"inpaint_{denoise}") < TOLERANCE


def test_part_of_a_batch_keeps_its_noise(server):
    """LatentFromBatch numbers what it takes out, and both samplers take the noise of these numbers."""
    prompt = base(
        size=node("EmptyFlux2LatentImage", width=64, height=64, batch_size=4),
        part=node("LatentFromBatch", samples=["size", 0], batch_index=1, length=2),
        native=ksampler(latent_image=["part", 0]),
        ours=sample(latent=["part", 0], num_images=1),
    )
    assert difference(server, prompt, name="part_of_a_batch") < TOLERANCE


def test_our_latent_of_a_picture_is_that_of_vae_encode(server):
    prompt = picture(
        own=node("Flux2KitEncodeImage", ae=["ae", 0], image=["image", 0], tiling=False),
        ours=node("RepeatLatentBatch", samples=["own", 0], amount=2),
    )
    prompt["native"] = prompt.pop("start")
    assert difference(server, prompt, name="encoded") < TOLERANCE


def test_free_gives_all_memory_back_and_the_same_latents_come_back(server):
    def run(name: str) -> torch.Tensor:
        prompt = base(native=ksampler(seed=5))
        prompt["save"] = node("SaveLatent", samples=["native", 0], filename_prefix=f"{name}/native")
        assert server.run(prompt).status == "success"
        return load_file(next((server.base / "output" / name).glob("native_*.latent")))["latent_tensor"]

    before = run("before_free")
    assert {"Flux2DiT", "BridgedDiT"} <= set(server.networks())
    # The DiT was loaded through its MODEL, the text encoder through its CLIP.
    assert server.loaded()["Flux2DiTWeights"] and server.loaded()["TextEncoderWeights"]
    server.free(unload_models=True, free_memory=True)
    assert server.forgets(server.networks) and server.loaded() == {}
    assert torch.equal(run("after_free"), before)


def test_a_change_of_the_seed_loads_nothing_again(server):
    prompt = base(native=ksampler(seed=21))
    prompt["save"] = node("SaveLatent", samples=["native", 0], filename_prefix="again/native")
    assert server.run(prompt).status == "success"
    prompt["native"] = ksampler(seed=22)
    result = server.run(prompt)
    assert result.status == "success"
    assert {"dit", "te", "model", "positive"} <= result.cached and "native" in result.executed


def test_both_samplers_of_the_template_draw_what_was_asked(server):
    prompt = read_api("native_sampler_tiny")
    result = server.run(prompt)
    assert result.status == "success", result.messages
    (text,) = [entry["inputs"]["text"] for entry in prompt.values() if entry["inputs"].get("text")]
    saved = [node_id for node_id, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    assert len(saved) == 2
    for node_id in saved:
        assert_shows(server.images(result, node_id), asked_for(text))
    (sampler,) = [node_id for node_id, entry in prompt.items() if entry["class_type"] == "KSampler"]
    assert result.steps(sampler)[-1] == 20
