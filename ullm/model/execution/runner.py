"""One rank of a model: load it, run steps, release everything. Implements `ullm.protocol.runner.Runner`.

On a GPU `submit` only launches kernels: sampled tokens stay in a device buffer, one slot per sequence,
from which the next step takes its input, and reach the host through pinned memory and an event. On a CPU
a step is complete when `submit` returns. Both are the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ullm.model.execution.drafts import SampledPositions, sampled_positions
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.execution.rank import PROGRESS_SECONDS, Rank, open_rank
from ullm.model.execution.sequences import SequenceState, SequenceTable, StepPlan
from ullm.model.execution.sleep import SleepingRank
from ullm.model.execution.standby import PreparedModel, prepare_model
from ullm.model.memory.device_memory import release_cached_memory
from ullm.model.memory.fetch import Fetched
from ullm.model.memory.upload import select_rows
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
"""Positions whose logits are in memory at the same time for prompt log probabilities."""


@dataclass(slots=True)
class SubmittedStep:
    """A submitted step; implements `ullm.protocol.runner.PendingStep`.

    Args:
        began: when it was submitted, as `time.perf_counter` says.
        tokens: sampled tokens, on their way to the host; None if nothing was sampled.
        sampled: sequence → index of its first token in ``tokens``.
        accepted: sequence → number of right guesses, whose successors follow in ``tokens``.
        logprobs: log probabilities of ``tokens``; None if no sequence wants them.
        prompt_logprobs: sequence → log probabilities of its prompt tokens in this step.
        order: the sequences, in the order of the step.
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
        """Return True if `result` would return at once."""
        return self.tokens is None or self.tokens.done()

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled."""
        tokens = [] if self.tokens is None else self.tokens.wait()[0].tolist()
        logprobs = None if self.logprobs is None else self.logprobs.result()
        results = []
        for seq_id in self.order:
            index, prompt = self.sampled.get(seq_id), self.prompt_logprobs.get(seq_id)
            if index is None and prompt is None:
                continue
            entry = logprobs[index] if logprobs is not None and index is not None else None
            token_ids = [] if index is None else tokens[index : index + 1 + self.accepted.get(seq_id, 0)]
            results.append(Sampled(seq_id, token_ids, None if entry is None else [entry], prompt))
        return StepResult(self.step_id, results, time.perf_counter() - self.began)


class StepHeartbeat:
    """Progress messages during a long step: after a layer, at most one per `PROGRESS_SECONDS`.

    Args:
        budget: seconds until the next message is due; a single layer may take that long.
    """

    def __init__(self, progress: Callable[[Progress], None], budget: float) -> None:
        self._progress = progress
        self._budget = budget
        self._last = 0.0

    def begin(self) -> None:
        """Note that a step begins."""
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Report progress, if the last report is old enough."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            self._progress(Progress("step", self._budget))


class ModelRunner:
    """Runs one rank; see `ullm.protocol.runner.Runner`."""

    def __init__(self) -> None:
        self._prepared: PreparedModel | None = None
        self._heartbeat: StepHeartbeat | None = None
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
        self._heartbeat = StepHeartbeat(progress, start.config.step_timeout)
        return self._serve(open_rank(start, progress, model))

    def _serve(self, rank: Rank) -> ModelInfo:
        """Serve steps on a loaded rank, without any sequences."""
        self._rank = rank
        device, info = rank.context.device, rank.info
        self._table = SequenceTable(info.block_size)
        self._sampler = Sampler(info.vocab_size, device, info.eos_token_ids, rank.model.choose)
        self._last_tokens = rank.last_tokens
        return info

    @torch.inference_mode()
    def submit(self, step: Step) -> SubmittedStep:
        """See `Runner.submit`.

        Raises:
            ValueError: a scheduled sequence cannot be computed; names it.
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
        submitted = SubmittedStep(step.step_id, began, order=[item.seq_id for item in step.scheduled])
        if step.scheduled:
            plan = self._table.plan(step)
            self._sample(plan, self._forward(rank, plan), submitted)
        return submitted

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
            ModelError: the weights can no longer be loaded, or do not fit into memory.
            RuntimeError: the runner is not asleep.
        """
        if self._asleep is None:
            raise RuntimeError("wake comes after sleep")
        info = self._serve(self._asleep.wake(progress))
        self._asleep = None
        return info

    def close(self) -> dict[str, float]:
        """See `Runner.close`. It may be called at any time, also while asleep or after a wake that failed."""
        if self._rank is None and self._asleep is None:
            return {}
        timings, began = {}, time.perf_counter()
        rank, self._asleep = self._asleep or SleepingRank(self._stop_steps()), None
        stages: list[tuple[str, Callable[[], None]]] = [
            ("steps", lambda: None),  # _stop_steps has stopped them
            ("graphs", rank.drop_graphs),
            ("kv_cache", rank.drop_pool),
            ("weights", rank.drop_weights),
            ("process_group", rank.context.parallel.close),
            ("device_cache", partial(release_cached_memory, rank.context.device)),
        ]
        for stage, release in stages:
            release()
            timings[stage] = time.perf_counter() - began
            began = time.perf_counter()
        return timings

    def _stop_steps(self) -> Rank:
        """Forget every sequence and give up the rank, which is returned."""
        rank, _ = self._loaded()
        if rank.context.device.type == "cuda":
            torch.cuda.synchronize(rank.context.device)
        self._rank = self._sampler = None
        self._table = SequenceTable(1)
        self._last_tokens = LastTokens(0, torch.device("cpu"))
        return rank

    def _loaded(self) -> tuple[Rank, Sampler]:
        if self._rank is None or self._sampler is None:
            raise RuntimeError("no model is loaded: load or wake come before submit, and nothing after close")
        return self._rank, self._sampler

    def _forward(self, rank: Rank, plan: StepPlan) -> Tensor:
        """The step's hidden states ``[T, hidden_size]``."""
        if rank.graphs is not None and rank.graphs.covers(plan.layout, self._last_tokens):
            return rank.graphs.run(plan.layout, plan.device_only_tokens)
        batch = rank.backend.prepare(plan.layout)
        if plan.device_only_tokens[0]:
            self._last_tokens.copy_to(batch.token_ids, *plan.device_only_tokens)
        if self._heartbeat is not None:
            self._heartbeat.begin()
            batch.layer_done = self._heartbeat
        return rank.model.forward(batch.token_ids, batch)

    def _sample(self, plan: StepPlan, hidden: Tensor, submitted: SubmittedStep) -> None:
        """Sample, keep the tokens for the next step, and start copying them to the host."""
        rank, sampler = self._loaded()
        for (scheduled, state), end in zip(plan.sequences, plan.ends, strict=True):
            if state.new.params.prompt_logprobs is not None:
                own = hidden[end - scheduled.count : end]
                self._add_prompt_logprobs(scheduled, state, own, submitted)
        sampled = sampled_positions(plan)
        if not sampled.sequences:
            return
        seq_ids = sampled.seq_ids
        logits = rank.model.logits(select_rows(hidden, sampled.positions))
        tokens = sampler.sample(logits, seq_ids, sampled.ahead if sampled.drafted else None)
        if any(state.new.params.logprobs is not None for _, state in sampled.sequences):
            submitted.logprobs = sampler.start_logprobs(logits, seq_ids, tokens)
        pairs = zip(sampled.sequences, sampled.first, strict=True)
        submitted.sampled = {scheduled.seq_id: first for (scheduled, _), first in pairs}
        if sampled.drafted:
            tokens = self._verify(sampled, tokens, submitted)
        else:
            self._keep([state for _, state in sampled.sequences], tokens)
        submitted.tokens = Fetched(tokens)

    def _verify(self, sampled: SampledPositions, tokens: Tensor, submitted: SubmittedStep) -> Tensor:
        """Verify drafts and keep the tokens that follow right guesses; return the tokens on the host.

        This waits for the device: the next step depends on how many guesses are right.
        """
        _, sampler = self._loaded()
        on_host = tokens.cpu()
        accepted = sampled.count_accepted(on_host.tolist())
        last = [first + count for first, count in zip(sampled.first, accepted, strict=True)]
        self._keep([state for _, state in sampled.sequences], select_rows(tokens, last))
        for (scheduled, state), count in zip(sampled.sequences, accepted, strict=True):
            if count:
                sampler.advance(scheduled.seq_id, count)
                state.num_sampled += count
                submitted.accepted[scheduled.seq_id] = count
        return on_host

    def _keep(self, states: list[SequenceState], tokens: Tensor) -> None:
        """Keep each sequence's last token on the device."""
        self._last_tokens.put([state.slot for state in states], tokens)
        for state in states:
            state.num_sampled += 1

    def _add_prompt_logprobs(
        self, scheduled: ScheduledSequence, state: SequenceState, hidden: Tensor, submitted: SubmittedStep
    ) -> None:
        """Compute log probabilities of prompt tokens: position p predicts token p + 1."""
        rank, sampler = self._loaded()
        start = scheduled.start
        count = min(start + scheduled.count, state.new.num_prompt_tokens - 1) - start
        if count < 1:
            return
        k = state.new.params.prompt_logprobs or 0
        following = state.tokens[start + 1 : start + 1 + count].tolist()
        logprobs: list[TokenLogprobs] = []
        for first in range(0, count, PROMPT_LOGPROBS_CHUNK):
            part = slice(first, min(first + PROMPT_LOGPROBS_CHUNK, count))
            logprobs += sampler.prompt_logprobs(rank.model.logits(hidden[part]), following[part], k)
        submitted.prompt_logprobs[scheduled.seq_id] = logprobs
