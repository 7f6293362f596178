"""The command line ``flux2``: options and exit codes. What a command does is in ``*_command.py``.

Exit codes: 0 when everything was done, 1 when something was refused or failed, 2 for wrong usage, 130 after Ctrl-C.
Nothing heavy is imported before the options are read, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .acceleration_options import add_acceleration_options
from .command_errors import describe_error
from .memory_options import PRECISIONS, add_memory_options
from .picture_metadata import kit_version

EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143
DEFAULT_SAVE_PATH = "output"
REFERENCE_CACHES = ("auto", "off", "exact", "approximate")
"""As `reference_cache.ReferenceCacheMode`."""
REQUESTS = ("prompt", "from_file", "interactive", "latent_path", "save_merged_model")
"""Options of generate, one of which says what to make."""
DESCRIPTION = "Generates and edits pictures with FLUX.2, on the bundled tiny model or on released weights."
EXAMPLES = """\
examples:
  flux2 generate --prompt "a large red circle at the top left on a blue background"
  flux2 generate --prompt "make the circle green" --control_image_path output/circle.png
  flux2 generate --prompt "a large green circle" --image_path output/circle.png --strength 0.6
  flux2 generate --model_version klein-4b --models_dir ComfyUI/models --prompt "a lighthouse at dawn"
  flux2 generate --lora_weight style.safetensors --lora_multiplier 0.8 --prompt "a lighthouse at dawn"
  flux2 convert-lora lora.safetensors for-comfyui.safetensors --to comfy
  flux2 quantize --dit flux-2-klein-9b.safetensors --output klein-9b-fp8.safetensors --format fp8
  flux2 generate --model_version klein-9b --vram_budget 8 --prompt "a lighthouse at dawn"
  flux2 plan klein-9b
  flux2 inspect model.safetensors

