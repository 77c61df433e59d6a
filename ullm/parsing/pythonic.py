"""``[f(a=1), g()]``: calls written as Python, if the answer begins with them (Llama 4, and others)."""

from __future__ import annotations

import ast
from typing import Any

from ullm.parsing.json_calls import dump
from ullm.parsing.parts import CallArguments, CallBegin, Part, Text

_PREFIXES = ("<|python_start|>", "<|python_tag|>")
_SUFFIXES = ("<|python_end|>",)


class PythonicParser:
    """Reads the calls once the answer is complete: Python cannot be read in parts."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        if not self._is_text:
            self._held += text
            start = self._held.lstrip()
            self._is_text = bool(start) and not any(
                start.startswith(each) or each.startswith(start) for each in ("[", *_PREFIXES)
            )
            if not self._is_text:
                return []
            text, self._held = self._held, ""
        return [Text(text)]

    def finish(self) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        text, self._held = self._held, ""
        calls = _calls(text)
        if calls is None:
            return [Text(text)] if text else []
        parts: list[Part] = []
        for index, (name, arguments) in enumerate(calls):
            parts += [CallBegin(index, name), CallArguments(index, arguments)]
        return parts


def _calls(text: str) -> list[tuple[str, str]] | None:
    """Return names and arguments, as JSON; None if the text is not a list of calls with values."""
    source = text.strip()
    for prefix in _PREFIXES:
        source = source.removeprefix(prefix).strip()
    for suffix in _SUFFIXES:
        source = source.removesuffix(suffix).strip()
    try:
        tree = ast.parse(source, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else []
        return [_call(call) for call in calls] or None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args or any(each.arg is None for each in node.keywords):
        raise ValueError("not a call with named arguments")
    arguments = {str(each.arg): _value(each.value) for each in node.keywords}
    return ast.unparse(node.func), dump(arguments)


def _value(node: ast.expr) -> Any:
    """Return a literal; JSON's words for true, false and null are accepted."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_value(key)): _value(v) for key, v in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)
