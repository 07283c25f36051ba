"""The README's Python blocks run, and its commands are ones that exist."""

import re
import shlex
from pathlib import Path

import pytest

from mbrl_jax.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_print_what_their_comments_say(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert len(printed) == len(promised)
    for line, promise in zip(printed, promised, strict=True):
        numbers = re.findall(r"[\d.]*\d", promise.split("IQM")[0])
        assert re.findall(r"[\d.]*\d", line)[: len(numbers)] == numbers


def test_the_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [line.partition(" #")[0] for line in "\n".join(blocks).splitlines()]
    ours = [line for line in commands if "mbrl-jax" in line]
    assert len(ours) == 7
    for line in ours:
        words = shlex.split(line.partition("mbrl-jax ")[2])
        if "--total-steps" in words:  # shorter than a reader would want it
            words[words.index("--total-steps") + 1] = "400"
            words += ["--eval-max-steps", "50"]
        assert main(words) == 0, line
    assert (tmp_path / "runs" / "lake" / "curve.png").exists()
    assert (tmp_path / "runs" / "compare.png").exists()
