"""What several tests need: a FLUX.2 of the tiny shape with random weights, as real files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# The tensors here are small: several threads would mostly wait for each other, and on a busy machine for very long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True, kw_only=True)
class TinyFiles:
    """Weights of the tiny shape; pictures made with them are noise."""

    dit: Path
    autoencoder: Path
    text_encoder: Path
    """A Hugging Face folder with its tokenizer in it."""

    @property
    def options(self) -> list[str]:
        """For the command line."""
        return ["--dit", str(self.dit), "--vae", str(self.autoencoder), "--text_encoder", str(self.text_encoder)]


@pytest.fixture(scope="session", autouse=True)
def eight_bit_products_on_cpus() -> Iterator[None]:
    """A stand-in for `torch._scaled_mm` in releases that have it for GPUs alone, such as 2.6."""
    import torch

    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm", "CPU"):
        yield
        return

    def scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
        assert bias is None and scale_result is None
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype or a.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_mm", scaled_mm, "CPU")
    yield
    library._destroy()


@pytest.fixture(scope="session")
def random_tiny_files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """Random weights of the tiny shape in the layouts of released ones, made once in a test run."""
    import torch
    from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
    from flux2_kit.flux2_core.checkpoint import save_autoencoder, save_dit
    from flux2_kit.flux2_core.dit import Flux2DiT
    from flux2_kit.flux2_core.variants import VARIANTS
    from flux2_kit.training.tiny.tokenizer import write_tokenizer
    from flux2_kit.training.tiny.train_dit import TinyTextEncoder

    folder = tmp_path_factory.mktemp("random-tiny")
    tiny = VARIANTS["tiny"]
    files = TinyFiles(
        dit=folder / "dit.safetensors",
        autoencoder=folder / "autoencoder.safetensors",
        text_encoder=folder / "text_encoder",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_dit(files.dit, Flux2DiT(tiny.dit), tiny)
        save_autoencoder(files.autoencoder, Flux2Autoencoder(tiny.autoencoder))
        write_tokenizer(files.text_encoder)
        TinyTextEncoder(files.text_encoder).model.save_pretrained(files.text_encoder)
    return files
