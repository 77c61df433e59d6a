"""``ullm completion SHELL``: the scripts, and what bash completes with its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ullm.cli.app import main

BASH = shutil.which("bash")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_name_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "ullm" in script.splitlines()[0] + script.splitlines()[2]
    assert "run-batch" in script
    assert "max-bs" in script


@pytest.mark.process
@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "ullm.bash"
    script.write_text(capsys.readouterr().out)
    lines = ["ullm ser", "ullm serve --max-b", "ullm serve --dtype b", "ullm bench ", "ullm completion "]
    program = f"""
        source {script}
        complete -p ullm > /dev/null || exit 3
        while IFS= read -r line; do
            IFS=' ' read -r -a COMP_WORDS <<< "$line"
            [[ $line == *' ' ]] && COMP_WORDS+=('')
            COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMP_LINE=$line COMP_POINT=${{#line}} COMPREPLY=()
            _ullm
            echo "${{COMPREPLY[*]}}"
        done
    """
    done = subprocess.run(
        [str(BASH), "--norc", "-c", program],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == ""
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert found[0] == {"serve"}
    assert found[1] == {"--max-bs", "--max-body"}
    assert found[2:] == [{"bfloat16"}, {"serve", "engine"}, {"bash", "zsh", "fish"}]
