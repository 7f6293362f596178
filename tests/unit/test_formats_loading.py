"""Loading a DiT into a weight format: while the file streams in, LoRAs merged before, fp8 files as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import checkpoint, fp8
from flux2_kit.flux2_core.checkpoint import is_quantised_layer, load_dit, save_dit
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.images import image_to_tensor
from flux2_kit.flux2_core.linear import FORMATS, Linear
from flux2_kit.flux2_core.lora import LoraSetting, merge_loras, merged_weight
from flux2_kit.flux2_core.lora_factors import Lora, LoraFactors, LoraReport
from flux2_kit.flux2_core.lora_files import linear_shapes
from flux2_kit.flux2_core.pipeline import Flux2Pipeline, GenerateRequest, Generation, SamplingConfig, load_pipeline
from flux2_kit.flux2_core.state_dict import convert
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import TINY_FILES, TINY_FOLDER
from flux2_kit.training.tiny.evaluate import judge
from flux2_kit.training.tiny.pictures import Scene
from safetensors.torch import save_file
from torch import Tensor

SMALL = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
VARIANT = replace(VARIANTS["klein-4b"], dit=SMALL)
FORMAT_NAMES = ("fp8", "nf4")
LAYER = "single_blocks.1.linear1"
TINY_DIT = TINY_FOLDER / TINY_FILES["dit"]


def load(path: Path, **options) -> Flux2DiT:
    return load_dit(path, variants={VARIANT.name: VARIANT}, **options)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(scope="module")
def dit() -> Flux2DiT:
    torch.manual_seed(0)
    return Flux2DiT(SMALL).requires_grad_(False)


@pytest.fixture(scope="module", params=["bfl", "diffusers"])
def path(dit, tmp_path_factory, request) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit") / "x.safetensors", dit, VARIANT, request.param)


@pytest.fixture(scope="module")
def lora() -> Lora:
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for layer, (rows, columns) in linear_shapes(SMALL).items():
        if layer in (LAYER, "img_in"):
            lora_A, lora_B = (torch.randn(s, generator=generator) / 8 for s in ((4, columns), (rows, 4)))
            layers[layer] = (LoraFactors(lora_A=lora_A, lora_B=lora_B, alpha=4.0),)
    report = LoraReport(dialects=(), groups=(), unmatched=())
    return Lora(name="x", config=SMALL, layers=layers, report=report, metadata={})


# Which layers, and with what


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_blocks_are_quantised_and_all_else_is_plain(dit, path, weight_format, dtype):
    with torch.inference_mode():
        loaded = load(path, precision=weight_format, dtype=dtype)
    plain = load(path, dtype=dtype)
    assert loaded.dtype == (dtype or torch.float32) and not loaded.training
    num_quantised = 0
    for name, module in loaded.named_modules():
        if not isinstance(module, Linear):
            continue
        original = plain.get_submodule(name).weight
        if name.split(".")[0] not in ("double_blocks", "single_blocks"):
            assert module.weight_format is None and equal(module.weight, original)
            continue
        num_quantised += 1
        weight, scale = FORMATS[weight_format].quantise(dit.get_submodule(name).weight)  # from the file's own type
        assert module.weight_format == weight_format and module.weight_scale is not None
        assert equal(module.weight, weight) and equal(module.weight_scale, scale)
    assert num_quantised == 8 + 2 * 2
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in loaded.state_dict().values())


def test_bf16_is_a_precision_too(path):
    assert {p.dtype for p in load(path, precision="bf16").parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="contradict"):
        load(path, precision="bf16", dtype=torch.float32)


@pytest.mark.parametrize("precision", [None, "bf16", *FORMAT_NAMES])
def test_loras_are_merged_before_the_weights_are_quantised(dit, path, lora, precision):
    loaded = load(path, precision=precision, merge=[LoraSetting(lora=lora, strength=0.5)])
    for layer in (LAYER, "img_in"):
        merged = merged_weight(dit.get_submodule(layer).weight, [(lora.layers[layer][0], 0.5)])
        assert relative(merged, dit.get_submodule(layer).weight) > 0.1
        module = loaded.get_submodule(layer)
        if precision in FORMAT_NAMES and layer == LAYER:
            weight, scale = FORMATS[precision].quantise(merged)
            assert equal(module.weight, weight) and equal(module.weight_scale, scale)
        else:
            assert equal(module.weight, merged.to(module.weight.dtype))
    if precision is None:
        expected = load(path)
        merge_loras(expected, [LoraSetting(lora=lora, strength=0.5)])
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_loras_that_do_not_fit_or_overflow_are_refused(path, lora):
    other = replace(SMALL, hidden_size=128, num_heads=4)
    layers = {"img_in": (LoraFactors(lora_A=torch.ones(1, 128), lora_B=torch.ones(128, 1)),)}
    with pytest.raises(ValueError, match="give a LoRA of this model's size"):
        load(path, merge=[LoraSetting(lora=replace(lora, config=other, layers=layers))], precision="fp8")
    (factors,) = lora.layers["img_in"]
    huge = replace(lora, layers={"img_in": (replace(factors, lora_B=factors.lora_B * 1e6),)})
    with pytest.raises(ValueError, match=r"merging makes img_in.weight too large for torch.float16"):
        load(path, merge=[LoraSetting(lora=huge)], dtype=torch.float16)
    layers = {LAYER: tuple(replace(f, lora_B=f.lora_B * 1e6) for f in lora.layers[LAYER])}
    with pytest.raises(ValueError, match=rf"merging makes {LAYER}.weight too large for torch.float32"):
        load(path, merge=[LoraSetting(lora=replace(lora, layers=layers), strength=1e38)], precision="fp8")


# Files that are fp8 already


def fp8_file(dit: Flux2DiT, path: Path, style: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Writes an fp8 file; answers numbers and scale per row of each quantised weight in BFL's layout."""
    generator = torch.Generator().manual_seed(2)
    layout = "diffusers" if style == "diffusers" else "bfl"
    numbers, scales, stored = {}, {}, {}
    for name, tensor in convert(dit.state_dict(), "dit", "bfl", layout).items():
        if "blocks" not in name or tensor.dim() != 2:
            stored[name] = tensor.bfloat16()
            continue
        dtype = torch.float8_e5m2 if style == "e5m2" else torch.float8_e4m3fn
        stored[name] = numbers[name] = (tensor * 300).to(dtype)
        rows = tensor.shape[0]
        scale = torch.rand((rows, 1) if style == "rows" else (), generator=generator)
        scales[name] = torch.ones(rows, 1) if style == "unscaled" else scale.expand(rows, 1).clone()
        module = name.removesuffix(".weight")
        if style == "scale_weight":
            stored |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.rand(())}
        elif style == "half":
            stored[f"{module}.weight_scale"] = scale.reshape(1).bfloat16()
            scales[name] = scale.bfloat16().float().expand(rows, 1).clone()
        elif style != "unscaled":
            stored |= {f"{module}.weight_scale": scale, f"{module}.input_scale": torch.rand(())}
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if style == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    prefix = "" if layout == "diffusers" else "model.diffusion_model."
    save_file({prefix + name: tensor.contiguous() for name, tensor in stored.items()}, path)
    if layout == "diffusers":
        rest = {name: tensor for name, tensor in stored.items() if "blocks" not in name or tensor.dim() != 2}
        rest = {name: tensor for name, tensor in rest.items() if not name.endswith(("_scale", "_quant"))}
        numbers = convert(rest | numbers, "dit", layout, "bfl")
        scales = convert(rest | scales, "dit", layout, "bfl")
    return {name: (numbers[name], scales[name]) for name in scales if is_quantised_layer(name)}


