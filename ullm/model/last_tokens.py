"""The last token sampled of each sequence, kept on the device, so that no step waits for the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class LastTokens:
    """One slot per sequence.

    On a CPU the same memory is used through numpy, because indexing takes a tenth of PyTorch's time there.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._use(torch.zeros(slots, dtype=torch.int64, device=device))

    def _use(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._on_host = tokens.numpy() if tokens.device.type == "cpu" else None

    def put(self, slots: list[int], tokens: Tensor) -> None:
        """Keep ``tokens [len(slots)]``; slots that do not exist yet are made."""
        if max(slots) >= len(self._tokens):
            more = torch.zeros(max(slots) + 1, dtype=torch.int64, device=self._device)
            self._use(torch.cat((self._tokens, more)))
        if self._on_host is not None:
            self._on_host[slots] = tokens.numpy()
        else:
            self._tokens[slots] = tokens

    def copy_to(self, token_ids: Tensor, indices: list[int], slots: list[int]) -> None:
        """``token_ids[indices]`` become what is in ``slots``."""
        if self._on_host is not None:
            host: np.ndarray[tuple[int], np.dtype[np.int64]] = token_ids.numpy()
            host[indices] = self._on_host[slots]
        else:
            token_ids[indices] = self._tokens[slots]
