"""What Anthropic's own client asks of the server, each in a function; `test_anthropic.py` runs this.

It does so in an environment that has the client, so it is imported within the functions.
"""
# mypy: ignore-errors

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request

URL, MODEL = sys.argv[1] if len(sys.argv) > 1 else "", "SmolLM2-135M-Instruct"
GREEDY = {"temperature": 0}
"""Newer versions of the client know no temperature."""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a dragon."}]
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


def client(**options):
    """Return Anthropic's client."""
    import anthropic

    return anthropic.Anthropic(base_url=URL, api_key="x", max_retries=0, **options)


def create():
    """Ask, with a system prompt, and with a stop sequence."""
    message = client().messages.create(model=MODEL, max_tokens=50, extra_body=GREEDY, messages=QUESTION)
    assert message.content[0].text == "The capital of France is Paris."
    assert message.stop_reason == "end_turn"
    stopped = client().messages.create(
        model=MODEL, max_tokens=50, extra_body=GREEDY, messages=QUESTION, stop_sequences=["France"]
    )
    assert (stopped.content[0].text, stopped.stop_reason) == ("The capital of ", "stop_sequence")
    assert stopped.stop_sequence == "France"


def prefill():
    """Let an answer that has begun go on."""
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France"}]
    message = client().messages.create(model=MODEL, max_tokens=50, extra_body=GREEDY, messages=begun)
    assert message.content[0].text == " is Paris.", message


def stream():
    """Read an answer as events; put together it is the whole one."""
    with client().messages.stream(model=MODEL, max_tokens=50, extra_body=GREEDY, messages=QUESTION) as events:
        assert "".join(events.text_stream) == "The capital of France is Paris."
        message = events.get_final_message()
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 8)


def asynchronous():
    """The same by the client for asyncio."""
    import asyncio

    import anthropic

    async def main():
        async with anthropic.AsyncAnthropic(base_url=URL, api_key="x") as asking:
            async with asking.messages.stream(
                model=MODEL, max_tokens=50, extra_body=GREEDY, messages=QUESTION
            ) as events:
                return await events.get_final_text()

    assert asyncio.run(main()) == "The capital of France is Paris."


def count_tokens():
    """Count, and find the same number in the usage."""
    fields = {"model": MODEL, "messages": QUESTION, "system": "Be brief.", "tools": [ADD]}
    counted = client().messages.count_tokens(**fields).input_tokens
    usage = client().messages.create(max_tokens=1, **fields).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def tools():
    """Call a tool, whole and streamed, send its result back, and have it answered."""
    messages = [{"role": "user", "content": "Add 2 and 3"}]
    fields = {"model": MODEL, "max_tokens": 200, "extra_body": GREEDY, "tools": [ADD]}
    forced = {"tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True}}
    message = client().messages.create(messages=messages, **fields, **forced)
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    with client().messages.stream(messages=messages, **fields, **forced) as events:
        (streamed,) = events.get_final_message().content
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": str(sum(call.input.values()))}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client().messages.create(messages=messages, **fields, tool_choice={"type": "none"})
    assert answer.content[0].type == "text"


def tool_runner():
    """Have the client's own loop call a function; the model may or may not."""
    import anthropic

    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)

    runner = client().beta.messages.tool_runner(
        model=MODEL,
        max_tokens=200,
        extra_body=GREEDY,
        tools=[add],
        messages=[{"role": "user", "content": "Add 2 and 3"}],
        max_iterations=3,
    )
    assert runner.until_done().role == "assistant"


def structured():
    """Parse an answer by a schema."""
    message = client().messages.create(
        model=MODEL,
        max_tokens=200,
        messages=[{"role": "user", "content": "Add 2 and 3"}],
        output_config={"format": {"type": "json_schema", "schema": ADD["input_schema"]}},
    )
    assert message.stop_reason != "end_turn" or set(json.loads(message.content[0].text)) == {"a", "b"}


def errors():
    """Get the client's own exceptions."""
    import anthropic

    for fields, kind in (
        ({"model": "other"}, anthropic.NotFoundError),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, anthropic.BadRequestError),
    ):
        asked = {"model": MODEL, "max_tokens": 5, "messages": QUESTION, **fields}
        try:
            client().messages.create(**asked)
        except kind as error:
            told = error
        else:
            raise AssertionError(f"{fields} was taken")
        assert told.body["type"] == "error"
        assert told.request_id


def loss_of_a_worker():
    """Kill the worker in the middle of a stream; the text is the undisturbed one."""
    sampled = {"temperature": 1, "seed": 11}
    fields = {"model": MODEL, "max_tokens": 120, "extra_body": sampled, "messages": STORY}
    undisturbed = client().messages.create(**fields).content[0].text
    text = ""
    with client().messages.stream(**fields) as events:
        for number, piece in enumerate(events.text_stream):
            text += piece
            if number == 10:
                health = json.load(urllib.request.urlopen(f"{URL}/health"))
                os.kill(health["replicas"][0]["worker_pids"][0], signal.SIGKILL)
        assert events.get_final_message().stop_reason == "max_tokens"
    assert text == undisturbed


CASES = (
    *(create, prefill, stream, asynchronous, count_tokens, tools, tool_runner, structured, errors),
    loss_of_a_worker,
)
PACKAGES = ("anthropic",)

if __name__ == "__main__":
    for case in CASES:
        try:
            case()
        except Exception as error:
            told = f"{type(error).__name__}: {error}".replace("\n", " ")
        else:
            told = "passed"
        sys.stdout.write(f"{case.__name__}: {told}\n")
