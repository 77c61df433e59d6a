"""The tools of a request, how its answer is constrained by them, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from ullm.errors import InvalidParameter
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.parsing.formats import FORMATS, ChatFormat, forced_calls, forced_parser, guided_calls
from ullm.parsing.parts import Parser
from ullm.parsing.reasoning import CLOSE, ReasoningParser
from ullm.parsing.reasoning import OPEN as THINK
from ullm.sampling import SamplingParams


class Decodes(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools.

    Args:
        tools: those that the model is told of, as the chat template takes them.
        schemas: tool → JSON schema of its arguments, for those that may be called.
        mode: ``none``, ``auto``, or ``required``: at least one call.
        several: whether there may be more than one call.
        strict: whether calls must be valid in mode ``auto``, too.
        legacy: whether the request used ``functions``, so that the answer has a ``function_call``.
    """

    tools: list[dict[str, Any]] = field(default_factory=list)
    schemas: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    mode: str = "none"
    several: bool = True
    strict: bool = False
    legacy: bool = False

    @property
    def form(self) -> str:
        """How an answer is constrained: ``forced`` to be a call, ``guided`` where it calls, or not at all."""
        if self.mode == "required":
            return "forced"
        return "guided" if self.mode == "auto" and (self.strict or not self.several) else ""

    def structured_outputs(self, calls: str) -> StructuredOutputs | None:
        """Return the form of the answer, if there is to be one.

        Args:
            calls: name of the format of calls.
        """
        if not self.form:
            return None
        make = forced_calls if self.form == "forced" else guided_calls
        return make(calls, self.schemas, several=self.several)


def use_of(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    *,
    parallel: bool,
    legacy: bool = False,
) -> ToolUse:
    """Return the use of some tools.

    Args:
        tools: functions, in OpenAI's form: ``{"type": "function", "function": {"name", …}}``.
        choice: OpenAI's ``tool_choice``.
        parallel: whether there may be several calls.
        legacy: see `ToolUse`.

    Raises:
        InvalidParameter: the choice does not go with the tools; names the field.
    """
    field_name = "function_call" if legacy else "tool_choice"
    if not tools:
        if choice not in (None, "none", "auto"):
            needed = "functions" if legacy else "tools"
            raise InvalidParameter(f"{field_name} needs {needed}", field_name)
        return ToolUse()
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    _check_names(functions)
    mode, names = _chosen(choice, field_name, [function["name"] for function in functions])
    told = [function for function in functions if function["name"] in names]
    return ToolUse(
        tools=[] if mode == "none" else [_described(function) for function in told],
        schemas={each["name"]: each.get("parameters") or {"type": "object"} for each in told},
        mode=mode,
        several=parallel and not isinstance(choice, dict),
        strict=any(function.get("strict") for function in told),
        legacy=legacy,
    )


def _function(tool: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise InvalidParameter(f"{place}: only functions are supported", f"{place}.type")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidParameter(f"{place}.function has no name", f"{place}.function.name")
    return function


def _check_names(functions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse different functions of one name: the arguments of a call could be meant for either."""
    first: dict[str, int] = {}
    for index, function in enumerate(functions):
        before = first.setdefault(function["name"], index)
        if functions[before] != function:
            raise InvalidParameter(
                f"tools[{before}] and tools[{index}] are different, but both named {function['name']!r}",
                f"tools[{index}].function.name",
            )


def _described(function: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in function.items() if value is not None and name != "strict"}
    return {"type": "function", "function": shown}


def _chosen(choice: str | dict[str, Any] | None, name: str, known: list[str]) -> tuple[str, list[str]]:
    """Return the mode, and the names of the tools that may be called."""
    if choice is None or isinstance(choice, str):
        mode = choice or "auto"
        if mode not in ("none", "auto", "required"):
            raise InvalidParameter(f"{name} must be none, auto, required or a function, not {mode!r}", name)
        return mode, known
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        names = [_name_of(each, name) for each in tools] if isinstance(tools, list) else []
        mode = allowed.get("mode", "auto") if names else ""
    else:
        names, mode = [_name_of(choice, name)], "required"
    for each in names:
        if each not in known:
            raise InvalidParameter(f"{name} names the function {each!r}, which is not among the tools", name)
    if mode not in ("auto", "required") or not names:
        raise InvalidParameter(f"{name}: allowed_tools needs tools, and the mode auto or required", name)
    return mode, names


def _name_of(choice: Any, field_name: str) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidParameter(f"{field_name} must name a function", field_name)
    return name


@dataclass(frozen=True)
class Reading:
    """How an answer is read.

    Args:
        parser: makes what reads one choice; None if all of it is text.
        after: text that ends the reasoning which the prompt has opened, before a prescribed form begins.
        special: whether special tokens must be shown, because they mark calls.
        legacy: see `ToolUse`.
    """

    parser: Callable[[], Parser] | None = None
    after: str = ""
    special: bool = False
    legacy: bool = False


PLAIN = Reading()


def reading(use: ToolUse, chat: ChatFormat, *, begun: bool) -> Reading:
    """Return how the answer to a chat is read.

    Args:
        begun: whether the prompt ends within reasoning.
    """
    calls: Callable[[], Parser] | None = None
    if use.mode != "none":
        make = partial(forced_parser, chat.calls) if use.form else FORMATS[chat.calls].parser
        calls = partial(make, use.schemas)
    special = calls is not None and not use.form and FORMATS[chat.calls].special
    if not chat.reasons:
        return Reading(calls, special=special, legacy=use.legacy)
    return Reading(
        lambda: ReasoningParser(calls() if calls is not None else None, begun=begun),
        CLOSE if begun else "",
        special,
        use.legacy,
    )


def read_as(use: ToolUse, chat: ChatFormat, tokenizer: Decodes, prompt: list[int]) -> Reading:
    """Return how the answer to a prompt is read."""
    return reading(use, chat, begun=chat.reasons and ends_in_reasoning(tokenizer, prompt))


def ends_in_reasoning(tokenizer: Decodes, prompt: Sequence[int]) -> bool:
    """Return whether the chat template has opened the tag of reasoning at the prompt's end."""
    return tokenizer.decode(prompt[-8:], skip_special_tokens=False).rstrip().endswith(THINK)


def constrained(params: SamplingParams, calls: StructuredOutputs | None, how: Reading) -> SamplingParams:
    """Return the parameters with the form of the answer: of its calls, or the one that was asked for.

    Raises:
        InvalidParameter: both are given.
    """
    if calls is not None and params.structured_outputs is not None:
        raise InvalidParameter(
            "tool_choice and the form of the answer contradict each other; leave one out", "tool_choice"
        )
    form = calls or params.structured_outputs
    if form is not None and how.after:
        form = replace(form, after=how.after)
    if form is params.structured_outputs and not how.special:
        return params
    return replace(
        params, structured_outputs=form, skip_special_tokens=params.skip_special_tokens and not how.special
    )
