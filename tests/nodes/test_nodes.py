"""What single nodes do: loading, native types, progress and stop, and refusals of bad input."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from flux2_kit.flux2_core.variants import VARIANTS
from PIL import Image

TINY = "tiny (bundled)"
PROMPT = "a large red circle"


@pytest.fixture
def models(nodes):
    """(dit, ae, text encoder) of random weights."""
    (dit,) = nodes["Flux2KitLoadDiT"].load(TINY, "auto", "default")
    (ae,) = nodes["Flux2KitLoadAE"].load(TINY)
    (text_encoder,) = nodes["Flux2KitLoadTextEncoder"].load(TINY, "default")
    return SimpleNamespace(dit=dit, ae=ae, text_encoder=text_encoder)


@pytest.fixture
def sample(nodes, models):
    """FLUX.2 Sample with two steps, no CFG, and every other widget at its default."""
    node_class = nodes["Flux2KitSample"]
    (positive,) = nodes["Flux2KitEncodePrompt"].encode(models.text_encoder, PROMPT)
    widgets = {
        name: options["default"]
        for name, (_, options) in node_class.INPUT_TYPES()["required"].items()
        if "default" in options
    }
    usual = {**widgets, "dit": models.dit, "positive": positive, "num_steps": 2, "cfg_scale": 1.0}

    def run(**changed):
        return node_class.sample(**{**usual, **changed})[0]["samples"]

    run.positive = positive
    return run


def grey(*size: int) -> torch.Tensor:
    return torch.full((1, *size, 3), 0.5)


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_weights_in_use_are_not_loaded_twice(nodes, models, tmp_path, random_tiny_files, host, monkeypatch):
    load = nodes["Flux2KitLoadDiT"].load
    assert load(TINY, "auto", "default")[0] is models.dit
    assert load(TINY, "auto", "bf16")[0].dit.dtype == torch.bfloat16

    copy = tmp_path / "dit.safetensors"
    shutil.copy(random_tiny_files.dit, copy)
    monkeypatch.setattr(host, "bundled_path", lambda component: copy)
    before, loaded = nodes["Flux2KitLoadDiT"].IS_CHANGED(dit_name=TINY), load(TINY, "auto", "default")[0]
    assert nodes["Flux2KitLoadDiT"].IS_CHANGED(dit_name=TINY, variant="auto", precision="default") == before
    os.utime(copy, ns=(1, 1))
    assert nodes["Flux2KitLoadDiT"].IS_CHANGED(dit_name=TINY) != before
    assert load(TINY, "auto", "default")[0] is not loaded


def test_weights_loaded_in_a_node_can_be_trained(nodes, host, random_tiny_files):
    sys.modules[f"{host.__package__}.loaders"]._in_use.clear()
    with torch.inference_mode():
        (dit,) = nodes["Flux2KitLoadDiT"].load(TINY, "tiny", "default")
        (ae,) = nodes["Flux2KitLoadAE"].load(TINY)
        (text_encoder,) = nodes["Flux2KitLoadTextEncoder"].load(TINY, "default")
        ((embeddings, _),) = nodes["Flux2KitEncodePrompt"].encode(text_encoder, PROMPT)[0]
    assert not embeddings.is_inference()
    for module in (dit.dit, ae, text_encoder.model):
        assert not any(tensor.is_inference() for tensor in module.state_dict().values())


@pytest.mark.parametrize("precision", ["fp32", "fp8", "nf4"])
def test_a_small_budget_streams_blocks_and_changes_no_number(nodes, models, sample, precision):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    load = nodes["Flux2KitLoadDiT"].load
    (resident,) = load(TINY, "auto", precision)
    least = error_budget(load, precision)
    (streamed,) = load(TINY, "auto", precision, least)
    assert resident.placed.streamer is None
    assert streamed.placed.streamer.num_resident < len(streamed.dit.double_blocks) + len(streamed.dit.single_blocks)
    assert torch.equal(sample(dit=streamed), sample(dit=resident))
    assert (precision == "fp32") == torch.equal(sample(dit=resident), sample())


def error_budget(load, precision: str) -> float:
    """The least budget that works, in GiB, out of the refusal of a smaller one."""
    with pytest.raises(ValueError) as error:
        load(TINY, "auto", precision, 1e-4)
    number, unit = re.search(r"([0-9.]+) ([MG]iB)", one_line(error).rpartition("least")[2]).groups()
    return (float(number) + 0.1) / (1024 if unit == "MiB" else 1)


def test_text_encoder_in_fp8_and_streamed(nodes):
    load, encode = nodes["Flux2KitLoadTextEncoder"].load, nodes["Flux2KitEncodePrompt"].encode
    plain, quantised, streamed = load(TINY, "default")[0], load(TINY, "fp8")[0], load(TINY, "default", 4e-4)[0]
    assert streamed.model.layers[0].forward.streamer.num_resident == 0
    expected = encode(plain, PROMPT)[0][0][0]
    assert torch.equal(encode(streamed, PROMPT)[0][0][0], expected)
    error = (encode(quantised, PROMPT)[0][0][0] - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    with pytest.raises(ValueError, match="does not fit") as refusal:
        load(TINY, "default", 1e-5)
    one_line(refusal)


def test_folders_of_comfyui(nodes, host, monkeypatch, tmp_path, random_tiny_files):
    names = ["flux/a.safetensors", "b.ckpt", "c-00001-of-00002.safetensors", "c-00002-of-00002.safetensors"]
    file = random_tiny_files.dit
    fake = SimpleNamespace(get_filename_list=lambda kind: names, get_full_path=lambda kind, name: str(file))
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    assert host.model_names("dit") == [TINY, "flux/a.safetensors", "c-00001-of-00002.safetensors"]
    assert nodes["Flux2KitLoadDiT"].load("flux/a.safetensors", "auto", "default")[0].variant.name == "tiny"
    with pytest.raises(ValueError, match="is not in ComfyUI's diffusion_models folder"):
        nodes["Flux2KitLoadDiT"].load("../../secret.safetensors", "auto", "default")


def test_comfyui_s_qwen_vocabulary_is_the_last_resort(nodes, host, monkeypatch, tmp_path, random_tiny_files):
    """ComfyUI's Qwen3 files have no tokenizer, and ComfyUI itself carries Qwen's vocabulary."""
    comfyui, folder = tmp_path / "ComfyUI", tmp_path / "text_encoders"
    shutil.copytree(random_tiny_files.text_encoder, folder)
    (folder / "tokenizer.json").unlink()
    fake = SimpleNamespace(
        __file__=str(comfyui / "folder_paths.py"),
        get_filename_list=lambda kind: ["model.safetensors"],
        get_full_path=lambda kind, name: str(folder / name),
    )
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    with pytest.raises(ValueError, match="no tokenizer for this qwen3 text encoder"):
        nodes["Flux2KitLoadTextEncoder"].load("model.safetensors", "default")
    vocabulary = comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}', encoding="utf-8")
    (vocabulary / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    (text_encoder,) = nodes["Flux2KitLoadTextEncoder"].load("model.safetensors", "default")
    assert text_encoder.tokenizer.backend.encode("ab", add_special_tokens=False).ids == [2]


def test_prompts_are_native_conditioning(sample, models):
    ((embeddings, options),) = sample.positive
    config = VARIANTS["tiny"].text_encoder
    assert embeddings.shape == (1, config.max_tokens, config.context_dim)
    assert options == {"pooled_output": None}, "native samplers ask for this key"


def test_native_prompts_are_padded_as_in_comfyui(pack):
    read = sys.modules[f"{pack.__name__}.nodes.conditioning"].read_conditioning
    embeddings, config = torch.ones(1, 7, 15360), VARIANTS["dev"].text_encoder
    prompt = read([[embeddings, {"guidance": 3.5, "reference_latents": [torch.ones(1)]}]], "positive", config)
    assert prompt.text.shape == (1, 512, 15360)
    assert prompt.text[:, :505].abs().sum() == 0 and (prompt.text[:, 505:] == 1).all()
    assert (prompt.guidance, len(prompt.references)) == (3.5, 1)


def test_guidance_comes_from_the_widget_then_the_prompt_then_the_variant(pack):
    config = sys.modules[f"{pack.__name__}.nodes.sampling"].sampling_config
    assert config({"guidance": 2.0}, 3.5).guidance == 2.0
    assert config({"guidance": 0.0}, 3.5).guidance == 3.5
    assert config({"guidance": 0.0}, None).resolved(VARIANTS["dev"]).guidance == VARIANTS["dev"].guidance
    opened = config({"width": 0, "num_steps": 0, "cfg_scale": 0, "flow_shift": 0, "seed": 0, "num_images": 1}, None)
    assert opened.resolved(VARIANTS["klein-4b"]).num_steps == 4 and opened.seed == 0 and opened.flow_shift is None


def test_the_picture_is_that_of_the_pipeline(nodes, models, sample):
    from flux2_kit.flux2_core.pipeline import Flux2Pipeline, GenerateRequest, SamplingConfig

    pipeline = Flux2Pipeline(
        variant=models.dit.variant, dit=models.dit.dit, autoencoder=models.ae, text_encoder=models.text_encoder
    )
    colours = torch.rand(1, 80, 100, 3, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    picture = Image.fromarray(colours[0].mul(255).round().to(torch.uint8).numpy())
    request = GenerateRequest(
        prompt=PROMPT, references=(picture,), sampling=SamplingConfig(num_steps=2, cfg_scale=3.0, seed=7, num_images=2)
    )
    wanted = pipeline.generate(request)

    (references,) = nodes["Flux2KitEncodeReference"].encode(models.ae, colours, True, False)
    (negative,) = nodes["Flux2KitEncodePrompt"].encode(models.text_encoder, "")
    samples = sample(references=references, negative=negative, cfg_scale=3.0, seed=7, num_images=2)
    assert torch.equal(samples, wanted.latents)
    (images,) = nodes["Flux2KitDecode"].decode(models.ae, {"samples": samples}, False)
    levels = (images * 255).to(torch.uint8)  # as native Save Image does it: without rounding
    assert [Image.fromarray(level.numpy()).tobytes() for level in levels] == [p.tobytes() for p in wanted.images]


def test_references_chain_and_are_scaled_by_their_number(nodes, models, monkeypatch):
    encode = nodes["Flux2KitEncodeReference"].encode
    ae = models.ae
    monkeypatch.setattr(ae, "config", replace(ae.config, reference_sides=(128, 64)))
    (one,) = encode(ae, grey(200, 200), True, False)
    (three,) = encode(ae, torch.cat([grey(200, 200)] * 2), True, False, one)
    assert [tuple(latents.shape[-2:]) for latents in one.latents] == [(8, 8)]
    assert [tuple(latents.shape[-2:]) for latents in three.latents] == [(4, 4)] * 3
    assert three.latents is three.latents, "encoded once"
    with pytest.raises(ValueError, match="need the same ae, resize and tiling") as error:
        encode(ae, grey(64, 64), False, False, one)
    one_line(error)


def test_transparency_is_composited_on_white(pack):
    pictures = sys.modules[f"{pack.__name__}.nodes.conditioning"].image_to_pictures
    image = torch.zeros(1, 64, 64, 4)
    image[:, :32, :, 3] = 1
    (picture,) = pictures(image)
    assert picture.getpixel((0, 0)) == (0, 0, 0) and picture.getpixel((0, 63)) == (255, 255, 255)


def test_native_references_and_ours_are_the_same(nodes, models, sample):
    (references,) = nodes["Flux2KitEncodeReference"].encode(models.ae, grey(64, 80), True, False)
    native = [[sample.positive[0][0], {"reference_latents": references.latents}]]
    with_ours = sample(references=references)
    assert torch.equal(sample(positive=native), with_ours) and not torch.equal(sample(), with_ours)
    with pytest.raises(ValueError, match="not both") as error:
        sample(positive=native, references=references)
    one_line(error)


class Interrupted(BaseException):
    """Like ComfyUI's: no Exception, so that nothing but the server catches it."""


