"""The disk tier: blocks are read from a file as they are used, and a file that changes is noticed."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import disk_tier
from flux2_kit.flux2_core.block_memory import Transfers
from flux2_kit.flux2_core.checkpoint import save_dit
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.file_reader import FileReader
from flux2_kit.flux2_core.files import write_safetensors
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.state_dict import convert
from flux2_kit.flux2_core.streaming import stream_dit, stream_text_encoder
from flux2_kit.flux2_core.text_encoder import load_text_encoder
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=4,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
NUM_BLOCKS = 6


@pytest.fixture(autouse=True)
def only_small_tensors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small as the network of these tests is, its weights must come from the file; norms and scales need not."""
    monkeypatch.setattr(disk_tier, "KEPT_BYTES", 4096)


def build(weight_format: str = "bf16", seed: int = 0) -> Flux2DiT:
    generator = torch.Generator().manual_seed(seed)
    dit = Flux2DiT(CONFIG).requires_grad_(False)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    if weight_format != "fp32":
        dit.to(torch.bfloat16)
    if weight_format == "fp8":
        for block in blocks_of(dit):
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.quantise("fp8")
    return dit


def blocks_of(dit: Flux2DiT) -> list[nn.Module]:
    return [*dit.double_blocks, *dit.single_blocks]


def save(folder: Path, dit: Flux2DiT, prefix: str = "") -> Path:
    """A file that holds the weights as they run."""
    return write_safetensors(folder / "dit.safetensors", {prefix + name: t for name, t in dit.state_dict().items()})


def run(dit: Flux2DiT, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randn(batch, 6, 128, generator=generator).to(dit.dtype)
    text = torch.randn(batch, 3, 48, generator=generator).to(dit.dtype)
    return dit(tokens, image_ids(2, 3), text, text_ids(3), torch.linspace(0.9, 0.3, batch))


def sample(dit: Flux2DiT, batch: int = 2) -> Tensor:
    with torch.inference_mode():
        return run(dit, batch)


def train(dit: Flux2DiT, adapters: TrainableAdapters) -> list[Tensor]:
    adapters.zero_grad()
    for batch in (1, 2):
        run(dit, batch).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in adapters.parameters()]


@pytest.mark.parametrize(("weight_format", "prefix"), [("fp32", ""), ("bf16", "model.diffusion_model."), ("fp8", "")])
def test_passes_are_those_of_the_resident_model_bit_by_bit(tmp_path, weight_format, prefix):
    dit = build(weight_format)
    adapters = TrainableAdapters(dit, AdapterConfig(rank=4), generator=torch.Generator().manual_seed(0))
    for parameter in adapters.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    adapters.attach()
    dit.checkpointing = "blocks"
    expected, gradients = sample(dit), train(dit, adapters)
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    path = save(tmp_path, dit, prefix)
    for ring_size, num_resident in ((2, 0), (1, 2), (3, 1)):
        streamer = stream_dit(dit, "cpu", num_resident=num_resident, ring_size=ring_size, file=path)
        for _ in range(2):
            assert torch.equal(sample(dit), expected)
            assert all(map(torch.equal, train(dit, adapters), gradients))
        assert all(torch.equal(t.float(), state[name].float()) for name, t in dit.state_dict().items())
        streamer.set_num_resident(3)
        assert torch.equal(sample(dit), expected)
        streamer.close()
        assert torch.equal(sample(dit), expected)


def test_host_memory_holds_two_blocks_and_what_is_small(tmp_path):
    dit = build("fp8")
    path = save(tmp_path, dit)
    loaded = [StorageWeakRef(t.untyped_storage()) for block in blocks_of(dit) for t in block.parameters()]
    streamer = stream_dit(dit, "cpu", num_resident=0, file=path)
    gc.collect()
    assert all(storage.expired() for storage in loaded), "what was loaded is still there"
    sample(dit)
    streamer._disk.finish()  # while the next pass's first block is read, its buffer is out of the list
    buffers = streamer._disk._buffers
    largest = max(block.num_bytes for block in streamer._streamed.values())
    assert streamer.host_bytes == sum(buffer.bytes.numel() for buffer, _ in buffers) == 2 * largest
    assert streamer.ring_bytes == 2 * largest
    streamer.close()
    assert streamer.host_bytes == 0 and not streamer._disk._buffers


