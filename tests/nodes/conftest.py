"""The pack, loaded as ComfyUI loads it: by path, under a package name that is its path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# Helper modules lie beside the tests, which importlib mode does not put on the path.
sys.path.append(str(Path(__file__).parent))


def load_pack() -> ModuleType:
    """ComfyUI names a pack after its path, with the dots replaced, and runs its ``__init__.py``."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS  # the first thing ComfyUI asks for, and what loads the nodes
    return module


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    return load_pack()


@pytest.fixture
def host(pack, random_tiny_files, monkeypatch) -> ModuleType:
    """The pack's `nodes.host`, with random weights in place of the bundled ones and no folders."""
    module = sys.modules[f"{pack.__name__}.nodes.host"]
    monkeypatch.setattr(module, "bundled_path", lambda component: getattr(random_tiny_files, component))
    monkeypatch.setattr(module, "FALLBACK_MODELS_DIR", Path("no-models-here"))
    return module


@pytest.fixture
def nodes(pack, host):
    """Node classes by id."""
    return pack.NODE_CLASS_MAPPINGS


@pytest.fixture
def executor(nodes):
    from executor import Executor

    return Executor(nodes)
