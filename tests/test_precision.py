"""Which matrix products an accelerator may round: the hidden layers of networks, nothing else."""

import re

import jax
import jax.numpy as jnp
import pytest

from mbrl_jax.agents import AGENTS, make_agent
from mbrl_jax.data import prioritised
from mbrl_jax.models import dynamics, ensemble, fit
from mbrl_jax.nn.networks import Torso
from mbrl_jax.planning import mppi, start_mppi
from mbrl_jax.types import EnvSpec, Transition

# the first is the width of no other array, so that a product which has it is a hidden layer's
HIDDEN = (24, 28)
VECTOR = EnvSpec("toy", (3,), "float32", 9, action_low=(-1.0,) * 2, action_high=(1.0,) * 2)
DISCRETE = EnvSpec("toy", (3,), "float32", 9, num_actions=4)
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")


def products(function, *args):
    """(sizes of all axes, whether it is full float32) of each matrix product of the program."""
    text = jax.jit(lambda *args: function(*args)).lower(*args).as_text()
    for line in PRODUCT.findall(text):
        sizes = {int(n) for shape in re.findall(r"tensor<([\dx]*)xf32>", line)
                 for n in shape.split("x")}  # fmt: skip
        rounded = line.count("DEFAULT")
        assert (rounded, line.count("HIGHEST")) in ((2, 0), (0, 2)), line
        yield sizes, rounded == 0


def check(function, *args, hidden, full):
    """Hidden layers take the backend's default, all else is full; and there are some of both."""
    counts = {True: 0, False: 0}
    for sizes, exact in products(function, *args):
        assert exact != (HIDDEN[0] in sizes), sizes
        counts[exact] += 1
    assert counts == {False: hidden, True: full}


def members(**fields):
    config = dynamics.Config(hidden=HIDDEN, weight_decay=(0.0,), **fields)
    return ensemble.make(config, VECTOR, num_members=4, num_elites=2)


@pytest.mark.parametrize("probabilistic", [True, False])
def test_a_dynamics_model(probabilistic):
    models = members(probabilistic=probabilistic)
    params = jax.eval_shape(models.init, jax.random.key(0))
    rows, action = jnp.zeros((10, 3)), jnp.zeros((10, 2))
    check(models.predict, params, rows, action, hidden=2, full=1)
    check(models.model("ts1").predict, params, rows, action, jax.random.key(0), hidden=2, full=1)


def test_the_training_of_a_dynamics_model():
    """Mean and variance of inputs and targets; head forward, its two gradients, the holdout's."""
    models = members()
    params = jax.eval_shape(models.init, jax.random.key(0))
    data = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((50, *x.shape), x.dtype), Transition.example(VECTOR)
    )
    opt = jax.eval_shape(models.init_opt, params)
    config = fit.Config(batch_size=5)

    def train(params, opt, data, size, key):
        return models.fit(params, opt, config, data, size, key)

    # a hidden layer's gradient is two products, but for the inputs, which have none
    check(
        train, params, opt, data, jnp.int32(40), jax.random.key(0),
        hidden=2 + 3 + 2, full=4 + 3 + 1,
    )  # fmt: skip


def test_the_mean_of_a_plan():
    low, high = jnp.array([-1.0, -1.0]), jnp.array([1.0, 1.0])
    plan = start_mppi(5, low, high)

    def value(candidates, key):
        return jnp.sum(candidates, axis=(1, 2))

    def act(key, plan):
        return mppi(value, key, plan, low, high)

    check(act, jax.random.key(0), plan, hidden=0, full=1)


def test_sums_of_priorities():
    sums = prioritised.make(5_000)
    state = jax.eval_shape(sums.init)
    programs = list(products(lambda s, k: sums.sample(s, k, 10), state, jax.random.key(0)))
    assert programs
    assert all(exact for _, exact in programs)


def of_agent(name, spec, **fields):
    """(agent, abstract state) with hidden layers of the widths above."""
    agent = make_agent(name, spec, AGENTS[name].config_for("", **fields))
    return agent, jax.eval_shape(agent.init, jax.random.key(0))


MODEL = {"hidden": HIDDEN, "weight_decay": (0.0,)}
SAC = {"hidden": HIDDEN, "critic_hidden": HIDDEN}
AGENT_FIELDS = {
    "dqn": (DISCRETE, {"hidden": HIDDEN, "duelling": False}),
    "ppo": (VECTOR, {"hidden": HIDDEN, "num_envs": 2, "num_steps": 9, "minibatches": 3}),
    "sac": (VECTOR, {**SAC, "batch_size": 5}),
    "pets": (VECTOR, {"model": {**MODEL, "termination": "never"}}),
    "mbpo": (
        VECTOR,
        {"model": {**MODEL, "termination": "never"}, "sac": SAC, "batch_size": 5, "updates": 1},
    ),
}


@pytest.mark.parametrize("name", AGENT_FIELDS)
def test_an_agent(name):
    """All that it computes: the first weights, an action in each mode, and an update."""
    spec, fields = AGENT_FIELDS[name]
    agent, state = of_agent(name, spec, **fields)
    num = agent.schedule.num_envs
    obs, first, key, t = spec.zero_obs(num), jnp.ones(num, bool), jax.random.key(0), jnp.int32(9)
    memory = jax.eval_shape(lambda: agent.init_memory(num))
    counts = {True: 0, False: 0}
    for function, given in (
        (agent.init, (key,)),
        (lambda *args: agent.act(*args, "train"), (state, memory, obs, first, key, t)),
        (lambda *args: agent.act(*args, "eval"), (state, memory, obs, first, key, t)),
        (agent.update, (state, key, t, t)),
    ):
        for sizes, exact in products(function, *given):
            orthogonal = function is agent.init
            assert exact == (orthogonal or HIDDEN[0] not in sizes), sizes
            counts[exact] += 1
    assert all(counts.values())
    assert counts[True] >= 4, "the heads and their gradients"


def test_a_convolution_is_a_hidden_layer():
    net, obs = Torso(EnvSpec("toy", (6, 7, 2), "float32", 9)), jnp.zeros((3, 6, 7, 2))
    params = jax.eval_shape(net.init, jax.random.key(0), obs)
    assert [exact for _, exact in products(net.apply, params, obs)] == [False]
