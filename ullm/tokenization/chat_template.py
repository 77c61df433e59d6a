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
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ullm.errors import InvalidParameter, ModelFileBroken, UllmError
from ullm.parsing.formats import format_of
from ullm.tokenization.special_tokens import named_tokens, token_text, tokenizer_settings

_REMEDY = "use /v1/completions, or start the server with --chat-template FILE"
_NO_TEMPLATE = f"the model has no chat template; {_REMEDY}"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_READS_PARTS = re.compile(r"""\[\s*['"]type['"]\s*\]|\.type\b|is string""")


class ChatTemplateBroken(ModelFileBroken):
    """A chat template cannot be read or compiled.

    Args:
        reason: names the file, or the line of the default template.
    """

    def __init__(self, reason: str) -> None:
        UllmError.__init__(self, f"the model's chat template cannot be used ({reason})")
        self.reason = reason


class TemplateFault(InvalidParameter):
    """A chat template fails for these messages, maybe for all: not because it refuses them on purpose."""


class ChatTemplate:
    """The compiled templates of a model.

    Args:
        sources: name → Jinja text; ``tool_use`` is used with tools, if there is one, otherwise ``default``.
        special_tokens: ``bos_token`` and the like, as variables of the templates.

    Attributes:
        format: how the answers are read that it leads to.

    Raises:
        ChatTemplateBroken: a template is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self.sources = dict(sources)
        self.special_tokens = dict(special_tokens)
        self._templates = {name: _compile(environment, name, text) for name, text in sources.items()}
        self._refusal = _NO_TEMPLATE
        self.format = format_of(list(sources.values()))

    @classmethod
    def unusable(cls, error: ChatTemplateBroken) -> ChatTemplate:
        """Return the stand-in for templates that are broken; its `render` raises an error that says why."""
        template = cls({}, {})
        template._refusal = f"{error}; {_REMEDY}"
        return template

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of the prompt.

        Args:
            continue_final_message: leave the last message open, so that the model goes on in it.
            chat_template: replaces these templates.

        Raises:
            InvalidParameter: there is no template, or it cannot be used, or it rejects the messages.
            MemoryError: it needs more memory than there is.
        """
        given = {"add_generation_prompt": add_generation_prompt, "tools": tools, **variables}
        if chat_template is not None:
            template = _requested(chat_template, self.special_tokens)
            return template.render(messages, continue_final_message=continue_final_message, **given)
        if continue_final_message:
            return _up_to_mark(self.render(_marked(messages), **given))
        name = self.choose(bool(tools))
        keep_parts = _READS_PARTS.search(self.sources[name]) is not None
        values = self.special_tokens | {
            "documents": None,
            **variables,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            values["messages"] = [_normalise(message, keep_parts) for message in messages]
            return self._templates[name].render(values)
        except (InvalidParameter, MemoryError):
            raise
        except jinja2.TemplateError as error:
            kind = InvalidParameter if type(error) is jinja2.TemplateError else TemplateFault
            raise kind(f"the model's chat template says: {error.message}", "messages") from None
        except Exception as error:
            raise TemplateFault(
                f"the model's chat template cannot render these messages: {type(error).__name__}: {error}",
                "messages",
            ) from error

    def choose(self, with_tools: bool) -> str:
        """Return the name of the template that is used.

        Raises:
            InvalidParameter: there is none.
        """
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return name
        if self._templates:
            raise InvalidParameter(
                f"the model's chat templates are {sorted(self._templates)}, none of them the default; "
                "start the server with --chat-template FILE",
                "messages",
            )
        raise InvalidParameter(self._refusal, "messages")


_MARK = "<ullm:the-message-goes-on> "
"""Marks the end of the message that goes on; a template that strips messages takes the blank away."""


def _requested(text: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate({"default": text}, special_tokens)
    except ChatTemplateBroken as error:
        raise InvalidParameter(f"chat_template: {error.reason}", "chat_template") from None


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    last = dict(messages[-1])
    content = last.get("content")
    if not isinstance(content, str):
        raise InvalidParameter(
            "continue_final_message needs a last message whose content is a text", "continue_final_message"
        )
    last["content"] = content + _MARK
    return [*messages[:-1], last]


def _up_to_mark(text: str) -> str:
    """Return a text up to the end of the message that goes on; as transformers does it."""
    place = text.rfind(_MARK.strip())
    if place < 0:
        raise InvalidParameter(
            "the model's chat template does not show the last message as it is, so it cannot go on",
            "continue_final_message",
        )
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates that come with a tokenizer: name → Jinja text.

    They are in chat_template.jinja with others in additional_chat_templates/, in chat_template.json,
    or in tokenizer_config.json as one text or as a list of named ones.

    Raises:
        ChatTemplateBroken: a file cannot be read, or what it holds is not a template.
    """
    file, source = "tokenizer_config.json", tokenizer_config.get("chat_template")
    if (path := folder / "chat_template.json").is_file():
        file, source = path.name, _read_object(path).get("chat_template", source)
    templates = _named_templates(file, source)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (path := folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(path)
    return templates


def _named_templates(file: str, source: Any) -> dict[str, str]:
    """Return the templates in a JSON value: one text, a list of named ones, or an object of them."""
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": source}
    if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        source = {entry.get("name"): entry.get("template") for entry in source}
    if not isinstance(source, dict) or not all(isinstance(each, str) for each in (*source, *source.values())):
        raise ChatTemplateBroken(f"{file}: its chat_template is neither a text nor named texts")
    return dict(source)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise ChatTemplateBroken(f"{path.name}: not readable as JSON: {error}") from None
    except RecursionError:
        raise ChatTemplateBroken(f"{path.name}: not readable as JSON: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ChatTemplateBroken(f"{path.name}: must hold a JSON object, holds a {type(content).__name__}")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateBroken(f"{path.name}: not readable: {error}") from None


def _compile(environment: jinja2.Environment, name: str, text: str) -> jinja2.Template:
    where = "" if name == "default" else f"{name}, "
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateBroken(f"{where}line {error.lineno}: {error.message}") from None
    except Exception as error:  # Python's own limits: of nested blocks, of recursion
        raise ChatTemplateBroken(f"{where}it cannot be compiled: {type(error).__name__}: {error}") from error


def read_special_tokens(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, str]:
    """Return name → text of the special tokens that templates may write.

    Args:
        config, special: the content of tokenizer_config.json and special_tokens_map.json.
    """
    named = named_tokens(tokenizer_settings(config, special))
    return {name: text for name, token in named.items() if (text := token_text(token))}


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
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here only its content matters."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Leaves everything to the rendering: what it computed in advance would be bounded by nothing."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[_Generation, jinja2.ext.loopcontrols],
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
