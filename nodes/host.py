"""All contact with ComfyUI: folders, device, progress, text, stop.

ComfyUI's modules are looked up among those that are loaded and never imported: inside its server they are all there,
and elsewhere importing them would fail or set up a device. Without them every function falls back to something plain.
"""

from __future__ import annotations

import gc
import math
import secrets
import sys
import time
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..flux2_core.tensor_source import SHARD
from ..flux2_core.variants import get_variant
from ..flux2_core.weights import WeightsComponent, find_weights
from ..training.dataset_paths import is_inside

CATEGORY = "FLUX.2 Kit"
BUNDLED = "tiny (bundled)"
"""Combo entry that stands for the weights inside the package, so that every loader has a choice that works."""
FOLDER_KINDS: dict[WeightsComponent, str] = {
    "dit": "diffusion_models",
    "autoencoder": "vae",
    "text_encoder": "text_encoders",
}
"""ComfyUI's names of the folders."""
LORA_KIND = "loras"
MODEL_KINDS = (*FOLDER_KINDS.values(), LORA_KIND)
NO_LORA = "none"
"""Combo entry that applies nothing, so that the node works over an empty folder."""
FALLBACK_MODELS_DIR = Path("models")
"""Searched where there is no ComfyUI."""
FALLBACK_OUTPUT_DIR = Path("output")
FALLBACK_INPUT_DIR = Path("input")
FALLBACK_TEMP_DIR = Path("temp")
DATASET_KIND = "datasets"
OWN_FOLDER = "flux2_kit"
"""Of what training writes, in the folders for output and LoRAs; and of the bundled dataset, in the one for input."""
SUFFIXES = (".safetensors", ".sft")
EVERYTHING = 2**60
"""Bytes, more than any device has."""
SECONDS_BETWEEN_TEXTS = 0.25
PREVIEW_SIDE = 512
"""Previews are shown at this size, in pixels."""


def model_names(component: WeightsComponent) -> list[str]:
    """Combo entries: the bundled weights, then the files in ComfyUI's folder; of a set of shards only the first."""
    return [BUNDLED, *_file_names(FOLDER_KINDS[component])]


def lora_names() -> list[str]:
    """Combo entries: none, then the files in ComfyUI's loras folder."""
    return [NO_LORA, *_file_names(LORA_KIND)]


def file_names() -> list[str]:
    """Combo entries: all files of models and LoRAs, each behind the name of its folder, and the bundled weights."""
    bundled = [f"{kind}/{BUNDLED}" for kind in FOLDER_KINDS.values()]
    return [*bundled, *(f"{kind}/{name}" for kind in MODEL_KINDS for name in _file_names(kind))]


def check_file_name(name: str) -> None:
    """As `check_model_name`."""
    _check_name("models", name, file_names())


def check_model_name(component: WeightsComponent, name: str) -> None:
    """Refuses what is no combo entry: names come out of workflow files, which may be anyone's.

    Raises:
        ValueError: with the folder to put a file into.
    """
    _check_name(FOLDER_KINDS[component], name, model_names(component))


def check_lora_name(name: str) -> None:
    """As `check_model_name`."""
    _check_name(LORA_KIND, name, lora_names())


def model_path(component: WeightsComponent, name: str) -> Path:
    """The file or folder behind a combo entry.

    Raises:
        ValueError: there is none.
    """
    check_model_name(component, name)
    return bundled_path(component) if name == BUNDLED else _full_path(FOLDER_KINDS[component], name)


def lora_path(name: str) -> Path | None:
    """The file behind a combo entry; None for `NO_LORA`.

    Raises:
        ValueError: there is no such entry, or its file has gone.
    """
    check_lora_name(name)
    return None if name == NO_LORA else _full_path(LORA_KIND, name)


def file_path(name: str) -> Path:
    """The file or folder behind an entry of `file_names`.

    Raises:
        ValueError: there is no such entry, or its file has gone.
    """
    check_file_name(name)
    kind, _, rest = name.partition("/")
    if rest == BUNDLED:
        return next(bundled_path(component) for component, folder in FOLDER_KINDS.items() if folder == kind)
    return _full_path(kind, rest)


def bundled_path(component: WeightsComponent) -> Path:
    """The tiny model's weights inside the package."""
    return find_weights(get_variant("tiny"), component)


def check_output_prefix(prefix: str) -> None:
    """Refuses what `free_output_path` would.

    Raises:
        ValueError: the prefix has no file name, or leads out of the folder.
    """
    _check_inside(output_directory(), prefix, "ComfyUI's output folder", "diffusion_models/merged")


def check_new_lora_name(name: str) -> None:
    """Refuses what `free_lora_path` would.

    Raises:
        ValueError: it is no name of a file, or leads out of the folder.
    """
    _check_inside(lora_directory(), name, "ComfyUI's loras folder", "converted/style")


