"""Queues a workflow on a ComfyUI server and saves its pictures. Needs Python 3.10 and nothing else.

    python run.py text_to_image_tiny.json --prompt "a small green ring" --seed 7
    python run.py text_to_image_klein-4b.json --server http://192.168.1.5:8188 --set 5.width=1360 5.height=768

The workflow is an API JSON: one of this folder, or one of your own from Workflow > Export (API).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import ssl
import struct
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib import error, parse, request

TEXT_INPUTS = ("prompt", "text")
SEED_INPUTS = ("seed", "noise_seed")
LINKS_TO_TEXT = ("positive", "conditioning")
SAVING = ("SaveImage",)
ENDS = ("execution_success", "execution_error", "execution_interrupted")
REQUEST_TIMEOUT_S = 30
POLL_S = 2.0
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

Workflow = dict[str, dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 when the pictures are saved, 1 when something was refused or failed."""
    options = read_options(arguments)
    try:
        workflow = read_workflow(options.workflow)
        change(workflow, options.prompt, options.seed, options.set)
        for path in run(Server(options.server), workflow, options.output_dir):
            print(path)
    except (ValueError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("stopped; the server was told to stop as well", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Queues a workflow on a ComfyUI server and saves its pictures.", allow_abbrev=False
    )
    parser.add_argument("workflow", type=Path, help="API JSON of a workflow")
    parser.add_argument("--prompt", help="text that the saved pictures are made from, in place of the workflow's")
    parser.add_argument("--seed", type=int, help="seed of the saved pictures, in place of the workflow's")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="any other input, such as 5.num_steps=28; the value is JSON, or else text",
    )
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="address of ComfyUI (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def read_workflow(path: Path) -> Workflow:
    """Nodes by id.

    Raises:
        ValueError: it is no API JSON.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise ValueError(f"{path} is no JSON: {failure}") from None
    if isinstance(workflow, dict) and "nodes" in workflow:
        raise ValueError(f"{path} is a workflow of the page; export it with Workflow > Export (API)")
    if not isinstance(workflow, dict) or not all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)
        for node in workflow.values()
    ):
        raise ValueError(f"{path} is no API JSON of a workflow; export one with Workflow > Export (API)")
    return workflow


def change(workflow: Workflow, prompt: str | None, seed: int | None, settings: list[str]) -> None:
    """Changes inputs in place.

    Raises:
        ValueError: there is nothing to change.
    """
    saving = [node_id for node_id, node in workflow.items() if node["class_type"] in SAVING]
    if prompt is not None:
        set_nearest(
            workflow, [text for node_id in saving for text in texts_behind(workflow, node_id)], TEXT_INPUTS, prompt
        )
    if seed is not None:
        set_nearest(workflow, saving, SEED_INPUTS, seed)
    for setting in settings:
        target, _, text = setting.partition("=")
        node_id, _, name = target.rpartition(".")
        if "=" not in setting or name not in workflow.get(node_id, {}).get("inputs", {}):
            known = ", ".join(f"{key}.{name}" for key, node in workflow.items() for name in node["inputs"])
            raise ValueError(f"--set {setting}: there is no such input; write NODE.INPUT=VALUE with one of {known}")
        try:
            workflow[node_id]["inputs"][name] = json.loads(text)
        except ValueError:
            workflow[node_id]["inputs"][name] = text


def texts_behind(workflow: Workflow, node_id: str) -> list[str]:
    """Nodes that the text of a saved picture comes from: what the nearest sampler has as its positive prompt."""
    for node in upstream(workflow, node_id):
        links = [workflow[node]["inputs"].get(name) for name in LINKS_TO_TEXT]
        if found := [link[0] for link in links if is_link(link)]:
            return found
    return []


def set_nearest(workflow: Workflow, starts: list[str], names: tuple[str, ...], value: Any) -> None:
    """Sets the first input of one of these names that lies before each of the nodes."""
    changed = False
    for start in starts:
        for node_id in upstream(workflow, start):
            inputs = workflow[node_id]["inputs"]
            if name := next((name for name in names if name in inputs), None):
                inputs[name], changed = value, True
                break
    if not changed:
        raise ValueError(f"no {SAVING[0]} node has a {' or '.join(names)} before it; use --set NODE.INPUT=VALUE")


def upstream(workflow: Workflow, node_id: str) -> list[str]:
    """A node and all that it depends on, the nearest first."""
    found = [node_id]
    for current in found:
        links = [value[0] for value in workflow[current]["inputs"].values() if is_link(value)]
        found += [link for link in links if link in workflow and link not in found]
    return list(dict.fromkeys(found))


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


class Server:
    """A ComfyUI server.

    Args:
        address: such as ``http://127.0.0.1:8188``; the scheme may be left out.
    """

    def __init__(self, address: str) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        self.client_id = uuid.uuid4().hex
        if parse.urlsplit(self.address).scheme not in ("http", "https"):
            raise ValueError(f"--server is {address}; give an address such as http://127.0.0.1:8188")

    def get(self, path: str, **query: str) -> bytes:
        return self._send(request.Request(f"{self.address}{path}{'?' if query else ''}{parse.urlencode(query)}"))

    def post(self, path: str, content: Any) -> bytes:
        headers = {"Content-Type": "application/json"}
        return self._send(request.Request(f"{self.address}{path}", json.dumps(content).encode(), headers))

    def _send(self, message: request.Request) -> bytes:
        try:
            with request.urlopen(message, timeout=REQUEST_TIMEOUT_S) as response:
                return response.read()
        except error.HTTPError as failure:
            raise ValueError(describe_refusal(failure.code, failure.read())) from None
        except (error.URLError, TimeoutError) as failure:
            reason = getattr(failure, "reason", failure)
            raise ValueError(f"no answer from {self.address} ({reason}); is ComfyUI running there?") from None

    def events(self) -> Iterator[dict[str, Any] | None]:
        """What the server tells of the work for this client; None where it was silent for `POLL_S` seconds.

        It ends where the server cannot be listened to. A WebSocket (RFC 6455), of which only reading is needed.
        """
        parts = parse.urlsplit(self.address)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((host, port), timeout=REQUEST_TIMEOUT_S) as plain:
                secure = parts.scheme == "https"
                stream = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
                yield from read_events(stream, parts, self.client_id)
        except OSError:
            return


def read_events(stream: socket.socket, parts: parse.SplitResult, client_id: str) -> Iterator[dict[str, Any] | None]:
    """Opens the WebSocket and reads its messages of text."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {parts.path}/ws?clientId={client_id} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
    ]
    stream.sendall("\r\n".join([*lines, "", ""]).encode())
    reader = Reader(stream)
    if b" 101 " not in reader.take_until(b"\r\n\r\n").split(b"\r\n")[0]:
        return
    stream.settimeout(POLL_S)
    yield None  # it listens: only now may the work begin
    text = b""
    while True:
        try:
            opcode, is_last, content = reader.take_frame()
        except TimeoutError:
            yield None
            continue
        if opcode == 8:
            return
        if opcode == 9:
            # A pong; what a client sends is masked, here with zeros.
            stream.sendall(struct.pack("!BB4x", 0x8A, 0x80 | len(content)) + content)
        elif opcode in (0, 1):
            text += content
            if is_last:
                message, text = json.loads(text), b""
                yield message


