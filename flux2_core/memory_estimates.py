"""How many bytes the networks take: weights exactly, from shapes; activations by counting what is alive at a time.

Activations are counted in units of one hidden vector for each token, ``rows * tokens * hidden_size * item_bytes``. The
counts follow the code of `dit` line by line: a tensor lives until its last name goes, and the arguments of a call live
until it returns. Tests compare them with what is allocated on the CPU.

A single block (u: all tokens). Its input (1 u) is held by the caller. ``linear1`` runs beside its own input (1 u) and
gives 9 u, of which q, k, v and the MLP are views, so they stay to the end. Normed q and k add 2 u. Their rotation
takes 8 u in 16 bits, being done in fp32, and 2 u in fp32: 20 u and 14 u in all. After the attention (1 u) the MLP's
activation (3 u) is joined to it (4 u): 1 + 9 + 2 + 1 + 3 + 4 = 20 u, the peak; with what the double blocks gave, which
the network holds on to, **21 u**.

A double block (n, l: image and text tokens; u = n + l). Inputs u, both qkv joined 3 u, rotated q and k 2 u, attention
1 u: all of these 7 u have names until the block ends. While q and k are rotated, both qkv are there apart as well:
9 u and the rotation. The image's MLP runs beside the image as it is after the attention (n): its first Linear gives
6 n, SiLU 3 n, the product 3 n. Together **7 u + 13 n**. The kernels of `fused` take less than that.

Linears with plain LoRAs add these in place. With another adapter they hold three tensors of their output's size at
once: 2 + 27 = 29 u for ``linear1``.

In training, a single block keeps for its backward pass its input, the input of ``linear1``, its output (9 u), rotated q
and k, the attention, SiLU (3 u) and the input of ``linear2`` (4 u): **21 u**. A double block keeps **24 u**, the
same with both norms and the joined values. RMSNorm keeps nothing more where it is one kernel (CUDA); elsewhere, in 16
bits, it keeps fp32 copies. The backward pass of a single block takes **11 u** beside that, where the gradients of the
MLP and of q, k, v (9 u) are put together from their parts; that of a double block **6 u**.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from .block_memory import ALIGNMENT
from .dit import DiTConfig, Flux2DiT
from .linear import WeightFormat
from .nf4 import BLOCK as NF4_BLOCK
from .text_encoder import KNOWN_SETTINGS, LanguageModelSettings
from .variants import TextEncoderConfig

Shape = tuple[int, ...]
TrainingMode = Literal["none", "blocks", "offload"]

DOUBLE_HELD = 7
SINGLE_SAVED, DOUBLE_SAVED = 21, 24
SINGLE_BACKWARD, DOUBLE_BACKWARD = 11, 6
UNFUSED_NORM_SAVED = 4
"""Added to what is kept where RMSNorm is several kernels and runs in 16 bits."""
OFFLOADED_INPUTS = 6
"""Inputs of blocks, in units, that are on the device on their way to host memory or back."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderShape:
    """What the sizes of a language model's weights follow from, beside `LanguageModelSettings`."""

    intermediate_size: int
    vocab_size: int


TEXT_ENCODER_SHAPES: dict[tuple[str, int], TextEncoderShape] = {
    ("mistral", 5120): TextEncoderShape(intermediate_size=32768, vocab_size=131072),
    ("qwen3", 2560): TextEncoderShape(intermediate_size=9728, vocab_size=151936),
    ("qwen3", 4096): TextEncoderShape(intermediate_size=12288, vocab_size=151936),
    ("qwen3", 64): TextEncoderShape(intermediate_size=128, vocab_size=415),
}
"""By family and hidden size. Sources: as `text_encoder.KNOWN_SETTINGS`."""
TINY_SETTINGS = LanguageModelSettings(
    rope_theta=1e4, rms_norm_eps=1e-6, num_heads=4, num_key_value_heads=2, head_dim=16
)


@dataclass(frozen=True, kw_only=True)
class NetworkBytes:
    """Bytes of a network's weights."""

    blocks: tuple[int, ...]
    """Of each block, in the order in which they run; a text encoder's are its layers."""
    slots: tuple[int, ...]
    """Of the device buffer that a block streams into: the same, with every tensor aligned."""
    outer: int
    """Of all other weights, which stay on the device."""
    largest_dense: int
    """Of the largest quantised weight, multiplied out."""
    host_outer: int = 0
    """Of `outer`, what stays in host memory where blocks are streamed."""

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.outer


def tensor_bytes(shape: Shape, item_bytes: int, weight_format: WeightFormat | None = None) -> tuple[int, ...]:
    """Bytes of the tensors that a weight is kept in: itself, or quantised numbers and scales."""
    count = 1
    for side in shape:
        count *= side
    if weight_format == "fp8":
        return count, 4 * shape[0]
    if weight_format == "nf4":
        return count // 2, 2 * -(-count // NF4_BLOCK)
    return (count * item_bytes,)