def free_output_path(prefix: str, suffix: str) -> Path:
    """A new file in ComfyUI's output folder, numbered as native nodes number theirs; its folder is made.

    Raises:
        ValueError: the prefix has no file name, or leads out of the folder.
    """
    check_output_prefix(prefix)
    folder_paths = _loaded("folder_paths")
    root, plain = output_directory().resolve(), _with_slashes(prefix)
    wanted = root / plain
    if folder_paths is not None:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(plain, str(root))
        wanted = Path(folder) / name
    else:
        counter = 1
    wanted.parent.mkdir(parents=True, exist_ok=True)
    while (path := wanted.with_name(f"{wanted.name}_{counter:05}_{suffix}")).exists():
        counter += 1
    return path


def free_lora_path(name: str, suffix: str) -> Path:
    """A new file in ComfyUI's first folder of LoRAs, with a number where the name is taken; its folder is made.

    Raises:
        ValueError: it is no name of a file, or leads out of the folder.
    """
    check_new_lora_name(name)
    wanted = lora_directory().resolve() / _with_slashes(name)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    path, number = wanted.with_name(f"{wanted.name}{suffix}"), 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}_{number:05}{suffix}")
    return path


def input_directory() -> Path:
    """Where pictures come from."""
    folder_paths = _loaded("folder_paths")
    return Path(folder_paths.get_input_directory()) if folder_paths is not None else FALLBACK_INPUT_DIR


def output_directory() -> Path:
    """Where results go."""
    folder_paths = _loaded("folder_paths")
    return Path(folder_paths.get_output_directory()) if folder_paths is not None else FALLBACK_OUTPUT_DIR


def dataset_directories() -> list[Path]:
    """Where datasets may lie: the input folder, and what extra_model_paths.yaml names as datasets."""
    folder_paths = _loaded("folder_paths")
    known = getattr(folder_paths, "folder_names_and_paths", {})
    extra = folder_paths.get_folder_paths(DATASET_KIND) if folder_paths is not None and DATASET_KIND in known else []
    return [input_directory(), *map(Path, extra)]


def shown_preview(image: Image.Image, name: str) -> dict[str, str]:
    """Writes a picture into ComfyUI's temporary folder and gives the entry that shows it on a node."""
    folder_paths = _loaded("folder_paths")
    root = Path(folder_paths.get_temp_directory()) if folder_paths is not None else FALLBACK_TEMP_DIR
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{name}_{secrets.token_hex(4)}.png"
    image.save(path, compress_level=1)
    return {"filename": path.name, "subfolder": "", "type": "temp"}


def shown_output(path: Path) -> dict[str, str]:
    """The entry that shows a picture of the output folder on a node."""
    folder = path.parent.relative_to(output_directory().absolute())
    return {"filename": path.name, "subfolder": folder.as_posix(), "type": "output"}


def lora_directory() -> Path:
    """ComfyUI's first folder of LoRAs."""
    if (folder_paths := _loaded("folder_paths")) is None:
        return FALLBACK_MODELS_DIR / LORA_KIND
    return Path(folder_paths.get_folder_paths(LORA_KIND)[0])


def find_dataset(text: str) -> Path:
    """As `find_inside`, of a dataset."""
    advice = f"move it in there, or name the folder that it is in as {DATASET_KIND} in extra_model_paths.yaml"
    return find_inside(dataset_directories(), text, "dataset", advice)


def find_inside(folders: Sequence[Path], text: str, what: str, advice: str = "move it in there") -> Path:
    """The file or folder that a widget names, by its path in one of the folders, or by a whole path into one of them.

    Raises:
        ValueError: there is none, or it lies elsewhere once links are followed: workflows may be anyone's.
    """
    named, shown = Path(text.strip()), " or ".join(map(str, folders))
    roots = [folder.resolve() for folder in folders]
    # What lies elsewhere is not looked at: on Windows even that could call on another machine.
    if not text.strip() or "\0" in text:
        candidates = []
    elif named.drive or named.root:
        candidates = [named] if any(named.is_relative_to(folder) for folder in (*folders, *roots)) else []
    else:
        candidates = [folder / named for folder in folders]
    allowed = [path for path in candidates if is_inside(path, roots)]
    if not allowed:
        raise ValueError(f"{what} is {text!r}, which is no place in {shown} (links are followed); {advice}")
    for path in allowed:
        if path.exists():
            return path
    raise ValueError(f"{what}: nothing is called {text!r} in {shown}; check the name, or {advice}")


def tokenizer_directories() -> list[Path]:
    """ComfyUI's own copy of Qwen's vocabulary; ComfyUI's Qwen3 files come without a tokenizer."""
    file = getattr(_loaded("folder_paths"), "__file__", None)
    return [Path(file).parent / "comfy" / "text_encoders" / "qwen25_tokenizer"] if file else []