class Reader:
    """Reads whole frames: what came before a timeout is kept for the next call."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.buffer = b""

    def take_until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            self._receive()
        head, _, self.buffer = self.buffer.partition(end)
        return head

    def take_frame(self) -> tuple[int, bool, bytes]:
        """(opcode, whether the message ends, content)."""
        self._fill(2)
        length = self.buffer[1] & 0x7F
        form = {126: "!H", 127: "!Q"}.get(length, "!0s")
        start = 2 + struct.calcsize(form)
        self._fill(start)
        length = struct.unpack(form, self.buffer[2:start])[0] if length >= 126 else length
        self._fill(start + length)
        first, content = self.buffer[0], self.buffer[start : start + length]
        self.buffer = self.buffer[start + length :]
        return first & 0x0F, bool(first & 0x80), content

    def _fill(self, size: int) -> None:
        while len(self.buffer) < size:
            self._receive()

    def _receive(self) -> None:
        received = self.stream.recv(65536)
        if not received:
            raise ConnectionError("the server has closed the connection")
        self.buffer += received


def run(server: Server, workflow: Workflow, output_dir: Path) -> list[Path]:
    """Queues, waits and saves; returns the paths of the pictures.

    Raises:
        ValueError: the server refuses the workflow, or fails at it.
    """
    events = server.events()
    next(events, None)
    answer = json.loads(server.post("/prompt", {"prompt": workflow, "client_id": server.client_id}))
    prompt_id = answer["prompt_id"]
    if answer.get("node_errors"):
        cancel(server, prompt_id)
        lines = describe_node_errors(answer["node_errors"])
        raise ValueError("\n".join(["the server can run a part of the workflow only, so it was cancelled:", *lines]))
    print(f"queued as {prompt_id}", file=sys.stderr)
    try:
        entry = wait(server, events, workflow, prompt_id)
    except KeyboardInterrupt:
        cancel(server, prompt_id)
        raise
    if (entry.get("status") or {}).get("status_str") == "error":
        raise ValueError(describe_failure(entry["status"]["messages"]))
    outputs = entry.get("outputs", {})
    for node_id, output in outputs.items():
        for text in output.get("text", []):
            print(f"node {node_id}: {text}", file=sys.stderr)
    return save(server, outputs, output_dir)


def wait(server: Server, events: Iterator[dict[str, Any] | None], workflow: Workflow, prompt_id: str) -> dict[str, Any]:
    """Shows progress until the work is done; returns its entry in the server's history."""
    shown = ""
    while True:
        event = next(events, None)
        data = (event or {}).get("data") or {}
        if event is None or event["type"] in ENDS:
            history = json.loads(server.get(f"/history/{prompt_id}"))
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1 if event else POLL_S / 4)
        line = describe_event(event, workflow) if data.get("prompt_id") in (None, prompt_id) else ""
        if line and line != shown:
            print(line, file=sys.stderr)
            shown = line


