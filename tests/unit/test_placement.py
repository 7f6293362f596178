"""Pipelines that are loaded by a plan: the same pictures within any budget, turns on the device, running out of it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import device_memory, placement
from flux2_kit.flux2_core import pipeline as pipeline_module
from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
from flux2_kit.flux2_core.checkpoint import load_dit, save_autoencoder
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.device_memory import GIB, available_host_bytes, device_budget
from flux2_kit.flux2_core.lora import LoraSetting
from flux2_kit.flux2_core.lora_files import read_lora
from flux2_kit.flux2_core.lora_writer import write_lora
from flux2_kit.flux2_core.memory import FileFacts, MemoryNeeds
from flux2_kit.flux2_core.pipeline import Flux2Pipeline, GenerateRequest, SamplingConfig, load_pipeline
from flux2_kit.flux2_core.placement import PlacedPipeline, dit_facts, precision_of, text_encoder_facts
from flux2_kit.flux2_core.quantized_files import quantise_checkpoint
from flux2_kit.flux2_core.variants import VARIANTS, get_variant
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from PIL import Image

TINY = get_variant("tiny")
REQUEST = GenerateRequest(
    prompt="a red circle",
    references=(Image.new("RGB", (64, 64), "blue"),),
    sampling=SamplingConfig(num_steps=2, seed=1),
)
MIB_IN_GIB = 1 / 1024


def load(files, **settings) -> PlacedPipeline:
    pipeline = load_pipeline(
        "tiny", dit=files.dit, autoencoder=files.autoencoder, text_encoder=files.text_encoder, **settings
    )
    assert isinstance(pipeline, PlacedPipeline)
    return pipeline


def picture(pipeline: Flux2Pipeline) -> bytes:
    return pipeline.generate(REQUEST).images[0].tobytes()


def smallest_budget(files, **settings) -> float:
    """GiB, found from the message of a refusal."""
    with pytest.raises(ValueError, match="the least that works is") as caught:
        load(files, vram_budget_gib=1e-4, **settings)
    number, unit = str(caught.value).split("about ")[1].split(")")[0].split()
    return (float(number) + 0.2) * (MIB_IN_GIB if unit == "MiB" else 1)


@pytest.fixture(scope="module")
def tiny_lora(tmp_path_factory, random_tiny_files) -> Path:
    dit, _ = load_dit(random_tiny_files.dit, "tiny")
    adapters = TrainableAdapters(dit, AdapterConfig(rank=2), generator=torch.Generator().manual_seed(0))
    for parameter in adapters.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_lora(path, adapters.to_lora("lora", torch.float32, {}))
    return path


@pytest.fixture(scope="module")
def expected(random_tiny_files) -> bytes:
    """The picture of the resident model in the files' own precision."""
    return picture(load(random_tiny_files))


def test_within_the_least_budget_the_picture_is_the_same(random_tiny_files, expected):
    budget = smallest_budget(random_tiny_files, precision="fp32")
    small = load(random_tiny_files, precision="fp32", vram_budget_gib=budget)
    assert small.plan.takes_turns and small.plan.dit.is_streamed
    assert [picture(small), picture(small)] == [expected, expected]
    assert small._dit is not None and small._dit.streamer is not None
    assert small._dit.streamer.num_resident == small.plan.dit.num_resident


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_in_every_precision_streamed_pictures_are_the_resident_ones(random_tiny_files, precision):
    settings = {"precision": precision, "text_encoder_precision": precision}
    small = load(random_tiny_files, **settings, vram_budget_gib=1, needs=MemoryNeeds(num_streamed=4))
    assert (small.plan.dit.precision, small.plan.dit.num_resident) == (precision, 2)
    assert picture(small) == picture(load(random_tiny_files, **settings))


def test_live_loras_act_on_streamed_blocks(random_tiny_files, tiny_lora):
    loras = [LoraSetting(lora=read_lora(tiny_lora, TINY.dit))]
    plain, adapted = load(random_tiny_files), load(random_tiny_files, loras=loras)
    expected = picture(adapted)
    assert expected != picture(plain)
    assert adapted.request.lora_bytes == 2 * sum(
        tensor.numel() for parts in loras[0].lora.layers.values() for tensor in parts[0].tensors().values()
    )
    streamed = load(random_tiny_files, loras=loras, vram_budget_gib=1, needs=MemoryNeeds(num_streamed=4))
    assert picture(streamed) == expected


