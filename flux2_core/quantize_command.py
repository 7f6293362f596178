"""``flux2 quantize``: writes a DiT with its blocks in fp8, or a text encoder with its layers in fp8."""

from __future__ import annotations

import argparse

import torch

from .command_options import choose_device
from .detect import resolve_variant
from .lora_command import check_lora_options, check_output, make_parent, read_lora_settings, tensor_bar
from .quantized_files import quantise_checkpoint
from .quantized_text_encoder import quantise_text_encoder
from .tensor_source import TensorSource


def run_quantize(args: argparse.Namespace) -> int:
    """Writes the quantised network and prints its path; 0 when it is written.

    Raises:
        ValueError: the network or a LoRA is refused, or the output is no place to write to; nothing is written.
    """
    check_lora_options(args)
    device = choose_device(args.device)
    if args.text_encoder is not None:
        return _quantize_text_encoder(args, device)
    source = TensorSource(args.dit, component="dit")
    path = check_output(args.output, [*source.files, *(args.lora_weight or ())])
    variant = resolve_variant(source, args.model_version)
    settings = read_lora_settings(args, variant.dit)
    make_parent(path)
    with tensor_bar() as on_tensor:
        quantise_checkpoint(
            args.dit, path, args.format, settings, variant=variant.name, device=device, on_tensor=on_tensor
        )
    print(path, flush=True)
    return 0


def _quantize_text_encoder(args: argparse.Namespace, device: torch.device) -> int:
    given = next((name for name in ("lora_weight", "model_version") if getattr(args, name)), None)
    if given is not None:
        raise ValueError(f"--{given} is for a DiT; leave it out with --text_encoder")
    source = TensorSource(args.text_encoder, component="text_encoder")
    path = check_output(args.output, source.files)
    make_parent(path)
    with tensor_bar() as on_tensor:
        quantise_text_encoder(args.text_encoder, path, args.format, device=device, on_tensor=on_tensor)
    print(path, flush=True)
    return 0
