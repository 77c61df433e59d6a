"""A runner without a model: each token is a pure function of all tokens before it.

So a sequence that is resumed after a crash, on any worker, must go on exactly as it would have, and a
test can say what must come out (`scripted_tokens`). The runner also keeps what a real one would have
in its KV blocks, and refuses a plan that reads what was never written or writes over what is in use.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

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
from ullm.sampling import SamplingParams
from ullm.scheduling.drafting import can_draft
from ullm.testing.settings import ScriptedSettings

_MASK = (1 << 64) - 1
_EMPTY = 0x9E3779B97F4A7C15  # the prefix hash of no tokens


class ScriptViolation(AssertionError):
    """A step plan contradicts what the worker holds: the scheduler has a bug."""


def scripted_tokens(
    prompt: Sequence[int], params: SamplingParams, count: int, settings: ScriptedSettings | None = None
) -> list[int]:
    """Return at most ``count`` tokens that `ScriptedRunner` generates; the last one may be EOS."""
    settings = settings or ScriptedSettings()
    state = _EMPTY
    for token in prompt:
        state = _mix(state, token)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_draw(settings, params, state, tokens, len(prompt)))
        state = _mix(state, tokens[-1])
        if tokens[-1] == settings.eos_token_id:
            break
    return tokens[len(prompt) :]


def _mix(state: int, token: int) -> int:
    state = ((state ^ token) * 0xBF58476D1CE4E5B9) & _MASK  # SplitMix64's multiplier
    return state ^ (state >> 29)


def _draw(
    settings: ScriptedSettings, params: SamplingParams, state: int, tokens: Sequence[int], num_prompt: int
) -> int:
    index = len(tokens) - num_prompt
    if settings.eos_after is not None and index >= settings.eos_after and not params.ignore_eos:
        return settings.eos_token_id
    if not params.greedy:
        state = _mix(_mix(state, params.seed or 0), index)
    if settings.repeat is not None and settings.repeat <= len(tokens) and _mix(state, 1) % 8:
        return tokens[-settings.repeat]
    return settings.first_token + _mix(state, 0) % (settings.vocab_size - settings.first_token)


@dataclass
class _Sequence:
    """One sequence, as the worker knows it. ``hashes[p]`` stands for tokens 0 … p; the first ``behind``
    blocks of its table are behind the window, and others' by now."""

    num_prompt_tokens: int
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    computed: int = 0
    behind: int = 0

    def append(self, token: int) -> None:
        self.hashes.append(_mix(self.hashes[-1] if self.hashes else _EMPTY, token))
        self.tokens.append(token)


