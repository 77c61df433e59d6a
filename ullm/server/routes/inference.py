"""``POST /inference``: a prompt in, a text out; for clients that do not speak OpenAI's API."""

from __future__ import annotations

from quart import Response, g

from ullm.errors import InvalidParameter
from ullm.server.api import requests
from ullm.server.api.responses import Inference, json_response
from ullm.server.api.schemas import InferenceRequest
from ullm.server.http.pacing import unhurried
from ullm.server.routes.outputs import Submission
from ullm.server.routes.service import Service

DEFAULT_NEW_TOKENS = 128


async def inference(service: Service, request: InferenceRequest) -> Response:
    """Continue a prompt; the answer comes in one piece."""
    info, tokenizer = requests.loaded(service.engine)
    prompt = await tokenizer.encode(request.prompt)
    params = service.engine.sampling_defaults.params(
        max_new_tokens=_limit(request, room=info.context_len - len(prompt)),
        timeout=requests.header_timeout(),
    )
    session = requests.header_session()
    outputs = service.outputs(
        Submission(f"inf-{g.request_id}", [prompt], params, g.arrived, client=g.client, session=session)
    )
    text, reason = "", None
    async with outputs.open(unhurried):
        async for _, output in outputs:
            text += output.text
            reason = output.finish_reason
    usage = outputs.usage()
    return json_response(
        Inference(
            text=text,
            finish_reason=reason,
            num_prompt_tokens=usage.prompt_tokens,
            num_generated_tokens=usage.completion_tokens,
        )
    )


def _limit(request: InferenceRequest, room: int) -> int:
    """Return the number of tokens to generate; fewer than requested where the context ends."""
    name, limit = requests.token_limit(request)
    wanted = DEFAULT_NEW_TOKENS if limit is None else limit
    if wanted < 1:
        raise InvalidParameter(f"{name} must be at least 1, got {wanted}", name)
    return max(1, min(wanted, room))
