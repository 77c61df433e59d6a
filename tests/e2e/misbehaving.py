"""A runner that dies of one request, for `ullm serve --runner misbehaving:PoisonedRunner`."""

from __future__ import annotations

import os
import signal

from ullm.protocol.messages import Step
from ullm.testing import ScriptedRunner
from ullm.testing.scripted import ScriptedStep

POISON = 499
"""The last token of a prompt that kills whoever computes it."""


class PoisonedRunner(ScriptedRunner):
    """Dies by SIGKILL when it should compute the first token of the poisoned request."""

    def __init__(self) -> None:
        super().__init__()
        self._poisoned: set[int] = set()

    def submit(self, step: Step) -> ScriptedStep:
        """As the script has it, or not at all."""
        prompts = {new.seq_id: new.token_ids[: new.num_prompt_tokens] for new in step.new_sequences}
        self._poisoned.update(seq_id for seq_id, prompt in prompts.items() if POISON in prompt)
        if any(row.seq_id in self._poisoned and row.sample for row in step.scheduled):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().submit(step)
