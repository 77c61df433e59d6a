"""The tokenizer actor: chat templates, encoding, incremental decoding.

Encoding and rendering a long prompt may take long, so they run in threads of this actor and never block
trio. Decoding a few tokens takes microseconds and is done where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import trio
from tokenizers import Tokenizer as Backend

from ullm.actors.template_process import TemplateProcess
from ullm.errors import (
    ActorLost,
    AskTimeout,
    EngineNotReady,
    InvalidParameter,
    ModelFileBroken,
    PromptTooLong,
    UllmError,
)
from ullm.faults import FaultInjector
from ullm.grammars.compiler import compile_grammar
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.hub import LocalModel
from ullm.hub.files import read_json
from ullm.logs import get_logger
from ullm.parsing.formats import ChatFormat
from ullm.supervision.actor import Mailbox, Reply, ask
from ullm.tokenization.backend import load_backend, special_token_ids, without_special_tokens
from ullm.tokenization.chat_template import (
    ChatTemplate,
    ChatTemplateBroken,
    read_special_tokens,
    read_templates,
)
from ullm.tokenization.decoding import ByteLevelDecoder, TokenBytes, WindowDecoder
from ullm.tokenization.detokenizer import IncrementalDecoder
from ullm.tokenization.spelled_tokens import SpelledTokens

THREADS = 2
"""Prompts encoded at a time; a short one need not wait for a long one."""

QUEUE = 1024
"""Prompts that may queue; further senders wait."""

ANSWER_SECONDS = 120.0
"""Timeout of one answer; megabytes of text take seconds."""

ATTEMPTS = 4
"""Incarnations of the actor that may try one prompt, as many as a supervisor starts by default."""

SHORT_TEXT = 16 << 10
"""Characters up to which a text is encoded under the interpreter's lock, some milliseconds at most. Without
the lock the library uses threads, whose mere existence makes it warn about later forks of the program."""

CACHED_GRAMMARS = 64
"""Grammars that are checked once; the least recently compiled one makes room."""

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True)
class _TokenizerJob(Generic[T]):
    work: Callable[[], T]
    reply: Reply[T]
    renders: bool = False


class TokenizerActor:
    """Converts text to tokens and back, for one model.

    Usable once `run` is ready.

    Args:
        model: has the tokenizer and the chat template.
        faults: faults to inject at the point ``tokenizer.encode``.
    """

    vocab_size: int
    """Number of tokens, special ones included."""
    max_tokens: int | None
    """Maximum number of tokens of a prompt, set by the engine; None: no limit."""

    def __init__(self, model: LocalModel, faults: FaultInjector | None = None) -> None:
        self._model = model
        self._faults = faults or FaultInjector()
        self._jobs: Mailbox[_TokenizerJob[Any]] = Mailbox(QUEUE, "tokenizer")
        self._backend: Backend
        self._bytes: TokenBytes
        self._special: frozenset[int]
        self._longest_token = 1
        self.max_tokens = None
        self._template: ChatTemplate
        self._config: dict[str, Any]
        self._text_backend: Backend
        self._renderer = TemplateProcess(ChatTemplate({}, {}))
        self._grammars: dict[Hashable, str] = {}

    # --- the actor ---

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Load the files, report ready, and serve until cancelled.

        Raises:
            ModelFileBroken: the tokenizer's files or the template of ``--chat-template`` cannot be used.
        """
        threads, renderer = trio.CapacityLimiter(THREADS), trio.CapacityLimiter(1)
        await trio.to_thread.run_sync(self.load, limiter=threads)
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                async for job in self._jobs:
                    nursery.start_soon(self._do, job, renderer if job.renders else threads)
        finally:
            self._renderer.close()

    def load(self, *, strict: bool = False) -> None:
        """Read the tokenizer's files, which blocks for up to a second.

        Args:
            strict: a chat template of the model's own that cannot be used is an error, too. Otherwise it is
                logged, and chats are refused, since completions work without it.

        Raises:
            ModelFileBroken: one of them cannot be read.
        """
        folder = self._model.tokenizer_path
        config = read_json(folder / "tokenizer_config.json", missing_ok=True)
        tokens_map = read_json(folder / "special_tokens_map.json", missing_ok=True)
        special = read_special_tokens(config, tokens_map)
        self._template = self._load_template(folder, config, special, strict)
        self._renderer.retire()
        self._renderer = TemplateProcess(self._template)
        self._backend = backend = load_backend(folder / "tokenizer.json")
        self._bytes = TokenBytes(backend)
        if not self._model.special_tokens_in_text:
            self._text_backend = without_special_tokens(backend)
        self._special = special_token_ids(backend)
        self._config = config
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self._longest_token = max(map(len, vocabulary), default=1)

    def take_over(self, other: TokenizerActor) -> None:
        """Serve another model's files from now on, which ``other`` has loaded.

        What is being encoded or decoded already goes on with the files that it began with.
        """
        self._model = other._model
        self._renderer.retire()
        self._template, self._renderer = other._template, other._renderer
        self._backend, self._bytes, self._special = other._backend, other._bytes, other._special
        self._config = other._config
        if not other._model.special_tokens_in_text:
            self._text_backend = other._text_backend
        self.vocab_size, self._longest_token = other.vocab_size, other._longest_token

    @property
    def has_chat_template(self) -> bool:
        """False if the model has none, or one that cannot be used; chats are refused then."""
        return bool(self._template)

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's configuration, its special tokens, and its chat template, for people."""
        return {
            **self._config,
            "vocab_size": self.vocab_size,
            "special_tokens": {self.token_text(token): token for token in sorted(self._special)},
            "chat_template": self._template.sources.get("default"),
        }

    @property
    def chat_format(self) -> ChatFormat:
        """How the answers are read that the chat template leads to."""
        return self._template.format

    # --- encoding ---

    async def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Return the token ids of a text.

        Args:
            add_special_tokens: whether to add those that the tokenizer puts around a text, such as BOS.
            param: the request's field that the text came from, for the error.

        Raises:
            InvalidParameter: the text is not valid Unicode.
            PromptTooLong: the text is so long that it must have more than `max_tokens` tokens.
        """
        return await self._ask(partial(self._encode, text, add_special_tokens, param))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Return the token ids of a conversation; the template writes special tokens itself.

        Raises:
            InvalidParameter: see `render_chat`.
        """
        hidden = None if self._model.special_tokens_in_text else self._spelled_tokens()
        text = await self.render_chat(
            messages if hidden is None else hidden.hide(messages),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **variables,
        )
        if hidden is not None:
            return await self._ask(partial(self._encode_pieces, hidden.pieces(text)))
        return await self._ask(partial(self._encode, text, False, "messages"))

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation.

        Args:
            add_generation_prompt: whether to end with the beginning of the assistant's answer.
            tools: JSON schemas of functions that the model may call.
            variables: further variables of the template, such as ``enable_thinking``.

        Raises:
            InvalidParameter: there are no messages; no chat template, or one that is broken or rejects them.
            TemplateFailed: it fails for every conversation.
        """
        if not messages:
            raise InvalidParameter("messages is empty; it must have at least one message", "messages")

        def render() -> str:
            return self._renderer.render(
                messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
            )

        return await self._ask(render, renders=True)

    async def compile_grammar(self, outputs: StructuredOutputs) -> str:
        """Return the grammar in the form that workers take, checked; the last ones are kept.

        Raises:
            InvalidParameter: it is not a grammar, or cannot be fulfilled, or needs what is not supported.
        """
        special = tuple(self.token_text(token_id) for token_id in sorted(self._special))
        return await self._ask(lambda: self._compile(outputs, special))

    def special_token(self, text: str) -> int | None:
        """Return the special token that is written so, which is no part of any text; None if none is."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._special else None

    def token(self, text: str) -> int | None:
        """Return the one token that is written so, special or not; None if none is."""
        return self._backend.token_to_id(text)

    def special_tokens_in(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the special tokens that are part of texts, as they are written there."""
        written = {token_id: self.token_text(token_id) for token_id in self._special}
        return {
            token_id: token
            for token_id, token in written.items()
            if token and any(token in text for text in texts)
        }

    async def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of words, at the begin of a text and after a blank."""
        return await self._ask(partial(self._bad_words, words))

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip()) if text.strip()]
        found = [tuple(self._encode(text, False, "bad_words")) for text in texts or words]
        return tuple(dict.fromkeys(filter(None, found)))

    # --- decoding ---

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; invalid UTF-8 becomes U+FFFD, and ids without a token are skipped.

        Raises:
            InvalidParameter: an id is out of range for any vocabulary.
        """
        try:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise InvalidParameter("token ids must be whole numbers from 0 to 4294967295", "tokens") from None

    def detokenizer(
        self, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """Return a decoder for a sequence that continues ``prompt_token_ids``.

        Bytes at the prompt's end that do not make a character yet belong to the text that follows.
        """
        skip = self._special if skip_special_tokens else frozenset()
        if self._bytes.byte_level:
            return ByteLevelDecoder(self._bytes, skip, prompt_token_ids)
        return WindowDecoder(self._backend, skip, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for an id without one."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """Return a token as text; incomplete characters become U+FFFD."""
        return self._bytes[token_id].decode("utf-8", "replace")

    # --- inside ---

    async def _do(self, job: _TokenizerJob[Any], limiter: trio.CapacityLimiter) -> None:
        await self._faults.at("tokenizer.encode")
        try:
            result = await trio.to_thread.run_sync(
                _guarded, job.work, limiter=limiter, abandon_on_cancel=True
            )
        except UllmError as error:
            job.reply.fail(error)
        else:
            job.reply.send(result)

    async def _ask(self, work: Callable[[], T], *, renders: bool = False) -> T:
        def job(reply: Reply[T]) -> _TokenizerJob[Any]:
            return _TokenizerJob(work, reply, renders)

        try:
            for _ in range(ATTEMPTS - 1):
                try:
                    return await ask(self._jobs, job, ANSWER_SECONDS)
                except ActorLost:  # restarted meanwhile; the work has no side effects, so it can be repeated
                    log.debug("tokenizer restarted")
            return await ask(self._jobs, job, ANSWER_SECONDS)
        except (ActorLost, AskTimeout) as error:
            raise EngineNotReady("restarting a part of itself") from error

    def _compile(self, outputs: StructuredOutputs, special_tokens: tuple[str, ...]) -> str:
        key = (outputs.kind, outputs.text, outputs.whitespace_pattern, outputs.disable_any_whitespace)
        compiled = self._grammars.get((*key, special_tokens))
        if compiled is None:
            compiled = compile_grammar(outputs, special_tokens)
            while len(self._grammars) >= CACHED_GRAMMARS:
                self._grammars.pop(next(iter(self._grammars)), None)
            self._grammars[(*key, special_tokens)] = compiled
        return compiled

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter(
                f"the text has half a surrogate pair, U+{ord(text[error.start]):04X}, at character "
                f"{error.start}; it is not valid Unicode",
                param,
            ) from None
        # Text that is far too long is not encoded at all: tens of megabytes of it would take gigabytes.
        least = len(text) // self._longest_token
        if self.max_tokens is not None and least > self.max_tokens:
            raise PromptTooLong(least, self.max_tokens, param, at_least=True)
        if len(text) <= SHORT_TEXT:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        else:  # the same, but without the interpreter's lock
            encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def _spelled_tokens(self) -> SpelledTokens:
        return SpelledTokens([self._backend.id_to_token(token) or "" for token in self._special])

    def _encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Encode a conversation in which special tokens of users' and tools' messages are text."""
        ids: list[int] = []
        for piece, is_spelled in pieces:
            if is_spelled:
                ids += self._text_backend.encode(piece, add_special_tokens=False).ids
            else:
                ids += self._encode(piece, False, "messages")
        return ids

    def _load_template(
        self, folder: Path, config: Mapping[str, Any], special: Mapping[str, str], strict: bool
    ) -> ChatTemplate:
        own = self._model.chat_template is None
        try:
            sources = read_templates(folder, config) if own else {"default": self._model.chat_template or ""}
            return ChatTemplate(sources, special)
        except ChatTemplateBroken as error:
            if not own:
                raise ModelFileBroken("--chat-template", error.reason) from None
            if strict:
                raise
            log.warning(f"{error}; chats are refused")
            return ChatTemplate.unusable(error)


def _guarded(work: Callable[[], T]) -> T:
    """Run in a thread: whatever a text does to the tokenizer is an error of that request only."""
    try:
        return work()
    except UllmError:
        raise
    except BaseException as error:  # a panic of the tokenizer's Rust code is not an Exception
        log.warning("text cannot be tokenized", exc_info=True)
        raise InvalidParameter(f"the text cannot be tokenized: {error}") from error
