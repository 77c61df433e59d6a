"""One rank of a model: loads it, runs steps, releases everything. Implements `ullm.protocol.runner.Runner`.

On a GPU `submit` only launches: sampled tokens stay in a device buffer, one slot per sequence, from
which the next step takes its input, and reach the host through pinned memory and an event. On a CPU a
step is done when `submit` returns. Both are the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ullm.model.execution.drafts import Draws, draws_of
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.execution.rank import SIGN_OF_LIFE, Rank, open_rank
from ullm.model.execution.sequences import Plan, SequenceState, SequenceTable
from ullm.model.execution.sleep import SleepingRank
from ullm.model.execution.standby import PreparedModel, prepare_model
from ullm.model.memory.device_memory import let_go
from ullm.model.memory.fetch import Fetched
from ullm.model.memory.upload import pick
from ullm.model.sampling.logprobs import PendingLogprobs
from ullm.model.sampling.sampler import Sampler
from ullm.protocol.messages import (
    ModelInfo,
    Prepare,
    Progress,
    Sampled,
    ScheduledSequence,
    Start,
    Step,
    StepResult,
    TokenLogprobs,
)

PROMPT_LOGPROBS_CHUNK = 128
"""Positions whose logits are held at once for prompt logprobs."""


@dataclass(slots=True)
class Pending:
    """A submitted step; implements `ullm.protocol.runner.PendingStep`.

    Args:
        tokens: sampled tokens, on their way to the host.
        sampled: sequence → index in ``tokens``.
        accepted: sequence → right guesses, whose successors follow in ``tokens``.
        prompt_logprobs: sequence → its part, where it was asked for.
    """

    step_id: int
    began: float
    tokens: Fetched | None = None
    sampled: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    logprobs: PendingLogprobs | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self.tokens is None or self.tokens.done()

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled."""
        tokens = [] if self.tokens is None else self.tokens.wait()[0].tolist()
        logprobs = None if self.logprobs is None else self.logprobs.result()
        found = []
        for seq_id in self.order:
            index, prompt = self.sampled.get(seq_id), self.prompt_logprobs.get(seq_id)
            if index is None and prompt is None:
                continue
            entry = logprobs[index] if logprobs is not None and index is not None else None
            token_ids = [] if index is None else tokens[index : index + 1 + self.accepted.get(seq_id, 0)]
            found.append(Sampled(seq_id, token_ids, None if entry is None else [entry], prompt))
        return StepResult(self.step_id, found, time.perf_counter() - self.began)


class Pulse:
    """Signs of life within a step that takes long: after a layer, and one per `SIGN_OF_LIFE` at most.

    Args:
        patience: seconds that the next one may take, of a single layer.
    """

    def __init__(self, progress: Callable[[Progress], None], patience: float) -> None:
        self._progress = progress
        self._patience = patience
        self._last = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._last = time.monotonic()

    def __call__(self) -> None:
        """A layer is done."""
        now = time.monotonic()
        if now - self._last >= SIGN_OF_LIFE:
            self._last = now
            self._progress(Progress("step", self._patience))


