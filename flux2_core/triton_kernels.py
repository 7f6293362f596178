"""Triton kernels of `fused`: each does in one pass over memory what takes PyTorch several.

Imported only where they run, since Triton is not installed everywhere. Statistics and arithmetic are fp32; results are
rounded once, to the type of the output. Widths are compile-time constants, numbers of rows are not: another size of
picture, another number of references and another batch run what is compiled already.

A row is a token of one picture: rows are ``[B, N]``, with strides of their own, channels lie side by side. Triton runs
a kernel on the current device, so that becomes the one of the tensors for the time of each.
"""

# Triton is not everywhere, and its decorator hides that what is a constexpr in a kernel is a number to its caller.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-30)
"""Largest value that a row is taken to have at least: a row of zeros gets a scale that is a number."""
MAX_BLOCK = 2048
"""Channels that a program of an elementwise kernel takes at once."""


@triton.jit
def _to_rows(values, largest):
    """fp32 values within what e4m3 holds, and the scale to multiply them by afterwards."""
    largest = tl.maximum(largest, SMALLEST)
    return values * (E4M3_MAX / largest), largest / E4M3_MAX


@triton.jit
def _silu_product(gate, up):
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def _modulated_norm(
    x, shift, scale, out, out_scale, num_tokens, x_batch, x_token, shift_batch, shift_token, scale_batch, scale_token,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    channels = tl.arange(0, BLOCK)
    inside = channels < WIDTH
    values = tl.load(x + batch * x_batch + token * x_token + channels, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / WIDTH
    centred = tl.where(inside, values - mean, 0.0)
    centred = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
    factor = tl.load(scale + batch * scale_batch + token * scale_token + channels, mask=inside, other=0.0)
    summand = tl.load(shift + batch * shift_batch + token * shift_token + channels, mask=inside, other=0.0)
    values = centred * factor.to(tl.float32) + summand.to(tl.float32)
    if FP8:
        values, row_scale = _to_rows(values, tl.max(tl.abs(values), axis=0))
        tl.store(out_scale + row, row_scale)
    tl.store(out + row * WIDTH + channels, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _joined(
    left, mlp, out, num_tokens, left_batch, left_token, mlp_batch, mlp_token,
    LEFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    part = tl.program_id(1)
    target = out + row * (LEFT + WIDTH)
    num_left: tl.constexpr = (LEFT + BLOCK - 1) // BLOCK
    if LEFT > 0 and part < num_left:
        channels = part * BLOCK + tl.arange(0, BLOCK)
        inside = channels < LEFT
        values = tl.load(left + batch * left_batch + token * left_token + channels, mask=inside, other=0.0)
        tl.store(target + channels, values, mask=inside)
    else:
        channels = (part - num_left) * BLOCK + tl.arange(0, BLOCK)
        inside = channels < WIDTH
        source = mlp + batch * mlp_batch + token * mlp_token + channels
        gate = tl.load(source, mask=inside, other=0.0)
        up = tl.load(source + WIDTH, mask=inside, other=0.0)
        tl.store(target + LEFT + channels, _silu_product(gate, up).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _joined_rows(
    left, mlp, out, out_scale, num_tokens, left_batch, left_token, mlp_batch, mlp_token,
    LEFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Two passes: a row of the largest model does not fit into registers; the second one reads it from the cache.
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    target = out + row * (LEFT + WIDTH)
    block = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    if LEFT > 0:
        left += batch * left_batch + token * left_token
        for start in range(0, LEFT, BLOCK):
            channels = start + block
            values = tl.load(left + channels, mask=channels < LEFT, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
    if WIDTH > 0:
        mlp += batch * mlp_batch + token * mlp_token
        for start in range(0, WIDTH, BLOCK):
            channels = start + block
            gate = tl.load(mlp + channels, mask=channels < WIDTH, other=0.0)
            up = tl.load(mlp + WIDTH + channels, mask=channels < WIDTH, other=0.0)
            largest = tl.maximum(largest, tl.abs(_silu_product(gate, up)))
    row_largest = tl.max(largest, axis=0)
    if LEFT > 0:
        for start in range(0, LEFT, BLOCK):
            channels = start + block
            values = tl.load(left + channels, mask=channels < LEFT, other=0.0).to(tl.float32)
            values, _ = _to_rows(values, row_largest)
            tl.store(target + channels, values.to(out.dtype.element_ty), mask=channels < LEFT)
    if WIDTH > 0:
        for start in range(0, WIDTH, BLOCK):
            channels = start + block
            gate = tl.load(mlp + channels, mask=channels < WIDTH, other=0.0)
            up = tl.load(mlp + WIDTH + channels, mask=channels < WIDTH, other=0.0)
            values, _ = _to_rows(_silu_product(gate, up), row_largest)
            tl.store(target + LEFT + channels, values.to(out.dtype.element_ty), mask=channels < WIDTH)
    _, row_scale = _to_rows(row_largest, row_largest)
    tl.store(out_scale + row, row_scale)


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_residual(
    x, gate, update, out, num_tokens, x_batch, x_token, gate_batch, gate_token, update_batch, update_token,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < WIDTH
    values = tl.load(x + batch * x_batch + token * x_token + channels, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + batch * gate_batch + token * gate_token + channels, mask=inside, other=0.0)
    change = tl.load(update + batch * update_batch + token * update_token + channels, mask=inside, other=0.0)
    values += factor.to(tl.float32) * change.to(tl.float32)
    tl.store(out + row * WIDTH + channels, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed_and_turned(
    source, scale, cos, sin, channels, inside,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """RMSNorm of each head and the rotation of neighbouring channels: fp32 ``[HEADS, CHANNELS]``."""
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / HEAD_DIM + EPS)
    weight = tl.load(scale + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)
    values = values * factor[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(values, (HEADS, CHANNELS // 2, 2)))
    turned = tl.join(cos[None, :] * even - sin[None, :] * odd, sin[None, :] * even + cos[None, :] * odd)
    return tl.reshape(turned, (HEADS, CHANNELS))


@triton.jit(do_not_specialize=["num_tokens", "first_token"])
def _heads(
    qkv, q_scale, k_scale, rope, q, k, v, num_tokens, first_token, qkv_batch, qkv_token, out_batch, out_token,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    EPS: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channels = tl.arange(0, CHANNELS)
    inside = (heads[:, None] < NUM_HEADS) & (channels[None, :] < HEAD_DIM)
    at = heads[:, None] * HEAD_DIM + channels[None, :]
    place = first_token + token
    angles = tl.load(rope + place * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
    cos, sin = tl.split(tl.reshape(angles, (CHANNELS // 2, 2)))
    source = qkv + batch * qkv_batch + token * qkv_token + at
    target = batch * out_batch + place * out_token + at
    turned = _normed_and_turned(source, q_scale, cos, sin, channels, inside, HEADS, HEAD_DIM, CHANNELS, EPS)
    tl.store(q + target, turned.to(q.dtype.element_ty), mask=inside)
    source += NUM_HEADS * HEAD_DIM
    turned = _normed_and_turned(source, k_scale, cos, sin, channels, inside, HEADS, HEAD_DIM, CHANNELS, EPS)
    tl.store(k + target, turned.to(k.dtype.element_ty), mask=inside)
    if COPY_V:
        tl.store(v + target, tl.load(source + NUM_HEADS * HEAD_DIM, mask=inside, other=0.0), mask=inside)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`fused.modulated_norm`."""
    x = _with_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run_norm(x, shift, scale, eps, out, None)
    return out


def modulated_norm_rows(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same as e4m3 ``[B, N, D]`` and fp32 scales ``[B, N, 1]``."""
    x = _with_rows(x)
    out, out_scale = _empty_rows(x, x.shape[-1])
    _run_norm(x, shift, scale, eps, out, out_scale)
    return out, out_scale


def joined_swiglu(left: Tensor | None, mlp: Tensor) -> Tensor:
    """`fused.joined_swiglu`; without ``left`` `fused.swiglu`."""
    mlp = _with_rows(mlp)
    left = None if left is None else _with_rows(left)
    batch, num_tokens, width = mlp.shape[0], mlp.shape[1], mlp.shape[-1] // 2
    left_width = 0 if left is None else left.shape[-1]
    out = torch.empty(batch, num_tokens, left_width + width, dtype=mlp.dtype, device=mlp.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(max(width, left_width)))
    num_parts = triton.cdiv(left_width, block) + triton.cdiv(width, block)
    with torch.cuda.device_of(out):
        _joined[(batch * num_tokens, num_parts)](
            mlp if left is None else left, mlp, out, num_tokens, *(_strides(left) if left is not None else (0, 0)),
            *_strides(mlp), LEFT=left_width, WIDTH=width, BLOCK=block,
        )  # fmt: skip
    return out


def joined_swiglu_rows(left: Tensor | None, mlp: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same as e4m3 and fp32 scales ``[B, N, 1]``; without ``mlp`` it quantises the rows of ``left``."""
    left, mlp = (None if tensor is None else _with_rows(tensor) for tensor in (left, mlp))
    some = left if left is not None else mlp
    assert some is not None
    left_width, width = 0 if left is None else left.shape[-1], 0 if mlp is None else mlp.shape[-1] // 2
    out, out_scale = _empty_rows(some, left_width + width)
    block = min(2 * MAX_BLOCK, triton.next_power_of_2(max(width, left_width)))
    with torch.cuda.device_of(out):
        _joined_rows[(some.shape[0] * some.shape[1],)](
            some if left is None else left, some if mlp is None else mlp, out, out_scale, some.shape[1],
            *(_strides(left) if left is not None else (0, 0)), *(_strides(mlp) if mlp is not None else (0, 0)),
            LEFT=left_width, WIDTH=width, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out, out_scale


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`fused.gated_residual`."""
    x, gate, update = _with_rows(x), _with_rows(gate), _with_rows(update)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(x.shape[-1]))
    with torch.cuda.device_of(out):
        _gated_residual[(x.shape[0] * x.shape[1], triton.cdiv(x.shape[-1], block))](
            x, gate, update, out, x.shape[1], *_strides(x), *_modulation_strides(gate, x), *_strides(update),
            WIDTH=x.shape[-1], BLOCK=block,
        )  # fmt: skip
    return out


def heads(
    qkvs: list[Tensor], scales: list[tuple[Tensor, Tensor]], rope: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused.heads`, memory in the order ``[B, N, H, head_dim]``; the values of a single stream stay where they are."""
    qkvs, rope = [_with_rows(qkv) for qkv in qkvs], rope.contiguous()
    batch, hidden = qkvs[0].shape[0], qkvs[0].shape[-1] // 3
    num_tokens, head_dim = sum(qkv.shape[1] for qkv in qkvs), hidden // num_heads
    shape = (batch, num_tokens, num_heads, head_dim)
    q, k = (torch.empty(shape, dtype=qkvs[0].dtype, device=qkvs[0].device) for _ in range(2))
    copy_v = len(qkvs) > 1
    v = torch.empty_like(q) if copy_v else qkvs[0][..., 2 * hidden :].unflatten(-1, (num_heads, head_dim))
    channels = triton.next_power_of_2(head_dim)
    at_once = min(triton.next_power_of_2(num_heads), max(1, MAX_BLOCK // 2 // channels))
    first_token = 0
    for qkv, (q_scale, k_scale) in zip(qkvs, scales, strict=True):
        with torch.cuda.device_of(q):
            _heads[(batch * qkv.shape[1], triton.cdiv(num_heads, at_once))](
                qkv, q_scale, k_scale, rope, q, k, v, qkv.shape[1], first_token, *_strides(qkv), *_strides(q),
                NUM_HEADS=num_heads, HEAD_DIM=head_dim, HEADS=at_once, CHANNELS=channels, EPS=eps, COPY_V=copy_v,
            )  # fmt: skip
        first_token += qkv.shape[1]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _run_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor, out_scale: Tensor | None) -> None:
    shift, scale = _with_rows(shift), _with_rows(scale)
    block = triton.next_power_of_2(x.shape[-1])
    with torch.cuda.device_of(out):
        _modulated_norm[(x.shape[0] * x.shape[1],)](
            x, shift, scale, out, out if out_scale is None else out_scale, x.shape[1], *_strides(x),
            *_modulation_strides(shift, x), *_modulation_strides(scale, x), WIDTH=x.shape[-1], BLOCK=block, EPS=eps,
            FP8=out_scale is not None, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip


def _empty_rows(like: Tensor, width: int) -> tuple[Tensor, Tensor]:
    rows = like.shape[:2]
    codes = torch.empty(*rows, width, dtype=torch.float8_e4m3fn, device=like.device)
    return codes, torch.empty(*rows, 1, dtype=torch.float32, device=like.device)


def _with_rows(x: Tensor) -> Tensor:
    """``[B, N, C]`` whose channels lie side by side."""
    assert x.dim() == 3
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _modulation_strides(modulation: Tensor, x: Tensor) -> tuple[int, int]:
    """Of ``[B or 1, N or 1, D]``, 0 where one row serves all."""
    batch = modulation.stride(0) if modulation.shape[0] == x.shape[0] else 0
    return batch, modulation.stride(1) if modulation.shape[1] == x.shape[1] else 0
