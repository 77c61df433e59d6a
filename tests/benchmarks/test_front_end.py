"""The benchmark of the front end: its numbers are those of the run, and what is missing is an error."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.benchmarks.command_line import main
from tests.benchmarks.crowd import StreamBroken, listen
from tests.benchmarks.front_end import COLUMNS, CrowdLoad, check, run_front_end
from ullm.errors import ServerUnreachable, UsageError

pytestmark = pytest.mark.process

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"choices":[{"text":"x"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def usage(tokens: int) -> bytes:
    return b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens


@pytest.mark.slow
async def test_a_crowd_is_served_and_measured(tmp_path: Path) -> None:
    said: list[str] = []
    load = CrowdLoad(streams=40, tokens=30, step_seconds=0.002, rounds=2)
    found = await run_front_end(load, tmp_path / "log", said.append)
    assert len(found.rounds) == len(said) == 2
    for run in found.rounds:
        assert run.tokens == 40 * 30
        assert 40 <= run.events <= run.tokens
        assert run.seconds > 30 * 0.002
        assert 0 < run.first[0] <= run.first[2] < run.seconds
        assert 0 < run.front
        assert run.rss > 10 << 20
    rows = found.markdown().strip().splitlines()[-2:]
    assert [row.count("|") for row in rows] == [len(COLUMNS) + 1] * 2
    assert '"step_seconds": 0.002' in found.json()


@pytest.mark.parametrize("end", [b"", usage(3), usage(2) + DONE, DONE])
async def test_a_stream_that_is_not_whole_is_an_error(nursery: trio.Nursery, end: bytes) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        # The first broken stream is an error; the crowd hangs up on the other one, at any moment.
        with suppress(trio.BrokenResourceError):
            await stream.receive_some(1 << 16)
            await stream.send_all(HEAD + 3 * EVENT + end)
            await stream.send_eof()

    listeners = await nursery.start(trio.serve_tcp, answer, 0)
    port = listeners[0].socket.getsockname()[1]
    with pytest.raises(StreamBroken, match="without its tokens"):
        await trio.to_thread.run_sync(listen, "127.0.0.1", port, "m", 2, 3)


def test_nobody_listens() -> None:
    with pytest.raises(ServerUnreachable, match="refused"):
        listen("127.0.0.1", 1, "m", 1, 1)


@pytest.mark.parametrize(
    ("load", "flag"),
    [
        (CrowdLoad(streams=0), "--streams"),
        (CrowdLoad(tokens=0), "--output-tokens"),
        (CrowdLoad(rounds=0), "--rounds"),
        (CrowdLoad(step_seconds=-1), "--step-ms"),
        (CrowdLoad(streams=1 << 20), "--streams"),
    ],
)
def test_a_load_that_cannot_be_is_refused(load: CrowdLoad, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        check(load)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, log = tmp_path / "report.md", tmp_path / "log"
    command = ["front-end", "--streams", "3", "--output-tokens", "5", "--step-ms", "1"]
    assert main([*command, "--rounds", "1", "--output", str(report), "--log", str(log)]) == 0
    assert capsys.readouterr().out == report.read_text()
    assert "3 streams of 5 tokens" in report.read_text()
