"""FLUX.2 Cache Dataset and FLUX.2 Train LoRA in graphs: what they give, how they are stopped, what they refuse."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from flux2_kit.flux2_core.images import tensor_to_images
from flux2_kit.training.config import TrainConfig
from flux2_kit.training.metrics import read_metrics
from flux2_kit.training.tiny.pictures import draw_scenes, seen_scenes
from flux2_kit.training.train_progress import clock
from PIL import Image
from safetensors.torch import load_file
from test_lora_nodes import TINY, graph
from test_pack import inputs_of

LATER_WIDGETS = ("precision", "vram_budget", "network_weights")
PROMPT = "a large red circle at the top left on a blue background"


class InterruptProcessingException(BaseException):
    """Has the name and the base of ComfyUI's own."""


class FakeComfy:
    """What ComfyUI would show, and its stop button."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []
        self.bars: list[tuple[int, int]] = []
        self.previews: list[Image.Image] = []
        self.room: list[int] = []
        self.stop_when = lambda: False

    def throw(self) -> None:
        if self.stop_when():
            raise InterruptProcessingException

    def update(self, value: int, total: int, preview=None) -> None:
        self.bars.append((value, total))
        if preview is not None:
            self.previews.append(preview[1])

    def stop_at(self, step: int) -> None:
        """After a step of the training, and not after that many pictures of the caching."""
        self.stop_when = lambda: bool(self.bars) and self.bars[-1][0] == step and "loading" in self.shown()

    def shown(self) -> list[str]:
        return [text for text, _ in self.texts]

    def last_text(self, node_id: str) -> str:
        return [text for text, node in self.texts if node == node_id][-1]


@pytest.fixture
def comfy(monkeypatch) -> FakeComfy:
    fake = FakeComfy()
    management = SimpleNamespace(
        get_torch_device=lambda: torch.device("cpu"),
        free_memory=lambda num_bytes, device: fake.room.append(num_bytes),
        soft_empty_cache=lambda: None,
        throw_exception_if_processing_interrupted=fake.throw,
        processing_interrupted=lambda: fake.stop_when(),
    )
    bar = SimpleNamespace(ProgressBar=lambda total, node_id=None: SimpleNamespace(update_absolute=fake.update))
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: fake.texts.append((text, node_id)))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    monkeypatch.setitem(sys.modules, "comfy.utils", bar)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return fake


@pytest.fixture
def root(host, tmp_path, monkeypatch) -> Path:
    """ComfyUI's folders, with a dataset of six pictures, two a batch and two of them held out, in the input folder."""
    monkeypatch.setattr(host, "FALLBACK_INPUT_DIR", tmp_path / "input")
    monkeypatch.setattr(host, "FALLBACK_OUTPUT_DIR", tmp_path / "output")
    monkeypatch.setattr(host, "FALLBACK_TEMP_DIR", tmp_path / "temp")
    monkeypatch.setattr(host, "FALLBACK_MODELS_DIR", tmp_path / "models")
    write_dataset(tmp_path / "input" / "shapes")
    (tmp_path / "models" / "loras").mkdir(parents=True)
    return tmp_path


def write_dataset(folder: Path, num_pictures: int = 6) -> None:
    folder.mkdir(parents=True)
    scenes = seen_scenes()[:: len(seen_scenes()) // num_pictures][:num_pictures]
    for index, picture in enumerate(tensor_to_images(draw_scenes(scenes) * 2 - 1)):
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"{scenes[index].color} shape {index}\n")
    settings = "[general]\nresolution = 64\nbatch_size = 2\nvalidation_fraction = 0.3\n"
    (folder / "dataset.toml").write_text(f'{settings}[[datasets]]\nimage_directory = "."\n')


def cached(dataset: str = "shapes/dataset.toml", **inputs) -> dict:
    """The prompt with one FLUX.2 Cache Dataset."""
    given = {"dataset": dataset, "ae_name": TINY, "text_encoder_name": TINY, "variant": "auto", "resolution": 0}
    prompt = {"data": {"class_type": "Flux2KitCacheDataset", "inputs": given | inputs}}
    prompt["sheet"] = {"class_type": "PreviewImage", "inputs": {"images": ["data", 1]}}
    return prompt