def _network(
    blocks: Sequence[tuple[Sequence[Shape], int]],
    outer: Sequence[Shape],
    item_bytes: int,
    weight_format: WeightFormat | None,
) -> NetworkBytes:
    """Sums up; each block is the shapes of its weights, and how many such blocks follow each other."""
    sizes: list[int] = []
    slots: list[int] = []
    dense = 0
    for shapes, count in blocks:
        matrices = [shape for shape in shapes if len(shape) > 1]
        tensors = [
            part
            for shape in shapes
            for part in tensor_bytes(shape, item_bytes, weight_format if len(shape) > 1 else None)
        ]
        sizes += count * [sum(tensors)]
        slots += count * [sum(-(-part // ALIGNMENT) * ALIGNMENT for part in tensors)]
        dense = max([dense, *(sum(tensor_bytes(shape, item_bytes)) for shape in matrices)])
    rest = sum(part for shape in outer for part in tensor_bytes(shape, item_bytes))
    return NetworkBytes(blocks=tuple(sizes), slots=tuple(slots), outer=rest, largest_dense=dense)


@lru_cache
def dit_shapes(config: DiTConfig) -> tuple[tuple[Shape, ...], tuple[Shape, ...], tuple[Shape, ...]]:
    """Shapes of the weights of a double block, of a single block, and of all that is no block."""
    with torch.device("meta"):
        dit = Flux2DiT(replace(config, num_double_blocks=1, num_single_blocks=1))
    found: dict[str, list[Shape]] = {"double_blocks": [], "single_blocks": [], "": []}
    for name, parameter in dit.named_parameters():
        part = name.partition(".")[0]
        found[part if part in found else ""].append(tuple(parameter.shape))
    return tuple(found["double_blocks"]), tuple(found["single_blocks"]), tuple(found[""])


def dit_bytes(config: DiTConfig, weight_format: WeightFormat | None, item_bytes: int) -> NetworkBytes:
    """Weights of a DiT; ``item_bytes`` is the size of a plain weight, which those outside of the blocks always are."""
    double, single, outer = dit_shapes(config)
    blocks = [(double, config.num_double_blocks), (single, config.num_single_blocks)]
    return _network(blocks, outer, item_bytes, weight_format)


def text_encoder_bytes(config: TextEncoderConfig, weight_format: WeightFormat | None, item_bytes: int) -> NetworkBytes:
    """Weights of the layers that are used, with the token embedding and the few numbers of the rotation."""
    key = (config.family, config.hidden_size)
    settings, shape = KNOWN_SETTINGS.get(key, TINY_SETTINGS), TEXT_ENCODER_SHAPES[key]
    hidden, heads = config.hidden_size, settings.num_heads * settings.head_dim
    pairs = settings.num_key_value_heads * settings.head_dim
    layer: list[Shape] = [(heads, hidden), (pairs, hidden), (pairs, hidden), (hidden, heads)]
    layer += [(shape.intermediate_size, hidden), (shape.intermediate_size, hidden), (hidden, shape.intermediate_size)]
    layer += [(hidden,), (hidden,)]
    if config.family == "qwen3":
        layer += [(settings.head_dim,), (settings.head_dim,)]
    network = _network([(layer, config.num_layers)], [(shape.vocab_size, hidden)], item_bytes, weight_format)
    return replace(network, host_outer=network.outer)


def text_encoding_bytes(config: TextEncoderConfig, weights: NetworkBytes, item_bytes: int, *, dense: bool) -> int:
    """Peak of the activations of one prompt.

    transformers keeps the state after every layer; beside them an MLP holds its input, gate and up projections and
    their product, and at the end three states are joined.

    Args:
        dense: whether quantised weights are multiplied out for the product.
    """
    shape = TEXT_ENCODER_SHAPES[(config.family, config.hidden_size)]
    hidden = config.hidden_size
    per_token = (config.num_layers + 1) * hidden + max(3 * hidden, 3 * shape.intermediate_size + 2 * hidden)
    return config.max_tokens * per_token * item_bytes + (weights.largest_dense if dense else 0)


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What a forward pass of the DiT runs on."""

    num_rows: int
    """Pictures of the batch; twice as many with classifier-free guidance."""
    num_tokens: int
    """Of the picture and its references."""
    num_text_tokens: int


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How the DiT computes."""

    item_bytes: int
    """Of an activation."""
    weight_format: WeightFormat | None
    is_cuda: bool
    """CUDA multiplies fp8 in 8 bits and has RMSNorm in one kernel."""
    is_adapted: bool
    """Whether adapters that may be other than plain LoRAs act on the blocks."""


def _linear_peak(how: Computation, base: float, width_in: float, width_out: float, dense: int, factor: int) -> float:
    """Bytes alive at the peak of a Linear; ``base`` (its input included) and widths in bytes."""
    peaks = [base + (3 if how.is_adapted else 1) * width_out]
    if how.weight_format == "fp8" and how.is_cuda:
        codes = width_in / how.item_bytes
        peaks += [base + width_in + codes, base + codes + width_out]
    elif how.weight_format is not None:
        peaks += [base + width_out + dense * factor]
    return max(peaks)


def forward_bytes(config: DiTConfig, tokens: TokenCounts, how: Computation) -> int:
    """Peak of the activations of a forward pass without gradients, inputs included; see the top of this file."""
    vector = tokens.num_rows * config.hidden_size * how.item_bytes
    image, text = tokens.num_tokens * vector, tokens.num_text_tokens * vector
    u = image + text
    ratio, dense = config.mlp_ratio, config.hidden_size**2 * how.item_bytes

    rope = 8 if how.item_bytes < 4 else 2
    wide = 3 + 2 * ratio
    held = u if config.num_double_blocks else 0
    single = [
        _linear_peak(how, held + 2 * u, u, wide * u, dense, wide),
        held + (1 + wide + 2) * u + rope * u,
        held + (1 + wide + 2 + 1 + ratio + 1 + ratio) * u,
        _linear_peak(how, held + (1 + wide + 2 + 1 + 1 + ratio) * u, (1 + ratio) * u, u, dense, 1 + ratio),
    ]
    double = [9 * u + rope * u]
    for mine, before in ((image, 0), (text, image)):
        base = DOUBLE_HELD * u + before
        double += [
            base + (1 + 4 * ratio) * mine,
            _linear_peak(how, base + 2 * mine, mine, 2 * ratio * mine, dense, 2 * ratio),
            _linear_peak(how, base + (1 + ratio) * mine, ratio * mine, mine, dense, ratio),
        ]
    blocks = [*(double if config.num_double_blocks else []), *(single if config.num_single_blocks else [])]
    return round(max(blocks)) + _input_bytes(config, tokens, how.item_bytes)


def _input_bytes(config: DiTConfig, tokens: TokenCounts, item_bytes: int) -> int:
    """Text embeddings, tokens and positions."""
    text = tokens.num_text_tokens * config.context_dim * item_bytes
    image = tokens.num_tokens * config.in_channels * item_bytes
    rope = (tokens.num_tokens + tokens.num_text_tokens) * config.hidden_size // config.num_heads * 4
    return tokens.num_rows * (text + image) + rope


def saved_bytes(config: DiTConfig, tokens: TokenCounts, how: Computation, rank: int) -> tuple[int, int]:
    """What a double and a single block keep for their backward pass, adapters of ``rank`` on all Linears.

    The factors are aside: they are cast to the type of the activations once for all blocks and passes of a step.
    """
    vector = tokens.num_rows * config.hidden_size * how.item_bytes
    u = (tokens.num_tokens + tokens.num_text_tokens) * vector
    norms = 0 if how.is_cuda or how.item_bytes == 4 else UNFUSED_NORM_SAVED
    double, single, _ = dit_shapes(config)

    def adapters(shapes: Sequence[Shape], share: int) -> int:
        matrices = [shape for shape in shapes if len(shape) > 1]
        inner = len(matrices) * rank * how.item_bytes * tokens.num_rows // share
        return inner * (tokens.num_tokens + tokens.num_text_tokens)

    # In a double block every Linear sees the tokens of one stream alone.
    return (
        (DOUBLE_SAVED + norms) * u + adapters(double, 2),
        (SINGLE_SAVED + norms) * u + adapters(single, 1),
    )


def training_bytes(
    config: DiTConfig, tokens: TokenCounts, how: Computation, *, rank: int, checkpointing: TrainingMode
) -> int:
    """Peak of the activations and gradients of a training step, weights and adapters aside.

    With checkpointing, every block keeps its input, and one block at a time keeps all it needs; offloaded inputs are on
    the device only shortly. Quantised weights are multiplied out in the backward pass, one at a time.
    """
    vector = tokens.num_rows * config.hidden_size * how.item_bytes
    u = (tokens.num_tokens + tokens.num_text_tokens) * vector
    double, single = saved_bytes(config, tokens, how, rank)
    dense = (3 + 2 * config.mlp_ratio) * config.hidden_size**2 * how.item_bytes if how.weight_format else 0
    num_blocks = config.num_double_blocks + config.num_single_blocks
    # When a dense weight is made, some of what was kept is free again.
    steps = [double + max(DOUBLE_BACKWARD * u, dense - 3 * u)] if config.num_double_blocks else []
    steps += [single + max(SINGLE_BACKWARD * u, dense - 3 * u)] if config.num_single_blocks else []
    if checkpointing == "none":
        kept = config.num_double_blocks * double + config.num_single_blocks * single
        peak = kept + max(steps) - (single if config.num_single_blocks else double)
    else:
        peak = max(steps) + ((num_blocks - 1) if checkpointing == "blocks" else OFFLOADED_INPUTS) * u
    casts = 0 if how.item_bytes == 4 else adapter_parameters(config, rank) * how.item_bytes
    return round(peak) + casts + _input_bytes(config, tokens, how.item_bytes)


def adapter_parameters(config: DiTConfig, rank: int) -> int:
    """Parameters of LoRAs on all Linears of the blocks."""
    double, single, _ = dit_shapes(config)
    sides = [
        count * sum(sum(shape) for shape in shapes if len(shape) > 1)
        for shapes, count in ((double, config.num_double_blocks), (single, config.num_single_blocks))
    ]
    return rank * sum(sides)
