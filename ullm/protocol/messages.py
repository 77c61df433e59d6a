"""The messages between the engine and its workers: frozen values, in one file.

Structs are encoded as tagged arrays, so that a frame costs microseconds; `ToWorker` and `FromWorker` are the
two languages. A step is a delta: a sequence's tokens are sent once, when it is admitted; afterwards only
changes are. Token values that a worker has sampled are never sent back to it.
"""

from __future__ import annotations

import msgspec

from ullm.config import EngineConfig, Tuning
from ullm.sampling import SamplingParams


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of everything that crosses a worker's pipe.

    Frozen values form no cycles, so the garbage collector need not track them; each step has thousands.
    """


# --- to a worker -------------------------------------------------------------------------------


class RankSpec(msgspec.Struct, frozen=True):
    """The place of a worker. The ranks of a replica form one process group.

    Args:
        replica: index of the data-parallel replica.
        rank: index within the replica; ``tp_rank + pp_rank * tp_size``.
        world_size: ranks of the replica.
        epoch: incarnation of the worker group; a restarted group has a higher one.
        rendezvous: ``host:port`` where the replica's ranks meet; unused with one rank. Rank 0 listens there,
            with port 0 on a free one, which it announces by `Progress`.
        device_index: CUDA device of this rank; None on CPU.
        num_stages: pipeline stages of the replica, each of ``world_size // num_stages`` ranks.
        shares_memory: whether the ranks of each stage are on one host.
    """

    replica: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    rendezvous: str = ""
    device_index: int | None = None
    num_stages: int = 1
    shares_memory: bool = True

    @property
    def name(self) -> str:
        """The worker's name in logs and errors."""
        return f"replica{self.replica}.rank{self.rank}"


class Start(Frame, frozen=True):
    """The first message to a worker: load the model and answer `Ready`, with `Progress` meanwhile.

    Args:
        config: the engine's configuration; ``config.model`` is as the user wrote it.
        rank: the worker's place.
        model_path: the local folder or GGUF file that ``config.model`` resolved to.
        tuning: how the CPU kernels divide products; the same for all workers of an engine.
        tokenizer_path: folder with tokenizer.json, which is read for the first constrained request.
    """

    config: EngineConfig
    rank: RankSpec
    model_path: str
    tuning: Tuning = Tuning()
    tokenizer_path: str = ""


class Adapter(msgspec.Struct, frozen=True, gc=False):
    """A LoRA adapter that is served.

    Args:
        name: the model name that requests use.
        path: folder with adapter_config.json and adapter_model.safetensors.
        digest: of these files, which must not change.
        number: unique in the engine's life, also if the same adapter is loaded again.
    """

    name: str
    path: str
    digest: str
    number: int


class NewSequence(Frame, frozen=True):
    """A sequence that is new to the worker, or was released before.

    Args:
        seq_id: unique within one scheduler's life.
        token_ids: the prompt and the tokens generated before, if it is resumed; all are known.
        num_prompt_tokens: length of the original prompt; ``len(token_ids) - num_prompt_tokens`` is
            the index of the next token to be generated.
        params: with ``seed`` set and ``n`` 1.
        block_ids: its KV blocks so far; position p lives in block ``p // block_size``.
        num_cached_tokens: leading tokens whose KV is already in those blocks.
        grammar: what constrains the generated tokens, in llguidance's format; empty if nothing does.
        adapter: the adapter that it is computed with; None: the model alone.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_ids: list[int]
    num_cached_tokens: int = 0
    grammar: str = ""
    adapter: Adapter | None = None


class ScheduledSequence(Frame, frozen=True):
    """One sequence's share of a step: compute KV for positions ``start … start + count - 1``.

    Args:
        sample: whether to sample a token from the last position's logits; False for a prefill chunk that is
            not the last. If ``start + count`` is beyond the tokens that were sent, the missing one is the
            token that this worker sampled in the previous step.
        new_block_ids: blocks appended to the sequence's table.
        draft: drafted tokens after the sequence's last one, which is at ``start``; ``count`` is one more. A
            token is sampled at each position, and returned as long as the drafted token before it was
            right. The next step starts where the KV of right tokens ends.
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
    """For a standby worker: do the part of `Start` that commits to nothing; answer `Prepared`.

    Only memory that is shared or small may be used: imports, compiled kernels, mapped weights. `Start` may
    come at any moment, or never.
    """

    config: EngineConfig
    rank: RankSpec
    model_path: str


