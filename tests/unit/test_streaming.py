"""Block streaming: bit by bit what the resident model computes, and the order of copies and computation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from flux2_kit.flux2_core import block_memory
from flux2_kit.flux2_core.block_memory import Transfers, tensor_bytes
from flux2_kit.flux2_core.checkpoint import save_dit
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.lora import LoraSetting, apply_loras, merge_loras
from flux2_kit.flux2_core.lora_factors import Lora
from flux2_kit.flux2_core.streaming import BlockStreamer, stream_dit, stream_text_encoder, streamed_indices, upcoming
from flux2_kit.flux2_core.text_encoder import load_text_encoder
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=3,
    num_single_blocks=4,
    context_dim=48,
    has_guidance_embedder=True,
    rope_axes=(8, 8, 8, 8),
)
NUM_BLOCKS = 7
FORMATS = ["fp32", "bf16", "fp8", "nf4"]


def build(weight_format: str = "fp32", seed: int = 0) -> Flux2DiT:
    generator = torch.Generator().manual_seed(seed)
    dit = Flux2DiT(CONFIG).requires_grad_(False)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    if weight_format != "fp32":
        dit.to(torch.bfloat16)
    quantise(dit, weight_format)
    return dit


def quantise(dit: Flux2DiT, weight_format: str) -> None:
    if weight_format == "nf4":
        pytest.importorskip("bitsandbytes")
    if weight_format in ("fp8", "nf4"):
        for block in blocks_of(dit):
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.quantise(weight_format)


def blocks_of(dit: Flux2DiT) -> list[nn.Module]:
    return [*dit.double_blocks, *dit.single_blocks]


def adapt(dit: Flux2DiT, **options) -> TrainableAdapters:
    """Attaches adapters that are no zero change."""
    generator = torch.Generator().manual_seed(3)
    adapters = TrainableAdapters(dit, AdapterConfig(rank=4, **options), generator=generator)
    for parameter in adapters.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapters.attach()
    return adapters


def adapted_lora() -> Lora:
    return adapt(build()).to_lora("test", torch.float32, {})


def first_linears(dit: Flux2DiT) -> list[nn.Module]:
    """A Linear of every block, in the order of the blocks."""
    return [*(block.img_attn.qkv for block in dit.double_blocks), *(block.linear1 for block in dit.single_blocks)]


def blocks_tensors(dit: Flux2DiT) -> list[Tensor]:
    return [tensor for block in blocks_of(dit) for tensor in [*block.parameters(), *block.buffers()]]


def run(dit: Flux2DiT, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randn(batch, 24, 128, generator=generator).to(dit.dtype)
    text = torch.randn(batch, 7, 48, generator=generator).to(dit.dtype)
    sigma = torch.linspace(0.9, 0.3, batch)
    return dit(tokens, image_ids(4, 6), text, text_ids(7), sigma, torch.ones(batch))


def sample(dit: Flux2DiT, batch: int = 2) -> Tensor:
    with torch.inference_mode():
        return run(dit, batch)


def train(dit: Flux2DiT, adapters: TrainableAdapters, num_steps: int = 2) -> list[Tensor]:
    """Gradients that have been added up over several steps."""
    torch.manual_seed(5)
    adapters.zero_grad()
    for step in range(num_steps):
        run(dit, 1 + step).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in adapters.parameters()]


def copied_state(dit: Flux2DiT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in dit.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.device == right[name].device, name
        assert torch.equal(tensor.float(), right[name].float()), name


class Delayed(Transfers):
    """Copies as late as a device may make them, and notes the order in which everything was asked for."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.log: list[str] = []
        self.copies: list[tuple[Tensor, Tensor, int]] = []
        """Target, source, and the index of the block."""
        self.used: dict[int, int] = {}
        """By address of a target: how many marks there had been when it was last waited for."""
        self.num_marks = 0
        self.num_done = 0
        self.waits = True

    def mark(self) -> int:
        self.num_marks += 1
        self.log.append("mark")
        return self.num_marks

    def copy(self, target: Tensor, source: Tensor, after: int) -> int:
        assert after > self.used.get(target.data_ptr(), 0), "a buffer is overwritten before its last use is over"
        storages = [next(block.parameters()).untyped_storage().data_ptr() for block in self.blocks]
        index = storages.index(source.untyped_storage().data_ptr())
        self.copies.append((target, source, index))
        self.log.append(f"copy {index}")
        return len(self.copies)

    def wait(self, event: int) -> None:
        target, _, index = self.copies[event - 1]
        self.log.append(f"wait {index}")
        if self.waits:
            self._advance(event)
        self.used[target.data_ptr()] = self.num_marks

    def finish(self) -> None:
        self._advance(len(self.copies))

    def _advance(self, count: int) -> None:
        for target, source, _ in self.copies[self.num_done : count]:
            super().copy(target, source, None)
        self.num_done = max(self.num_done, count)


