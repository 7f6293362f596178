"""Direction of imports, and what importing the core does to a process: nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flux2_kit
import pytest

ROOT = Path(next(iter(flux2_kit.__path__)))
ALLOWED = {
    "flux2_core": {"flux2_core"},
    "training": {"training", "flux2_core"},
    "nodes": {"nodes", "training", "flux2_core"},
}
HOST = {"comfy", "comfy_api", "comfy_execution", "execution", "folder_paths", "latent_preview", "nodes", "server"}
COMMAND_LINE = ("cli.py", "__main__.py", "_command.py")
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Level and dotted name of every import of a file, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


def target_package(path: Path, level: int, name: str) -> str:
    """The top-level package that a relative import leads to."""
    folder = path.relative_to(ROOT).parent.parts
    return (*folder[: len(folder) - level + 1], *name.split("."))[0]


def test_there_are_sources_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_from_nodes_to_training_to_core(path):
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]]
    targets = {target_package(path, level, name) for level, name in imports(path) if level}
    assert targets <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_inside_the_repository_are_relative(path):
    absolute = {name.split(".")[0] for level, name in imports(path) if not level}
    assert not absolute & {"flux2_kit", *ALLOWED}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] != "nodes"], ids=name_of)
def test_only_nodes_know_the_host(path):
    assert not {name.split(".")[0] for level, name in imports(path) if not level} & HOST


@pytest.mark.parametrize("path", [p for p in SOURCES if not p.name.endswith(COMMAND_LINE)], ids=name_of)
def test_the_library_neither_prints_nor_exits_nor_configures_logging(path):
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert not calls & {"print", "exit", "quit", "sys.exit", "os._exit", "logging.basicConfig"}


def test_the_check_of_directions_sees_a_wrong_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "flux2_core" / "deep" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from ...training import config\n    from ... import nodes\n    from ..dit import x\n"
    )
    targets = [target_package(path, level, name) for level, name in imports(path)]
    assert sorted(targets) == ["flux2_core", "nodes", "training"]


PROBE = """
import json, logging, os, random, sys, threading, warnings
import numpy, PIL.Image, torch.utils.checkpoint, einops, safetensors
def state():
    return {
        "environment": dict(os.environ),
        "logging": [repr(logging.root.handlers), logging.root.level, logging.root.manager.disable],
        "warnings": repr(warnings.filters),
        "dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), threading.active_count()],
        "determinism": [torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32],
        "generators": [torch.get_rng_state().sum().item(), repr(random.getstate())[:500]],
        "gradients": torch.is_grad_enabled(),
        "path": sys.path,
        "directory": os.getcwd(),
        "cuda": torch.cuda.is_initialized(),
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
    }
before = json.dumps(state())
import flux2_kit.flux2_core
bare = sorted(sys.modules)
import flux2_kit.flux2_core.pipeline
after = json.dumps(state())
before, after = json.loads(before), json.loads(after)
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "bare": bare,
    "pipeline": sorted(sys.modules),
}))
"""


@pytest.fixture(scope="module")
def fresh_interpreter() -> dict[str, list[str]]:
    """What changed, and which modules were loaded, by importing the core in a process of its own."""
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("entry", ["bare", "pipeline"])
def test_importing_the_core_loads_no_heavy_or_foreign_package(fresh_interpreter, entry):
    loaded = {name.split(".")[0] for name in fresh_interpreter[entry]}
    assert not loaded & {"transformers", "diffusers", "accelerate", "bitsandbytes", "peft", "huggingface_hub"}
    assert not loaded & HOST


@pytest.mark.parametrize("entry", ["bare", "pipeline"])
def test_importing_the_core_loads_no_training(fresh_interpreter, entry):
    loaded = {".".join(name.split(".")[:2]) for name in fresh_interpreter[entry]}
    assert "flux2_kit.flux2_core" in loaded
    assert "flux2_kit.training" not in loaded


def test_importing_the_core_changes_nothing(fresh_interpreter):
    assert fresh_interpreter["changed"] == []
