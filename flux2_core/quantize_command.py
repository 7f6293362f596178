"""``flux2 quantize``: writes a DiT with its blocks in fp8."""

from __future__ import annotations

import argparse

from .command_options import choose_device
from .detect import resolve_variant
from .lora_command import check_lora_options, check_output, make_parent, read_lora_settings, tensor_bar
from .quantized_files import quantise_checkpoint
from .tensor_source import TensorSource


def run_quantize(args: argparse.Namespace) -> int:
    """Writes the quantised DiT and prints its path; 0 when it is written.

    Raises:
        ValueError: the DiT or a LoRA is refused, or the output is no place to write to; nothing is written.
    """
    check_lora_options(args)
    device = choose_device(args.device)
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
