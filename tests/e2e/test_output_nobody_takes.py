"""A server whose stdout is closed, full, or has lost its reader, and whose stderr is closed: it serves."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED, Serve
from tests.support.waiting import eventually

pytestmark = [pytest.mark.process, pytest.mark.slow]

RUN = "; os.execv(sys.executable, [sys.executable, '-m', 'ullm', 'serve', '--port', '0', *sys.argv[1:]])"
STDOUT = {
    "closed": ("os.close(1)", "Bad file descriptor"),
    "full": ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", "No space left on device"),
    "unread": ("r, w = os.pipe(); os.dup2(w, 1); os.close(r)", "Broken pipe"),
}


@pytest.mark.parametrize("case", STDOUT)
def test_it_serves_and_warns_once(serve: Serve, scripted_model: Path, case: str) -> None:
    prepare, cause = STDOUT[case]
    command = [sys.executable, "-c", f"import os, sys; {prepare}{RUN}"]
    server = serve("--model", str(scripted_model), *SCRIPTED, command=command, wait=False)
    server.find_url()
    eventually(lambda: server.get("/ready").status_code == 200)
    assert server.complete(max_tokens=3).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    warnings = re.findall(r"(?m)^.* warning .*$", server.log.read_text())
    assert len(warnings) == 1, warnings
    assert f"stdout takes no output  cause={cause} lost=ready: {server.url}/v1 model" in warnings[0]


def test_it_serves_with_all_three_streams_closed(serve: Serve, scripted_model: Path) -> None:
    command = [sys.executable, "-c", f"import os, sys; [os.close(n) for n in (0, 1, 2)]{RUN}"]
    server = serve("--model", str(scripted_model), *SCRIPTED, command=command, wait=False)
    server.find_url()
    eventually(lambda: server.get("/ready").status_code == 200)
    assert server.complete(max_tokens=3).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
