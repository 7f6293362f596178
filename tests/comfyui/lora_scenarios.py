"""Our LoRA files in ComfyUI's own LoRA loader, on its own FLUX.2 network with the bundled tiny weights.

``launch.py lora_scenarios.py COMFYUI_FOLDER PACK_FOLDER FILES_FOLDER`` writes a file for every kind of adapter that is
trained and every dialect, loads each in ComfyUI as its node does, and prints, as JSON, what went wrong in which.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory_scenarios import load_pack, pack_name
from torch import Tensor

LIMIT = 2e-6
"""Relative L2 of velocities, fp32."""
CPU = torch.device("cpu")
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 8},
    "alpha": {"rank": 8, "alpha": 3.0},
    "rank 1": {"rank": 1},
    "rsLoRA": {"rank": 8, "alpha": 3.0, "rank_stabilized": True},
    "every layer": {"rank": 4, "alpha": 3.0, "include": (".",)},
    "some layers": {"rank": 4, "include": ("double_blocks", "img_in"), "exclude": ("txt",)},
    "LoKr": {"kind": "lokr", "rank": 2, "alpha": 1.0},
    "LoKr whole": {"kind": "lokr", "rank": 64},
    "LoKr factor": {"kind": "lokr", "rank": 4, "alpha": 3.0, "lokr_factor": 4},
    "DoRA": {"rank": 8, "alpha": 3.0, "dora": True},
    "DoRA LoKr": {"kind": "lokr", "rank": 2, "alpha": 1.0, "dora": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {
    **{f"{adapter}, {dialect}": (adapter, dialect, "fp32") for adapter in ADAPTERS for dialect in ("comfy", "kohya")},
    **{f"{adapter}, {dtype}": (adapter, "comfy", dtype) for adapter in ("alpha", "DoRA") for dtype in ("bf16", "fp16")},
}


class Warnings(logging.Handler):
    """What ComfyUI complained of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class World:
    """ComfyUI's network and ours, with the same weights."""

    def __init__(self, comfyui: Path, pack: Path, folder: Path) -> None:
        sys.path.insert(0, str(comfyui))
        sys.argv = ["main.py", "--cpu"]
        import comfy.options  # pyright: ignore[reportMissingImports]

        comfy.options.enable_args_parsing()
        import comfy.sd  # pyright: ignore[reportMissingImports]
        import comfy.utils  # pyright: ignore[reportMissingImports]

        self.comfy: Any = comfy
        self.folder = folder
        load_pack(pack)
        self.pack = pack_name(pack)
        path = pack / "flux2_core" / "assets" / "tiny" / "dit.safetensors"
        self.dit, _ = self.module("flux2_core.checkpoint").load_dit(path, "tiny", torch.float32)
        self.patcher = native_patcher(path, self.dit.config)
        self.warnings = Warnings()
        logging.getLogger().addHandler(self.warnings)

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.pack}.{name}")

    def write(self, adapter: str, dialect: str, dtype: str) -> Path:
        """A file of adapters whose parameters are all random, as training writes it."""
        adapters = self.module("training.adapters")
        config = adapters.AdapterConfig(**ADAPTERS[adapter])
        generator = torch.Generator().manual_seed(3)
        size = 0.35 if config.kind == "lokr" else 0.2  # a LoKr is a product of three
        trained = adapters.TrainableAdapters(self.dit, config, generator=generator)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.2 * noise) if name.endswith("magnitude") else size * noise)
        path = self.folder / f"{adapter} {dialect} {dtype}.safetensors"
        return self.module("flux2_core.lora_writer").write_lora(path, trained.to_lora(adapter, DTYPES[dtype]), dialect)

    def ours(self, lora: Any = None, strength: float = 1.0) -> Tensor:
        latents, text, sigma = inputs(self.dit.config.context_dim)
        live, ids = self.module("flux2_core.lora"), self.module("flux2_core.latents")
        live.apply_loras(self.dit, [] if lora is None else [live.LoraSetting(lora=lora, strength=strength)])
        with torch.inference_mode():
            tokens = latents.flatten(2).transpose(1, 2)
            output = self.dit(tokens, ids.image_ids(4, 3), text, ids.text_ids(text.shape[1]), sigma, None)
        return output.transpose(1, 2).reshape(latents.shape)

    def theirs(self, path: Path | None = None, strength: float = 1.0) -> Tensor:
        """As LoraLoaderModelOnly and the sampler do it."""
        patcher = self.patcher
        if path is not None:
            tensors = self.comfy.utils.load_torch_file(str(path), safe_load=True)
            patcher, _ = self.comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)
        latents, text, sigma = inputs(self.dit.config.context_dim)
        patcher.patch_model()
        try:
            with torch.inference_mode():
                return patcher.model.diffusion_model(latents, sigma, context=text, y=None, guidance=None)
        finally:
            patcher.unpatch_model()


