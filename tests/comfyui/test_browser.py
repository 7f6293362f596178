"""ComfyUI's page in a real browser: what people see of the pack."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from comfyui_server import PACK_FOLDER, Server
from comfyui_workflows import (
    FOLDER,
    TEMPLATES,
    TINY_NAMES,
    asked_for,
    assert_shows,
    find,
    is_tiny,
    pack_file,
    prompt_behind,
    read_api,
)
from flux2_kit import NODE_CLASS_MAPPINGS
from PIL import Image

CHROMIUM_VARIABLE = "FLUX2_KIT_CHROMIUM"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
TIMEOUT = 120_000
"""Milliseconds, on a machine that has other things to do."""
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # otherwise the page opens with its list of templates
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
KNOWN_ERRORS = (
    r"404 (/api/userdata)?/user\.css$",
    r"404 /api/userdata\?dir=(workflows|subgraphs)",
    r"404 /api/userdata/comfy\.templates\.json$",
    r"404 /favicon\.ico$",
    r"TypeError: Cannot read properties of undefined \(reading 'id'\)\s+at onChange ",
    r"ComfyApp graph accessed before initialization",
)
"""What the page of ComfyUI 0.3.75 and 0.33 complains about when it loads, without any pack: files of a user who has
stored none yet, and its own order of doing things."""
HELP_PAGES = sorted(path.stem for path in pack_file("web", "docs").glob("*.md"))


@dataclass
class Window:
    """A tab of the browser, and what it complained about."""

    page: Any
    server: Server
    errors: list[str] = field(default_factory=list)
    """Console errors, exceptions, and answers of the server with an error status."""

    def open(self, query: str = "") -> None:
        self.errors.clear()
        self.page.goto(f"{self.server.url}/{query}", timeout=TIMEOUT)
        self.wait("window.app?.graph?.nodes && window.app.extensionManager")

    def open_template(self, name: str) -> None:
        """As a click on it in the list of templates does."""
        self.errors.clear()
        self.page.evaluate(
            """([name, source]) => fetch(`/api/workflow_templates/${source}/${name}.json`)
                .then(answer => answer.json())
                .then(workflow => app.loadGraphData(workflow, true, true, name, {openSource: 'template'}))""",
            [name, PACK_FOLDER],
        )
        self.wait_for_template(name)

    def open_address(self, name: str) -> None:
        """As somebody does who was sent the address of a template."""
        self.open("?" + urllib.parse.urlencode({"template": name, "source": PACK_FOLDER}))
        self.wait_for_template(name)

    def wait_for_template(self, name: str) -> None:
        num_nodes = len(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"])
        self.wait(f"window.app.graph.nodes.length === {num_nodes}")
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(600)  # the view moves there

    def wait(self, expression: str) -> None:
        self.page.wait_for_function(expression, timeout=TIMEOUT)

    def dialogs(self) -> list[str]:
        """Texts of the windows that lie over the graph."""
        return [dialog.inner_text() for dialog in self.page.get_by_role("dialog").all() if dialog.is_visible()]

    def run(self) -> None:
        """A click on Run."""
        self.page.get_by_test_id("queue-button").get_by_text("Run").click()

    def complaint(self) -> str:
        """What the page tells of errors, once it does: in a window, or since 2026 in a panel behind a button."""
        window, details = self.page.get_by_role("dialog"), self.page.get_by_role("button", name="View details")
        window.or_(details).first.wait_for(timeout=TIMEOUT)
        self.page.wait_for_timeout(500)
        if window.is_visible():
            return window.inner_text()
        details.click()
        self.page.wait_for_timeout(500)
        return self.page.locator("body").inner_text()

    def picture(self, url: str) -> Image.Image:
        """A picture that the page shows."""
        return Image.open(io.BytesIO(self.server.get(url.removeprefix(self.server.url)))).convert("RGB")

    def watch(self) -> None:
        self.page.on("console", lambda message: message.type == "error" and self.note(message))
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack or ''}"))
        self.page.on("response", lambda answer: answer.status >= 400 and self.note_answer(answer))

    def note(self, message: Any) -> None:
        # Outside of this machine nothing is asked for by us, and nothing is answered here: see `chromium`.
        if message.location["url"].startswith(self.server.url) and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def note_answer(self, answer: Any) -> None:
        if answer.url.startswith(self.server.url):
            self.errors.append(f"{answer.status} {answer.url}")

    def new_errors(self, *known: str) -> list[str]:
        plain = (error.replace(self.server.url, "") for error in self.errors)
        return [error for error in plain if not any(re.match(pattern, error) for pattern in (*KNOWN_ERRORS, *known))]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window and without the internet."""
    api = pytest.importorskip("playwright.sync_api", reason="no browser: playwright is not installed")
    found = (shutil.which(name) for name in CHROMIUM_NAMES)
    path = os.environ.get(CHROMIUM_VARIABLE) or next(filter(None, found), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM_NAMES)} is installed, and {CHROMIUM_VARIABLE} is not set")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