def describe_event(event: dict[str, Any] | None, workflow: Workflow) -> str:
    """A line for people; empty for what they need not know."""
    kind, data = (event["type"], event["data"]) if event else ("", {})
    node = data.get("node")
    name = f"node {node} ({workflow[node]['class_type']})" if node in workflow else ""
    if kind == "status":
        num_left = data.get("status", {}).get("exec_info", {}).get("queue_remaining", 0)
        return f"{num_left} in the queue" if num_left > 1 else ""
    if kind == "executing":
        return name
    if kind == "progress" and name:
        return f"{name}: {data['value']} of {data['max']}"
    return ""


def cancel(server: Server, prompt_id: str) -> None:
    """Takes the work out of the queue, or stops it where it runs; other people's work goes on."""
    queue = json.loads(server.get("/queue"))
    if any(entry[1] == prompt_id for entry in queue.get("queue_running", [])):
        server.post("/interrupt", {"prompt_id": prompt_id})
    else:
        server.post("/queue", {"delete": [prompt_id]})


def save(server: Server, outputs: dict[str, Any], output_dir: Path) -> list[Path]:
    """Fetches pictures that the workflow saved, or else its previews; nothing is overwritten."""
    images = [image for output in outputs.values() for image in output.get("images", [])]
    images = [image for image in images if image.get("type") == "output"] or images
    if not images:
        raise ValueError("the workflow ran, but it has shown and saved no pictures")
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for image in images:
        content = server.get("/view", **{key: str(image.get(key, "")) for key in ("filename", "subfolder", "type")})
        name = Path(image["filename"].replace("\\", "/").rpartition("/")[2])
        path, number = output_dir / name, 1
        while path.exists():
            number += 1
            path = output_dir / f"{name.stem}_{number}{name.suffix}"
        path.write_bytes(content)
        paths.append(path)
    return paths


def describe_refusal(code: int, content: bytes) -> str:
    """The server's answer as lines: what is wrong with which node."""
    try:
        answer = json.loads(content)
        head = f"the server answers HTTP {code}: {answer['error']['message']}"
        return "\n".join([head, *describe_node_errors(answer.get("node_errors", {}))])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the server answers HTTP {code}: {content[:500].decode(errors='replace')}"


def describe_node_errors(node_errors: dict[str, Any]) -> list[str]:
    """A line for everything that is wrong with a node."""
    lines = []
    for node_id, found in node_errors.items():
        for each in found["errors"]:
            # One text for several inputs is said once, without the input's name.
            text = each["details"].partition(" - ")[2] or f"{each['message']}: {each['details']}"
            lines.append(f"  node {node_id} ({found['class_type']}): {text}")
    return list(dict.fromkeys(lines))


def describe_failure(messages: list[Any]) -> str:
    """Why the work has ended early."""
    for kind, data in messages:
        if kind == "execution_error":
            return f"node {data['node_id']} ({data['node_type']}): {data['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "the work was stopped on the server"
    return "the work failed, and the server does not say why"


if __name__ == "__main__":
    sys.exit(main())
