"""Servers that several tests share: started once for each set of options, and reset for each test."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ullm.testing.server import SCRIPTED, STEP_SECONDS, ServerFailed, ServerFaults, ServerProcess

if TYPE_CHECKING:
    import pytest

    from ullm.testing.control import FaultControl

ENVIRON = {"ULLM_SCRIPTED_STEP_SECONDS": STEP_SECONDS, "ULLM_MAX_RESTARTS": "1000"}
"""Many tests cost a shared server more workers within a minute than one that serves would put up with."""


class SharedServers:
    """Starts servers; what the fixtures ``ullm_module_server`` and ``ullm_session_server`` are.

    At the end they are stopped, which must leave no process and no temporary file of theirs. The plugin has
    those that a test asks for join the faults of that test.

    Args:
        model: the scripted model.
        folders: where logs and temporary files go.
    """

    def __init__(self, model: Path, folders: pytest.TempPathFactory) -> None:
        self._model = model
        self._folders = folders
        self._servers: dict[tuple[str, ...], tuple[ServerProcess, Path]] = {}
        self._handed_out: list[ServerFaults] = []
        self._control: FaultControl | None = None

    def __call__(self, *arguments: str, model: Path | str | None = None) -> ServerProcess:
        """Return the server with these options, as it was when it was ready; start it if there is none.

        Args:
            arguments: options of ``ullm serve``.
            model: a folder or name, instead of the scripted model.

        Raises:
            ServerFailed: it does not start, or does not come to rest.
        """
        key = (str(model or ""), *arguments)
        server, _ = self._servers.get(key, (None, None))
        if server is None or server.process.poll() is not None:
            server = self._start(key, arguments, model)
        try:
            server.reset()
        except ConnectionError:  # a test has had it end, and it is about to
            server = self._start(key, arguments, model)
            server.reset()
        if server.faults not in self._handed_out:
            self._handed_out.append(server.faults)
        if self._control is not None:
            self._control.join(server.faults)
        return server

    def begin_test(self, control: FaultControl) -> None:
        """Have the servers join that were handed out for the test, and those that will be."""
        self._control = control
        for faults in self._handed_out:
            if not control.has(faults):  # it may have joined by `FaultControl.also_in`
                control.join(faults)

    def end_test(self) -> None:
        """Have them leave."""
        control, self._control = self._control, None
        handed_out, self._handed_out = self._handed_out, []
        if control is not None:
            for faults in handed_out:
                control.leave(faults)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = []
        for server, folder in self._servers.values():
            children = server.children() if server.process.poll() is None else []
            server.close()
            left += [f"child process {child.pid}" for child in children if child.is_running()]
            left += [f"temporary file {path}" for path in folder.iterdir()]
        if left:
            raise ServerFailed(f"left behind by a shared server: {'; '.join(left)}")

    def _start(
        self, key: tuple[str, ...], arguments: tuple[str, ...], model: Path | str | None
    ) -> ServerProcess:
        if key in self._servers:  # it has ended, which its test was about
            self._servers[key][0].close()
        folder = self._folders.mktemp("ullm-shared")
        temporary = folder / "tmp"
        temporary.mkdir()
        server = ServerProcess(
            *("--model", str(model or self._model)),
            *(SCRIPTED if model is None else ()),
            *arguments,
            environ=ENVIRON | {"TMPDIR": str(temporary)},
            log=folder / "server.log",
            admin=True,
        )
        self._servers[key] = server, temporary
        return server
