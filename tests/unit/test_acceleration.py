"""Attention kernels by name, and compiled blocks."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core import attention_backends
from flux2_kit.flux2_core.acceleration import Acceleration, accelerate
from flux2_kit.flux2_core.acceleration_options import BACKENDS, add_acceleration_options, read_acceleration_options
from flux2_kit.flux2_core.attention_backends import attend, check_backend, kernel
from flux2_kit.flux2_core.compilation import compile_blocks
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.pipeline import load_pipeline
from flux2_kit.flux2_core.streaming import stream_dit
from torch import Tensor

CPU = torch.device("cpu")
CONFIG = DiTConfig(
    hidden_size=16,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    context_dim=12,
    has_guidance_embedder=False,
    rope_axes=(2, 2, 2, 2),
)


def build() -> Flux2DiT:
    torch.manual_seed(0)
    return Flux2DiT(CONFIG).requires_grad_(False)


@torch.inference_mode()
def run(dit: Flux2DiT, height: int, width: int, num_text: int = 5, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    tokens = torch.randn(rows, height * width, 128, generator=generator)
    text = torch.randn(rows, num_text, 12, generator=generator)
    return dit(tokens, image_ids(height, width), text, text_ids(num_text), torch.full((rows,), 0.5))


def random_heads() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=torch.Generator().manual_seed(0)).unbind()
    return q, k, v


def test_every_block_runs_the_chosen_attention(monkeypatch):
    used = []
    monkeypatch.setattr(attention_backends, "kernel", lambda name: (used.append(name), kernel("sdpa"))[1])
    dit = build()
    run(dit, 2, 3)
    assert used == 4 * ["sdpa"]
    accelerate(dit, Acceleration(attention="flash"))
    used.clear()
    run(dit, 2, 3)
    assert used == 4 * ["flash"]


def test_packages_are_given_what_they_take(monkeypatch):
    q, k, v = random_heads()
    expected = F.scaled_dot_product_attention(q, k, v)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    def sageattn(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
        assert tensor_layout == "HND" and not is_causal
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    for name in ("flash3", "sage", "flash"):
        check_backend(name, CPU, torch.float32, 8)
        torch.testing.assert_close(attend(q, k, v, name), expected)
    with pytest.raises(ValueError, match="no backward"):
        attend(q.requires_grad_(), k, v, "sage")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash3", "attention flash3 needs the package flash_attn_interface"),
        ("sage", "attention sage needs the package sageattention"),
        ("cudnn", "attention cudnn does not run on cpu in float32 with heads of 8"),
        ("xformers", "'xformers'; allowed are auto, sdpa"),
    ],
)
def test_what_is_not_there_is_refused(name, message, monkeypatch):
    for package in attention_backends.PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=message):
        accelerate(build(), Acceleration(attention=name))


def test_auto_takes_the_fastest_exact_one_and_measures_once(monkeypatch):
    q, k, v = random_heads()
    milliseconds = {"sdpa": 1.0, "cudnn": 0.99, "flash": 0.5, "flash3": 0.1}
    measured = []

    def fake_kernel(name: str) -> Any:
        def run(*tensors: Tensor) -> Tensor:
            if name == "flash3":
                return torch.zeros_like(q)  # fast and wrong
            return F.scaled_dot_product_attention(*tensors)

        run.backend = name
        return run

    def time(run: Any, *_: Tensor) -> float:
        measured.append(run.backend)
        return milliseconds[run.backend]

    monkeypatch.setattr(attention_backends, "_fastest", {})
    monkeypatch.setattr(attention_backends, "kernel", fake_kernel)
    monkeypatch.setattr(attention_backends, "_milliseconds", time)
    assert attention_backends.fastest(q, k, v) == "sdpa" and not measured  # with gradients
    with torch.no_grad():
        assert attention_backends.fastest(q, k, v) == "flash"
        assert attention_backends.fastest(q, k, v[:, :, :6]) == "flash"
        assert measured == ["sdpa", "cudnn", "flash"]
        milliseconds["flash"] = 0.98
        assert attention_backends.fastest(q[..., :4], k[..., :4], v) == "sdpa"
    assert "sage" not in attention_backends.CANDIDATES


def test_auto_goes_on_with_pytorchs_choice_where_the_fastest_one_refuses(monkeypatch, caplog):
    class OnCuda(Tensor):
        is_cuda = True  # pyright: ignore

    q, k, v = random_heads()
    failure: list[Exception] = [RuntimeError("no available kernel")]

    def refuse(*tensors: Tensor) -> Tensor:
        raise failure[0]

    monkeypatch.setitem(attention_backends._out_of_graphs, "flash3", refuse)
    monkeypatch.setattr(attention_backends, "_fastest", {})
    monkeypatch.setattr(attention_backends, "_measure", lambda *_: "flash3")
    monkeypatch.setattr(attention_backends.torch.cuda, "device_of", lambda _: nullcontext())
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                attend(q.as_subclass(OnCuda), k, v).as_subclass(Tensor), F.scaled_dot_product_attention(q, k, v)
            )
        assert len(caplog.records) == 1 and "no available kernel" in caplog.text
        attention_backends._fastest.clear()
        failure[0] = torch.OutOfMemoryError()
        with pytest.raises(torch.OutOfMemoryError):
            attend(q.as_subclass(OnCuda), k, v)


def test_compiled_blocks_are_one_program_for_all_sizes_streamed_or_not():
    programs = []

    def backend(module: Any, _: Any) -> Any:
        programs.append(module)
        return module.forward

    sizes = [(2, 3, 5), (4, 3, 5), (3, 5, 7)]
    plain = build()
    expected = [run(plain, *size) for size in sizes]
    for streamed in (False, True):
        torch.compiler.reset()
        programs.clear()
        dit = build()
        if streamed:
            stream_dit(dit, "cpu", num_resident=2)
        compile_blocks(dit, backend=backend)
        for size, output in zip(sizes, expected, strict=True):
            torch.testing.assert_close(run(dit, *size), output)
        assert len(programs) == 3, "a trial, one for double and one for single blocks"


def read(*argv: str) -> Acceleration:
    parser = argparse.ArgumentParser()
    add_acceleration_options(parser)
    return read_acceleration_options(parser.parse_args(argv))


def test_options_stand_for_settings():
    assert get_args(attention_backends.AttentionBackend) == BACKENDS
    assert read() == Acceleration(attention="auto", compile=False)
    assert read("--attention", "flash3", "--compile") == Acceleration(attention="flash3", compile=True)
    assert read("--attn_mode", "sageattn") == Acceleration(attention="sage")
    with pytest.raises(ValueError, match="--attention flash and --attn_mode sdpa contradict"):
        read("--attention", "flash", "--attn_mode", "sdpa")


def test_a_pipeline_sets_up_its_dit(random_tiny_files):
    files = {"dit": random_tiny_files.dit, "autoencoder": random_tiny_files.autoencoder}
    pipeline = load_pipeline(
        "tiny", **files, text_encoder=random_tiny_files.text_encoder, acceleration=Acceleration(attention="flash")
    )
    assert {block.attention_backend for block in pipeline.dit.blocks} == {"flash"}
