"""The FLUX.2 diffusion transformer (DiT).

Architecture and parameter names follow Black Forest Labs' reference (github.com/black-forest-labs/flux2,
``src/flux2/model.py``), so a BFL checkpoint loads without renaming. Every Linear is without bias; the modulations are
shared by all blocks.

Shapes: B batch, L text tokens, N image and reference tokens, D hidden size, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation_checkpointing import Checkpointing, block_runner
from .attention import attention, rope_table
from .attention_backends import AttentionBackend
from .fused import fp8_rows, gated_residual, heads, joined_swiglu, modulated_norm, swiglu
from .key_values import BlockKeyValues
from .linear import Linear

TIME_EMBEDDING_CHANNELS = 256
TIME_FACTOR = 1000.0
"""Sigma and guidance are multiplied by this before the sinusoidal embedding."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT."""

    hidden_size: int
    num_heads: int
    num_double_blocks: int
    num_single_blocks: int
    context_dim: int
    """Channels of the text embedding: three stacked hidden states of the text encoder."""
    has_guidance_embedder: bool
    """Whether guidance is an input of the network (dev) or there is none (klein)."""
    in_channels: int = 128
    mlp_ratio: int = 3
    rope_axes: tuple[int, int, int, int] = (32, 32, 32, 32)
    """Channels of a head that rotate with each of the position axes (t, h, w, l)."""
    rope_theta: float = 2000.0

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return sum(self.rope_axes)

    def __post_init__(self) -> None:
        assert sum(self.rope_axes) * self.num_heads == self.hidden_size, self


class QKNorm(nn.Module):
    """Weights of the RMSNorm over the channels of each head, for queries and keys; `fused.heads` applies them."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """``[head_dim]`` each."""
        return self.query_norm.scale, self.key_norm.scale


class RMSNorm(nn.Module):
    """A weight of `QKNorm`, under the name that it has in checkpoints."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))


class SelfAttention(nn.Module):
    """The projections of one stream of a double block; the attention itself is joint and lives in the block."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)


class MLP(nn.ModuleList):
    """SwiGLU between two Linears; those are 0 and 2, as in checkpoints."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__((Linear(hidden_size, 2 * inner_size), nn.Identity(), Linear(inner_size, hidden_size)))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The change of ``x`` ``[B, N, D]``, which is normed and modulated first."""
        up, _, down = self
        assert isinstance(up, Linear) and isinstance(down, Linear)
        return down(swiglu(up(modulated_norm(x, shift, scale, into=up)), into=down))


