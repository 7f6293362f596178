"""Pictures made during training, by the steps that inference uses: what ``flux2 generate`` makes with the same LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..flux2_core.autoencoder import Flux2Autoencoder
from ..flux2_core.autoencoder_memory import Tiling
from ..flux2_core.dit import Flux2DiT
from ..flux2_core.files import read_limited
from ..flux2_core.images import load_image
from ..flux2_core.picture_metadata import GenerationRecord, make_record, write_png
from ..flux2_core.pipeline import (
    SamplingConfig,
    check_num_references,
    decode_latents,
    encode_prompt,
    encode_references,
    sample_latents,
)
from ..flux2_core.placement import place_autoencoder, release
from ..flux2_core.prompt_lines import PromptLine, parse_prompt_line, prompt_lines
from ..flux2_core.text_encoder import TextEncoder
from ..flux2_core.variants import Variant
from .base_model import BaseModel
from .config import TrainConfig
from .run_files import RunFiles
from .train_files import TrainFiles

MAX_PROMPT_FILE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedSample:
    """A picture to make, with everything encoded that does not change during training."""

    line: PromptLine
    sampling: SamplingConfig
    """Without anything left open."""
    text: Tensor
    """``[1, L, C]``"""
    negative_text: Tensor | None
    references: tuple[Tensor, ...]
    """Latents ``[1, 128, h_i, w_i]``."""


def read_sample_prompts(path: Path) -> list[PromptLine]:
    """Prompt lines of a file, see `prompt_lines`.

    Raises:
        ValueError: no such file, none in it, or one that is wrong; with its number.
    """
    if not path.is_file():
        raise ValueError(f"no file of sample prompts at {path}; check the path")
    try:
        lines = list(prompt_lines(read_limited(path, MAX_PROMPT_FILE_BYTES).decode("utf-8-sig").splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from error
    if not lines:
        raise ValueError(f"{path} holds no prompts; write one a line")
    parsed = []
    for number, text in lines:
        try:
            parsed.append(parse_prompt_line(text))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return parsed


def resolve_sampling(line: PromptLine, variant: Variant, seed: int) -> SamplingConfig:
    """The settings of a line; what it leaves open is the variant's default, and the seed that of the training.

    Raises:
        ValueError: a setting that the variant cannot carry out.
    """
    given = {
        "width": line.width,
        "height": line.height,
        "num_steps": line.num_steps,
        "cfg_scale": line.cfg_scale,
        "flow_shift": line.flow_shift,
        "seed": seed if line.seed is None else line.seed,
    }
    sampling = SamplingConfig(**{name: value for name, value in given.items() if value is not None}).resolved(variant)
    if line.negative_prompt is not None and sampling.cfg_scale == 1:
        raise ValueError(
            f"the sample prompt {line.prompt!r} has a negative prompt, but {variant.name} runs with guidance 1, which "
            "uses none; set --g above 1, or leave --n out"
        )
    return sampling


def prepare_samples(
    lines: Sequence[PromptLine],
    variant: Variant,
    seed: int,
    load_text_encoder: Callable[[], TextEncoder],
    autoencoder: Flux2Autoencoder,
) -> list[PreparedSample]:
    """Encodes prompts and references once; the text encoder is freed when this returns.

    Raises:
        ValueError: a setting or a reference that cannot be used; told before the text encoder is loaded.
    """
    settings = [resolve_sampling(line, variant, seed) for line in lines]
    pictures = []
    for line in lines:
        check_num_references(len(line.references))
        pictures.append([load_image(path) for path in line.references])
    references = [tuple(encode_references(autoencoder, images)) for images in pictures]
    text_encoder = load_text_encoder()
    return [
        PreparedSample(
            line=line,
            sampling=sampling,
            text=encode_prompt(text_encoder, line.prompt),
            negative_text=encode_prompt(text_encoder, line.negative_prompt or "") if sampling.cfg_scale != 1 else None,
            references=latents,
        )
        for line, sampling, latents in zip(lines, settings, references, strict=True)
    ]


def sample_name(name: str, step: int, index: int, seed: int) -> str:
    """The file of a run's picture.

    Args:
        name: of the run.
        step: steps done.
        index: of the prompt.
        seed: of the picture.
    """
    return f"{name}_{step:06d}_{index:02d}_{seed}.png"


def make_sample(
    sample: PreparedSample,
    dit: Flux2DiT,
    variant: Variant,
    autoencoder: Flux2Autoencoder,
    should_stop: Callable[[], bool] | None = None,
    *,
    tiling: Tiling = "whole",
) -> Image.Image:
    """The picture of a prompt with the LoRAs that are live on the DiT.

    Args:
        tiling: how it is decoded.

    Raises:
        Stopped: `should_stop` answered True.
    """
    latents = sample_latents(
        dit,
        variant,
        sample.sampling,
        sample.text,
        negative_text=sample.negative_text,
        references=sample.references,
        should_stop=should_stop,
    )
    store = torch.device("cpu") if tiling == "host" else None
    return decode_latents(autoencoder, latents, tiled=tiling != "whole", store=store)[0]


def sample_record(sample: PreparedSample, files: TrainFiles, loras: Sequence[tuple[str, float]]) -> GenerationRecord:
    """What the PNG file of a sample says about how it was made."""
    assert files.autoencoder is not None and files.text_encoder is not None, "sample pictures were made with them"
    return make_record(
        sample.sampling,
        files.variant,
        prompt=sample.line.prompt,
        negative_prompt=sample.line.negative_prompt,
        references=sample.line.references,
        dit=files.dit,
        autoencoder=files.autoencoder,
        text_encoder=files.text_encoder,
        loras=loras,
    )


class SamplePictures:
    """The sample pictures of a run: prompts and references are encoded once, then the text encoder is freed.

    Args:
        lines: from `read_sample_prompts`.

    Raises:
        ValueError: as `prepare_samples`.
    """

    def __init__(self, lines: Sequence[PromptLine], base: BaseModel, config: TrainConfig) -> None:
        self.base, self.files = base, base.files
        assert self.files.autoencoder is not None, "found for sample pictures"
        self.autoencoder = place_autoencoder(self.files.autoencoder, base.device, config.autoencoder_precision)
        self.prepared = prepare_samples(
            lines, self.files.variant, config.seed, base.load_text_encoder, self.autoencoder
        )
        self.rest()

    def make(
        self, index: int, step: int, dit: Flux2DiT, outputs: RunFiles, should_stop: Callable[[], bool] | None
    ) -> tuple[Path, Image.Image]:
        """Makes and writes a picture with the LoRA that is live on the DiT.

        Args:
            index: of its line.
            step: steps done.

        Raises:
            Stopped: `should_stop` answered True.
        """
        sample, variant = self.prepared[index], self.files.variant
        self.autoencoder.to(self.base.device)
        image = make_sample(sample, dit, variant, self.autoencoder, should_stop, tiling=self.base.plan.tiling)
        outputs.sample_folder.mkdir(exist_ok=True)
        path = outputs.sample_folder / sample_name(outputs.name, step, index, sample.sampling.seed)
        loras = [*((setting.lora.name, setting.strength) for setting in self.base.loras), (outputs.name, 1.0)]
        return write_png(path, image, sample_record(sample, self.files, loras)), image

    def rest(self) -> None:
        """Lets the autoencoder leave the device until the next picture, where there is no space beside the training."""
        if self.base.takes_turns:
            self.autoencoder.to("cpu")
            release(self.base.device)
