"""The model inside the package draws what it is asked for. README's figures come from all 200 held-out combinations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.images import image_to_tensor, load_image
from flux2_kit.flux2_core.pipeline import Flux2Pipeline, GenerateRequest, SamplingConfig, load_pipeline
from flux2_kit.flux2_core.preview import fit_preview, preview_images
from flux2_kit.flux2_core.weights import TINY_FOLDER
from flux2_kit.training.tiny.evaluate import (
    evaluate,
    held_out_combinations,
    held_out_edits,
    held_out_prompts,
    judge,
    round_trip_psnr,
    short_prompts,
)
from flux2_kit.training.tiny.pictures import Scene, draw_scenes, held_out_scenes
from PIL import Image

NUM_EXAMPLES = 40
PROMPT = "a large red circle at the top left on a blue background"
SCENE = Scene(kind="circle", color="red", size="large", position="top left", background="blue")


@pytest.fixture(scope="module")
def pipeline() -> Flux2Pipeline:
    return load_pipeline("tiny")


def shown(image: Image.Image) -> Scene:
    (scene,) = judge(image_to_tensor(image) / 2 + 0.5)
    return scene


def test_the_assets_are_small() -> None:
    assert sum(file.stat().st_size for file in TINY_FOLDER.rglob("*") if file.is_file()) <= 16_000_000


def test_the_autoencoder_keeps_pictures(pipeline: Flux2Pipeline) -> None:
    assert round_trip_psnr(pipeline.autoencoder) >= 34


def test_prompts_of_held_out_scenes(pipeline: Flux2Pipeline) -> None:
    result = evaluate(pipeline, held_out_prompts()[:NUM_EXAMPLES])
    assert min(result.color, result.background) >= 0.95 and result.kind >= 0.85


def test_edits_to_held_out_scenes(pipeline: Flux2Pipeline) -> None:
    assert evaluate(pipeline, held_out_edits()[:NUM_EXAMPLES]).all >= 0.85


def test_combinations_of_two_references(pipeline: Flux2Pipeline) -> None:
    assert evaluate(pipeline, held_out_combinations()[:NUM_EXAMPLES]).all >= 0.7


def test_a_chain_of_edits_on_its_own_pictures(pipeline: Flux2Pipeline) -> None:
    image = pipeline.generate(GenerateRequest(prompt=PROMPT)).images[0]
    for prompt in ("make the circle green", "make the background yellow", "turn the circle into a star"):
        image = pipeline.generate(GenerateRequest(prompt=prompt, references=(image,))).images[0]
    assert shown(image) == Scene(kind="star", color="green", size="large", position="top left", background="yellow")


def test_a_large_reference_is_brought_to_the_size_it_knows(pipeline: Flux2Pipeline) -> None:
    image = pipeline.generate(GenerateRequest(prompt=PROMPT)).images[0].resize((512, 512), Image.Resampling.LANCZOS)
    edited = pipeline.generate(GenerateRequest(prompt="make the circle green", references=(image,))).images[0]
    assert edited.size == (64, 64) and (shown(edited).color, shown(edited).kind) == ("green", "circle")


def test_short_prompts(pipeline: Flux2Pipeline) -> None:
    """The README gives 81.5 % and 92 %: with most left open, the model is less sure than with a full caption."""
    result = evaluate(pipeline, short_prompts()[: 2 * NUM_EXAMPLES])
    assert result.kind >= 0.7 and result.color >= 0.85


def test_pictures_of_one_seed_differ_where_the_prompt_leaves_room(pipeline: Flux2Pipeline) -> None:
    request = GenerateRequest(prompt="a green circle", sampling=SamplingConfig(num_images=6))
    scenes = [shown(image) for image in pipeline.generate(request).images]
    assert len({scene.position for scene in scenes}) > 1 and len({scene.background for scene in scenes}) > 1


def test_previews_show_the_colors(pipeline: Flux2Pipeline) -> None:
    pictures = draw_scenes(held_out_scenes()) * 2 - 1
    factors = fit_preview(pipeline.autoencoder)
    previews = preview_images(pipeline.autoencoder.encode(pictures), pipeline.autoencoder, factors)
    shown_pixels = torch.cat([image_to_tensor(preview) for preview in previews])
    error = (shown_pixels - F.avg_pool2d(pictures, 8)).square().mean().sqrt() / 2
    assert error < 0.18, "a preview that knows nothing but the mean colour is off by 0.34"


def test_the_first_command_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f'flux2 generate --prompt "{PROMPT}"' in readme
    assert main(["generate", "--prompt", PROMPT, "--save_path", str(tmp_path)]) == 0
    assert shown(load_image(capsys.readouterr().out.strip())) == SCENE


def test_command_line_and_library_make_the_same_picture(
    pipeline: Flux2Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompt", PROMPT, "--seed", "5", "--save_path", str(tmp_path)]) == 0
    ours = pipeline.generate(GenerateRequest(prompt=PROMPT, sampling=SamplingConfig(seed=5))).images[0]
    assert load_image(capsys.readouterr().out.strip()).tobytes() == ours.tobytes()


def test_precision_of_the_file_is_kept(pipeline: Flux2Pipeline) -> None:
    assert pipeline.dit.dtype == torch.bfloat16
