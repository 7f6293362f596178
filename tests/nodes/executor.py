"""Runs API workflows without ComfyUI: checks a prompt as its server does, then executes the nodes in order.

The rules are those of ComfyUI's documented node contract. Native nodes are stand-ins.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from native_nodes import NATIVE_NODES

API = dict[str, dict[str, Any]]
CONVERSIONS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class Executor:
    """A queue: what did not change since the last prompt is not run again.

    Args:
        node_classes: the pack's mapping; native stand-ins are added.
    """

    def __init__(self, node_classes: Mapping[str, type]) -> None:
        self.node_classes: dict[str, Any] = {**NATIVE_NODES, **node_classes}
        self.cache: dict[str, tuple[str, tuple[Any, ...]]] = {}
        self.executed: list[str] = []
        """Ids of the nodes that the last prompt ran."""
        self.images: dict[str, torch.Tensor] = {}
        """Pictures by the id of the native node that showed them."""
        self.shown: dict[str, dict[str, Any]] = {}
        """What our nodes showed by their ids: the outputs in the server's history."""

    def run(self, prompt: API) -> dict[str, tuple[Any, ...]]:
        """Checks and executes; returns every node's outputs.

        Raises:
            ValueError: the server would have answered with HTTP 400.
        """
        errors = self.validate(prompt)
        if errors:
            raise ValueError("; ".join(f"{node_id}: {error}" for node_id, error in errors))
        self.executed = []
        signatures: dict[str, str] = {}
        outputs: dict[str, tuple[Any, ...]] = {}
        for node_id in topological_order(prompt):
            outputs[node_id] = self._run_node(node_id, prompt, outputs, signatures)
        return outputs

    def _run_node(
        self, node_id: str, prompt: API, outputs: dict[str, tuple[Any, ...]], signatures: dict[str, str]
    ) -> tuple[Any, ...]:
        node = prompt[node_id]
        node_class = self.node_classes[node["class_type"]]
        constants = {name: value for name, value in node["inputs"].items() if not is_link(value)}
        changed = node_class.IS_CHANGED(**constants) if hasattr(node_class, "IS_CHANGED") else None
        links = {name: (signatures[v[0]], v[1]) for name, v in node["inputs"].items() if is_link(v)}
        signature = json.dumps([node["class_type"], constants, links, changed], sort_keys=True)
        signatures[node_id] = signature
        is_shown_again = node["class_type"] in NATIVE_NODES and hasattr(node_class, "OUTPUT_NODE")
        if node_id in self.cache and self.cache[node_id][0] == signature and not is_shown_again:
            return self.cache[node_id][1]
        arguments = {name: outputs[v[0]][v[1]] if is_link(v) else v for name, v in node["inputs"].items()}
        for name, hidden in node_class.INPUT_TYPES().get("hidden", {}).items():
            arguments[name] = {"UNIQUE_ID": node_id, "PROMPT": prompt}[hidden]
        instance = node_class()
        with torch.inference_mode():
            result = getattr(instance, node_class.FUNCTION)(**arguments)
        self.executed.append(node_id)
        if isinstance(result, dict):
            if node["class_type"] in NATIVE_NODES:
                self.images[node_id] = result["ui"]["images"]
            else:
                self.shown[node_id] = result["ui"]
            result = result.get("result", ())
        assert len(result) == len(node_class.RETURN_TYPES), node["class_type"]
        self.cache[node_id] = (signature, result)
        return result

    def validate(self, prompt: API) -> list[tuple[str, str]]:
        """(node id, what is wrong) of everything the server would refuse; converts constants as it does."""
        errors: list[tuple[str, str]] = []
        if not any(hasattr(self.node_classes.get(node["class_type"]), "OUTPUT_NODE") for node in prompt.values()):
            errors.append(("", "Prompt has no outputs"))
        for node_id, node in prompt.items():
            if node["class_type"] not in self.node_classes:
                errors.append((node_id, f"unknown node {node['class_type']}"))
                continue
            errors += [(node_id, error) for error in self._validate_node(node, prompt)]
        return errors

    def _validate_node(self, node: dict[str, Any], prompt: API) -> list[str]:
        node_class = self.node_classes[node["class_type"]]
        schema = node_class.INPUT_TYPES()
        validate = getattr(node_class, "VALIDATE_INPUTS", None)
        own = set(inspect.signature(validate).parameters) if validate else set()
        known = {**schema.get("required", {}), **schema.get("optional", {})}
        errors = [f"{name} is no input of {node['class_type']}" for name in node["inputs"] if name not in known]
        for name, (kind, *rest) in known.items():
            options = rest[0] if rest else {}
            if name not in node["inputs"]:
                if name in schema.get("required", {}):
                    errors.append(f"Required input is missing: {name}")
                continue
            value = node["inputs"][name]
            if is_link(value):
                given = self.node_classes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if given != kind:
                    errors.append(f"{name}: received {given}, wants {kind}")
                continue
            try:
                if isinstance(kind, str):
                    value = node["inputs"][name] = CONVERSIONS[kind](value)
            except (KeyError, TypeError, ValueError):
                errors.append(f"{name}: {value!r} is no {kind}")
                continue
            if name in own:
                continue
            if isinstance(kind, list) and value not in kind:
                errors.append(f"Value not in list: {name}: {value!r} not in {kind}")
            if "min" in options and value < options["min"]:
                errors.append(f"Value {value} smaller than min of {options['min']}: {name}")
            if "max" in options and value > options["max"]:
                errors.append(f"Value {value} bigger than max of {options['max']}: {name}")
        if validate and not errors:
            constants = {n: None if is_link(v) else v for n, v in node["inputs"].items() if n in own}
            answer = validate(**constants)
            errors += [] if answer is True else [str(answer)]
        return errors


def is_link(value: Any) -> bool:
    """Whether an API input is ``[node id, output index]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def topological_order(prompt: API) -> list[str]:
    """Node ids, each after those it takes inputs from."""
    order: list[str] = []

    def visit(node_id: str, path: tuple[str, ...]) -> None:
        assert node_id not in path, f"a loop through {path}"
        if node_id in order:
            return
        for value in prompt[node_id]["inputs"].values():
            if is_link(value):
                visit(value[0], (*path, node_id))
        order.append(node_id)

    for node_id in prompt:
        visit(node_id, ())
    return order