def trained(nodes, **inputs) -> dict:
    """The prompt with FLUX.2 Cache Dataset and a short FLUX.2 Train LoRA."""
    schema = inputs_of(nodes["Flux2KitTrainLoRA"])
    widgets = {name: options["default"] for name, (_, options) in schema.items() if "default" in options}
    short = {"max_train_steps": 6, "learning_rate": 1e-3, "rank": 4, "output_name": "style"}
    short["more_settings"] = "validate_every_n_steps = 6\npreflight = false"
    given = {**widgets, "dit_name": TINY, "dataset": ["data", 0], **short, **inputs}
    return {**cached(), "train": {"class_type": "Flux2KitTrainLoRA", "inputs": given}}


def lora_file(root: Path, name: str = "style") -> Path:
    return root / "models" / "loras" / "flux2_kit" / f"{name}.safetensors"


def test_a_dataset_is_listed_drawn_and_cached(executor, root, comfy):
    linked, sheet, table = executor.run(cached())["data"]
    assert "6 pictures in 1 subset, 0 captions missing, 2 steps an epoch" in table and "tokens cut" in table
    # Two spaces: in Markdown, as which the page may draw it, lines end there.
    assert comfy.last_text("data") == table.replace("\n", "  \n") and executor.shown["data"]["text"] == [table]
    (entry,) = executor.shown["data"]["images"]
    with Image.open(root / "temp" / entry["filename"]) as shown:
        assert (shown.width, entry["type"], entry["subfolder"]) == (1600, "temp", "")
    assert any(text.startswith("captions encoded: 7 of 7, ") and "a second" in text for text, _ in comfy.texts)
    assert sheet.shape[0] == 1 and sheet.shape[2:] == (1600, 3) and sheet.max() <= 1 and sheet.std() > 0.05
    assert linked.variant.name == "tiny" and len(linked.dataset.items) == 6
    assert len(list((root / "input" / "shapes" / "flux2_cache").glob("*.safetensors"))) == 6 + 7


def test_only_a_changed_dataset_is_read_again(executor, root, comfy):
    executor.run(cached())
    executor.run(cached())
    assert executor.executed == ["sheet"]
    comfy.texts.clear()
    (root / "input" / "shapes" / "3.txt").write_text("an edited caption")
    executor.run(cached())
    assert "data" in executor.executed
    told = [text for text, _ in comfy.texts if "encoded" in text]
    assert told[-1] == "captions encoded: 1 of 1" and not any("pictures" in text for text in told)
    shutil.copy(root / "input" / "shapes" / "0.png", root / "input" / "shapes" / "9.png")
    executor.run(cached())
    assert "data" in executor.executed


def test_a_bare_folder_is_trained_at_the_size_on_the_node(executor, root):
    dataset = executor.run(cached("shapes"))["data"][0].dataset
    assert {item.bucket for item in dataset.items} == {(64, 64)}
    dataset = executor.run(cached("shapes", resolution=128))["data"][0].dataset
    assert {item.bucket for item in dataset.items} == {(128, 128)}
    assert dataset.config.subsets[0].batch_size == 1
    dataset = executor.run(cached("shapes", batch_size=3))["data"][0].dataset
    assert dataset.config.subsets[0].batch_size == 3
    for name, value in (("resolution", 128), ("batch_size", 3)):
        with pytest.raises(ValueError, match=rf"{name} is {value}, but dataset\.toml has settings of its own"):
            executor.run(cached(**{name: value}))
    with pytest.raises(ValueError, match="resolution is 32; it must be 0, or 64 to 8192"):
        executor.run(cached("shapes", resolution=32))


def test_stop_ends_the_caching_and_the_next_run_goes_on(executor, root, comfy):
    comfy.stop_when = lambda: [bar for bar in comfy.bars if bar == (4, 6)] == [(4, 6)] * 2  # read, then encoded
    with pytest.raises(InterruptProcessingException):
        executor.run(cached())
    assert "data" not in executor.cache
    assert comfy.last_text("data") == "stopped, pictures encoded: 4 of 6: queue again to go on"
    comfy.stop_when = lambda: False
    comfy.bars.clear()
    executor.run(cached())
    assert (2, 2) in comfy.bars  # the rest of the pictures


@pytest.mark.parametrize(
    "dataset",
    [
        *("../outside", "shapes/../../outside", "{root}/outside", "link", "link/dataset.toml", "..", "/", "", "a\0b"),
        "shapes\\..\\..\\outside",
    ],
)
def test_a_dataset_outside_of_the_input_folder_is_refused(executor, root, dataset):
    write_dataset(root / "outside")
    (root / "input" / "link").symlink_to(root / "outside")
    with pytest.raises(ValueError, match=r"data: dataset.*(is no place in|nothing is called) .*input") as caught:
        executor.run(cached(dataset.replace("{root}", str(root))))
    assert "\n" not in str(caught.value)
    assert not (root / "outside" / "flux2_cache").exists()


