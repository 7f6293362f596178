"""Estimates of memory against what is allocated on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from flux2_kit.flux2_core import autoencoder_memory, autoencoder_strips
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, arrange_channels
from flux2_kit.flux2_core.autoencoder_memory import (
    autoencoder_bytes,
    decoding_bytes,
    encoding_bytes,
    host_strip_bytes,
    strip_bytes,
)
from flux2_kit.flux2_core.block_memory import lay_out
from flux2_kit.flux2_core.block_memory import tensor_bytes as bytes_of
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.memory_estimates import (
    Computation,
    TokenCounts,
    adapter_parameters,
    dit_bytes,
    forward_bytes,
    saved_bytes,
    text_encoder_bytes,
    text_encoding_bytes,
    training_bytes,
)
from flux2_kit.flux2_core.text_encoder import load_text_encoder
from flux2_kit.flux2_core.variants import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, QWEN3_TINY, VARIANTS
from flux2_kit.flux2_core.weights import DIT_BYTES, TEXT_ENCODER_BYTES, TINY_FOLDER
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters, TrainedLora
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONFIG = DiTConfig(
    hidden_size=256,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=3,
    context_dim=64,
    has_guidance_embedder=False,
)
DTYPES = [torch.bfloat16, torch.float32]
FORMATS = [None, "fp8", "nf4"]
RANK = 4
SIDE, NUM_TEXT = 24, 64
"""Of a picture, in latents; text tokens."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that operations make and that has not been freed again."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sweep()
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs or {}))}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.storages:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result

    def sweep(self) -> None:
        for key, (reference, num_bytes) in list(self.storages.items()):
            if reference.expired():
                del self.storages[key]
                self.live -= num_bytes


