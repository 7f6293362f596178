"""A trained LoRA gives ComfyUI's own FLUX.2 the velocity that it gives ours, in every dialect that ComfyUI reads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from comfyui_install import ROOT
from lora_scenarios import CASES

SCRIPT = Path(__file__).with_name("lora_scenarios.py")


@pytest.fixture(scope="module")
def failures(installation, tmp_path_factory) -> dict[str, str]:
    """What went wrong, by case."""
    folder = tmp_path_factory.mktemp("loras")
    command = [*installation.interpreter, SCRIPT, installation.comfyui, ROOT, folder]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_comfyui_computes_the_same(failures, name):
    assert name not in failures, failures[name]