class ModelRunner:
    """See `ullm.protocol.runner.Runner`. ``load`` once, then ``submit``, at last ``close``."""

    def __init__(self) -> None:
        self._prepared: PreparedModel | None = None
        self._pulse: Pulse | None = None
        self._rank: Rank | None = None
        self._asleep: SleepingRank | None = None
        self._table = SequenceTable(1)
        self._sampler: Sampler | None = None
        self._last_tokens = LastTokens(0, torch.device("cpu"))

    def prepare(self, prepare: Prepare, progress: Callable[[Progress], None]) -> None:
        """See `Runner.prepare`."""
        progress(Progress("prepare"))
        self._prepared = prepare_model(prepare)

    def load(self, start: Start, progress: Callable[[Progress], None]) -> ModelInfo:
        """See `Runner.load`.

        Raises:
            ModelError: one line that names file and tensor, or device and bytes.
            ConfigError: options that do not fit this machine or this model.
        """
        prepared, self._prepared = self._prepared, None
        model = prepared.model if prepared is not None and prepared.suits(start) else None
        self._pulse = Pulse(progress, start.config.step_timeout)
        return self._take_up(open_rank(start, progress, model))

    def _take_up(self, rank: Rank) -> ModelInfo:
        """Begin with a rank that knows no sequence."""
        self._rank = rank
        device, info = rank.site.device, rank.info
        self._table = SequenceTable(info.block_size)
        self._sampler = Sampler(info.vocab_size, device, info.eos_token_ids, rank.model.choose)
        self._last_tokens = rank.last_tokens
        return info

    @torch.inference_mode()
    def submit(self, step: Step) -> Pending:
        """See `Runner.submit`.

        Raises:
            ValueError: a row that cannot be computed; names the sequence.
            RuntimeError: no model is loaded.
        """
        began = time.perf_counter()
        rank, sampler = self._loaded()
        for seq_id in step.released:
            self._table.forget(seq_id)
            sampler.forget(seq_id)
        for new in step.new_sequences:
            self._table.add(new)
            sampler.add(new.seq_id, new.params, new.token_ids, new.num_prompt_tokens)
        pending = Pending(step.step_id, began, order=[row.seq_id for row in step.scheduled])
        if step.scheduled:
            plan = self._table.plan(step)
            self._finish(plan, self._forward(rank, plan), pending)
        return pending

    def sleep(self, level: int) -> dict[str, int]:
        """See `Runner.sleep`.

        Raises:
            RuntimeError: no model is loaded.
        """
        if self._asleep is None:
            self._asleep = SleepingRank(self._stop_steps())
        return self._asleep.sleep(level)

    def wake(self, progress: Callable[[Progress], None]) -> ModelInfo:
        """See `Runner.wake`.

        Raises:
            ModelError: the weights cannot be loaded any more, or there is no room for them.
            RuntimeError: not asleep.
        """
        if self._asleep is None:
            raise RuntimeError("wake comes after sleep")
        info = self._take_up(self._asleep.wake(progress))
        self._asleep = None
        return info

    def close(self) -> dict[str, float]:
        """See `Runner.close`; it may come at any time, asleep or in the middle of waking, too."""
        if self._rank is None and self._asleep is None:
            return {}
        timings, began = {}, time.perf_counter()
        rank, self._asleep = self._asleep or SleepingRank(self._stop_steps()), None
        stages: list[tuple[str, Callable[[], None]]] = [
            ("steps", lambda: None),  # stopped already
            ("graphs", rank.drop_graphs),
            ("kv_cache", rank.drop_pool),
            ("weights", rank.drop_weights),
            ("process_group", rank.site.parallel.close),
            ("device_cache", partial(let_go, rank.site.device)),
        ]
        for stage, release in stages:
            release()
            timings[stage] = time.perf_counter() - began
            began = time.perf_counter()
        return timings

    def _stop_steps(self) -> Rank:
        """Forget every sequence; the rank is not this runner's any more."""
        rank, _ = self._loaded()
        if rank.site.device.type == "cuda":
            torch.cuda.synchronize(rank.site.device)
        self._rank = self._sampler = None
        self._table = SequenceTable(1)
        self._last_tokens = LastTokens(0, torch.device("cpu"))
        return rank

    def _loaded(self) -> tuple[Rank, Sampler]:
        if self._rank is None or self._sampler is None:
            raise RuntimeError("no model is loaded: load or wake come before submit, and nothing after close")
        return self._rank, self._sampler

    def _forward(self, rank: Rank, plan: Plan) -> Tensor:
        """The step's hidden states ``[T, hidden_size]``."""
        if rank.graphs is not None and rank.graphs.covers(plan.layout, self._last_tokens):
            return rank.graphs.run(plan.layout, plan.fresh)
        batch = rank.backend.prepare(plan.layout)
        if plan.fresh[0]:
            self._last_tokens.copy_to(batch.token_ids, *plan.fresh)
        if self._pulse is not None:
            self._pulse.begin()
            batch.layer_done = self._pulse
        return rank.model.forward(batch.token_ids, batch)

    def _finish(self, plan: Plan, hidden: Tensor, pending: Pending) -> None:
        """Sample, keep the tokens for the next step, and start bringing them to the host."""
        rank, sampler = self._loaded()
        for (row, state), end in zip(plan.rows, plan.ends, strict=True):
            if state.new.params.prompt_logprobs is not None:
                self._add_prompt_logprobs(row, state, hidden[end - row.count : end], pending)
        draws = draws_of(plan)
        if not draws.rows:
            return
        rows, seq_ids = draws.positions, draws.seq_ids
        logits = rank.model.logits(pick(hidden, rows))
        tokens = sampler.sample(logits, seq_ids, draws.ahead if draws.drafted else None)
        if any(state.new.params.logprobs is not None for _, state in draws.rows):
            pending.logprobs = sampler.start_logprobs(logits, seq_ids, tokens)
        pending.sampled = {row.seq_id: i for (row, _), i in zip(draws.rows, draws.first, strict=True)}
        if draws.drafted:
            tokens = self._accept(draws, tokens, pending)
        else:
            self._keep([state for _, state in draws.rows], tokens)
        pending.tokens = Fetched(tokens)

    def _accept(self, draws: Draws, tokens: Tensor, pending: Pending) -> Tensor:
        """Verify drafts and keep what is right; returns the tokens on the host.

        That waits for the device: what the next step may be depends on how many are right.
        """
        _, sampler = self._loaded()
        on_host = tokens.cpu()
        accepted = draws.count_accepted(on_host.tolist())
        last = [first + count for first, count in zip(draws.first, accepted, strict=True)]
        self._keep([state for _, state in draws.rows], pick(tokens, last))
        for (row, state), count in zip(draws.rows, accepted, strict=True):
            if count:
                sampler.advance(row.seq_id, count)
                state.num_sampled += count
                pending.accepted[row.seq_id] = count
        return on_host

    def _keep(self, states: list[SequenceState], tokens: Tensor) -> None:
        self._last_tokens.put([state.slot for state in states], tokens)
        for state in states:
            state.num_sampled += 1

    def _add_prompt_logprobs(
        self, row: ScheduledSequence, state: SequenceState, hidden: Tensor, pending: Pending
    ) -> None:
        """Position p predicts token p + 1, as long as that belongs to the prompt."""
        rank, sampler = self._loaded()
        count = min(row.start + row.count, state.new.num_prompt_tokens - 1) - row.start
        if count < 1:
            return
        k = state.new.params.prompt_logprobs or 0
        following = state.tokens[row.start + 1 : row.start + 1 + count].tolist()
        found: list[TokenLogprobs] = []
        for first in range(0, count, PROMPT_LOGPROBS_CHUNK):
            part = slice(first, min(first + PROMPT_LOGPROBS_CHUNK, count))
            found += sampler.prompt_logprobs(rank.model.logits(hidden[part]), following[part], k)
        pending.prompt_logprobs[row.seq_id] = found