`flux2 COMMAND --help` lists the options of a command, for generate with the defaults of every variant."""


class Parser(argparse.ArgumentParser):
    """Answers wrong usage with one line.

    `lazy_epilog` is only asked for when help is shown, and `lazy_options` is given the parser when its own options are
    read or shown: what they are taken from may take time to import.
    """

    def __init__(
        self,
        *args: Any,
        lazy_epilog: Callable[[], str] | None = None,
        lazy_options: Callable[[Parser], None] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.lazy_epilog = lazy_epilog
        self.lazy_options = lazy_options

    def format_help(self) -> str:
        self._add_lazy_options()
        if self.lazy_epilog is not None:
            self.epilog = self.lazy_epilog()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._add_lazy_options()
        return super().parse_known_args(args, namespace)

    def _add_lazy_options(self) -> None:
        add, self.lazy_options = self.lazy_options, None
        if add is not None:
            add(self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flux2: error: {message}; see `{self.prog} --help`\n")


AddCommands = Callable[["argparse._SubParsersAction[Any]", Parser], None]


def main(argv: Sequence[str] | None = None, add_commands: AddCommands | None = None) -> int:
    """Runs one command and returns its exit code; `add_commands` adds those of other packages."""
    try:
        args = build_parser(add_commands).parse_args(argv)
        if not any((getattr(args, name, True) not in (None, False)) for name in REQUESTS):
            args.parser.error(f"one of the arguments {' '.join(f'--{name}' for name in REQUESTS)} is required")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else EXIT_REFUSED
    # Of processes that were launched together the first one informs; warnings are everyone's.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    with _logging(logging.DEBUG if args.debug else level) as logger, _terminable(), _any_name_printable():
        try:
            return args.run(args)
        except KeyboardInterrupt:
            logger.error("interrupted; what was written before is whole")
            return EXIT_INTERRUPTED
        except SystemExit:
            logger.error("terminated; what was written before is whole")
            return EXIT_TERMINATED
        except BrokenPipeError:
            # The reader, `head` say, has gone: nothing is left to tell it, at interpreter exit neither.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_REFUSED
        except Exception as error:  # the one place where an unforeseen error becomes a line and an exit code
            logger.error("%s", describe_error(error))
            if args.debug:
                traceback.print_exc()
            return EXIT_REFUSED


def build_parser(add_commands: AddCommands | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function from its options to the exit code."""
    parser = Parser(prog="flux2", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"flux2 {kit_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show details, and the traceback of an error")
    generate = commands.add_parser(
        "generate",
        parents=[common],
        help="make pictures from prompts and references",
        description="Makes pictures from a prompt, from a file of prompts, or from saved latents.\n"
        "On several GPUs, `accelerate launch -m flux2_kit.training generate --from_file FILE` shares the file's lines.",
        lazy_epilog=_variant_defaults,
    )
    _add_request_options(generate)
    _add_sampling_options(generate)
    _add_model_options(generate)
    _add_lora_options(generate.add_argument_group("LoRAs"))
    _add_output_options(generate)
    generate.set_defaults(run=_run_generate, parser=generate)

    inspect = commands.add_parser("inspect", parents=[common], help="tell what files are")
    inspect.description = "Tells what checkpoints, LoRAs, saved latents and PNG files are, without loading them."
    inspect.add_argument("files", nargs="+", metavar="FILE", help="files or model folders")
    inspect.add_argument("--json", action="store_true", help="print a JSON list, one object a file")
    inspect.set_defaults(run=_run_inspect)

    _add_merge_lora(commands, common)
    _add_convert_lora(commands, common)
    _add_extract_lora(commands, common)
    _add_quantize(commands, common)

    _add_plan(commands, common)

    download = commands.add_parser("download", parents=[common], help="fetch the weights of a variant")
    download.description = (
        "Fetches the weights of a variant into the Hugging Face cache, after showing files, sizes and licence.\n"
        "An interrupted download goes on where it ended."
    )
    download.add_argument("variant", metavar="VARIANT", help="such as klein-4b; `flux2 generate --help` lists them")
    download.add_argument("--yes", action="store_true", help="do not ask before it starts")
    download.set_defaults(run=_run_download)
    if add_commands is not None:
        add_commands(commands, common)
    return parser


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to make (one of these)").add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="make one picture; may be empty")
    what.add_argument(
        "--from_file",
        metavar="FILE",
        help="a prompt a line, with options behind it: --w --h (size) --d (seed) --s (steps) --g or --l "
        "(guidance_scale) --fs (flow_shift) --n (negative prompt) --ci (reference, repeatable); # begins a comment",
    )
    what.add_argument("--interactive", action="store_true", help="read such lines from the keyboard; an empty one ends")
    what.add_argument(
        "--latent_path", nargs="+", metavar="FILE", help="decode saved latents; no other network is loaded"
    )
    group = parser.add_argument_group("prompt and references")
    group.add_argument("--negative_prompt", metavar="TEXT", help="for classifier-free guidance; default: empty")
    group.add_argument(
        "--control_image_path",
        nargs="+",
        metavar="PICTURE",
        help="1 to 10 references: image 1, image 2, ... in prompts",
    )
    group.add_argument("--no_resize_control", action="store_true", help="only crop references to 16, keep them large")
    group.add_argument(
        "--reference_cache",
        choices=REFERENCE_CACHES,
        help="compute references once for all steps: auto (default) does so for klein-9b-kv, which was trained for it; "
        "approximate does so for the other variants, which is faster and less exact; off computes them in every step",
    )
    group.add_argument(
        "--image_path",
        metavar="PICTURE",
        help="start from this picture instead of pure noise; a size that is left open follows it",
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="with --image_path: how much of it is made anew, 0.01 to 1; --infer_steps are the steps that are run",
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults by variant: see below)")
    group.add_argument(
        "--image_size", nargs=2, type=int, metavar=("H", "W"), help="height and width in pixels, multiples of 16"
    )
    group.add_argument("--infer_steps", type=int, metavar="N", help="Euler steps")
    group.add_argument("--guidance_scale", type=float, metavar="X", help="classifier-free guidance; 1 switches it off")
    group.add_argument("--embedded_cfg_scale", type=float, metavar="X", help="embedded guidance (dev only)")
    group.add_argument("--flow_shift", type=float, metavar="X", help="default: follows from size and steps")
    group.add_argument("--seed", type=int, metavar="N", help="default: random; shown, and kept in names and metadata")
    group.add_argument("--num_images", type=int, metavar="N", help="pictures from one seed; default: 1")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_version", metavar="NAME", help="a variant, or auto; default: tiny without weights, else auto"
    )
    group.add_argument("--dit", metavar="PATH", help="DiT: file, shard, index or folder")
    group.add_argument("--vae", metavar="PATH", help="autoencoder")
    group.add_argument("--text_encoder", metavar="PATH", help="Mistral Small 3 or Qwen3: file, shard or folder")
    group.add_argument("--tokenizer", metavar="PATH", help="default: beside the text encoder, then the local cache")
    group.add_argument("--models_dir", metavar="DIR", help="ComfyUI's models folder, searched for what is not given")
    group.add_argument("--device", metavar="NAME", help="such as cpu or cuda:0; default: cuda where there is one")
    group.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of DiT and text encoder, unquantised; default: as in the files"
    )
    add_acceleration_options(group)
    memory = parser.add_argument_group("memory")
    add_memory_options(memory)
    memory.add_argument("--vae_tiling", action="store_true", help="encode and decode pictures in strips: less memory")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--save_path", metavar="DIR", default=DEFAULT_SAVE_PATH, help="made where missing; default: %(default)s"
    )
    group.add_argument(
        "--output_type",
        choices=("images", "latent", "latent_images"),
        default="images",
        help="default: %(default)s",
    )
    group.add_argument("--no_metadata", action="store_true", help="leave prompt and settings out of the files")
    group.add_argument(
        "--save_merged_model", metavar="FILE", help="write the DiT with its LoRAs merged in, and make no pictures"
    )