@pytest.mark.parametrize("style", ["weight_scale", "scale_weight", "rows", "half", "unscaled", "e5m2", "diffusers"])
def test_fp8_files_keep_their_numbers(tmp_path, dit, style):
    expected = fp8_file(dit, tmp_path / "klein.safetensors", style)
    loaded = load(tmp_path / "klein.safetensors", precision="fp8")
    multiplied_out = load(tmp_path / "klein.safetensors")
    assert len(expected) == 12 and loaded.dtype == torch.bfloat16
    for name, (numbers, scale) in expected.items():
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear) and layer.weight_scale is not None
        assert equal(layer.weight, numbers) and equal(layer.weight_scale, scale), name
        assert torch.equal(layer.dense_weight(), multiplied_out.get_parameter(name)), name
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert loaded.get_submodule(LAYER)(x).isfinite().all()


def test_fp8_numbers_that_cannot_be_kept_are_rounded_once_more(tmp_path, dit, lora):
    path = tmp_path / "klein.safetensors"
    fp8_file(dit, path, "rows")
    dense = load(path)
    (factors,) = lora.layers[LAYER]
    merged = merged_weight(load(path, dtype=torch.float32).get_submodule(LAYER).weight, [(factors, 1.0)])
    loaded = load(path, precision="fp8", merge=[LoraSetting(lora=lora)]).get_submodule(LAYER)
    assert equal(loaded.weight, FORMATS["fp8"].quantise(merged)[0])
    packed = load(path, precision="nf4").get_submodule(LAYER)
    assert relative(packed.dense_weight(), dense.get_submodule(LAYER).weight) < 0.15

    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    state[f"{LAYER}.weight_scale"] = torch.rand(state[f"{LAYER}.weight"].shape[0], 4)
    save_file(state, path)
    blocks = load(path, precision="fp8").get_submodule(LAYER)
    assert relative(blocks.dense_weight(), load(path).get_submodule(LAYER).weight) < 0.03


