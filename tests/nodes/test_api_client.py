"""``example_workflows/api/run.py`` against a small server that answers as ComfyUI does."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

FOLDER = Path(__file__).parents[2] / "example_workflows"
TINY = FOLDER / "api" / "text_to_image_tiny.json"
PICTURE = b"\x89PNG a picture"


class FakeServer(ThreadingHTTPServer):
    """Runs one workflow at a time, with a step for each event that a test gives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.prompts: list[dict[str, Any]] = []
        self.posted: list[tuple[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.refusal: dict[str, Any] | None = None
        self.node_errors: dict[str, Any] = {}
        self.has_websocket, self.is_endless = True, False
        images = [{"filename": "tiny_00001_.png", "subfolder": "flux2_kit", "type": "output"}]
        preview = [{"filename": "p.png", "subfolder": "", "type": "temp"}]
        self.entry: dict[str, Any] = {
            "status": {"status_str": "success", "messages": []},
            "outputs": {"7": {"images": preview}, "8": {"images": images}},
        }
        self.history: dict[str, Any] = {}
        self.queued = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is nothing to tell; what is wrong with its requests, it is told itself."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/ws" and self.server.has_websocket:
            self._websocket()
        elif parts.path.startswith("/history/"):
            if not self.server.has_websocket:
                self._finish()
            self._answer(200, self.server.history)
        elif parts.path == "/queue":
            self._answer(200, {"queue_running": [[0, "id-1", {}]], "queue_pending": []})
        elif parts.path == "/view":
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            assert query == {"filename": "tiny_00001_.png", "subfolder": "flux2_kit", "type": "output"}
            self._answer(200, PICTURE)
        else:
            self._answer(404, b"not found")

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/prompt":
            self.server.posted.append((self.path, content))
            self._answer(200, b"")
        elif self.server.refusal is not None:
            self._answer(400, self.server.refusal)
        else:
            self.server.prompts.append(content["prompt"])
            self._answer(200, {"prompt_id": "id-1", "number": 1, "node_errors": self.server.node_errors})
            self.server.queued.set()

    def _websocket(self) -> None:
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.wfile.write(frame(9, b"ping") + frame(2, b"\0" * 70000))
        assert self.rfile.read(10) == bytes([0x8A, 0x84, 0, 0, 0, 0]) + b"ping"
        self.server.queued.wait(10)
        for event in self.server.events:
            data = frame(1, json.dumps(event).encode())
            self.wfile.write(data[:3])  # a frame may arrive in pieces
            self.wfile.flush()
            time.sleep(0.01)
            self.wfile.write(data[3:])
        while self.server.is_endless:
            time.sleep(0.01)
        self._finish()
        self.wfile.write(frame(1, b'{"type": "execution_success", "data": {"prompt_id": "id-1"}}'))
        self.close_connection = True

    def _finish(self) -> None:
        self.server.history["id-1"] = self.server.entry

    def _answer(self, code: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def frame(opcode: int, content: bytes) -> bytes:
    if len(content) < 126:
        return bytes([0x80 | opcode, len(content)]) + content
    if len(content) < 2**16:
        return struct.pack("!BBH", 0x80 | opcode, 126, len(content)) + content
    return struct.pack("!BBQ", 0x80 | opcode, 127, len(content)) + content


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("api_client", FOLDER / "api" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(client, monkeypatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(client, "POLL_S", 0.05)
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.is_endless = False
        server.shutdown()
        thread.join()


def options(server: FakeServer, tmp_path: Path, *more: str) -> list[str]:
    return [str(TINY), "--server", server.address, "--output_dir", str(tmp_path / "out"), *more]


def event(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {"prompt_id": "id-1", **data}}


def test_a_changed_workflow_is_queued_and_its_pictures_saved(client, server, tmp_path, capsys):
    server.events = [
        {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 3}}}},
        event("executing", node="6"),
        event("progress", node="6", value=1, max=20),
        event("progress", node="6", value=1, max=20),
        {"type": "executing", "data": {"prompt_id": "another", "node": "1"}},
        event("executing", node=None),
        event("of the future", text="x" * 300),
    ]
    more = ("--prompt", "a small green ring", "--seed", "7", "--set", "6.num_steps=4", "6.cfg_scale=2.5")
    assert client.main(options(server, tmp_path, *more, "--set", "8.filename_prefix=a=b")) == 0
    (prompt,) = server.prompts
    wanted = json.loads(TINY.read_text())
    wanted["4"]["inputs"]["prompt"] = "a small green ring"
    wanted["6"]["inputs"] |= {"seed": 7, "num_steps": 4, "cfg_scale": 2.5}
    wanted["8"]["inputs"]["filename_prefix"] = "a=b"
    assert prompt == wanted
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out' / 'tiny_00001_.png'}\n"
    lines = ["queued as id-1", "3 in the queue", "node 6 (Flux2KitSample)", "node 6 (Flux2KitSample): 1 of 20"]
    assert told.err.splitlines() == lines
    assert client.main(options(server, tmp_path)) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "tiny_00001_.png": PICTURE,
        "tiny_00001__2.png": PICTURE,
    }


def test_it_works_without_a_websocket(client, server, tmp_path, capsys):
    server.has_websocket = False
    assert client.main(options(server, tmp_path)) == 0
    assert capsys.readouterr().out.endswith("tiny_00001_.png\n")


@pytest.mark.parametrize(
    ("name", "node_id"),
    [("reference_edit_tiny", "5"), ("multi_reference_edit_tiny", "6"), ("train_lora_tiny", None)],
)
def test_the_prompt_of_the_saved_picture_is_changed(client, name, node_id):
    workflow = client.read_workflow(FOLDER / "api" / f"{name}.json")
    before = json.loads(json.dumps(workflow))
    client.change(workflow, "new", None, [])
    changed = [key for key in workflow if workflow[key] != before[key]]
    assert [workflow[key]["class_type"] for key in changed] == ["Flux2KitEncodePrompt"]
    assert node_id in (None, *changed)


def test_a_prompt_replaces_a_linked_one(client):
    workflow = client.read_workflow(FOLDER / "api" / "text_to_image_dev.json")
    client.change(workflow, "new", 5, [])
    texts = [node["inputs"]["prompt"] for node in workflow.values() if "prompt" in node["inputs"]]
    assert texts == ["new"] and 5 in [node["inputs"].get("seed") for node in workflow.values()]


def test_a_native_workflow_is_changed_as_well(client):
    workflow = {
        "1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["9", 0]}},
        "3": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["4", 0], "guider": ["5", 0]}},
        "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "5": {"class_type": "BasicGuider", "inputs": {"conditioning": ["6", 0]}},
        "6": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["7", 0], "guidance": 4}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "old", "clip": ["8", 0]}},
    }
    client.change(workflow, "new", 2, [])
    assert workflow["7"]["inputs"]["text"] == "new" and workflow["4"]["inputs"]["noise_seed"] == 2