def weight_files(path: Path) -> list[Path]:
    """The files that are read for a path: those of a folder, all shards of a set, or the one file."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if shard := SHARD.fullmatch(path.name):
        return sorted(path.parent.glob(f"{escape(shard['stem'])}-*-of-{shard['count']}.safetensors"))
    return [path]


def num_bytes(path: Path) -> int:
    """Size of the weights behind a path."""
    return sum(file.stat().st_size for file in weight_files(path))


def fingerprint(path: Path) -> str:
    """Changes when the files behind a path do."""
    stats = ((file.name, file.stat()) for file in weight_files(path))
    return "\n".join([str(path), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)])


def has_color_widget() -> bool:
    """Whether the front end draws inputs of the type COLOR, in nodes of both kinds: it came with this class."""
    return hasattr(_loaded("comfy_api.latest._io"), "Color")


def device() -> torch.device:
    """Where networks run."""
    if (management := _loaded("comfy.model_management")) is not None:
        return management.get_torch_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_room(num_bytes: int) -> None:
    """Lets ComfyUI unload models, its own and ours, until this much memory of the device is free."""
    if (management := _loaded("comfy.model_management")) is not None:
        management.free_memory(num_bytes, management.get_torch_device())


def unload_all() -> None:
    """Lets ComfyUI unload every model, its own and ours, from the device."""
    if (management := _loaded("comfy.model_management")) is None:
        return
    if hasattr(management, "unload_all_models"):
        management.unload_all_models()
    else:
        make_room(EVERYTHING)
    release_memory()


def release_memory() -> None:
    """Gives back to the device what ended networks have left."""
    gc.collect()
    if (management := _loaded("comfy.model_management")) is not None:
        management.soft_empty_cache()


def should_stop() -> bool:
    """Raises ComfyUI's own exception when the user has pressed stop; True is never returned."""
    if (management := _loaded("comfy.model_management")) is not None:
        management.throw_exception_if_processing_interrupted()
    return False


def is_interrupted() -> bool:
    """Whether the user has pressed stop, for work that has to come to an end of its own before `should_stop` raises."""
    management = _loaded("comfy.model_management")
    return management is not None and management.processing_interrupted()


class Progress:
    """The progress bar of a node.

    Args:
        total: steps until it is full.
        node_id: the node that shows it.
    """

    def __init__(self, total: int, node_id: str | None) -> None:
        utils = _loaded("comfy.utils")
        self.total = total
        self.bar = utils.ProgressBar(total, node_id=node_id) if utils is not None else None

    def update(self, done: int, preview: Image.Image | None = None) -> None:
        """Shows that `done` steps are done, with a picture of the result so far."""
        if self.bar is not None:
            shown = ("JPEG", preview, PREVIEW_SIDE) if preview is not None else None
            self.bar.update_absolute(done, self.total, preview=shown)


class LiveText:
    """A line of text on a node that changes all the time: not every one is sent."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.sent = -math.inf

    def show(self, text: str, *, is_last: bool) -> None:
        """Shows a line, unless the one before is still new; the last one is always shown."""
        if is_last or time.monotonic() - self.sent >= SECONDS_BETWEEN_TEXTS:
            self.sent = time.monotonic()
            show_text(text, self.node_id)


def refusal(error: Exception, node_id: str | None) -> str:
    """What a check of inputs answers; it is shown on the node as well.

    Where other nodes of a workflow can run, ComfyUI's page runs those, and tells of this one by a red frame alone.
    """
    show_text(str(error), node_id)
    return str(error)


def show_text(text: str, node_id: str | None) -> None:
    """Shows text on a node, which its page may draw as Markdown: two spaces keep the end of a line there."""
    server = getattr(getattr(_loaded("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text.replace("\n", "  \n"), node_id)


def _file_names(kind: str) -> list[str]:
    if (folder_paths := _loaded("folder_paths")) is not None:
        names = folder_paths.get_filename_list(kind)
    else:
        folder = FALLBACK_MODELS_DIR / kind
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name.endswith(SUFFIXES) and not _is_later_shard(name)]


def _check_inside(root: Path, name: str, folder: str, example: str) -> None:
    plain, root = _with_slashes(name), root.resolve()
    # Of a Windows drive, and of a stream behind a file's name, nothing is left to chance.
    if (
        not plain.strip()
        or plain.endswith("/")
        or any(sign in plain for sign in "\0:")
        or not is_inside(root / plain, [root])
    ):
        raise ValueError(
            f"the file name prefix {name!r} does not name a file in {folder}; give a name such as {example}"
        )


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")


def _check_name(kind: str, name: str, choices: list[str]) -> None:
    if name not in choices:
        raise ValueError(
            f"{name!r} is not in ComfyUI's {kind} folder; put the file there and refresh (R), or choose another entry, "
            f"such as {choices[0]!r}"
        )


def _full_path(kind: str, name: str) -> Path:
    if (folder_paths := _loaded("folder_paths")) is None:
        return FALLBACK_MODELS_DIR / kind / name
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ValueError(f"{name!r} has gone from ComfyUI's {kind} folder; put it back, or choose another entry")
    return Path(path)


def _loaded(name: str) -> Any:
    """A module of ComfyUI, None where we run without it."""
    return sys.modules.get(name)


def _is_later_shard(name: str) -> bool:
    shard = SHARD.fullmatch(name.replace("\\", "/").rpartition("/")[2])
    return shard is not None and int(shard["index"]) > 1
