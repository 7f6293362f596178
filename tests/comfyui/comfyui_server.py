"""A running ComfyUI server, and a client for its HTTP and websocket interface."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfyui_install import ROOT, Installation
from PIL import Image

API = dict[str, dict[str, Any]]
PACK_FOLDER = "flux2-kit"
"""Name of the pack in custom_nodes."""
START_TIMEOUT = 180
RUN_TIMEOUT = 300
"""Seconds, on a machine that has other things to do."""
TEXT_EVENT, PREVIEW_EVENT = 3, 4
"""Binary messages: text on a node; a picture with metadata."""
PROBE = '''\
"""Tells which of the pack's networks are in memory, and what ComfyUI knows of them."""

import gc

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/probe/networks")
async def networks(request):
    import torch

    counts = {}
    for thing in gc.get_objects():
        # type() asks no one; isinstance would wake every lazy proxy.
        kind = type(thing)
        is_network = issubclass(kind, torch.nn.Module) or kind.__name__ == "TextEncoder"
        if is_network and "flux2-kit" in kind.__module__:
            counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
    return web.json_response(counts)


@PromptServer.instance.routes.get("/probe/loaded")
async def loaded(request):
    import comfy.model_management

    models = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    return web.json_response({type(model.model).__name__: model.loaded_size() for model in models})


@PromptServer.instance.routes.get("/probe/flags")
async def flags(request):
    return web.json_response(PromptServer.instance.prompt_queue.get_flags(reset=False))