class MLPEmbedder(nn.Module):
    """Embeds the sinusoidal features of sigma or guidance."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = Linear(TIME_EMBEDDING_CHANNELS, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """``num_sets`` triples (shift, scale, gate) ``[B, 1, D]`` from the conditioning vector ``[B, D]``.

    The network gives the scale's distance from 1.
    """

    def __init__(self, hidden_size: int, num_sets: int) -> None:
        super().__init__()
        self.num_sets = num_sets
        self.lin = Linear(hidden_size, 3 * num_sets * hidden_size)

    def forward(self, vec: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.num_sets, dim=-1)
        return [(chunks[3 * i], 1 + chunks[3 * i + 1], chunks[3 * i + 2]) for i in range(self.num_sets)]


class DoubleBlock(nn.Module):
    """Text and image streams with weights of their own, joined in one attention."""

    attention_backend: AttentionBackend = "auto"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden, mlp = config.hidden_size, config.hidden_size * config.mlp_ratio
        self.num_heads = config.num_heads
        self.img_attn = SelfAttention(hidden, config.num_heads)
        self.img_mlp = MLP(hidden, mlp)
        self.txt_attn = SelfAttention(hidden, config.num_heads)
        self.txt_mlp = MLP(hidden, mlp)

    def forward(
        self,
        img: Tensor,  # [B, N, D]
        txt: Tensor,  # [B, L, D]
        rope: Tensor,
        img_modulation: list[tuple[Tensor, Tensor, Tensor]],
        txt_modulation: list[tuple[Tensor, Tensor, Tensor]],
        references: BlockKeyValues | None = None,
    ) -> tuple[Tensor, Tensor]:
        if txt.shape[1] == 0:
            return self._image_alone(img, rope, img_modulation, references), txt
        (img_shift1, img_scale1, img_gate1), (img_shift2, img_scale2, img_gate2) = img_modulation
        (txt_shift1, txt_scale1, txt_gate1), (txt_shift2, txt_scale2, txt_gate2) = txt_modulation

        txt_qkv, img_qkv = self.txt_attn.qkv, self.img_attn.qkv
        scales = self.txt_attn.norm.scales, self.img_attn.norm.scales
        q, k, v = heads(
            (
                txt_qkv(modulated_norm(txt, txt_shift1, txt_scale1, into=txt_qkv)),
                img_qkv(modulated_norm(img, img_shift1, img_scale1, into=img_qkv)),
            ),
            scales,
            rope,
            self.num_heads,
        )
        if references is not None:
            k, v = references.join(k, v)
        txt_out, img_out = attention(q, k, v, self.attention_backend).split([txt.shape[1], img.shape[1]], dim=1)

        img = gated_residual(img, img_gate1, self.img_attn.proj(fp8_rows(img_out, into=self.img_attn.proj)))
        img = gated_residual(img, img_gate2, self.img_mlp(img, img_shift2, img_scale2))
        txt = gated_residual(txt, txt_gate1, self.txt_attn.proj(fp8_rows(txt_out, into=self.txt_attn.proj)))
        txt = gated_residual(txt, txt_gate2, self.txt_mlp(txt, txt_shift2, txt_scale2))
        return img, txt

    def _image_alone(
        self,
        img: Tensor,
        rope: Tensor,
        modulation: list[tuple[Tensor, Tensor, Tensor]],
        references: BlockKeyValues | None,
    ) -> Tensor:
        """The block without any text."""
        (shift1, scale1, gate1), (shift2, scale2, gate2) = modulation
        project, out = self.img_attn.qkv, self.img_attn.proj
        projections = (project(modulated_norm(img, shift1, scale1, into=project)),)
        q, k, v = heads(projections, (self.img_attn.norm.scales,), rope, self.num_heads)
        if references is not None:
            k, v = references.join(k, v)
        img = gated_residual(img, gate1, out(fp8_rows(attention(q, k, v, self.attention_backend), into=out)))
        return gated_residual(img, gate2, self.img_mlp(img, shift2, scale2))


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over text and image tokens together."""

    attention_backend: AttentionBackend = "auto"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden, mlp = config.hidden_size, config.hidden_size * config.mlp_ratio
        self.num_heads = config.num_heads
        self.widths = [3 * hidden, 2 * mlp]
        self.linear1 = Linear(hidden, 3 * hidden + 2 * mlp)
        self.linear2 = Linear(hidden + mlp, hidden)
        self.norm = QKNorm(hidden // config.num_heads)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        modulation: tuple[Tensor, Tensor, Tensor],
        references: BlockKeyValues | None = None,
    ) -> Tensor:
        shift, scale, gate = modulation
        projected = self.linear1(modulated_norm(x, shift, scale, into=self.linear1))
        qkv, mlp = projected.split(self.widths, dim=-1)
        q, k, v = heads((qkv,), (self.norm.scales,), rope, self.num_heads)
        if references is not None:
            k, v = references.join(k, v)
        joined = joined_swiglu(attention(q, k, v, self.attention_backend), mlp, into=self.linear2)
        return gated_residual(x, gate, self.linear2(joined))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, 1 + scale))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedInputs:
    """What stays the same over the steps of one generation, see `Flux2DiT.prepare`."""

    text: Tensor
    """``[B, L, D]``, projected."""
    rope: Tensor
    """`attention.rope_table` of text, image and reference tokens."""
    guidance: Tensor | None
    """``[B, D]``, the embedding that is added to that of sigma; None for networks without."""


