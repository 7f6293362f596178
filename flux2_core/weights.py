"""Where the weights of a named variant are, and how to get them.

Nothing is fetched unless `download` is called: looking for weights only reads folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, get_args

from .detect import detect
from .tensor_source import TensorSource
from .variants import DIT_4B, DIT_9B, DIT_32B, MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, VARIANTS, RemoteFile, Variant

WeightsComponent = Literal["dit", "autoencoder", "text_encoder"]

TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
TINY_FILES: dict[WeightsComponent, str] = {
    "dit": "dit.safetensors",
    "autoencoder": "autoencoder.safetensors",
    "text_encoder": "text_encoder",
}
COMFYUI_FOLDERS: dict[WeightsComponent, tuple[str, ...]] = {
    "dit": ("diffusion_models", "unet"),
    "autoencoder": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
}
"""Folders of ComfyUI's models folder, new name first."""
AUTOENCODER_NAMES = (
    "flux2-vae.safetensors",  # Comfy-Org
    "flux2_ae.safetensors",
    "ae.safetensors",  # black-forest-labs/FLUX.2-dev; FLUX.1's has the same name
    "full_encoder_small_decoder.safetensors",  # black-forest-labs/FLUX.2-small-decoder
)
TEXT_ENCODER_NAMES = {
    MISTRAL_SMALL: ("mistral_3_small_flux2_bf16.safetensors", "mistral_3_small_flux2_fp8.safetensors"),
    QWEN3_8B: ("qwen_3_8b.safetensors", "qwen_3_8b_fp8mixed.safetensors"),
    QWEN3_4B: ("qwen_3_4b.safetensors",),
}
"""Names in Comfy-Org's repositories, most precise first."""
DEV_NAMES = ("flux2-dev.safetensors", "flux2_dev_fp8mixed.safetensors")
AUTOENCODER_REPOSITORY_FILES = ("vae/diffusion_pytorch_model.safetensors", "ae.safetensors")
DIFFUSERS_FOLDERS: dict[WeightsComponent, str] = {
    "dit": "transformer",
    "autoencoder": "vae",
    "text_encoder": "text_encoder",
}

