"""The table of routes and the table of fields: complete, and what others derive from them is right."""

from __future__ import annotations

import httpx
import msgspec
import pytest
from fake_engine import FakeEngine, serving

from ullm.server.api import fields, schemas
from ullm.server.api.elsewhere import ELSEWHERE
from ullm.server.api.fields import CHAT_FIELDS, COMPLETION_FIELDS, FIELDS, Effect, FieldRule, Origin
from ullm.server.api.message_requests import CountTokensRequest, MessagesRequest
from ullm.server.api.response_requests import ResponsesRequest
from ullm.server.api.route import Access, Route
from ullm.server.routes.table import ADMIN_ROUTES, ROUTES, access_of, reference_rows, reference_table
from ullm.testing.server import ADMIN_PATHS

OPENAI_CHAT = (
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens messages metadata modalities model moderation n parallel_tool_calls prediction "
    "presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort "
    "response_format safety_identifier seed service_tier stop store stream stream_options temperature "
    "tool_choice tools top_logprobs top_p user verbosity web_search_options"
)
OPENAI_COMPLETIONS = (
    "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop "
    "stream stream_options suffix temperature top_p user"
)
OPENAI_RESPONSES = (
    "access_programs background background_options context_management conversation image include input "
    "instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls "
    "previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning "
    "safety_identifier service_tier store stream stream_options temperature text tool_choice tools "
    "top_logprobs top_p truncation user"
)
ANTHROPIC_MESSAGES = (
    "billing_policy cache_control compaction container context_management diagnostics fallback_credit_token "
    "fallbacks inference_geo max_tokens mcp_servers messages metadata model output_config output_format "
    "service_tier speed stop_sequences stream system temperature thinking thread tool_choice tools top_k "
    "top_p"
)
VLLM_SAMPLING = (
    "allowed_token_ids bad_words ignore_eos include_stop_str_in_output length_penalty logprob_token_ids "
    "min_p min_tokens prompt_logprobs repetition_penalty skip_special_tokens "
    "spaces_between_special_tokens stop_token_ids top_k truncate_prompt_tokens truncation_side "
    "use_beam_search watermarking"
)
VLLM_SHARED = (
    "cache_salt ec_transfer_params guided_choice guided_decoding_backend guided_grammar guided_json "
    "guided_regex guided_whitespace_pattern kv_transfer_params logits_processors priority "
    "repetition_detection request_id return_token_ids return_token_offsets return_tokens_as_token_ids "
    "routed_experts_prompt_start session_id stream_interval structured_outputs thinking_token_budget "
    "vllm_xargs add_special_tokens"
)
VLLM_CHAT = (
    "add_generation_prompt chat_template chat_template_kwargs continue_final_message documents echo "
    "include_reasoning media_io_kwargs mm_processor_kwargs return_prompt_text"
)
VLLM_COMPLETIONS = "prompt_embeds response_format"
"""The extra parameters of vLLM's documentation, up to 0.32."""
TOOL = {"type": "function", "function": {"name": "f"}}
REFUSED = {
    "tools": [TOOL],
    "tool_choice": "required",
    "suffix": "x",
}
"""Values that the schema takes; where it does not have the field, any will do."""


@pytest.mark.parametrize("schema", FIELDS, ids=lambda schema: schema.__name__)
def test_the_fields_of_a_schema_have_a_rule(schema: type[schemas.GenerationRequest]) -> None:
    rules = {rule.name: rule for rule in FIELDS[schema]}
    assert len(rules) == len(FIELDS[schema]), "each field once"
    honoured = {name for name, rule in rules.items() if rule.effect is Effect.HONOURED}
    assert honoured <= set(schema.__struct_fields__) <= rules.keys()
    for rule in rules.values():
        assert rule.note or rule.effect is not Effect.REFUSED, "a refusal says why"
        assert rule.effect is Effect.REFUSED or not rule.accepted + (rule.unless or ())


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        (CHAT_FIELDS, OPENAI_CHAT),
        (COMPLETION_FIELDS, OPENAI_COMPLETIONS),
        (FIELDS[ResponsesRequest], OPENAI_RESPONSES),
        (FIELDS[MessagesRequest], ANTHROPIC_MESSAGES),
    ],
    ids=["chats", "completions", "responses", "messages"],
)
def test_the_fields_of_an_api_have_a_rule(rules: tuple[FieldRule, ...], names: str) -> None:
    of_api = {rule.name for rule in rules if rule.origin in (Origin.OPENAI, Origin.ANTHROPIC)}
    assert of_api == set(names.split())


@pytest.mark.parametrize(
    ("rules", "names"), [(CHAT_FIELDS, VLLM_CHAT), (COMPLETION_FIELDS, VLLM_COMPLETIONS)]
)
def test_the_fields_of_vllm_have_a_rule(rules: tuple[FieldRule, ...], names: str) -> None:
    wanted = {*VLLM_SAMPLING.split(), *VLLM_SHARED.split(), *names.split()}
    assert wanted - {rule.name for rule in rules} == set()


