"""Bad input at the command line: one clear line, an exit code, and nothing half-written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import generate_command
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.variants import VARIANTS
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def refused(random_tiny_files, tmp_path, capsys, monkeypatch):
    """Runs ``flux2 generate``, which must write one line and no file, and answers the line.

    With ``loads=False`` it must do so before any weights are loaded.
    """

    def run(*options: str, loads: bool = False, code: int = 1, weights: list[str] | None = None) -> str:
        folder = tmp_path / "out"
        where = [] if "--save_path" in options else ["--save_path", str(folder)]
        what = [] if {"--prompt", "--from_file", "--latent_path"} & set(options) else ["--prompt", "x"]
        argv = ["generate", *(random_tiny_files.options if weights is None else weights), *where, *what, *options]
        with monkeypatch.context() as patches:
            if not loads:
                patches.setattr(generate_command, "load_pipeline", pytest.fail)
            assert main(argv) == code
        output = capsys.readouterr()
        lines = [line for line in output.err.splitlines() if not line.startswith("tiny, ")]
        assert len(lines) == 1 and lines[0].startswith("flux2: error: "), output.err
        assert "Traceback" not in output.err
        assert output.out == ""
        assert not folder.exists() or list(folder.iterdir()) == []
        return lines[0].removeprefix("flux2: error: ")

    return run


def with_weights(random_tiny_files, option: str, path: Path) -> list[str]:
    options = list(random_tiny_files.options)
    options[options.index(option) + 1] = str(path)
    return options


def test_missing_files(refused, random_tiny_files, tmp_path):
    for option, what in (("--dit", "safetensors"), ("--vae", "autoencoder"), ("--text_encoder", "text encoder")):
        message = refused(weights=with_weights(random_tiny_files, option, tmp_path / "no.safetensors"))
        assert re.search(rf"no\.safetensors does not exist; give .*{what}", message)
    assert "no prompt file at nowhere.txt; check the path" in refused("--from_file", "nowhere.txt")
    assert "no picture at nowhere.png; check the path" in refused("--control_image_path", "nowhere.png")
    assert "nowhere.safetensors does not exist; give" in refused("--latent_path", "nowhere.safetensors")
    assert "--models_dir nowhere is no folder; give ComfyUI's" in refused("--models_dir", "nowhere")


@pytest.mark.parametrize(("option", "loads"), [("--dit", False), ("--vae", True), ("--text_encoder", True)])
def test_truncated_and_foreign_files(refused, random_tiny_files, tmp_path, option, loads):
    whole = Path(random_tiny_files.options[random_tiny_files.options.index(option) + 1])
    if whole.is_dir():
        shutil.copytree(whole, tmp_path / "cut")
        cut = tmp_path / "cut" / "model.safetensors"
    else:
        cut = Path(shutil.copy(whole, tmp_path / "cut.safetensors"))
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    message = refused(weights=with_weights(random_tiny_files, option, cut), loads=loads)
    assert re.search(r"is truncated: .* ends at byte \d+ and the file holds \d+; download it again", message)

    foreign = tmp_path / "flux1.safetensors"
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}, foreign)
    message = refused(weights=with_weights(random_tiny_files, option, foreign), loads=loads)
    assert re.search(
        r"flux1\.safetensors is (a FLUX\.1 DiT, )?not a FLUX\.2 (DiT|autoencoder|text encoder).*(give|expected)",
        message,
    )

    pickled = tmp_path / "model.safetensors"
    torch.save({"weight": torch.zeros(2)}, pickled)
    message = refused(weights=with_weights(random_tiny_files, option, pickled), loads=loads)
    assert "pickle can run code and is not read; give a .safetensors file" in message


def test_swapped_files(refused, random_tiny_files):
    files = random_tiny_files
    swapped = ["--dit", str(files.autoencoder), "--vae", str(files.dit), "--text_encoder", str(files.text_encoder)]
    assert "is a FLUX.2 autoencoder, not a FLUX.2 DiT; give a FLUX.2 DiT" in refused(weights=swapped)
    swapped = with_weights(files, "--vae", files.dit)
    assert "is a FLUX.2 DiT, not a FLUX.2 autoencoder; give" in refused(weights=swapped, loads=True)


def test_wrong_variant(refused):
    message = refused("--model_version", "klein-4b")
    assert "is a FLUX.2 DiT of the shape of tiny, not of klein-4b; choose auto or a variant that fits" in message
    message = refused("--model_version", "klein")
    assert message == f"--model_version is 'klein'; allowed are auto, {', '.join(VARIANTS)}"


def test_weights_that_nothing_names(refused, tmp_path):
    assert "no --dit was given; give it or a --model_version" in refused("--vae", "x", weights=[])
    assert "name the variant to look for with --model_version" in refused("--models_dir", str(tmp_path), weights=[])
    message = refused("--model_version", "klein-4b", "--models_dir", str(tmp_path), weights=[])
    assert "found no weights of klein-4b's DiT" in message and "run `flux2 download klein-4b`" in message


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (("100", "64"), "the height is 100 px; it must be a multiple of 16 and at least 64. The nearest is 96."),
        (("64", "100"), "the width is 100 px; it must be a multiple of 16 and at least 64. The nearest is 96."),
        (("48", "64"), "the height is 48 px; it must be a multiple of 16 and at least 64. The nearest is 64."),
        (("0", "64"), "the height is 0 px; it must be a multiple of 16 and at least 64. The nearest is 64."),
        (("64", "-64"), "the width is -64 px; it must be a multiple of 16 and at least 64. The nearest is 64."),
    ],
)
def test_sizes(refused, size, message):
    assert refused("--image_size", *size) == message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--guidance_scale", "nan", "cfg_scale is nan; it must be a finite number, 0 or more"),
        ("--guidance_scale", "-1", "cfg_scale is -1.0; it must be a finite number, 0 or more"),
        ("--guidance_scale", "inf", "cfg_scale is inf; it must be a finite number, 0 or more"),
        ("--embedded_cfg_scale", "nan", "guidance is nan; it must be a finite number, 0 or more"),
        (
            "--embedded_cfg_scale",
            "4",
            "guidance is 4.0, but tiny has no guidance embedder; use cfg_scale, or leave it out",
        ),
        ("--infer_steps", "-4", "the number of steps is -4; it must lie in 1..1000"),
        ("--infer_steps", "0", "the number of steps is 0; it must lie in 1..1000"),
        ("--flow_shift", "0", "flow_shift is 0.0; it must be a finite number above 0"),
        ("--seed", "-1", "the seed is -1; it must lie in 0..18446744073709551615"),
        ("--seed", str(2**64), "the seed is 18446744073709551616; it must lie in 0..18446744073709551615"),
        ("--num_images", "0", "the number of images is 0; it must be at least 1"),
    ],
)
def test_numbers(refused, option, value, message):
    assert refused(option, value) == message


def test_values_of_another_kind_are_usage_errors(refused):
    assert "argument --infer_steps: invalid int value: 'many'; see" in refused("--infer_steps", "many", code=2)
    assert "argument --image_size: expected 2 arguments; see" in refused("--image_size", "64", code=2)
    assert "argument --output_type: invalid choice: 'video'" in refused("--output_type", "video", code=2)


def test_settings_without_effect_are_refused(refused):
    message = refused("--negative_prompt", "x", "--guidance_scale", "1")
    assert message == (
        "a negative prompt was given, but tiny runs with guidance_scale 1, which uses none; "
        "set --guidance_scale (--g) above 1, or leave it out"
    )
    assert "--no_resize_control was given without a reference; add" in refused("--no_resize_control")
    message = refused("--latent_path", "x.safetensors", "--seed", "3")
    assert message == "--seed has no effect on saved latents, which are only decoded; leave it out"
    assert "--vram_budget has no effect" in refused("--latent_path", "x.safetensors", "--vram_budget", "8")


def test_references(refused, tmp_path):
    path = tmp_path / "reference.png"
    Image.new("RGB", (64, 64)).save(path)
    message = refused("--control_image_path", *[str(path)] * 11)
    assert message == "11 references were given; at most 10 are allowed, give fewer"
    Image.new("RGB", (10, 3000)).save(path)
    message = refused("--control_image_path", str(path))
    assert message == f"{path}: a reference is 10x3000 px; each side must be at least 64 px"
    Image.new("RGB", (64, 1000)).save(path)
    message = refused("--control_image_path", str(path))
    assert message == f"{path}: a reference is 64x1000 px, a ratio of 15.6; at most 8 is allowed. Crop it."


def test_a_corrupt_png(refused, tmp_path):
    path = tmp_path / "reference.png"
    Image.effect_noise((128, 128), 50).save(path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:60] + bytes(64) + whole[124:], b"no picture at all", b""):
        path.write_bytes(data)
        message = refused("--control_image_path", str(path))
        assert message.startswith(f"{path} cannot be read as a picture (")
        assert message.endswith("); give a whole PNG, JPEG or WebP file")


def test_an_empty_prompt_is_allowed(random_tiny_files, tmp_path):
    argv = ["generate", *random_tiny_files.options, "--save_path", str(tmp_path), "--infer_steps", "1", "--prompt", ""]
    assert main(argv) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_save_path_is_refused_before_loading(refused, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    for path in (in_the_way, in_the_way / "below", Path("/proc/nowhere")):
        if path.is_relative_to("/proc") and sys.platform != "linux":
            continue
        message = refused("--save_path", str(path))
        assert message.startswith(f"--save_path {path} cannot be written into (")
        assert message.endswith("); give a folder of yours")


def test_prompt_files(refused, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"caf\xe9\n")
    assert re.search(r"prompts\.txt is no UTF-8 text \(.*\); save it as UTF-8", refused("--from_file", str(path)))
    path.write_text("# nothing\n\n")
    assert refused("--from_file", str(path)) == f"{path} holds no prompts; write one a line"
    path.write_text("x --w 64")
    message = refused("--from_file", str(path), "--reference_cache", "approximate")
    assert "--reference_cache was given without a reference; add --control_image_path (in a line --ci)" in message
    path.write_text("fine --s 0\n")
    assert refused("--from_file", str(path)) == f"{path}:1: the number of steps is 0; it must lie in 1..1000"


def test_latent_files(refused, tmp_path, random_tiny_files):
    path = tmp_path / "x_latent.safetensors"
    save_file({"latent": torch.zeros(1, 16, 4, 4)}, path)
    message = refused("--latent_path", str(path))
    assert "holds a latent of shape [1, 16, 4, 4]; saved latents are [B, 128, H/16, W/16]. Make them with" in message
    assert "holds no tensor 'latent'; saved latents are" in refused("--latent_path", str(random_tiny_files.dit))
    save_file({"latent": torch.full((1, 128, 4, 4), torch.nan)}, path)
    assert "holds values that are not finite; make the latents again" in refused("--latent_path", str(path))
    save_file({"latent": torch.zeros(1, 128, 4, 4)}, path)
    message = refused("--latent_path", str(path), weights=[])
    assert message.endswith("does not tell which model it is of; give --vae or --model_version")


def test_devices(refused):
    for name in ("gpu", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        message = refused("--device", name)
        assert message.startswith(f"--device is '{name}', which ") and message.endswith("; give cpu, cuda or cuda:N")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory (no more to be had); take a smaller --image_size, or --vae_tiling"),
        (
            torch.OutOfMemoryError("CUDA: 2 GiB"),
            "out of memory (CUDA: 2 GiB); take a smaller --image_size, or --vae_tiling",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (OSError(28, "No space left on device", "a.png"), "a.png: No space left on device; check the path, its "),
        (
            RuntimeError("odd\nthing"),
            "internal error, RuntimeError: odd thing; run again with --debug for the traceback",
        ),
    ],
)
def test_failures_on_the_way(refused, monkeypatch, error, message):
    def fail(*_args) -> None:
        raise error

    monkeypatch.setattr(generate_command, "show_step", fail)
    assert refused("--infer_steps", "1", loads=True).startswith(message)


def test_a_write_that_fails_leaves_nothing(refused, monkeypatch):
    def half(_image, path, **_options) -> None:
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    assert re.match(r"\S+\.png: No space left on device; check", refused("--infer_steps", "1", loads=True))


def test_ctrl_c(refused, monkeypatch):
    def interrupt(*_args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "show_step", interrupt)
    assert refused("--infer_steps", "2", loads=True, code=130) == "interrupted; what was written before is whole"


def test_debug_shows_the_traceback(tmp_path, capsys):
    argv = ["generate", "--prompt", "x", "--seed", "-1", "--dit", str(tmp_path / "no"), "--debug"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "flux2: error: " in error and "Traceback (most recent call last)" in error


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_polite_kill(refused, monkeypatch):
    monkeypatch.setattr(generate_command, "show_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert refused("--infer_steps", "2", loads=True, code=143) == "terminated; what was written before is whole"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_in_a_process_that_samples(random_tiny_files, tmp_path):
    options = [*random_tiny_files.options, "--save_path", str(tmp_path), "--infer_steps", "1000", "--num_images", "8"]
    command = [sys.executable, "-m", "flux2_kit.flux2_core.cli", "generate", "--prompt", "x", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        first = process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, output = process.stderr.read(), process.stdout.read()
    assert first.startswith("tiny, 64x64 px, 1000 steps")
    assert process.returncode == 130
    assert rest == "flux2: error: interrupted; what was written before is whole\n"
    assert output == "" and list(tmp_path.iterdir()) == []
