"""What the scheduler and its workers say to each other: values only, one file.

Structs are encoded as arrays and tagged, so that a frame costs microseconds; `ToWorker` and
`FromWorker` are the two languages. A step plan is a delta: a sequence's tokens travel once, when it
is admitted; afterwards a row carries only what changed. Token values that a worker sampled itself
never travel back to it.
"""

from __future__ import annotations

import msgspec

from ullm.config import EngineConfig
from ullm.sampling import SamplingParams


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of everything that crosses a worker's pipe.

    Frozen values make no cycles, so the collector of garbage need not look at them; each step has thousands.
    """


# --- to a worker -------------------------------------------------------------------------------


class RankSpec(msgspec.Struct, frozen=True):
    """Who a worker is. One replica's ranks form one process group.

    Args:
        replica: index of the data-parallel replica.
        rank: rank within the replica; ``tp_rank + pp_rank * tp_size``.
        world_size: ranks of the replica.
        epoch: incarnation of the worker group; a restarted group has a higher one.
        rendezvous: ``host:port`` where the replica's ranks meet; unused with one rank.
        device_index: CUDA device of this rank; None on CPU.
    """

    replica: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    rendezvous: str = ""
    device_index: int | None = None

    @property
    def name(self) -> str:
        """As in logs and errors."""
        return f"replica{self.replica}.rank{self.rank}"


class Start(Frame, frozen=True):
    """The first message to a worker: load the model and answer `Ready`, with `Progress` meanwhile.

    Args:
        config: what to load. ``config.model`` is what the user wrote.
        rank: who the worker is.
        model_path: the local folder or GGUF file that ``config.model`` resolved to.
    """

    config: EngineConfig
    rank: RankSpec
    model_path: str


class NewSequence(Frame, frozen=True):
    """A sequence that the worker does not know yet, or has been told to forget.

    Args:
        seq_id: unique within one scheduler's life.
        token_ids: the prompt and what was generated before, if it is resumed; all are known.
        num_prompt_tokens: length of the original prompt; ``len(token_ids) - num_prompt_tokens`` is
            the index of the next token to be generated.
        params: with ``seed`` set and ``n`` 1.
        block_ids: its KV blocks so far; position p lives in block ``p // block_size``.
        num_cached_tokens: leading tokens whose KV is already in those blocks.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_ids: list[int]
    num_cached_tokens: int = 0


class ScheduledSequence(Frame, frozen=True):
    """One sequence's share of a step: compute KV for positions ``start … start + count - 1``.

    Args:
        sample: draw a token from the last position's logits. A prefill chunk that is not the last
            does not. If ``start + count`` is beyond the tokens that were sent, the missing one is
            the token that this worker sampled in the step before.
        new_block_ids: blocks appended to the sequence's table.
        draft: guesses of the tokens that follow the sequence's last one, which is at ``start``; ``count``
            is one more. A token is sampled at each position, and returned as long as the guess before
            it was right. The next row starts where the KV of right guesses ends.
    """

    seq_id: int
    start: int
    count: int
    sample: bool
    new_block_ids: list[int] = []
    draft: list[int] = []


class Step(Frame, frozen=True):
    """Run one step; answer with one `StepResult` of the same ``step_id``, in order.

    ``released`` applies before ``new_sequences``, which applies before ``scheduled``.
    """

    step_id: int
    scheduled: list[ScheduledSequence]
    new_sequences: list[NewSequence] = []
    released: list[int] = []


class Ping(Frame, frozen=True):
    """Answer `Pong` with the same number, through the step loop."""

    number: int


class Stop(Frame, frozen=True):
    """Release graphs, KV, weights, process groups, in that order; answer `Stopped`; end.

    Args:
        budget: seconds until the worker will be killed.
    """

    budget: float


class Prepare(Frame, frozen=True):
    """To a standby worker: do everything of `Start` that commits to nothing; answer `Prepared`.

    What it takes must be shared or small: imports, compiled kernels, weights mapped or read. `Start`
    may come at any moment, or never.
    """

    config: EngineConfig
    rank: RankSpec
    model_path: str


class Sleep(Frame, frozen=True):
    """Give memory back; answer `Asleep`. No step is in flight. Deeper levels may follow, `Wake` undoes all.

    Args:
        level: 1 moves weights to host memory and drops the KV cache; 2 drops the weights as well.
    """

    level: int