def test_errors_of_nodes_are_shown(client, server, tmp_path, capsys):
    wrong = "the width is 100 px; it must be a multiple of 16"
    custom = [
        {"type": "custom_validation_failed", "message": "Custom validation failed", "details": f"{name} - {wrong}"}
        for name in ("width", "height")
    ]
    other = {"type": "value_bigger_than_max", "message": "Value 99 bigger than max of 64", "details": "num_images"}
    server.refusal = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"},
        "node_errors": {"6": {"errors": [*custom, other], "class_type": "Flux2KitSample"}},
    }
    assert client.main(options(server, tmp_path)) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: the server answers HTTP 400: Prompt outputs failed validation",
        f"  node 6 (Flux2KitSample): {wrong}",
        "  node 6 (Flux2KitSample): Value 99 bigger than max of 64: num_images",
    ]
    assert not (tmp_path / "out").exists()


def test_a_part_of_a_workflow_is_no_success(client, server, tmp_path, capsys):
    """The server runs what it can and answers 200, where only some of the outputs can be made."""
    found = [{"type": "custom", "message": "Custom validation failed", "details": "dit_name - no such file"}]
    server.node_errors = {"6": {"errors": found * 2, "class_type": "Flux2KitTrainLoRA"}}
    assert client.main(options(server, tmp_path)) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: the server can run a part of the workflow only, so it was cancelled:",
        "  node 6 (Flux2KitTrainLoRA): no such file",
    ]
    assert server.posted == [("/interrupt", {"prompt_id": "id-1"})] and not (tmp_path / "out").exists()


def test_texts_of_nodes_are_shown(client, server, tmp_path, capsys):
    server.entry["outputs"]["9"] = {"text": ["style: 6 steps", "loss 0.5"]}
    assert client.main(options(server, tmp_path)) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == ["node 9: style: 6 steps", "node 9: loss 0.5"]


def test_a_failure_on_the_way_is_shown(client, server, tmp_path, capsys):
    failed = {"node_id": "6", "node_type": "Flux2KitSample", "exception_message": "no guidance embedder\n"}
    server.entry = {"status": {"status_str": "error", "messages": [["execution_error", failed]]}, "outputs": {}}
    assert client.main(options(server, tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: node 6 (Flux2KitSample): no guidance embedder"


def test_ctrl_c_stops_the_server_s_work(client, server, tmp_path, monkeypatch, capsys):
    server.is_endless = True
    server.events = [event("executing", node="6")]

    def press(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "describe_event", press)
    assert client.main(options(server, tmp_path)) == 130
    assert server.posted == [("/interrupt", {"prompt_id": "id-1"})]
    client.cancel(client.Server(server.address), "id-2")
    assert server.posted[1:] == [("/queue", {"delete": ["id-2"]})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(FOLDER / "text_to_image_tiny.json")], r"is a workflow of the page; export it with Workflow > Export"),
        ([str(FOLDER / "api" / "run.py")], "is no JSON"),
        ([str(TINY), "--set", "6.nothing=1"], r"--set 6.nothing=1: there is no such input; write NODE.INPUT=VALUE"),
        ([str(TINY), "--server", "ftp://host"], "give an address such as http://127.0.0.1:8188"),
        ([str(TINY), "--server", "127.0.0.1:9"], r"no answer from http://127.0.0.1:9 \(.*\); is ComfyUI running there"),
        (["gone.json"], "No such file"),
    ],
)
def test_what_cannot_be_done_is_said(client, arguments, message, capsys):
    assert client.main(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert re.search(message, told)


def test_it_needs_nothing_but_python():
    text = (FOLDER / "api" / "run.py").read_text(encoding="utf-8")
    names = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert names <= set(sys.stdlib_module_names)