@pytest.mark.parametrize(
    "setting",
    [
        'image_directory = "../../outside"',
        'image_directory = "{root}/outside"',
        'image_directory = "../link"',
        'image_directory = "."\ncache_directory = "../../cache"',
        'image_directory = "."\ncontrol_directory = "../../outside"',
        'image_directory = "linked"',
    ],
)
def test_settings_that_lead_out_of_the_input_folder_are_refused(executor, root, setting):
    write_dataset(root / "outside")
    (root / "input" / "link").symlink_to(root / "outside")
    (root / "input" / "shapes" / "linked").mkdir()
    (root / "input" / "shapes" / "linked" / "0.png").symlink_to(root / "outside" / "0.png")
    text = f"[general]\nresolution = 64\n[[datasets]]\n{setting}\n".replace("{root}", str(root))
    (root / "input" / "shapes" / "dataset.toml").write_text(text)
    with pytest.raises(ValueError, match="outside of what may be read here"):
        executor.run(cached())
    assert not list(root.glob("*cache*")) and not (root / "outside" / "flux2_cache").exists()


def test_folders_of_datasets_may_be_registered(executor, root, host, monkeypatch):
    write_dataset(root / "elsewhere" / "mine")
    fake = SimpleNamespace(
        folder_names_and_paths={"datasets": None},
        get_folder_paths=lambda kind: [str(root / "elsewhere")],
        get_input_directory=lambda: str(root / "input"),
        get_temp_directory=lambda: str(root / "temp"),
        get_filename_list=lambda kind: [],
    )
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    for name in ("mine/dataset.toml", str(root / "elsewhere" / "mine"), "shapes"):
        assert len(executor.run(cached(name))["data"][0].dataset.items) == 6


def test_training_gives_a_lora_its_curves_and_samples(executor, root, nodes, comfy):
    prompts = f"{PROMPT} --w 64 --h 64 --s 2 --d 1\n\n# a comment\na small star --w 96 --h 64 --s 2 --g 1"
    prompt = trained(nodes, sample_prompts=prompts, sample_every_n_steps=3, save_every_n_steps=2)
    lora, name, curves, samples, steps = executor.run(prompt)["train"]
    assert (name, steps) == ("flux2_kit/style.safetensors", 6) and lora.path == lora_file(root)
    assert sorted(path.name for path in lora_file(root).parent.iterdir()) == [
        "style-step00000002.safetensors", "style-step00000004.safetensors", "style.safetensors",
    ]  # fmt: skip
    folder = root / "output" / "flux2_kit" / "style"
    made = sorted(path.name for path in (folder / "sample").iterdir())
    assert made == ["style_000003_00_1.png", "style_000003_01_0.png", "style_000006_00_1.png", "style_000006_01_0.png"]
    assert (folder / "style-state" / "state.safetensors").is_file()
    assert curves.ndim == 4 and curves.shape[3] == 3 and curves.std() > 0.01
    assert samples.shape == (2, 64, 96, 3) and samples.dtype == torch.float32
    shown = torch.tensor(list(Image.open(folder / "sample" / made[2]).tobytes())).view(64, 64, 3) / 255
    assert torch.equal(samples[0, :, 16:80], shown) and not samples[0, :, :16].any()
    losses = [
        record["validation_loss"]
        for record in read_metrics(folder / "style-metrics.jsonl")
        if "validation_loss" in record
    ]
    assert losses[-1] < losses[0]

    assert (6, 6) in comfy.bars and len(comfy.previews) == 4 and comfy.previews[1].size == (96, 64)
    texts = [text for text, node in comfy.texts if node == "train"]
    assert any(text.startswith("step 6/6, loss ") and text.endswith("0:00 left") for text in texts)
    assert re.fullmatch(r"style: 6 steps, loss [01]\.\d+, saved as flux2_kit/style\.safetensors", texts[-1])
    shown = executor.shown["train"]
    assert shown["text"] == texts[-1:] and shown["lora_name"] == ["flux2_kit/style.safetensors"]
    assert shown["images"] == [
        {"filename": name, "subfolder": f"flux2_kit/{place}", "type": "output"}
        for name, place in ((made[2], "style/sample"), (made[3], "style/sample"), ("style-curves.png", "style"))
    ]
    assert max(comfy.room) > 2**50  # all that ComfyUI holds


