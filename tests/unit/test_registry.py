"""What ComfyUI's registry reads: metadata, the icon, and which files are left out of its archive."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
IGNORED = (REPOSITORY / ".comfyignore").read_text(encoding="utf-8").split()
USED = [
    *("__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "nodes", "flux2_core", "training"),
    *("web", "locales", "example_workflows"),
]


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """The table ``[tool.comfy]``."""
    block = PROJECT.split("[tool.comfy]\n")[1].split("\n\n")[0]
    return dict(re.findall(r'^([\w-]+) = "(.+)"$', block, re.MULTILINE))


def test_the_metadata_is_complete(table):
    assert set(table) == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    assert table["DisplayName"] == "FLUX.2 Kit" and re.fullmatch(r">=\d+\.\d+\.\d+", table["requires-comfyui"])
    repository = re.search(r'^Repository = "(https://.+)"$', PROJECT, re.MULTILINE)
    assert repository is not None and table["Icon"].startswith(f"{repository[1]}/")


def test_the_icon_is_a_small_square_of_our_own(table):
    path = REPOSITORY / table["Icon"].split("/main/")[1]
    text = path.read_text(encoding="utf-8")
    assert re.search(r'<svg [^>]*width="400" height="400"', text) and len(text) < 10_000
    assert "<image" not in text and "href" not in text and "<script" not in text


def test_only_what_users_do_not_need_is_left_out():
    for line in IGNORED:
        assert line.startswith("/"), f"{line} would match in every folder, as docs/ does in web/docs/"
        assert (REPOSITORY / line[1:]).exists(), f"{line} is nowhere"
    ignored = {line.strip("/") for line in IGNORED}
    assert not ignored & set(USED)
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    kept = {name.split("/")[0] for name in listed.stdout.splitlines()} - ignored
    assert kept - {".comfyignore"} == set(USED)