def test_scales_of_another_shape_and_norms_of_another_type_stay_in_host_memory(tmp_path):
    dit = build("fp8")
    expected = sample(dit)
    tensors = {
        name: t.flatten() if name.endswith("weight_scale") else t.float() if name.endswith("norm.scale") else t
        for name, t in dit.state_dict().items()
    }
    path = write_safetensors(tmp_path / "dit.safetensors", tensors)
    streamer = stream_dit(dit, "cpu", num_resident=0, file=path)
    norms = sum(tensors[name].nbytes // 2 for name in tensors if name.endswith("norm.scale"))
    largest = max(block.num_bytes for block in streamer._streamed.values())
    assert streamer.host_bytes == 2 * largest + norms
    assert torch.equal(sample(dit), expected)


def test_blocks_are_read_ahead_in_another_thread(tmp_path, monkeypatch):
    dit = build()
    expected = sample(dit)
    stream_dit(dit, "cpu", num_resident=0, file=save(tmp_path, dit))
    read, threads = [threading.Event() for _ in range(NUM_BLOCKS)], set()
    original = disk_tier.DiskReader._read

    def noted(self, block, *rest):
        threads.add(threading.current_thread())
        event = original(self, block, *rest)
        read[blocks_of(dit).index(block.block)].set()
        return event

    monkeypatch.setattr(disk_tier.DiskReader, "_read", noted)
    arrived = []

    def wait_for_next(linear: nn.Module, index: int) -> None:
        linear.register_forward_hook(lambda *_: arrived.append(read[(index + 1) % NUM_BLOCKS].wait(30)))

    for index, block in enumerate(blocks_of(dit)):
        wait_for_next(block.linear1 if index > 1 else block.img_attn.qkv, index)
    assert torch.equal(sample(dit), expected)
    assert arrived == NUM_BLOCKS * [True]
    assert threads and threading.main_thread() not in threads


def test_a_buffer_is_read_into_only_when_the_copy_from_it_is_over(tmp_path):
    class Slow(Transfers):
        """A copy happens when someone waits for it, or not at all."""

        lock = threading.Lock()

        def copy(self, target, source, after):
            return [target, source]

        def wait_on_host(self, event):
            with self.lock:
                if event:
                    super().copy(*event, None)
                    event.clear()

        wait = wait_on_host

    dit = build()
    expected = sample(dit)
    streamer = stream_dit(dit, "cpu", num_resident=0, ring_size=4, file=save(tmp_path, dit))
    streamer._transfers = Slow()
    for _ in range(3):
        assert torch.equal(sample(dit), expected)


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def replaced(path: Path) -> None:
    twin = path.with_name("twin")
    twin.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(twin, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    twin.replace(path)


def truncated(path: Path) -> None:
    stat = path.stat()
    os.truncate(path, stat.st_size // 2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [changed, replaced, truncated, Path.unlink])
def test_a_file_that_changes_is_noticed_at_the_next_block(tmp_path, change):
    dit = build()
    path = save(tmp_path, dit)
    stream_dit(dit, "cpu", num_resident=0, file=path)
    sample(dit)
    change(path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"dit\.safetensors was changed or replaced while"):
            sample(dit)


def test_a_change_while_a_block_is_read_is_noticed(tmp_path, monkeypatch):
    dit = build()
    path = save(tmp_path, dit)
    stream_dit(dit, "cpu", num_resident=NUM_BLOCKS - 1, file=path)  # there is no next block that would notice
    original = FileReader.fill

    def fill(*arguments):
        original(*arguments)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(FileReader, "fill", fill)
    with pytest.raises(ValueError, match="was changed or replaced"):
        sample(dit)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), r"dit\.safetensors cannot be read: Input/output error"),
        (EOFError("at byte 7"), r"dit\.safetensors was cut off while the model streams from it; download it again"),
    ],
)
def test_errors_of_reading_reach_the_caller_and_do_not_last(tmp_path, monkeypatch, error, message):
    dit = build()
    expected = sample(dit)
    path = save(tmp_path, dit)
    streamer = stream_dit(dit, "cpu", num_resident=0, file=path)
    sample(dit)
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}

    def fail(*_):
        raise error

    monkeypatch.setattr(FileReader, "fill", fail)
    for slot in streamer._slots:  # both of the blocks that come next fail
        streamer._fill(slot, slot.index)
    with pytest.raises(ValueError, match=message):
        sample(dit)
    monkeypatch.undo()
    assert all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())
    for _ in range(2):
        assert torch.equal(sample(dit), expected)