def native_patcher(path: Path, config: Any) -> Any:
    """ComfyUI's model; it takes the number of heads and the RoPE axes of dev for granted, and so is told tiny's."""
    import comfy.model_detection  # pyright: ignore[reportMissingImports]
    import comfy.model_patcher  # pyright: ignore[reportMissingImports]
    import comfy.supported_models  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]

    tensors = {name: tensor.float() for name, tensor in comfy.utils.load_torch_file(str(path)).items()}
    found = comfy.model_detection.detect_unet_config(tensors, "")
    found |= {"num_heads": config.num_heads, "axes_dim": list(config.rope_axes)}
    model_config = comfy.supported_models.Flux2(found)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model(tensors, "")
    model.load_model_weights(tensors, "")
    return comfy.model_patcher.ModelPatcher(model.to(CPU), load_device=CPU, offload_device=CPU)


def inputs(context_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, text embeddings and sigmas of two pictures."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 128, 4, 3, generator=generator)
    return latents, torch.randn(2, 24, context_dim, generator=generator), torch.tensor([0.9, 0.3])


def relative_l2(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def with_their_norms(world: World, lora: Any) -> Any:
    """ComfyUI divides magnitudes by the norms of W, not of W + delta: the DoRA that does so by our formula."""
    weights = {name: module.weight for name, module in world.module("flux2_core.lora").linear_layers(world.dit).items()}

    def changed(layer: str, part: Any) -> Any:
        weight = weights[layer]
        ratio = (weight + part.delta()).norm(dim=1, keepdim=True) / weight.norm(dim=1, keepdim=True)
        return replace(part, magnitude=part.magnitude * ratio)

    return replace(lora, layers={layer: (changed(layer, part),) for layer, (part,) in lora.layers.items()})


def same_velocity(world: World, adapter: str, dialect: str, dtype: str) -> None:
    path = world.write(adapter, dialect, dtype)
    lora = world.module("flux2_core.lora_files").read_lora(path, world.dit.config)
    if ADAPTERS[adapter].get("dora"):
        notes = world.module("flux2_core.lora_writer").reading_notes(lora, dialect)
        assert any("ComfyUI's own LoRA loaders" in note for note in notes)
        assert relative_l2(world.theirs(path), world.ours(lora)) > 1e-3, "ComfyUI norms W + delta now: drop the note"
        lora = with_their_norms(world, lora)
    for strength in (1.0, 0.7):
        expected = world.ours(lora, strength)
        assert relative_l2(expected, world.ours()) > 0.05
        found = relative_l2(world.theirs(path, strength), expected)
        assert found <= LIMIT, f"{found:.2e} at strength {strength}"
    assert world.warnings.texts == [], world.warnings.texts[:4]
    assert relative_l2(world.theirs(), world.ours()) <= LIMIT  # what they patched is taken back


def check(world: World, case: Callable[[], None]) -> str | None:
    world.warnings.texts.clear()
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    world = World(*map(Path, sys.argv[1:4]))
    found = {name: check(world, lambda case=case: same_velocity(world, *case)) for name, case in CASES.items()}
    print(json.dumps({name: text for name, text in found.items() if text}))


if __name__ == "__main__":
    main()