class Bar:
    bars: ClassVar[list[Bar]] = []

    def __init__(self, total, node_id=None):
        self.total, self.node_id, self.updates = total, node_id, []
        Bar.bars.append(self)

    def update_absolute(self, value, total=None, preview=None):
        self.updates.append((value, total, preview))


@pytest.fixture
def comfyui(monkeypatch):
    """Stand-ins for the parts of ComfyUI that a running node calls; `stop_after` steps the user presses stop."""
    state = SimpleNamespace(stop_after=10**9, polls=0, texts=[], freed=[])

    def poll():
        state.polls += 1
        if state.polls > state.stop_after:
            raise Interrupted

    def module(name, **content):
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    server = SimpleNamespace(send_progress_text=lambda text, node_id: state.texts.append((text, node_id)))
    module(
        "comfy.model_management",
        get_torch_device=lambda: torch.device("cpu"),
        free_memory=lambda num_bytes, device: state.freed.append(num_bytes),
        throw_exception_if_processing_interrupted=poll,
    )
    module("comfy.utils", ProgressBar=Bar)
    module("server", PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setattr(Bar, "bars", [])
    return state


def test_progress_preview_and_text(comfyui, sample, models):
    sample(ae=models.ae, unique_id="12", num_steps=3)
    (bar,) = Bar.bars
    assert (bar.total, bar.node_id) == (3, "12")
    assert [update[:2] for update in bar.updates] == [(1, 3), (2, 3), (3, 3)]
    for _, _, (kind, picture, side) in bar.updates:
        assert kind == "JPEG" and picture.size == (8, 8) and picture.mode == "RGB" and side == 512
    assert comfyui.texts == [("tiny, 64x64, 3 steps", "12")]
    sample(unique_id="12")
    assert all(preview is None for _, _, preview in Bar.bars[1].updates)


def test_stop_comes_through_within_a_step(comfyui, sample):
    comfyui.stop_after = 2
    with pytest.raises(Interrupted):
        sample(num_steps=9)
    assert len(Bar.bars[0].updates) == 2


def test_room_is_made_before_loading(comfyui, nodes, host, random_tiny_files):
    sys.modules[f"{host.__package__}.loaders"]._in_use.clear()
    loaded = nodes["Flux2KitLoadDiT"].load(TINY, "auto", "default")
    nodes["Flux2KitLoadDiT"].load(TINY, "auto", "default")
    assert loaded and comfyui.freed == [random_tiny_files.dit.stat().st_size]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": float("nan"), "dev": True}, r"guidance is nan; it must be a finite number"),
        ({"guidance": 4.0}, r"tiny has no guidance embedder; use cfg_scale"),
        ({"cfg_scale": float("inf")}, r"cfg_scale is inf; it must be a finite number"),
        ({"flow_shift": float("nan")}, r"flow_shift is nan"),
        ({"width": 100}, r"the width is 100 px; it must be a multiple of 16 and at least 64\. The nearest is 96"),
        ({"height": 32}, r"the height is 32 px"),
        ({"num_steps": -1}, r"the number of steps is -1; it must lie in 1\.\.1000"),
        ({"seed": 2**64}, r"the seed is 18446744073709551616; it must lie in 0\.\."),
        ({"num_images": 0}, r"the number of images is 0; it must be at least 1"),
        ({"cfg_scale": 4.0}, r"there is no negative prompt; give one"),
    ],
)
def test_bad_settings(sample, settings, message):
    settings.pop("dev", None)
    with pytest.raises(ValueError, match=message) as error:
        sample(**settings)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: [[text[..., :100], {}]], r"shape \(1, 24, 100\); tiny needs 192 channels. Encode the prompt"),
        (lambda text: [[text, {}]] * 2, r"positive combines 2 conditionings; FLUX.2 Sample takes one"),
        (lambda text: [[text, {"area": (1, 1, 0, 0)}]], r"positive carries an area, which FLUX.2 Sample does not do"),
        (lambda text: [[text, {"end_percent": 0.5}]], r"carries a range of steps"),
        (lambda text: [[text, {"guidance": 3.5}]], r"tiny has no guidance embedder"),
        (lambda text: [[text.expand(3, -1, -1), {}]], r"3 prompts were given for 1 pictures"),
        (lambda text: [[text, {"reference_latents": [torch.ones(1, 16, 8, 8)]}]], r"FLUX.2 needs \[batch, 128"),
        (lambda text: [[text, {"reference_latents": [torch.ones(2, 128, 4, 4)]}]], r"a batch of 2 latents"),
        (lambda text: [[text, {"reference_latents": [torch.ones(1, 128, 4, 4)] * 11}]], r"11 references were given"),
    ],
)
def test_bad_conditioning(sample, change, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(positive=change(sample.positive[0][0]))
    one_line(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "positive has guidance None and negative 2.0"),
        ({"reference_latents": [torch.ones(1, 128, 4, 4)]}, "positive has 0 references and negative 1 others"),
    ],
)
def test_a_negative_prompt_of_its_own_mind(sample, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(negative=[[sample.positive[0][0], options]])
    one_line(error)


def test_bad_references(nodes, models):
    encode = nodes["Flux2KitEncodeReference"].encode
    for size, message in (((10, 3000), "3000x10 px; each side must be at least 64"), ((64, 640), "a ratio of 10.0")):
        with pytest.raises(ValueError, match=message) as error:
            encode(models.ae, grey(*size), True, False)
        one_line(error)
    (ten,) = encode(models.ae, grey(64, 64).expand(10, -1, -1, -1), True, False)
    with pytest.raises(ValueError, match="11 references were given; at most 10 are allowed") as error:
        encode(models.ae, grey(64, 64), True, False, ten)
    one_line(error)
    with pytest.raises(ValueError, match=r"an image has shape \(1, 64, 64, 1\)"):
        encode(models.ae, torch.ones(1, 64, 64, 1), True, False)


def test_bad_latents(nodes, models):
    with pytest.raises(ValueError, match=r"shape \(1, 16, 8, 8\); FLUX.2 needs \[batch, 128") as error:
        nodes["Flux2KitDecode"].decode(models.ae, {"samples": torch.ones(1, 16, 8, 8)}, False)
    one_line(error)


def test_bad_files(nodes, host, monkeypatch, random_tiny_files):
    load, validate = nodes["Flux2KitLoadDiT"].load, nodes["Flux2KitLoadDiT"].VALIDATE_INPUTS
    missing = r"'gone\.safetensors' is not in ComfyUI's diffusion_models folder; put the file there"
    with pytest.raises(ValueError, match=missing) as error:
        load("gone.safetensors", "auto", "default")
    assert validate(dit_name="gone.safetensors") == one_line(error)
    assert validate(dit_name=TINY) is True and validate() is True
    with pytest.raises(ValueError, match="of the shape of tiny, not of dev; choose auto") as error:
        load(TINY, "dev", "default")
    one_line(error)
    with pytest.raises(ValueError, match="unknown precision 'int3'; known: default, bf16"):
        load(TINY, "auto", "int3")
    monkeypatch.setattr(host, "bundled_path", lambda component: random_tiny_files.autoencoder)
    with pytest.raises(ValueError, match=r"is a FLUX\.2 autoencoder, not a FLUX\.2 DiT") as error:
        load(TINY, "auto", "default")
    one_line(error)
    with pytest.raises(ValueError, match=r"is not a FLUX\.2 text encoder") as error:
        nodes["Flux2KitLoadTextEncoder"].load(TINY, "default")
    one_line(error)


def test_sizes_are_refused_before_the_queue(nodes):
    validate = nodes["Flux2KitSample"].VALIDATE_INPUTS
    assert validate(width=0, height=64) is True and validate(width=None) is True
    assert "The nearest is 96" in str(validate(width=100, height=64))


def test_the_server_refuses_what_no_widget_offers(executor):
    api = {
        "1": {"class_type": "Flux2KitLoadAE", "inputs": {"ae_name": "/etc/passwd"}},
        "2": {"class_type": "Flux2KitDecode", "inputs": {"ae": ["1", 0], "latent": ["1", 0], "tiling": False}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    }
    errors = dict(executor.validate(api))
    assert "is not in ComfyUI's vae folder" in errors["1"] and "received FLUX2_AE, wants LATENT" in errors["2"]


@pytest.mark.parametrize("num_failures", [1, 2])
def test_pictures_run_in_strips_where_memory_runs_out(nodes, models, monkeypatch, num_failures, caplog):
    """On the device first, then with whole tensors in host memory."""
    autoencoder = type(models.ae)
    calls: list[dict] = []

    def runs_out(method):
        original = getattr(autoencoder, method)

        def run(self, x, **settings):
            calls.append({"tiled": method.endswith("tiled"), **settings})
            if len(calls) <= num_failures:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, x, **settings)

        return run

    latents = {"samples": torch.randn(1, 128, 4, 5, generator=torch.manual_seed(3))}
    (expected,) = nodes["Flux2KitDecode"].decode(models.ae, latents, tiling=False)
    for method in ("encode", "encode_tiled", "decode", "decode_tiled"):
        monkeypatch.setattr(autoencoder, method, runs_out(method))
    ways = [{"tiled": False}, {"tiled": True, "store": None}, {"tiled": True, "store": torch.device("cpu")}]
    (picture,) = nodes["Flux2KitDecode"].decode(models.ae, latents, tiling=False)
    assert calls == ways[: num_failures + 1]
    assert torch.equal(picture, expected)
    assert "in strips" in caplog.text

    calls.clear()
    (references,) = nodes["Flux2KitEncodeReference"].encode(models.ae, grey(64, 64), resize=True, tiling=False)
    assert references.latents[0].shape == (1, 128, 4, 4)
    assert calls == ways[: num_failures + 1]


def test_other_errors_are_not_tried_again(nodes, models):
    with pytest.raises(ValueError, match="128"):
        nodes["Flux2KitDecode"].decode(models.ae, {"samples": torch.zeros(1, 16, 4, 4)}, tiling=False)