def test_the_trained_lora_can_be_applied(executor, root, nodes):
    prompt = {**trained(nodes), **graph({"lora_name": "none", "lora": ["train", 0]})}
    adapted = executor.run(prompt)["a"][0]["samples"]
    by_name = graph({"lora_name": "flux2_kit/style.safetensors"})
    assert torch.equal(executor.run(by_name)["a"][0]["samples"], adapted)
    assert not torch.equal(executor.run(graph())["a"][0]["samples"], adapted)
    both = {**trained(nodes), **graph({"lora_name": "flux2_kit/style.safetensors", "lora": ["train", 0]})}
    with pytest.raises(ValueError, match=r"style\.safetensors is connected to lora as well; choose 'none'"):
        executor.run(both)


def test_a_stopped_training_goes_on_where_it_was(executor, root, nodes, comfy):
    executor.run(trained(nodes, output_name="whole"))
    comfy.texts.clear()
    comfy.stop_at(4)
    prompt = trained(nodes, output_name="parts")
    with pytest.raises(InterruptProcessingException):
        executor.run(prompt)
    kept = "flux2_kit/parts-step00000004.safetensors and the state are kept"
    assert comfy.last_text("train") == f"stopped after step 4: {kept}, queue again to go on"
    assert not lora_file(root, "parts").exists() and lora_file(root, "parts-step00000004").is_file()
    comfy.stop_when = lambda: False
    comfy.bars.clear()
    assert executor.run(prompt)["train"][4] == 6
    assert comfy.bars == [(5, 6), (6, 6)] and "going on after step 4: loading" in comfy.shown()
    whole, parts = (lora_file(root, name).read_bytes() for name in ("whole", "parts"))
    assert parts.replace(b"parts", b"whole") == whole