@contextmanager
def delayed(streamer: BlockStreamer) -> Iterator[Delayed]:
    """Makes the copies of a streamer late ones."""
    streamer.unload()
    before = streamer._transfers
    streamer._transfers = transfers = Delayed(streamer.blocks)
    yield transfers
    streamer.unload()
    streamer._transfers = before


# Inference


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_forward_pass_is_the_resident_one_bit_by_bit(weight_format):
    dit = build(weight_format)
    expected = {batch: sample(dit, batch) for batch in (1, 4)}
    state = copied_state(dit)
    for ring_size, num_resident in ((2, 0), (2, 3), (3, 5), (2, NUM_BLOCKS)):
        streamer = stream_dit(dit, "cpu", num_resident=num_resident, ring_size=ring_size)
        for batch in (1, 4):
            assert torch.equal(sample(dit, batch), expected[batch]), (ring_size, num_resident, batch)
        assert torch.equal(run(dit, 4), expected[4]), "gradients are on, and nothing asks for them"
        assert_equal(dit.state_dict(), state)
        streamer.close()


@pytest.mark.parametrize(("ring_size", "num_resident"), [(1, 0), (2, 0), (2, 3), (3, 0)])
def test_it_does_not_depend_on_when_copies_are_made(ring_size, num_resident):
    dit = build()
    expected = sample(dit)
    streamer = stream_dit(dit, "cpu", num_resident=num_resident, ring_size=ring_size)
    with delayed(streamer) as transfers:
        for _ in range(3):
            assert torch.equal(sample(dit), expected)
        transfers.waits = False
        assert not torch.equal(sample(dit), expected), "a missing wait would not be seen"


def test_the_next_block_is_copied_while_one_runs_and_the_first_one_at_the_end():
    dit = build()
    streamer = stream_dit(dit, "cpu", num_resident=0)
    with delayed(streamer) as transfers:
        for index, linear in enumerate(first_linears(dit)):
            linear.register_forward_hook(lambda *_, index=index: transfers.log.append(f"block {index}"))
        sample(dit)
        ring = ["mark", "mark"]
        assert transfers.log[:8] == [*ring, "copy 0", "wait 0", "copy 1", "block 0", "mark", "copy 2"]
        assert transfers.log[8:12] == ["wait 1", "block 1", "mark", "copy 3"]
        assert transfers.log[-4:] == ["wait 6", "block 6", "mark", "copy 1"]
        transfers.log.clear()
        sample(dit)
        assert transfers.log[:4] == ["wait 0", "block 0", "mark", "copy 2"]
        assert sum(entry.startswith("copy") for entry in transfers.log) == NUM_BLOCKS


def test_a_copy_begins_at_the_end_of_a_streamed_block_although_a_resident_one_follows():
    dit = build()
    streamer = stream_dit(dit, "cpu", num_resident=3)
    assert list(streamer._streamed) == [0, 2, 4, 6]
    with delayed(streamer) as transfers:
        for index, linear in enumerate(first_linears(dit)):
            linear.register_forward_hook(lambda *_, index=index: transfers.log.append(f"block {index}"))
        sample(dit)
    assert transfers.log[5:12] == ["block 0", "mark", "copy 4", "block 1", "wait 2", "block 2", "mark"]


