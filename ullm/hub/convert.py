"""Conversions that need torch or transformers: done once per model in a child process, then cached."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ullm.errors import ModelError, ModelFileBroken, ModelUnsupported
from ullm.hub.files import HEARTBEAT, Progress, build_folder, cache_dir, cannot_keep
from ullm.hub.guarded import end_guarded, open_guarded
from ullm.system.interpreter import python_command, python_environment

_TAIL_LINES = 20
_FORMAT = 2
"""Changes with what a conversion writes, so that older ones in the cache are not used."""


def tokenizer_folder(source: Path, progress: Progress, *, trust_remote_code: bool = False) -> Path:
    """Return a folder with tokenizer.json for a model folder or a GGUF file; make it if need be.

    For a GGUF file the folder also holds the config.json made from its metadata.

    Args:
        trust_remote_code: run the tokenizer's own code, if it comes with some.

    Raises:
        ModelFileBroken, ModelUnsupported: the file's tokenizer cannot be read.
    """
    if source.is_dir() and (source / "tokenizer.json").is_file():
        return source
    label = f"reading the tokenizer of {source.name}"
    return _converted("tokenizer", source, label, progress, trust_remote_code)


def config_folder(source: Path, progress: Progress) -> Path:
    """Return a folder with the config.json of a GGUF file whose tokenizer is not used; make it if need be.

    Raises:
        ModelFileBroken, ModelUnsupported: the file is damaged, or of a kind that cannot be run.
    """
    return _converted("config", source, f"reading {source.name}", progress)


def _converted(
    what: str, source: Path, label: str, progress: Progress, trust_remote_code: bool = False
) -> Path:
    """Return the folder of the cache that holds a conversion; make it if need be."""
    state = source.stat()
    made = f"{_FORMAT}\0{what}\0{trust_remote_code}\0{source.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    key = hashlib.sha256(made.encode()).hexdigest()[:16]
    target = cache_dir() / "tokenizers" / f"{source.stem}-{key}"
    if not target.is_dir():
        with build_folder(target, label, progress) as partial:
            if partial is not None:
                convert(what, source, partial, label, progress, trust_remote_code=trust_remote_code)
    return target


def convert(
    what: str,
    source: Path,
    target: Path,
    label: str,
    progress: Progress,
    *,
    scratch: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Run ``python -m ullm.model.loading.convert``.

    Args:
        what: ``tokenizer``, ``config``, or ``model``; see there.
        source: the GGUF file or the model's folder.
        target: the folder to write to.
        scratch: what to remove if this process is killed meanwhile; default: the target.
        trust_remote_code: run a tokenizer's own code.

    Raises:
        ModelFileBroken, ModelUnsupported: it failed; the message is its last line.
    """

    def on_line(line: str) -> None:
        words = line.split()
        if len(words) == 4 and words[0] == "Progress":
            progress(label, int(words[1]), int(words[3]))

    command = python_command("-m", "ullm.model.loading.convert", what, str(source), str(target))
    command = [*command, *(["--trust-remote-code"] if trust_remote_code else [])]
    code, tail = run(command, on_line, lambda: progress(label, 0, None), scratch or target)
    if code:
        check_space(tail)
        raise _failure(source, tail[-1] if tail else f"the conversion ended with status {code}")


def _failure(source: Path, line: str) -> ModelError:
    match line.split(" ", 2):
        case ["error", "ModelUnsupported", message]:
            return ModelUnsupported(message)
        case ["error", _, message]:
            return ModelFileBroken(source, message.removeprefix(f"{source}: "))
    return ModelFileBroken(source, f"cannot be converted: {line}")


def run(
    command: list[str], on_line: Callable[[str], None], heartbeat: Callable[[], None], scratch: Path
) -> tuple[int, list[str]]:
    """Run a program to its end; both functions are called in this thread, and end it if they raise.

    Args:
        scratch: the folder that it writes to, removed if this process is killed meanwhile.

    Returns:
        The exit status, and the last lines of its output, stderr included.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    tail: list[str] = []
    with open_guarded(
        command,
        [scratch],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=python_environment(),
    ) as process:
        reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
        reader.start()
        try:
            while (line := _next(lines, heartbeat)) is not None:
                tail = [*tail, line][-_TAIL_LINES:] if line else tail
                on_line(line)
        except BaseException:
            end_guarded(process)
            raise
        finally:
            process.wait()
            reader.join()
    return process.returncode, tail


def check_space(lines: Sequence[str]) -> None:
    """Return unless a program's last lines say that the disk is full.

    Raises:
        ModelNotFound: they do.
    """
    for number in (errno.ENOSPC, errno.EDQUOT):
        if any(os.strerror(number) in line for line in lines):
            raise cannot_keep(OSError(number, os.strerror(number)))


def _read_lines(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None  # it was opened with a pipe
    for line in process.stdout:
        lines.put(line.rstrip())
    lines.put(None)


def _next(lines: queue.SimpleQueue[str | None], heartbeat: Callable[[], None]) -> str | None:
    while True:
        try:
            return lines.get(timeout=HEARTBEAT)
        except queue.Empty:
            heartbeat()
