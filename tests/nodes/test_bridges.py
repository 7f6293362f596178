"""Bridges to native nodes, as far as they can be seen without ComfyUI; tests/comfyui runs them in a real one."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
from flux2_kit.flux2_core.dit import Flux2DiT
from flux2_kit.flux2_core.lora import LoraSetting, linear_layers
from flux2_kit.flux2_core.lora_files import read_lora
from flux2_kit.flux2_core.pipeline import SamplingConfig, sample_latents
from flux2_kit.flux2_core.reference_cache import reference_caches
from flux2_kit.flux2_core.schedule import shift_sigmas, sigma_schedule
from flux2_kit.flux2_core.variants import DIT_TINY, VARIANTS
from flux2_kit.nodes import native_encoders, native_model
from flux2_kit.nodes.bridges import Sigmas, ToModel, shift_exponent
from flux2_kit.nodes.loaders import LoadedDiT
from flux2_kit.nodes.native_encoders import BridgedCLIP, BridgedVAE
from flux2_kit.nodes.native_model import BridgedDiT, read_options, refuse_patches, velocity
from flux2_kit.nodes.patchers import step_bytes
from safetensors.torch import save_file
from test_lora_nodes import random_lora
from torch import nn

TINY = VARIANTS["tiny"]
CACHING = replace(TINY, reference_cache="exact", name="caching")
GUIDED = replace(TINY, dit=replace(DIT_TINY, has_guidance_embedder=True), guidance=4.0, name="guided")
OPEN = {"width": 0, "height": 0, "num_steps": 0, "flow_shift": 0.0}


def random_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded_dit(variant=TINY, **settings) -> LoadedDiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LoadedDiT(dit=Flux2DiT(variant.dit).requires_grad_(False), variant=variant, **settings)


@pytest.fixture
def autoencoder() -> Flux2Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Flux2Autoencoder(TINY.autoencoder).eval().requires_grad_(False)


def options(**others) -> dict:
    """What ComfyUI hands to a model before it samples."""
    return {"cross_attn": random_like(1, 20, 192), "noise": torch.zeros(1, 128, 4, 4), **others}


class Text:
    """A text encoder that needs no weights."""

    config = SimpleNamespace(max_tokens=24)

    def encode(self, prompts: list[str]) -> SimpleNamespace:
        return SimpleNamespace(embeddings=torch.full((1, 24, 192), float(len(prompts[0]))), num_cut=[0])


@pytest.fixture
def comfyui(monkeypatch):
    """As much of ComfyUI's modules as a MODEL is made from."""

    class BaseModel(nn.Module):
        def __init__(self, model_config, model_type, device=None) -> None:
            super().__init__()
            self.model_config, self.model_type = model_config, model_type

    class ModelPatcher:
        def __init__(self, model, load_device, offload_device) -> None:
            self.model, self.load_device, self.offload_device, self.objects = model, load_device, offload_device, {}

        def add_object_patch(self, name, obj) -> None:
            self.objects[name] = obj

        def cleanup(self) -> None:
            self.is_clean = True

    class Flux2:
        sampling_settings: ClassVar = {"shift": 2.02}

        def __init__(self, unet_config) -> None:
            self.unet_config, self.latent_format = unet_config, SimpleNamespace(latent_rgb_factors=[[1.0]])
            self.memory_usage_factor = unet_config["hidden_size"] / 2604  # as ComfyUI does since 2026

    cpu = torch.device("cpu")
    modules = {
        "supported_models": SimpleNamespace(Flux2=Flux2),
        "model_base": SimpleNamespace(BaseModel=BaseModel, ModelType=SimpleNamespace(FLUX="flux")),
        "model_patcher": SimpleNamespace(ModelPatcher=ModelPatcher),
        "model_management": SimpleNamespace(unet_offload_device=lambda: cpu, get_torch_device=lambda: cpu),
        "conds": SimpleNamespace(
            **{name: lambda value, name=name: (name, value) for name in ("CONDRegular", "CONDConstant", "CONDList")}
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"comfy.{name}", module)
    return modules


# The network behind a MODEL


@pytest.mark.parametrize("variant", [TINY, GUIDED, CACHING], ids=lambda variant: variant.name)
def test_native_steps_over_the_velocity_are_those_of_flux2_sample(variant):
    loaded, text, negative = loaded_dit(variant), random_like(1, 24, 192), random_like(1, 24, 192, seed=1)
    references = [random_like(1, 128, 3, 5, seed=2), random_like(1, 128, 4, 4, seed=3)]
    sampling = SamplingConfig(num_steps=3, cfg_scale=3.0, num_images=2, width=96, seed=7)
    ours = sample_latents(
        loaded.dit, variant, sampling, text, negative_text=negative, references=references, noise=None
    )

    network, x = BridgedDiT(loaded), torch.randn((2, 128, 4, 6), generator=torch.Generator().manual_seed(7))
    sigmas = sigma_schedule(3, 24).float()
    batched = [latents.expand(4, -1, -1, -1) for latents in references]
    context = torch.cat((text.expand(2, -1, -1), negative.expand(2, -1, -1)))
    for sigma, after in pairwise(sigmas):
        double, timestep = torch.cat((x, x)), sigma.expand(4)
        output = network(double, timestep, context=context, guidance=variant.guidance, ref_latents=batched)
        positive, other = (double - sigma * output).chunk(2)
        denoised = other + 3.0 * (positive - other)
        x = x + (x - denoised) / sigma * (after - sigma)
    assert ((x - ours).norm() / ours.norm()).item() < 1e-5
    caches = reference_caches(loaded.dit)._kept
    assert len(caches) == (1 if variant is CACHING else 0), "the rows of a batch have the same references"


def test_the_velocity_keeps_type_and_size_of_the_latents():
    loaded = loaded_dit()
    latents, text = random_like(1, 128, 3, 5).double(), random_like(1, 24, 192)
    result = velocity(loaded.dit, latents, torch.tensor([0.5]), text)
    assert (result.shape, result.dtype) == (latents.shape, torch.float64)


def test_each_model_has_its_own_loras_and_leaves_none(tmp_path):
    def setting(seed: int) -> LoraSetting:
        save_file(random_lora(seed), path := tmp_path / f"{seed}.safetensors")
        return LoraSetting(lora=read_lora(path, DIT_TINY))

    plain = loaded_dit()
    first, second = (replace(plain, loras=(setting(seed),)) for seed in (0, 1))
    inputs = random_like(1, 128, 4, 4), torch.tensor([0.7]), random_like(1, 24, 192)
    expected = [sampled(loaded, *inputs) for loaded in (plain, first, second)]
    networks = [BridgedDiT(loaded) for loaded in (plain, first, second)]
    for _ in range(2):
        for network, wanted in zip(networks, expected, strict=True):
            assert torch.equal(network(*inputs), wanted)
    assert not any(layer.adapters for layer in linear_layers(plain.dit).values())
    assert not torch.equal(expected[1], expected[2]) and not torch.equal(expected[0], expected[1])
    made = networks[1]._adapters
    networks[1](*inputs)
    assert networks[1]._adapters is made, "not made anew in every step"
    networks[1].forget_loras()
    assert torch.equal(networks[1](*inputs), expected[1])


def sampled(loaded: LoadedDiT, latents, sigma, text) -> torch.Tensor:
    from flux2_kit.nodes.lora import live_loras

    with live_loras(loaded):
        return velocity(loaded.dit, latents, sigma, text)


def test_loras_are_removed_after_an_error(tmp_path):
    save_file(random_lora(0), path := tmp_path / "one.safetensors")
    loaded = loaded_dit(loras=(LoraSetting(lora=read_lora(path, DIT_TINY)),))
    with pytest.raises(RuntimeError):
        BridgedDiT(loaded)(random_like(1, 128, 4, 4), torch.tensor([0.7]), random_like(1, 24, 7))
    assert not any(layer.adapters for layer in linear_layers(loaded.dit).values())


def test_wrappers_of_native_nodes_see_the_network(monkeypatch):
    seen = []

    class Executor:
        @classmethod
        def new_class_executor(cls, original, class_object, wrappers):
            def execute(*args):
                seen.append((wrappers, args))
                return original(*args)

            return SimpleNamespace(execute=execute)

    extension = SimpleNamespace(
        WrapperExecutor=Executor,
        WrappersMP=SimpleNamespace(DIFFUSION_MODEL="diffusion_model"),
        get_all_wrappers=lambda kind, given: given["wrappers"][kind],
    )
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)
    given = {"wrappers": {"diffusion_model": ["a wrapper"]}}
    x = random_like(1, 128, 4, 4)
    BridgedDiT(loaded_dit())(x, torch.tensor([0.5]), random_like(1, 24, 192), transformer_options=given)
    ((wrappers, args),) = seen
    assert wrappers == ["a wrapper"] and args[0] is x and args[-1] is given