def test_networks_are_loaded_when_they_are_needed_and_take_turns(random_tiny_files, monkeypatch):
    budget = smallest_budget(random_tiny_files, precision="fp32")
    pipeline = load(random_tiny_files, precision="fp32", vram_budget_gib=budget)
    assert not pipeline._networks
    events: list[str] = []
    use, leave = PlacedPipeline._use, PlacedPipeline._leave
    monkeypatch.setattr(PlacedPipeline, "_use", lambda self, name: events.append(f"+{name}") or use(self, name))
    monkeypatch.setattr(PlacedPipeline, "_leave", lambda self, name: events.append(f"-{name}") or leave(self, name))
    picture(pipeline)
    turns = [event for event, before in zip(events, ["", *events], strict=False) if event != before]
    # A text encoder that streams has nothing on the device that would have to leave it.
    assert turns == ["+text_encoder", "+autoencoder", "+dit", "-autoencoder", "+autoencoder", *leaves(pipeline)]
    assert pipeline._away == (set() if pipeline.plan.dit_stays else {"dit"})
    assert pipeline._text_streamer is not None and pipeline._text_streamer._slots is None
    # A DiT that stays does so for the next prompt too.
    events.clear()
    pipeline._dit_stays = True
    assert picture(pipeline) and "-dit" not in events


def test_without_host_memory_networks_are_freed_and_loaded_again(random_tiny_files, tiny_lora, monkeypatch, caplog):
    loras = [LoraSetting(lora=read_lora(tiny_lora, TINY.dit))]
    expected = picture(load(random_tiny_files, loras=loras))
    pipeline = load(random_tiny_files, loras=loras, vram_budget_gib=1)
    pipeline._takes_turns, pipeline._dit_stays = True, False
    # On the CPU a network that leaves takes nothing more: not even that is there.
    monkeypatch.setattr(placement, "available_host_bytes", lambda: -1)
    caplog.set_level(logging.INFO)
    pipeline.encode_prompt("x")
    text_encoder = weakref.ref(pipeline.text_encoder)
    assert picture(pipeline) == expected
    gc.collect()
    assert text_encoder() is None, "freed for the DiT"
    assert "is loaded again when it is needed" in caplog.text


def leaves(pipeline: PlacedPipeline) -> list[str]:
    return [] if pipeline.plan.dit_stays else ["-dit"]


class OutOfMemory:
    """Lets the first calls of a function fail."""

    def __init__(self, fn: Callable, num_failures: int) -> None:
        self.fn, self.left = fn, num_failures

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.fn(*args, **kwargs)


TURNS, STRIPS = "networks leave it for each other", "pictures are encoded and decoded in strips"


@pytest.mark.parametrize(
    ("step", "num_failures", "said"),
    [
        ("sample_latents", 1, TURNS),
        ("sample_latents", 2, "3 of 6 blocks stay on it, not 6"),
        ("encode_prompt", 2, "all layers of the text encoder are streamed"),
        ("encode_fitted", 1, STRIPS),
        ("decode_latents", 2, "keeps strips in host memory"),
    ],
)
def test_running_out_of_memory_leaves_less_on_the_device(
    random_tiny_files, expected, monkeypatch, caplog, step, num_failures, said
):
    pipeline = load(random_tiny_files)
    pipeline.lowers = True
    failing = OutOfMemory(getattr(pipeline_module, step), num_failures)
    for module in (pipeline_module, placement):
        if hasattr(module, step):
            monkeypatch.setattr(module, step, failing)
    result = picture(pipeline)
    images = [torch.frombuffer(bytearray(pixels), dtype=torch.uint8).int() for pixels in (result, expected)]
    assert (images[0] - images[1]).abs().max() <= 1
    assert caplog.text.count("the device ran out of memory") == num_failures and said in caplog.text


def test_three_failures_are_an_error(random_tiny_files, monkeypatch):
    pipeline = load(random_tiny_files)
    pipeline.lowers = True
    monkeypatch.setattr(pipeline_module, "sample_latents", OutOfMemory(pipeline_module.sample_latents, 3))
    with pytest.raises(torch.OutOfMemoryError):
        picture(pipeline)


def test_other_errors_are_not_tried_again(random_tiny_files, monkeypatch):
    pipeline, calls = load(random_tiny_files), []

    def fail(*args, **kwargs):
        calls.append(1)
        raise ValueError("no")

    pipeline.lowers = True
    monkeypatch.setattr(pipeline_module, "sample_latents", fail)
    with pytest.raises(ValueError, match="no"):
        picture(pipeline)
    assert len(calls) == 1


def test_residency_is_halved_down_to_nothing(random_tiny_files):
    placed = placement.PlacedDiT(dit=load_dit(random_tiny_files.dit, "tiny")[0], device=torch.device("cpu"))
    left = []
    while placed.lower():
        assert placed.streamer is not None
        left.append(placed.streamer.num_resident)
    assert left == [3, 1, 0]


def test_what_files_hold_is_told_by_their_headers(random_tiny_files, tmp_path):
    assert dit_facts(random_tiny_files.dit, TINY) == FileFacts(precision="fp32", plain="fp32")
    for file_format in ("fp8", "fp8-comfy"):
        path = quantise_checkpoint(random_tiny_files.dit, tmp_path / f"{file_format}.safetensors", file_format)
        assert dit_facts(path, TINY) == FileFacts(precision="fp8", plain="bf16")
    assert text_encoder_facts(random_tiny_files.text_encoder) == FileFacts(precision="fp32", plain="fp32")


