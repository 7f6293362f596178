"""LoRAs at the command line: strengths in every mode, merged files, conversion, extraction, and bad input."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import generate_command
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.lora import extract_lora
from flux2_kit.flux2_core.lora_files import linear_shapes, read_lora
from flux2_kit.flux2_core.lora_tools import SIZES
from flux2_kit.flux2_core.picture_metadata import parse_record
from flux2_kit.flux2_core.variants import DIT_4B, DIT_TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = linear_shapes(DIT_TINY)


def write_random_lora(path: Path, seed: int, config=DIT_TINY, layers: str = "") -> Path:
    """A LoRA of rank 2, strong enough to change a picture, on all layers or on those that begin so."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in linear_shapes(config).items():
        if name.startswith(layers):
            stem = f"diffusion_model.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, in_features, generator=generator) / in_features**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out_features, 2, generator=generator) * 0.3
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("loras")
    return [str(write_random_lora(folder / f"{name}.safetensors", seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def latents(random_tiny_files, tmp_path):
    """Runs ``flux2 generate`` with one step and answers the latents, by seed."""
    count = iter(range(100))

    def run(*options: str, weights: list[str] | None = None) -> dict[str, torch.Tensor]:
        folder = tmp_path / f"out{next(count)}"
        what = [] if {"--from_file", "--interactive"} & set(options) else ["--prompt", "x", "--seed", "3"]
        fixed = ["--infer_steps", "1", "--guidance_scale", "1", "--output_type", "latent", "--save_path", str(folder)]
        assert main(["generate", *(weights or random_tiny_files.options), *fixed, *what, *options]) == 0
        return {re.split(r"[_.]", file.name)[1]: load_file(file)["latent"] for file in folder.iterdir()}

    return run


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_every_mode_has_the_same_strength(latents, loras, tmp_path, monkeypatch, capsys):
    options = ["--lora_weight", loras[0], "--lora_multiplier", "0.5"]
    single = latents(*options)["3"]
    said = capsys.readouterr().err
    assert "one.safetensors at 0.5: ComfyUI (BFL names): LoRA rank 2 alpha 2 on" in said
    assert relative(single, latents()["3"]) > 1e-3
    lines = "first --d 2\nx --d 3\nx --d 4\n"
    (tmp_path / "prompts.txt").write_text(lines)
    batch = latents(*options, "--from_file", str(tmp_path / "prompts.txt"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    typed = latents(*options, "--interactive")
    assert torch.equal(batch["3"], single) and torch.equal(typed["3"], single)
    assert torch.equal(batch["4"], typed["4"]) and len(batch) == len(typed) == 3


def test_strength_zero_and_order(latents, loras):
    without = latents()["3"]
    assert torch.equal(latents("--lora_weight", loras[0], "--lora_multiplier", "0")["3"], without)
    both = latents("--lora_weight", *loras, "--lora_multiplier", "1", "-0.5")["3"]
    turned = latents("--lora_weight", *loras[::-1], "--lora_multiplier", "-0.5", "1")["3"]
    assert relative(both, turned) < 1e-6 < relative(both, without)
    ones = latents("--lora_weight", *loras)["3"]
    assert torch.equal(ones, latents("--lora_weight", *loras, "--lora_multiplier", "1")["3"])


def test_patterns_choose_layers(latents, tmp_path, loras):
    part = write_random_lora(tmp_path / "part.safetensors", 0, layers="single_blocks.0")
    tensors = {name: t for name, t in load_file(loras[0]).items() if ".single_blocks.0." in name}
    save_file(tensors, part)
    chosen = latents("--lora_weight", loras[0], "--include_patterns", r"^single_blocks\.0\.", "nothing")["3"]
    assert torch.equal(chosen, latents("--lora_weight", str(part))["3"])
    excluded = latents("--lora_weight", loras[0], "--exclude_patterns", r"^(?!single_blocks\.0\.)")["3"]
    assert torch.equal(chosen, excluded)


def test_live_and_merged_agree(latents, loras, random_tiny_files, tmp_path, capsys):
    options = ["--lora_weight", *loras, "--lora_multiplier", "0.7", "-0.4", "--exclude_patterns", "img_in"]
    live = latents(*options)["3"]
    capsys.readouterr()
    by_command, by_option = tmp_path / "new folder" / "a.safetensors", tmp_path / "b.safetensors"
    assert main(["merge-lora", "--dit", str(random_tiny_files.dit), *options, "--output", str(by_command)]) == 0
    assert capsys.readouterr().out == f"{by_command}\n"
    (tmp_path / "prompts.txt").write_text("x --d 3\n")
    for mode in ([], ["--prompt", "x"], ["--from_file", str(tmp_path / "prompts.txt")], ["--interactive"]):
        by_option.unlink(missing_ok=True)
        argv = ["generate", "--dit", str(random_tiny_files.dit), *options, "--save_merged_model", str(by_option)]
        assert main([*argv, *mode, "--save_path", str(tmp_path / "none")]) == 0
        assert by_option.exists() and not (tmp_path / "none").exists()
    assert load_file(by_command).keys() == load_file(random_tiny_files.dit).keys()
    assert all(torch.equal(t, load_file(by_option)[name]) for name, t in load_file(by_command).items())
    with safe_open(by_command, framework="pt") as file:
        assert file.metadata()["flux2_kit.merged_loras"] == "one.safetensors 0.7, two.safetensors -0.4"
    weights = ["--dit", str(by_command), *random_tiny_files.options[2:]]
    assert relative(latents(weights=weights)["3"], live) < 1e-5


def test_the_picture_tells_its_loras(random_tiny_files, loras, tmp_path):
    options = ["--prompt", "x", "--infer_steps", "1", "--save_path", str(tmp_path / "out")]
    options += ["--lora_weight", *loras, "--lora_multiplier", "1", "0.25", "--include_patterns", "blocks"]
    assert main(["generate", *random_tiny_files.options, *options]) == 0
    (file,) = (tmp_path / "out").iterdir()
    with Image.open(file) as image:
        record, text = parse_record(image.info), image.info["parameters"]
    assert record is not None
    assert record.loras == (("one.safetensors", 1.0), ("two.safetensors", 0.25))
    assert (record.lora_include, record.lora_exclude) == (("blocks",), ())
    assert "LoRAs: one.safetensors 1 + two.safetensors 0.25" in text


def test_conversion_tells_the_size_and_comes_back(loras, tmp_path, capsys):
    previous = loras[0]
    for dialect in ("kohya", "diffusers", "comfy"):
        path = tmp_path / f"{dialect}.safetensors"
        assert main(["convert-lora", previous, str(path), "--to", dialect]) == 0
        previous = str(path)
    output = capsys.readouterr()
    assert output.out.split() == [str(tmp_path / f"{name}.safetensors") for name in ("kohya", "diffusers", "comfy")]
    assert output.err.startswith("one.safetensors (tiny): ComfyUI (BFL names): LoRA rank 2")
    assert "kohya.safetensors: diffusers leaves out double_stream_modulation_img.lin" in output.err
    assert "comfy.safetensors: diffusers swaps the halves of final_layer.adaLN_modulation.1" in output.err
    before, after = read_lora(loras[0], DIT_TINY), read_lora(previous, DIT_TINY)
    assert before.layers.keys() == after.layers.keys()
    for name, (factors,) in before.layers.items():
        assert torch.equal(factors.delta(), after.layers[name][0].delta()), name
    assert main(["convert-lora", loras[0], str(tmp_path / "half.safetensors"), "--to", "comfy", "--dtype", "bf16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.bfloat16}


def test_extraction_finds_the_lora_again(loras, random_tiny_files, tmp_path, capsys):
    tuned, found = tmp_path / "tuned.safetensors", tmp_path / "found.safetensors"
    dit = str(random_tiny_files.dit)
    options = ["--lora_weight", loras[0], "--include_patterns", "single_blocks"]
    assert main(["merge-lora", "--dit", dit, *options, "--output", str(tuned)]) == 0
    argv = ["extract-lora", "--base", dit, "--tuned", str(tuned), "--rank", "2", "--device", "cpu"]
    assert main([*argv, "--output", str(found)]) == 0
    before, after = read_lora(loras[0], DIT_TINY), read_lora(found, DIT_TINY)
    assert set(after.layers) == {name for name in before.layers if name.startswith("single_blocks")}
    for name, (factors,) in after.layers.items():
        assert relative(factors.delta(), before.layers[name][0].delta()) < 1e-4
    assert extract_lora(dit, tuned, 2).report.summary() in capsys.readouterr().err


def test_inspect_tells_what_a_lora_is(tmp_path, capsys):
    big = write_random_lora(tmp_path / "big.safetensors", 0, DIT_4B, "double_blocks.0")
    assert main(["inspect", str(big)]) == 0
    block = re.sub(r" {2,}", "  ", capsys.readouterr().out)
    for row in (
        "what  a FLUX.2 LoRA",
        "dialect  ComfyUI (BFL names)",
        "kinds  LoRA",
        "fits  4B: klein-4b, klein-base-4b",
        "rank  2\n",
        "alpha  2\n",
        "layers  8\n",
    ):
        assert row in block, row
    tensors = load_file(big) | {"lora_te_text_model_0.lora_down.weight": torch.ones(2, 2)}
    save_file(tensors, big)
    assert main(["inspect", "--json", str(big)]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["rank"], facts["num_layers"]) == ("lora", 2, 8)
    assert facts["unmatched"] == ["lora_te_text_model_0.lora_down.weight"]
    assert list(SIZES.values()) == ["4B", "9B", "32B", "tiny"]


@pytest.fixture
def bad_files(tmp_path, loras, random_tiny_files) -> dict[str, str]:
    """Files that are no LoRA for this model, by what is wrong with them."""
    whole = Path(loras[0]).read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").touch()
    write_random_lora(tmp_path / "of_4b.safetensors", 0, DIT_4B, "single_blocks.0")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 8)}, tmp_path / "sd.safetensors")
    name = "diffusion_model.img_in.lora_"
    save_file({f"{name}A.weight": torch.full((2, 128), torch.nan)}, tmp_path / "half.safetensors")
    tensors = load_file(loras[0])
    tensors[f"{name}B.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    paths = {path.stem: str(path) for path in tmp_path.glob("*.safetensors")}
    return {**paths, "missing": str(tmp_path / "no.safetensors"), "checkpoint": str(random_tiny_files.dit)}


@pytest.fixture
def refused(random_tiny_files, tmp_path, capsys, monkeypatch):
    """Runs a command, which must write one line and no file, and answers the line."""

    def run(*argv: str, code: int = 1) -> str:
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(generate_command, "load_pipeline", pytest.fail)
        where = [*random_tiny_files.options, "--prompt", "x", "--save_path", str(tmp_path / "out")]
        assert main([*argv, *(where if argv[0] == "generate" else [])]) == code
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("flux2: error: ")
        assert set(tmp_path.rglob("*")) - {tmp_path / "out"} == before
        return output.err

    return run


BAD_FILES = {
    "missing": "does not exist",
    "truncated": r"truncated\.safetensors",
    "empty": r"empty\.safetensors",
    "of_4b": "another size, klein-4b",
    "sd": "nothing in .* matches a layer of FLUX.2",
    "half": "incomplete|not finite",
    "nan": "not finite",
    "checkpoint": "is a FLUX.2 DiT, not a LoRA",
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files(refused, bad_files, what, tmp_path, random_tiny_files, loras):
    bad, out = bad_files[what], str(tmp_path / "result.safetensors")
    assert re.search(BAD_FILES[what], refused("generate", "--lora_weight", loras[0], bad))
    dit = str(random_tiny_files.dit)
    assert re.search(BAD_FILES[what], refused("merge-lora", "--dit", dit, "--lora_weight", bad, "--output", out))
    if what != "of_4b":
        assert re.search(BAD_FILES[what], refused("convert-lora", bad, out, "--to", "comfy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lora_weight", "A", "B", "--lora_multiplier", "1", "1", "1"],
            "has 3 values for 2 LoRAs; give one for each",
        ),
        (["--lora_weight", "A", "--lora_multiplier", "1", "1"], "has 2 values for 1 LoRAs"),
        (["--lora_weight", "A", "--lora_multiplier", "nan"], "--lora_multiplier is nan; it must be a finite number"),
        (["--lora_weight", "A", "--include_patterns", "(x"], r"--include_patterns '\(x' is no regular expression"),
        (["--lora_weight", "A", "--exclude_patterns", "."], "leave no layer of one"),
        (["--lora_multiplier", "1"], "--lora_multiplier was given without a LoRA; add --lora_weight"),
        (["--include_patterns", "x"], "--include_patterns was given without a LoRA"),
        (["--save_merged_model", "m.safetensors"], "nothing to merge; give --lora_weight"),
        (["--lora_weight", "A", "--save_merged_model", "A"], "one of the files that are read"),
        (["--lora_weight", "A", "--save_merged_model", "D"], "one of the files that are read"),
        (["--lora_weight", "A", "--save_merged_model", "m.ckpt"], "must end in .safetensors"),
    ],
)
def test_bad_options(refused, loras, random_tiny_files, options, message):
    names = {"A": loras[0], "B": loras[1], "D": str(random_tiny_files.dit)}
    assert re.search(message, refused("generate", *(names.get(option, option) for option in options)))


def test_inputs_are_never_overwritten(refused, loras, random_tiny_files, tmp_path):
    content = Path(loras[0]).read_bytes()
    assert "one of the files that are read" in refused("convert-lora", loras[0], loras[0], "--to", "kohya")
    link = tmp_path / "link.safetensors"
    link.symlink_to(loras[0])
    assert "one of the files that are read" in refused("convert-lora", loras[0], str(link), "--to", "kohya")
    dit = str(random_tiny_files.dit)
    argv = ["extract-lora", "--base", dit, "--tuned", dit, "--rank", "2", "--output"]
    assert "one of the files that are read" in refused(*argv, dit)
    assert "do not differ in any layer" in refused(*argv, str(tmp_path / "x.safetensors"))
    assert "must be 1 or more" in refused(*argv, str(tmp_path / "x.safetensors"), "--rank", "0")
    assert Path(loras[0]).read_bytes() == content


def test_latents_are_decoded_without_loras(loras, capsys):
    assert main(["generate", "--latent_path", "x.safetensors", "--lora_weight", loras[0]]) == 1
    assert "--lora_weight has no effect on saved latents" in capsys.readouterr().err
