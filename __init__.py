"""FLUX.2 Kit: generates, edits and fine-tunes with FLUX.2. This file is what ComfyUI reads of the pack."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


def __getattr__(name: str) -> Any:
    # Only ComfyUI asks for the nodes: the command line and users of the library do not wait for them. pytest may import
    # this file as a module without a package, where relative imports cannot work.
    if __package__ and name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"):
        from . import nodes

        return getattr(nodes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