def tensors_of(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_of(work: Callable[[], object]) -> int:
    with Allocations() as allocations:
        work()
    return allocations.peak


@contextmanager
def saved_storages(without: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of what is saved for a backward pass, by storage."""
    known = {tensor.untyped_storage()._cdata for tensor in without}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def make_dit(dtype: torch.dtype, weight_format: Any = None, config: DiTConfig = CONFIG) -> Flux2DiT:
    torch.manual_seed(0)
    dit = Flux2DiT(config).to(dtype).requires_grad_(False)
    for block in [*dit.double_blocks, *dit.single_blocks]:
        for layer in block.modules():
            if isinstance(layer, Linear) and weight_format:
                layer.quantise(weight_format)
    return dit


def computation(dtype: torch.dtype, weight_format: Any, *, is_adapted: bool) -> Computation:
    return Computation(item_bytes=dtype.itemsize, weight_format=weight_format, is_cuda=False, is_adapted=is_adapted)


def inputs(dit: Flux2DiT, side: int, num_text: int, rows: int = 1) -> tuple[Tensor, ...]:
    tokens = torch.randn(rows, side * side, 128).to(dit.dtype)
    text = torch.randn(rows, num_text, dit.config.context_dim).to(dit.dtype)
    return tokens, image_ids(side, side), text, text_ids(num_text), torch.full((rows,), 0.5)


def assert_near(estimate: int, measured: int, tolerance: float = 0.1) -> None:
    assert measured * (1 - tolerance) < estimate < measured * (1 + tolerance), f"{estimate / measured:.3f}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_weights_of_a_dit_are_exact(dtype, weight_format):
    dit = make_dit(dtype, weight_format)
    blocks = [*dit.double_blocks, *dit.single_blocks]
    weights = dit_bytes(CONFIG, weight_format, dtype.itemsize)
    assert weights.blocks == tuple(bytes_of(block) for block in blocks)
    assert weights.slots == tuple(lay_out(block)[1] for block in blocks)
    assert weights.total == bytes_of(dit)
    assert weights.largest_dense == dit.single_blocks[0].linear1.dense_weight(dtype).nbytes


@pytest.mark.parametrize("name", ["dev", "klein-4b", "klein-9b"])
def test_weights_of_released_dits_are_those_of_their_files(name):
    config = VARIANTS[name].dit
    with torch.device("meta"):
        assert dit_bytes(config, None, 2).total == bytes_of(Flux2DiT(config).bfloat16())
    assert math.isclose(dit_bytes(config, None, 2).total, DIT_BYTES[config], rel_tol=0.001)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_weights_of_a_text_encoder_are_exact(weight_format):
    encoder = load_text_encoder(TINY_FOLDER / "text_encoder", dtype=torch.float32, precision=weight_format)
    model: Any = encoder.model
    weights = text_encoder_bytes(QWEN3_TINY, weight_format, 4)
    assert weights.blocks == tuple(bytes_of(layer) for layer in model.layers)
    assert weights.slots == tuple(lay_out(layer)[1] for layer in model.layers)
    assert math.isclose(weights.total, bytes_of(model), rel_tol=0.01)


@pytest.mark.parametrize(
    ("config", "num_layers", "num_embeddings", "rest"),
    [(QWEN3_4B, 36, 1, 0), (QWEN3_8B, 36, 2, 0), (MISTRAL_SMALL, 40, 2, 0.88e9)],
    ids=["Qwen3-4B", "Qwen3-8B", "Mistral"],
)
def test_layers_of_released_text_encoders_add_up_to_their_files(config, num_layers, num_embeddings, rest):
    """All layers, with the output head where it is not the embedding, and Mistral's vision tower."""
    weights = text_encoder_bytes(config, None, 2)
    assert len(weights.blocks) == config.num_layers
    total = weights.blocks[0] * num_layers + weights.outer * num_embeddings + rest
    assert math.isclose(total, TEXT_ENCODER_BYTES[config], rel_tol=0.005)


ONLY_DOUBLE, ONLY_SINGLE = replace(CONFIG, num_single_blocks=0), replace(CONFIG, num_double_blocks=0)


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    ("config", "side", "num_text", "rows"),
    [
        (CONFIG, 16, 64, 1),
        (ONLY_DOUBLE, 6, 128, 2),
        (ONLY_SINGLE, 12, 16, 2),
        (ONLY_DOUBLE, 16, 16, 1),
        (CONFIG, 4, 8, 1),
    ],
)
def test_peak_of_a_forward_pass(dtype, weight_format, config, side, num_text, rows, is_adapted, monkeypatch):
    dit = make_dit(dtype, weight_format, config)
    if is_adapted:
        monkeypatch.setattr(TrainedLora, "low_rank", lambda self, x: None)  # as with dropout and other kinds
    if is_adapted or weight_format is None:  # plain LoRAs take next to nothing
        adapt(dit)
    given = inputs(dit, side, num_text, rows)
    with torch.inference_mode():
        measured = sum(tensor.nbytes for tensor in given) + peak_of(lambda: dit(*given))
    tokens = TokenCounts(num_rows=rows, num_tokens=side * side, num_text_tokens=num_text)
    estimate = forward_bytes(config, tokens, computation(dtype, weight_format, is_adapted=is_adapted))
    assert_near(estimate, measured)


def adapt(dit: Flux2DiT) -> TrainableAdapters:
    adapters = TrainableAdapters(dit, AdapterConfig(rank=RANK), generator=torch.Generator().manual_seed(0))
    adapters.attach()
    return adapters


def casts(adapters: TrainableAdapters) -> list[Tensor]:
    return [cast for layer in adapters.layers.values() for held in layer.held.values() for cast in held]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", ["double", "single"])
def test_what_a_block_keeps_for_its_backward_pass(dtype, block):
    config = (
        replace(ONLY_DOUBLE, num_double_blocks=1) if block == "double" else replace(ONLY_SINGLE, num_single_blocks=1)
    )
    dit = make_dit(dtype, config=config)
    adapters = adapt(dit)
    with (
        adapters.cast_once(dtype),
        saved_storages([*dit.parameters(), *adapters.parameters(), *casts(adapters)]) as kept,
    ):
        output = dit(*inputs(dit, SIDE, NUM_TEXT))
    assert output.requires_grad
    tokens = TokenCounts(num_rows=1, num_tokens=SIDE * SIDE, num_text_tokens=NUM_TEXT)
    double, single = saved_bytes(config, tokens, computation(dtype, None, is_adapted=True), RANK)
    assert_near(double if block == "double" else single, sum(kept.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize(("side", "num_text"), [(16, 64), (12, 32)])
def test_peak_of_a_training_step(dtype, weight_format, checkpointing, side, num_text):
    dit = make_dit(dtype, weight_format)
    dit.checkpointing = checkpointing
    adapters = adapt(dit)
    given = inputs(dit, side, num_text)

    def step() -> None:
        with adapters.cast_once(dtype):
            dit(*given).float().square().mean().backward()

    step()  # makes the gradients
    measured = sum(tensor.nbytes for tensor in given) + peak_of(step)
    tokens = TokenCounts(num_rows=1, num_tokens=side * side, num_text_tokens=num_text)
    how = computation(dtype, weight_format, is_adapted=True)
    assert_near(training_bytes(CONFIG, tokens, how, rank=RANK, checkpointing=checkpointing), measured)
    assert adapter_parameters(CONFIG, RANK) == sum(parameter.numel() for parameter in adapters.parameters())


AUTOENCODERS = [
    AutoencoderConfig(encoder_widths=(16, 32, 64, 64), decoder_widths=(16, 32, 64, 64), num_norm_groups=8),
    AutoencoderConfig(
        encoder_widths=(16, 32, 64, 96), decoder_widths=(12, 24, 48, 48), num_res_blocks=1, num_norm_groups=4
    ),
]


def make_autoencoder(config: AutoencoderConfig, dtype: torch.dtype) -> Flux2Autoencoder:
    return arrange_channels(Flux2Autoencoder(config).to(dtype).requires_grad_(False).eval())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", AUTOENCODERS, ids=["two blocks", "one block"])
@torch.inference_mode()
def test_peaks_of_an_autoencoder(config, dtype):
    autoencoder = make_autoencoder(config, dtype)
    assert autoencoder_bytes(config, dtype.itemsize) == sum(p.nbytes for p in autoencoder.parameters())
    latents, images = torch.randn(1, 128, 12, 16), torch.randn(1, 3, 192, 256)
    decoding = decoding_bytes(config, 256, 192, dtype.itemsize, is_cuda=False)
    assert_near(decoding, peak_of(lambda: autoencoder.decode(latents)), 0.03)
    encoding = encoding_bytes(config, 256, 192, dtype.itemsize, is_cuda=False)
    assert_near(encoding, images.nbytes + peak_of(lambda: autoencoder.encode(images)), 0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", AUTOENCODERS, ids=["two blocks", "one block"])
@torch.inference_mode()
def test_peaks_of_an_autoencoder_in_strips(config, dtype, monkeypatch):
    for module in (autoencoder_memory, autoencoder_strips):
        monkeypatch.setattr(module, "STRIP_ELEMENTS", 2**16)
    autoencoder = make_autoencoder(config, dtype)
    latents, images = torch.randn(1, 128, 24, 32), torch.randn(1, 3, 384, 512)
    decoding, _ = strip_bytes(config, 512, 384, dtype.itemsize, decodes=True, is_cuda=False)
    assert_near(decoding, peak_of(lambda: autoencoder.decode_tiled(latents)), 0.15)
    encoding, _ = strip_bytes(config, 512, 384, dtype.itemsize, decodes=False, is_cuda=False)
    assert_near(encoding, images.nbytes + peak_of(lambda: autoencoder.encode_tiled(images)))
    assert decoding < 0.6 * decoding_bytes(config, 512, 384, dtype.itemsize, is_cuda=False)


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_4096_pixels_decode_within_4_gib(item_bytes):
    config = AutoencoderConfig()
    weights = autoencoder_bytes(config, item_bytes)
    assert weights + host_strip_bytes(config, 4096, 4096, item_bytes, decodes=True) < 4 * 2**30


def test_estimates_of_decoding_are_near_to_what_was_measured_on_a_gpu():
    """The measurements of diffusers' decoder in bf16 and fp32; GiB with weights."""
    config = AutoencoderConfig()
    for side, item_bytes, measured in ((1024, 2, 2.6), (1024, 4, 5.1), (2048, 2, 9.7)):
        estimate = decoding_bytes(config, side, side, item_bytes) + autoencoder_bytes(config, item_bytes)
        assert math.isclose(estimate / 2**30, measured, rel_tol=0.03)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_peak_of_text_encoding(weight_format):
    encoder = load_text_encoder(TINY_FOLDER / "text_encoder", dtype=torch.float32, precision=weight_format)
    weights = text_encoder_bytes(QWEN3_TINY, weight_format, 4)
    measured = peak_of(lambda: encoder.encode(["a red circle"]))
    assert_near(text_encoding_bytes(QWEN3_TINY, weights, 4, dense=weight_format is not None), measured, 0.3)
