"""The pages: their Python runs and prints what it says, and commands, links and files exist."""

import re
import shlex
from pathlib import Path

import pytest

from mbrl_jax.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "experiments" / "examples").glob("*.py"))
SCRIPT = re.compile(r"python ((?:experiments|benchmarks)/\w+\.py)([^`|\n]*)")
PAGES = [*ROOT.glob("*.md"), *(ROOT / name / "README.md" for name in ("experiments", "benchmarks"))]


def says_what_it_prints(program, capsys):
    exec(compile(program, "program", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert len(printed) == len(promised)
    for line, promise in zip(printed, promised, strict=True):
        numbers = re.findall(r"[\d.]*\d", promise.split("IQM")[0])
        assert re.findall(r"[\d.]*\d", line)[: len(numbers)] == numbers


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_print_what_their_comments_say(block, capsys):
    says_what_it_prints(block, capsys)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_print_what_their_comments_say(path, capsys):
    says_what_it_prints(path.read_text(), capsys)


def test_every_example_is_in_the_readme():
    assert {path.name for path in EXAMPLES} == set(re.findall(r"examples/(\w+\.py)\)", README))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_scripts_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]*)(?:#([\w-]+))?\)", text)
    for link, anchor in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for script, options in SCRIPT.findall(text):
        source = (ROOT / script).read_text()
        folder = (ROOT / script).parent
        shared = [folder / name for name in ("common.py", "learning.py")]
        source += "".join(path.read_text() for path in shared if path.exists())
        for option in re.findall(r"--([\w-]+)", options):
            # an option of argparse, or a field of tyro's
            assert f"--{option}" in source or f"{option.replace('-', '_')}: " in source, option


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