def open_window(chromium: Any, server: Server) -> Window:
    """A new tab with ComfyUI's settings for a user who has been there before."""
    assert server.post("/settings", SETTINGS)[0] == 200
    page = chromium.new_page(viewport={"width": 1800, "height": 1000})
    # ComfyUI's page asks its makers for news and Hugging Face for the sizes of missing models.
    page.route(lambda url: not url.startswith(server.url), answer_for_the_internet)
    window = Window(page=page, server=server)
    window.watch()
    return window


def answer_for_the_internet(route: Any) -> None:
    if "huggingface.co" in route.request.url:
        route.fulfill(status=200, headers={"Access-Control-Allow-Origin": "*", "Content-Length": "0"})
    else:
        route.abort()


@pytest.fixture(scope="module")
def tab(chromium, server) -> Iterator[Window]:
    """One tab for all tests: the page takes seconds to load."""
    opened = open_window(chromium, server)
    opened.open()
    yield opened
    opened.page.close()


@pytest.fixture
def window(tab) -> Iterator[Window]:
    """The tab, with nothing over the graph afterwards."""
    yield tab
    for _ in tab.dialogs():
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_timeout(300)


def test_the_page_opens_a_template_by_its_address(chromium, server):
    window = open_window(chromium, server)
    window.open_address("text_to_image_tiny")
    assert window.dialogs() == [] and window.new_errors() == []
    window.page.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens(window, artifacts, name):
    window.open_template(name)
    prompt = read_api(name)
    types = window.page.evaluate(
        "app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    )
    assert types == []
    if is_tiny(prompt):
        assert window.dialogs() == []
        assert window.page.evaluate("app.graph.nodes.filter(n => n.has_errors).map(n => n.type)") == []
    else:
        complaint = window.complaint()
        files = [
            value for node in prompt.values() for value in node["inputs"].values() if str(value).endswith("tensors")
        ]
        assert "Missing Models" in complaint and all(file in complaint for file in files)
        window.page.keyboard.press("Escape")
        window.page.wait_for_timeout(500)
    window.page.screenshot(path=artifacts / f"template-{name}.png")
    assert overlapping(window) == []
    queued = window.page.evaluate("app.graphToPrompt().then(result => result.output)")
    assert {node_id: (node["class_type"], node["inputs"]) for node_id, node in queued.items()} == {
        node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()
    }
    assert window.new_errors() == []


def test_a_workflow_from_before_inputs_were_added_opens_with_their_defaults(window):
    """Widget values are saved by position: what is new stands behind what was there."""
    name = "text_to_image_tiny"
    workflow, num_new = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), {"Flux2KitSample": 2}
    num_new |= {"Flux2KitLoadDiT": 1, "Flux2KitLoadTextEncoder": 1}
    for node in workflow["nodes"]:
        values = node["widgets_values"]
        del values[len(values) - num_new.get(node["type"], 0) :]
        node["inputs"] = [entry for entry in node["inputs"] if entry["name"] != "latent" or entry["link"]]
    window.page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'from before')", workflow)
    queued = window.page.evaluate("app.graphToPrompt().then(result => result.output)")
    inputs = {node_id: node["inputs"] for node_id, node in queued.items()}
    assert inputs == {node_id: node["inputs"] for node_id, node in read_api(name).items()}


def overlapping(window: Window) -> list[list[str]]:
    """Pairs of nodes that lie on each other as the page draws them."""
    return window.page.evaluate(
        """() => {
            const boxes = app.graph.nodes.map(node => [node.title, ...node.boundingRect])
            const pairs = []
            boxes.forEach(([a, ax, ay, aw, ah], index) => boxes.slice(index + 1).forEach(([b, bx, by, bw, bh]) => {
                if (ax < bx + bw && bx < ax + aw && ay < by + bh && by < ay + ah) pairs.push([a, b])
            }))
            return pairs
        }"""
    )


