"""The command line: what it prints and writes, and one clear line for every bad input."""

import dataclasses
import re
import shutil

import jax
import pytest
from helpers import contents, finish, start

from mbrl_jax.__main__ import TrainOptions, main
from mbrl_jax.agents import AGENTS

jax.devices()  # main() sets another number of them where the backend has not started yet

LAKE = ["--env", "FrozenLake-misc", "--env-args", "is_slippery=false"]
SHORT = ["--total-steps", "200", "--eval-every", "100", "--eval-episodes", "2", "--seeds", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "dyna"
    assert main(["train", "dyna_q", *LAKE, *SHORT, "--out", str(out)]) == 0
    return out


def refused(capfd, args):
    """The one line on stderr of a command that must end with exit code 2."""
    capfd.readouterr()
    assert main([str(arg) for arg in args]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    return err


def test_train(tmp_path, capfd):
    args = ["train", "dyna_q", *LAKE, *SHORT, "--agent.step-size", "1.0"]
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"run: 2 seeds, 200 environment steps each; final greedy return [\d.]+", out)
    assert re.search(r"step 200 of 200 \| [\d,]+ steps/s \| return [\d.]+", err)
    assert "curve.png" in [path.name for path in (tmp_path / "run").iterdir()]


def test_preset_depends_on_the_environment(tmp_path, monkeypatch):
    taken = []
    preset = {"FrozenLake-misc": {"gamma": 0.5, "step_size": 0.25}}
    definition = AGENTS["dyna_q"]._replace(presets=preset)
    monkeypatch.setattr("mbrl_jax.agents.AGENTS", {"dyna_q": definition})
    monkeypatch.setattr("mbrl_jax.__main__._train_with", lambda _, options: taken.append(options))
    args = ["train", "dyna_q", *SHORT, "--out", str(tmp_path / "run"), "--agent.gamma", "0.75"]
    for env in (LAKE, ["--env=FrozenLake-misc"], ["--env", "DynaMaze-sutton"]):
        main([*args, *env])
    configs = [(options.agent.gamma, options.agent.step_size) for options in taken]
    assert configs == [(0.75, 0.25), (0.75, 0.25), (0.75, 0.1)]


def test_evaluate(run, capfd):
    before = contents(run)
    assert main(["evaluate", str(run), "--episodes", "3"]) == 0
    out = capfd.readouterr().out
    assert "dyna_q on FrozenLake-misc after 200 steps, 3 episodes" in out
    assert len(re.findall(r"^│ [01] +│", out, flags=re.MULTILINE)) == 2
    assert re.search(r"IQM over seeds [\d.]+, 95% interval [\d.]+ to [\d.]+", out)
    assert contents(run) == before


def test_compare(run, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    plot = tmp_path / "plots" / "both.png"
    assert main(["compare", str(run), str(other), "--out", str(plot)]) == 0
    out = capfd.readouterr().out
    assert re.search(r"│ dyna +│ dyna_q │ 2 +│ 200 +│ [\d.]+ +│ [\d.]+ to [\d.]+ +│ baseline", out)
    assert re.search(r"│ other +│ dyna_q │ .+ 0\.50 \(", out)
    assert plot.exists()
    assert plot.with_suffix(".svg").exists()
    # as many parts of the paths as tell them apart
    namesake = tmp_path / "again" / "dyna"
    shutil.copytree(run, namesake)
    assert main(["compare", str(run), str(namesake), "--out", str(plot)]) == 0
    out = capfd.readouterr().out
    assert re.search(rf"│ {run.parent.name}/dyna +│", out)
    assert re.search(r"│ again/dyna +│", out)


def test_list(capfd):
    assert main(["list", "agents"]) == 0
    agents = capfd.readouterr().out
    for name, definition in AGENTS.items():
        assert re.search(rf"^{name} +{re.escape(definition.summary)}$", agents, flags=re.MULTILINE)
    assert main(["list", "envs"]) == 0
    envs = capfd.readouterr().out
    assert re.search(r"^FrozenLake-misc +16 states +4 actions +limit 100$", envs, re.MULTILINE)
    assert re.search(r"^Pendulum-v1 +\(3,\) +\(1,\) +limit 200$", envs, re.MULTILINE)


def test_usage(capfd):
    for args in ([], ["--help"], ["train", "--help"]):
        assert main(args) == 0
        out, err = capfd.readouterr()
        assert "usage: mbrl-jax" in out
        assert err == ""


def options_of_help(text):
    """Option names to their meaning and default in the boxes of a help text."""
    options = {}
    for line in text.splitlines():
        if found := re.match(r"│ (?:-h, )?(--[\w.-]+)(?:,? \S+)*(?:  +(.*))?│$", line):
            name, meaning = found.groups()
            options[name] = meaning or ""
        elif line.startswith("│    "):
            options[name] += " " + line.strip("│ ")
    return {name: " ".join(meaning.split()) for name, meaning in options.items()}


def defaults(prefix, config):
    """The fields of a config, and of those within it, by the names of their options."""
    found = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}.{field.name}", getattr(config, field.name)
        found |= defaults(name, value) if dataclasses.is_dataclass(value) else {name: value}
    return found


@pytest.mark.parametrize("agent", AGENTS)
def test_help_shows_every_field_with_default_and_meaning(agent, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["train", agent, "--help"])
    assert stop.value.code == 0
    shown = options_of_help(capfd.readouterr().out)
    config = AGENTS[agent].config
    shared = {f"--{field.name}": field.default for field in dataclasses.fields(TrainOptions)}
    for name, default in {**shared, **defaults("--agent", config)}.items():
        text = shown[name.replace("_", "-")]
        value = " ".join(map(str, default)) if isinstance(default, tuple) else default
        end = "(required)" if default is dataclasses.MISSING else f"(default: {value})"
        assert text.endswith(end), name
        assert len(text.removesuffix(end).split()) >= 2, name


TRAIN = ["train", "dyna_q", *LAKE, "--total-steps", "100"]
BAD = {
    "command": (["trian"], "'trian'", "'train'"),
    "agent": (["train", "dyna_k", *LAKE, "--total-steps", "100"], "'dyna_k'", "'dyna_q'"),
    "no agent": (["train"], "expected an agent", "dyna_q"),
    "no agent, an option": (["train", *LAKE], "expected an agent", "dyna_q"),
    "environment": (
        ["train", "dyna_q", "--env", "FrozenLak-misc", "--total-steps", "100"],
        "'FrozenLak-misc'",
        "'FrozenLake-misc'",
    ),
    "field": ([*TRAIN, "--agent.gama", "0.9"], "--agent.gama", "--agent.gamma"),
    "option": ([*TRAIN, "--seedz", "3"], "--seedz", "--seeds"),
    "float": ([*TRAIN, "--agent.gamma", "much"], "--agent.gamma", "'much'", "float"),
    "int": ([*TRAIN, "--agent.planning-steps", "2.5"], "--agent.planning-steps", "'2.5'", "int"),
    "choice": ([*TRAIN, "--agent.planning", "none"], "'none'", "sequential", "batched"),
    "env-args key": ([*TRAIN[:4], "--env-args", "slipery=1", *TRAIN[6:]], "'slipery'", "slippery"),
    "env-args syntax": ([*TRAIN, "--env-args", "slippery"], "'slippery'", "KEY=VALUE"),
    "env-args type": (
        [*TRAIN, "--env-args", "max_steps_in_episode=long"],
        "max_steps_in_episode = 'long'",
        "a whole number",
    ),
    "no env": (["train", "dyna_q", "--total-steps", "100"], "--env", "required"),
    "no steps": (["train", "dyna_q", *LAKE], "--total-steps", "required"),
    "no seeds": ([*TRAIN, "--seeds", "0"], "seeds = 0", "1 or more"),
    "negative seeds": ([*TRAIN, "--seeds", "-3"], "seeds = -3", "1 or more"),
    "negative seed": ([*TRAIN, "--seed", "-1"], "seed = -1", "from 0"),
    "large seed": ([*TRAIN, "--seed", str(2**32)], f"seed = {2**32}", str(2**32 - 1)),
    "zero steps": ([*TRAIN, "--total-steps", "0"], "total_steps = 0", "1 or more"),
    "negative steps": ([*TRAIN, "--total-steps", "-9"], "total_steps = -9", "1 or more"),
    "many steps": ([*TRAIN, "--total-steps", "3000000000"], "total_steps", str(2**31 - 1)),
    "eval-every": ([*TRAIN, "--eval-every", "0"], "eval_every = 0", "1 or more"),
    "eval-episodes": ([*TRAIN, "--eval-episodes", "-1"], "eval_episodes = -1", "0 or more"),
    "checkpoint-every": ([*TRAIN, "--checkpoint-every", "0"], "checkpoint_every = 0", "1 or more"),
    "keep-checkpoints": ([*TRAIN, "--keep-checkpoints", "0"], "keep_checkpoints = 0", "1 or more"),
    "eval-max-steps": ([*TRAIN, "--eval-max-steps", "0"], "eval_max_steps = 0", "1 or more"),
    "step size 0": ([*TRAIN, "--agent.step-size", "0"], "step_size = 0.0", "(0, 1]"),
    "step size 1.5": ([*TRAIN, "--agent.step-size", "1.5"], "step_size = 1.5", "(0, 1]"),
    "step size nan": ([*TRAIN, "--agent.step-size", "nan"], "step_size = nan", "finite"),
    "gamma": ([*TRAIN, "--agent.gamma", "2"], "gamma = 2.0", "[0, 1]"),
    "planning steps": ([*TRAIN, "--agent.planning-steps", "-1"], "planning_steps = -1", "[0, inf)"),
    "infinite observations": (
        ["train", "dyna_q", "--env", "CartPole-v1", "--total-steps", "100"],
        "CartPole-v1",
        "integer observations",
    ),
    "continuous actions": (
        ["train", "dyna_q", "--env", "Pendulum-v1", "--total-steps", "100"],
        "Pendulum-v1",
        "integer observations",
    ),
    "seed mode": ([*TRAIN, "--seed-mode", "fast"], "seed_mode = 'fast'", "auto, vmap, map"),
    "cpu devices": ([*TRAIN, "--cpu-devices", "0"], "--cpu-devices 0", "1 or more"),
    "coordinator alone": (
        [*TRAIN, "--coordinator", "localhost:1"],
        "--coordinator",
        "--num-processes and --process-id",
    ),
    "no coordinator": (
        [*TRAIN, "--num-processes", "2", "--process-id", "0"],
        "--num-processes, --process-id",
        "--coordinator",
    ),
    "coordinator without port": (
        [*TRAIN, "--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
        "--coordinator here",
        "HOST:PORT",
    ),
    "process id": (
        [*TRAIN, "--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
        "--process-id 2",
        "below 2",
    ),
    "list": (["list", "agent"], "'agent'", "list agents", "list envs"),
    "list nothing": (["list"], "list agents", "list envs"),
    "compare nothing": (["compare"], "at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, tmp_path, capfd):
    args, *words = BAD[name]
    out = ["--out", tmp_path / "run"] if args[0] == "train" else []
    err = refused(capfd, [*args, *out])
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_missing_out(capfd):
    assert "--out" in refused(capfd, TRAIN)


def test_exit_code_of_the_process(tmp_path):
    out = tmp_path / "run"
    args = ("train", "dyna_q", "--env", "Atari", "--total-steps", 9, "--out", out)
    code, out, err = finish(start(*args))
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: unknown environment 'Atari'; .+\n", err)


def test_out_of_another_run(run, capfd):
    before = contents(run)
    for args in (TRAIN, ["train", "dyna_q", *LAKE, *SHORT]):
        err = refused(capfd, [*args, "--out", run])
        assert str(run) in err
        assert "--resume" in err
    assert contents(run) == before


CHANGED = {
    "config": (["--agent.step-size", "0.5"], "agent.step_size is 0.5", "has 0.1"),
    "static config": (["--agent.planning-steps", "6"], "agent.planning_steps is 6", "has 5"),
    "env args": (["--env-args", "is_slippery=true"], "is_slippery", "True", "False"),
    "env": (["--env", "DynaMaze-sutton", "--env-args"], "DynaMaze-sutton", "FrozenLake-misc"),
    "seeds": (["--seeds", "3"], "seeds is 3", "2"),
    "seed": (["--seed", "1"], "seed is 1", "0"),
    "total steps": (["--total-steps", "100"], "total_steps = 100", "has done 200 steps"),
    "periods": (["--total-steps", "250", "--eval-every", "90"], "every 100", "such as 200 or 300"),
    "eval-every": (["--eval-every", "50"], "eval_every is 50", "100"),
    "eval-episodes": (["--eval-episodes", "3"], "eval_episodes is 3", "2"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_resume_with_a_change(name, run, capfd):
    before = contents(run)
    change, *words = CHANGED[name]
    args = ["train", "dyna_q", *LAKE, *SHORT, *change, "--resume", "--out", run]
    err = refused(capfd, args)
    for word in words:
        assert word in err
    assert contents(run) == before


def test_resume_of_another_agent(run, capfd):
    before = contents(run)
    args = ["train", "q_learning", *LAKE, *SHORT, "--resume", "--out", run]
    err = refused(capfd, args)
    assert "agent is 'q_learning'" in err
    assert "'dyna_q'" in err
    assert contents(run) == before


def test_resume_of_no_run(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for resume in ([], ["--resume"]):
        assert str(tmp_path) in refused(capfd, [*TRAIN, *resume, "--out", tmp_path])
    assert contents(tmp_path) == before


BROKEN = ["{", "[]", '{"run": 3}', '{"run": {}}', '{"run": {"config": 3}}', "\0"]


@pytest.mark.parametrize("text", BROKEN)
def test_damaged_config(text, tmp_path, capfd):
    (tmp_path / "config.json").write_text(text)
    for args in ([*TRAIN, "--resume", "--out", tmp_path], ["evaluate", tmp_path]):
        assert str(tmp_path) in refused(capfd, args)
    assert (tmp_path / "config.json").read_text() == text


def test_out_below_a_file(tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "run"):
        assert str(out) in refused(capfd, [*TRAIN, "--out", out])
    assert file.read_text() == "mine"


@pytest.mark.parametrize("out", ["/proc/run", "/sys/run"])
def test_out_that_nobody_may_write(out, run, capfd):
    assert out in refused(capfd, [*TRAIN, "--out", out])
    main(["compare", str(run), "--out", f"{out}/plot.png"])
    assert re.fullmatch(rf"error: .*{out}/plot.png.*\n", capfd.readouterr().err)


def test_evaluate_without_a_run(run, tmp_path, capfd):
    for folder in (tmp_path, tmp_path / "absent", run / "metrics.csv"):
        assert str(folder) in refused(capfd, ["evaluate", folder])
        assert str(folder) in refused(capfd, ["compare", folder])
    assert not list(tmp_path.iterdir())
    shutil.copy(run / "config.json", tmp_path)
    assert "no checkpoint yet" in refused(capfd, ["evaluate", tmp_path])
    assert "metrics.csv" in refused(capfd, ["compare", tmp_path])
    assert len(list(tmp_path.iterdir())) == 1


def test_evaluate_bad_values(run, capfd):
    assert "episodes = 0" in refused(capfd, ["evaluate", run, "--episodes", "0"])
    assert "seed = -1" in refused(capfd, ["evaluate", run, "--seed", "-1"])


def test_compare_what_does_not_compare(run, tmp_path, capfd):
    err = refused(capfd, ["compare", run, "--metric", "eval_retrun", "--out", tmp_path / "x.png"])
    assert "'eval_retrun'" in err
    assert "'eval_return'" in err
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("FrozenLake-misc", "DynaMaze-sutton"))
    err = refused(capfd, ["compare", run, other, "--out", tmp_path / "x.png"])
    assert "DynaMaze-sutton" in err
    assert "FrozenLake-misc" in err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