def test_a_stopped_training_can_be_finished_where_it_was(executor, root, nodes, comfy):
    comfy.stop_at(4)
    with pytest.raises(InterruptProcessingException):
        executor.run(trained(nodes, output_name="parts"))
    comfy.stop_when = lambda: False
    executor.run(trained(nodes, output_name="parts", max_train_steps=4))
    assert comfy.last_text("train") == "parts: 4 steps, saved as flux2_kit/parts.safetensors"
    executor.run(trained(nodes, output_name="whole", max_train_steps=4))
    parts, whole = (load_file(lora_file(root, name)) for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_stop_before_the_first_step_leaves_nothing(executor, root, nodes, comfy):
    comfy.stop_when = lambda: "loading" in comfy.shown()
    with pytest.raises(InterruptProcessingException):
        executor.run(trained(nodes))
    assert comfy.last_text("train") == "stopped before the first step"
    assert not list(lora_file(root).parent.iterdir())


def test_a_stopped_run_that_does_not_resume_tells_how_to_go_on(executor, root, nodes, comfy):
    executor.run(trained(nodes, max_train_steps=1))
    comfy.texts.clear()
    comfy.stop_at(4)
    with pytest.raises(InterruptProcessingException):
        executor.run(trained(nodes, resume=False))
    assert comfy.last_text("train").endswith("switch resume on and set output_name to style_00002 to go on")


def test_an_error_tells_what_is_left(executor, root, nodes, comfy, monkeypatch):
    """A disk that is full when the state is to be written, and a loss that is not finite."""
    executor.run(cached())
    write = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".safetensors" and comfy.bars[-1][1] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(ValueError, match=r"No space left on device; check the path, .* and the free space") as caught:
        executor.run(trained(nodes, save_every_n_steps=2))
    assert "style.safetensors" in str(caught.value), "which file it was"
    assert comfy.last_text("train") == "ended after step 6, its state could not be kept"

    monkeypatch.setattr(Path, "replace", write)
    more = "preflight = false\nmixed_precision = 'fp16'\nmax_bad_steps = 2\nmax_grad_norm = 0"
    with pytest.raises(ValueError, match="the loss was not finite in 2 steps in a row"):
        executor.run(trained(nodes, learning_rate=10.0, output_name="steep", max_train_steps=60, more_settings=more))
    kept = re.fullmatch(r"ended after step (\d+), the state of step (\d+) is kept: queue .*", comfy.last_text("train"))
    assert kept is not None and kept[1] == kept[2]


def test_what_a_run_is_made_of_is_noticed_when_it_changes(executor, root, nodes):
    """And nothing else: each change queues the node once, an unchanged graph never."""
    shutil.copy(root / "input" / "shapes" / "0.png", root / "input" / "reference.png")
    executor.run(trained(nodes, output_name="first", max_train_steps=1))
    inputs = {"max_train_steps": 1, "output_name": "noticed", "sample_prompts": "a star --s 1 --ci reference.png"}
    inputs |= {"more_settings": "preflight = false", "network_weights": "flux2_kit/first.safetensors"}
    prompt = trained(nodes, **inputs)

    def runs(prompt: dict) -> bool:
        try:
            executor.run(prompt)
        except ValueError:  # a finished run with other settings: it was looked at
            return True
        return "train" in executor.executed

    assert runs(prompt) and not runs(prompt)
    for path in (root / "input" / "reference.png", lora_file(root, "first")):
        os.utime(path, ns=(1, 1))
        assert runs(prompt), path
        assert not runs(prompt), path
    assert runs(trained(nodes, **inputs, seed=1)) and not runs(prompt)

    # The LoRA itself: another one in its place, and none.
    os.utime(lora_file(root, "noticed"), ns=(1, 1))
    assert runs(prompt) and not runs(prompt)
    content = lora_file(root, "noticed").read_bytes()
    lora_file(root, "noticed").unlink()
    assert runs(prompt) and not runs(prompt)
    assert lora_file(root, "noticed").read_bytes() == content  # out of the state


def test_a_finished_run_is_not_done_again_but_goes_on_when_it_is_made_longer(executor, root, nodes, comfy):
    prompt = trained(nodes)
    executor.run(prompt)
    executor.run(prompt)
    assert executor.executed == ["sheet"]
    before = lora_file(root).stat().st_mtime_ns
    executor.cache.clear()  # as after a restart of ComfyUI
    outputs = executor.run(prompt)["train"]
    assert comfy.last_text("train") == "style is trained already: 6 steps. Nothing was done" and outputs[4] == 6
    assert lora_file(root).stat().st_mtime_ns == before

    executor.run(trained(nodes, max_train_steps=8))
    executor.run(trained(nodes, max_train_steps=8, output_name="whole"))
    assert lora_file(root).read_bytes().replace(b"style", b"whole") == lora_file(root, "whole").read_bytes()
    with pytest.raises(
        ValueError, match="style is trained for 8 steps already, and max_train_steps is 6; give another"
    ):
        executor.run(trained(nodes))
    shutil.rmtree(root / "output" / "flux2_kit" / "style")
    content = lora_file(root).read_bytes()
    with pytest.raises(ValueError, match=r"style\.safetensors is there already, and no .*state.* to train it on from"):
        executor.run(trained(nodes, max_train_steps=8, save_every_n_steps=3))
    assert lora_file(root).read_bytes() == content


def test_other_sample_prompts_of_a_finished_run_are_told(executor, root, nodes, comfy):
    prompts = f"{PROMPT} --s 1 --d 1\na star --s 1 --d 2"
    executor.run(trained(nodes, sample_prompts=prompts))
    samples = executor.run(trained(nodes, sample_prompts="a star --s 1 --d 2"))["train"][3]
    end = "style is trained already: 6 steps. Nothing was done"
    assert comfy.last_text("train") == f"{end}; FLUX.2 Apply LoRA makes pictures of other prompts"
    assert samples.shape == (1, 64, 320, 3)  # says that there are none
    samples = executor.run(trained(nodes, sample_prompts=prompts))["train"][3]
    assert comfy.last_text("train") == end and samples.shape == (2, 64, 64, 3)


def test_other_settings_are_refused_or_begin_anew_beside_the_run(executor, root, nodes):
    executor.run(trained(nodes))
    content = lora_file(root).read_bytes()
    message = (
        r"style had other settings: rank was 4, now 2\. Set them back, or else give another output_name, or switch"
    )
    with pytest.raises(ValueError, match=message):
        executor.run(trained(nodes, rank=2))
    (root / "input" / "shapes" / "3.txt").write_text("an edited caption")
    with pytest.raises(ValueError, match="the dataset has changed"):
        executor.run(trained(nodes))
    name = executor.run(trained(nodes, rank=2, resume=False))["train"][1]
    assert name == "flux2_kit/style_00002.safetensors" and lora_file(root, "style_00002").is_file()
    lora_file(root, "other-step00000003").touch()  # left of a run whose folder was deleted
    name = executor.run(trained(nodes, output_name="other", max_train_steps=1, resume=False))["train"][1]
    assert name == "flux2_kit/other_00002.safetensors"
    assert lora_file(root).read_bytes() == content


def test_a_dataset_of_another_model_is_refused_before_anything_is_loaded(executor, root, nodes, pack):
    prompt = trained(nodes)
    linked = executor.run(cached())["data"][0]
    variants = sys.modules[f"{pack.__name__}.flux2_core.variants"].VARIANTS
    other = type(linked)(**{**vars(linked), "variant": variants["klein-base-4b"]})
    arguments = {name: value for name, value in prompt["train"]["inputs"].items() if name != "dataset"}
    with pytest.raises(ValueError, match="is encoded for klein-base-4b, and the DiT is tiny, which has other encoders"):
        nodes["Flux2KitTrainLoRA"].train(other, **arguments)
    with pytest.raises(ValueError, match="not of klein-base-4b; choose auto"):
        executor.run(trained(nodes, variant="klein-base-4b"))
    with pytest.raises(ValueError, match=r"but this FLUX\.2 model needs|no tokenizer"):
        executor.run(cached(variant="klein-base-4b"))


def test_more_settings_reach_the_training(executor, root, nodes):
    executor.run(trained(nodes, output_name="first", max_train_steps=2))
    text, first = "dim_from_weights = true\n[more]\nmax_train_epochs = 2", "flux2_kit/first.safetensors"
    outputs = executor.run(trained(nodes, rank=32, network_weights=first, more_settings=text))["train"]
    assert outputs[4] == 4  # two epochs of two steps
    text = 'lr_warmup_steps = 2\nnetwork_args = ["dora=true"]\nsample_every_n_epochs = 1\nmixed_precision = "no"'
    prompts = {"sample_prompts": f"{PROMPT} --s 1", "lr_scheduler": "cosine"}
    executor.run(trained(nodes, output_name="second", more_settings=text, **prompts))
    folder = root / "output" / "flux2_kit" / "second"
    records = [record for record in read_metrics(folder / "second-metrics.jsonl") if "loss" in record]
    assert [record["learning_rate"] for record in records][:3] == pytest.approx([0, 5e-4, 1e-3])
    assert len(list((folder / "sample").iterdir())) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir = '/tmp'", "output_dir: the node writes into ComfyUI's own folders"),
        ("[paths]\nlogging_dir = '/tmp'", "logging_dir: the node writes into ComfyUI's own folders"),
        ("resume = '/tmp'", "resume: the node goes on by itself"),
        ("log_with = 'wandb'", "log_with: use `flux2 train` to log elsewhere"),
        ("sample_prompts = '/etc/passwd'", "sample_prompts: write the prompts on the node"),
        ("optimizer_type = 'os.system'", "optimizer_type: set optimizer_type on the node"),
        ("network_dim = 4", "network_dim: set rank on the node"),
        ("dit = '/tmp/x.safetensors'", "dit: choose it on the node"),
        ("config_file = 'x.toml'", "config_file: it belongs to `flux2 train`"),
        ("network_weights = '/etc/passwd'", "network_weights: set network_weights on the node"),
        ("rank = 4", "rank: set rank on the node"),
        ("lr = 1", "lr: set learning_rate on the node"),
        ("batch_size = 2", "batch_size: set it in FLUX.2 Cache Dataset"),
        ("ema_decai = 0.9", "'ema_decai', which is no option; did you mean ema_decay?"),
        ("quux = 0.9", "'quux', which is no option; `flux2 train --help` lists them"),
        ("xformers = true", "xformers, which is not supported: leave it out"),
        ("ema_decay = ", "more_settings is no TOML"),
        ("ema_decay = 0.9\n[x]\nema_decay = 0.8", "sets ema_decay twice"),
        ("ema_decay = 2", "ema_decay is 2.0; it must lie between 0 and 1"),
        ("lr_warmup_steps = 3", "lr_warmup_steps is 3, which has no effect with lr_scheduler constant"),
        ("optimizer_args = ['foreach=__import__(\"os\")']", "must be a Python literal"),
        ("sample_every_n_epochs = 1", "samples are asked for, but there is no file of prompts"),
    ],
)
def test_settings_that_are_not_for_the_node_are_refused(executor, root, nodes, text, message):
    with pytest.raises(ValueError) as caught:
        executor.run(trained(nodes, more_settings=text))
    assert message in str(caught.value)
    assert not (root / "output").exists() and not lora_file(root).parent.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "gone.safetensors"])