@pytest.mark.process
@pytest.mark.parametrize(
    ("path", "body", "rules"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, CHAT_FIELDS),
        ("/v1/completions", {"prompt": "hi"}, COMPLETION_FIELDS),
    ],
)
async def test_fields_do_what_their_rules_say(
    client: httpx.AsyncClient, path: str, body: dict[str, object], rules: tuple[FieldRule, ...]
) -> None:
    for rule in rules:
        if rule.effect is Effect.REFUSED:
            refused = {**body, rule.name: REFUSED.get(rule.name, {"any": "value"})}
            answer = await client.post(path, json=refused)
            assert answer.status_code == 400, rule
            error = answer.json()["error"]
            assert error["param"] == rule.name
            assert error["message"] == rule.refusal
            for value in (None, *rule.accepted):
                answer = await client.post(path, json={**body, rule.name: value})
                assert answer.status_code == 200, (rule, value)
            if rule.unless is not None:
                answer = await client.post(path, json={**refused, rule.unless[0]: rule.unless[1]})
                assert answer.status_code == 200
        elif rule.effect is Effect.IGNORED:
            answer = await client.post(path, json={**body, rule.name: {"any": "value"}})
            assert answer.status_code == 200


BODIES: dict[type[msgspec.Struct], tuple[str, dict[str, object]]] = {
    schemas.ChatCompletionRequest: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    schemas.CompletionRequest: ("/v1/completions", {"prompt": "x"}),
    ResponsesRequest: ("/v1/responses", {"input": "x"}),
    MessagesRequest: ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
    CountTokensRequest: ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
}


@pytest.mark.process
@pytest.mark.parametrize("schema", ELSEWHERE, ids=lambda schema: schema.__name__)
async def test_fields_of_other_apis_that_change_the_answer_are_refused(
    client: httpx.AsyncClient, schema: type[msgspec.Struct]
) -> None:
    """They name what the route has instead; what asks for nothing is taken."""
    path, body = BODIES[schema]
    assert not {rule.name for rule in ELSEWHERE[schema]} & {rule.name for rule in FIELDS[schema]}
    for rule in ELSEWHERE[schema]:
        answer = await client.post(path, json={**body, rule.name: {"any": "value"}})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, rule.refusal)
        for value in (None, *rule.accepted):
            answer = await client.post(path, json={**body, rule.name: value})
            assert answer.status_code == 200, (rule, value)


# --- what derives from the table of routes -------------------------------------------------------


def test_a_path_has_one_access() -> None:
    for route in ROUTES:
        assert {each.access for each in ROUTES if each.path == route.path} == {route.access}
        assert access_of(route.path) is route.access


@pytest.mark.parametrize(
    ("path", "access"),
    [
        ("/live", Access.OPEN),
        ("/openapi.json", Access.OPEN),
        ("/v1/models/some/model", Access.KEY),
        ("/nothing", Access.KEY),
        ("/live/", Access.KEY),
        ("/sleep", Access.ADMIN),
        ("/admin", Access.ADMIN),
        ("/admin/nothing", Access.ADMIN),
        ("/administrator", Access.KEY),
    ],
)
def test_the_access_of_a_path(path: str, access: Access) -> None:
    assert access_of(path) is access


def test_the_admin_listener_has_no_route_for_clients() -> None:
    assert {route.access for route in ADMIN_ROUTES} == {Access.OPEN, Access.ADMIN}
    assert [route for route in ROUTES if route.access is Access.ADMIN and route not in ADMIN_ROUTES] == []


def test_test_servers_know_the_admin_paths() -> None:
    """`ullm.testing` cannot import the server."""
    for route in ROUTES:
        assert route.path.startswith(ADMIN_PATHS) == (route.access is Access.ADMIN), route.path


@pytest.mark.process
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_keys_are_asked_for_as_the_table_says(route: Route) -> None:
    async with serving(FakeEngine(), api_key="a", admin_key="b") as url, httpx.AsyncClient() as client:
        for key, access in (("", None), ("a", Access.KEY), ("b", Access.ADMIN)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = await client.request(route.method, url + route.path, headers=headers)
            assert (answer.status_code != 401) == (route.access in (Access.OPEN, access))


def test_the_reference_has_a_row_per_route() -> None:
    rows = list(reference_rows())
    assert len(rows) == len(ROUTES)
    chat = next(row for row in rows if row.path == "/v1/chat/completions")
    assert (chat.method, chat.access) == ("POST", "API key")
    assert "messages" in chat.fields
    assert reference_table().count("\n") == len(ROUTES) + 2
    assert fields.FIELDS.keys() <= {route.request for route in ROUTES}
