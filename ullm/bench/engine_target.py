"""An engine in this process as a target, without HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ullm.bench.stats import BenchRecord
from ullm.bench.workload import BenchRequest
from ullm.errors import RequestError
from ullm.sampling import SamplingParams

if TYPE_CHECKING:
    from ullm.engine import Engine


class EngineTarget:
    """Runs requests on an open engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        """The name in reports."""
        return "engine in this process"

    async def run(self, request: BenchRequest, record: BenchRecord) -> None:
        """Run one request; see `ullm.bench.load.BenchTarget`."""
        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            ignore_eos=True,
        )
        try:
            async with self._engine.generate(request.prompt, params) as generation:
                async for output in generation:
                    if output.token_ids:
                        record.arrivals.append(trio.current_time())
                    record.tokens = output.num_generated_tokens
                    record.prompt_tokens = output.num_prompt_tokens
                    record.finish_reason = output.finish_reason or record.finish_reason
        except RequestError as error:
            record.error = str(error)