class Flux2DiT(nn.Module):
    """Predicts the velocity ``noise - latents`` of every image token.

    `checkpointing` says what the blocks keep for the backward pass; it is no part of the state.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = "none"
        hidden = config.hidden_size
        self.img_in = Linear(config.in_channels, hidden)
        self.txt_in = Linear(config.context_dim, hidden)
        self.time_in = MLPEmbedder(hidden)
        self.guidance_in = MLPEmbedder(hidden) if config.has_guidance_embedder else None
        self.double_stream_modulation_img = Modulation(hidden, num_sets=2)
        self.double_stream_modulation_txt = Modulation(hidden, num_sets=2)
        self.single_stream_modulation = Modulation(hidden, num_sets=1)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_blocks))
        self.final_layer = FinalLayer(config)

    @property
    def blocks(self) -> list[DoubleBlock | SingleBlock]:
        """In the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which activations run."""
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self.img_in.weight.device

    def forward(
        self,
        tokens: Tensor,  # [B, N, 128]: image tokens, then reference tokens
        token_ids: Tensor,  # [N, 4]
        text: Tensor,  # [B, L, context_dim]
        text_ids: Tensor,  # [L, 4]
        sigma: Tensor,  # [B], 1 is pure noise
        guidance: Tensor | None = None,  # [B], embedded guidance
    ) -> Tensor:
        """Returns the velocity ``[B, N, 128]`` of all tokens; the caller keeps the image part.

        Padding in the text is attended to like any token: the released weights were trained that way.
        """
        return self.velocity(tokens, sigma, self.prepare(token_ids, text, text_ids, guidance))

    def prepare(
        self,
        token_ids: Tensor,  # [N, 4]
        text: Tensor,  # [B, L, context_dim]
        text_ids: Tensor,  # [L, 4]
        guidance: Tensor | None = None,  # [B]
    ) -> PreparedInputs:
        """Computes what all steps of a generation have in common; arguments as in `forward`.

        It holds as long as weights and adapters stay what they are, and in training for one step.
        """
        assert (guidance is not None) == self.config.has_guidance_embedder, (
            "guidance and the guidance embedder go together"
        )
        embedded = None
        if self.guidance_in is not None and guidance is not None:
            embedded = self.guidance_in(sinusoidal_embedding(guidance).to(text.dtype))
        ids = torch.cat((text_ids, token_ids), dim=0)
        return PreparedInputs(
            text=self.txt_in(text),
            rope=rope_table(ids, self.config.rope_axes, self.config.rope_theta),
            guidance=embedded,
        )

    def velocity(
        self,
        tokens: Tensor,  # [B, N, 128]
        sigma: Tensor,  # [B]
        prepared: PreparedInputs,
        references: Sequence[BlockKeyValues] | None = None,
    ) -> Tensor:
        """Returns the velocity ``[B, N, 128]`` of one step; see `forward`.

        Args:
            references: keys and values of references for each block, double blocks first, instead of their tokens; or
                where those of the last tokens of this sequence are stored.
        """
        vec = self.time_in(sinusoidal_embedding(sigma).to(tokens.dtype))
        if prepared.guidance is not None:
            vec = vec + prepared.guidance
        img_modulation = self.double_stream_modulation_img(vec)
        txt_modulation = self.double_stream_modulation_txt(vec)
        (single_modulation,) = self.single_stream_modulation(vec)

        img, txt, rope = self.img_in(tokens), prepared.text, prepared.rope
        run = block_runner(self.checkpointing)
        kept = iter(references if references is not None else ())
        for block in self.double_blocks:
            img, txt = run(block, (img, txt), rope, img_modulation, txt_modulation, next(kept, None))
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = run(block, (x,), rope, single_modulation, next(kept, None))
        return self.final_layer(x[:, txt.shape[1] :], vec)


def sinusoidal_embedding(values: Tensor) -> Tensor:
    """``[B]`` to cosines and sines ``[B, 256]`` of 1000 times the value, fp32, periods 2 pi to 20000 pi."""
    half = TIME_EMBEDDING_CHANNELS // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = TIME_FACTOR * values.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
