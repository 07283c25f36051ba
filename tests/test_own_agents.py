"""Agents of one's own in the driver, and how often any agent is traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SHORT, SMALL, train_until

from mbrl_jax import AGENTS, InputError, train
from mbrl_jax.agents import AgentDef
from mbrl_jax.runtime import logs
from mbrl_jax.runtime.train import make_job, traced
from mbrl_jax.types import Agent, Schedule, config


@config
class WandererConfig:
    speed: float = 1.0


def make_wanderer(config, spec):
    """Acts at random and counts its steps."""

    def act(state, memory, obs, is_first, key, t, mode):
        return jax.random.randint(key, obs.shape, 0, spec.num_actions), memory, ()

    def update(state, key, t, n):
        # the weak type of this state must not trace the next chunk anew
        return jnp.where(t >= 0, state + config.speed, 0.0), {"distance": state}

    return Agent(
        init=lambda key: jnp.float32(0),
        init_memory=lambda num_envs: (),
        act=act,
        observe=lambda state, step, extras, t: state,
        update=update,
        schedule=Schedule(),
    )


WANDERER = AgentDef("wanderer", "walks at random", WandererConfig(), make_wanderer, {})


def test_agent_of_ones_own(lake, tmp_path):
    result = train(WANDERER, lake, out=tmp_path / "run", speed=2.0, **SHORT)
    np.testing.assert_array_equal(result.state, [600.0, 600.0])
    np.testing.assert_array_equal(result.history["distance"][0], 49.0 + 100 * np.arange(6))
    again = train(WANDERER, lake, out=tmp_path / "run", resume=True, speed=2.0, **SHORT)
    np.testing.assert_array_equal(again.state, result.state)
    with pytest.raises(InputError, match=r"unknown field of wanderer: 'sped'; .*'speed'"):
        train(WANDERER, lake, sped=2.0, **SHORT)


def counted(definition):
    """The definition with a list that grows whenever its `update` is traced."""
    traces = []

    def make(config, spec):
        agent = definition.make(config, spec)

        def update(*args):
            traces.append(args)
            return agent.update(*args)

        return agent._replace(update=update)

    return definition._replace(make=make), traces


DEFINITIONS = [*(AGENTS[name] for name in AGENTS), WANDERER]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.name)
def test_one_trace_for_all_chunks_and_new_floats(definition, lake):
    """Called for two agents; the others are traced, which types alone decide."""
    definition, traces = counted(definition)
    world = "Pendulum-v1" if definition.name in ("sac", "pets", "mbpo") else lake
    fields = SMALL.get(definition.name, {})
    job = make_job(definition, world, 300, 2, 0, 50, 2, 20, "auto", fields)
    init, chunk = job.functions()
    if definition.name not in ("dyna_q", "wanderer"):
        init, chunk = (partial(jax.eval_shape, function) for function in (init, chunk))
    config = traced(job.config)
    run = init(job.keys(), config)
    counts = []
    for period in range(3):
        run, _ = chunk(run, config, jnp.int32(period))
        counts.append(len(traces))
    assert counts[0] > 0
    other = jax.tree.map(lambda x: np.float32(0.5) * x, config)
    chunk(init(job.keys(), other), other, jnp.int32(0))
    counts.append(len(traces))
    assert counts == counts[:1] * 4


def test_one_trace_in_a_run_and_its_resume(lake, tmp_path, monkeypatch):
    definition, traces = counted(AGENTS["dyna_q"])
    counts, update = [], logs.Display.update

    def note(self, *args):
        update(self, *args)
        counts.append(len(traces))

    monkeypatch.setattr(logs.Display, "update", note)
    train_until(3, definition, lake, out=tmp_path / "run", **SHORT)
    train(definition, lake, out=tmp_path / "run", resume=True, **SHORT)
    assert counts == [counts[0]] * 6
    assert counts[0] > 0
