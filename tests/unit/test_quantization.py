"""Names of what quantised checkpoints store beside weights, formats that are read, and scales multiplied out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import quantization
from flux2_kit.flux2_core.quantization import check_format, dequantise, split_quantisation
from flux2_kit.flux2_core.tensor_source import TensorSource
from safetensors.torch import save_file

ROWS, COLUMNS = 130, 300


def test_scales_and_markers_are_told_from_weights():
    names = ["a.weight", "a.scale_weight", "a.scale_input", "b.weight", "b.weight_scale", "b.comfy_quant", "scaled_fp8"]
    found = split_quantisation(names)
    assert found.weights == ("a.weight", "b.weight")
    assert found.scales == {"a.weight": "a.scale_weight", "b.weight": "b.weight_scale"}
    assert found.formats == ("b.comfy_quant",)
    assert split_quantisation(["c.weight_scale_inv"]).scales == {"c.weight": "c.weight_scale_inv"}


@pytest.fixture(params=[1, 4 * COLUMNS * 7, 2**24], ids=["a row at once", "7 rows at once", "all at once"])
def slices(request, monkeypatch):
    monkeypatch.setattr(quantization, "DEQUANTISE_BYTES", request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((), ROWS, COLUMNS),
        ((1,), ROWS, COLUMNS),
        ((1, 1), ROWS, COLUMNS),
        ((ROWS,), 1, COLUMNS),
        ((ROWS, 1), 1, COLUMNS),
        ((ROWS, 1, 1), 1, COLUMNS),
        ((ROWS, 4), 1, COLUMNS // 4),
        ((ROWS, 4, 1), 1, COLUMNS // 4),
        ((2, 3), 128, 128),
    ],
    ids=str,
)
def test_each_value_is_multiplied_by_the_scale_of_its_block(dtype, shape, height, width):
    weight = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scale = torch.rand(shape)
    table = scale.reshape(-(-ROWS // height), -(-COLUMNS // width))
    wide = table[torch.arange(ROWS)[:, None] // height, torch.arange(COLUMNS) // width]
    result = dequantise(weight, scale, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, (weight.float() * wide).to(dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 1, 1), (6, 2, 3, 3)], ids=str)
def test_weights_of_any_dimensions_and_scales_of_any_float(weight_dtype, scale_dtype, shape):
    weight, scale = torch.randn(shape).to(weight_dtype), torch.rand(6).to(scale_dtype)
    expected = weight.float() * scale.float().reshape(6, *[1] * (len(shape) - 1))
    assert torch.equal(dequantise(weight, scale, torch.float32), expected)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (ROWS, 7), (COLUMNS,), (0,), (2,), (ROWS + 1, 1)], ids=str)
def test_scales_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="do not fit weights of shape"):
        dequantise(torch.zeros(ROWS, COLUMNS).to(torch.float8_e4m3fn), torch.ones(shape), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_scales_that_are_no_floats_are_refused(dtype):
    with pytest.raises(ValueError, match="is not supported"):
        dequantise(torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.ones(1).to(dtype), torch.bfloat16)


def described(folder: Path, content: bytes) -> TensorSource:
    path = folder / "x.safetensors"
    save_file({"a.comfy_quant": torch.tensor(list(content), dtype=torch.uint8)}, path)
    return TensorSource(path)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_blockwise"])
def test_formats_of_8_bit_floats_are_read(tmp_path, name):
    check_format(described(tmp_path, json.dumps({"format": name, "more": 1}).encode()), "a.comfy_quant")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "nvfp4"}', "quantised as nvfp4"),
        (b'{"format": 7, "was": "float8_e4m3fn"}', "quantised as 7"),
        (b"{}", "is not a description"),
        (b"[1]", "is not a description"),
        (b"float8_e4m3fn", "is not a description"),
        (b"\xff\xfe\xff", "is not a description"),
        (b'{"format": "float8_e4m3fn"}' + b" " * 4096, "is not a description"),
    ],
)
def test_other_formats_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_format(described(tmp_path, content), "a.comfy_quant")
    assert "a.comfy_quant" in str(caught.value) and "x.safetensors" in str(caught.value)
