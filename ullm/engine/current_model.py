"""The model that new requests get: the one holder of everything that a reload changes."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ullm.actors.tokenizer import TokenizerActor
from ullm.config import EngineConfig
from ullm.engine.adapters import Adapters
from ullm.engine.sampling_defaults import SamplingDefaults, read_sampling_defaults
from ullm.hub import LocalModel, resolve
from ullm.protocol.messages import ModelInfo

FindModel = Callable[[EngineConfig], LocalModel]
"""Finds a model's files, as `find_local_model` does; called in a thread."""


class CurrentModel:
    """Configuration, files, facts and tokenizer of the model that new requests get.

    Everybody reads them here when they are needed, and nobody keeps a copy; `replace` changes all of them
    between two requests. Only a replica has a configuration of its own, the one that its workers were started
    with: until it is retired, it must be restarted with that one.

    Attributes:
        local: the files; None until they are found.
        tokenizer: made when the files are found; one object for the engine's life.
        sampling_defaults: what the model recommends for requests that name no sampling parameters.
        info: None until the first worker group is up.
        adapters: LoRA adapters that are served beside the model.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.adapters = Adapters()
        self.local: LocalModel | None = None
        self.tokenizer: TokenizerActor | None = None
        self.sampling_defaults = SamplingDefaults()
        self.info: ModelInfo | None = None

    def loaded(self) -> tuple[ModelInfo, TokenizerActor]:
        """Return the facts and the tokenizer of a running engine's model."""
        assert self.info is not None, "a running engine has a model"
        assert self.tokenizer is not None, "a running engine has a tokenizer"
        return self.info, self.tokenizer

    def serve(self, info: ModelInfo) -> None:
        """Take the facts that loaded workers have reported."""
        assert self.tokenizer is not None, "the tokenizer is started before the workers"
        self.info = info
        self.tokenizer.max_tokens = info.context_len

    def replace(
        self, config: EngineConfig, local: LocalModel, tokenizer: TokenizerActor, info: ModelInfo | None
    ) -> None:
        """Give new requests another model, or another revision; those in flight keep what they have.

        Args:
            tokenizer: has loaded the new files; the engine's own tokenizer takes them over.
            info: from the new workers.
        """
        assert self.tokenizer is not None, "a running engine has a tokenizer"
        assert info is not None, "a group that has started knows its model"
        self.config, self.local = config, local
        self.sampling_defaults = read_sampling_defaults(config, local)
        self.tokenizer.take_over(tokenizer)
        self.serve(info)


def find_local_model(config: EngineConfig) -> LocalModel:
    """Run `resolve` in a thread of trio's; it ends soon after the start was cancelled."""
    return resolve(config, lambda label, done, total: trio.from_thread.check_cancelled())
