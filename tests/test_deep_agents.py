"""The loop's guarantees for the agents with networks, and their faults."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COLLECTIVES, CONTINUOUS, SMALL, assert_same, rows, saved, steps, train_until
from probes import OPTIMISED, make, probes

from mbrl_jax import AGENTS, InputError, make_env, make_train, train
from mbrl_jax.__main__ import main
from mbrl_jax.runtime import devices
from mbrl_jax.runtime.loop import make_program
from mbrl_jax.runtime.train import Diverged, make_job, traced

pytestmark = pytest.mark.usefixtures("no_curves")

# what differs in the state: every switch that adds a part to it
CASES = {
    "dqn": ("dqn", "CartPole-v1", {"steps_per_update": 2, "target_period": 3}),
    "dqn, plain": (
        "dqn",
        "Catch-bsuite",
        {"prioritised": False, "n_step": 1, "steps_per_update": 1, "target_period": 1},
    ),
    "ppo": ("ppo", "CartPole-v1", {}),
    "ppo, normalised": (
        "ppo",
        "Pendulum-v1",
        {"normalise_obs": True, "normalise_reward": True, "anneal_steps": 200.0},
    ),
    "sac": ("sac", "Pendulum-v1", {}),
    "sac, redq": ("sac", "Pendulum-v1", {"num_critics": 3, "critic": "dropout"}),
    "pets": ("pets", "Pendulum-v1", {}),
    "pets, discrete": ("pets", "CartPole-v1", {"propagation": "ts1"}),
    "mbpo": ("mbpo", "Pendulum-v1", {}),
    "mbpo, macura": (
        "mbpo",
        "ContinuousCartPole-v0",
        {"truncation": "macura", "length_by": "error", "num_envs": 2},
    ),
    "sac, crossq": ("sac", "Pendulum-v1", {"critic": "batch_renorm", "policy_period": 3}),
    "dreamer": ("dreamer", "CartPole-v1", {}),
    "dreamer, normal latents": (
        "dreamer",
        "Pendulum-v1",
        {"latents": "gaussian", "replay_context": "burn_in", "burn_in": 2, "train_ratio": 8},
    ),
    "muzero": ("muzero", "CartPole-v1", {"target_period": 3, "updates": 2}),
    "muzero, plain": (
        "muzero",
        "Catch-bsuite",
        {"search": "puct", "reanalyse_policies": 0.5, "value_target": "mixed", "prioritised": True},
    ),
    "muzero, chance": (
        "muzero",
        "FrozenLake-misc",
        {"search": "puct", "chance_codes": 3, "num_simulations": 3, "reanalyse_with": "newest"},
    ),
    "muzero, sampled": (
        "muzero",
        "Pendulum-v1",
        {
            "search": "sampled",
            "num_candidates": 4,
            "wide_candidates": 2,
            "prefix_period": 2,
            "consistency": True,
            "reward_range": (-17.0, 0.0),
        },
    ),
}
PLAN = {"total_steps": 112, "eval_every": 32, "eval_episodes": 2, "eval_max_steps": 20}


def cases(slow, names=CASES):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


def case(name):
    agent, env, fields = CASES[name]
    return agent, make_env(env), {**SMALL[agent], **fields}


@pytest.mark.parametrize(
    "name",
    cases(
        slow=[
            "sac",
            "sac, redq",
            "dqn, plain",
            "pets, discrete",
            "pets",
            "mbpo, macura",
            "sac, crossq",
            "ppo, normalised",
            "dreamer, normal latents",
            "muzero, plain",
            "muzero, chance",
            "muzero, sampled",
        ]
    ),
)
def test_chunks_interruption_and_resume_equal_the_uncut_run(name, tmp_path, request):
    agent, env, fields = case(name)
    config = AGENTS[agent].config_for(env.spec.id, **fields)
    options = None
    if agent in ("dreamer", "muzero"):  # unoptimised, their two programs add in another order
        request.getfixturevalue("optimised")
        options = OPTIMISED
    uncut = jax.jit(
        devices.over_seeds(make_train(agent, env, **PLAN), devices.seed_mesh(2), "map", shared=1),
        compiler_options=options,
    )
    state, history = uncut(jax.random.split(jax.random.key(0), 2), traced(config))

    run = {**PLAN, **fields, "seeds": 2, "seed_mode": "map", "out": tmp_path / "run"}
    train_until(2, agent, env, **run)
    assert steps(tmp_path / "run") == [1, 2]
    result = train(agent, env, resume=True, **run)
    assert_same(result.state, state)
    assert_same(saved(tmp_path / "run").agent, state)
    for column, values in history.items():
        if column != "env_steps":
            np.testing.assert_array_equal(result.history[column], values, err_msg=column)
    assert len(rows(tmp_path / "run")) == 1 + 2 * history["env_steps"].shape[1]


@pytest.mark.parametrize("name", cases(slow=[name for name in CASES if name != "sac"]))
def test_seeds_vmapped_mapped_and_sharded_agree_after_a_few_updates(name):
    """Within 1e-4, or 0.1 % of a number: XLA adds in another order where seeds are batched."""
    agent, env, fields = case(name)
    config = AGENTS[agent].config_for(env.spec.id, **fields)
    total_steps = fields["warmup_steps"] + 8 if "warmup_steps" in fields else 32
    program = make_program(AGENTS[agent], env, config, total_steps, 32, 0)
    assert program.plan.periods == 1
    keys = jax.random.split(jax.random.key(1), 8)

    def ended(mesh, mode):
        def whole(key, config):
            return program.period(program.init(key, config), config, jnp.int32(0))[0].agent

        arguments = devices.put_seeds(keys, mesh), traced(config)
        run = jax.jit(devices.over_seeds(whole, mesh, mode, shared=1)).lower(*arguments).compile()
        assert not re.findall(COLLECTIVES, run.as_text())
        return run(*arguments)

    one, eight = devices.seed_mesh(1), devices.seed_mesh(8)
    runs = [ended(one, "vmap"), ended(one, "map"), ended(eight, "vmap")]
    assert len(jax.tree.leaves(runs[2])[0].sharding.device_set) == 8
    start = jax.jit(jax.vmap(lambda key: program.init(key, config).agent))(keys)
    params = [getattr(state, "learner", state).params for state in (start, runs[0])]
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, params), strict=True)]
    assert max(moved) > 1e-4, "no update was made"
    if agent == "dreamer":
        # LaProp's averages are of scaled gradients: 1 for one that is a rounding error and no more
        runs = [state._replace(opt=()) for state in runs]
    for other in runs[1:]:
        apart = np.zeros(8, bool)
        for a, b in zip(*map(jax.tree.leaves, (runs[0], other)), strict=True):
            near = np.isclose(np.float64(a), np.float64(b), rtol=1e-3, atol=1e-4)
            apart |= ~near.reshape(8, -1).all(axis=1)
        # a search may choose between actions whose scores differ by a rounding error
        assert apart.sum() <= (1 if agent == "muzero" else 0), np.flatnonzero(apart)


def test_imagined_rows_are_not_copied_at_every_step():
    """They are written once for each training of the model, in a loop of one or no turn."""
    agent, env, fields = case("mbpo")
    fields = {**fields, "rollouts_per_step": 32, "retained": 3, "rollout_length": (1, 1)}
    job = make_job(agent, env, 64, 16, 0, 32, 0, None, "vmap", fields)
    init, chunk = job.functions()
    run = jax.eval_shape(init, job.keys(), traced(job.config))
    text = chunk.lower(run, traced(job.config), jnp.int32(0)).compile().as_text()
    rows = 3 * 32 * fields["model_period"]
    bodies = [c for c in re.split(r"\n(?=%|ENTRY)", text) if not c.startswith("ENTRY")]
    assert any(f"{rows}," in body for body in bodies)
    for body in bodies:
        assert not re.findall(rf"= \w+\[2,{rows},\d+\]\S* copy\(", body)
        assert not re.findall(rf"= \w+\[2,{rows},\d+\]\S* scatter\(", body)


@pytest.mark.parametrize("name", ["dqn", "ppo", "sac", "dreamer", "muzero"])
def test_a_replay_is_neither_copied_nor_scattered_into_in_the_vmapped_loop(name):
    agent, env, fields = case(name)
    rows_of = 4096
    more = {"buffer_size": rows_of} if agent != "ppo" else {"num_steps": rows_of // 4}
    fields = {**fields, **more, "prioritised": False} if agent == "dqn" else {**fields, **more}
    job = make_job(agent, env, 3 * rows_of, 16, 0, rows_of, 0, None, "vmap", fields)
    init, chunk = job.functions()
    run = jax.eval_shape(init, job.keys(), traced(job.config))
    text = chunk.lower(run, traced(job.config), jnp.int32(0)).compile().as_text()
    bodies = [c for c in re.split(r"\n(?=%|ENTRY)", text) if not c.startswith("ENTRY")]
    assert any(f"{rows_of}," in body for body in bodies)
    for body in bodies:
        assert not re.findall(rf"= \w+\[2,{rows_of},\d+\]\S* copy\(", body)
        assert not re.findall(rf"= \w+\[2,{rows_of},\d+\]\S* scatter\(", body)


# faults


@pytest.fixture(scope="module")
def broken():
    """Worlds whose reward is NaN in one state."""
    table = jax.tree.map(jnp.asarray, probes(0.9)["the reward is seen"].table)
    table = table.replace(reward=table.reward.at[1].set(jnp.nan))
    return {discrete: make(table, discrete) for discrete in (True, False)}


@pytest.mark.filterwarnings("ignore:probe has no known termination")
@pytest.mark.parametrize("agent", cases(("pets", "mbpo", "dreamer", "muzero_plain"), SMALL))
def test_rewards_that_are_not_finite_stop_the_run(agent, broken, tmp_path):
    run = {**PLAN, **SMALL[agent], "seeds": 2, "eval_episodes": 0}
    said = (
        r"(\w+ was nan \(seed \d\) and )?\d+ rewards or observations of the environment were not "
        r"finite \(seed \d\) by step \d+, "
        rf"and the run has stopped; there is no checkpoint yet in {tmp_path}/run; try"
    )
    with pytest.raises(Diverged, match=said):
        train(agent, broken[agent not in CONTINUOUS], out=tmp_path / "run", **run)
    assert steps(tmp_path / "run") == []
    assert len(rows(tmp_path / "run")) == 3, "the bad chunk is in metrics.csv, for both seeds"


@pytest.mark.parametrize("agent", cases(("pets", "mbpo", "muzero_plain"), SMALL))
def test_a_loss_that_is_not_finite_stops_the_run_and_names_what_is_good(agent, tmp_path, capfd):
    env = "Pendulum-v1" if agent in CONTINUOUS else "CartPole-v1"
    out = tmp_path / "run"
    # so large a step that the second or a later update overflows
    rate = {"learning_rate": 1e30} | ({"critic_learning_rate": 1e30} if agent == "sac" else {})
    fields = {name: value for name, value in SMALL[agent].items() if "hidden" not in name}
    if agent == "pets":
        rate = {"training.learning_rate": 1e30, "training.batch_size": 8, "num_members": 2}
        fields = {k: v for k, v in fields.items() if not isinstance(v, dict)}
    if agent == "mbpo":
        rate = {"sac.learning_rate": 1e30, "sac.critic_learning_rate": 1e30, "num_members": 2}
        rate |= {"training.max_epochs": 1, "num_elites": 1}
        fields = {k: v for k, v in fields.items() if not isinstance(v, (dict, tuple))}
        fields.pop("num_elites")
    options = [f"--agent.{k.replace('_', '-')}={v}" for k, v in {**fields, **rate}.items()]
    words = ["train", agent, "--env", env, "--seeds", "2", "--total-steps", "400"]
    words += ["--eval-every", "32", "--eval-episodes", "1", "--eval-max-steps", "5"]
    assert main([*words, "--out", str(out), *options]) == 3
    error = capfd.readouterr().err.splitlines()[-1]
    said = re.fullmatch(
        r"error: (\w+) was (nan|inf|-inf) \(seed \d\)( and .*)? by step ([\d,]+), "
        r"and the run has stopped; (.*); try a smaller learning rate.*",
        error,
    )
    assert said, error
    good = re.search(r"the last good checkpoint is (\S+), of step ([\d,]+)", said[5])
    if good:
        assert steps(out)[-1] == int(good[1].rsplit("/", 1)[1])
        learner = saved(out).agent
        params = getattr(learner, "learner", learner).params
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    else:
        assert said[5] == f"there is no checkpoint yet in {out}"
        assert steps(out) == []


def test_actions_beyond_the_bounds_are_counted():
    _, history = jax.jit(make_train("ppo", make_env("Pendulum-v1"), 64, 64, 0))(
        jax.random.key(0), AGENTS["ppo"].config_for("", **SMALL["ppo"])
    )
    assert 0 < history["actions_outside"][0] < 64, "a normal of deviation 1 leaves [-1, 1]"
    _, history = jax.jit(make_train("sac", make_env("Pendulum-v1"), 64, 64, 0))(
        jax.random.key(0), AGENTS["sac"].config_for("", **SMALL["sac"])
    )
    assert history["actions_outside"].tolist() == [0.0]


@pytest.mark.parametrize("agent", ["dqn", "sac"])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"buffer_size": 2**30},
            r"the state of 4 seeds takes [\d.]+ GiB \(.*replay.* GiB a seed\)",
        ),
        ({"batch_size": 512, "buffer_size": 256}, "batch_size = 512: expected at most .* = 256"),
        ({"num_envs": 3, "buffer_size": 64}, "capacity = 64 with num_envs = 3"),
        ({"warmup_steps": 112}, "total_steps = 112: expected more than the 112 steps"),
    ],
    ids=["memory", "batch", "environments", "warm-up"],
)
def test_what_does_not_fit_is_refused_before_anything_compiles(agent, fields, said, tmp_path):
    env = "Pendulum-v1" if agent in CONTINUOUS else "CartPole-v1"
    out = tmp_path / "run"
    with pytest.raises(InputError, match=said):
        train(agent, env, seeds=4, out=out, **PLAN, **{**SMALL[agent], **fields})
    assert not out.exists()
    alone = make_train(agent, make_env(env), **PLAN)
    config = AGENTS[agent].config_for("", **{**SMALL[agent], **fields})
    with pytest.raises(InputError, match=said.replace("4 seeds", "1 seeds")):
        jax.eval_shape(alone, jax.random.key(0), config)
