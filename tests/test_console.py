"""Streams that fail, terminals of every kind, paths below the home folder, and none at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import rows

from mbrl_jax import InputError, make_env, train
from mbrl_jax.__main__ import _cache_folder, main
from mbrl_jax.analysis import plots, runs
from mbrl_jax.runtime.evaluate import evaluate_run

jax.devices()  # main() sets another number of them where the backend has not started yet

TRAIN = "train q_learning --env FrozenLake-misc --total-steps 40 --eval-every 20 --eval-episodes 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("console") / "run"
    assert main([*TRAIN.split(), "--out", str(out)]) == 0
    return out


def swap(monkeypatch, name, stream):
    """Puts a stream of ours in the place of `sys.stdout` or `sys.stderr`."""
    monkeypatch.setattr(sys, name, stream)
    return stream


def closed_pipe():
    """A stream that nobody reads any longer; buffered, as one to a pipe is."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


COMMANDS = {
    "usage": "",
    "agents": "list agents",
    "envs": "list envs",
    "help": "train sac --help",
    "evaluate": "evaluate RUN --episodes 2",
    "compare": "compare RUN RUN --out OUT",
}


def words(name, run, tmp_path):
    place = {"RUN": str(run), "OUT": str(tmp_path / "plot.png")}
    return [place.get(word, word) for word in COMMANDS[name].split()]


# a pipe that is closed, a disk that is full, a stream that is not there


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("line_buffered", [False, True])
def test_nobody_reads_the_output(name, line_buffered, run, tmp_path, monkeypatch, capfd):
    args = words(name, run, tmp_path)
    with monkeypatch.context() as patch, closed_pipe() as stream:
        stream.reconfigure(line_buffering=line_buffered)
        swap(patch, "stdout", stream)
        assert main(args) == 141
    assert capfd.readouterr().err == ""


def test_head_of_a_list():
    command = f"{sys.executable} -m mbrl_jax list agents | head -1; exit ${{PIPESTATUS[0]}}"
    for unbuffered in ("", "1"):
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=120, env=env
        )
        assert done.returncode in (0, 141)  # head may have read all before it ended
        assert done.stdout == "q_learning            Q-learning: no planning\n"
        assert done.stderr == ""


