"""Weights that make no numbers, which no shape and no name tells."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ullm.errors import ModelFileBroken


def check_numbers(logits: Tensor, model: Path | str, dtype: torch.dtype) -> None:
    """Refuse a model whose logits are no numbers: all its texts would be of one token, without a word.

    Args:
        model: the model's folder or file, or the name of its class.

    Raises:
        ModelFileBroken: so it is; says what may be the cause.
    """
    if logits.isnan().any():
        raise ModelFileBroken(
            model,
            f"the weights make logits that are no numbers (NaN) in {str(dtype).removeprefix('torch.')}: they "
            "are damaged, so fetch them again, or too large for that dtype, so name another with --dtype",
        )
