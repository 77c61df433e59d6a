"""Chat templates: from messages to a prompt in the format that a model was trained on.

Templates are Jinja programs that come with models, so they run in a sandbox, under the conventions of
transformers (its ``chat_template_utils``).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ullm.errors import InvalidParameter, ModelFileBroken

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_TEMPLATE = (
    "the model has no chat template; use /v1/completions, or start the server with --chat-template FILE"
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_READS_PARTS = re.compile(r"""\[\s*['"]type['"]\s*\]|\.type\b|is string""")


class ChatTemplate:
    """The compiled templates of a model.

    Args:
        sources: name → Jinja text; ``tool_use`` is used with tools, if there is one, otherwise ``default``.
        special_tokens: ``bos_token`` and the like, as variables of the templates.

    Raises:
        ModelFileBroken: a template is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in sources.items():
            try:
                self._templates[name] = environment.from_string(text)
            except jinja2.TemplateSyntaxError as error:
                raise ModelFileBroken(
                    f"chat template {name!r}",
                    f"line {error.lineno}: {error.message}; give another one with --chat-template",
                ) from None

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of the prompt.

        Raises:
            InvalidParameter: there is no template, or it rejects the messages.
        """
        name = self._choose(bool(tools))
        keep_parts = _READS_PARTS.search(self._sources[name]) is not None
        values = self._special_tokens | {
            "documents": None,
            **variables,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            values["messages"] = [_normalise(message, keep_parts) for message in messages]
            return self._templates[name].render(values)
        except InvalidParameter:
            raise
        except jinja2.TemplateError as error:
            raise InvalidParameter(f"the model's chat template says: {error.message}", "messages") from None
        except Exception as error:
            raise InvalidParameter(
                f"the model's chat template cannot render these messages: {type(error).__name__}: {error}",
                "messages",
            ) from error

    def _choose(self, with_tools: bool) -> str:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return name
        if self._templates:
            raise InvalidParameter(
                f"the model's chat templates are {sorted(self._templates)}, none of them the default; "
                "start the server with --chat-template FILE",
                "messages",
            )
        raise InvalidParameter(_NO_TEMPLATE, "messages")


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates that come with a tokenizer: name → Jinja text.

    They are in chat_template.jinja with others in additional_chat_templates/, in chat_template.json,
    or in tokenizer_config.json as one text or as a list of named ones.
    """
    source: Any = tokenizer_config.get("chat_template")
    if (file := folder / "chat_template.json").is_file():
        source = json.loads(file.read_text("utf-8")).get("chat_template", source)
    templates: dict[str, str] = {}
    if isinstance(source, str):
        templates["default"] = source
    elif isinstance(source, list):
        templates = {entry["name"]: entry["template"] for entry in source}
    elif isinstance(source, dict):
        templates = dict(source)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text("utf-8")
    if (file := folder / "chat_template.jinja").is_file():
        templates["default"] = file.read_text("utf-8")
    return templates


def read_special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """Return each named special token of the first config that has it, as a text or with a ``content``."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        for config in configs:
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens.setdefault(name, value)
    return tokens


def _normalise(message: Mapping[str, Any], keep_parts: bool) -> dict[str, Any]:
    """Return a message as templates expect it; OpenAI's API allows more forms."""
    plain = dict(message)
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    content = plain.get("content")
    if isinstance(content, list) and not keep_parts:
        plain["content"] = "\n".join(_part_text(part) for part in content)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in plain["tool_calls"]]
    return plain


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise InvalidParameter("content parts must be of type text; this model reads text only", "messages")
    return text


def _with_parsed_arguments(call: Any) -> Any:
    """Return a tool call with parsed arguments: the API has JSON text, but templates serialize them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here only its content matters."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize to JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