@pytest.mark.parametrize("name", [name for name in TINY_NAMES if not find(read_api(name), "Flux2KitTrainLoRA")])
def test_a_workflow_runs_from_the_page(window, artifacts, name):
    window.open_template(name)
    # Seeds of their own, so that the samplers run and show their progress.
    window.page.evaluate(
        "app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === 'seed').forEach(w => { w.value += 31 })"
    )
    window.run()
    window.wait("app.graph.nodes.filter(n => n.type === 'SaveImage').every(n => n.imgs?.length)")
    window.page.wait_for_timeout(1000)
    window.page.screenshot(path=artifacts / f"result-{name}.png")
    prompt = read_api(name)
    urls, texts = window.page.evaluate(
        """[
            Object.fromEntries(app.graph.nodes.map(n => [n.id, n.imgs?.map(image => image.src) ?? []])),
            Object.fromEntries(app.graph.nodes.map(n => [n.id, n.widgets?.map(w => String(w.value)) ?? []])),
        ]"""
    )
    for node_id in find(prompt, "SaveImage"):
        text = prompt_behind(prompt, node_id)
        assert_shows([window.picture(url) for url in urls[node_id]], asked_for(text or ""))
    # A line of text stands on every sampler, and the live preview where it has an autoencoder.
    for node_id in find(prompt, "Flux2KitSample"):
        assert any(text.startswith("tiny, 64x64, 20 steps") for text in texts[node_id])
        assert len(urls[node_id]) == ("ae" in prompt[node_id]["inputs"])
    assert overlapping(window) == []
    assert window.new_errors() == []


def test_an_error_is_shown_with_what_to_do(window, artifacts):
    window.open_template("text_to_image_tiny")
    window.page.evaluate(
        """() => {
            const node = app.graph.nodes.find(n => n.type === 'Flux2KitSample')
            node.disconnectInput(node.inputs.findIndex(input => input.name === 'negative'))
            node.widgets.find(w => w.name === 'cfg_scale').value = 3
        }"""
    )
    window.run()
    complaint = window.complaint()
    window.page.screenshot(path=artifacts / "error-on-the-page.png")
    assert "there is no negative prompt; give one" in complaint
    window.page.keyboard.press("Escape")


@pytest.mark.skipif(not HELP_PAGES, reason="the pack has no help pages")
def test_help_pages_open(window, artifacts):
    assert set(HELP_PAGES) == set(NODE_CLASS_MAPPINGS)
    window.errors.clear()
    for node_id in HELP_PAGES:
        window.page.evaluate(
            """type => {
                app.graph.clear()
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                app.canvas.selectNode(node)
                return app.extensionManager.command.execute('Comfy.Canvas.FitView')
            }""",
            node_id,
        )
        window.page.get_by_test_id("info-button").click()
        content = window.page.locator(".node-help-content")
        text = pack_file("web", "docs", f"{node_id}.md").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if re.fullmatch(r"[A-Z][\w ,.;:'-]{20,}", line))
        content.get_by_text(line[:60]).first.wait_for(timeout=TIMEOUT)
        pictures = "[...document.querySelectorAll('.node-help-content img')]"
        window.wait(f"{pictures}.every(image => image.complete)")
        assert window.page.evaluate(f"{pictures}.filter(image => !image.naturalWidth).map(image => image.src)") == []
        window.page.screenshot(path=artifacts / f"help-{node_id}.png")
    # The page asks for a page in its own language first.
    assert window.new_errors(rf"404 /extensions/{PACK_FOLDER}/docs/\w+/en\.md$") == []


def test_the_list_of_templates_names_ours(window, artifacts):
    window.errors.clear()
    window.page.get_by_role("button", name="Templates").first.click()
    dialog = window.page.get_by_role("dialog")
    dialog.get_by_text(PACK_FOLDER, exact=False).first.wait_for(timeout=TIMEOUT)
    dialog.get_by_text(PACK_FOLDER, exact=False).first.click()
    window.page.wait_for_timeout(2000)
    window.page.screenshot(path=artifacts / "list-of-templates.png")
    text = dialog.inner_text()
    assert all(name in text for name in TEMPLATES)
    window.page.keyboard.press("Escape")
    if all((FOLDER / f"{name}.jpg").exists() for name in TEMPLATES):
        assert window.new_errors() == []
