"""A standby worker leaves the GPU alone. Skipped without CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ullm.testing import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = """
import sys
import torch
from ullm.config import EngineConfig
from ullm.protocol.messages import Prepare, RankSpec
from ullm.model.execution.runner import ModelRunner

path = sys.argv[1]
runner = ModelRunner()
runner.prepare(Prepare(EngineConfig(model=path, device="cuda"), RankSpec(device_index=0), path), print)
print(torch.cuda.is_initialized())
"""


def test_preparing_creates_no_context(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
