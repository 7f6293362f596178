"""ComfyUI's own memory management makes our networks leave the device, and others for ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from comfyui_install import ROOT
from memory_scenarios import SCENARIOS

SCRIPT = Path(__file__).with_name("memory_scenarios.py")


@pytest.fixture(scope="module")
def failures(installation) -> dict[str, str]:
    """What went wrong, by scenario."""
    command = [*installation.interpreter, SCRIPT, installation.comfyui, ROOT]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_memory_is_shared(failures, name):
    assert name not in failures, failures[name]
