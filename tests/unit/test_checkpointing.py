"""Activation checkpointing of the DiT: equal gradients, fewer bytes, inputs that really leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flux2_kit.flux2_core import activation_checkpointing
from flux2_kit.flux2_core.activation_checkpointing import HostStore
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=3,
    context_dim=48,
    has_guidance_embedder=True,
    rope_axes=(8, 8, 8, 8),
)
MODES = ["none", "blocks", "offload"]
NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS = 24, 7


def build(dropout: float = 0.0, **options) -> tuple[Flux2DiT, TrainableAdapters]:
    """A frozen DiT with adapters that are no zero change."""
    generator = torch.Generator().manual_seed(0)
    dit = Flux2DiT(CONFIG).requires_grad_(False)
    adapters = TrainableAdapters(dit, AdapterConfig(rank=4, dropout=dropout, **options), generator=generator)
    for parameter in [*dit.parameters(), *adapters.parameters()]:
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    adapters.attach()
    return dit, adapters


def run(dit: Flux2DiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, NUM_IMAGE_TOKENS, 128, generator=generator)
    text = torch.randn(2, NUM_TEXT_TOKENS, 48, generator=generator)
    sigma, guidance = torch.tensor([0.9, 0.3]), torch.ones(2)
    return dit(tokens, image_ids(4, 6), text, text_ids(NUM_TEXT_TOKENS), sigma, guidance)


def gradients(mode: str, num_backwards: int = 1, **options) -> tuple[Tensor, dict[str, Tensor]]:
    dit, adapters = build(**options)
    dit.checkpointing = mode
    torch.manual_seed(5)
    output = run(dit)
    for _ in range(num_backwards):
        output.square().mean().backward(retain_graph=num_backwards > 1)
    return output, {name: parameter.grad for name, parameter in adapters.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"include": ("",)}], ids=["", "dropout", "every layer"])
@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_gradients_are_those_without_checkpointing_bit_by_bit(mode, options):
    output, expected = gradients("none", **options)
    got_output, got = gradients(mode, **options)
    assert torch.equal(got_output, output)
    assert expected and all(gradient.count_nonzero() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_dropout_draws_anew_at_every_step():
    dit, _ = build(dropout=0.3)
    dit.checkpointing = "blocks"
    assert not torch.equal(run(dit), run(dit))


@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_a_graph_that_is_kept_can_run_backward_twice(mode):
    _, once = gradients("none")
    _, twice = gradients(mode, num_backwards=2)
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient)


def saved_bytes(mode: str) -> int:
    """Bytes that autograd keeps on the device after a forward pass, weights aside, each storage once.

    Hooks of a checkpoint take the place of these, as do those of the offload: what they keep is not counted.
    """
    dit, adapters = build()
    dit.checkpointing = mode
    weights = {parameter.data_ptr() for parameter in [*dit.parameters(), *adapters.parameters()]}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(dit)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_bytes_kept_for_the_backward_pass():
    none, blocks, offload = (saved_bytes(mode) for mode in MODES)
    num_blocks = CONFIG.num_double_blocks + CONFIG.num_single_blocks
    inputs = num_blocks * 2 * (NUM_IMAGE_TOKENS + NUM_TEXT_TOKENS) * CONFIG.hidden_size * 4
    assert blocks - offload == inputs
    assert blocks < none / 8


@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_inputs_of_blocks_leave_the_device_only_when_offloaded(mode):
    dit, _ = build()
    dit.checkpointing = mode
    storages: list[StorageWeakRef] = []

    def remember(module: torch.nn.Module, inputs: tuple) -> None:
        storages.extend(StorageWeakRef(t.untyped_storage()) for t in inputs[: 1 + (module in list(dit.double_blocks))])

    for block in [*dit.double_blocks, *dit.single_blocks]:
        block.register_forward_pre_hook(remember)
    output = run(dit)
    assert len(storages) == 2 * CONFIG.num_double_blocks + CONFIG.num_single_blocks
    expired = [storage.expired() for storage in storages]
    assert all(expired) if mode == "offload" else not any(expired)
    output.sum().backward()


@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_each_block_runs_once_more_in_the_backward_pass_and_only_with_gradients(mode, monkeypatch):
    dit, _ = build()
    dit.checkpointing = mode
    runs, checkpointed = [], []
    checkpoint = activation_checkpointing.checkpoint
    monkeypatch.setattr(
        activation_checkpointing,
        "checkpoint",
        lambda *args, **options: (checkpointed.append(args), checkpoint(*args, **options))[1],
    )
    for block in [*dit.double_blocks, *dit.single_blocks]:
        block.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    with torch.inference_mode():
        plain = run(dit)
    assert plain.is_inference() and len(runs) == 5
    with torch.no_grad():
        assert torch.equal(run(dit), plain)
    assert not checkpointed
    output = run(dit)
    assert len(checkpointed) == 5
    assert torch.equal(output, plain) and len(runs) == 15
    output.sum().backward()
    assert len(runs) == 20 and runs[15:] == runs[14:9:-1]


def test_it_is_no_part_of_the_state():
    dit = Flux2DiT(CONFIG)
    names = set(dit.state_dict())
    dit.checkpointing = "offload"
    assert set(dit.state_dict()) == names


def test_an_unknown_mode_is_refused():
    dit, _ = build()
    dit.checkpointing = "block"
    with pytest.raises(ValueError, match="none, blocks, offload, got 'block'"):
        run(dit)


def test_tensors_are_fetched_before_they_are_asked_for(monkeypatch):
    store = HostStore()
    fetch, fetched = store._fetch, []
    monkeypatch.setattr(store, "_fetch", lambda item: (fetched.append(item.index), fetch(item)))
    tensors = [torch.full((3,), float(index)) for index in range(6)]
    items = [store.put(tensor) for tensor in tensors]
    assert all(item.fetched is None for item in items)
    assert torch.equal(store.get(items[5]), tensors[5])
    assert [item.fetched is not None for item in items] == [False, False, False, True, True, False]
    assert fetched == [5, 4, 3]  # the one that is needed first comes first
    for tensor in tensors:
        tensor.zero_()
    assert [store.get(item)[0].item() for item in reversed(items)] == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    empty = torch.empty(0)
    assert store.get(store.put(empty)) is empty


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_on_a_gpu_gradients_are_equal_and_memory_is_less(mode):
    config = replace(CONFIG, hidden_size=512, num_heads=4, num_single_blocks=12, rope_axes=(32, 32, 32, 32))
    generator = torch.Generator().manual_seed(0)
    dit = Flux2DiT(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    dit = dit.to("cuda", torch.bfloat16)
    adapters = TrainableAdapters(dit, AdapterConfig(rank=8, dropout=0.1), generator=generator)
    adapters.attach()
    for parameter in adapters.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).cuda() / parameter.shape[1] ** 0.5
    tokens, text = torch.randn(1, 4096, 128).bfloat16().cuda(), torch.randn(1, 64, 48).bfloat16().cuda()
    ids, words = image_ids(64, 64).cuda(), text_ids(64).cuda()
    results = {}
    for run_mode in ("none", "blocks", "offload", mode):  # the last one with warm pools of memory
        dit.checkpointing = run_mode
        adapters.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.manual_seed(3)
        output = dit(tokens, ids, text, words, torch.full((1,), 0.7).cuda(), torch.ones(1).cuda())
        kept = torch.cuda.memory_allocated() - before
        output.float().square().mean().backward()
        torch.cuda.synchronize()
        gradients = [parameter.grad.clone() for parameter in adapters.parameters()]
        results[run_mode] = (kept, torch.cuda.max_memory_allocated() - before, gradients)
    for got, expected in zip(results[mode][2], results["none"][2], strict=True):
        assert ((got - expected).norm() / expected.norm()).item() < 1e-3  # attention's backward adds in any order
    inputs = 14 * 4160 * 512 * 2
    assert results["blocks"][0] < results["none"][0] / 5
    assert results["blocks"][0] - results["offload"][0] > 0.7 * inputs
    assert results["offload"][1] < results["blocks"][1] - 0.5 * inputs