AUTOENCODER_BYTES = 168_000_000
DIT_BYTES = {DIT_32B: 64_450_000_000, DIT_9B: 18_160_000_000, DIT_4B: 7_750_000_000}
TEXT_ENCODER_BYTES = {MISTRAL_SMALL: 48_020_000_000, QWEN3_8B: 16_380_000_000, QWEN3_4B: 8_050_000_000}
"""Sizes of the published bf16 files, rounded."""


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file, or every file of a folder, to fetch."""

    repository: str
    filename: str
    """Path in the repository; a trailing ``/*`` stands for every file of the folder."""
    size_bytes: int | None
    """Rounded; None for a few small files whose size is not known before they are asked for."""


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """What `download` would fetch for a variant."""

    variant: str
    files: tuple[PlannedFile, ...]
    license: str
    gated: bool
    note: str
    """For people: the licence and, for a gated repository, how to get access; one line."""

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes that are known."""
        return sum(file.size_bytes or 0 for file in self.files)


def find_weights(
    variant: Variant, component: WeightsComponent, explicit: Path | None = None, models_dir: Path | None = None
) -> Path:
    """Finds the weights of one component of a variant, without any network.

    Looks at ``explicit``, then in ``models_dir`` (a ComfyUI models folder with diffusion_models/, vae/ and
    text_encoders/, sub-folders included; or a folder with files or diffusers folders of the published names), then in
    the Hugging Face cache. ``tiny`` comes with the package.

    Returns:
        A file, or a folder in Hugging Face's format.

    Raises:
        ValueError: nothing was found; the text says where it was looked for and how to get the files.
    """
    if component not in get_args(WeightsComponent):
        raise ValueError(f"unknown component {component!r}; known components: {', '.join(get_args(WeightsComponent))}")
    if explicit is not None:
        if not Path(explicit).exists():
            raise ValueError(f"{explicit} does not exist; give the path of the {_say(component)}'s weights")
        return Path(explicit)
    if variant.name == "tiny":
        path = TINY_FOLDER / TINY_FILES[component]
        if not path.exists():
            raise ValueError(f"{path} is missing, though it is part of the package; install FLUX.2 Kit again")
        return path
    looked: list[str] = []
    rejected: list[str] = []
    if models_dir is not None:
        looked.append(f"{models_dir} ({', '.join(f'{name}/' for name in COMFYUI_FOLDERS[component])} and above)")
        for path in _in_models_dir(variant, component, Path(models_dir)):
            if _usable(path, variant, component, rejected):
                return path
    cache = _cache_folder()
    looked.append(f"the Hugging Face cache {cache}")
    for path in _in_cache(variant, component, cache):
        if _usable(path, variant, component, rejected):
            return path
    raise ValueError(_not_found(variant, component, looked, rejected))


def plan_download(variant: Variant) -> DownloadPlan:
    """What `download` would fetch, told without any network; empty for the bundled ``tiny``."""
    files: list[PlannedFile] = []
    if variant.dit_file is not None:
        files.append(_planned(variant.dit_file, DIT_BYTES.get(variant.dit)))
    if variant.autoencoder_file is not None:
        files.append(_planned(variant.autoencoder_file, AUTOENCODER_BYTES))
    if variant.text_encoder_files is not None:
        files.append(_planned(variant.text_encoder_files, TEXT_ENCODER_BYTES.get(variant.text_encoder)))
        files.append(
            PlannedFile(repository=variant.text_encoder_files.repository, filename="tokenizer/*", size_bytes=None)
        )
    note = f"{variant.name} is published under the {variant.license} licence"
    if variant.gated and variant.dit_file is not None:
        note += f"; {_access(variant.dit_file.repository)}"
    if not files:
        note += "; it comes with FLUX.2 Kit, so that there is nothing to download"
    return DownloadPlan(
        variant=variant.name, files=tuple(files), license=variant.license, gated=variant.gated, note=note
    )


def download(
    variant: Variant,
    on_progress: Callable[[str, int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Path]:
    """Fetches a variant's weights into the Hugging Face cache; what is there already is not fetched again.

    An interrupted download goes on where it ended.

    Args:
        on_progress: called before each file and at the end with (file name, bytes done, bytes in all).
        should_stop: asked before each file; True ends the download there.

    Returns:
        The files, as far as they were fetched.

    Raises:
        ValueError: access is refused, a repository or a file does not exist, or the connection or the disk fails.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    plan = plan_download(variant)
    paths: list[Path] = []
    repository = ""
    try:
        listed: list[tuple[str, str, int]] = []
        for file in plan.files:
            repository = file.repository
            listed += _list_remote(file)
        total, done = sum(size for _, _, size in listed), 0
        for repository, filename, size in listed:
            if should_stop is not None and should_stop():
                return paths
            if on_progress is not None:
                on_progress(filename, done, total)
            paths.append(Path(str(hf_hub_download(repository, filename))))
            done += size
        if on_progress is not None and listed:
            on_progress(listed[-1][1], done, total)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        # Without a login the service answers "not found" for what it hides.
        raise ValueError(f"access to {repository} was refused; {_access(repository)}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"the download from {repository} failed: {reason[0] if reason else type(error).__name__}; check the "
            f"connection and the free disk space, then run `flux2 download {variant.name}` again: it resumes"
        ) from error
    return paths


def _list_remote(file: PlannedFile) -> list[tuple[str, str, int]]:
    """(repository, file name, bytes) of every file that a planned one stands for."""
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(file.repository, files_metadata=True).siblings or []
    found = [
        (file.repository, sibling.rfilename, sibling.size or 0)
        for sibling in siblings
        if fnmatch(sibling.rfilename, file.filename)
    ]
    if not found:
        raise ValueError(
            f"{file.repository} has no file {file.filename}; the repository has changed, give a path instead"
        )
    return found


def _in_models_dir(variant: Variant, component: WeightsComponent, models_dir: Path) -> Iterator[Path]:
    names = _file_names(variant, component)
    for folder in (models_dir / name for name in COMFYUI_FOLDERS[component]):
        if folder.is_dir():
            present = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
            for name in names:
                yield from (path for path in present if path.name.lower() == name.lower())
    yield from (models_dir / name for name in names if (models_dir / name).is_file())
    for repository in _repositories(variant, component):
        for folder in (models_dir / repository.split("/")[1], models_dir / "diffusers" / repository.split("/")[1]):
            yield from _in_model_folder(folder, variant, component)


def _in_cache(variant: Variant, component: WeightsComponent, cache: Path) -> Iterator[Path]:
    """Published repositories in the cache, in the revision that "main" was when they were fetched."""
    for repository in _repositories(variant, component):
        folder = cache / f"models--{repository.replace('/', '--')}"
        try:
            revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
        yield from _in_model_folder(folder / "snapshots" / Path(revision).name, variant, component)


def _in_model_folder(folder: Path, variant: Variant, component: WeightsComponent) -> Iterator[Path]:
    """The places in one repository's folder, single file before diffusers folder."""
    if component == "dit" and variant.dit_file is not None:
        places = [folder / variant.dit_file.filename]
    elif component == "autoencoder":
        places = [folder / name for name in AUTOENCODER_REPOSITORY_FILES]
    else:
        places = []
    yield from (path for path in [*places, folder / DIFFUSERS_FOLDERS[component]] if path.exists())


def _file_names(variant: Variant, component: WeightsComponent) -> tuple[str, ...]:
    """Names under which the component's single files are published, most precise first."""
    if component == "autoencoder":
        return AUTOENCODER_NAMES
    if component == "text_encoder":
        return TEXT_ENCODER_NAMES.get(variant.text_encoder, ())
    if variant.name == "dev":
        return DEV_NAMES
    if variant.dit_file is None:
        return ()
    stem = variant.dit_file.filename.removesuffix(".safetensors")
    return (f"{stem}.safetensors", f"{stem}-fp8.safetensors")


def _repositories(variant: Variant, component: WeightsComponent) -> list[str]:
    """Repositories that hold the component, the recommended one first."""
    by_component: dict[WeightsComponent, RemoteFile | None] = {
        "dit": variant.dit_file,
        "autoencoder": variant.autoencoder_file,
        "text_encoder": variant.text_encoder_files,
    }
    own = by_component[component]
    found = [own.repository] if own is not None else []
    if component == "dit":
        return found
    # The autoencoder is one for all, the text encoder one for all variants of a size.
    for other in VARIANTS.values():
        fits = component == "autoencoder" or other.text_encoder == variant.text_encoder
        if fits and other.dit_file is not None:
            found.append(other.dit_file.repository)
    return list(dict.fromkeys(found))


def _usable(path: Path, variant: Variant, component: WeightsComponent, rejected: list[str]) -> bool:
    """Whether a file is complete and of the right kind: a name alone tells little, `ae.safetensors` is FLUX.1's too."""
    try:
        description = detect(TensorSource(path, component=component), variants={variant.name: variant})
    except ValueError as error:
        rejected.append(str(error))
        return False
    if description.kind != component:
        rejected.append(f"{path} is {description.what}")
        return False
    if component != "autoencoder" and variant.name not in description.variants:
        rejected.append(f"{path} is {description.what}, of another size than {variant.name} needs")
        return False
    return True


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.path.expandvars(HF_HUB_CACHE)).expanduser()


def _planned(file: RemoteFile, size_bytes: int | None) -> PlannedFile:
    return PlannedFile(repository=file.repository, filename=file.filename, size_bytes=size_bytes)


def _access(repository: str) -> str:
    return (
        f"accept the licence at https://huggingface.co/{repository} while logged in, then run `hf auth login` on this "
        "machine"
    )


def _is_gated(repository: str) -> bool:
    own = (variant for variant in VARIANTS.values() if variant.dit_file and variant.dit_file.repository == repository)
    return any(variant.gated for variant in own)


def _say(component: WeightsComponent) -> str:
    return {"dit": "DiT", "autoencoder": "autoencoder", "text_encoder": "text encoder"}[component]


def _not_found(variant: Variant, component: WeightsComponent, looked: list[str], rejected: list[str]) -> str:
    files = {
        "dit": variant.dit_file,
        "autoencoder": variant.autoencoder_file,
        "text_encoder": variant.text_encoder_files,
    }
    remote = files[component]
    names = ", ".join(_file_names(variant, component))
    parts = [f"found no weights of {variant.name}'s {_say(component)}: looked for {names} in {' and in '.join(looked)}"]
    if rejected:
        parts.append(f"did not take {'; '.join(rejected[:3])}")
    if remote is not None:
        gated = f" ({_access(remote.repository)})" if _is_gated(remote.repository) else ""
        parts.append(
            f"give a path, or run `flux2 download {variant.name}` for {remote.filename} of {remote.repository}{gated}"
        )
    else:
        parts.append("give a path")
    return "; ".join(parts)