def test_what_fits_into_the_ring_is_copied_once():
    dit = build()
    streamer = stream_dit(dit, "cpu", num_resident=5, ring_size=4)
    with delayed(streamer) as transfers:
        for _ in range(3):
            sample(dit)
        assert sum(entry.startswith("copy") for entry in transfers.log) == 2
    assert streamer.ring_bytes == 2 * max(streamer._streamed[index].num_bytes for index in streamer._streamed)


def test_two_models_by_turns():
    left, right = build(), build(seed=1)
    expected = sample(left), sample(right)
    assert not torch.equal(*expected)
    streamers = stream_dit(left, "cpu", num_resident=1), stream_dit(right, "cpu", num_resident=0)
    with delayed(streamers[0]), delayed(streamers[1]):
        for _ in range(2):
            assert torch.equal(sample(left), expected[0])
            assert torch.equal(sample(right), expected[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("index", [0, 2, 6])
def test_after_an_error_in_the_middle_the_next_call_is_right(index, error):
    dit = build()
    expected, state = sample(dit), copied_state(dit)
    streamer = stream_dit(dit, "cpu", num_resident=2)

    def fail(*_):
        raise error("in the middle")

    with delayed(streamer):
        handle = first_linears(dit)[index].register_forward_hook(fail)
        for _ in range(2):
            with pytest.raises(error, match="in the middle"):
                sample(dit)
        handle.remove()
        assert_equal(dit.state_dict(), state)
        assert torch.equal(sample(dit), expected)


def test_compiled_blocks_are_compiled_once_for_all_and_run_streamed():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    for when in ("before", "after", "forward"):
        torch.compiler.reset()
        graphs.clear()
        dit = build()
        expected = sample(dit)
        if when == "forward":
            for block in blocks_of(dit):
                block.forward = torch.compile(block.forward, backend=backend)
        streamer = None if when == "after" else stream_dit(dit, "cpu", num_resident=2)
        for block in blocks_of(dit) if when != "forward" else []:
            block.compile(backend=backend)
        streamer = streamer or stream_dit(dit, "cpu", num_resident=2)
        for _ in range(2):
            torch.testing.assert_close(sample(dit), expected)  # the rotation is written out for a compiler
        assert len(graphs) == 2, (when, "one for double and one for single blocks")
        streamer.close()
        torch.testing.assert_close(sample(dit), expected)


# Training


@pytest.mark.parametrize(("weight_format", "checkpointing"), [*((f, "blocks") for f in FORMATS), ("fp32", "offload")])
def test_gradients_are_those_of_the_resident_model_bit_by_bit(weight_format, checkpointing):
    dit = build("fp32" if weight_format == "fp32" else "bf16")
    adapters = adapt(dit, dropout=0.3)
    quantise(dit, weight_format)
    dit.checkpointing = checkpointing
    expected, picture = train(dit, adapters), sample(dit)
    assert all(gradient.count_nonzero() for gradient in expected)
    for ring_size, num_resident in ((2, 0), (3, 2)):
        streamer = stream_dit(dit, "cpu", num_resident=num_resident, ring_size=ring_size)
        for gradient, wanted in zip(train(dit, adapters), expected, strict=True):
            assert torch.equal(gradient, wanted), (ring_size, num_resident)
        assert torch.equal(sample(dit), picture)
        streamer.close()


@pytest.mark.parametrize(("ring_size", "num_resident"), [(1, 0), (2, 0), (2, 3), (3, 0)])
def test_gradients_do_not_depend_on_when_copies_are_made(ring_size, num_resident):
    dit = build()
    adapters = adapt(dit)
    dit.checkpointing = "blocks"
    expected, picture = train(dit, adapters), sample(dit)
    streamer = stream_dit(dit, "cpu", num_resident=num_resident, ring_size=ring_size)
    with delayed(streamer):
        for _ in range(2):
            assert all(map(torch.equal, train(dit, adapters), expected))
            assert torch.equal(sample(dit), picture)


def test_a_buffer_is_given_free_only_when_the_backward_pass_of_its_block_is_over():
    dit = build()
    adapters = adapt(dit)
    dit.checkpointing = "blocks"
    streamer = stream_dit(dit, "cpu", num_resident=0)
    with delayed(streamer) as transfers:

        def watch(index: int, x: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:
                x.register_hook(lambda gradient: transfers.log.append(f"gradient {index}"))

        for index, block in enumerate(blocks_of(dit)):
            if index:  # the gradient of what goes in is the last of a block
                block.register_forward_pre_hook(lambda module, inputs, index=index: watch(index, inputs[0]))
        train(dit, adapters, num_steps=1)
    log = transfers.log[transfers.log.index("gradient 6") - 1 :]
    # The last two blocks are still in the ring; 4 goes where 6 was, after the gradients of 6.
    assert log[:7] == ["wait 6", "gradient 6", "mark", "wait 5", "copy 4", "gradient 5", "mark"]
    assert log[7:11] == ["wait 4", "copy 3", "gradient 4", "mark"]


def test_a_step_copies_what_the_ring_does_not_hold_and_turns_around_without_a_copy():
    dit = build()
    adapters = adapt(dit)
    dit.checkpointing = "blocks"
    streamer = stream_dit(dit, "cpu", num_resident=0)
    train(dit, adapters, num_steps=1)
    with delayed(streamer) as transfers:
        train(dit, adapters, num_steps=1)
        assert sum(entry.startswith("copy") for entry in transfers.log) == 2 * NUM_BLOCKS - 2
        transfers.log.clear()
        train(dit, adapters, num_steps=1)
        assert sum(entry.startswith("copy") for entry in transfers.log) == 2 * NUM_BLOCKS - 4


def test_two_passes_before_one_backward_and_a_kept_graph():
    dit = build()
    adapters = adapt(dit)
    dit.checkpointing = "blocks"

    def gradients() -> list[Tensor]:
        adapters.zero_grad()
        first, second = run(dit, 1), run(dit, 2)
        loss = first.square().mean() + second.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return [parameter.grad.clone() for parameter in adapters.parameters()]

    expected = gradients()
    streamer = stream_dit(dit, "cpu", num_resident=2)
    with delayed(streamer):
        assert all(map(torch.equal, gradients(), expected))


def test_training_without_checkpointing_is_refused():
    dit = build()
    adapters = adapt(dit)
    streamer = stream_dit(dit, "cpu", num_resident=2)
    with pytest.raises(ValueError, match="only with activation checkpointing"):
        run(dit)
    dit.checkpointing = "blocks"
    assert all(gradient.count_nonzero() for gradient in train(dit, adapters))
    dit.checkpointing = "none"
    streamer.set_num_resident(NUM_BLOCKS)
    assert all(gradient.count_nonzero() for gradient in train(dit, adapters))


def test_autograd_sees_that_a_weight_it_needs_was_overwritten():
    torch.manual_seed(0)
    blocks = [nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(4)]
    x = torch.randn(2, 8, requires_grad=True)
    BlockStreamer(blocks, "cpu", num_resident=0)
    y = x
    for block in blocks:
        y = block(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_that_are_trained_are_refused():
    dit = build()
    dit.single_blocks[1].linear1.requires_grad_(True)
    with pytest.raises(ValueError, match=r"linear1\.weight of a SingleBlock is"):
        stream_dit(dit, "cpu", num_resident=2)
    dit.requires_grad_(False)
    stream_dit(dit, "cpu", num_resident=0)
    dit.requires_grad_(True)
    with pytest.raises(ValueError, match="train adapters"):
        run(dit)


# What stands in the model, and changes from outside


def test_while_it_runs_a_block_lies_in_the_ring_and_otherwise_in_one_buffer_on_the_host():
    dit = build("fp8")
    outside = dict(dit.named_parameters())
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in blocks_tensors(dit)]
    streamer = stream_dit(dit, "cpu", num_resident=0)
    gc.collect()
    assert all(storage.expired() for storage in storages), "what was loaded is still there"
    assert dict(dit.named_parameters()).keys() == outside.keys()
    assert all(parameter is outside[name] for name, parameter in dit.named_parameters())
    inside = []
    for linear in first_linears(dit):
        linear.register_forward_hook(lambda module, *_: inside.append(module.weight.untyped_storage().data_ptr()))
    sample(dit)
    ring = [slot.buffer.untyped_storage().data_ptr() for slot in streamer._slots]
    assert inside == [ring[index % 2] for index in range(NUM_BLOCKS)]
    for block in blocks_of(dit):
        assert len({tensor.untyped_storage().data_ptr() for tensor in [*block.parameters(), *block.buffers()]}) == 1
    total = sum(streamer._streamed[index].num_bytes for index in range(NUM_BLOCKS))
    assert (streamer.resident_bytes, streamer.host_bytes) == (0, total)
    assert sum(map(tensor_bytes, blocks_of(dit))) <= total <= 1.1 * sum(map(tensor_bytes, blocks_of(dit)))


def test_a_streamed_model_is_saved_whole(tmp_path):
    dit = build("bf16")
    expected, state = sample(dit), copied_state(dit)
    variant = VARIANTS["tiny"]
    stream_dit(dit, "cpu", num_resident=3)
    sample(dit)
    assert_equal(dit.state_dict(), state)
    assert (dit.device, dit.dtype) == (torch.device("cpu"), torch.bfloat16)
    from safetensors.torch import load_file

    assert_equal(load_file(save_dit(tmp_path / "dit.safetensors", dit, variant)), state)
    assert torch.equal(sample(dit), expected)


@pytest.mark.parametrize("num_resident", [0, 3])
def test_live_loras_change_between_calls(num_resident):
    dit = build("fp8")
    lora = adapted_lora()
    plain = sample(dit)
    apply_loras(dit, [LoraSetting(lora=lora)])
    adapted = sample(dit)
    apply_loras(dit, [])
    assert not torch.equal(adapted, plain)
    stream_dit(dit, "cpu", num_resident=num_resident)
    for setting, expected in (([], plain), ([LoraSetting(lora=lora)], adapted), ([], plain)):
        apply_loras(dit, setting)
        assert torch.equal(sample(dit), expected)


def test_weights_that_are_merged_or_loaded_are_taken_over():
    dit, other = build(), build(seed=1)
    merge_loras(other, [LoraSetting(lora=adapted_lora())])
    merged = sample(other)
    streamer = stream_dit(dit, "cpu", num_resident=2)
    with delayed(streamer):
        before = sample(dit)
        dit.load_state_dict(build(seed=1).state_dict())
        loaded = sample(dit)
        assert not torch.equal(loaded, before) and torch.equal(loaded, sample(build(seed=1)))
        merge_loras(dit, [LoraSetting(lora=adapted_lora())])
        assert torch.equal(sample(dit), merged)
        dit.load_state_dict(build(seed=1).state_dict(), assign=True)
        dit.requires_grad_(False)
        assert torch.equal(sample(dit), loaded)


def test_types_change_as_in_a_resident_model():
    dit, resident = build("fp8"), build("fp8")
    streamer = stream_dit(dit, "cpu", num_resident=2)
    sample(dit)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            dit.to(dtype)
            resident.to(dtype)
        assert_equal(dit.state_dict(), resident.state_dict())
        assert torch.equal(sample(dit), sample(resident))
    plain, resident = build(), build().to(torch.bfloat16)
    streamer = stream_dit(plain, "cpu", num_resident=2)
    size = streamer.ring_bytes
    plain.to(torch.bfloat16)
    assert torch.equal(sample(plain), sample(resident))
    assert streamer.ring_bytes < 0.6 * size


def test_moved_to_another_device_streamed_blocks_stay_in_host_memory():
    dit = build()
    streamer = stream_dit(dit, "cpu", num_resident=3)
    sample(dit)
    state = copied_state(dit)
    dit.to("meta")
    assert streamer.device == dit.device == torch.device("meta")
    assert streamer._slots is None, "the ring is still there"
    for index, block in enumerate(blocks_of(dit)):
        devices = {tensor.device.type for tensor in block.parameters()}
        assert devices == {"cpu" if index in streamed_indices(NUM_BLOCKS, 3) else "meta"}
    for name, tensor in dit.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, state[name])


def test_residency_changes_at_run_time():
    dit = build("bf16")
    expected, state = sample(dit), copied_state(dit)
    streamer = stream_dit(dit, "cpu", num_resident=5)
    total = sum(map(tensor_bytes, blocks_of(dit)))
    for num_resident in (5, 1, 0, 4, NUM_BLOCKS, 2):
        streamer.set_num_resident(num_resident)
        assert streamer.num_resident == num_resident
        streamed = streamed_indices(NUM_BLOCKS, num_resident)
        left = sum(tensor_bytes(blocks_of(dit)[index]) for index in streamed)
        assert streamer.resident_bytes == total - left
        assert left <= streamer.host_bytes <= 1.1 * left
        for _ in range(2):
            assert torch.equal(sample(dit), expected)
        assert_equal(dit.state_dict(), state)


def test_a_block_that_does_not_fit_on_the_device_stays_streamed(monkeypatch):
    dit = build()
    expected, state = sample(dit), copied_state(dit)
    streamer = stream_dit(dit, "cpu", num_resident=0)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dit.double_blocks[1].img_mlp, "_apply", fail)
    with pytest.raises(torch.OutOfMemoryError):
        streamer.set_num_resident(NUM_BLOCKS)
    monkeypatch.undo()
    assert list(streamer._streamed) == [1, 2, 3, 4, 5, 6]
    with delayed(streamer):
        for _ in range(2):
            assert torch.equal(sample(dit), expected)
    streamer.set_num_resident(5)
    assert torch.equal(sample(dit), expected)
    assert_equal(dit.state_dict(), state)


def test_whether_a_device_multiplies_in_8_bits_is_tried_before_a_block_runs(monkeypatch):
    tried = []
    monkeypatch.setattr("flux2_kit.flux2_core.fp8.scaled_mm", tried.append)
    stream_dit(build(), "cpu", num_resident=0)
    assert not tried
    stream_dit(build("fp8"), "cpu", num_resident=0)
    assert tried == [torch.device("cpu")]


def test_closed_it_is_a_plain_model():
    dit = build()
    expected, state = sample(dit), copied_state(dit)
    streamer = stream_dit(dit, "cpu", num_resident=2)
    sample(dit)
    ring = [StorageWeakRef(slot.buffer.untyped_storage()) for slot in streamer._slots]
    streamer.unload()
    gc.collect()
    assert all(storage.expired() for storage in ring), "the ring is still there"
    assert torch.equal(sample(dit), expected)
    streamer.close()
    streamer.close()
    assert streamer.ring_bytes == streamer.host_bytes == 0
    assert not any({"forward", "_apply"} & block.__dict__.keys() for block in blocks_of(dit))
    assert_equal(dit.state_dict(), state)
    adapters = adapt(dit)
    assert all(gradient.count_nonzero() for gradient in train(dit, adapters))


def test_numbers_that_cannot_be_are_refused_and_leave_the_model_as_it_was():
    for options in ({"num_resident": 8}, {"num_resident": -1}, {"num_resident": 0, "ring_size": 0}):
        dit = build()
        with pytest.raises(ValueError, match=r"give 0 to 7|needs 1 or more"):
            stream_dit(dit, "cpu", **options)
        assert not any({"forward", "_apply"} & block.__dict__.keys() for block in blocks_of(dit))


# Which blocks, and in which order


@pytest.mark.parametrize("num_blocks", [1, 7, 25, 56])
def test_streamed_blocks_are_spread_evenly(num_blocks):
    for num_resident in range(num_blocks + 1):
        indices = streamed_indices(num_blocks, num_resident)
        assert len(set(indices)) == num_blocks - num_resident and indices == sorted(indices)
        assert not indices or (indices[0] >= 0 and indices[-1] < num_blocks)
        if indices:
            following = [*indices[1:], indices[0] + num_blocks]
            distances = [right - left for left, right in zip(indices, following, strict=True)]
            assert max(distances) - min(distances) <= 1, (num_resident, indices)
    assert streamed_indices(8, 4) == [1, 3, 5, 7]


def test_the_order_of_what_comes_next():
    streamed = [1, 3, 5]
    assert upcoming(streamed, 3, "inference")[:4] == [5, 1, 3, 5]
    assert upcoming(streamed, 4, "inference")[:3] == [5, 1, 3]
    assert upcoming(streamed, 3, "forward") == [5, 5, 3, 1]
    assert upcoming(streamed, 6, "forward") == [5, 3, 1]
    assert upcoming(streamed, 5, "backward") == [3, 1, 1, 3, 5]
    assert upcoming(streamed, 0, "backward") == [1, 3, 5]


# Text encoders


@pytest.mark.parametrize("num_resident", [0, 2])
def test_a_text_encoder_streams_its_layers(random_tiny_files, num_resident):
    expected = load_text_encoder(random_tiny_files.text_encoder).encode(["a red cube", ""]).embeddings
    text_encoder = load_text_encoder(random_tiny_files.text_encoder)
    streamer = stream_text_encoder(text_encoder, "cpu", num_resident=num_resident)
    assert streamer.num_resident == num_resident
    with delayed(streamer) as transfers:
        for _ in range(2):
            assert torch.equal(text_encoder.encode(["a red cube", ""]).embeddings, expected)
        assert any(entry.startswith("copy") for entry in transfers.log)
    text_encoder.to("cpu")
    streamer.close()
    assert torch.equal(text_encoder.encode(["a red cube", ""]).embeddings, expected)


def test_the_token_embedding_stays_in_host_memory(random_tiny_files):
    text_encoder = load_text_encoder(random_tiny_files.text_encoder)
    embedding: nn.Module = text_encoder.model.embed_tokens  # pyright: ignore
    weight = embedding.weight
    streamer = stream_text_encoder(text_encoder, "cpu")
    looked_up = embedding(torch.tensor([[3, 5]]))
    embedding.to("meta", torch.float16)
    assert streamer.device.type == "meta" and embedding.weight is weight and weight.device.type == "cpu"
    assert weight.dtype == torch.float16, "types change"
    there = embedding(torch.tensor([[3, 5]], device="cpu"))
    assert there.device.type == "meta" and there.shape == looked_up.shape
    streamer.close()
    assert torch.equal(embedding(torch.tensor([[3, 5]])), looked_up.half()) and "forward" not in embedding.__dict__


def test_host_memory_that_cannot_be_pinned_is_told_of_once_and_not_asked_for_again(monkeypatch, caplog):
    asked = []
    cudart = SimpleNamespace(cudaHostRegister=lambda *given: (asked.append(given), 2)[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(block_memory, "_clear_cuda_error", lambda: None)
    block_memory._tell_of_refusal.cache_clear()
    buffers = [block_memory.HostBuffer(10), block_memory.HostBuffer(5000)]
    for buffer in (*buffers, *buffers):
        buffer.pin()
    assert [(address % 4096, size) for address, size, _ in asked] == [(0, 4096), (0, 8192)]
    assert len(caplog.records) == 1 and "CUDA error 2" in caplog.text