def test_training_goes_on_where_nobody_reads_its_progress(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, closed_pipe() as stream:
        swap(patch, "stderr", stream)
        assert main([*TRAIN.split(), "--out", str(tmp_path / "run")]) == 0
        assert main(["trian"]) == 2
    assert rows(tmp_path / "run") == rows(run)
    assert (tmp_path / "run" / "curve.png").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_output_does_not_fit_on_a_disk(name, run, tmp_path, monkeypatch, capfd):
    args = words(name, run, tmp_path)
    with monkeypatch.context() as patch, open("/dev/full", "w") as stream:
        swap(patch, "stdout", stream)
        assert main(args) == 2
    said = capfd.readouterr().err
    assert said == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_closed_output(name, run, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        if name == "help":
            with pytest.raises(SystemExit, match=r"^0$"):
                main(words(name, run, tmp_path))
        else:
            assert main(words(name, run, tmp_path)) == 0
        sys.stdout.close()
    assert capfd.readouterr() == ("", "")


def test_closed_errors_do_not_go_to_the_output(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(["trian"]) == 2
        sys.stderr.close()
    assert capfd.readouterr() == ("", "")


# encodings and terminals

BAD = {
    "value": (["--total-steps", "2.5"], "--total-steps", "'2.5'"),
    "choice": (["--agent.model", "none"], "'none'"),
    "option": (["--agent.gama", "0.9"], "--agent.gama", "did you mean --agent.gamma"),
    "missing": ([], "--out", "required"),
    "letters": (["--out", "rün\udcff"], "--total-steps", "required"),
}


class Terminal:
    """Standard output and error as a terminal of an encoding."""

    def __init__(self, encoding, patch, tty=False):
        import io

        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(
                io.BytesIO(), encoding, "strict" if name == "stdout" else "backslashreplace"
            )
            stream.isatty = lambda: tty
            setattr(self, name, swap(patch, name, stream))
        self.encoding = encoding

    def said(self, name):
        stream = getattr(self, name)
        stream.flush()
        return stream.buffer.getvalue().decode(self.encoding)


TERMINALS = {
    "ascii": ("ascii", False, "80"),
    "latin": ("latin-1", False, "80"),
    "capitals": ("UTF-8", False, "80"),
    "narrow": ("utf-8", False, "20"),
    "colours": ("utf-8", True, "80"),
}


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("name", BAD)
def test_parse_errors_keep_their_text(name, terminal, monkeypatch):
    encoding, tty, columns = TERMINALS[terminal]
    args, *expected = BAD[name]
    base = [] if name in ("missing", "letters") else ["--total-steps", "9", "--out", "run"]
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        console = Terminal(encoding, patch, tty)
        code = main(["train", "dyna_q", "--env", "FrozenLake-misc", *base, *args])
    err = console.said("stderr")
    assert code == 2
    assert console.said("stdout") == ""
    assert re.fullmatch(r"error: [^\x1b]+ \(see mbrl-jax train dyna_q --help\)\n", err), err
    for word in expected:
        assert word in err
    assert os.environ["COLUMNS"] == columns


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_encoding_lacks(encoding, run, tmp_path, monkeypatch):
    out = tmp_path / "r\u00fcn\u03bb"
    with monkeypatch.context() as patch:
        console = Terminal(encoding, patch)
        assert main([*TRAIN.split(), "--out", str(out)]) == 0
        assert main(["evaluate", str(out), "--episodes", "2"]) == 0
        assert main(["compare", str(run), str(out), "--out", str(out / "plot.png")]) == 0
        assert main(["evaluate", str(tmp_path / "\u03bb")]) == 2
        with pytest.raises(SystemExit):
            main(["train", "sac", "--help"])
    said = console.said("stdout")
    assert "n\\u03bb: 1 seeds, 40 environment steps each" in said
    assert "plot: " in said
    assert "--agent.hidden" in said
    assert "\\u03bb is no run folder" in console.said("stderr")


# the home folder


def test_paths_below_the_home_folder(tmp_path, monkeypatch, capfd):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert main([*TRAIN.split(), "--out=~/run"]) == 0
    assert f"{home}/run: 1 seeds" in capfd.readouterr().out
    assert main([*TRAIN.split(), "--out=~/run", "--resume"]) == 0
    assert main(["evaluate", "~/run", "--episodes", "2"]) == 0
    assert main(["compare", "~/run", "~/run", "--out=~/plots/both.png"]) == 0
    assert (home / "plots" / "both.svg").exists()
    env = make_env("FrozenLake-misc")
    train("q_learning", env, 20, out="~/api", eval_every=20, eval_episodes=1)
    train("q_learning", env, 20, out=Path("~/api"), eval_every=20, eval_episodes=1, resume=True)
    assert evaluate_run("~/api", 2).env_steps == 20
    assert runs.read_run("~/api")["env_steps"].tolist() == [20]
    plots.learning_curves({"a": ([1, 2], np.ones((2, 2)))}, "~/curve.png")
    assert {p.name for p in home.iterdir()} >= {"run", "api", "plots", "curve.png", "curve.svg"}
    assert not list(here.iterdir())


def test_the_home_folder_of_nobody(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    said = "~nobody-here/run: no such home folder is known; give the whole path"
    for args in (
        [*TRAIN.split(), "--out=~nobody-here/run"],
        ["evaluate", "~nobody-here/run"],
        ["compare", "~nobody-here/run"],
    ):
        assert main(args) == 2
        assert capfd.readouterr() == ("", f"error: {said}\n")
    with pytest.raises(InputError, match=said):
        evaluate_run("~nobody-here/run")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def homeless(monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_no_home_folder(homeless, run, monkeypatch, capfd):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert _cache_folder() is None
    assert main(["evaluate", str(run), "--episodes", "2"]) == 0
    out, err = capfd.readouterr()
    assert "IQM" in out
    assert err == ""


@pytest.mark.parametrize("xdg", [None, "", "relative", "~/here"])
def test_the_cache_lies_below_the_home_folder(xdg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert _cache_folder() == tmp_path / "home" / ".cache" / "mbrl_jax"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_the_cache_lies_where_the_user_says(tmp_path, monkeypatch, homeless):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cache_folder() == tmp_path / "mbrl_jax"


@pytest.mark.parametrize("place", ["/proc/nowhere", "file", "locked"])
def test_a_cache_that_cannot_be_written(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    if place == "locked":
        monkeypatch.setattr("os.access", lambda *args: False)  # root may write everywhere
    assert _cache_folder() is None