'''


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture that the server sent while a node ran."""

    node_id: str
    image: Image.Image


@dataclass(kw_only=True)
class RunResult:
    """What the websocket told about one queued prompt."""

    prompt_id: str
    status: str = ""
    """``success``, ``error`` or ``interrupted``."""
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    """(node id, line)."""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """UI outputs by node id, out of the history."""

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.messages if name == kind]

    @property
    def cached(self) -> set[str]:
        """Ids of nodes that were not run, since nothing of theirs had changed."""
        return {node_id for data in self.of_type("execution_cached") for node_id in data["nodes"]}

    @property
    def executed(self) -> list[str]:
        """Ids of nodes that ran, in order."""
        return [data["node"] for data in self.of_type("executing") if data["node"] is not None]

    @property
    def error(self) -> dict[str, Any]:
        """The message of the node that failed."""
        (error,) = self.of_type("execution_error")
        return error

    def steps(self, node_id: str) -> list[int]:
        """Values of a node's progress bar, in order."""
        return [data["value"] for data in self.of_type("progress") if data["node"] == node_id]

    def text(self, node_id: str) -> list[str]:
        """Lines that were shown on a node."""
        return [line for shown_on, line in self.texts if shown_on == node_id]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers."""

    url: str
    base: Path
    """Its folder, with input, output and models in it."""
    log: Path

    def get(self, path: str) -> bytes:
        """Body of an answer with status 200."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, data: Any) -> tuple[int, Any]:
        """(HTTP status, JSON of the answer or None)."""
        return self._send(path, json.dumps(data).encode(), "application/json")

    def upload_image(self, name: str, image: Image.Image) -> str:
        """Puts a picture into the input folder as the page does; returns the name for Load Image."""
        content, boundary = io.BytesIO(), uuid.uuid4().hex
        image.save(content, format="PNG")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: image/png\r\n\r\n"
        body = head.encode() + content.getvalue() + f"\r\n--{boundary}--\r\n".encode()
        status, answer = self._send("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        assert status == 200, (status, answer)
        return "/".join(part for part in (answer["subfolder"], answer["name"]) if part)

    def queue(self, prompt: API, client_id: str = "", targets: list[str] | None = None) -> tuple[int, Any]:
        """Queues without waiting: (200, with ``prompt_id``) or (400, with ``error`` and ``node_errors``).

        Args:
            targets: ids of the output nodes to run, None for all.
        """
        data = {"prompt": prompt, "client_id": client_id}
        if targets is not None:
            data["partial_execution_targets"] = targets
        return self.post("/prompt", data)

    def run(self, prompt: API, on_message: Callable[[RunResult], None] | None = None) -> RunResult:
        """Queues and follows on the websocket until it has ended, in whatever way.

        Args:
            on_message: called after every message with what has come so far.
        """
        import websocket

        client_id = uuid.uuid4().hex
        connection = websocket.create_connection(
            f"{self.url.replace('http', 'ws')}/ws?clientId={client_id}", timeout=RUN_TIMEOUT
        )
        with contextlib.closing(connection):
            flags = {"supports_preview_metadata": True}
            connection.send(json.dumps({"type": "feature_flags", "data": flags}))
            status, answer = self.queue(prompt, client_id)
            assert status == 200, answer
            result = RunResult(prompt_id=answer["prompt_id"])
            while not _read_message(connection.recv(), result):
                if on_message is not None:
                    on_message(result)
        history = self.get_json(f"/history/{result.prompt_id}")[result.prompt_id]
        result.outputs = history["outputs"]
        return result

    def images(self, result: RunResult, node_id: str) -> list[Image.Image]:
        """The pictures that a node showed, fetched as the page does."""
        shown = []
        for entry in result.outputs[node_id]["images"]:
            query = {name: entry[name] for name in ("filename", "subfolder", "type")}
            image = Image.open(io.BytesIO(self.get(f"/view?{urllib.parse.urlencode(query)}")))
            shown.append(image.convert("RGB"))
        return shown

    def free(self, **flags: bool) -> None:
        """Posts to ``/free``, and returns when the server has taken it.

        The thread that runs prompts misses what is set while it collects garbage after a prompt: it would sleep on
        until the next prompt. Whatever is set wakes it, so it is set again.
        """
        deadline = time.monotonic() + 60
        while True:
            assert self.post("/free", flags)[0] == 200
            for _ in range(10):
                time.sleep(0.1)
                if not self.get_json("/probe/flags"):
                    return
            assert time.monotonic() < deadline, "the server does not take /free"

    def forgets(self, what: Callable[[], dict[str, int]]) -> bool:
        """Whether there is nothing left of something soon: garbage is collected after `free` was taken."""
        deadline = time.monotonic() + 20
        while what() and time.monotonic() < deadline:
            time.sleep(0.2)
        return what() == {}

    def loaded(self) -> dict[str, int]:
        """What ComfyUI counts as loaded: bytes on the device, by class name."""
        return self.get_json("/probe/loaded")

    def networks(self) -> dict[str, int]:
        """How many of the pack's networks and layers are in the server's memory, by class name."""
        return self.get_json("/probe/networks")

    def _send(self, path: str, body: bytes, content_type: str) -> tuple[int, Any]:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        return status, json.loads(content) if content else None


def _read_message(message: str | bytes, result: RunResult) -> bool:
    """Files one message; True when the prompt has ended and its history is written."""
    if isinstance(message, bytes):
        (event,), content = struct.unpack(">I", message[:4]), message[4:]
        if event in (TEXT_EVENT, PREVIEW_EVENT):
            (length,), rest = struct.unpack(">I", content[:4]), content[4:]
            head, body = rest[:length].decode(), rest[length:]
            if event == TEXT_EVENT:
                result.texts.append((head, body.decode()))
            else:
                image = Image.open(io.BytesIO(body)).convert("RGB")
                result.previews.append(Preview(node_id=json.loads(head)["node_id"], image=image))
        return False
    found = json.loads(message)
    kind, data = found["type"], found["data"]
    if data.get("prompt_id", result.prompt_id) != result.prompt_id:
        return False
    result.messages.append((kind, data))
    if kind in ("execution_success", "execution_error", "execution_interrupted"):
        result.status = kind.removeprefix("execution_")
    # Sent after the history was written; what a node sends comes before.
    return kind == "executing" and data["node"] is None and bool(result.status)


@contextlib.contextmanager
def running_server(installation: Installation, base: Path, log: Path) -> Iterator[Server]:
    """Starts a server on a free port with the pack in its custom_nodes, and ends it.

    Args:
        base: an empty folder for everything that it reads and writes.
        log: file for what it prints.
    """
    for folder in ("custom_nodes", "input", "output", "user", "models/loras"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    (base / "custom_nodes" / "probe.py").write_text(PROBE, encoding="utf-8")
    port = _free_port()
    server = Server(url=f"http://127.0.0.1:{port}", base=base, log=log)
    command = [*installation.command, "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
    command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base}/user/comfyui.db"]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=base, env=_environment())
        try:
            _wait_until_up(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    # The tests' own environment must not reach into the server's.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {"OMP_NUM_THREADS": "1", **kept, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_until_up(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            server.get("/queue")
            return
        time.sleep(0.2)
    tail = "\n".join(server.log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])
    raise RuntimeError(f"the server did not start (exit status {process.poll()}); its log ends with:\n{tail}")