# What conditioning may ask for


def test_a_short_prompt_is_padded_with_zeros_on_the_left():
    read = read_options(options(), TINY)
    assert read["text"].shape == (1, 24, 192) and not read["text"][:, :4].any()
    assert torch.equal(read["text"][:, 4:], options()["cross_attn"])
    long = random_like(1, 30, 192)
    assert torch.equal(read_options(options(cross_attn=long), TINY)["text"], long)


def test_guidance_is_that_of_the_node_or_the_variant_s_own():
    assert read_options(options(), TINY)["guidance"] is None
    assert read_options(options(), GUIDED)["guidance"] == 4.0
    assert read_options(options(guidance=2.5), GUIDED)["guidance"] == 2.5


@pytest.mark.parametrize(
    ("variant", "asked", "text"),
    [
        (TINY, {"guidance": 3.5}, "tiny has no guidance embedder; remove FluxGuidance"),
        (GUIDED, {"guidance": None}, "remove FluxDisableGuidance"),
        (TINY, {"control": object()}, "carries a ControlNet"),
        (TINY, {"concat_latent_image": torch.zeros(1)}, "use Set Latent Noise Mask"),
        (TINY, {"reference_latents_method": "uxo"}, "'uxo'"),
        (TINY, {"reference_latents": [torch.zeros(1, 128, 4, 4)] * 11}, "11 references"),
        (TINY, {"reference_latents": [torch.zeros(1, 16, 4, 4)]}, "a reference has latents of shape"),
        (TINY, {"noise": torch.zeros(1, 16, 4, 4)}, "the sampler's input has latents of shape"),
        (TINY, {"cross_attn": torch.zeros(1, 24, 4096)}, "tiny needs 192 channels"),
        (TINY, {"cross_attn": None}, "holds no prompt"),
    ],
)
def test_what_the_dit_does_not_do_is_refused(variant, asked, text):
    with pytest.raises(ValueError, match=text):
        read_options(options(**asked), variant)


