from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from caches import fill, listing, make_folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pictures are so small that threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("filled"))
    assert fill(listing(folder)) == (3, 4)
    return folder


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Path:
    """The pictures with their whole cache."""
    return shutil.copytree(filled_once, tmp_path / filled_once.name)