def test_a_lora_to_start_from_or_on_top_of_lies_among_the_loras(executor, root, nodes, name):
    (root / "models" / "x.safetensors").touch()
    with pytest.raises(ValueError, match="is not in ComfyUI's loras folder"):
        executor.run(trained(nodes, network_weights=name))
    for weights in (f"'{name}'", f"['{name}']"):
        with pytest.raises(ValueError, match="is not in ComfyUI's loras folder"):
            executor.run(trained(nodes, more_settings=f"base_weights = {weights}"))


def test_a_lora_is_trained_on_top_of_others(executor, root, nodes):
    executor.run(trained(nodes, output_name="first", max_train_steps=1))
    text = "preflight = false\nbase_weights = 'flux2_kit/first.safetensors'"
    prompt = trained(nodes, output_name="second", max_train_steps=1, more_settings=text)
    assert executor.run(prompt)["train"][4] == 1
    assert executor.run(prompt) and "train" not in executor.executed
    os.utime(lora_file(root, "first"), ns=(1, 1))
    executor.run(prompt)
    assert "train" in executor.executed


def test_memory_is_chosen_on_the_node(executor, root, nodes):
    executor.run(trained(nodes, max_train_steps=1))
    with pytest.raises(ValueError, match="base_precision was auto, now nf4"):
        executor.run(trained(nodes, max_train_steps=1, precision="nf4"))
    before = {name: value for name, value in trained(nodes)["train"]["inputs"].items() if name not in LATER_WIDGETS}
    prompt = trained(nodes)
    prompt["train"]["inputs"] = before | {"max_train_steps": 1}  # as from before these widgets
    assert executor.run(prompt)["train"][4] == 1


