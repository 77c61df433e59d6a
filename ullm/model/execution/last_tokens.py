"""The last sampled token of each sequence, kept on the device, so that no step waits for the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ullm.model.memory.upload import upload


class LastTokens:
    """One token per slot, one slot per sequence.

    On a CPU the same memory is indexed through numpy, which takes a tenth of PyTorch's time.

    Args:
        slots: number of slots to start with. A CUDA graph reads only the tensor that it captured, so there
            should be enough from the beginning.
        device: where the tokens are.

    Attributes:
        tensor: the tokens by slot, ``[slots]`` int64; replaced by a longer one when slots run out.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._use(torch.zeros(slots, dtype=torch.int64, device=device))

    def _use(self, tokens: Tensor) -> None:
        self.tensor = tokens
        self._on_host = tokens.numpy() if tokens.device.type == "cpu" else None

    def put(self, slots: list[int], tokens: Tensor) -> None:
        """Store ``tokens [len(slots)]``; add slots that do not exist yet."""
        if max(slots) >= len(self.tensor):
            more = torch.zeros(max(slots) + 1, dtype=torch.int64, device=self._device)
            self._use(torch.cat((self.tensor, more)))
        if self._on_host is not None:
            self._on_host[slots] = tokens.numpy()
        else:
            (where,) = upload(self._device, np.array(slots))
            self.tensor.index_copy_(0, where, tokens)

    def copy_to(self, token_ids: Tensor, indices: list[int], slots: list[int]) -> None:
        """Set ``token_ids[indices]`` to the tokens in ``slots``."""
        if self._on_host is not None:
            host: np.ndarray[tuple[int], np.dtype[np.int64]] = token_ids.numpy()
            host[indices] = self._on_host[slots]
        else:
            to, where = upload(self._device, np.array(indices), np.array(slots))
            token_ids.index_copy_(0, to, self.tensor.index_select(0, where))