class ScriptedRunner:
    """A `Runner` that follows a script; see the module."""

    def __init__(self) -> None:
        self._settings = ScriptedSettings()
        self._sequences: dict[int, _Sequence] = {}
        self._blocks: list[list[int]] = []
        self._owners: list[dict[int, int]] = []  # per block: sequence → index in its table
        self._block_size = 0
        self._busy_until = 0.0
        self._asleep = False
        self._info: ModelInfo | None = None

    def prepare(self, prepare: Prepare, progress: Callable[[Progress], None]) -> None:
        """Do nothing: there is nothing to prepare."""

    def load(self, start: Start, progress: Callable[[Progress], None]) -> ModelInfo:
        """Pretend to load."""
        self._settings = settings = ScriptedSettings.read(start.model_path)
        progress(Progress("load", settings.load_seconds + 60.0))
        time.sleep(settings.load_seconds)
        num_blocks = start.config.num_blocks or settings.num_blocks
        self._block_size = start.config.block_size
        self._open_pool(num_blocks)
        self._info = ModelInfo(
            architecture="Scripted",
            num_parameters=0,
            vocab_size=settings.vocab_size,
            eos_token_ids=(settings.eos_token_id,),
            context_len=start.config.context_len or settings.context_len,
            num_blocks=num_blocks,
            block_size=self._block_size,
            dtype="none",
            device="none",
            window=settings.window,
            kv_identity=blake2b(f"{start.model_path} {settings}".encode(), digest_size=16).hexdigest(),
        )
        return self._info

    def submit(self, step: Step) -> ScriptedStep:
        """Check the plan against what is held, and follow it.

        Raises:
            ScriptViolation: it cannot be followed.
        """
        began = time.perf_counter()
        _require(not self._asleep, f"step {step.step_id} came while asleep")
        for seq_id in step.released:
            self._forget(seq_id)
        for new in step.new_sequences:
            self._add(new)
        sampled = [answer for row in step.scheduled if (answer := self._row(row)) is not None]
        tokens = sum(row.count for row in step.scheduled)
        self._busy_until = max(began, self._busy_until) + (
            self._settings.step_seconds + tokens * self._settings.token_seconds
        )
        pending = ScriptedStep(step.step_id, sampled, began, self._busy_until)
        if not self._settings.asynchronous:
            pending.wait()
        return pending

    def keep_adapter(self, adapter: Adapter, *, wanted: bool) -> str:
        """Keep nothing: the answers do not depend on adapters. One whose name begins with "broken" is."""
        return f"{adapter.path}: is broken" if wanted and adapter.name.startswith("broken") else ""

    def export_blocks(self, block_ids: list[int]) -> memoryview:
        """Return the hashes that the blocks hold, eight bytes for each position."""
        _require(not self._asleep, "blocks are exported while asleep")
        held = array("Q", (state for block in block_ids for state in self._blocks[block]))
        return memoryview(held.tobytes())

    def import_blocks(self, block_ids: list[int], content: bytearray) -> None:
        """Put hashes into blocks.

        A sequence that has one of them must have ended; it cannot be computed any more.

        Raises:
            ValueError: the content is not as long as that of so many blocks.
        """
        _require(not self._asleep, "blocks are imported while asleep")
        for block in block_ids:
            for seq_id, index in self._owners[block].items():
                owner = self._sequences[seq_id]
                owner.computed = min(owner.computed, index * self._block_size)
        if len(content) != 8 * self._block_size * len(block_ids):
            raise ValueError(f"{len(content)} bytes for {len(block_ids)} KV blocks")
        states = array("Q", bytes(content)).tolist()
        for place, block in enumerate(block_ids):
            self._blocks[block] = states[place * self._block_size : (place + 1) * self._block_size]

    def sleep(self, level: int) -> dict[str, int]:
        """Forget everything; a token in the pool counts for eight bytes, and the weights for a thousand."""
        kv_cache = 8 * self._block_size * len(self._blocks)
        self._drop_pool()
        self._asleep = True
        return {"kv_cache": kv_cache} | ({"weights": 1000} if level > 1 else {})

    def wake(self, progress: Callable[[Progress], None]) -> ModelInfo:
        """Pretend to load again, with empty blocks."""
        _require(self._asleep and self._info is not None, "woken, but not asleep")
        assert self._info is not None
        progress(Progress("load", self._settings.wake_seconds + 60.0))
        time.sleep(self._settings.wake_seconds)
        self._open_pool(self._info.num_blocks)
        self._asleep = False
        return self._info

    def close(self) -> dict[str, float]:
        """Forget everything."""
        self._drop_pool()
        return {"kv": 0.0, "weights": 0.0}

    def _open_pool(self, num_blocks: int) -> None:
        self._blocks = [[0] * self._block_size for _ in range(num_blocks)]
        self._owners = [{} for _ in range(num_blocks)]

    def _drop_pool(self) -> None:
        self._sequences.clear()
        self._blocks, self._owners = [], []

    def _forget(self, seq_id: int) -> None:
        sequence = self._sequences.pop(seq_id, None)
        for block in sequence.table if sequence else ():
            self._owners[block].pop(seq_id, None)

    def _add(self, new: NewSequence) -> None:
        _require(new.seq_id not in self._sequences, f"sequence {new.seq_id} is new, but known")
        sequence = self._sequences[new.seq_id] = _Sequence(new.num_prompt_tokens, new.params)
        for token in new.token_ids:
            _require(0 <= token < self._settings.vocab_size, f"token {token} is outside of the vocabulary")
            sequence.append(token)
        behind = self._first_seen(new.num_cached_tokens) // self._block_size
        sequence.table, sequence.behind = new.block_ids[:behind], behind
        self._give_blocks(new.seq_id, sequence, new.block_ids[behind:])
        sequence.computed = new.num_cached_tokens
        self._read(new.seq_id, sequence, new.num_cached_tokens)

    def _first_seen(self, position: int) -> int:
        return max(0, position - self._settings.window + 1) if self._settings.window else 0

    def _read(self, seq_id: int, sequence: _Sequence, end: int) -> None:
        """Check what the token at ``end`` sees before it."""
        for position in range(self._first_seen(end), end):
            found = self._blocks[sequence.table[position // self._block_size]][position % self._block_size]
            _require(
                found == sequence.hashes[position],
                f"sequence {seq_id}: position {position} is not what its block has cached",
            )

    def _leave_behind(self, seq_id: int, sequence: _Sequence, start: int) -> None:
        """Give up what tokens from ``start`` on do not see."""
        behind = max(sequence.behind, self._first_seen(start) // self._block_size)
        for block in sequence.table[sequence.behind : behind]:
            self._owners[block].pop(seq_id, None)
        sequence.behind = behind

    def _give_blocks(self, seq_id: int, sequence: _Sequence, block_ids: Sequence[int]) -> None:
        for block in block_ids:
            _require(0 <= block < len(self._blocks), f"sequence {seq_id}: block {block} does not exist")
            _require(seq_id not in self._owners[block], f"sequence {seq_id}: block {block} is there twice")
            self._owners[block][seq_id] = len(sequence.table)
            sequence.table.append(block)

    def _row(self, row: ScheduledSequence) -> Sampled | None:
        sequence = self._sequences.get(row.seq_id)
        if sequence is None:
            raise ScriptViolation(f"sequence {row.seq_id} is not known here")
        self._leave_behind(row.seq_id, sequence, row.start)
        self._give_blocks(row.seq_id, sequence, row.new_block_ids)
        end = row.start + row.count - len(row.draft)
        who = f"sequence {row.seq_id}, positions {row.start} to {end - 1}"
        _require(end > row.start, f"{who}: empty")
        _require(
            row.start <= sequence.computed, f"{who}: only {sequence.computed} positions are computed before"
        )
        _require(end <= len(sequence.tokens), f"{who}: only {len(sequence.tokens)} tokens are known")
        room = len(sequence.table) * self._block_size
        _require(end + len(row.draft) <= room, f"{who}: only {len(sequence.table)} blocks")
        if self._settings.window:
            self._read(row.seq_id, sequence, row.start)
        for position in range(row.start, end):
            self._write(row.seq_id, sequence, position, sequence.hashes[position])
        sequence.computed = max(sequence.computed, end)
        self._write_draft(row, sequence, end)
        return self._sample(row, sequence)

    def _write_draft(self, row: ScheduledSequence, sequence: _Sequence, end: int) -> None:
        if not row.draft:
            return
        who = f"sequence {row.seq_id}: a draft after position {end - 1}"
        alone = row.count == 1 + len(row.draft) and row.sample and end == len(sequence.tokens)
        _require(alone, f"{who} is not after its last token alone")
        _require(can_draft(sequence.params), f"{who} of a request that cannot have one")
        state = sequence.hashes[-1]
        for i, token in enumerate(row.draft):
            _require(0 <= token < self._settings.vocab_size, f"{who}: {token} is outside of the vocabulary")
            state = _mix(state, token)
            self._write(row.seq_id, sequence, end + i, state)

    def _write(self, seq_id: int, sequence: _Sequence, position: int, state: int) -> None:
        index, offset = divmod(position, self._block_size)
        block = sequence.table[index]
        content = self._blocks[block]
        if content[offset] == state:
            return
        for other, other_index in self._owners[block].items():
            in_use = self._sequences[other].computed > other_index * self._block_size + offset
            _require(
                other == seq_id or not in_use,
                f"sequence {seq_id} writes position {position} into block {block} over sequence {other}'s",
            )
        content[offset] = state

    def _sample(self, row: ScheduledSequence, sequence: _Sequence) -> Sampled | None:
        end, params = row.start + row.count - len(row.draft), sequence.params
        prompt_logprobs = None
        if params.prompt_logprobs is not None and row.start < sequence.num_prompt_tokens:
            known = sequence.tokens[row.start + 1 : min(end + 1, sequence.num_prompt_tokens)]
            prompt_logprobs = [_logprobs(token, params.prompt_logprobs) for token in known]
        if not row.sample:
            return Sampled(row.seq_id, [], None, prompt_logprobs) if prompt_logprobs is not None else None
        _require(end == len(sequence.tokens), f"sequence {row.seq_id} samples before its last token")
        found = self._draw_all(row, sequence)
        logprobs = None
        if params.logprobs is not None:
            logprobs = [_logprobs(token, params.logprobs) for token in found]
        return Sampled(row.seq_id, found, logprobs, prompt_logprobs)

    def _draw_all(self, row: ScheduledSequence, sequence: _Sequence) -> list[int]:
        """Return the next token, and one more for each right guess."""
        found: list[int] = []
        for guess in [*row.draft, None]:
            token = _draw(
                self._settings,
                sequence.params,
                sequence.hashes[-1],
                sequence.tokens,
                sequence.num_prompt_tokens,
            )
            sequence.append(token)
            found.append(token)
            if token != guess:
                break
            sequence.computed += 1
        return found


class ScriptedStep:
    """A pending step that is done when its time is over."""

    def __init__(self, step_id: int, sampled: list[Sampled], began: float, done_at: float) -> None:
        self._step_id = step_id
        self._sampled = sampled
        self._began = began
        self._done_at = done_at

    def done(self) -> bool:
        """Return whether its time is over."""
        return time.perf_counter() >= self._done_at

    def wait(self) -> None:
        """Sleep until it is."""
        left = self._done_at - time.perf_counter()
        if left > 0:  # a sleep of no time would still give the processor away
            time.sleep(left)

    def result(self) -> StepResult:
        """Return what was sampled."""
        self.wait()
        return StepResult(self._step_id, self._sampled, time.perf_counter() - self._began)


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """Make the sampled token the most likely one; its neighbours share the rest."""
    top = [(token, -0.5)] + [((token + 1 + i), -1.0 - i) for i in range(count - 1)]
    return TokenLogprobs(token, -0.5, 1, top[:count])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ScriptViolation(message)