def test_no_class_is_imported_by_its_name(executor, root, nodes):
    linked = executor.run(cached())["data"][0]
    inputs = trained(nodes, optimizer_type="accelerate.optimizer.AcceleratedOptimizer")["train"]["inputs"] | {
        "dataset": linked
    }
    with pytest.raises(ValueError, match=r"accelerate\.optimizer"):  # a linked text passes by the choices of a widget
        nodes["Flux2KitTrainLoRA"].train(**inputs)
    assert not (root / "output").exists()


def test_every_option_is_open_refused_or_a_widget(pack, nodes):
    training = sys.modules[f"{pack.__name__}.nodes.training_run"]
    parser = __import__("argparse").ArgumentParser()
    options = sys.modules[f"{pack.__name__}.training.train_options"]
    options.add_train_options(parser)
    known = {action.dest for action in parser._actions} - {"help"}
    allowed = {*options.OPTIONS, *training.OTHER_OPTIONS, *training.WITHOUT_EFFECT} - set(training.OWN_OPTIONS)
    assert known == allowed | set(training.OWN_OPTIONS) | set(training.REFUSED)
    kinds = {name: str(options._kind(options.OPTIONS[name].setting)) for name in allowed & set(options.OPTIONS)}
    paths = {name for name, kind in kinds.items() if "Path" in kind}
    assert paths <= {"base_weights"}  # which are looked up among the LoRAs
    assert set(training.WIDGET_OPTIONS) <= set(inputs_of(nodes["Flux2KitTrainLoRA"]))


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "a\\b", "/x", ".x", "x.", " x", "a\0b", "a:b", "x" * 101, "ä", "con", "NUL.x"]
)
def test_names_that_are_no_plain_file_name_are_refused(executor, root, nodes, name):
    with pytest.raises(ValueError, match=r"output_name is .*; give up to 100 letters"):
        executor.run(trained(nodes, output_name=name))
    assert not (root / "output").exists()


