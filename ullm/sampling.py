"""Sampling parameters of a request."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ullm.errors import InvalidParameter
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.grammars.thinking import ThinkingTokens

MAX_LOGPROBS = 20
"""Maximum number of alternatives reported per token, as in OpenAI's API for ``top_logprobs``."""
MAX_N = 128
POOLINGS = ("mean", "last")
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 1024
MAX_SEED = 2**63
MAX_WHOLE = 2**63 - 1
"""Maximum of whole numbers that have no other: more cannot be sent to a worker."""

N = TypeVar("N", int, float)

_WHOLE: Mapping[str, tuple[int, int]] = {
    "n": (1, MAX_N),
    "max_tokens": (1, MAX_WHOLE),
    "min_tokens": (0, MAX_WHOLE),
    "top_k": (0, MAX_WHOLE),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (-MAX_SEED, MAX_SEED - 1),
    "priority": (-(2**31), 2**31 - 1),
    "thinking_token_budget": (0, MAX_WHOLE),
}
"""Field → bounds of its whole number."""
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "timeout": (0, math.inf),
}
"""Field → bounds of its number."""
_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_OPTIONAL = frozenset(
    {"max_tokens", "logprobs", "prompt_logprobs", "seed", "timeout", "thinking_token_budget"}
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request; immutable, validated when built.

    Numbers of other types than Python's, such as numpy's, are converted.

    Args:
        n: number of independent continuations; each is sampled with its own random numbers.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this.
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one's probability.
        max_tokens: maximum number of generated tokens; None: the model's own ``max_new_tokens``, if it has
            one, else up to the end of its context.
        max_new_tokens: another name for ``max_tokens``.
        stop: a string or strings that end the text and are not part of it.
        ignore_eos: continue past the model's end-of-sequence tokens.
        min_tokens: number of generated tokens before which end-of-sequence and stop tokens are impossible.
        stop_token_ids: further token ids that end the text.
        include_stop_str_in_output: keep the stop string in the text.
        repetition_penalty: above 1, tokens of the prompt and the output become less likely (CTRL,
            arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted once from the logit of each token already generated.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: token id → value added to its logit, -100 to 100.
        allowed_token_ids: the only tokens that are possible; none: all. An end-of-sequence token must be
            among them for the text to end before ``max_tokens``.
        bad_words: texts that the output must not have, however they are tokenized at its begin or after a
            blank; the last token of each is impossible where the others precede it.
        bad_word_ids: the same as token ids.
        cache_salt: only requests of the same salt share the prefix cache, so that no other client can tell by
            its time whether a prompt was asked before; None: all requests without one share it.
        lora: name of the adapter to compute with; None: the model alone.
        seed: sampling is a pure function of (seed, index of the token); None or -1: a random seed.
        logprobs: report each token's log probability and this many alternatives; 0: only the token's own.
        prompt_logprobs: the same for the tokens of the prompt; they come with the first choice only.
        skip_special_tokens: omit special tokens from the text.
        timeout: seconds after which the request ends with ``finish_reason="timeout"``.
        priority: requests with a lower value run first; equal ones in turns of their clients, by arrival.
        structured_outputs: the form that the text must have; also as a dict of its arguments.
        thinking_token_budget: tokens after ``<think>`` after which ``</think>`` is forced; None or -1: no
            limit. Refused where the model's tokenizer has no token ``</think>``.
        thinking_tokens: the tokens between which the model thinks; by default those of its tokenizer.
        pooling: ``mean`` or ``last``: no text, but one vector for the prompt, the mean of its tokens' hidden
            states after the final norm, or the last one; ``max_tokens`` and ``n`` are 1 then. Empty: a text.

    Raises:
        InvalidParameter: a value is out of range; names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | str = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    timeout: float | None = None
    priority: int = 0
    structured_outputs: StructuredOutputs | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] | str = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    cache_salt: str | None = None
    lora: str | None = None
    thinking_token_budget: int | None = None
    thinking_tokens: ThinkingTokens | None = None
    pooling: str = ""

    def __post_init__(self) -> None:
        self._join_names()
        self._check_pooling()
        self._convert_numbers()
        self._convert_lists()
        self._convert_structured_outputs()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen each time."""
        return self.temperature == 0

    @property
    def filters_tokens(self) -> bool:
        """Whether some tokens are impossible at some places."""
        return bool(self.allowed_token_ids or self.bad_word_ids) or self.thinking_token_budget is not None

    @property
    def needs_all_positions(self) -> bool:
        """Whether each position of the prompt must be computed, although the prefix cache may have its KV."""
        return self.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return self.stop  # type: ignore[return-value]  # normalised by __post_init__

    def choice(self, seed: int, *, scored: bool, stop_token_ids: Collection[int] = ()) -> SamplingParams:
        """Return the parameters of one choice, for a worker.

        Stop strings are left out: a worker knows no text. So is the form of the text, which it gets as a
        grammar. Nothing is validated again, so that the number of choices does not multiply that.

        Args:
            scored: whether this choice computes the log probabilities of the prompt.
            stop_token_ids: further ones: stop strings that are one token, which makes no text.
        """
        params, put = copy(self), object.__setattr__
        put(params, "n", 1)
        put(params, "seed", seed)
        put(params, "stop", ())
        put(params, "bad_words", ())
        put(params, "stop_token_ids", (*self.stop_token_ids, *stop_token_ids))
        put(params, "structured_outputs", None)
        if not scored:
            put(params, "prompt_logprobs", None)
        return params

    def _join_names(self) -> None:
        if self.max_new_tokens is not None:
            if self.max_tokens not in (None, self.max_new_tokens):
                raise InvalidParameter(
                    "max_tokens and max_new_tokens are two names of one value", "max_new_tokens"
                )
            object.__setattr__(self, "max_tokens", self.max_new_tokens)

    def _check_pooling(self) -> None:
        if self.pooling not in ("", *POOLINGS):
            raise InvalidParameter(
                f"pooling must be {' or '.join(POOLINGS)}, got {self.pooling!r}", "pooling"
            )
        if self.pooling:
            if self.n != 1 or self.max_tokens not in (None, 1):
                raise InvalidParameter(
                    "pooling makes one vector, and no text: n and max_tokens are 1", "pooling"
                )
            object.__setattr__(self, "max_tokens", 1)

    def _convert_numbers(self) -> None:
        put = object.__setattr__
        if self.top_k == -1:
            put(self, "top_k", 0)
        for name in ("seed", "thinking_token_budget"):
            if getattr(self, name) == -1:
                put(self, name, None)
        for name, (least, most) in _WHOLE.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                put(self, name, _whole(name, value, least, most))
        for name, (low, high) in _NUMBERS.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                put(self, name, _number(name, value, low, high))
        for name in _SWITCHES:
            put(self, name, _switch(name, getattr(self, name)))
        put(self, "max_new_tokens", self.max_tokens)
        if self.top_p == 0:
            raise InvalidParameter("top_p must be above 0; for greedy output set temperature to 0", "top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", "min_tokens"
            )

    def _convert_structured_outputs(self) -> None:
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", structured_outputs(self.structured_outputs))
            if self.allowed_token_ids:
                raise InvalidParameter(
                    "allowed_token_ids cannot be combined with a form of the text, which needs other tokens",
                    "allowed_token_ids",
                )

    def _convert_lists(self) -> None:
        put = object.__setattr__
        put(self, "stop", _texts("stop", self.stop))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParameter(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", "stop")
        ids = () if self.stop_token_ids is None else tuple(token_ids("stop_token_ids", self.stop_token_ids))
        put(self, "stop_token_ids", ids)
        put(self, "logit_bias", _biases("logit_bias", self.logit_bias))
        put(self, "allowed_token_ids", self._allowed())
        put(self, "bad_words", _texts("bad_words", self.bad_words))
        if self.cache_salt is not None:
            salt = _texts("cache_salt", self.cache_salt)
            if not isinstance(self.cache_salt, str):
                raise InvalidParameter("cache_salt must be a text", "cache_salt")
            put(self, "cache_salt", *salt)
        if self.lora is not None and not (isinstance(self.lora, str) and self.lora):
            raise InvalidParameter(f"lora must be the name of an adapter, got {self.lora!r:.100}", "lora")
        put(self, "bad_word_ids", tuple(map(self._bad_word, self.bad_word_ids or ())))
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidParameter(
                f"bad_words has {len(self.bad_words)} texts; at most {MAX_BAD_WORDS}", "bad_words"
            )

    def _allowed(self) -> tuple[int, ...]:
        if self.allowed_token_ids is None:
            return ()
        ids = token_ids("allowed_token_ids", self.allowed_token_ids)
        if not ids and self.allowed_token_ids != ():
            raise InvalidParameter(
                "allowed_token_ids is empty; leave it out to allow all", "allowed_token_ids"
            )
        return tuple(dict.fromkeys(ids))

    @staticmethod
    def _bad_word(ids: Any) -> tuple[int, ...]:
        word = tuple(token_ids("bad_word_ids", ids))
        if not word:
            raise InvalidParameter("each of bad_word_ids must have a token", "bad_word_ids")
        return word


def structured_outputs(value: Any) -> StructuredOutputs:
    """Return a form of the text that may be given as a dict.

    Raises:
        InvalidParameter: it is neither, or its arguments are wrong.
    """
    if isinstance(value, Mapping):
        known = StructuredOutputs.__dataclass_fields__
        if unknown := [name for name in value if name not in known]:
            raise InvalidParameter(
                f"structured_outputs has no {unknown[0]!r}; it takes {', '.join(known)}", "structured_outputs"
            )
        return StructuredOutputs(**value)
    if not isinstance(value, StructuredOutputs):
        raise InvalidParameter(
            f"structured_outputs must be a StructuredOutputs or a dict, got a {type(value).__name__}",
            "structured_outputs",
        )
    return value


def token_ids(name: str, values: Any) -> list[int]:
    """Return token ids as Python's integers; they may come as a list, an array or a tensor.

    Raises:
        InvalidParameter: they are not a sequence of whole numbers from 0 on; names the field.
    """
    if isinstance(values, str | bytes | bytearray | Mapping):
        raise InvalidParameter(f"{name} must be a list of token ids, got a {type(values).__name__}", name)
    try:
        ids = values.tolist() if hasattr(values, "tolist") else list(values)
        if not isinstance(ids, list):
            raise TypeError
    except TypeError:
        raise InvalidParameter(
            f"{name} must be a list of token ids, got a {type(values).__name__}", name
        ) from None
    if set(map(type, ids)) <= {int} and (not ids or (0 <= min(ids) and max(ids) <= MAX_WHOLE)):
        return ids
    return [_whole(name, value, 0, MAX_WHOLE) for value in ids]


def _whole(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):  # a tensor of several elements
        number = None
    if number is None or not low <= number <= high:
        raise _out_of_range(name, "a whole number", value, low, high if high < MAX_WHOLE else math.inf)
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = math.nan
    if not isinstance(value, bool | str | bytes | bytearray) and not getattr(value, "ndim", 0):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
    if not low <= number <= high:  # NaN fails the comparison
        raise _out_of_range(name, "a number", value, low, high)
    return number


def _out_of_range(name: str, kind: str, value: object, low: float, high: float) -> InvalidParameter:
    bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    # Python writes out no integer of thousands of digits.
    shown = repr(value) if not isinstance(value, int) or value.bit_length() <= 128 else "one far beyond"
    shown = shown if len(shown) <= 100 else shown[:100] + "…"
    return InvalidParameter(f"{name} must be {kind} {bounds}, got {shown}", name)


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy's, which is no bool
        return bool(value)
    raise InvalidParameter(f"{name} must be true or false, got {value!r}", name)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    try:
        texts = (values,) if isinstance(values, str) else tuple(values)
    except TypeError:
        raise InvalidParameter(f"{name} must be a text or a list of texts, got {values!r}", name) from None
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InvalidParameter(f"every {name} string must be a text of at least one character", name)
        if (position := half_surrogate(text)) is not None:
            raise InvalidParameter(
                f"a {name} string has half a surrogate pair, U+{ord(text[position]):04X}, at character "
                f"{position}; it is not valid Unicode",
                name,
            )
    return tuple(map(str.__str__, texts))  # numpy's texts become Python's


def half_surrogate(text: str) -> int | None:
    """Return the place of a character that is no valid Unicode; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _biases(name: str, values: Any) -> dict[int, float]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidParameter(f"{name} must map token ids to numbers, got a {type(values).__name__}", name)
    ids, biases = list(values), list(values.values())
    if not (set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= MAX_WHOLE))):
        ids = [_named_by_key(name, key, _whole, key, 0, MAX_WHOLE) for key in ids]
    if not (set(map(type, biases)) <= {float} and all(-100 <= bias <= 100 for bias in biases)):
        pairs = zip(ids, biases, strict=True)
        biases = [_named_by_key(name, key, _number, bias, -100, 100) for key, bias in pairs]
    return dict(zip(ids, biases, strict=True))


def _named_by_key(name: str, key: Any, convert: Callable[..., N], value: Any, low: int, high: int) -> N:
    """Convert a key or a value of a mapping; an error names the key, too."""
    try:
        return convert(f"{name}[{key!r}]"[:100], value, low, high)
    except InvalidParameter as error:
        error.param = name
        raise
