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

from ullm.model.architectures.decoder import Decoder
from ullm.model.execution.adapters import AdapterTable
from ullm.model.execution.chosen import ArrivingTokens, ChosenTokens, digest
from ullm.model.execution.drafts import SampledPositions, sampled_positions
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.execution.pooling import Pooling
from ullm.model.execution.rank import PROGRESS_SECONDS, Rank, open_rank
from ullm.model.execution.sequences import SequenceState, SequenceTable, StepPlan
from ullm.model.execution.sleep import SleepingRank
from ullm.model.execution.standby import PreparedModel, prepare_model
from ullm.model.execution.vocabulary import open_constraints
from ullm.model.memory.device_memory import release_cached_memory
from ullm.model.memory.kv_blocks import read_blocks, write_blocks
from ullm.model.memory.upload import select_rows
from ullm.model.sampling.logprobs import PendingLogprobs
from ullm.model.sampling.sampler import Sampler
from ullm.protocol.messages import (
    Adapter,
    ModelInfo,
    NewSequence,
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
        chooses: whether this rank chooses the tokens, so that its result is the step's.
        is_alone: whether there are no other ranks to agree with.
        sampled: sequence → index of its first token in ``tokens``.
        accepted: sequence → number of right guesses, whose successors follow in ``tokens``.
        logprobs: log probabilities of ``tokens``; None if no sequence wants them.
        prompt_logprobs: sequence → log probabilities of its prompt tokens in this step.
        order: the sequences, in the order of the step.
        errors: sequence → why it cannot go on in its grammar.
        lacking: sequence → why its adapter cannot be loaded.
        embeddings: sequence → its pooled prompt, on the device.
    """

    step_id: int
    began: float
    tokens: ChosenTokens | None = None
    chooses: bool = True
    is_alone: bool = True
    sampled: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    logprobs: PendingLogprobs | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    lacking: dict[int, str] = field(default_factory=dict)
    embeddings: dict[int, Tensor] = field(default_factory=dict)

    def done(self) -> bool:
        """Return True if `result` would return at once."""
        return self.tokens is None or self.tokens.done()

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled."""
        tokens = [] if self.tokens is None else self.tokens.wait()
        agreed = 0 if self.is_alone else digest(self.step_id, [*tokens, *self.lacking])
        if not self.chooses:
            return StepResult(self.step_id, [], time.perf_counter() - self.began, agreed)
        logprobs = None if self.logprobs is None else self.logprobs.result()
        results = []
        for seq_id in self.order:
            index, prompt = self.sampled.get(seq_id), self.prompt_logprobs.get(seq_id)
            if seq_id in self.lacking:
                results.append(Sampled(seq_id, [], error=self.lacking[seq_id], lacks_adapter=True))
                continue
            if index is None and prompt is None:
                continue
            entry = logprobs[index] if logprobs is not None and index is not None else None
            token_ids = [] if index is None else tokens[index : index + 1 + self.accepted.get(seq_id, 0)]
            entries, error = None if entry is None else [entry], self.errors.get(seq_id, "")
            pooled = self.embeddings.get(seq_id)
            embedding = b"" if pooled is None else pooled.cpu().numpy().tobytes()
            results.append(Sampled(seq_id, token_ids, entries, prompt, error, embedding=embedding))
        return StepResult(self.step_id, results, time.perf_counter() - self.began, agreed)


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
        self._tokenizer_path = ""
        self._table = SequenceTable(1)
        self._pooling = Pooling()
        self._sampler: Sampler | None = None
        self._last_tokens = LastTokens(0, torch.device("cpu"))
        self._arriving = ArrivingTokens()
        self._adapters: AdapterTable | None = None
        self._lacking: dict[int, str] = {}

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
        model = prepared if prepared is not None and prepared.suits(start) else None
        self._heartbeat = StepHeartbeat(progress, start.config.step_timeout)
        self._tokenizer_path = start.tokenizer_path
        return self._serve(open_rank(start, progress, model))

    def _serve(self, rank: Rank) -> ModelInfo:
        """Serve steps on a loaded rank, without any sequences."""
        self._rank = rank
        device, info = rank.context.device, rank.info
        self._table = SequenceTable(info.block_size)
        constraints = open_constraints(self._tokenizer_path, info) if rank.context.parallel.chooses else None
        self._sampler = Sampler(info.vocab_size, device, info.eos_token_ids, rank.model.choose, constraints)
        self._last_tokens, self._arriving = rank.last_tokens, ArrivingTokens()
        is_elsewhere = rank.model.is_elsewhere if isinstance(rank.model, Decoder) else lambda _: False
        self._adapters = AdapterTable(rank.model, device, is_elsewhere)
        return info

    @torch.inference_mode()
    def keep_adapter(self, adapter: Adapter, *, wanted: bool) -> str:
        """See `Runner.keep_adapter`.

        Raises:
            RuntimeError: no model is loaded.
        """
        self._loaded()
        assert self._adapters is not None, "a loaded rank has a table"
        if wanted:
            return self._adapters.load(adapter)
        self._adapters.drop(adapter.number)
        return ""

    @torch.inference_mode()
    def export_blocks(self, block_ids: list[int]) -> memoryview:
        """See `Runner.export_blocks`.

        Raises:
            RuntimeError: no model is loaded.
        """
        rank, _ = self._loaded()
        return read_blocks(rank.backend.block_rows(), block_ids)

    @torch.inference_mode()
    def import_blocks(self, block_ids: list[int], content: bytearray) -> None:
        """See `Runner.import_blocks`.

        Raises:
            ValueError: the content is not as long as that of so many blocks.
            RuntimeError: no model is loaded.
        """
        rank, _ = self._loaded()
        write_blocks(rank.backend.block_rows(), block_ids, content)

    @torch.inference_mode()
    def submit(self, step: Step) -> SubmittedStep:
        """See `Runner.submit`.

        Raises:
            ValueError: a scheduled sequence cannot be computed; names it.
            RuntimeError: no model is loaded.
        """
        began = time.perf_counter()
        rank, sampler = self._loaded()
        parallel = rank.context.parallel
        for seq_id in step.released:
            self._leave_adapter(seq_id)
            self._table.forget(seq_id)
            self._pooling.forget(seq_id)
            sampler.forget(seq_id)
        for new in step.new_sequences:
            self._table.add(new)
            self._use_adapter(new)
            if parallel.chooses:
                sampler.add(new.seq_id, new.params, new.token_ids, new.num_prompt_tokens, new.grammar)
        submitted = SubmittedStep(
            step.step_id,
            began,
            order=[item.seq_id for item in step.scheduled],
            chooses=parallel.chooses,
            is_alone=parallel.total == 1,
            lacking={
                item.seq_id: self._lacking[item.seq_id]
                for item in step.scheduled
                if item.seq_id in self._lacking
            },
        )
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
        rank, sampler = self._loaded()
        if rank.context.device.type == "cuda":
            torch.cuda.synchronize(rank.context.device)
        sampler.close()
        if self._adapters is not None:
            self._adapters.clear()
        self._rank = self._sampler = self._adapters = None
        self._lacking = {}
        self._table, self._pooling = SequenceTable(1), Pooling()
        self._last_tokens = LastTokens(0, torch.device("cpu"))
        return rank

    def _loaded(self) -> tuple[Rank, Sampler]:
        if self._rank is None or self._sampler is None:
            raise RuntimeError("no model is loaded: load or wake come before submit, and nothing after close")
        return self._rank, self._sampler

    def _use_adapter(self, new: NewSequence) -> None:
        """Load the adapter of a sequence, if need be; without it the sequence fails, and nothing else."""
        if new.adapter is not None and self._adapters is not None:
            if error := self._adapters.use(new.adapter):
                self._lacking[new.seq_id] = error

    def _leave_adapter(self, seq_id: int) -> None:
        state = self._table.sequences.get(seq_id)
        if state is not None and state.new.adapter is not None and self._adapters is not None:
            self._adapters.leave(state.new.adapter)
            self._lacking.pop(seq_id, None)

    def _forward(self, rank: Rank, plan: StepPlan) -> Tensor:
        """The step's hidden states ``[T, hidden_size]``."""
        adapters = () if self._adapters is None else self._adapters.rows(plan)
        self._arriving.settle(plan.device_only_tokens[1], self._last_tokens)
        graphs = None if adapters else rank.graphs  # which know nothing of adapters
        if graphs is not None and graphs.covers(plan.layout, self._last_tokens):
            return graphs.run(plan.layout, plan.device_only_tokens)
        batch = rank.backend.prepare(plan.layout)
        batch.adapters = adapters
        if plan.device_only_tokens[0]:
            self._last_tokens.copy_to(batch.token_ids, *plan.device_only_tokens)
        if self._heartbeat is not None:
            self._heartbeat.begin()
            batch.layer_done = self._heartbeat
        return rank.model.forward(batch.token_ids, batch)

    def _sample(self, plan: StepPlan, hidden: Tensor, submitted: SubmittedStep) -> None:
        """Sample, keep the tokens for the next step, and start copying them to the host."""
        rank, sampler = self._loaded()
        parallel = rank.context.parallel
        for (scheduled, state), end in zip(plan.sequences, plan.ends, strict=True):
            if state.new.params.prompt_logprobs is not None and parallel.is_last_stage:
                own = hidden[end - scheduled.count : end]
                self._add_prompt_logprobs(scheduled, state, own, submitted)
            if state.new.params.pooling and submitted.chooses:
                own = hidden[end - scheduled.count : end]
                pooled = self._pooling.take(state.new, scheduled, own)
                if pooled is not None:
                    submitted.embeddings[scheduled.seq_id] = pooled
        sampled = sampled_positions(plan)
        if not sampled.sequences:
            return
        pairs = zip(sampled.sequences, sampled.first, strict=True)
        submitted.sampled = {scheduled.seq_id: first for (scheduled, _), first in pairs}
        if parallel.is_last_stage:
            tokens = self._choose(sampled, hidden, submitted)
        else:
            tokens = torch.empty(len(sampled.positions), dtype=torch.int64, device=rank.context.device)
        submitted.tokens = ChosenTokens(tokens, parallel.start_sharing(tokens))
        if sampled.drafted:
            self._verify(sampled, submitted)
        else:
            self._keep([state for _, state in sampled.sequences], submitted.tokens)
        if submitted.chooses:
            accepted = submitted.accepted
            sampler.follow(
                submitted.tokens.fetch(),
                {seq: (first, 1 + accepted.get(seq, 0)) for seq, first in submitted.sampled.items()},
            )

    def _choose(self, sampled: SampledPositions, hidden: Tensor, submitted: SubmittedStep) -> Tensor:
        """Return the tokens of all positions; on a rank that does not choose, room for them.

        All ranks of the stage compute their part of the logits.
        """
        rank, sampler = self._loaded()
        logits, seq_ids = rank.model.logits(select_rows(hidden, sampled.positions)), sampled.seq_ids
        if not submitted.chooses:
            return torch.empty(len(seq_ids), dtype=torch.int64, device=logits.device)
        if sampled.drafted:
            tokens = sampler.sample(logits, seq_ids, sampled.ahead, sampled.drafts)
        else:
            tokens = sampler.sample(logits, seq_ids)
        submitted.errors = sampler.errors(seq_ids)
        if any(state.new.params.logprobs is not None for _, state in sampled.sequences):
            submitted.logprobs = sampler.start_logprobs(logits, seq_ids, tokens)
        return tokens

    def _verify(self, sampled: SampledPositions, submitted: SubmittedStep) -> None:
        """Verify drafts and keep the tokens that follow right guesses.

        This waits for the device: the next step depends on how many guesses are right.
        """
        _, sampler = self._loaded()
        chosen = submitted.tokens
        assert chosen is not None, "drafts are sampled"
        accepted = sampled.count_accepted(chosen.wait())
        last = [first + count for first, count in zip(sampled.first, accepted, strict=True)]
        slots = [state.slot for _, state in sampled.sequences]
        self._last_tokens.put(slots, select_rows(chosen.arrive(), last))
        for (scheduled, state), count in zip(sampled.sequences, accepted, strict=True):
            state.num_sampled += 1 + count
            if count:
                if submitted.chooses:
                    sampler.advance(scheduled.seq_id, count)
                submitted.accepted[scheduled.seq_id] = count

    def _keep(self, states: list[SequenceState], chosen: ChosenTokens) -> None:
        """Keep each sequence's last token on the device, as soon as it is there.

        Another stage than the last one need not wait: it may compute other sequences meanwhile.
        """
        rank, _ = self._loaded()
        slots = [state.slot for state in states]
        if rank.context.parallel.is_last_stage:
            self._last_tokens.put(slots, chosen.arrive())
        else:
            self._arriving.add(slots, chosen)
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
            logits = rank.model.logits(hidden[part])  # by all ranks of the stage
            if submitted.chooses:
                logprobs += sampler.prompt_logprobs(logits, following[part], k)
        submitted.prompt_logprobs[scheduled.seq_id] = logprobs
