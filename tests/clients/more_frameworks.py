"""More of what frameworks ask of the server, of those that need older packages than `frameworks.py`."""
# mypy: ignore-errors

from __future__ import annotations

import json
import sys

URL, MODEL = sys.argv[1] if len(sys.argv) > 1 else "", "SmolLM2-135M-Instruct"


def city():
    """Return the type that structured answers are parsed into; small models would add keys if they could."""
    import pydantic

    only = pydantic.ConfigDict(extra="forbid")
    name, number = (str, pydantic.Field(max_length=20)), (int, pydantic.Field(ge=0, le=10**8))
    return pydantic.create_model("City", __config__=only, name=name, inhabitants=number)


def outlines():
    """Answer by a type, a choice and a regular expression, through Outlines' client of vLLM."""
    import openai
    import outlines as library

    model = library.from_vllm(openai.OpenAI(base_url=URL, api_key="x"), MODEL)
    found = model("Describe Paris as JSON.", city(), max_tokens=300, temperature=0)
    assert set(json.loads(found)) == {"name", "inhabitants"}, found
    answers = library.types.Choice(["yes", "no"])
    assert model("Is Paris a city?", answers, max_tokens=10) in ("yes", "no")
    number = model("A number of four digits:", library.regex(r"[0-9]{4}"), max_tokens=10)
    assert len(number) == 4
    assert number.isdigit()
    assert "".join(model.stream("Say yes or no.", answers, max_tokens=10)) in ("yes", "no")


def _llama_index():
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=MODEL,
        api_base=URL,
        api_key="x",
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        temperature=0,
        max_tokens=300,
    )


def llama_index():
    """Answer whole and streamed, by a schema, and by a forced call."""
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    llm = _llama_index()
    question = [ChatMessage(role="user", content="What is the capital of France?")]
    assert "Paris" in llm.chat(question).message.content
    assert "Paris" in [*llm.stream_chat(question)][-1].message.content
    assert llm.as_structured_llm(city()).complete("Paris").raw.name is not None

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    tool = FunctionTool.from_defaults(add)
    answer = llm.chat_with_tools([tool], user_msg="Add 2 and 3", tool_required=True)
    (call, *_) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, set(call.tool_kwargs)) == ("add", {"a", "b"})


def smolagents():
    """Let an agent that must call a tool call one, and answer by a schema."""
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    called = []

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first one.
            b: the second one.
        """
        called.append((a, b))
        return a + b

    model = OpenAIServerModel(MODEL, api_base=URL, api_key="x", max_tokens=200, temperature=0)
    question = [{"role": "user", "content": [{"type": "text", "text": "Add 2 and 3"}]}]
    answer = model.generate(question, tools_to_call_from=[add])
    assert answer.tool_calls[0].function.name == "add"
    schema = {"name": "city", "schema": city().model_json_schema(), "strict": True}
    answer = model.generate(question, response_format={"type": "json_schema", "json_schema": schema})
    assert set(json.loads(answer.content)) == {"name", "inhabitants"}
    agent = ToolCallingAgent(tools=[add], model=model, max_steps=2, verbosity_level=0)
    assert agent.run("Add 2 and 3") is not None


CASES = (outlines, llama_index, smolagents)
PACKAGES = ("outlines", "openai", "llama-index-llms-openai-like", "smolagents[openai]")

if __name__ == "__main__":
    for case in CASES:
        try:
            case()
        except Exception as error:
            told = f"{type(error).__name__}: {error}".replace("\n", " ")
        else:
            told = "passed"
        sys.stdout.write(f"{case.__name__}: {told}\n")
