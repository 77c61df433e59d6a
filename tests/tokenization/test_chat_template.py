"""Chat templates render as in transformers, and refuse in one line."""

import datetime
import json

import pytest

from ullm.errors import InvalidParameter, ModelFileBroken
from ullm.testing.models import CHAT_TEMPLATE, tiny_tokenizer
from ullm.tokenization import chat_template
from ullm.tokenization.chat_template import (
    ChatTemplate,
    ChatTemplateBroken,
    read_special_tokens,
    read_templates,
)

CHAT = [
    {"role": "system", "content": 'Be <brief> & "plain".'},
    {"role": "user", "content": "  Größe? "},
    {"role": "assistant", "content": "Ja.", "reasoning_content": "Hm."},
    {"role": "user", "content": "Why\nnot?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a < b",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}|{% endfor %}",
    "unknown token": "[{{ cls_token }}]{{ messages[0].content }}",
    "whitespace control": """
        {%- for m in messages %}
            {%- if m.role == 'user' %}
        U: {{ m['content'] }}
            {% else %}
        X
            {%- endif %}
        {%- endfor %}
    """,
    "tools": "{% for t in tools or [] %}{{ t | tojson }}|{{ t | tojson(indent=2) }}{% endfor %}",
    "no tools": "{% if tools is none %}none{% endif %}{% if documents is none %}none{% endif %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}x{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = 1 %}{% endfor %}{{ s.n }}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{{ messages[0].thinking }}",
    "variable": "{{ enable_thinking }}{{ missing is defined }}",
    "date": "{{ strftime_now('%Y') }}",
    "dict": "{{ dict(a=1) | tojson }}",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_text_is_that_of_transformers(reference, name, add_generation_prompt, tools):
    template = ChatTemplate({"default": TEMPLATES[name]}, reference.special_tokens_map)
    options = {"add_generation_prompt": add_generation_prompt, "tools": tools, "enable_thinking": False}
    expected = reference.apply_chat_template(CHAT, chat_template=TEMPLATES[name], tokenize=False, **options)
    assert template.render(CHAT, **options) == expected


def test_special_tokens_are_those_of_transformers(reference, tmp_path):
    tiny_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert read_special_tokens(config, {}) == reference.special_tokens_map


def test_special_tokens_may_be_objects_and_the_older_file_wins():
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<e>", "image_token": "<i>"}
    older = {"bos_token": None, "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>"]}
    names = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<i>"}
    assert read_special_tokens(config, older) == names
    newer = config | {"added_tokens_decoder": {}}
    assert read_special_tokens(newer, older) == names | {"eos_token": "<e>"}


def render(text, messages=CHAT, **options):
    return ChatTemplate({"default": text}, {}).render(messages, **options)


def test_refusal_of_the_template_is_the_callers_error():
    with pytest.raises(InvalidParameter, match="says: roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[9].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0]['content'].nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include 'secrets' %}",
    ],
)
def test_whatever_goes_wrong_is_one_line_about_messages(text):
    with pytest.raises(InvalidParameter) as caught:
        render(text)
    assert caught.value.param == "messages"
    assert "chat template" in caught.value.message


def test_message_that_is_none():
    with pytest.raises(InvalidParameter, match="cannot render"):
        render(CHAT_TEMPLATE, ["hello"])


def test_parts_of_text_are_joined_for_templates_that_expect_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


def test_parts_are_left_to_templates_that_read_them():
    text = "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }};{% endif %}{% endfor %}"
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(text, [{"role": "user", "content": parts}]) == "one;two;"


def test_parts_that_are_no_text_are_refused():
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(InvalidParameter, match="reads text only"):
        render(CHAT_TEMPLATE, [{"role": "user", "content": image}])


def test_arguments_of_tool_calls_become_objects():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    text = "{{ messages[0].tool_calls[0].function.arguments.a + 1 }}"
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(text, [message]) == "2"
    assert call["function"]["arguments"] == '{"a": 1}'
    broken = {"function": {"name": "add", "arguments": "{"}}
    assert (
        render("{{ messages[0].tool_calls[0].function.arguments }}", [message | {"tool_calls": [broken]}])
        == "{"
    )


