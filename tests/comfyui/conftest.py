"""One real ComfyUI server for all tests of this folder.

They run when asked for: ``python -m pytest -m comfyui``. The first time, ComfyUI is installed into a cache folder
(`FLUX2_KIT_COMFYUI_CACHE`), which needs the network and takes minutes. Where that cannot be done they are skipped with
the reason, unless `FLUX2_KIT_REQUIRE_COMFYUI` is set: then they fail. Log and screenshots go to `FLUX2_KIT_ARTIFACTS`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Helper modules lie beside the tests, which importlib mode does not put on the path.
sys.path.append(str(Path(__file__).parent))

HERE = Path(__file__).parent
REQUIRE_VARIABLE = "FLUX2_KIT_REQUIRE_COMFYUI"
ARTIFACTS_VARIABLE = "FLUX2_KIT_ARTIFACTS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Folder for what a person may want to look at afterwards."""
    folder = Path(os.environ.get(ARTIFACTS_VARIABLE) or HERE / "artifacts").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def installation():
    from comfyui_install import UnavailableError, install

    try:
        if importlib.util.find_spec("websocket") is None:
            raise UnavailableError('websocket-client is not installed: pip install -e ".[test-comfyui]"')
        return install()
    except UnavailableError as error:
        if os.environ.get(REQUIRE_VARIABLE):
            pytest.fail(f"no ComfyUI: {error}")
        pytest.skip(f"no ComfyUI: {error}")


@pytest.fixture(scope="session")
def server(installation, artifacts, tmp_path_factory):
    from comfyui_server import running_server

    with running_server(installation, tmp_path_factory.mktemp("comfyui"), artifacts / "server.log") as running:
        yield running
