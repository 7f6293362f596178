"""The command line on a random model of the tiny shape: files, names, metadata, prompt lines, exit codes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flux2_kit.flux2_core import generate_command, pipeline
from flux2_kit.flux2_core.cli import build_parser, main
from flux2_kit.flux2_core.file_stems import free_stem
from flux2_kit.flux2_core.generate_command import MAX_KEPT_EMBEDDINGS, Session
from flux2_kit.flux2_core.picture_metadata import GenerationRecord, kit_version, parse_record
from flux2_kit.flux2_core.pipeline import SamplingConfig
from flux2_kit.flux2_core.prompt_lines import PromptLine, parse_prompt_line, prompt_lines
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import PlannedFile, plan_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def generate(random_tiny_files, tmp_path):
    """Runs ``flux2 generate`` with two steps; answers the exit code and the files of its output folder by name."""

    def run(*options: str, folder: str = "out") -> tuple[int, list[Path]]:
        where = ["--save_path", str(tmp_path / folder)]
        steps = [] if {"--infer_steps", "--latent_path"} & set(options) else ["--infer_steps", "2"]
        code = main(["generate", *random_tiny_files.options, *where, *steps, *options])
        return code, sorted((tmp_path / folder).glob("*"))

    return run


def test_a_picture_with_its_parameters(generate, capsys):
    code, files = generate("--prompt", "a red circle – größer", "--negative_prompt", "blue", "--seed", "7")
    assert code == 0
    assert [re.sub(r"^\d{8}-\d{6}", "T", file.name) for file in files] == ["T_7.png"]
    output = capsys.readouterr()
    assert output.out.split() == [str(files[0])]
    assert "tiny, 64x64 px, 2 steps, guidance_scale 4, seed 7" in output.err
    with Image.open(files[0]) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
        record, text = parse_record(image.info), image.info["parameters"]
    assert record is not None
    assert (record.prompt, record.negative_prompt, record.seed) == ("a red circle – größer", "blue", 7)
    assert (record.num_steps, record.cfg_scale, record.variant, record.dit) == (2, 4.0, "tiny", "dit.safetensors")
    assert record.version == kit_version()
    assert text.splitlines()[0] == "a red circle – größer"
    assert "Negative prompt: blue\nSteps: 2, Sampler: Euler, CFG scale: 4.0, Seed: 7, Size: 64x64" in text


def test_no_metadata(generate):
    code, files = generate("--prompt", "a secret", "--no_metadata", "--output_type", "latent_images")
    assert code == 0
    assert [file.suffix for file in files] == [".png", ".safetensors"]
    assert all(b"secret" not in file.read_bytes() for file in files)


def test_random_seed_is_told_everywhere(generate, capsys):
    _, first = generate("--prompt", "x", folder="a")
    _, second = generate("--prompt", "x", folder="b")
    told = re.findall(r"seed (\d+)", capsys.readouterr().err)
    assert [file.stem.split("_")[1] for file in (*first, *second)] == told
    assert told[0] != told[1]


def test_size_is_height_then_width(generate):
    _, files = generate("--prompt", "x", "--image_size", "64", "96")
    with Image.open(files[0]) as image:
        assert image.size == (96, 64)


def test_latents_of_several_images_decode_to_the_same_pictures(generate):
    code, files = generate("--prompt", "x", "--num_images", "2", "--output_type", "latent_images")
    assert code == 0
    *pictures, latent_file = files
    assert [file.stem[-2:] for file in pictures] == ["_0", "_1"]
    assert load_file(latent_file)["latent"].shape == (2, 128, 4, 4)
    with safe_open(latent_file, framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["prompt"], metadata["infer_steps"], metadata["height"]) == ("x", "2", "64")
    assert metadata["seeds"] in latent_file.name
    code, decoded = generate("--latent_path", str(latent_file), folder="decoded")
    assert code == 0
    assert [file.read_bytes() for file in decoded] == [file.read_bytes() for file in pictures]


def test_decoding_loads_no_other_network(generate, monkeypatch):
    _, files = generate("--prompt", "x", "--output_type", "latent")
    assert [file.suffix for file in files] == [".safetensors"]
    monkeypatch.setattr(generate_command, "load_pipeline", pytest.fail)
    code, decoded = generate("--latent_path", str(files[0]), folder="decoded")
    assert (code, len(decoded)) == (0, 1)


def test_decoding_takes_the_type_that_is_asked_for(generate):
    _, files = generate("--prompt", "x", "--output_type", "latent_images", "--vae_dtype", "bf16")
    picture, latents = sorted(files, key=lambda file: file.suffix)
    _, same = generate("--latent_path", str(latents), "--vae_dtype", "bfloat16", folder="same")
    _, other = generate("--latent_path", str(latents), "--vae_dtype", "fp32", folder="other")
    assert same[0].read_bytes() == picture.read_bytes() != other[0].read_bytes()


def test_latents_without_batch_axis_as_musubi_writes_them(generate, tmp_path):
    save_file({"latent": torch.zeros(128, 4, 5, dtype=torch.bfloat16)}, tmp_path / "theirs_latent.safetensors")
    code, files = generate("--latent_path", str(tmp_path / "theirs_latent.safetensors"))
    assert code == 0
    assert files[0].name.endswith("_theirs.png")
    with Image.open(files[0]) as image:
        assert image.size == (80, 64)


def test_references(generate, tmp_path, monkeypatch):
    shapes = []
    sample = pipeline.sample_latents
    monkeypatch.setattr(
        pipeline,
        "sample_latents",
        lambda *args, references, **options: (
            shapes.append([tuple(latents.shape) for latents in references])
            or sample(*args, references=references, **options)
        ),
    )
    paths = [tmp_path / "wide.png", tmp_path / "small.png"]
    Image.new("RGB", (256, 128), "red").save(paths[0])
    Image.new("RGBA", (64, 64), "blue").save(paths[1])
    code, files = generate("--prompt", "x", "--control_image_path", *map(str, paths))
    assert code == 0
    with Image.open(files[0]) as image:
        record = parse_record(image.info)
    assert record is not None and tuple(record.references) == ("wide.png", "small.png")
    generate("--prompt", "x", "--control_image_path", str(paths[0]), "--no_resize_control")
    # The tiny model takes references of 64x64 px: 256x128 becomes 90x45 and is cropped to 80x32.
    assert shapes == [[(1, 128, 2, 5), (1, 128, 4, 4)], [(1, 128, 8, 16)]]


def test_image_to_image(generate, tmp_path, capsys):
    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    start = ["--prompt", "x", "--seed", "1", "--image_path", str(path), "--strength"]
    made = {}
    for strength in (0.02, 0.5, 1.0):
        code, (made[strength],) = generate(*start, str(strength), "--image_size", "64", "96", folder=str(strength))
        assert code == 0
        with Image.open(made[strength]) as image:
            record = parse_record(image.info)
        assert record is not None and (record.initial_image, record.strength) == ("start.png", strength)
        assert f"Denoising strength: {strength}" in record.to_text()
    generated = generate("--prompt", "x", "--seed", "1", "--image_size", "64", "96", folder="anew")[1][0]
    assert pixels(made[0.02]) != pixels(made[0.5]) != pixels(made[1.0]) == pixels(generated)
    assert "strength 0.5" in capsys.readouterr().err

    # Without a size it is that of the picture, as far as the model's area goes: 64x64 px of the tiny one.
    code, (file, *_) = generate(*start, "0.5", folder="open")
    with Image.open(file) as image:
        assert code == 0 and image.size == (64, 64)
    for wrong in (["--image_path", str(path)], ["--strength", "0.5"], [*start[4:], "0"], [*start[4:], "1.5"]):
        assert generate("--prompt", "x", *wrong, folder="wrong")[0] != 0
        assert re.search(r"belong together|must lie in 0\.01\.\.1", capsys.readouterr().err)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_batch_is_bit_exactly_the_single_pictures(generate, tmp_path, monkeypatch):
    encoded = []
    encode = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda encoder, prompt: encoded.append(prompt) or encode(encoder, prompt)
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# comment\n\na red circle --d 5 --s 3\na red circle --d 6 --w 96 --g 2 --fs 3 --n blue\n", "utf-8"
    )
    code, batch = generate("--from_file", str(prompts), folder="batch")
    assert code == 0
    assert sorted(encoded) == ["", "a red circle", "blue"]
    generate("--prompt", "a red circle", "--seed", "5", "--infer_steps", "3", folder="single")
    options = ["--image_size", "64", "96", "--guidance_scale", "2", "--flow_shift", "3", "--negative_prompt", "blue"]
    code, single = generate("--prompt", "a red circle", "--seed", "6", *options, folder="single")
    assert code == 0
    by_seed = [sorted(files, key=lambda file: file.stem.split("_")[1]) for files in (batch, single)]
    assert len(batch) == 2
    assert [file.read_bytes() for file in by_seed[0]] == [file.read_bytes() for file in by_seed[1]]


def test_a_bad_line_does_not_stop_the_others(generate, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one --d 1\ntwo --w 100\nthree --zz 1\nfour --ci nowhere.png\nfive --d 5\n")
    code, files = generate("--from_file", str(prompts))
    assert code == 1
    assert sorted(file.stem.split("_")[1] for file in files) == ["1", "5"]
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert [re.search(r"prompts\.txt:(\d)", line)[1] for line in errors] == ["2", "3", "4"]


def test_interactive(generate, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("a circle --d 1\n# note\nwrong --s none\na star --d 2\nquit\nnever --d 3\n")
    )
    code, files = generate("--interactive")
    assert code == 1
    assert [file.stem.split("_")[1] for file in files] == ["1", "2"]
    assert "--s is 'none'; it must be a whole number" in capsys.readouterr().err


def test_ctrl_c_in_an_interactive_session_stops_the_picture_only(generate, monkeypatch, capsys):
    def interrupt_once(*args) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("one --d 1\ntwo --d 2\n"))
    lines = sys.stdin
    monkeypatch.setattr(generate_command, "show_step", interrupt_once)
    monkeypatch.setattr(generate_command, "_typed_lines", lambda: iter(lines.read().splitlines()))
    code, files = generate("--interactive")
    assert code == 1
    assert [file.stem.split("_")[1] for file in files] == ["2"]
    assert "this picture was stopped" in capsys.readouterr().err


def test_names_never_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    names = []
    for number in range(3):
        names.append(free_stem(tmp_path, "7"))
        (tmp_path / (f"{names[-1]}.png" if number else f"{names[-1]}_latent.safetensors")).touch()
    assert names == ["20300101-000000_7", "20300101-000000-2_7", "20300101-000000-3_7"]
    assert free_stem(tmp_path, "77") == "20300101-000000_77"


def test_a_long_prompt_warns_with_the_number_cut(generate, capsys):
    assert generate("--prompt", "a red circle " * 40)[0] == 0
    assert re.search(r"flux2: warning: the prompt is \d+ tokens longer than the 24", capsys.readouterr().err)


def test_kept_embeddings_are_bounded(monkeypatch):
    class Encoder:
        def encode_prompt(self, prompt: str) -> str:
            return prompt

    session = Session(pipeline=Encoder(), files=None, folder=Path(), args=None)  # type: ignore[arg-type]
    for number in range(MAX_KEPT_EMBEDDINGS + 5):
        session.embedding(f"{number}")
        session.embedding("0")
    assert len(session.embeddings) == MAX_KEPT_EMBEDDINGS
    assert "0" in session.embeddings


def test_prompt_lines():
    line = parse_prompt_line(
        "a cat -- it's-a--me --w 96 --h 64 --d 3 --s 4 --l 2.5 --fs 3 --n bad, ugly --ci a b.png --ci c.png"
    )
    assert line == PromptLine(
        prompt="a cat -- it's-a--me",
        negative_prompt="bad, ugly",
        width=96,
        height=64,
        seed=3,
        num_steps=4,
        cfg_scale=2.5,
        flow_shift=3.0,
        references=("a b.png", "c.png"),
    )
    assert parse_prompt_line("a fox - or two -- in snow") == PromptLine(prompt="a fox - or two -- in snow")
    assert parse_prompt_line("--d 3") == PromptLine(prompt="", seed=3)
    assert parse_prompt_line("x --n") == PromptLine(prompt="x", negative_prompt="")
    assert list(prompt_lines(["# no", "", " one ", "two"])) == [(3, "one"), (4, "two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x --w wide", "--w is 'wide'; it must be a whole number"),
        ("x --w", "--w is ''; it must be a whole number"),
        ("x --g 1,5", "--g is '1,5'; it must be a number"),
        ("x --q 3", "unknown option --q; allowed are --w, --h, --d, --s, --g, --l, --fs, --n, --ci"),
        ("x --g 1 --l 2", "--l sets the cfg_scale a second time; write it once"),
        ("x --ci", "--ci has no value; write the path of a picture behind it"),
    ],
)
def test_bad_prompt_lines(line, message):
    with pytest.raises(ValueError) as caught:
        parse_prompt_line(line)
    assert str(caught.value) == message


def test_inspect(random_tiny_files, generate, capsys):
    _, files = generate("--prompt", "a star", "--seed", "3", "--output_type", "latent_images")
    capsys.readouterr()
    paths = [*map(str, files), str(random_tiny_files.dit), str(random_tiny_files.text_encoder)]
    assert main(["inspect", *paths]) == 0
    blocks = [re.sub(r" {2,}", "  ", block) for block in capsys.readouterr().out.split("\n\n")]
    assert len(blocks) == 4
    for block, wanted in zip(
        blocks,
        (
            ("what  a picture made by FLUX.2 Kit", "prompt  a star", "seed  3"),
            ("what  saved latents", "shape  [1, 128, 4, 4]", "picture  64x64 px", "prompt  a star"),
            ("what  a FLUX.2 DiT", "variant  tiny", "layout  bfl", "precision  fp32", "parameters  3.24 million"),
            ("what  a Qwen3 language model", "variant  tiny"),
        ),
        strict=True,
    ):
        assert all(text in block for text in wanted), block
    assert main(["inspect", "--json", *paths]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in facts[:3]] == paths[:3]
    assert facts[0]["parameters"]["seed"] == 3
    assert facts[2]["num_parameters"] == sum(tensor.numel() for tensor in load_file(paths[2]).values())


def test_inspect_lora_foreign_and_broken(tmp_path, capsys):
    lora = {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(8, 16)}
    lora["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"] = torch.zeros(48, 8)
    save_file(lora, tmp_path / "lora.safetensors", {"trained_on": "cats"})
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}, tmp_path / "flux1.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    names = ["lora.safetensors", "broken.safetensors", "flux1.safetensors", "plain.png"]
    assert main(["inspect", *(str(tmp_path / name) for name in names)]) == 1
    output = capsys.readouterr()
    assert re.search(r"rank +8\n +targets +1\n +trained_on +cats", output.out)
    assert "a FLUX.1 DiT" in output.out
    assert "what  a picture" in output.out
    assert "broken.safetensors" in output.err and output.err.count("\n") == 1


def test_a_record_survives_and_a_broken_one_is_none():
    names = {"dit": "d", "autoencoder": "a", "text_encoder": "t", "version": "1"}
    record = GenerationRecord(
        prompt="p",
        seed=2**64 - 1,
        width=64,
        height=64,
        num_steps=1,
        cfg_scale=1.0,
        variant="tiny",
        references=("r.png",),
        **names,
    )
    assert parse_record({"flux2_kit": record.to_json()}) == record
    for text in ("", "[]", "{}", "3", '{"prompt": 1}', "[" * 10_000, record.to_json().replace('"tiny"', "3")):
        assert parse_record({"flux2_kit": text}) is None
    assert parse_record({}) is None


def test_download_shows_the_plan_and_asks(monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(
        "flux2_kit.flux2_core.download_command.download", lambda v, **_: fetched.append(v.name) or [Path("f")]
    )
    assert main(["download", "klein-9b"]) == 1
    output = capsys.readouterr()
    assert "flux-2-klein-9b.safetensors" in output.out
    assert "FLUX Non-Commercial License" in output.out and "accept the licence at" in output.out
    assert f"{plan_download(VARIANTS['klein-9b']).size_bytes / 2**30:.2f} GiB" in output.out
    assert output.err == "flux2: error: there is no terminal to ask on; add --yes to start the download\n"
    terminal = io.StringIO("n\ny\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["download", "klein-9b"]) == 1
    assert fetched == []
    assert main(["download", "klein-9b"]) == 0
    assert main(["download", "klein-4b", "--yes"]) == 0
    assert fetched == ["klein-9b", "klein-4b"]
    assert main(["download", "tiny"]) == 0
    assert "nothing to download" in capsys.readouterr().out
    assert PlannedFile(repository="r", filename="f", size_bytes=None).size_bytes is None


def test_help_shows_the_defaults_of_the_dataclasses(capsys):
    assert main(["generate", "--help"]) == 0
    table = capsys.readouterr().out
    for variant in VARIANTS.values():
        guidance = "-" if variant.guidance is None else rf"{variant.guidance:g}"
        size = f"{variant.default_size}x{variant.default_size}"
        row = rf"{variant.name} +{size} +{variant.num_steps} +{variant.cfg_scale:g} +{guidance} +{variant.license}"
        assert re.search(row, table), row
    # What argparse holds no default for is left to the dataclasses.
    args = build_parser().parse_args(["generate", "--prompt", "x"])
    for name in (
        "infer_steps",
        "guidance_scale",
        "embedded_cfg_scale",
        "image_size",
        "flow_shift",
        "num_images",
        "seed",
    ):
        assert getattr(args, name) is None
    assert f"default: {SamplingConfig().num_images}" in table


def test_version_and_help_and_usage(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flux2 {kit_version()}\n"
    assert main(["--help"]) == 0
    assert "flux2 generate --prompt" in capsys.readouterr().out
    for argv in ([], ["generate"], ["generate", "--prompt", "x", "--attn_mode", "best"], ["paint"]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("flux2: error: ") and error.count("\n") == 1


def test_help_and_usage_errors_load_no_network_library():
    code = (
        "import sys; from flux2_kit.flux2_core.cli import main; main(['--help']); main(['generate', '--nothing']);"
        "print('loaded:', {'torch', 'transformers', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded: set()"