class Sleep(Frame, frozen=True):
    """Free memory; answer `Asleep`. No step is in flight. Deeper levels may follow; `Wake` undoes all.

    Args:
        level: 1 moves weights to host memory and drops the KV cache; 2 drops the weights as well.
    """

    level: int


class Wake(Frame, frozen=True):
    """Return to the state after `Start`, without sequences; answer `Awake`, with `Progress` meanwhile."""


class KeepAdapter(Frame, frozen=True):
    """Load an adapter, or drop it as soon as no sequence uses it; answer `AdapterKept`.

    A worker need not be told of adapters: it loads one with the first sequence that needs it. This message is
    how the engine knows that it can.
    """

    adapter: Adapter
    wanted: bool


class SharedMemory(msgspec.Struct, frozen=True, gc=False):
    """Memory of the engine's process without a name in any folder, for content too long for frames.

    Args:
        path: how other processes of this host open it.
        name: what the system says that it is, so that another file at that path is not taken for it.
    """

    path: str
    name: str


class ExportBlocks(Frame, frozen=True):
    """Copy KV blocks out of the pool; answer `BlocksExported`.

    Args:
        number: unique among those to one worker group.
        block_ids: the blocks, whose content earlier steps have computed.
        identity: what the KV must be of; see `ModelInfo.kv_identity`.
        memory: where to write them; None: into the answer.
    """

    number: int
    block_ids: list[int]
    identity: str
    memory: SharedMemory | None = None


class ImportBlocks(Frame, frozen=True):
    """Copy KV blocks into the pool; answer `BlocksImported`.

    Args:
        number: unique among those to one worker group.
        block_ids: where they go; no sequence has them.
        identity: what the KV is of; see `ModelInfo.kv_identity`.
        size: bytes of their content.
        checksum: CRC-32 of their content.
        memory: where the content is; None: in ``content``.
    """

    number: int
    block_ids: list[int]
    identity: str
    size: int
    checksum: int
    memory: SharedMemory | None = None
    content: bytes = b""


class Inject(Frame, frozen=True):
    """Carry out a fault before the next message; only fault plans send this.

    Args:
        action: one of `ullm.faults.WORKER_ACTIONS`.
        seconds: duration of actions that last.
    """

    action: str
    seconds: float = 0.0


ToWorker = (
    Start | Step | Ping | Stop | Prepare | Sleep | Wake | KeepAdapter | ExportBlocks | ImportBlocks | Inject
)


# --- from a worker -----------------------------------------------------------------------------


class ModelInfo(msgspec.Struct, frozen=True):
    """The properties of a loaded model.

    Args:
        architecture: as in the checkpoint's config, for example ``LlamaForCausalLM``.
        num_parameters: elements of the weights of the whole model.
        context_len: tokens of prompt and output together that one sequence may have.
        num_blocks: KV blocks; equal on all ranks of a replica.
        block_size: tokens per KV block.
        dtype: dtype of the arithmetic.
        kv_bytes_per_token: size of the KV of one token on this rank.
        weight_bytes: size of the weights on this rank.
        weight_formats: what the weights are in: names of dtypes, and ``int8`` or ``int4`` where quantized.
        kv_dtype: dtype of the KV.
        kernels: what computes the layers: ``PyTorch``, ``Triton``, or the instructions that ullm's kernels
            for CPUs use, such as ``AVX2``.
        tuning: where the choice of how these kernels divide products is from: ``default``, or
            ``calibrated on`` a date; empty without such kernels.
        stored_format: how the checkpoint's weights are quantized, such as ``gguf``, ``gptq`` or ``fp8``;
            empty if they are not. ``weight_formats`` is what they are in memory.
        pools: whether it has hidden states, of which prompts can be pooled.
        window: keys that a query sees in the layer that sees most; 0: all. What is behind it is not kept.
        kv_identity: digest of all that keys and values depend on besides tokens, adapter and salt: weights,
            dtypes, kernels, layout. KV blocks of equal identity are interchangeable; empty: with none.
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
    weight_formats: tuple[str, ...] = ()
    kv_dtype: str = ""
    kernels: str = ""
    tuning: str = ""
    stored_format: str = ""
    pools: bool = False
    window: int = 0
    kv_identity: str = ""


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
        rendezvous: where rank 0 listens for the other ranks from now on.
    """

    stage: str
    budget: float = 60.0
    rendezvous: str = ""


