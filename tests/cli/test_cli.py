"""The command line as people meet it: processes, exit statuses, one line per error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

import ullm
from tests.support.server import starting_servers
from ullm.cli.app import main
from ullm.testing import write_scripted_model, write_tiny_model

pytestmark = pytest.mark.process
REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 60


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ullm", *arguments]


def run(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), input=stdin, env={**os.environ, **environ}, cwd=REPOSITORY,
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


@pytest.fixture
def scripted(tmp_path: Path) -> list[str]:
    """Flags for a model that answers without weights."""
    folder = write_scripted_model(tmp_path / "scripted")
    return ["--model", str(folder), "--runner", "ullm.testing:ScriptedRunner", "--load-format", "dummy"]


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stderr
    return lines[0]


# --- what is said before anything runs ----------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ullm.cli.app import main; main(['--help']); "
        "assert not {'torch', 'transformers', 'trio', 'quart', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("serve", "chat", "generate", "bench", "chaos", "pull", "doctor"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["serve", "chat", "generate", "pull", "doctor", "bench", "chaos"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "Usage: ullm" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out.strip() == ullm.__version__


@pytest.mark.parametrize("words", [[], ["serve"], ["bench", "engine"]])
def test_help_is_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *words]) == 0
    shown = capsys.readouterr().out
    assert main([*words, "--help"]) == 0
    assert shown == capsys.readouterr().out
    assert "Usage: ullm" in shown


def test_help_of_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "nope"]) == 2
    assert "nope" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "Unknown command"),
        (["serve", "model", "rest"], "unexpected argument rest"),
        (["bench", "soak"], "ullm bench soak is python -m tests.benchmarks soak now"),
        (["bench", "chaos", "--seed", "1"], "ullm bench chaos is ullm chaos now"),
        (["serve", "--nope"], "Unknown option: --nope"),
        (["serve", "--max-bs", "many"], "Invalid value for --max-bs"),
        (["serve", "--dtype", "float12"], "--dtype"),
        (["serve", "one", "--model", "two"], "named twice"),
        (["generate"], "needs a prompt"),
        (["serve", "--port", "8510.6"], '"8510.6" is not a whole number'),
        (["serve", "--max-bs=0.5"], '"0.5" is not a whole number'),
        (["bench", "serve", "--requests", "1.5"], '"1.5" is not a whole number'),
        (["chaos", "--faults", "1.5"], '"1.5" is not a whole number'),
        (["generate", "--nope"], "unknown option: --nope"),
        (["generate", "-x"], "unknown option: -x"),
        (["generate", "--nope=a b"], "unknown option: --nope=a b"),
        (["generate", "--", " "], "the prompt is empty"),
        (
            ["generate", "--", "one", "two"],
            "unexpected argument two; put a prompt of several words in quotes",
        ),
        (
            ["generate", "Why", "is", "it"],
            "unexpected arguments is it; put a prompt of several words in quotes",
        ),
        (["generate", " "], "the prompt is empty"),
        (["bench", "serve", "--concurrency", "0"], "--concurrency"),
        (["chaos", "--kinds", "worker,nope"], "--kinds nope"),
        (["bench", "serve", "--url", "ftp://x"], "--url"),
        (["serve", "--transport", "thread", "--tp-size", "2"], "use --transport process"),
        (["serve", "--device-ids", "0", "--device-ids", "x"], "--device-ids 0,x"),
        (["serve", "--port", "70000"], "--port must be from 0 to 65535"),
        (["serve", "--faults", "nowhere:crash"], "no point 'nowhere'"),
        (["serve", "--uds", "/x", "--port", "1"], "--uds /x takes the place of"),
        (["chat", "--max-bs", "-1"], "--max-bs must be at least 0"),
        (["chat", "--top-p", "7"], "top_p must be"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be"),
        (["generate", "hi", "--block-size", "0"], "--block-size must be at least 1"),
        (["bench", "engine", "--max-bs", "-1"], "--max-bs must be at least 0"),
        (["bench", "engine", "--top-p", "7"], "--top-p must be above 0"),
        (["run-batch", "in", "-o", "out", "--max-choices", "0"], "--max-choices must be at least 1"),
        (["pull", "--revision", "a", "--nope"], "Unknown option"),
        (["doctor", "--port", "70000"], "--port must be from 0 to 65535"),
        (["doctor", "--dtype", "float32"], "only for a model"),
        (["list", "extra"], "unexpected argument extra"),
        (["show"], "error: show needs NAME; see ullm show --help"),
        (["run-batch"], "error: run-batch needs FILE; see ullm run-batch --help"),
        (["bench", "engine", "--max-bs"], "error: --max-bs needs a value; see ullm bench engine --help"),
        (["serve", "--port"], "error: --port needs a value; see ullm serve --help"),
        (["rm"], "rm needs what to remove"),
        (["help", "nope"], "nope"),
        (["completion", "powershell"], "bash"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "hi", "--model", "/nothing"], "/nothing: no such folder"),
        (["pull", "/nothing"], "/nothing: no such folder"),
        (["generate", "hi", "--url", "http://127.0.0.1:1"], "is a server running there?"),
        (["bench", "serve", "--url", "http://127.0.0.1:1"], "is a server running there?"),
        (["bench", "serve", "--output", "/nowhere/report"], "/nowhere/report: No such file or directory"),
        (["bench", "engine", "--output", "/"], "/: Is a directory"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error


def test_a_variable_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULLM_MAX_BS", "many")
    assert main(["generate", "hi"]) == 2
    assert "ULLM_MAX_BS='many'" in capsys.readouterr().err


def test_a_traceback_only_for_those_who_ask() -> None:
    quiet = run("generate", "hi", "--model", "/nothing")
    assert quiet.returncode == 1
    one_error_line(quiet)
    loud = run("generate", "hi", "--model", "/nothing", "--log-level", "debug")
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr
    assert loud.stderr.strip().splitlines()[-1].startswith("error: /nothing")


# --- commands -----------------------------------------------------------------------------------


def test_generate(scripted: list[str]) -> None:
    done = run("generate", "hello", *scripted, "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    piped = run("generate", "-", *scripted, "--max-tokens", "5", stdin="hello")
    assert piped.stdout == done.stdout
    raw = run("generate", "--raw", "hello", *scripted, "--max-tokens", "5")
    assert raw.returncode == 0, raw.stderr
    assert raw.stdout != done.stdout


@pytest.mark.parametrize("level", ["1", "2"])
def test_optimized_bytecode_changes_nothing(scripted: list[str], level: str) -> None:
    """``-OO`` drops docstrings, ``-O`` assertions; workers get the variable as well."""
    done, optimized = (
        run("generate", "hello", *scripted, "--max-tokens", "5", **environ)
        for environ in ({}, {"PYTHONOPTIMIZE": level})
    )
    assert (optimized.returncode, optimized.stdout) == (0, done.stdout), optimized.stderr
    shown = run("generate", "--help", PYTHONOPTIMIZE=level)
    assert shown.returncode == 0
    assert "--max-tokens" in shown.stdout


def test_piped_text_goes_before_the_prompt(scripted: list[str]) -> None:
    """The scripted model's answer depends on every token of its prompt."""
    options = [*scripted, "--max-tokens", "5"]
    joined = run("generate", "Summarise.", *options, stdin="Grüße\n")
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout == run("generate", "Grüße\n\nSummarise.", *options).stdout
    assert joined.stdout == run("generate", "Summarise.", *options, stdin="Grüße\n", LC_ALL="C").stdout
    assert joined.stdout != run("generate", "Summarise.", *options).stdout
    alone = run("generate", *options, stdin="Grüße")
    assert alone.stdout == run("generate", "Grüße", *options).stdout


