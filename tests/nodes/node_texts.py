"""What people read of the nodes outside of the code: the English texts of ``locales/``, the lists of ``web/docs/``.

`python tests/nodes/node_texts.py` rewrites both from the classes; a test keeps the files equal to what it would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flux2_kit import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "web" / "docs"
LOCALES = ROOT / "locales"
SPECIAL = re.compile(r"[{}@|]")
"""Signs with a meaning in the front end's messages; they are written as ``{'@'}``."""
ESCAPED = re.compile(r"\{'([{}@|])'\}")
SECTIONS = re.compile(r"^## Inputs\n.*?^## Outputs\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def node_defs() -> dict[str, Any]:
    """The content of ``locales/en/nodeDefs.json``."""
    return {node_id: node_def(node_id) for node_id in NODE_CLASS_MAPPINGS}


def node_def(node_id: str) -> dict[str, Any]:
    node_class: Any = NODE_CLASS_MAPPINGS[node_id]
    outputs = zip(node_class.RETURN_NAMES, node_class.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": escape(NODE_DISPLAY_NAME_MAPPINGS[node_id]),
        "description": escape(node_class.DESCRIPTION),
        "inputs": {
            name: {"name": escape(name), "tooltip": escape(options["tooltip"])}
            for name, (_, options) in inputs_of(node_class).items()
        },
        "outputs": {
            str(slot): {"name": escape(name), "tooltip": escape(tooltip)}
            for slot, (name, tooltip) in enumerate(outputs)
        },
    }


def inputs_of(node_class: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    schema = node_class.INPUT_TYPES()
    return {**schema["required"], **schema.get("optional", {})}


def escape(text: str) -> str:
    return SPECIAL.sub(lambda found: f"{{'{found[0]}'}}", text)


def unescape(text: str) -> str:
    return ESCAPED.sub(r"\1", text)


def sections(node_id: str) -> str:
    """Inputs and outputs of a node as the help page shows them: as lists, for the panel is narrow."""
    node_class: Any = NODE_CLASS_MAPPINGS[node_id]
    optional = node_class.INPUT_TYPES().get("optional", {})
    lines = ["## Inputs", ""]
    for name, (kind, options) in inputs_of(node_class).items():
        shown = "choice" if isinstance(kind, list) else kind
        default = default_text(kind, options, is_optional=name in optional)
        lines.append(f"- **{name}** ({', '.join(filter(None, (shown, default)))}): {options['tooltip']}")
    lines += ["", "## Outputs", ""]
    outputs = zip(node_class.RETURN_NAMES, node_class.RETURN_TYPES, node_class.OUTPUT_TOOLTIPS, strict=True)
    lines += [f"- **{name}** ({kind}): {tooltip}" for name, kind, tooltip in outputs]
    return "\n".join([*lines, "", ""])


def default_text(kind: Any, options: dict[str, Any], *, is_optional: bool) -> str:
    default = options.get("default", kind[0] if isinstance(kind, list) else None)
    if default is None:
        return "optional" if is_optional else ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) or "empty"


def written() -> dict[Path, str]:
    """Every file with its text; of the help pages all but the lists stays."""
    files = {LOCALES / "en" / "nodeDefs.json": json.dumps(node_defs(), indent=2, ensure_ascii=False) + "\n"}
    for node_id in NODE_CLASS_MAPPINGS:
        page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        assert SECTIONS.search(page), f"{node_id}.md has no sections Inputs and Outputs"
        files[PAGES / f"{node_id}.md"] = (
            SECTIONS.sub(lambda _, node_id=node_id: sections(node_id), page).rstrip() + "\n"
        )
    return files


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
