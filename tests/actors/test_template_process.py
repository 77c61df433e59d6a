"""Chat templates that loop or use up the memory cost one process, and no request but theirs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from ullm.actors import template_process
from ullm.actors.template_process import TemplateProcess
from ullm.actors.tokenizer import TokenizerActor
from ullm.errors import EngineNotReady, InvalidParameter, TemplateFailed
from ullm.supervision.actor import Lifetime
from ullm.system.lifeline import Lifeline
from ullm.testing import local_model
from ullm.testing.models import CHAT_TEMPLATE, write_scripted_model
from ullm.tokenization.chat_template import ChatTemplate

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="there only a clock ends the process"),
]
HELLO = [{"role": "user", "content": "Hello"}]
BAD = [{"role": "user", "content": "bad"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.15)
    monkeypatch.setattr(template_process, "MEMORY_BYTES", 192 << 20)


def need_a_limit_of_memory() -> None:
    if sys.platform != "linux":
        pytest.skip("other systems do not limit a process's address space")


def process_of(text: str) -> TemplateProcess:
    return TemplateProcess(ChatTemplate({"default": text}, {"bos_token": "<s>"}))


@pytest.fixture
def chatml() -> Iterator[TemplateProcess]:
    with closing(process_of(CHAT_TEMPLATE)) as process:
        yield process


def pid_of(process: TemplateProcess) -> int:
    assert process._process is not None
    return process._process.pid


def test_the_text_is_the_same_as_here(chatml: TemplateProcess) -> None:
    here = ChatTemplate({"default": CHAT_TEMPLATE}, {"bos_token": "<s>"})
    assert chatml.render(HELLO) == here.render(HELLO)
    first = pid_of(chatml)
    tools = [{"type": "function", "function": {"name": "f"}}]
    variables: dict[str, Any] = {"tools": tools, "add_generation_prompt": False, "enable_thinking": True}
    assert chatml.render(HELLO, **variables) == here.render(HELLO, **variables)
    assert pid_of(chatml) == first


@pytest.mark.parametrize(
    ("fault", "says"),
    [(LOOP, "more processor time"), (DOUBLE, "more memory")],
    ids=["time", "memory"],
)
def test_input_that_costs_too_much_is_the_callers_error(
    monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    if fault is DOUBLE:
        need_a_limit_of_memory()
        monkeypatch.setattr(template_process, "RENDER_SECONDS", 20)
    text = "{% if messages[0].content == 'bad' %}" + fault + "{% endif %}fine"
    with closing(process_of(text)) as process:
        for _ in range(2):
            with pytest.raises(InvalidParameter, match=f"needs {says} than it may have for these messages"):
                process.render(BAD)
            assert process.render(HELLO) == "fine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LOOP, "needs more processor time"),
        (DOUBLE, "needs more memory"),
        ("{{ 'x' * 10 ** 11 }}", "needs more memory"),
        ("{{ messages[0].content + 1 }}", "cannot render these messages: TypeError"),
        ("{{ messages[7].content }}", "has no element 7"),
    ],
)
def test_a_template_that_fails_for_all_is_the_servers_error(
    monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    if "memory" in says:
        need_a_limit_of_memory()
        monkeypatch.setattr(template_process, "RENDER_SECONDS", 20)
    with closing(process_of(text)) as process:
        with pytest.raises(TemplateFailed, match=says) as caught:
            process.render(BAD)
        assert caught.value.status == 500
        began = time.perf_counter()
        with pytest.raises(TemplateFailed, match=says):  # and is not tried again
            process.render(HELLO)
        assert time.perf_counter() - began < 0.5


def test_a_template_that_refuses_messages_is_not_at_fault() -> None:
    with closing(process_of("{{ raise_exception('a system message comes first') }}")) as process:
        for _ in range(2):
            with pytest.raises(InvalidParameter, match="says: a system message comes first"):
                process.render(HELLO)


def test_a_lost_process_is_replaced(chatml: TemplateProcess) -> None:
    text = chatml.render(HELLO)
    psutil.Process(pid_of(chatml)).kill()
    assert chatml.render(HELLO) == text


def test_a_process_that_does_not_answer_is_killed(
    chatml: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = chatml.render(HELLO)
    monkeypatch.setattr(template_process, "WALL_SECONDS", 0.3)
    stopped = psutil.Process(pid_of(chatml))
    stopped.suspend()
    with pytest.raises(EngineNotReady, match="did not answer"):
        chatml.render(HELLO)
    monkeypatch.setattr(template_process, "WALL_SECONDS", 20)
    assert chatml.render(HELLO) == text


def test_processes_that_are_lost_each_time_condemn_no_template(
    chatml: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine has no memory left."""
    start = template_process._start

    def doomed(lifeline: Lifeline) -> Any:
        process = start(lifeline)
        process.kill()
        process.wait()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(template_process, "_start", doomed)
        with pytest.raises(EngineNotReady, match="each one is lost"):
            chatml.render(HELLO)
    assert chatml.render(HELLO)


def test_a_process_that_cannot_be_started_is_not_the_callers_error(
    chatml: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(lifeline: Lifeline) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(template_process, "_start", fails)
        with pytest.raises(EngineNotReady, match="Resource temporarily unavailable"):
            chatml.render(HELLO)
    assert chatml.render(HELLO)


@pytest.mark.parametrize("value", ["\ud800", {"a": object()}, 2**70])
def test_values_that_cannot_be_sent_are_refused(chatml: TemplateProcess, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        chatml.render([{"role": "user", "content": value}])
    assert caught.value.param == "messages"


def test_closing_ends_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    process = process_of(LOOP)
    raised: list[Exception] = []

    def render() -> None:
        try:
            process.render(HELLO)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    while process._process is None:
        time.sleep(0.001)
    process.close()
    thread.join(5)
    assert isinstance(raised[0], EngineNotReady)
    with pytest.raises(EngineNotReady):
        process.render(HELLO)


async def test_tokenizing_goes_on_beside_a_template_that_loops(tmp_path: Path) -> None:
    folder = write_scripted_model(tmp_path)
    (folder / "chat_template.jinja").write_text(LOOP)
    tokenizer = TokenizerActor(local_model(folder))

    async def chat() -> None:
        with pytest.raises(TemplateFailed):
            await tokenizer.encode_chat(HELLO)

    with Lifetime("tokenizer").running():
        async with trio.open_nursery() as nursery:
            await nursery.start(tokenizer.run)
            async with trio.open_nursery() as chats:
                for _ in range(5):
                    chats.start_soon(chat)
                await trio.sleep(0.05)
                with trio.fail_after(1):
                    assert await tokenizer.encode("Hello")
            nursery.cancel_scope.cancel()