def test_numbers_of_a_large_fp8_file_stay_mapped(tmp_path, dit, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAPPED_FROM_BYTES", 0)
    path = tmp_path / "klein.safetensors"
    expected = fp8_file(dit, path, "rows")
    before = path.read_bytes()
    weight = load(path, precision="fp8").get_submodule(LAYER).weight
    assert equal(weight, expected[f"{LAYER}.weight"][0])
    region = next(
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= weight.data_ptr() < int(line.split()[0].split("-")[1], 16)
    )
    assert region.endswith(str(path))
    weight.view(torch.uint8).zero_()
    assert path.read_bytes() == before


# Memory


PEAK = """
import json, sys
from dataclasses import replace
import torch
from flux2_kit.flux2_core.checkpoint import load_dit
from flux2_kit.flux2_core.dit import DiTConfig
from flux2_kit.flux2_core.linear import FORMATS
from flux2_kit.flux2_core.variants import VARIANTS
path, precision, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
variant = replace(VARIANTS["klein-4b"], dit=DiTConfig(**fields))
FORMATS[precision].quantise(torch.ones(64, 64))  # libraries are no part of what is measured
def memory(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = memory("VmRSS")
dit, _ = load_dit(path, precision=precision, variants={variant.name: variant})
print(memory("VmHWM") - before, sum(tensor.nbytes for tensor in dit.state_dict().values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("precision", FORMAT_NAMES)
def test_the_peak_is_the_result_and_one_layer(tmp_path, precision):
    fields = {"hidden_size": 768, "num_heads": 6, "num_double_blocks": 1, "num_single_blocks": 10, "context_dim": 64}
    config = DiTConfig(**fields, has_guidance_embedder=False)
    largest = 9 * 768**2 * 2  # linear1 in bf16
    path = tmp_path / "klein-4b.safetensors"
    with torch.device("meta"):
        dit = Flux2DiT(config)
    dit = dit.bfloat16().to_empty(device="cpu").requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.02)
    save_dit(path, dit, replace(VARIANTS["klein-4b"], dit=config))
    command = [sys.executable, "-c", PEAK, str(path), precision, json.dumps(fields | {"has_guidance_embedder": False})]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, result = (int(number) for number in output.split())
    slices = {"fp8": 2**25, "nf4": 3 * 2**24}[precision]  # through which a layer is quantised
    assert result - 2**24 < peak <= result + largest + slices, (peak, result, largest)
    assert result < sum(parameter.nbytes for parameter in dit.parameters()) * {"fp8": 0.6, "nf4": 0.4}[precision]


# The bundled model


REQUEST = GenerateRequest(
    prompt="a large red circle at the top left on a blue background", sampling=SamplingConfig(seed=0)
)


@pytest.fixture(scope="module")
def picture() -> Generation:
    return load_pipeline("tiny", dtype=torch.float32).generate(REQUEST)


@pytest.mark.parametrize(
    ("precision", "mode", "limit"), [("fp8", None, 0.06), ("fp8", "rows", 0.18), ("nf4", None, 0.25)]
)
def test_pictures_of_the_bundled_model_stay_right(picture, monkeypatch, precision, mode, limit):
    monkeypatch.setitem(fp8._scaled_mm, -1, mode)  # activations in 8 bits as well, as on a GPU
    plain = load_pipeline("tiny", dtype=torch.float32)
    dit, _ = load_dit(TINY_DIT, "tiny", torch.float32, precision=precision)
    pipeline = Flux2Pipeline(
        variant=plain.variant, dit=dit, autoencoder=plain.autoencoder, text_encoder=plain.text_encoder
    )
    result = pipeline.generate(REQUEST)
    assert limit / 4 < relative(result.latents, picture.latents) < limit
    (scene,) = judge(image_to_tensor(result.images[0]) / 2 + 0.5)
    assert scene == Scene(kind="circle", color="red", size="large", position="top left", background="blue")