def test_weights_that_host_memory_cannot_hold_stream_from_an_fp8_file(random_tiny_files, tmp_path, monkeypatch, caplog):
    path = quantise_checkpoint(random_tiny_files.dit, tmp_path / "fp8.safetensors")
    options = {
        "dit": path,
        "autoencoder": random_tiny_files.autoencoder,
        "text_encoder": random_tiny_files.text_encoder,
        "precision": "fp8",
    }
    expected = picture(load_pipeline("tiny", **options))
    monkeypatch.setattr(placement, "available_host_bytes", lambda: 2**10)
    pipeline = load_pipeline("tiny", **options, vram_budget_gib=1, needs=MemoryNeeds(num_streamed=6))
    assert isinstance(pipeline, PlacedPipeline) and pipeline.plan.dit.from_disk
    assert "they are read from disk in every step, which is slow" in caplog.text
    assert picture(pipeline) == expected


def test_a_type_and_a_precision_that_contradict_each_other_are_refused():
    assert precision_of("auto", torch.float32) == "fp32"
    assert precision_of("bf16", torch.bfloat16) == "bf16"
    assert precision_of("nf4", None) == "nf4"
    with pytest.raises(ValueError, match="the precision fp8 and the type fp32 contradict"):
        precision_of("fp8", torch.float32)


def test_budgets(monkeypatch, caplog):
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert device_budget(cpu) is None
    assert device_budget(cpu, 1.5) == 1.5 * GIB
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="number of GiB above 0"):
            device_budget(cpu, wrong)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1 * GIB)
    budget = device_budget(cuda)
    assert budget is not None and 9.5 * GIB < budget < 10.5 * GIB, "11 GiB less a reserve"
    assert device_budget(cuda, 3) == 3 * GIB and device_budget(cuda, 12) == 12 * GIB
    assert device_budget(cuda, 12.1) == budget
    assert "the memory budget of 12.1 GiB is more than the 12.0 GiB of the device" in caplog.text


def test_free_host_memory_is_that_of_the_container(tmp_path, monkeypatch):
    information = tmp_path / "meminfo"
    information.write_text("MemTotal: 9 kB\nMemAvailable:   1000000 kB\n")
    monkeypatch.setattr(device_memory, "MEMORY_INFO", information)
    monkeypatch.setattr(device_memory, "CONTROL_GROUP", tmp_path)
    assert available_host_bytes() == 921600000
    for name, text in (("max", "500000\n"), ("current", "400000\n"), ("stat", "anon 1\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_host_bytes() == 135000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes() == 921600000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes of one launch share it
    assert available_host_bytes() == 921600000 // 4


def test_options_of_the_command_line(random_tiny_files, tmp_path, capsys):
    def generate(*options: str, code: int = 0) -> str:
        where = ["--save_path", str(tmp_path), "--infer_steps", "1", "--prompt", "x"]
        assert main(["generate", *random_tiny_files.options, *where, *options]) == code
        return capsys.readouterr().err

    assert "blocks resident" not in generate()
    assert "fp8, all 6 blocks resident" in generate("--fp8_scaled")
    assert "--fp8 runs as --fp8_scaled" in generate("--fp8")
    assert "tiny: nf4, 4 of 6 blocks resident" in generate("--precision", "nf4", "--blocks_to_swap", "2")
    assert "fp32, all 6 blocks resident" in generate("--vram_budget", "1", "--fp8_text_encoder")
    assert "contradict" in generate("--precision", "nf4", "--fp8_scaled", code=1)
    assert "contradict" in generate("--precision", "fp8", "--dtype", "fp32", code=1)
    assert "7 blocks cannot be streamed: tiny has 6" in generate("--blocks_to_swap", "7", code=1)
    assert "the least that works" in generate("--vram_budget", "0.0001", code=1)
    assert "number of GiB above 0" in generate("--vram_budget", "0", code=1)


@pytest.mark.parametrize(
    ("stored", "is_gpu", "asked", "expected"),
    [
        (torch.float32, False, "auto", "fp32"),
        (torch.float32, True, "auto", "bf16"),
        (torch.float32, True, "fp32", "fp32"),
        (torch.float16, True, "auto", "fp16"),
        (torch.float32, False, "bf16", "bf16"),
    ],
)
def test_type_of_the_autoencoder(tmp_path, monkeypatch, stored, is_gpu, asked, expected):
    monkeypatch.setattr(placement, "has_bf16", lambda device: is_gpu)
    autoencoder = Flux2Autoencoder(VARIANTS["tiny"].autoencoder).to(stored)
    save_autoencoder(tmp_path / "ae.safetensors", autoencoder)
    device = torch.device("cpu")
    assert placement.autoencoder_precision(tmp_path / "ae.safetensors", device, asked) == expected
    loaded = placement.place_autoencoder(tmp_path / "ae.safetensors", device, asked)
    assert loaded.decoder.conv_in.weight.dtype == placement.DTYPES[expected]