def test_references_of_sample_prompts_lie_in_the_input_folder(executor, root, nodes):
    (root / "input" / "some -- pictures").mkdir()
    shutil.copy(root / "input" / "shapes" / "0.png", root / "input" / "some -- pictures" / "a b.png")
    prompts = f"{PROMPT} --s 1 --n a star --ci shapes/0.png --ci some -- pictures/a b.png\nplain --s 1"
    outputs = executor.run(trained(nodes, sample_prompts=prompts, max_train_steps=1))
    assert outputs["train"][3].shape[0] == 2
    written = (root / "output" / "flux2_kit" / "style" / "prompts.txt").read_text()
    picture = root / "input" / "shapes" / "0.png"
    assert f"--ci {picture.resolve()} --ci" in written and written.endswith("a b.png\nplain --s 1\n")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a --ci ../outside.png", "sample_prompts, line 1: --ci is '../outside.png', which is no place in"),
        ("a\nb --ci /etc/passwd", "sample_prompts, line 2: --ci is '/etc/passwd', which is no place in"),
        ("a --ci gone.png", "line 1: --ci: nothing is called 'gone.png'"),
        ("a --x 1", "line 1: unknown option --x"),
        ("a --w big", "line 1: --w is 'big'; it must be a whole number"),
    ],
)
def test_wrong_sample_prompts_are_refused(executor, root, nodes, prompts, message):
    Image.new("RGB", (64, 64)).save(root / "outside.png")
    with pytest.raises(ValueError) as caught:
        executor.run(trained(nodes, sample_prompts=prompts))
    assert message in str(caught.value)


def test_samples_need_prompts(executor, root, nodes):
    with pytest.raises(ValueError, match="sample_every_n_steps is 2, but sample_prompts is empty"):
        executor.run(trained(nodes, sample_every_n_steps=2))
    samples = executor.run(trained(nodes, max_train_steps=1))["train"][3]
    assert samples.shape == (1, 64, 320, 3)  # says so


def test_stop_during_the_last_samples_leaves_a_finished_lora(executor, root, nodes, comfy):
    comfy.stop_at(2)
    prompt = trained(nodes, sample_prompts=PROMPT, max_train_steps=2)
    with pytest.raises(InterruptProcessingException):
        executor.run(prompt)
    assert lora_file(root).is_file()
    comfy.stop_when = lambda: False
    assert executor.run(prompt)["train"][4] == 2


def test_defaults_are_those_of_the_settings(nodes, pack):
    config = TrainConfig()
    options: ModuleType = sys.modules[f"{pack.__name__}.training.train_options"]
    training = sys.modules[f"{pack.__name__}.nodes.training_run"]
    widgets = inputs_of(nodes["Flux2KitTrainLoRA"])
    for widget, option in training.WIDGET_OPTIONS.items():
        value = config
        for part in options.OPTIONS[option].setting.split("."):
            value = getattr(value, part)
        choices, shown = widgets[widget]
        default = shown.get("default", choices[0] if isinstance(choices, list) else None)
        assert default == ("none" if widget == "network_weights" else 0 if value is None else value), widget
    assert widgets["resume"][1]["default"] is True and widgets["seed"][1]["control_after_generate"] is False


def test_what_is_refused_is_told_on_the_node(nodes, root, comfy):
    """Where other nodes can run, ComfyUI's page says nothing else."""
    text = nodes["Flux2KitTrainLoRA"].VALIDATE_INPUTS(more_settings="ema_decai = 1", unique_id="7")
    assert comfy.last_text("7") == text and "ema_decai" in text
    text = nodes["Flux2KitCacheDataset"].VALIDATE_INPUTS(dataset="/etc", unique_id="8")
    assert comfy.last_text("8") == text and "extra_model_paths.yaml" in text


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_times_are_told_as_a_clock_does(seconds, shown):
    assert clock(seconds) == shown


def test_the_file_of_the_dit_counts(nodes, root, host, random_tiny_files):
    folder = root / "models" / "diffusion_models"
    folder.mkdir()
    shutil.copy(random_tiny_files.dit, folder / "a.safetensors")
    before = nodes["Flux2KitTrainLoRA"].IS_CHANGED(dit_name="a.safetensors", seed=0)
    (folder / "a.safetensors").touch()
    assert nodes["Flux2KitTrainLoRA"].IS_CHANGED(dit_name="a.safetensors") != before
    assert "is not in" in nodes["Flux2KitTrainLoRA"].IS_CHANGED(dit_name="gone.safetensors")
    assert "is not in" in nodes["Flux2KitTrainLoRA"].VALIDATE_INPUTS(dit_name="gone.safetensors")
    assert nodes["Flux2KitTrainLoRA"].VALIDATE_INPUTS() is True
    assert nodes["Flux2KitCacheDataset"].VALIDATE_INPUTS() is True
