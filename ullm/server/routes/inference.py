"""``POST /inference``: a prompt in, a text out; for those who do not speak OpenAI's API."""

from __future__ import annotations

from quart import Response, g
from quart_trio import QuartTrio

from ullm.errors import InvalidParameter
from ullm.sampling import SamplingParams
from ullm.server.api import requests
from ullm.server.api.responses import Inference, json_response
from ullm.server.api.schemas import InferenceRequest
from ullm.server.api.types import Engine
from ullm.server.metrics import Metrics
from ullm.server.routes.outputs import Job

DEFAULT_NEW_TOKENS = 128


def install(app: QuartTrio, engine: Engine, metrics: Metrics) -> None:
    """Add the route to ``app``."""
    read = requests.json_reader(InferenceRequest)

    async def inference() -> Response:
        engine.check_admission()
        info, tokenizer = requests.loaded(engine)
        request: InferenceRequest = await read()
        prompt = await tokenizer.encode(request.prompt)
        params = SamplingParams(
            max_new_tokens=_limit(request, room=info.context_len - len(prompt)),
            timeout=requests.header_timeout(),
        )
        job = Job(engine, metrics, f"inf-{g.request_id}", [prompt], params, g.arrived)
        return json_response(await _answer(job))

    app.post("/inference")(inference)


def _limit(request: InferenceRequest, room: int) -> int:
    """Tokens to generate; fewer than asked for where the context ends."""
    wanted = DEFAULT_NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens
    if wanted < 1:
        raise InvalidParameter(f"max_new_tokens must be at least 1, got {wanted}", "max_new_tokens")
    return max(1, min(wanted, room))


async def _answer(job: Job) -> Inference:
    text, reason = "", None
    async with job.run() as outputs:
        async for _, output in outputs:
            text += output.text
            reason = output.finish_reason
    usage = job.usage()
    return Inference(
        text=text,
        finish_reason=reason,
        num_prompt_tokens=usage.prompt_tokens,
        num_generated_tokens=usage.completion_tokens,
    )