class TokenLogprobs(Frame, frozen=True):
    """Log probabilities at one position, after penalties and bias, at temperature 1.

    Args:
        top: the most likely ``(token_id, logprob)``, best first; may lack ``token_id``.
        rank: rank of ``token_id``; 1 is the most likely.
    """

    token_id: int
    logprob: float
    rank: int = 0
    top: list[tuple[int, float]] = []


class Sampled(Frame, frozen=True):
    """The output of one scheduled sequence.

    Args:
        token_ids: one token; more where a draft was accepted.
        logprobs: one per token, if requested.
        prompt_logprobs: for positions 1 … of the prompt tokens computed in this step, if requested; a
            position from the prefix cache has none, so such requests bypass the cache.
        error: why the sequence cannot go on, in its grammar or without its adapter, in which case its token
            means nothing.
        lacks_adapter: whether it is the adapter.
        embedding: the pooled hidden states of the prompt, once all of it is computed, if requested: float32
            in the machine's byte order.
    """

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str = ""
    lacks_adapter: bool = False
    embedding: bytes = b""


class StepResult(Frame, frozen=True):
    """The answer to a `Step`.

    Args:
        sampled: one per scheduled sequence with ``sample`` or with prompt logprobs; ``token_ids`` is empty
            where nothing was sampled. Of several ranks, only the one that chooses tokens fills it.
        seconds: time from the begin of the step to its result.
        digest: checksum of the step's tokens as this rank has them; equal on all ranks.
    """

    step_id: int
    sampled: list[Sampled]
    seconds: float = 0.0
    digest: int = 0


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
        given_back: kind of memory → bytes freed on the device (on a CPU in main memory), for example
            ``{"kv_cache": …, "weights": …}``.
        seconds: duration.
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


class AdapterKept(Frame, frozen=True):
    """The answer to `KeepAdapter`.

    Args:
        number: the adapter's.
        error: why it cannot be loaded; empty if it is, or has been dropped.
    """

    number: int
    error: str = ""


class BlocksExported(Frame, frozen=True):
    """The answer to `ExportBlocks`.

    Args:
        size, checksum: of the content; see `ImportBlocks`.
        content: the content, unless it is in shared memory.
        error: why there is none; empty if there is.
        no_memory: whether that is because the shared memory cannot be used.
    """

    number: int
    size: int = 0
    checksum: int = 0
    content: bytes = b""
    error: str = ""
    no_memory: bool = False


class BlocksImported(Frame, frozen=True):
    """The answer to `ImportBlocks`.

    Args:
        error: why the pool has not got them; empty if it has.
        no_memory: whether that is because the shared memory cannot be used.
    """

    number: int
    error: str = ""
    no_memory: bool = False


class Failed(Frame, frozen=True):
    """The worker cannot continue, and ends.

    Args:
        kind: name of the exception's class, if possible one of `ullm.errors`.
        message: its text, one line.
        traceback: its traceback, for the debug log.
    """

    kind: str
    message: str
    traceback: str = ""


class NotUnderstood(Frame, frozen=True):
    """The answer to a message that is not one of `ToWorker`; the worker ignores it and continues.

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
    Ready
    | Progress
    | StepResult
    | Pong
    | Prepared
    | Asleep
    | Awake
    | AdapterKept
    | BlocksExported
    | BlocksImported
    | Failed
    | NotUnderstood
    | Stopped
)
