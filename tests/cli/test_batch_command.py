"""``ullm run-batch`` as people meet it: a process, its output, its exit status, and a second run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process


@pytest.fixture
def scripted(tmp_path: Path) -> list[str]:
    folder = write_scripted_model(tmp_path / "scripted")
    runner = ["--runner", "ullm.testing:ScriptedRunner", "--load-format", "dummy", "--standby-workers", "0"]
    return ["--model", str(folder), *runner]


def batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ullm", "run-batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def asked(custom_id: str, **body: object) -> str:
    body = {"prompt": [300, 301], "max_tokens": 4, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


def test_a_batch_and_the_rest_of_it(tmp_path: Path, scripted: list[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([asked("a"), asked("b", temperature=-1), asked("c")]), encoding="utf-8")
    done = batch(source, "-o", output, *scripted, "--faults", "worker.step:crash@nth=2,times=1")
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"{output}: 3 requests answered, 1 of them failed"
    lines = output.read_text("utf-8").splitlines()
    statuses = {json.loads(line)["custom_id"]: json.loads(line)["response"]["status_code"] for line in lines}
    assert statuses == {"a": 200, "b": 400, "c": 200}

    refused = batch(source, "-o", output, *scripted)
    assert refused.returncode == 1
    assert "--resume goes on with it" in refused.stderr
    assert output.read_text("utf-8").splitlines() == lines

    source.write_text("\n".join([asked("a"), asked("b"), asked("c"), asked("d")]), encoding="utf-8")
    with output.open("a", encoding="utf-8") as file:
        file.write('{"custom_id": "d", "respo')  # cut, as by a kill
    done = batch(source, "-o", output, *scripted, "--resume")
    assert done.returncode == 0, done.stderr
    assert "2 requests answered, 0 of them failed, 2 were answered before" in done.stderr
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [each["custom_id"] for each in found if each["response"]["status_code"] == 200] == [
        *(json.loads(line)["custom_id"] for line in lines if '"status_code":200' in line),
        *(each["custom_id"] for each in found[3:]),
    ]
    assert {each["custom_id"] for each in found[3:]} == {"b", "d"}


def test_what_cannot_be_used_is_said_in_a_line(tmp_path: Path, scripted: list[str]) -> None:
    output = tmp_path / "out.jsonl"
    for arguments, status, words in (
        ([tmp_path / "missing", "-o", output], 1, "missing: No such file"),
        ([tmp_path / "missing"], 2, "--output"),
    ):
        done = batch(*arguments, *scripted)
        assert done.returncode == status, done.stderr
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