def _add_lora_options(group: argparse._ActionsContainer, *, required: bool = False) -> None:
    group.add_argument("--lora_weight", nargs="+", metavar="FILE", required=required, help="LoRAs of any dialect")
    group.add_argument(
        "--lora_multiplier", nargs="+", type=float, metavar="X", help="strength of each, or one for all; default: 1"
    )
    group.add_argument(
        "--include_patterns", nargs="+", metavar="RE", help="adapt only layers whose name one of these is found in"
    )
    group.add_argument("--exclude_patterns", nargs="+", metavar="RE", help="leave out layers one of these is found in")
    _add_allow_unmatched(group)


def _add_allow_unmatched(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--allow_unmatched", action="store_true", help="leave out tensors that belong to no layer of the DiT; they are "
        "an error otherwise"
    )  # fmt: skip


def _add_merge_lora(commands: argparse._SubParsersAction[Any], common: Parser) -> None:
    parser = commands.add_parser("merge-lora", parents=[common], help="write a DiT with LoRAs merged in")
    parser.description = "Merges LoRAs into a DiT and writes it as one file in Black Forest Labs' layout."
    parser.add_argument("--dit", required=True, metavar="PATH", help="DiT: file, shard, index or folder")
    _add_lora_options(parser, required=True)
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    _add_conversion_options(parser, "the DiT's; 8-bit weights become bf16")
    _add_device(parser)
    parser.set_defaults(run=_run_merge_lora)


def _add_convert_lora(commands: argparse._SubParsersAction[Any], common: Parser) -> None:
    parser = commands.add_parser("convert-lora", parents=[common], help="write a LoRA in another dialect")
    parser.description = (
        "Writes a LoRA of any dialect as comfy (ComfyUI, diffusers and ai-toolkit read it), kohya (musubi-tuner,\n"
        "sd-scripts), diffusers (PEFT) or diffsynth (DiffSynth-Studio)."
    )
    parser.add_argument("input", metavar="IN", help="the LoRA to read")
    parser.add_argument("output", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--to", required=True, choices=("comfy", "kohya", "diffusers", "diffsynth"), help="the dialect")
    _add_allow_unmatched(parser)
    _add_conversion_options(parser, "the LoRA's")
    parser.set_defaults(run=_run_convert_lora)


def _add_extract_lora(commands: argparse._SubParsersAction[Any], common: Parser) -> None:
    parser = commands.add_parser("extract-lora", parents=[common], help="write the difference of two DiTs as a LoRA")
    parser.description = "Writes the LoRA that comes nearest to the difference of two DiTs of one size."
    parser.add_argument("--base", required=True, metavar="PATH", help="the DiT that the LoRA will be used with")
    parser.add_argument("--tuned", required=True, metavar="PATH", help="the DiT to come near to")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--rank", required=True, type=int, metavar="N", help="larger is nearer, and a larger file")
    _add_allow_unmatched(parser)
    _add_conversion_options(parser, "fp32")
    _add_device(parser)
    parser.set_defaults(run=_run_extract_lora)


def _add_quantize(commands: argparse._SubParsersAction[Any], common: Parser) -> None:
    parser = commands.add_parser("quantize", parents=[common], help="write a DiT or a text encoder in fp8")
    parser.description = (
        "Writes a DiT with the weights of its blocks in 8 bits, or a text encoder with those of its layers: half the\n"
        "size, and loaded without conversion. LoRAs are merged into a DiT before."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dit", metavar="PATH", help="DiT: file, shard, index or folder")
    what.add_argument("--text_encoder", metavar="PATH", help="text encoder: the same")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=("fp8", "fp8-comfy"),
        help="fp8: a scale for each row, the more precise one; fp8-comfy: a scale for each weight, which ComfyUI reads",
    )
    _add_lora_options(parser)
    parser.add_argument(
        "--model_version", metavar="NAME", help="a variant, or auto; default: auto, by shapes and names"
    )
    _add_device(parser)
    parser.set_defaults(run=_run_quantize)


def _add_plan(commands: argparse._SubParsersAction[Any], common: Parser) -> None:
    parser = commands.add_parser("plan", parents=[common], help="tell what runs within how much memory")
    parser.description = (
        "Prints for a list of budgets how a variant runs within them: its precision, how much of it stays on the\n"
        "device, and what that is estimated to take. No file and no GPU is needed."
    )
    parser.add_argument("variant", metavar="VARIANT", help="such as klein-9b; `flux2 generate --help` lists them")
    parser.add_argument("--budgets", nargs="+", type=float, metavar="GB", help="in GiB; default: those of common GPUs")
    parser.add_argument("--host_memory", type=float, metavar="GB", help="free host memory, in GiB; default: enough")
    parser.add_argument("--image_size", nargs=2, type=int, metavar=("H", "W"), help="default: the variant's")
    parser.add_argument("--references", type=int, metavar="N", default=0, help="of 1024x1024 px; default: none")
    parser.add_argument("--batch_size", type=int, metavar="N", default=1, help="pictures at once; default: 1")
    parser.add_argument("--guidance_scale", type=float, metavar="X", help="default: the variant's")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: auto")
    parser.add_argument("--text_encoder_precision", choices=PRECISIONS, help="default: auto")
    parser.add_argument("--training", action="store_true", help="of a LoRA, from cached pictures and captions")
    parser.add_argument("--rank", type=int, metavar="N", help="of the LoRA, with or without --training; default: 32")
    parser.set_defaults(run=_run_plan)


def _add_conversion_options(parser: argparse.ArgumentParser, default_dtype: str) -> None:
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help=f"type to write; default: {default_dtype}")
    parser.add_argument(
        "--model_version", metavar="NAME", help="a variant, or auto; default: auto, by shapes and names"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="where it is computed; default: cuda where there is one")


