"""``flux2 generate``: prompts, prompt files and an interactive session to files on disk."""

from __future__ import annotations

import argparse
import contextlib
import logging
import secrets
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .acceleration_options import read_acceleration_options
from .command_errors import describe_error, is_out_of_memory
from .command_options import DTYPES, choose_device, models_folder
from .detect import resolve_variant
from .file_stems import claim_stem
from .files import write_safetensors
from .images import load_image, reference_size
from .latent_command import decode_files
from .launch import Launch, join_launch
from .lora import LoraSetting
from .lora_command import check_lora_options, read_lora_settings, save_merged
from .memory import MemoryNeeds
from .memory_options import read_memory_options
from .model_files import ModelFiles, find_model_files
from .picture_metadata import GenerationRecord, make_record
from .picture_output import prepare_folder, write_pictures
from .pipeline import (
    Flux2Pipeline,
    SamplingConfig,
    check_num_references,
    load_pipeline,
)
from .prompt_lines import PromptLine, parse_prompt_line, prompt_lines
from .sampling import DenoiseStep
from .tensor_source import TensorSource
from .variants import VARIANTS, Variant, get_variant
from .weights import find_weights

logger = logging.getLogger(__name__)

RANDOM_SEEDS = 2**32
"""Random seeds are drawn below this: short enough to be copied by hand."""
MAX_KEPT_EMBEDDINGS = 32
"""Text embeddings kept for prompts that come again; one of dev takes 15 MB."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One line's worth of pictures, checked as far as it can be without the networks."""

    prompt: str
    negative_prompt: str
    reference_paths: tuple[Path, ...]
    image_path: Path | None = None
    """Picture to start from."""
    sampling: SamplingConfig
    """Resolved: nothing is left to the variant."""


def run_generate(args: argparse.Namespace) -> int:
    """Carries out the options of `cli.build_parser`; 0 when every picture was written.

    Processes that were launched together share the lines of ``--from_file``.

    Raises:
        ValueError: something that was asked for cannot be done; nothing was written then.
    """
    with join_launch() as launch:
        return generate(args, launch)


def generate(args: argparse.Namespace, launch: Launch) -> int:
    """One process's part of `run_generate`; the exit code is that of all of them."""
    # 1. Everything that can be refused is refused before weights are loaded, which may take minutes.
    if launch.count > 1 and not args.from_file:
        raise ValueError(
            f"{launch.count} processes were started, and they share the lines of a prompt file; give --from_file, or "
            "start one process"
        )
    device = choose_device(launch.device_name(args.device))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what is allocated without naming a device goes there too
    if args.latent_path:
        return decode_files(args, device)
    check_lora_options(args)
    if args.save_merged_model:
        return save_merged_model(args)
    files = find_model_files(
        find_variant(args),
        dit=args.dit,
        autoencoder=args.vae,
        text_encoder=args.text_encoder,
        models_dir=models_folder(args.models_dir),
    )
    jobs, num_bad = read_jobs(args, files.variant, tells=launch.is_main)
    loras = read_lora_settings(args, files.variant.dit)
    folder = prepare_folder(args.save_path)
    if not jobs and not args.interactive:
        return 1

    # 2. Networks, once for all pictures; what they need is that of all, so that every process loads the same.
    share = launch.share(jobs)
    num_failed = num_bad if launch.is_main else 0
    if share or args.interactive:
        pipeline = load_pipeline(
            files.variant.name,
            dit=files.dit,
            autoencoder=files.autoencoder,
            text_encoder=files.text_encoder,
            tokenizer=args.tokenizer,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            device=device,
            **read_memory_options(args),
            acceleration=read_acceleration_options(args),
            needs=memory_needs(args, files, [job for _, job in jobs]),
            loras=loras,
        )
        session = Session(pipeline=pipeline, files=files, folder=folder, args=args, loras=loras, is_main=launch.is_main)

        # 3. Pictures.
        if args.interactive:
            num_failed = run_interactive(session)
        for place, job in share:
            num_failed += not session.attempt(job, place)

    num_failed = launch.total(num_failed)
    if launch.is_main and launch.count > 1:
        num_lines = len(jobs) + num_bad
        logger.info("%d of %d lines done by %d processes", num_lines - num_failed, num_lines, launch.count)
    return 1 if num_failed else 0