@pytest.mark.parametrize("name", ["patches", "patches_replace", "rope_options", "optimized_attention_override"])
def test_patches_of_the_inside_are_refused(name):
    refuse_patches({"wrappers": {}, "patches": {}, "sigmas": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"sets {name} \(attn1\)"):
        refuse_patches({name: {"attn1": [print]}})
    with pytest.raises(ValueError, match=f"sets {name}"):
        BridgedDiT(loaded_dit())(
            random_like(1, 128, 4, 4),
            torch.tensor([0.5]),
            random_like(1, 24, 192),
            transformer_options={name: {"attn1": [print]}},
        )


# The MODEL


def test_outside_of_comfyui_there_is_no_model():
    with pytest.raises(ValueError, match="inside ComfyUI only"):
        ToModel.convert(loaded_dit(), **OPEN)


def test_an_old_comfyui_is_told(comfyui, monkeypatch):
    monkeypatch.delattr(comfyui["supported_models"], "Flux2")
    with pytest.raises(ValueError, match=r"does not know FLUX\.2; update it"):
        ToModel.convert(loaded_dit(), **OPEN)


def test_a_model_has_no_weights_and_the_schedule_of_its_size(comfyui):
    (model,) = ToModel.convert(loaded_dit(), **{**OPEN, "width": 96, "num_steps": 8})
    assert list(model.model.state_dict()) == [] and model.model.model_type == "flux"
    mu = model.model.model_config.sampling_settings["shift"]
    times = torch.linspace(1, 0, 9, dtype=torch.float64)[:-1]
    native = math.exp(mu) / (math.exp(mu) + (1 / times - 1))  # ComfyUI's schedule for FLUX
    assert torch.allclose(native, sigma_schedule(8, 24)[:-1], rtol=0, atol=1e-12)
    assert comfyui["supported_models"].Flux2.sampling_settings == {"shift": 2.02}
    # Factors made for the released autoencoder would show noise.
    assert model.model.model_config.latent_format.latent_rgb_factors is None


def test_conditions_are_handed_on_uncast(comfyui):
    (model,) = ToModel.convert(loaded_dit(GUIDED), **OPEN)
    references = [torch.zeros(1, 128, 2, 3)]
    found = model.model.extra_conds(**options(guidance=3.7, reference_latents=references))
    assert found["guidance"] == ("CONDConstant", 3.7) and found["ref_latents"] == ("CONDList", references)
    assert found["c_crossattn"][0] == "CONDRegular" and found["c_crossattn"][1].shape == (1, 24, 192)
    assert set(model.model.extra_conds(**options())) == {"c_crossattn", "guidance"}
    assert model.model.extra_conds_shapes(**options(reference_latents=references)) == {"ref_latents": [1, 128, 6]}


def test_memory_counts_rows_references_and_text(comfyui):
    loaded = loaded_dit()
    (model,) = ToModel.convert(loaded, **OPEN)
    required = model.model.memory_required
    one = required([1, 128, 8, 8])
    assert one == step_bytes(loaded, 1, 64, 24)
    assert required([2, 128, 8, 8]) == step_bytes(loaded, 2, 64, 24) > one
    shapes = {"ref_latents": [[1, 128, 36]], "c_crossattn": [[1, 30, 192]]}
    assert required([1, 128, 8, 8], cond_shapes=shapes) == step_bytes(loaded, 1, 100, 30)
    (caching,) = ToModel.convert(loaded_dit(CACHING), **OPEN)
    with_cache = caching.model.memory_required([1, 128, 8, 8], cond_shapes=shapes)
    keys_and_values = 2 * 6 * 36 * TINY.dit.hidden_size * 4
    assert with_cache == step_bytes(loaded, 1, 100, 30, 36, "exact") > step_bytes(loaded, 1, 64, 30) + keys_and_values


def test_a_model_is_not_patched_merged_or_saved(comfyui):
    (model,) = ToModel.convert(loaded_dit(), **OPEN)
    with pytest.raises(ValueError, match=r"FLUX\.2 Apply LoRA, before FLUX\.2 to MODEL"):
        model.add_patches({}, 1.0)
    with pytest.raises(ValueError, match=r"FLUX\.2 Apply LoRA"):
        model.add_hook_patches(None, {})
    with pytest.raises(ValueError, match=r"FLUX\.2 Save Merged DiT"):
        model.get_key_patches("diffusion_model.")
    with pytest.raises(ValueError, match=r"FLUX\.2 Save Merged DiT"):
        model.model.state_dict_for_saving()
    with pytest.raises(ValueError, match="replaces diffusion_model"):
        model.add_object_patch("diffusion_model.img_in", None)
    with pytest.raises(ValueError, match=r"that of Load FLUX\.2 DiT"):
        model.add_object_patch("manual_cast_dtype", torch.float16)
    model.add_object_patch("model_sampling", "another schedule")
    assert model.objects == {"model_sampling": "another schedule"}


def test_the_end_of_sampling_frees_loras(comfyui, tmp_path):
    save_file(random_lora(0), path := tmp_path / "one.safetensors")
    (model,) = ToModel.convert(loaded_dit(loras=(LoraSetting(lora=read_lora(path, DIT_TINY)),)), **OPEN)
    network = model.model.diffusion_model
    network(random_like(1, 128, 4, 4), torch.tensor([0.7]), random_like(1, 24, 192))
    assert network._adapters is not None
    model.cleanup()
    assert network._adapters is None and model.is_clean


# Sigmas


@pytest.mark.parametrize(("flow_shift", "num_steps"), [(0.0, 0), (3.0, 7)])
def test_sigmas_are_those_of_flux2_sample(flow_shift, num_steps):
    (sigmas,) = Sigmas.compute(loaded_dit(), **{**OPEN, "flow_shift": flow_shift, "num_steps": num_steps})
    wanted = sigma_schedule(num_steps or 20, 16, flow_shift or None)
    assert sigmas.dtype == torch.float32 and torch.equal(sigmas, wanted.float())


def test_a_shift_of_one_s_own_is_an_exponent_for_comfyui():
    sampling = SamplingConfig(width=64, height=64, num_steps=4, flow_shift=3.0)
    half = torch.tensor(0.5, dtype=torch.float64)
    assert math.exp(shift_exponent(sampling)) == pytest.approx(3.0)
    assert float(shift_sigmas(half, 3.0)) == pytest.approx(0.75)


@pytest.mark.parametrize("node", [Sigmas, ToModel])
def test_a_size_that_cannot_be_is_refused_before_the_queue(node):
    assert node.VALIDATE_INPUTS(width=0, height=0, num_steps=0) is True
    assert node.VALIDATE_INPUTS(width=None, height=512, num_steps=None) is True
    assert "multiple of 16" in str(node.VALIDATE_INPUTS(width=1000))


# VAE


def test_a_vae_codes_as_the_autoencoder(autoencoder):
    vae, pixels = BridgedVAE(autoencoder), torch.rand(2, 50, 70, 3, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(pixels)
    cropped = pixels[:, 1:49, 3:67].movedim(-1, 1)
    assert latents.shape == (2, 128, 3, 4)
    assert torch.allclose(latents, autoencoder.encode(cropped * 2 - 1), atol=1e-5)
    assert torch.allclose(vae.encode_tiled(pixels, tile_x=512, tile_y=512, overlap=64), latents, atol=1e-4)

    images = vae.decode(latents)
    expected = ((autoencoder.decode(latents) + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert images.shape == (2, 48, 64, 3) and torch.allclose(images, expected, atol=1e-5)
    assert images.min() >= 0 and images.max() <= 1
    tiled = vae.decode_tiled(latents, tile_x=32, tile_y=32, overlap=4, tile_t=16, overlap_t=2)
    assert torch.allclose(tiled, images, atol=1e-4)
    assert set(vae.get_sd()) == set(autoencoder.state_dict())


def test_tiled_nodes_choose_the_size_of_strips(autoencoder, monkeypatch):
    asked = []
    for name, way in (("encode_tiled", autoencoder.encode), ("decode_tiled", autoencoder.decode)):
        monkeypatch.setattr(
            autoencoder, name, lambda x, name=name, way=way, **settings: asked.append((name, settings)) or way(x)
        )
    vae = BridgedVAE(autoencoder)
    latents = vae.encode_tiled(torch.rand(1, 64, 64, 3), tile_x=512, tile_y=512, overlap=64)
    vae.decode_tiled(latents, tile_x=32, tile_y=32, overlap=4)
    assert asked == [("encode_tiled", {"tile": 32}), ("decode_tiled", {"tile": 32})]


def test_without_memory_for_the_whole_picture_it_is_done_in_strips(autoencoder, monkeypatch, caplog):
    vae, latents = BridgedVAE(autoencoder), random_like(1, 128, 3, 4)
    expected, whole, tried = vae.decode(latents), autoencoder.decode, []

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def strips(x: torch.Tensor, store: torch.device | None = None) -> torch.Tensor:
        tried.append(store)
        return fail(x) if store is None else whole(x)

    monkeypatch.setattr(autoencoder, "decode", fail)
    monkeypatch.setattr(autoencoder, "decode_tiled", strips)
    assert torch.equal(vae.decode(latents), expected) and "in strips" in caplog.text
    assert tried == [None, torch.device("cpu")]
    monkeypatch.setattr(autoencoder, "decode_tiled", lambda x, store=None: fail(x))
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(latents)
    monkeypatch.setattr(autoencoder, "decode", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae.decode(latents)


def test_a_vae_refuses_other_latents_and_asks_for_room(autoencoder, monkeypatch):
    asked = []
    monkeypatch.setattr(native_encoders.host, "make_room", asked.append)
    vae = BridgedVAE(autoencoder)
    with pytest.raises(ValueError, match="the input of VAE Decode has latents of shape"):
        vae.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match=r"\[batch, height, width, 3\]"):
        vae.encode(torch.zeros(1, 4, 64, 64, 3))
    asked.clear()
    vae.decode(random_like(1, 128, 2, 2))
    vae.decode(random_like(1, 128, 4, 4))
    assert len(asked) == 2 and 0 < asked[0] < asked[1]


# CLIP


def test_a_clip_encodes_as_the_text_encoder():
    clip = BridgedCLIP(Text())  # pyright: ignore[reportArgumentType]
    ((embedding, others),) = clip.encode_from_tokens_scheduled(clip.tokenize("a (red:1.2) circle"))
    assert embedding.shape == (1, 24, 192) and embedding[0, 0, 0] == 18 and others == {"pooled_output": None}
    tokens = clip.clone().tokenize("abc", llama_template="x")
    ((_, others),) = clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": 3.0})
    assert others == {"pooled_output": None, "guidance": 3.0}
    pair = clip.encode_from_tokens(tokens, return_pooled=True)
    assert pair[1] is None and torch.equal(pair[0], clip.encode("abc"))
    assert set(clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)) == {"cond", "pooled_output"}


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda clip: clip.tokenize("a")["t5xxl"], "'t5xxl' tokens"),
        (lambda clip: clip.clip_layer(-2), "remove CLIP Set Last Layer"),
        (lambda clip: clip.add_patches({}, 1.0), "LoraLoaderModelOnly"),
        (lambda clip: clip.get_key_patches(), "LoraLoaderModelOnly"),
        (lambda clip: clip.set_tokenizer_option("t5_min_length", 512), "no tokenizer option 't5_min_length'"),
        (lambda clip: clip.load_model(), "no weights to save"),
    ],
)
def test_a_clip_refuses_what_it_cannot_do(act, text):
    with pytest.raises(ValueError, match=text):
        act(BridgedCLIP(Text()))  # pyright: ignore[reportArgumentType]