def _variant_defaults() -> str:
    """The table under the options of `generate`, from the dataclasses that hold the defaults."""
    from .variants import VARIANTS

    lines = ["defaults by variant:", f"  {'':14}{'size':>9}  steps  guidance_scale  embedded_cfg_scale  licence"]
    for variant in VARIANTS.values():
        size = f"{variant.default_size}x{variant.default_size}"
        guidance = "-" if variant.guidance is None else f"{variant.guidance:g}"
        lines.append(
            f"  {variant.name:14}{size:>9}  {variant.num_steps:>5}  {variant.cfg_scale:>14g}  {guidance:>18}  "
            f"{variant.license}"
        )
    return "\n".join(lines)


def _run_generate(args: argparse.Namespace) -> int:
    from .generate_command import run_generate

    return run_generate(args)


def _run_inspect(args: argparse.Namespace) -> int:
    from .inspect_command import run_inspect

    return run_inspect(args)


def _run_merge_lora(args: argparse.Namespace) -> int:
    from .lora_command import run_merge_lora

    return run_merge_lora(args)


def _run_convert_lora(args: argparse.Namespace) -> int:
    from .lora_command import run_convert_lora

    return run_convert_lora(args)


def _run_extract_lora(args: argparse.Namespace) -> int:
    from .lora_command import run_extract_lora

    return run_extract_lora(args)


def _run_quantize(args: argparse.Namespace) -> int:
    from .quantize_command import run_quantize

    return run_quantize(args)


def _run_plan(args: argparse.Namespace) -> int:
    from .plan_command import DEFAULT_BUDGETS, run_plan

    args.budgets = args.budgets or list(DEFAULT_BUDGETS)
    return run_plan(args)


def _run_download(args: argparse.Namespace) -> int:
    from .download_command import run_download

    return run_download(args)


class _LineFormatter(logging.Formatter):
    """Plain information; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"flux2: {record.levelname.lower()}: {text}"


@contextmanager
def _logging(level: int) -> Iterator[logging.Logger]:
    """Sends what the package logs to stderr while a command runs."""
    assert __package__ is not None
    logger = logging.getLogger(__package__.split(".")[0])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(_signal: int, _frame: object) -> NoReturn:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _any_name_printable() -> Iterator[None]:
    """Signs of files' names and prompts that the output's encoding has not are escaped, as on stderr, and no error."""
    output = sys.stdout
    if not isinstance(output, io.TextIOWrapper):
        yield
        return
    before = output.errors
    output.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        output.reconfigure(errors=before)


if __name__ == "__main__":
    sys.exit(main())
