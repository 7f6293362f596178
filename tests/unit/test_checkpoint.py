"""Loading, detection and saving: each layout gives the same model, and bad files are refused in one line."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import checkpoint
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.checkpoint import load_autoencoder, load_dit, save_autoencoder, save_dit
from flux2_kit.flux2_core.detect import detect, resolve_variant
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.state_dict import convert
from flux2_kit.flux2_core.tensor_source import TensorEntry, TensorSource, read_header
from flux2_kit.flux2_core.variants import VARIANTS
from safetensors.torch import save_file
from torch import Tensor

SMALL = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
OTHER = replace(SMALL, num_single_blocks=3)
GUIDED = replace(SMALL, has_guidance_embedder=True)
SMALL_VARIANTS = {
    name: replace(VARIANTS[name], dit=GUIDED if name == "dev" else OTHER if "9b" in name else SMALL)
    for name in ("dev", "klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b", "klein-9b-kv")
}
AUTOENCODER = AutoencoderConfig(
    encoder_widths=(8, 16, 16, 24), decoder_widths=(8, 8, 16, 16), num_res_blocks=1, num_norm_groups=4
)
ANCHOR = "double_stream_modulation_img.lin.weight"


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(value.abs() + 0.1 if "running_var" in name else value)
    return module


@pytest.fixture(scope="module")
def dit() -> Flux2DiT:
    model = randomised(Flux2DiT(SMALL))
    assert isinstance(model, Flux2DiT)
    return model


@pytest.fixture(scope="module")
def autoencoder() -> Flux2Autoencoder:
    model = randomised(Flux2Autoencoder(AUTOENCODER))
    assert isinstance(model, Flux2Autoencoder)
    return model


def load(path: Path, variant: str | None = None, **options):
    return load_dit(path, variant, variants=SMALL_VARIANTS, **options)


def assert_equal(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    got, wanted = module.state_dict(), expected.state_dict()
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def bfl_state(dit: Flux2DiT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in dit.state_dict().items()}


# Layouts


@pytest.mark.parametrize("layout", ["bfl", "diffusers", "comfyui"])
def test_each_layout_loads_equal(tmp_path, dit, autoencoder, layout):
    save_dit(tmp_path / "x.safetensors", dit, SMALL_VARIANTS["klein-base-4b"], layout)
    save_autoencoder(tmp_path / "ae.safetensors", autoencoder, layout)
    loaded, variant = load(tmp_path / "x.safetensors")
    assert variant.name == "klein-base-4b"
    assert_equal(loaded, dit)
    assert_equal(load_autoencoder(tmp_path / "ae.safetensors"), autoencoder)
    assert detect(TensorSource(tmp_path / "x.safetensors"), variants=SMALL_VARIANTS).layout == layout
    assert detect(TensorSource(tmp_path / "ae.safetensors")).layout == layout


def test_a_loaded_model_runs_is_frozen_and_in_eval_mode(tmp_path, dit, autoencoder):
    save_dit(tmp_path / "x.safetensors", dit, SMALL_VARIANTS["klein-4b"], "diffusers")
    save_autoencoder(tmp_path / "ae.safetensors", autoencoder, "diffusers")
    loaded, _ = load(tmp_path / "x.safetensors")
    inputs = (torch.randn(1, 4, 128), torch.zeros(4, 4), torch.randn(1, 3, 48), torch.zeros(3, 4), torch.ones(1))
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), dit(*inputs))
        pictures = torch.rand(1, 3, 32, 32)
        encoded = load_autoencoder(tmp_path / "ae.safetensors").encode(pictures)
        assert torch.equal(encoded, autoencoder.eval().encode(pictures))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_loaded_under_inference_mode_can_train(tmp_path, dit):
    save_dit(tmp_path / "x.safetensors", dit, SMALL_VARIANTS["klein-4b"])
    with torch.inference_mode():
        loaded, _ = load(tmp_path / "x.safetensors")
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


def test_a_large_file_is_mapped_and_writing_to_a_weight_leaves_it_alone(tmp_path, dit, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAPPED_FROM_BYTES", 0)
    path = save_dit(tmp_path / "x.safetensors", dit, SMALL_VARIANTS["klein-4b"])
    before = path.read_bytes()
    loaded, _ = load(path)
    assert_equal(loaded, dit)
    with torch.no_grad():
        loaded.img_in.weight.zero_()
    assert path.read_bytes() == before


def test_all_in_one_checkpoint(tmp_path, dit, autoencoder):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in bfl_state(dit).items()}
    state = convert(autoencoder.state_dict(), "autoencoder", "bfl", "diffusers")
    tensors |= {f"vae.{name}": tensor.contiguous() for name, tensor in state.items()}
    tensors |= {"text_encoders.qwen3_4b.model.norm.weight": torch.ones(3)}
    path = tmp_path / "all-klein-4b.safetensors"
    save_file(tensors, path, {"flux2_kit.num_norm_groups": "4"})
    assert_equal(load(path)[0], dit)
    assert_equal(load_autoencoder(path), autoencoder)


def test_small_decoder_and_public_widths_are_read_from_shapes(tmp_path):
    config = AutoencoderConfig(encoder_widths=(32, 32, 64, 64), decoder_widths=(96, 32, 32, 32), num_res_blocks=2)
    save_autoencoder(
        tmp_path / "ae.safetensors", Flux2Autoencoder(config), "diffusers", {"flux2_kit.num_norm_groups": "32"}
    )
    assert load_autoencoder(tmp_path / "ae.safetensors").config == config


def test_groups_default_to_32_and_must_divide_the_widths(tmp_path, autoencoder):
    save_file({k: v.clone() for k, v in autoencoder.state_dict().items()}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"no multiples of 32 .* flux2_kit.num_norm_groups"):
        load_autoencoder(tmp_path / "ae.safetensors")
    save_autoencoder(tmp_path / "b.safetensors", autoencoder, metadata={"flux2_kit.num_norm_groups": "many"})
    with pytest.raises(ValueError, match="must be a whole number, got 'many'"):
        load_autoencoder(tmp_path / "b.safetensors")


# Precision


def test_dtype_is_the_files_or_the_one_asked_for(tmp_path, dit, autoencoder):
    state = bfl_state(dit)
    mixed = {k: v if k.endswith(".scale") else v.bfloat16() for k, v in state.items()}
    save_file(mixed, tmp_path / "klein-4b.safetensors")
    loaded, _ = load(tmp_path / "klein-4b.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    loaded, _ = load(tmp_path / "klein-4b.safetensors", dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    save_autoencoder(tmp_path / "ae.safetensors", autoencoder)
    half = load_autoencoder(tmp_path / "ae.safetensors", dtype=torch.bfloat16)
    assert half.decoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(half.bn.running_var, autoencoder.bn.running_var)


@pytest.mark.parametrize("style", ["scale_weight", "weight_scale", "rows", "blocks", "diffusers", "plain"])
def test_fp8_is_multiplied_out(tmp_path, dit, style):
    layout = "diffusers" if style == "diffusers" else "bfl"
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in convert(bfl_state(dit), "dit", "bfl", layout).items():
        if "blocks" not in name or tensor.dim() != 2:
            tensors[name] = expected[name] = tensor.clone().bfloat16()
            continue
        module = name.removesuffix(".weight")
        rows, columns = tensor.shape
        scale = {"rows": torch.rand(rows, 1), "blocks": torch.rand(rows, 4, 1), "plain": torch.ones(())}.get(
            style, torch.tensor(0.37)
        )
        tensors[name] = quantised = tensor.to(torch.float8_e4m3fn).clone()
        wide = scale.expand(rows, 4, 1).repeat_interleave(columns // 4, 1)[..., 0] if style == "blocks" else scale
        expected[name] = (quantised.float() * wide).bfloat16()
        if style == "plain":
            continue
        tensors[f"{module}.{'scale_weight' if style == 'scale_weight' else 'weight_scale'}"] = scale
        tensors[f"{module}.{'scale_input' if style == 'scale_weight' else 'input_scale'}"] = torch.ones(())
        if style == "weight_scale":
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if style == "scale_weight":
        tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    prefix = "" if layout == "diffusers" else "model.diffusion_model."
    path = tmp_path / "klein-4b.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    description = detect(TensorSource(path), variants=SMALL_VARIANTS)
    assert description.layout == ("comfyui" if style == "plain" else "comfyui-scaled-fp8")
    loaded, _ = load(path)
    wanted = convert(expected, "dit", layout, "bfl")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_other_quantised_formats_are_refused(tmp_path, dit):
    state = bfl_state(dit)
    name = "double_blocks.0.img_attn.proj.weight"
    packed = state | {name: torch.zeros(64, 32, dtype=torch.uint8), f"{name}_scale": torch.ones(64, 4)}
    save_file(packed, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match=r"img_attn.proj.weight is quantised \(U8\)"):
        load(tmp_path / "klein-4b.safetensors")
    text = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    save_file(state | {name.replace("weight", "comfy_quant"): text}, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match="mxfp8"):
        load(tmp_path / "klein-4b.safetensors")


def test_formats_of_other_components_do_not_matter(tmp_path, dit):
    text = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in bfl_state(dit).items()}
    path = tmp_path / "klein-4b.safetensors"
    save_file(tensors | {"text_encoders.a.comfy_quant": text}, path)
    loaded, _ = load(path)
    assert_equal(loaded, dit)


def test_scales_that_do_not_fit_are_named(tmp_path, dit):
    name = "double_blocks.0.img_attn.proj.weight_scale"
    save_file(bfl_state(dit) | {name: torch.ones(3)}, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match=rf"{name} in .*klein-4b.safetensors: scales of shape \[3\] do not fit"):
        load(tmp_path / "klein-4b.safetensors")


# Folders and shards


def write_shards(folder: Path, tensors: dict[str, Tensor], stem: str, index: bool = True) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    files = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name].contiguous() for name in half}, folder / file)
    if index:
        weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_shards_index_and_folders(tmp_path, dit):
    root = tmp_path / "FLUX.2-klein-base-4B"
    tensors = {k: v.clone() for k, v in convert(bfl_state(dit), "dit", "bfl", "diffusers").items()}
    files = write_shards(root / "transformer", tensors, "diffusion_pytorch_model")
    (root / "vae").mkdir()
    for path in (
        root,
        root / "transformer",
        root / "transformer" / files[0],
        root / "transformer" / "diffusion_pytorch_model.safetensors.index.json",
    ):
        loaded, variant = load(path)
        assert variant.name == "klein-base-4b"
        assert_equal(loaded, dit)


def test_a_missing_shard_is_named(tmp_path, dit):
    for index in (True, False):
        files = write_shards(tmp_path / str(index), bfl_state(dit), "klein-4b", index)
        (tmp_path / str(index) / files[1]).unlink()
        with pytest.raises(ValueError, match=r"1 of 2 files are missing .*klein-4b-00002-of-00002\.safetensors"):
            load(tmp_path / str(index) / files[0])
        with pytest.raises(ValueError, match="00002-of-00002"):
            load(tmp_path / str(index))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "a\\b.safetensors", "x.bin", "..", 7])
def test_an_index_may_name_only_files_of_its_folder(tmp_path, dit, name):
    save_file(bfl_state(dit), tmp_path / "evil.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"img_in.weight": name}}))
    with pytest.raises(ValueError, match=r"only .safetensors files of its folder"):
        load(folder)


def test_an_index_that_promises_too_much(tmp_path, dit):
    write_shards(tmp_path, bfl_state(dit), "m")
    index = tmp_path / "m.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["extra.weight"] = "m-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"'extra.weight'"):
        load(index)


def test_a_folder_of_several_checkpoints_is_ambiguous(tmp_path, dit):
    for name in ("a", "b"):
        save_file(bfl_state(dit), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 checkpoints: a\.safetensors, b\.safetensors"):
        load(tmp_path)


# Variants


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux-2-klein-4b.safetensors", "klein-4b"),
        ("flux-2-klein-base-4b-fp8.safetensors", "klein-base-4b"),
        ("Flux2-Klein_4B_base_bf16.safetensors", "klein-base-4b"),
        ("FLUX2_klein4b.safetensors", "klein-4b"),
    ],
)
def test_variant_from_the_file_name(tmp_path, dit, name, expected):
    save_file(bfl_state(dit), tmp_path / name)
    assert load(tmp_path / name)[1].name == expected


def test_kv_from_the_file_name_and_dev_from_the_shape(tmp_path):
    save_file(bfl_state(Flux2DiT(OTHER)), tmp_path / "flux-2-klein-9b-kv.safetensors")
    assert load(tmp_path / "flux-2-klein-9b-kv.safetensors")[1].name == "klein-9b-kv"
    save_file(bfl_state(Flux2DiT(GUIDED)), tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors", "auto")[1].name == "dev"


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": False}, "klein-base-9b"),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": True}, "klein-9b"),
        ({"_class_name": "Flux2KleinKVPipeline", "is_distilled": True}, "klein-9b-kv"),
    ],
)
def test_variant_from_model_index(tmp_path, index, expected):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(bfl_state(Flux2DiT(OTHER)), folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load(tmp_path)[1].name == expected


def test_metadata_goes_before_the_name_and_the_user_before_both(tmp_path, dit):
    path = tmp_path / "klein-4b.safetensors"
    save_file(bfl_state(dit), path, {"modelspec.architecture": "Flux.2-klein-base-4b"})
    assert load(path)[1].name == "klein-base-4b"
    assert load(path, "klein-4b")[1].name == "klein-4b"


def test_what_stays_open_is_asked(tmp_path, dit):
    save_file(bfl_state(dit), tmp_path / "my-klein.safetensors")
    with pytest.raises(ValueError, match="klein-4b, klein-base-4b and nothing in it tells them apart"):
        load(tmp_path / "my-klein.safetensors")


def test_a_variant_of_another_shape_is_refused(tmp_path, dit):
    save_file(bfl_state(dit), tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match=r"of the shape of klein-4b or klein-base-4b, not of klein-9b"):
        load(tmp_path / "klein-4b.safetensors", "klein-9b")
    with pytest.raises(ValueError, match="unknown variant 'sdxl'; known variants: auto, dev"):
        load(tmp_path / "klein-4b.safetensors", "sdxl")
    with pytest.raises(ValueError, match=r"no known variant's shape \(hidden_size 64, .*num_single_blocks 2"):
        load_dit(tmp_path / "klein-4b.safetensors")


def test_saved_metadata(tmp_path, dit):
    path = save_dit(tmp_path / "x.safetensors", dit, SMALL_VARIANTS["klein-4b"], metadata={"modelspec.title": "mine"})
    metadata = TensorSource(path).metadata
    assert metadata["flux2_kit.variant"] == "klein-4b" and metadata["modelspec.title"] == "mine"


# Bad files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes"),
        (pickle.dumps({"a": 1}), "pickled PyTorch checkpoint"),
        (b"PK\x03\x04" + bytes(60), "zip archive, probably a pickled"),
        (b"GGUF" + bytes(60), "GGUF file"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b'{"weight_map": {}, "more": 1}', "JSON file"),
        (bytes(range(100, 200)), "not a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}" + bytes(40), "not a safetensors file"),
        (struct.pack("<Q", 5000) + b"{}" + bytes(40), "truncated: its header takes 5000 bytes"),
        (struct.pack("<Q", 2) + b"{x", "no valid JSON"),
    ],
)
def test_foreign_and_broken_files(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, "overlap or leave gaps"),
        ({"a": entry([4], 0, 16)}, "its tensors end at byte"),
        ({"a": entry([1 << 40], 0, 24)}, "gives 24 bytes to"),
        ({"a": entry([10], 0, 40)}, "truncated"),
        ({"a": entry([-1], 0, 24)}, "no valid shape"),
        ({"a": entry([6], 24, 0)}, "ends before it begins"),
        ({"a": entry([6], 0, 24, "F99")}, "unknown type 'F99'"),
        ({"a": 3}, "is no object"),
        ({"__metadata__": {"a": 1}}, "metadata must map"),
        ([1], "not a safetensors file"),
    ],
)
def test_headers_are_checked_against_the_file(tmp_path, header, message):
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(24))
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    raw = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(1))
    with pytest.raises(ValueError, match="a name occurs twice"):
        read_header(path)


def test_a_truncated_download(tmp_path, dit):
    path = save_dit(tmp_path / "klein-4b.safetensors", dit, SMALL_VARIANTS["klein-4b"])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"truncated: .* download it again"):
        load(path)


def test_misaligned_data_is_read(tmp_path):
    values = torch.randn(6)
    header = json.dumps({"a": entry([6], 0, 24)}).encode()
    header += b" " * (3 - (8 + len(header)) % 4)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    assert (8 + len(header)) % 4 == 3
    assert torch.equal(TensorSource(path).get("a", mapped=True), values)


def test_missing_and_unexpected_tensors_are_named(tmp_path, dit):
    state = bfl_state(dit)
    lost = {name: tensor for name, tensor in state.items() if name != "double_blocks.1.txt_mlp.2.weight"}
    save_file(lost, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing \(double_blocks.1.txt_mlp.2.weight\)"):
        load(tmp_path / "klein-4b.safetensors")
    save_file(state | {"stranger.weight": torch.ones(1)}, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match=r"stranger\.weight"):
        load(tmp_path / "klein-4b.safetensors", "klein-4b")


def test_a_tensor_of_another_shape_is_named(tmp_path, dit):
    state = bfl_state(dit) | {"double_blocks.1.img_mlp.0.weight": torch.ones(64, 384)}
    save_file(state, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match=r"img_mlp.0.weight has shape \[64, 384\], the model needs \[384, 64\]"):
        load(tmp_path / "klein-4b.safetensors")


def test_parts_of_a_fused_tensor_of_unlike_shapes(tmp_path, dit):
    state = {k: v.clone() for k, v in convert(bfl_state(dit), "dit", "bfl", "diffusers").items()}
    state["transformer_blocks.0.attn.to_k.weight"] = torch.ones(64, 32)
    save_file(state, tmp_path / "klein-4b.safetensors")
    with pytest.raises(ValueError, match="must have one shape"):
        load(tmp_path / "klein-4b.safetensors")


def test_an_incomplete_autoencoder(tmp_path, autoencoder):
    state = {k: v.clone() for k, v in autoencoder.state_dict().items() if not k.startswith("decoder.conv_in")}
    save_file(state, tmp_path / "ae.safetensors", {"flux2_kit.num_norm_groups": "4"})
    with pytest.raises(ValueError, match=r"incomplete FLUX.2 autoencoder"):
        load_autoencoder(tmp_path / "ae.safetensors")


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="folder without safetensors files"):
        load(tmp_path)


# Detection


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight"], "FLUX.1"),
        (["transformer.single_transformer_blocks.0.norm.linear.weight"], "FLUX.1"),
        (["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.1.1.norm.weight"], "SDXL"),
        (["cond_stage_model.transformer.text_model.x", "model.diffusion_model.input_blocks.1.1.norm.weight"], "1.5"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"], "Qwen-Image"),
        (["blocks.0.self_attn.q.weight", "patch_embedding.weight"], "Wan"),
        (["cap_pad_token", "noise_refiner.0.attention.qkv.weight"], "Z-Image"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "T5"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "CLIP"),
        (["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"], "16 latent channels"),
        (["nothing.known"], "unknown checkpoint"),
    ],
)
def test_other_models_are_called_by_name(tmp_path, names, what):
    save_file({name: torch.ones(2, 16) for name in names}, tmp_path / "flux-2-klein-4b.safetensors")
    source = TensorSource(tmp_path / "flux-2-klein-4b.safetensors")
    description = detect(source)
    assert description.kind == "other" and what in description.what
    with pytest.raises(ValueError, match=r"is an? .*, not a FLUX\.2 DiT"):
        load(source.path)
    with pytest.raises(ValueError, match=r"not a FLUX\.2 DiT"):
        resolve_variant(source)


def test_lora_and_text_encoder(tmp_path):
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{module}.lora_A.weight": torch.ones(8, 64), f"{module}.lora_B.weight": torch.ones(192, 8)}
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = detect(TensorSource(tmp_path / "lora.safetensors"))
    assert (lora.kind, lora.rank, lora.num_targets) == ("lora", 8, 1)
    with pytest.raises(ValueError, match=r"is a LoRA, not a FLUX.2 DiT"):
        load(tmp_path / "lora.safetensors")

    tensors = {f"model.layers.{i}.self_attn.{p}.weight": torch.ones(1) for i in range(27) for p in ("q_proj", "q_norm")}
    save_file(tensors | {"model.embed_tokens.weight": torch.ones(2, 2560)}, tmp_path / "qwen.safetensors")
    text_encoder = detect(TensorSource(tmp_path / "qwen.safetensors"))
    assert text_encoder.kind == "text_encoder"
    assert text_encoder.variants == ("klein-4b", "klein-base-4b")


@pytest.mark.parametrize(("name", "size"), [("dev", "32B"), ("klein-base-9b", "9B"), ("klein-4b", "4B")])
def test_description_of_the_public_shapes(tmp_path, dit, name, size):
    save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    source = TensorSource(tmp_path / f"{name}.safetensors")
    with torch.device("meta"):
        state = Flux2DiT(VARIANTS[name].dit).state_dict()
    # Only the table is needed, and a file of the true size would be 64 GB.
    source.table = {
        key: TensorEntry(file=source.path, dtype="BF16", shape=tuple(value.shape), begin=0, num_bytes=2 * value.numel())
        for key, value in state.items()
    }
    description = detect(source)
    assert (description.size, description.precision, description.layout) == (size, "bf16", "bfl")
    assert name in description.variants and resolve_variant(source).name == name
