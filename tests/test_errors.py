"""Errors: one module to import them from, a remedy for each, and who catches which."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys

import pytest
from cyclopts import App

from ullm import errors, supervision
from ullm.cli.exit_status import run_command_line
from ullm.errors import EngineDead, InvalidParameter, ModelNotFound, SupervisionError, UllmError, one_line
from ullm.supervision import InvalidSpec, RestartLimitReached, StartFailed

CLASSES = [
    *(getattr(errors, name) for name in errors.__all__ if name[0].isupper()),
    InvalidSpec,
]
OF_SUPERVISION = [
    "ActorLost",
    "AskTimeout",
    "ChildConflict",
    "ChildNotFound",
    "MailboxClosed",
    "MailboxFull",
    "RestartLimitReached",
    "StartFailed",
    "StartTimeout",
    "SupervisionError",
    "first_cause",
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_says_what_happened_who_raises_it_and_the_remedy(cls: type[Exception]) -> None:
    """The reference of errors is made from this form."""
    lines = (inspect.getdoc(cls) or "").splitlines()
    assert re.fullmatch(r"[A-Z].*\.", lines[0])
    assert lines[1] == ""
    assert [line for line in lines if re.match(r"Raised by: \S", line)]
    assert [line for line in lines if re.match(r"Remedy: \S", line)]


def test_every_error_of_the_module_is_listed() -> None:
    own = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert own <= set(errors.__all__)


@pytest.mark.parametrize("name", OF_SUPERVISION)
def test_the_errors_of_supervision_can_be_imported_from_here(name: str) -> None:
    assert getattr(errors, name) is getattr(supervision, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'ullm.errors' has no attribute 'ShutdownForced'"):
        _ = getattr(errors, "Shutdown" + "Forced")


def test_every_error_has_one_of_two_bases() -> None:
    for cls in CLASSES:
        assert issubclass(cls, UllmError) is not issubclass(cls, SupervisionError)


@pytest.mark.process
def test_the_errors_alone_do_not_load_trio() -> None:
    """A worker process, which has no actors, needs them too."""
    code = "import sys, ullm.errors; print('trio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StartFailed("tokenizer", OSError("no disk")), 1),
        (RestartLimitReached("engine", 3, 60.0, OSError("no disk"), "replica0"), 1),
        (ModelNotFound("no such folder"), 1),
        (EngineDead("the engine has failed: no disk"), 70),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_command_ends_with_one_line_for_errors_of_either_base(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int, wrapped: bool
) -> None:
    raised: BaseException = ExceptionGroup("of a nursery", [error]) if wrapped else error
    app = App(result_action="return_value")

    @app.default
    def command() -> None:
        raise raised

    assert run_command_line(app, []) == status
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("\n no disk \nsecond"), "no disk"),
        (KeyError(), "KeyError"),
        (ValueError("  "), "ValueError"),
        (ValueError("field 'a': \n  must be a number\n"), "field 'a': must be a number"),
        (ValueError("field 'a':"), "field 'a':"),
    ],
)
def test_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(24, "Too many open files"), "error: Too many open files\n"),
        (OSError(13, "Permission denied", "/a/key"), "error: /a/key: Permission denied\n"),
    ],
)
def test_a_system_error_is_told_by_its_own_cause(error, line, capsys):
    app = App()

    @app.default
    def fail() -> None:
        raise error

    assert run_command_line(app, []) == 1
    assert capsys.readouterr().err == line


def test_an_output_that_cannot_be_flushed_is_told_as_stdout(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    app = App(result_action="return_value")
    app.default(lambda: None)
    monkeypatch.setattr(sys, "stdout", Full())
    assert run_command_line(app, []) == 1
    assert capsys.readouterr().err == "error: stdout: No space left on device\n"


def test_a_field_has_the_name_that_was_sent() -> None:
    error = InvalidParameter("max_tokens is 9, but min_max_tokens and --max_tokens stay", "max_tokens")
    error.rename_field("max_tokens", "max_completion_tokens")
    assert error.param == "max_completion_tokens"
    assert (
        str(error) == error.message == "max_completion_tokens is 9, but min_max_tokens and --max_tokens stay"
    )