def test_a_file_that_does_not_hold_the_weights_as_they_run_is_refused(tmp_path):
    dit = build()
    tensors = dit.state_dict()
    name = "single_blocks.2.linear1.weight"
    other = tensors | {name: tensors[name] + 1}
    wrong = {
        "runs as torch.bfloat16": {key: tensor.float() for key, tensor in tensors.items()},
        "is not there": convert(tensors, "dit", "bfl", "diffusers"),
        "may have LoRAs merged in": other,
    }
    for message, stored in wrong.items():
        path = write_safetensors(tmp_path / "wrong.safetensors", stored)
        with pytest.raises(ValueError, match=rf"{message}.*flux2 quantize"):
            stream_dit(dit, "cpu", num_resident=0, file=path)
        assert not any({"forward", "_apply"} & block.__dict__.keys() for block in blocks_of(dit))
    expected = sample(dit)
    stream_dit(dit, "cpu", num_resident=0, file=save(tmp_path, dit))
    assert torch.equal(sample(dit), expected)


def test_one_row_that_differs_is_seen(tmp_path):
    """Of a matrix that is not compared whole."""
    dit = build()
    weight = dit.single_blocks[2].linear1.weight
    rows = weight.shape[0]
    assert weight.nbytes > disk_tier.SAMPLES * disk_tier.SAMPLE_BYTES
    changed = weight.clone()
    changed[: rows // 4] += 1
    path = write_safetensors(
        tmp_path / "dit.safetensors", dit.state_dict() | {"single_blocks.2.linear1.weight": changed}
    )
    with pytest.raises(ValueError, match="other numbers"):
        stream_dit(dit, "cpu", num_resident=0, file=path)


def test_weights_that_change_in_memory_are_refused(tmp_path):
    dit = build()
    stream_dit(dit, "cpu", num_resident=0, file=save(tmp_path, dit))
    sample(dit)
    with torch.no_grad():
        dit.single_blocks[0].linear1.weight.add_(1)
    with pytest.raises(ValueError, match="what runs is the file"):
        sample(dit)


def test_a_mapped_model_is_saved_whole(tmp_path):
    dit = build()
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    stream_dit(dit, "cpu", num_resident=2, file=save(tmp_path, dit))
    sample(dit)
    from safetensors.torch import load_file

    copy = load_file(save_dit(tmp_path / "copy.safetensors", dit, VARIANTS["tiny"]))
    assert copy.keys() == state.keys() and all(torch.equal(tensor, state[name]) for name, tensor in copy.items())


def test_a_text_encoder_streams_from_its_file(random_tiny_files, monkeypatch):
    monkeypatch.setattr(disk_tier, "KEPT_BYTES", 0)
    expected = load_text_encoder(random_tiny_files.text_encoder).encode(["a red cube", ""]).embeddings
    text_encoder = load_text_encoder(random_tiny_files.text_encoder)
    streamer = stream_text_encoder(text_encoder, "cpu", file=random_tiny_files.text_encoder)
    largest = max(block.num_bytes for block in streamer._streamed.values())
    assert streamer.host_bytes == 2 * largest
    for _ in range(2):
        assert torch.equal(text_encoder.encode(["a red cube", ""]).embeddings, expected)
    streamer.close()
