"""By what other programs recognise a LoRA: hashes of its content, and the architecture that it is for."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from flux2_kit.flux2_core.lora_factors import Lora, LoraFactors, LoraReport
from flux2_kit.flux2_core.lora_writer import write_lora
from flux2_kit.flux2_core.variants import VARIANTS


def make_lora(value: float) -> Lora:
    factors = LoraFactors(lora_A=torch.full((2, 160), value), lora_B=torch.ones(480, 2), alpha=3.0)
    return Lora(
        name="x",
        config=VARIANTS["tiny"].dit,
        layers={"double_blocks.0.img_attn.qkv": (factors,)},
        report=LoraReport(dialects=("trained",), groups={}),
        metadata={"modelspec.hash_sha256": "0x0", "sshs_model_hash": "0"},
    )


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])  # kohya: of two types, fp32 alphas behind bf16 factors
def test_the_hash_is_that_of_the_data_behind_the_header(tmp_path, dialect):
    hashes = set()
    for value in (0.5, 0.25):
        path = write_lora(tmp_path / "x.safetensors", make_lora(value), dialect, torch.bfloat16, {"author": str(value)})
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:begin])["__metadata__"]
        expected = hashlib.sha256(data[begin:]).hexdigest()
        assert metadata["modelspec.hash_sha256"] == f"0x{expected}" and metadata["sshs_model_hash"] == expected
        hashes.add(expected)
    assert len(hashes) == 2


def test_a_base_and_what_was_distilled_from_it_are_one_architecture():
    names = {name: variant.lora_architecture.removesuffix("/lora") for name, variant in VARIANTS.items()}
    assert names["klein-4b"] == names["klein-base-4b"] == "Flux.2-klein-4b"
    assert names["klein-9b"] == names["klein-base-9b"] == names["klein-9b-kv"] == "Flux.2-klein-9b"
    assert names["dev"] == "Flux.2-dev"
    bases = {name: variant.undistilled_name for name, variant in VARIANTS.items() if variant.distilled}
    assert bases == {"klein-4b": "klein-base-4b", "klein-9b": "klein-base-9b", "klein-9b-kv": "klein-base-9b"}