class Wake(Frame, frozen=True):
    """Be again as after `Start`, with every sequence forgotten; answer `Awake`, with `Progress` meanwhile."""


class Inject(Frame, frozen=True):
    """Do something bad to yourself before the next message is carried out; only fault plans send this.

    Args:
        action: one of `ullm.faults.WORKER_ACTIONS`.
        seconds: how long, for actions that last.
    """

    action: str
    seconds: float = 0.0


ToWorker = Start | Step | Ping | Stop | Prepare | Sleep | Wake | Inject


# --- from a worker -----------------------------------------------------------------------------


class ModelInfo(msgspec.Struct, frozen=True):
    """What a loaded model is.

    Args:
        architecture: as in the checkpoint's config, for example ``LlamaForCausalLM``.
        num_parameters: elements of the weights of the whole model.
        context_len: tokens of prompt and output together that one sequence may have.
        num_blocks: KV blocks; equal on all ranks of a replica.
        block_size: tokens per KV block.
        kv_bytes_per_token: on this rank.
        weight_bytes: on this rank.
    """

    architecture: str
    num_parameters: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    context_len: int
    num_blocks: int
    block_size: int
    dtype: str
    device: str
    kv_bytes_per_token: int = 0
    weight_bytes: int = 0


class Ready(Frame, frozen=True):
    """The model is loaded and warmed up.

    Args:
        timings: stage → seconds, for logs.
    """

    info: ModelInfo
    timings: dict[str, float] = {}


class Progress(Frame, frozen=True):
    """A sign of life during a long operation.

    Args:
        stage: ``import``, ``load``, ``profile``, ``capture``, ``warmup``, …
        budget: seconds until the next sign of life is due; the watchdog waits that long.
    """

    stage: str
    budget: float = 60.0


class TokenLogprobs(Frame, frozen=True):
    """Log probabilities at one position, after penalties and bias, at temperature 1.

    Args:
        top: the most likely ``(token_id, logprob)``, best first; may lack ``token_id``.
        rank: of ``token_id``, 1 is the most likely.
    """

    token_id: int
    logprob: float
    rank: int = 0
    top: list[tuple[int, float]] = []


class Sampled(Frame, frozen=True):
    """What one sampling row produced.

    Args:
        token_ids: one token; more where a draft was accepted.
        logprobs: one per token, if asked for.
        prompt_logprobs: for positions 1 … of the rows' prompt tokens computed in this step, if asked
            for; a position that came from the prefix cache has none, so such requests skip it.
    """

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class StepResult(Frame, frozen=True):
    """The answer to a `Step`.

    Args:
        sampled: one per row with ``sample`` or with prompt logprobs; ``token_ids`` is empty where
            the row did not sample.
        seconds: time from taking up the step to its result.
    """

    step_id: int
    sampled: list[Sampled]
    seconds: float = 0.0


class Pong(Frame, frozen=True):
    """The answer to `Ping`."""

    number: int


class Prepared(Frame, frozen=True):
    """The answer to `Prepare`.

    Args:
        timings: stage → seconds.
    """

    timings: dict[str, float] = {}


class Asleep(Frame, frozen=True):
    """The answer to `Sleep`.

    Args:
        given_back: what → bytes on the device (on a CPU: of memory) that are free now, for example
            ``{"kv_cache": …, "weights": …}``.
        seconds: how long it took.
    """

    given_back: dict[str, int] = {}
    seconds: float = 0.0


class Awake(Frame, frozen=True):
    """The answer to `Wake`; the number of KV blocks may differ from before.

    Args:
        timings: stage → seconds.
    """

    info: ModelInfo
    timings: dict[str, float] = {}


class Failed(Frame, frozen=True):
    """The worker cannot go on, and ends.

    Args:
        kind: name of the exception's class; one of `ullm.errors` where it is known.
        message: its one line.
        traceback: the whole story, for the debug log.
    """

    kind: str
    message: str
    traceback: str = ""


class NotUnderstood(Frame, frozen=True):
    """The answer to a message that is none of `ToWorker`; the worker ignored it and goes on.

    Args:
        detail: what is wrong with it.
    """

    detail: str


class Stopped(Frame, frozen=True):
    """The worker has released everything.

    Args:
        timings: stage → seconds.
    """

    timings: dict[str, float] = {}


FromWorker = (
    Ready | Progress | StepResult | Pong | Prepared | Asleep | Awake | Failed | NotUnderstood | Stopped
)
