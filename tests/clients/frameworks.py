"""What frameworks ask of the server, each in a function; `test_frameworks.py` runs this as a program.

It does so in an environment that has the frameworks, so they are imported within the functions.
"""
# mypy: ignore-errors

from __future__ import annotations

import sys

URL, MODEL = sys.argv[1] if len(sys.argv) > 1 else "", "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"


def city():
    """Return the type that structured answers are parsed into."""
    import pydantic

    name = (str, pydantic.Field(max_length=20))  # small models may go on with it for long
    return pydantic.create_model("City", name=name, inhabitants=(int, ...))


def langchain(**options):
    """Return LangChain's client of OpenAI's API."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=URL, api_key="x", model=MODEL, temperature=0, max_tokens=300, **options)


def langchain_tools():
    """Call a tool, whole and streamed."""
    from langchain_core.tools import tool

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    model = langchain().bind_tools([add], tool_choice="add")
    assert model.invoke("Add 2 and 3").tool_calls
    streamed = None
    for chunk in model.stream("Add 2 and 3"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["name"] == "add"


def langchain_structured():
    """Parse an answer by a schema, and by a forced call."""
    for method in ("json_schema", "function_calling"):
        model = langchain().with_structured_output(city(), method=method)
        assert model.invoke("Paris").name is not None


def langchain_responses():
    """Ask through the Responses API."""
    (part,) = langchain(use_responses_api=True).invoke(QUESTION).content
    assert "Paris" in part["text"]


def pydantic_ai():
    """Parse an answer by a forced call, and by a schema."""
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="x"))
    for output in (city(), NativeOutput(city())):
        agent = Agent(model, output_type=output, model_settings={"temperature": 0, "max_tokens": 300})
        assert agent.run_sync("Paris").output.name is not None


def instructor():
    """Parse an answer in both of its modes."""
    import instructor as library
    import openai

    for mode in (library.Mode.TOOLS, library.Mode.JSON_SCHEMA):
        client = library.from_openai(openai.OpenAI(base_url=URL, api_key="x"), mode=mode)
        found = client.chat.completions.create(
            model=MODEL,
            response_model=city(),
            messages=[{"role": "user", "content": "Paris"}],
            max_tokens=500,
            temperature=0,
            max_retries=1,
        )
        assert found.name is not None


def openai_agents():
    """Let an agent call a tool, through chats and through responses."""
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=URL, api_key="x")
    called = []

    @agents.function_tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        called.append((a, b))
        return a + b

    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        agent = agents.Agent(
            name="adder",
            instructions="Use the tool.",
            tools=[add],
            model=kind(model=MODEL, openai_client=client),
            model_settings=agents.ModelSettings(
                temperature=0, max_tokens=300, tool_choice="add", parallel_tool_calls=False
            ),
        )
        before = len(called)
        assert agents.Runner.run_sync(agent, "Add 2 and 3", max_turns=3).final_output is not None
        assert len(called) > before


def litellm():
    """Call a tool through LiteLLM's own names."""
    import litellm as library

    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = library.completion(
        model=f"openai/{MODEL}",
        api_base=URL,
        api_key="x",
        messages=[{"role": "user", "content": "Add 2 and 3"}],
        tools=[{"type": "function", "function": {"name": "add", "parameters": parameters, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "add"}},
        max_tokens=100,
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "add"


CASES = (
    langchain_tools,
    langchain_structured,
    langchain_responses,
    pydantic_ai,
    instructor,
    openai_agents,
    litellm,
)
PACKAGES = (
    *("langchain-openai", "pydantic-ai-slim[openai]", "instructor", "openai-agents", "litellm"),
    "jsonref",
)

if __name__ == "__main__":
    for case in CASES:
        try:
            case()
        except Exception as error:
            told = f"{type(error).__name__}: {error}".replace("\n", " ")
        else:
            told = "passed"
        sys.stdout.write(f"{case.__name__}: {told}\n")
