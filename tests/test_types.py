"""Configs: which fields are traced, which values are refused, and how that is said."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from mbrl_jax.agents import AGENTS, make_agent
from mbrl_jax.types import EnvSpec, InputError, check_config, config, ranged, unknown

SPEC = EnvSpec("grid", (), "int32", 100, num_obs=16, num_actions=4)


@config
class Inner:
    rate: float = ranged("(0, 1]", default=0.5)


@config
class Outer:
    gamma: float = ranged("[0, 1]", default=0.9)
    width: int = ranged("[1, inf)", default=4)
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    inner: Inner = Inner()


def test_float_fields_are_leaves_and_the_rest_is_static():
    leaves, structure = jax.tree.flatten(Outer())
    assert leaves == [0.9, 0.5]
    assert structure == jax.tree.structure(Outer(gamma=0.1))
    assert structure != jax.tree.structure(Outer(width=5))


def test_new_float_values_do_not_retrace_and_new_statics_do():
    traces = []

    @jax.jit
    def f(cfg):
        traces.append(cfg.width)
        return cfg.gamma * cfg.width + cfg.inner.rate

    for gamma in (0.1, 0.2, 0.3):
        assert f(Outer(gamma=gamma)) == pytest.approx(4 * gamma + 0.5)
    assert traces == [4]
    f(Outer(width=7))
    assert traces == [4, 7]


def test_a_config_may_be_vmapped_over_its_floats():
    grid = jax.vmap(lambda g: Outer(gamma=g))(jnp.array([0.1, 0.2]))
    values = jax.vmap(lambda cfg: cfg.gamma * cfg.width)(grid)
    assert values.tolist() == pytest.approx([0.4, 0.8])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gamma": 1.5}, "gamma = 1.5: expected a value in [0, 1]"),
        ({"gamma": "x"}, "gamma = 'x': expected a number"),
        ({"gamma": True}, "gamma = True: expected a number"),
        ({"gamma": float("nan")}, "gamma = nan: expected a finite number"),
        ({"width": 0}, "width = 0: expected a value in [1, inf)"),
        ({"width": 2.0}, "width = 2.0: expected a whole number"),
        ({"width": True}, "width = True: expected a whole number"),
        ({"mode": "c"}, "mode = 'c': expected one of 'a', 'b'"),
        ({"flag": 1}, "flag = 1: expected True or False"),
        ({"inner": Inner(rate=0.0)}, "rate = 0.0: expected a value in (0, 1]"),
        ({"inner": 3}, "inner = 3: expected a test_types.Inner, or a mapping of its fields"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(change, said):
    with pytest.raises(InputError) as caught:
        check_config(dataclasses.replace(Outer(), **change))
    assert str(caught.value) == said


def test_a_sweep_is_checked_value_by_value():
    check_config(Outer(gamma=jnp.array([0.0, 1.0])))
    with pytest.raises(InputError, match="gamma"):
        check_config(Outer(gamma=jnp.array([0.5, 1.5])))


def test_an_unknown_name_is_told_with_the_nearest():
    assert "did you mean 'dyna_q'" in str(unknown("agent", "dynaq", AGENTS))
    assert "did you mean 'Pendulum-v1'?" in str(unknown("env", "pendulum-V1", ["Pendulum-v1"]))
    assert "known: ['a', 'b']" in str(unknown("env", "zzzzzz", ["a", "b"]))


@pytest.mark.filterwarnings("ignore:toy has no known termination")
def test_every_agent_builds_and_refuses_what_it_cannot_act_in():
    vector = EnvSpec("toy", (3,), "float32", 9, action_low=(-1.0,), action_high=(1.0,))
    for name, definition in AGENTS.items():
        agent = make_agent(name, vector if name in ("sac", "pets", "mbpo") else SPEC)
        assert agent.schedule.num_envs == getattr(definition.config, "num_envs", 1)
        assert definition.name == name
        assert definition.summary
    with pytest.raises(InputError, match="unknown agent 'dyna'"):
        make_agent("dyna", SPEC)
    with pytest.raises(InputError, match=r"expected mbrl_jax\.agents\.dyna\.Config"):
        make_agent("dyna_q", SPEC, Outer())
    with pytest.raises(InputError, match="integer observations"):
        make_agent("dyna_q", dataclasses.replace(SPEC, num_obs=None))
    with pytest.raises(InputError, match="discrete actions"):
        make_agent("dyna_q", dataclasses.replace(SPEC, num_actions=None, action_low=(-1.0,)))
    cfg = AGENTS["dyna_q"].config_for("", planning="prioritised", bonus="recency")
    with pytest.raises(InputError, match="no recency bonus"):
        make_agent("dyna_q", SPEC, cfg)
    with pytest.raises(InputError, match="did you mean 'epsilon'"):
        AGENTS["dyna_q"].config_for("", epsilom=0.1)


def test_whole_numbers_are_taken_for_float_fields():
    cfg = AGENTS["dyna_q"].config_for("", epsilon=1)
    assert isinstance(cfg.epsilon, float)


def test_a_config_within_a_config_is_changed_by_a_mapping():
    pets = AGENTS["pets"]
    preset = {"Pendulum-v1": {"model": {"hidden": (32,), "weight_decay": (0.5,)}}}
    pets = pets._replace(presets=preset)
    cfg = pets.config_for("Pendulum-v1", model={"hidden": [16], "bounds_weight": 1})
    assert cfg.model.hidden == (16,)
    assert cfg.model.weight_decay == (0.5,)
    assert isinstance(cfg.model.bounds_weight, float)
    assert cfg.training == pets.config.training
    assert pets.config_for("", model=cfg.model).model is cfg.model
    with pytest.raises(InputError, match=r"unknown field of pets\.model: 'hiden'.*'hidden'"):
        pets.config_for("", model={"hiden": (1,)})
    with pytest.raises(InputError, match=r"batch_size = 0: expected a value in \[1, inf\)"):
        pets.config_for("", training={"batch_size": 0})
    with pytest.raises(InputError, match="model = 3: expected a mbrl_jax"):
        pets.config_for("", model=3)