def test_native_prompts_and_pictures_run_through_the_executor(executor):
    tiny = "tiny (bundled)"
    prompt = {
        "te": {"class_type": "Flux2KitLoadTextEncoder", "inputs": {"text_encoder_name": tiny, "precision": "fp32"}},
        "dit": {"class_type": "Flux2KitLoadDiT", "inputs": {"dit_name": tiny, "variant": "auto", "precision": "fp32"}},
        "ae": {"class_type": "Flux2KitLoadAE", "inputs": {"ae_name": tiny}},
        "clip": {"class_type": "Flux2KitToCLIP", "inputs": {"text_encoder": ["te", 0]}},
        "vae": {"class_type": "Flux2KitToVAE", "inputs": {"ae": ["ae", 0]}},
        "native": {"class_type": "CLIPTextEncode", "inputs": {"text": "a circle", "clip": ["clip", 0]}},
        "ours": {"class_type": "Flux2KitEncodePrompt", "inputs": {"text_encoder": ["te", 0], "prompt": "a circle"}},
        "sample": {
            "class_type": "Flux2KitSample",
            "inputs": {
                **{"dit": ["dit", 0], "positive": ["native", 0], "num_steps": 1, "cfg_scale": 1.0, "guidance": 0.0},
                **{"width": 64, "height": 64, "flow_shift": 0.0, "seed": 0, "num_images": 1},
            },
        },
        "image": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}},
        "again": {"class_type": "VAEEncode", "inputs": {"pixels": ["image", 0], "vae": ["vae", 0]}},
        "decode": {
            "class_type": "Flux2KitDecode",
            "inputs": {"ae": ["ae", 0], "latent": ["sample", 0], "tiling": False},
        },
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["image", 0]}},
    }
    outputs = executor.run(prompt)
    assert torch.equal(outputs["native"][0][0][0], outputs["ours"][0][0][0])
    assert (outputs["image"][0] - outputs["decode"][0]).abs().max() <= 0.5 / 255 + 1e-6
    assert outputs["again"][0]["samples"].shape == (1, 128, 4, 4)


def test_options_that_stop_a_native_sampler_stop_ours():
    from flux2_kit.nodes.conditioning import UNSUPPORTED_OPTIONS

    # Areas and masks are the work of native samplers.
    assert set(UNSUPPORTED_OPTIONS) - set(native_model.UNSUPPORTED_OPTIONS) == {"area", "mask"}