def test_utf_8_whatever_the_locale(scripted: list[str]) -> None:
    several = [*scripted, "--max-tokens", "200", "--ignore-eos"]
    done = run("generate", "hello", *several)
    environ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run("generate", "hello", *several, **environ).stdout == done.stdout
    assert not done.stdout.isascii()


def test_empty_variables_count_as_unset(scripted: list[str], tmp_path: Path) -> None:
    names = ("ULLM_MODEL", "ULLM_CACHE", "ULLM_LOG_LEVEL", "ULLM_FAULTS", "ULLM_SCRIPTED_STEP_SECONDS")
    environ = dict.fromkeys((*names, "ULLM_API_KEY", "HF_HOME", "HF_HUB_CACHE"), "")
    done = run("generate", "hello", *scripted, "--max-tokens", "5", **environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_characters_that_the_terminal_lacks_are_replaced(scripted: list[str]) -> None:
    several = [*scripted, "--max-tokens", "200", "--ignore-eos"]
    done = run("generate", "hello", *several)
    ascii_only = run("generate", "hello", *several, PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert not done.stdout.isascii()
    assert ascii_only.stdout == done.stdout.encode("ascii", "replace").decode()


def test_a_prompt_on_stdin_in_another_encoding_is_told(scripted: list[str]) -> None:
    done = run("generate", "-", *scripted, stdin="Grüße", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "stdin is not ascii text" in one_error_line(done)


def test_generate_says_why_a_prompt_is_refused(scripted: list[str]) -> None:
    done = run("generate", "hello " * 100, *scripted, "--context-len", "16")
    assert done.returncode == 1
    assert "maximum context length is 16 tokens" in one_error_line(done)


def test_generate_into_a_closed_pipe(scripted: list[str]) -> None:
    process = subprocess.Popen(
        command("generate", "hello", *scripted, "--max-tokens", "2000", "--ignore-eos"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(TIMEOUT) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_generate_stops_at_a_signal(scripted: list[str], number: signal.Signals) -> None:
    arguments = command("generate", "hello", *scripted, "--max-tokens", "3000", "--ignore-eos")
    environ = {**os.environ, "ULLM_SCRIPTED_STEP_SECONDS": "0.05"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environ
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(number)
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error


def test_chat_over_a_pipe(scripted: list[str]) -> None:
    done = run(
        "chat", *scripted, "--temperature", "0", "--max-tokens", "4", stdin="hello\n/reset\nhello\n/exit\n"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == second


def test_pull_prints_where_the_model_is(scripted: list[str]) -> None:
    folder = Path(scripted[1])
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = run("pull", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    assert "MB" in done.stderr
    assert "runs          not at all" in done.stderr, "a script is no model"


def test_doctor_of_a_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    done = run("doctor", str(tmp_path), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "architecture  LlamaForCausalLM\nruns          natively\n" in done.stdout
    assert "equal to transformers on 16 tokens" in done.stdout
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 0}))
    done = run("doctor", str(tmp_path), "--json")
    assert (done.returncode, json.loads(done.stdout)["runs"]) == (1, "refused")
    done = run("doctor", "--dtype", "float32")
    assert (done.returncode, "only for a model" in done.stderr) == (2, True)


def test_doctor(tmp_path: Path) -> None:
    done = run("doctor", "--json", ULLM_CACHE=str(tmp_path), CXX="/no/compiler")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["healthy"] else 1)
    assert report["data"]["torch"]["gflops"]["cpu"]["float32"] > 0
    assert report["data"]["cache"] == str(tmp_path)
    assert {check["name"] for check in report["checks"]} >= {
        "system",
        "packages",
        "cpu",
        "disk",
        "models",
        "port",
    }


def test_doctor_notices_a_port_in_use() -> None:
    from ullm.cli.doctor import port_is_free

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)


# --- serve --------------------------------------------------------------------------------------


def test_a_taken_port_is_noticed_before_the_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "/nothing", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "already in use" in one_error_line(done)


def test_serve_without_a_model() -> None:
    done = run("serve", "/nothing", "--port", "0", "--log-level", "error")
    assert done.returncode == 1
    assert "/nothing: no such folder" in one_error_line(done)


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_serve_answers_and_stops_in_order(scripted: list[str]) -> None:
    with starting_servers() as serve:
        server = serve(*scripted)
        url = server.url
        with urllib.request.urlopen(f"{url}/v1/models") as response:
            assert json.load(response)["data"][0]["id"] == "scripted"
        asked = run("generate", "hello", "--url", url, "--max-tokens", "5")
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout == run("generate", "hello", *scripted, "--max-tokens", "5").stdout
        chatted = run("chat", "--url", url, "--max-tokens", "5", stdin="hello\n")
        assert chatted.returncode == 0, chatted.stderr
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_bench_of_a_server(scripted: list[str], tmp_path: Path) -> None:
    with starting_servers() as serve:
        url = serve(*scripted).url
        path = tmp_path / "report.md"
        options = ["--concurrency", "1,3", "--output-tokens", "8", "--prompt-words", "5", "--json"]
        done = run("bench", "serve", "--url", url, *options, "--output", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(r["concurrency"], r["requests"], r["failed"]) for r in report["runs"]] == [(1, 4, 0), (3, 4, 0)]
    assert {r["output_tokens"] for r in report["runs"]} == {32}
    assert all(r["finish_reasons"] == {"length": 4} for r in report["runs"])
    assert path.read_text().startswith("| streams")


def test_bench_of_an_engine(scripted: list[str]) -> None:
    options = ["--concurrency", "2", "--output-tokens", "8", "--prompt-words", "5", "--json"]
    done = run("bench", "engine", *scripted, *options)
    assert done.returncode == 0, done.stderr
    (level,) = json.loads(done.stdout)["runs"]
    assert (level["output_tokens"], level["failed"]) == (32, 0)
    assert level["prompt_tokens"] > 0


def wait_for_children(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, as soon as there are any."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := psutil.Process(pid).children(recursive=True)):
        assert time.monotonic() < deadline, "it started no process"
        time.sleep(0.02)
    return found


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_a_signal_while_starting(scripted: list[str]) -> None:
    with subprocess.Popen(
        command("serve", "--port", "0", *scripted), env={**os.environ, "ULLM_SCRIPTED_LOAD_SECONDS": "60"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        workers = wait_for_children(process.pid)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, error
    assert time.monotonic() - began < 10
    _, left = psutil.wait_procs(workers, timeout=30)  # the kernel is not at once
    assert not left
    assert "Traceback" not in error


@pytest.mark.skipif(os.name == "nt", reason="there are no pseudo-terminals there")
def test_chat_on_a_terminal(scripted: list[str], tmp_path: Path) -> None:
    import pty
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    arguments = command("chat", *scripted, "--max-tokens", "3000", "--ignore-eos")
    environ = {
        **os.environ, "ULLM_SCRIPTED_STEP_SECONDS": "0.02", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1",
        "ULLM_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    process = subprocess.Popen(
        arguments, stdin=slave, stdout=slave, stderr=slave, cwd=REPOSITORY, env=environ
    )
    try:
        read_until(master, "\x1b[?2004h")  # pastes are asked to be marked
        read_until(master, "›")
        os.write(master, b"not this\x03\x1b[200~hello\nthere\x1b[201~\r")
        read_until(master, "there")
        read_until(master, "\x1b[?2004l")
        answer = b""
        while len(answer) < 20:
            answer += os.read(master, 1)
        process.send_signal(signal.SIGINT)
        read_until(master, "stopped")
        read_until(master, "›")
        os.write(master, b"\x03")
        read_until(master, "Ctrl-C again")
        read_until(master, "›")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 128 + signal.SIGINT
        assert termios.tcgetattr(slave) == before
        kept = (tmp_path / "cache" / "history" / "chat").read_text()
        assert [line for line in kept.splitlines() if line.startswith("+")] == ["+hello", "+there"]
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def read_until(descriptor: int, text: str) -> None:
    """Read a terminal until it has shown a text."""
    import select

    seen = b""
    deadline = time.monotonic() + TIMEOUT
    while text.encode() not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{text!r} was not shown, but {seen.decode(errors='replace')!r}"
        seen += os.read(descriptor, 1)
