"""The last token sampled of each sequence, kept on the device, so that no step waits for the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ullm.model.memory.upload import upload


class LastTokens:
    """One slot per sequence.

    Attributes:
        tensor: the tokens by slot; another one when slots are made that did not exist, which graphs that have
            captured it would not see, so there should be enough from the beginning.

    On a CPU the same memory is used through numpy, because indexing takes a tenth of PyTorch's time there.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._use(torch.zeros(slots, dtype=torch.int64, device=device))

    def _use(self, tokens: Tensor) -> None:
        self.tensor = tokens
        self._on_host = tokens.numpy() if tokens.device.type == "cpu" else None

    def put(self, slots: list[int], tokens: Tensor) -> None:
        """Keep ``tokens [len(slots)]``; slots that do not exist yet are made."""
        if max(slots) >= len(self.tensor):
            more = torch.zeros(max(slots) + 1, dtype=torch.int64, device=self._device)
            self._use(torch.cat((self.tensor, more)))
        if self._on_host is not None:
            self._on_host[slots] = tokens.numpy()
        else:
            (where,) = upload(self._device, np.array(slots))
            self.tensor.index_copy_(0, where, tokens)

    def copy_to(self, token_ids: Tensor, indices: list[int], slots: list[int]) -> None:
        """``token_ids[indices]`` become what is in ``slots``."""
        if self._on_host is not None:
            host: np.ndarray[tuple[int], np.dtype[np.int64]] = token_ids.numpy()
            host[indices] = self._on_host[slots]
        else:
            to, where = upload(self._device, np.array(indices), np.array(slots))
            token_ids.index_copy_(0, to, self.tensor.index_select(0, where))