def test_no_template_says_what_to_do():
    template = ChatTemplate({}, {})
    assert not template
    with pytest.raises(InvalidParameter, match=r"/v1/completions.*--chat-template"):
        template.render(CHAT)


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ({"default": "fine\n{% if %}"}, "line 2: Expected an expression"),
        ({"default": "fine", "tool_use": "{% if %}"}, "tool_use, line 1: Expected an expression"),
        ({"default": "{% for a in b %}" * 30 + "{% endfor %}" * 30}, "it cannot be compiled: SyntaxError"),
    ],
)
def test_broken_template_names_its_line(sources, reason):
    with pytest.raises(ChatTemplateBroken, match=r"^the model's chat template cannot be used ") as caught:
        ChatTemplate(sources, {})
    assert isinstance(caught.value, ModelFileBroken)
    assert caught.value.reason.startswith(reason)
    with pytest.raises(
        InvalidParameter, match=r"cannot be used \(.*\); use /v1/completions.*--chat-template"
    ):
        ChatTemplate.unusable(caught.value).render(CHAT)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", b"{"),
        ("chat_template.json", b"[]"),
        ("chat_template.json", b'{"chat_template": 5}'),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}'),
        ("chat_template.json", b'{"chat_template": ["text"]}'),
        ("chat_template.json", b'{"chat_template": {"default": null}}'),
        ("chat_template.jinja", b"\xff"),
        ("additional_chat_templates/tool_use.jinja", b"\xff"),
    ],
)
def test_unreadable_templates_name_their_file(tmp_path, file, content):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ChatTemplateBroken) as caught:
        read_templates(tmp_path, {})
    assert caught.value.reason.startswith(f"{(tmp_path / file).name}: ")


def test_template_for_tools_is_used_where_there_are_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(CHAT) == "plain"
    assert template.render(CHAT, tools=TOOLS) == "tools"
    assert ChatTemplate({"default": "plain"}, {}).render(CHAT, tools=TOOLS) == "plain"
    with pytest.raises(InvalidParameter, match=r"\['rag'\], none of them the default"):
        ChatTemplate({"rag": "x"}, {}).render(CHAT)


def test_templates_in_every_place(tmp_path):
    assert read_templates(tmp_path, {}) == {}
    assert read_templates(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert read_templates(tmp_path, {"chat_template": named}) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "c"}')
    assert read_templates(tmp_path, {"chat_template": "a"}) == {"default": "c"}
    (tmp_path / "chat_template.jinja").write_text("d é", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("e")
    assert read_templates(tmp_path, {"chat_template": "a"}) == {"default": "d é", "rag": "e"}


def test_date_is_todays(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2031, 2, 3)

    monkeypatch.setattr(chat_template.datetime, "datetime", Clock)
    assert render("{{ strftime_now('%d %b %Y') }}") == "03 Feb 2031"


# --- a message that goes on, a template of the request --------------------------------------------

GOES_ON = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I begin "}]


@pytest.mark.parametrize("name", ["chatml", "special tokens"])
def test_the_last_message_goes_on_as_in_transformers(reference, name):
    ours = ChatTemplate({"default": TEMPLATES[name]}, {"bos_token": "<b>"})
    text = ours.render(GOES_ON, add_generation_prompt=False, continue_final_message=True)
    reference.bos_token = "<b>"
    expected = reference.apply_chat_template(
        GOES_ON, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    assert text == expected
    assert text.endswith("I begin") == (name == "special tokens"), "what strips messages strips this one"


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ messages | length }}"])
def test_a_template_that_hides_the_last_message(template):
    with pytest.raises(InvalidParameter, match="cannot go on") as caught:
        ChatTemplate({"default": template}, {}).render(GOES_ON, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_a_message_without_a_text_cannot_go_on():
    with pytest.raises(InvalidParameter, match="content is a text"):
        ChatTemplate({"default": CHAT_TEMPLATE}, {}).render(
            [{"role": "assistant", "content": None}], continue_final_message=True
        )


def test_a_template_of_the_request():
    ours = ChatTemplate({"default": CHAT_TEMPLATE}, {"bos_token": "<b>"})
    assert ours.render(GOES_ON, chat_template="{{ bos_token }}{{ messages[0].content }}") == "<b>hi"
    with pytest.raises(InvalidParameter, match="line 1") as caught:
        ours.render(GOES_ON, chat_template="{% if %}")
    assert caught.value.param == "chat_template"
    with pytest.raises(InvalidParameter, match="unsafe"):
        ours.render(GOES_ON, chat_template="{{ ''.__class__.__mro__ }}")
