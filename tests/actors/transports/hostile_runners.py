"""Runners that misbehave, each in its own way. Workers import them by name."""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time

from ullm.errors import ModelFileBroken
from ullm.logs import get_logger
from ullm.protocol.messages import Progress
from ullm.testing import ScriptedRunner

FOREVER = 3600


class Prints(ScriptedRunner):
    """Prints in every way there is."""

    def submit(self, step):
        print("from python")  # noqa: T201
        os.write(1, b"from a descriptor\n")
        ctypes.CDLL(None).puts(b"from C")
        ctypes.CDLL(None).fflush(None)
        get_logger("ullm.hostile").warning("from a logger", answer=42)
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        return super().submit(step)


class ReadsStdin(ScriptedRunner):
    """Would take the worker's messages away from it, if stdin were still its pipe."""

    def submit(self, step):
        assert sys.stdin.read() == ""
        return super().submit(step)


class RaisesInLoad(ScriptedRunner):
    def load(self, start, progress):
        raise ModelFileBroken("model.safetensors", "truncated after 3 bytes")


class RaisesInStep(ScriptedRunner):
    def submit(self, step):
        raise ZeroDivisionError("first line\nsecond line")


class RaisesInClose(ScriptedRunner):
    def close(self):
        raise RuntimeError("cannot close")


class Exits(ScriptedRunner):
    def submit(self, step):
        print("some reason", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(3)


class Segfaults(ScriptedRunner):
    def submit(self, step):
        os.kill(os.getpid(), signal.SIGSEGV)


class Sleeps(ScriptedRunner):
    """Hangs where Python can be interrupted."""

    def load(self, start, progress):
        progress(Progress("hanging"))
        time.sleep(FOREVER)


class HangsInWake(ScriptedRunner):
    def wake(self, progress):
        progress(Progress("hanging"))
        time.sleep(FOREVER)


class SleepsInStep(ScriptedRunner):
    def submit(self, step):
        time.sleep(FOREVER)


class HoldsTheInterpreter(ScriptedRunner):
    """Hangs in C without releasing the interpreter's lock: no thread and no signal handler runs."""

    def load(self, start, progress):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # not even on the way there
        progress(Progress("hanging"))
        mutex = ctypes.create_string_buffer(128)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)


class IgnoresSigterm(ScriptedRunner):
    def load(self, start, progress):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return super().load(start, progress)

    def close(self):
        time.sleep(FOREVER)


class WritesGarbage(ScriptedRunner):
    """Finds the pipe, wherever it was moved to, and writes to it."""

    def submit(self, step):
        for descriptor in range(3, 32):
            try:
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1")
            except OSError:
                continue
        return super().submit(step)


class ClosesThePipe(ScriptedRunner):
    def submit(self, step):
        os.closerange(3, 64)
        time.sleep(FOREVER)


class HasAChild(ScriptedRunner):
    """Starts a process of its own and reports its id."""

    def load(self, start, progress):
        child = subprocess.Popen(["sleep", str(FOREVER)])
        progress(Progress(f"child {child.pid}"))
        return super().load(start, progress)
