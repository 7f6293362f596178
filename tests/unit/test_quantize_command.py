"""``flux2 quantize``: what is in the files, that they load as they are, LoRAs, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import checkpoint, fp8
from flux2_kit.flux2_core.checkpoint import DiTReader, load_dit
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.inspect_command import inspect_path
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.lora import LoraSetting
from flux2_kit.flux2_core.lora_files import linear_shapes, read_lora
from flux2_kit.flux2_core.quantized_files import quantise_checkpoint
from flux2_kit.flux2_core.tensor_source import TensorSource
from flux2_kit.flux2_core.variants import DIT_TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE_FORMATS = ("fp8", "fp8-comfy")
BLOCK_LAYERS = [layer for layer in linear_shapes(DIT_TINY) if "_blocks." in layer]
LAYER = "single_blocks.1.linear1"


def same(a: Tensor, b: Tensor) -> bool:
    bytes_of_both = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bytes_of_both)


def quantize(dit: Path, output: Path, file_format: str, *options: str) -> int:
    return main(["quantize", "--dit", str(dit), "--output", str(output), "--format", file_format, *options])


def write_lora(path: Path, size: float = 0.3) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in (LAYER, "img_in"):
        rows, columns = linear_shapes(DIT_TINY)[layer]
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * size
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=FILE_FORMATS)
def written(request, random_tiny_files, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("quantised") / "new" / f"{request.param}.safetensors"
    assert quantize(random_tiny_files.dit, path, request.param) == 0
    return request.param, path


def test_the_file_holds_what_its_format_says(written, random_tiny_files):
    file_format, path = written
    plain, found = load_file(random_tiny_files.dit), load_file(path)
    assert set(found) == set(plain) | {f"{layer}.weight_scale" for layer in BLOCK_LAYERS}
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if layer not in BLOCK_LAYERS:
            assert same(found[name], tensor.bfloat16()), name
            continue
        quantise = fp8.quantise if file_format == "fp8" else fp8.quantise_per_tensor
        weight, scale = quantise(tensor)
        assert same(found[name], weight) and same(found[f"{layer}.weight_scale"], scale), name
        assert scale.shape == ((tensor.shape[0], 1) if file_format == "fp8" else ())
        error = (weight.float() * scale - tensor).norm() / tensor.norm()
        assert error < 0.027


def test_comfyui_is_told_which_layers_and_inspect_what_it_is(written):
    file_format, path = written
    metadata = TensorSource(path).metadata
    (facts,) = inspect_path(path)
    assert facts["variant"] == metadata["flux2_kit.variant"] == "tiny"
    if file_format == "fp8-comfy":
        table = json.loads(metadata["_quantization_metadata"])
        assert table == {"format_version": "1.0", "layers": {n: {"format": "float8_e4m3fn"} for n in BLOCK_LAYERS}}
        assert (facts["layout"], facts["precision"]) == ("comfyui-scaled-fp8", "fp8 scaled + bf16")
    else:
        assert "_quantization_metadata" not in metadata and metadata["flux2_kit.weight_format"] == "fp8"
        assert (facts["layout"], facts["precision"]) == ("bfl", "fp8 scaled by row + bf16")


def test_it_loads_without_a_copy_or_a_conversion(written, random_tiny_files, monkeypatch):
    file_format, path = written
    monkeypatch.setattr(checkpoint, "MAPPED_FROM_BYTES", 0)
    loaded, variant = load_dit(path, precision="fp8")
    assert variant.name == "tiny" and loaded.dtype == torch.bfloat16
    regions = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for name, parameter in loaded.named_parameters():
        assert any(begin <= parameter.data_ptr() < end for begin, end in regions), name
    if file_format == "fp8":
        expected = load_dit(random_tiny_files.dit, "tiny", torch.bfloat16, precision="fp8")[0].state_dict()
        assert all(same(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_loras_are_merged_before(random_tiny_files, tmp_path, file_format):
    lora = write_lora(tmp_path / "lora.safetensors")
    path = tmp_path / "out.safetensors"
    assert (
        quantize(random_tiny_files.dit, path, file_format, "--lora_weight", str(lora), "--lora_multiplier", "0.5") == 0
    )
    setting = LoraSetting(lora=read_lora(lora, DIT_TINY), strength=0.5)
    found = load_file(path)
    if file_format == "fp8":
        expected, _ = load_dit(random_tiny_files.dit, "tiny", torch.bfloat16, precision="fp8", merge=[setting])
        assert all(same(tensor, expected.state_dict()[name]) for name, tensor in found.items())
    merged, _ = load_dit(random_tiny_files.dit, "tiny", merge=[setting])
    weight = merged.get_submodule(LAYER).weight
    back = found[f"{LAYER}.weight"].float() * found[f"{LAYER}.weight_scale"]
    assert (back - weight).norm() / weight.norm() < 0.027
    assert same(found["img_in.weight"], merged.img_in.weight.bfloat16())
    assert TensorSource(path).metadata["flux2_kit.merged_loras"] == "lora.safetensors 0.5"


def test_numbers_that_are_fp8_already_are_kept_where_the_scales_fit(random_tiny_files, tmp_path):
    plain = load_file(random_tiny_files.dit)
    for layer in BLOCK_LAYERS:  # rows of unlike sizes, so that their scales matter
        plain[f"{layer}.weight"] *= torch.linspace(0.5, 2, len(plain[f"{layer}.weight"]))[:, None]
    save_file(plain, tmp_path / "plain.safetensors")
    ours, comfy = (tmp_path / f"{name}.safetensors" for name in FILE_FORMATS)
    for path, file_format in ((ours, "fp8"), (comfy, "fp8-comfy")):
        quantise_checkpoint(tmp_path / "plain.safetensors", path, file_format, variant="tiny")
    again = {
        (source.stem, file_format): load_file(quantise_checkpoint(source, tmp_path / "x.safetensors", file_format))
        for source in (ours, comfy)
        for file_format in FILE_FORMATS
    }
    stored = {"fp8": load_file(ours), "fp8-comfy": load_file(comfy)}
    for layer in BLOCK_LAYERS:
        name, scale = f"{layer}.weight", f"{layer}.weight_scale"
        for file_format in FILE_FORMATS:
            kept = again[file_format, file_format]
            assert same(kept[name], stored[file_format][name]) and same(kept[scale], stored[file_format][scale])
        spread = again["fp8-comfy", "fp8"]
        assert same(spread[name], stored["fp8-comfy"][name])
        assert torch.equal(spread[scale], stored["fp8-comfy"][scale].expand(len(spread[name]), 1))
        rounded = again["fp8", "fp8-comfy"]
        assert rounded[scale].shape == ()
        expected = stored["fp8"][name].float() * stored["fp8"][scale]
        assert (rounded[name].float() * rounded[scale] - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_loras_are_merged_into_a_file_that_is_fp8_already(random_tiny_files, tmp_path, file_format):
    source, path = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    quantise_checkpoint(random_tiny_files.dit, source, file_format, variant="tiny")
    setting = LoraSetting(lora=read_lora(write_lora(tmp_path / "lora.safetensors"), DIT_TINY))
    quantise_checkpoint(source, path, file_format, [setting])
    found, before = load_file(path), load_file(source)
    merged = load_dit(source, merge=[setting], dtype=torch.float32)[0].get_submodule(LAYER).weight
    back = found[f"{LAYER}.weight"].float() * found[f"{LAYER}.weight_scale"]
    assert (back - merged).norm() / merged.norm() < 0.027
    others = [name for name in found if LAYER not in name and "img_in" not in name]
    assert all(same(found[name], before[name]) for name in others)


def test_progress_is_told_and_one_weight_is_read_at_a_time(random_tiny_files, tmp_path, monkeypatch):
    calls, order = [], []
    get = DiTReader.get
    monkeypatch.setattr(
        DiTReader, "get", lambda self, name, dtype=None: (order.append(name), get(self, name, dtype))[1]
    )

    def on_tensor(number: int, num_all: int) -> None:
        calls.append((number, num_all))
        assert len(order) == number

    quantise_checkpoint(random_tiny_files.dit, tmp_path / "x.safetensors", variant="tiny", on_tensor=on_tensor)
    count = len(load_file(random_tiny_files.dit))
    assert calls == [(number, count) for number in range(1, count + 1)]


def test_the_file_can_be_generated_with(written, random_tiny_files, tmp_path):
    weights = [*random_tiny_files.options, "--dit", str(written[1])]
    options = ["--prompt", "x", "--infer_steps", "1", "--guidance_scale", "1", "--save_path", str(tmp_path / "out")]
    assert main(["generate", *weights, *options, "--output_type", "latent"]) == 0
    assert isinstance(load_dit(written[1])[0].get_submodule(LAYER), Linear)


# Bad input


def refused(capsys, tmp_path: Path) -> str:
    """The error line; nothing may have been written or left behind."""
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".") or "out" in path.name] == []
    return capsys.readouterr().err


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(random_tiny_files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert quantize(tmp_path / "none.safetensors", out, "fp8") == 1
    assert "does not exist" in refused(capsys, tmp_path)
    assert quantize(random_tiny_files.text_encoder / "model.safetensors", out, "fp8") == 1
    assert "not a FLUX.2 DiT" in refused(capsys, tmp_path)
    assert quantize(random_tiny_files.dit, tmp_path / "out.bin", "fp8") == 1
    assert "must end in .safetensors" in refused(capsys, tmp_path)
    assert quantize(random_tiny_files.dit, random_tiny_files.dit, "fp8") == 1
    assert "one of the files that are read" in refused(capsys, tmp_path)
    assert quantize(random_tiny_files.dit, out, "fp8", "--lora_multiplier", "2") == 1
    assert "without a LoRA" in refused(capsys, tmp_path)
    assert quantize(random_tiny_files.dit, out, "int8") == 2
    assert "invalid choice: 'int8'" in refused(capsys, tmp_path)


def test_a_lora_that_overflows_leaves_nothing(random_tiny_files, tmp_path, capsys):
    lora = write_lora(tmp_path / "lora.safetensors", 1e37)
    out = tmp_path / "out.safetensors"
    assert quantize(random_tiny_files.dit, out, "fp8", "--lora_weight", str(lora), "--lora_multiplier", "100") == 1
    assert "too large" in refused(capsys, tmp_path)