def save_merged_model(args: argparse.Namespace) -> int:
    """``--save_merged_model``: writes the DiT with its LoRAs merged in, whatever else was asked for, and ends.

    Raises:
        ValueError: there is no LoRA, or it does not fit; nothing is written.
    """
    variant = find_variant(args)
    dit = find_weights(variant, "dit", Path(args.dit) if args.dit else None, models_folder(args.models_dir))
    save_merged(args, dit=dit, variant=variant.name, out_path=args.save_merged_model)
    if args.prompt is not None or args.from_file or args.interactive:
        logger.info("--save_merged_model makes no pictures; leave it out to make them")
    return 0


def read_jobs(args: argparse.Namespace, variant: Variant, *, tells: bool = True) -> tuple[list[tuple[str, Job]], int]:
    """The jobs of ``--prompt`` or ``--from_file`` with their places for messages, and the number of bad lines.

    Args:
        tells: whether bad lines are reported here.
    """
    make_sampling(args, PromptLine(prompt=""), variant)  # the options hold for every line: refused once, not by line
    if args.interactive:
        return [], 0
    if args.prompt is not None:
        job = make_job(args, PromptLine(prompt=args.prompt), variant)
        check_reference_options(args, [job])
        return [("", job)], 0
    path = Path(args.from_file)
    if not path.is_file():
        raise ValueError(f"no prompt file at {path}; check the path")
    try:
        lines = list(prompt_lines(path.read_text(encoding="utf-8-sig").splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error
    if not lines:
        raise ValueError(f"{path} holds no prompts; write one a line")
    jobs: list[tuple[str, Job]] = []
    num_bad = 0
    for number, text in lines:
        try:
            jobs.append((f"{path}:{number}: ", make_job(args, parse_prompt_line(text), variant)))
        except ValueError as error:
            if tells:
                logger.error("%s:%d: %s", path, number, describe_error(error))
            num_bad += 1
    if not num_bad:
        check_reference_options(args, [job for _, job in jobs])
    return jobs, num_bad


def check_reference_options(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Refuses options about references where no job has any.

    Raises:
        ValueError: with the option.
    """
    if any(job.reference_paths for job in jobs):
        return
    for option in ("no_resize_control", "reference_cache"):
        if getattr(args, option):
            raise ValueError(
                f"--{option} was given without a reference; add --control_image_path (in a line --ci) or leave it out"
            )


def make_job(args: argparse.Namespace, line: PromptLine, variant: Variant) -> Job:
    """One line over the options of the command line; what neither names is the variant's default.

    Raises:
        ValueError: a setting, or a reference that cannot be read.
    """
    sampling = make_sampling(args, line, variant)
    negative_prompt = _first(line.negative_prompt, args.negative_prompt)
    if negative_prompt is not None and sampling.cfg_scale == 1:
        raise ValueError(
            f"a negative prompt was given, but {variant.name} runs with guidance_scale 1, which uses none; "
            "set --guidance_scale (--g) above 1, or leave it out"
        )
    paths = tuple(Path(path) for path in line.references or args.control_image_path or ())
    check_references(paths)
    return Job(
        prompt=line.prompt,
        negative_prompt=negative_prompt or "",
        reference_paths=paths,
        image_path=Path(args.image_path) if args.image_path is not None else None,
        sampling=sampling,
    )


def make_sampling(args: argparse.Namespace, line: PromptLine, variant: Variant) -> SamplingConfig:
    """The settings of one line, without anything left open; a seed that nobody named is random."""
    height, width = args.image_size or (None, None)
    given: dict[str, Any] = {
        "width": _first(line.width, width),
        "height": _first(line.height, height),
        "num_steps": _first(line.num_steps, args.infer_steps),
        "cfg_scale": _first(line.cfg_scale, args.guidance_scale),
        "guidance": args.embedded_cfg_scale,
        "flow_shift": _first(line.flow_shift, args.flow_shift),
        "seed": _first(line.seed, args.seed, secrets.randbelow(RANDOM_SEEDS)),
        "num_images": args.num_images,
        "resize_references": not args.no_resize_control,
        "tile_autoencoder": args.vae_tiling,
        "reference_cache": args.reference_cache,
        "strength": args.strength,
    }
    sampling = SamplingConfig(**{name: value for name, value in given.items() if value is not None})
    if (args.image_path is None) != (args.strength is None):
        raise ValueError(
            "--image_path and --strength belong together: a picture to start from, and how much of it is made anew, "
            "such as 0.6; give both or neither"
        )
    if args.image_path is not None:
        sampling = sampling.sized_like(load_image(args.image_path).size, variant)
    return sampling.resolved(variant)


def check_references(paths: tuple[Path, ...]) -> None:
    """Reads every reference once, so that a bad one is told before the networks are loaded."""
    check_num_references(len(paths))
    for path in paths:
        image = load_image(path)
        try:
            reference_size(*image.size, None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def memory_needs(args: argparse.Namespace, files: ModelFiles, jobs: Sequence[Job]) -> MemoryNeeds:
    """What the largest of the jobs is like; without any, a picture of the options."""
    samplings = [job.sampling for job in jobs] or [make_sampling(args, PromptLine(prompt=""), files.variant)]
    largest = max(samplings, key=lambda sampling: (sampling.width or 0) * (sampling.height or 0))
    paths = max((job.reference_paths for job in jobs), key=len, default=())
    single, several = files.variant.autoencoder.reference_sides
    max_pixels = None if args.no_resize_control else (single if len(paths) == 1 else several) ** 2
    return MemoryNeeds(
        width=largest.width,
        height=largest.height,
        reference_sizes=tuple(reference_size(*load_image(path).size, max_pixels) for path in paths),
        reference_cache=largest.reference_cache if largest.reference_cache != "auto" else None,
        num_images=largest.num_images,
        uses_cfg=any(sampling.cfg_scale != 1 for sampling in samplings),
        tile_autoencoder=args.vae_tiling,
        num_streamed=args.blocks_to_swap,
    )


def find_variant(args: argparse.Namespace) -> Variant:
    """The variant that was asked for, told from the DiT's header where it is to be.

    Raises:
        ValueError: it is unknown, or nothing tells it.
    """
    name = args.model_version or ("auto" if args.dit or args.vae or args.text_encoder else "tiny")
    if args.models_dir is not None and name == "tiny":
        raise ValueError(
            "--models_dir was given, but tiny comes with the package; name the variant to look for with --model_version"
        )
    if name == "auto" and not args.dit:
        raise ValueError("auto tells the variant from the DiT, but no --dit was given; give it or a --model_version")
    if name == "auto":
        return resolve_variant(TensorSource(args.dit, component="dit"))
    if name not in VARIANTS:
        raise ValueError(f"--model_version is {name!r}; allowed are auto, {', '.join(VARIANTS)}")
    return get_variant(name)


class Session:
    """Loaded networks, and the text embeddings of the prompts so far."""

    def __init__(
        self,
        *,
        pipeline: Flux2Pipeline,
        files: ModelFiles,
        folder: Path,
        args: argparse.Namespace,
        loras: Sequence[LoraSetting] = (),
        is_main: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self.loras = loras
        """Live in the pipeline's DiT already."""
        self.files = files
        self.folder = folder
        self.args = args
        self.is_main = is_main
        """Of several processes, one shows its progress."""
        self.has_warned = False
        self.embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def attempt(self, job: Job, place: str = "") -> bool:
        """Runs a job; what only this job can be blamed for is reported, and the next one may go on."""
        try:
            self.run(job)
        except (ValueError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            if self.args.debug:
                logger.debug("traceback", exc_info=True)
            logger.error("%s%s", place, describe_error(error))
            return False
        return True

    def run(self, job: Job) -> None:
        """Makes the pictures of a job and writes them."""
        pipeline, sampling = self.pipeline, job.sampling
        logger.info("%s", describe_job(pipeline.variant, sampling))
        if pipeline.variant.distilled and sampling.cfg_scale != 1 and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "guidance_scale is %g, but %s is distilled and meant for 1: steps take twice as long, and colours may "
                "be too strong",
                sampling.cfg_scale,
                pipeline.variant.name,
            )

        # 1. Prompts to text embeddings.
        use_cfg = sampling.cfg_scale != 1
        text = self.embedding(job.prompt)
        negative = self.embedding(job.negative_prompt) if use_cfg else None

        # 2. References and the picture to start from to latents.
        references = pipeline.encode_references(
            [load_image(path) for path in job.reference_paths],
            resize=sampling.resize_references,
            tiled=sampling.tile_autoencoder,
        )
        initial = pipeline.encode_initial(load_image(job.image_path), sampling) if job.image_path else None

        # 3. Noise to latents.
        with progress_bar(sampling.num_steps or 0, is_shown=self.is_main) as bar:
            latents = pipeline.sample(
                sampling,
                text,
                negative_text=negative,
                references=references,
                initial=initial,
                on_step=lambda step: show_step(bar, step),
            )

        # 4. Latents to files.
        record = self.record(job)
        with claim_stem(self.folder, str(sampling.seed)) as stem:
            if self.args.output_type != "images":
                metadata = {} if self.args.no_metadata else record.latent_metadata()
                report(write_safetensors(self.folder / f"{stem}_latent.safetensors", {"latent": latents}, metadata))
            if self.args.output_type != "latent":
                images = pipeline.decode(latents, tiled=sampling.tile_autoencoder)
                for path in write_pictures(self.folder, stem, images, None if self.args.no_metadata else record):
                    report(path)

    def embedding(self, prompt: str) -> Tensor:
        """The text embedding of a prompt, kept for the next time."""
        if prompt not in self.embeddings:
            self.embeddings[prompt] = self.pipeline.encode_prompt(prompt)
        self.embeddings.move_to_end(prompt)
        while len(self.embeddings) > MAX_KEPT_EMBEDDINGS:
            self.embeddings.popitem(last=False)
        return self.embeddings[prompt]

    def record(self, job: Job) -> GenerationRecord:
        """What the files say about how they were made."""
        return make_record(
            job.sampling,
            self.files.variant,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            references=job.reference_paths,
            initial_image=job.image_path,
            dit=self.files.dit,
            autoencoder=self.files.autoencoder,
            text_encoder=self.files.text_encoder,
            loras=((setting.lora.name, setting.strength) for setting in self.loras),
            lora_include=self.args.include_patterns or (),
            lora_exclude=self.args.exclude_patterns or (),
        )


def run_interactive(session: Session) -> int:
    """Reads prompt lines until the end of input, an empty line, or "quit"; returns the number of failures.

    Ctrl-C stops a picture; at the prompt it ends the session.
    """
    num_failed = 0
    for text in _typed_lines():
        try:
            job = make_job(session.args, parse_prompt_line(text), session.files.variant)
            num_failed += not session.attempt(job)
        except ValueError as error:
            logger.error("%s", describe_error(error))
            num_failed += 1
        except KeyboardInterrupt:
            logger.warning("this picture was stopped; an empty line or Ctrl-C ends the session")
            num_failed += 1
    return num_failed


def _typed_lines() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("One prompt a line, options behind it (--w --h --d --s --g --fs --n --ci). An empty line ends.")
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        text = line.strip()
        if not text or text.lower() in ("quit", "exit"):
            return
        if not text.startswith("#"):
            yield text


def describe_job(variant: Variant, sampling: SamplingConfig) -> str:
    """One line with what decides the picture; the seed is always in it."""
    parts = [f"{variant.name}", f"{sampling.width}x{sampling.height} px", f"{sampling.num_steps} steps"]
    parts.append(f"guidance_scale {sampling.cfg_scale:g}")
    if sampling.guidance is not None:
        parts.append(f"embedded_cfg_scale {sampling.guidance:g}")
    if sampling.flow_shift is not None:
        parts.append(f"flow_shift {sampling.flow_shift:g}")
    if sampling.strength != 1:
        parts.append(f"strength {sampling.strength:g}")
    if sampling.reference_cache == "approximate":
        parts.append("references approximate")
    parts.append(f"seed {sampling.seed}")
    if sampling.num_images > 1:
        parts.append(f"{sampling.num_images} images")
    return ", ".join(parts)


@contextlib.contextmanager
def progress_bar(num_steps: int, *, is_shown: bool = True) -> Iterator[tqdm]:
    """A bar over the steps on stderr, where that is a terminal."""
    disable = None if is_shown else True  # None leaves it to tqdm to look
    with tqdm(total=num_steps, unit="step", disable=disable, leave=False, file=sys.stderr) as bar:
        yield bar


def show_step(bar: tqdm, step: DenoiseStep) -> None:
    """Moves the bar to a finished step."""
    bar.update(step.index - bar.n)


def report(path: Path) -> None:
    """Tells what was written, one path a line on stdout, for people and scripts."""
    print(path, flush=True)


def _first(*values: Any) -> Any:
    """The first that was given."""
    return next((value for value in values if value is not None), None)
