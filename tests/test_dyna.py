"""The tabular agents against plain Python versions of the book's algorithms."""

import ast
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mbrl_jax
from mbrl_jax import envs
from mbrl_jax.agents import AGENTS, dyna, make_agent
from mbrl_jax.models import tabular
from mbrl_jax.nn.schedules import linear
from mbrl_jax.types import EnvSpec, Step

S, A = 6, 3
SPEC = EnvSpec("grid", (), "int32", 100, num_obs=S, num_actions=A)
VARIANTS = [
    {},
    {"planning_steps": 0},
    {"planning_steps": 1, "sampler": "state_action"},
    {"model": "counts"},
    {"bonus": "recency", "sampler": "any_action", "kappa": 0.1},
    {"bonus": "recency_action", "sampler": "any_action", "kappa": 0.1},
    {"bonus": "mbie_eb", "beta": 0.3},
    {"bonus": "rmax", "rmax_visits": 2, "model": "counts"},
    {"planning": "batched"},
    {"planning": "batched", "model": "counts"},
    {"planning": "sweep", "planning_steps": 2},
    {"planning": "sweep", "planning_steps": 2, "model": "counts", "sampler": "any_action"},
    {"planning": "prioritised", "step_size": 0.5},
    {"planning": "prioritised", "step_size": 0.5, "model": "counts"},
    {"step_size_final": 0.01, "step_size_steps": 20.0, "q_init": 1.0},
]


def wander(seed, length):
    """Random transitions of a stochastic world, as Step records of one environment."""
    rng = np.random.default_rng(seed)
    for _ in range(length):
        s, a = rng.integers(S), rng.integers(A)
        ns, r, end = rng.integers(S), rng.choice([0.0, 1.0, -0.5]), rng.random() < 0.2
        yield int(s), int(a), float(r), int(ns), bool(end)


class Book:
    """Dyna as in the book: Python dictionaries and loops, float64."""

    def __init__(self, cfg):
        self.cfg = cfg
        curious = cfg.bonus in ("rmax", "mbie_eb")
        first = cfg.reward_max / (1 - cfg.gamma) if curious else cfg.q_init
        self.q = np.full(S * A, first)
        self.last, self.outcomes, self.priority = {}, {}, np.zeros(S * A)

    def value(self, s):
        return self.q[s * A : (s + 1) * A].max()

    def planned_target(self, pair, t):
        cfg, seen = self.cfg, self.outcomes.get(pair)
        if seen is None:
            plain = cfg.gamma * self.value(pair // A)
        elif cfg.model == "last":
            r, ns, end = seen[-1]
            plain = r + cfg.gamma * (not end) * self.value(ns)
        else:
            goes = [r + cfg.gamma * (not end) * self.value(ns) for r, ns, end in seen]
            plain = np.mean(goes)
        if cfg.bonus == "recency":
            plain += cfg.kappa * np.sqrt(t - self.last.get(pair, 0))
        return self.explored(plain, pair)

    def explored(self, plain, pair):
        count = len(self.outcomes.get(pair, []))
        if self.cfg.bonus == "mbie_eb":
            return plain + self.cfg.beta / np.sqrt(max(count, 1))
        if self.cfg.bonus == "rmax" and count < self.cfg.rmax_visits:
            return self.cfg.reward_max / (1 - self.cfg.gamma)
        return plain

    def step(self, s, a, r, ns, end, t, pairs):
        """One real step at time t (from 1), then planning from the drawn `pairs`."""
        cfg, pair = self.cfg, s * A + a
        self.last[pair] = t
        self.outcomes.setdefault(pair, []).append((r, ns, end))
        share = min(t / cfg.step_size_steps, 1.0) if cfg.step_size_steps else 0.0
        alpha = cfg.step_size + share * (cfg.step_size_final - cfg.step_size)
        direct = self.explored(r + cfg.gamma * (not end) * self.value(ns), pair)
        if cfg.planning == "prioritised":
            if cfg.model == "counts":
                direct = self.planned_target(pair, t)
            self.queue(pair, abs(direct - self.q[pair]))
            for _ in range(cfg.planning_steps):
                top = int(np.argmax(self.priority))
                if self.priority[top] == 0:
                    break
                self.priority[top] = 0
                self.q[top] += alpha * (self.planned_target(top, t) - self.q[top])
                for before, seen in self.outcomes.items():
                    known = seen[-1:] if cfg.model == "last" else seen
                    if any(nxt == top // A and not ended for _, nxt, ended in known):
                        self.queue(before, abs(self.planned_target(before, t) - self.q[before]))
            return
        self.q[pair] += alpha * (direct - self.q[pair])
        if cfg.planning == "sweep":
            states = {p // A for p in self.outcomes}
            anything = cfg.sampler == "any_action"
            for _ in range(cfg.planning_steps):
                due = [
                    p
                    for p in range(S * A)
                    if (p // A in states if anything else p in self.outcomes)
                ]
                new = {p: self.planned_target(p, t) for p in due}
                for p in due:
                    self.q[p] += alpha * (new[p] - self.q[p])
        elif cfg.planning == "batched":
            old = self.q.copy()
            new = [self.planned_target(p, t) for p in pairs]
            for p, goal in zip(pairs, new, strict=True):
                self.q[p] += alpha * (goal - old[p])
        else:
            for p in pairs:
                self.q[p] += alpha * (self.planned_target(p, t) - self.q[p])

    def queue(self, pair, error):
        if error > self.cfg.theta:
            self.priority[pair] = max(self.priority[pair], error)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_updates_equal_the_book(fields):
    cfg = AGENTS["dyna_q"].config_for("", gamma=0.9, **fields)
    agent = make_agent("dyna_q", SPEC, cfg)
    observe, update = jax.jit(agent.observe), jax.jit(agent.update)
    sample = jax.jit(lambda visits, key: tabular.sample_pairs(
        visits, key, cfg.planning_steps, A, cfg.sampler))  # fmt: skip
    state, book = jax.jit(agent.init)(jax.random.key(0)), Book(cfg)
    for t, (s, a, r, ns, end) in enumerate(wander(0, 40)):
        step = Step(
            np.int32([s]), np.int32([a]), np.float32([r]), np.int32([ns]),
            np.array([end]), np.array([False]), np.array([t == 0]), np.array([False]),
        )  # fmt: skip
        state = observe(state, step, (), jnp.int32(t))
        pairs = []
        if cfg.planning in ("sequential", "batched") and cfg.planning_steps:
            pairs = sample(state.model.visits, jax.random.key(t)).tolist()
        state, _ = update(state, jax.random.key(t), jnp.int32(t), jnp.int32(t))
        book.step(s, a, r, ns, end, t + 1, pairs)
        np.testing.assert_allclose(state.q, book.q, rtol=2e-4, atol=2e-5, err_msg=f"step {t}")


def test_actions_are_epsilon_greedy_with_random_ties():
    values = jnp.array([1.0, 3.0, 3.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: dyna.select_action(values, 0.2, key)))(keys)
    counts = np.bincount(drawn, minlength=4)
    expected = 20_000 * np.array([0.05, 0.45, 0.45, 0.05])
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    keys = jax.random.split(jax.random.key(1), 1000)
    first = jax.jit(jax.vmap(lambda key: dyna.select_action(values, 0.0, key, "first")))(keys)
    assert set(first.tolist()) == {1}


def test_the_action_bonus_of_exercise_8_4_prefers_what_was_not_tried_for_long():
    cfg = AGENTS["dyna_q"].config_for(
        "", bonus="recency_action", kappa=1.0, epsilon=0.0, planning_steps=0
    )
    agent = make_agent("dyna_q", SPEC, cfg)
    state = agent.init(jax.random.key(0))
    visits = state.model.visits
    visits = visits._replace(last=visits.last.at[:3].set(jnp.array([90, 10, 80])))
    state = state._replace(model=state.model._replace(visits=visits))
    obs, first, now = jnp.zeros(1, jnp.int32), jnp.ones(1, bool), jnp.int32(100)
    explored, _, _ = agent.act(state, (), obs, first, jax.random.key(1), now, "train")
    assert explored.tolist() == [1]
    state = state._replace(q=state.q.at[2].set(0.5))
    greedy, _, _ = agent.act(state, (), obs, first, jax.random.key(1), now, "eval")
    assert greedy.tolist() == [2], "evaluation takes no bonus"


def test_schedules_are_linear_and_then_constant():
    values = [float(linear(1.0, 0.2, 10.0, jnp.int32(t))) for t in (0, 5, 10, 99)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert float(linear(0.3, 0.9, 0.0, jnp.int32(50))) == pytest.approx(0.3)


WORLDS = [
    ("FrozenLake-misc", {"is_slippery": False}),
    ("FrozenLake-misc", {"is_slippery": False, "map_name": "8x8"}),
    ("FrozenLake-misc", {"is_slippery": False, "desc": ("SFFH", "FFHF", "HFFG")}),
    ("DynaMaze-sutton", {}),
    ("DynaMaze-sutton", {"resolution": 2}),
    ("BlockingMaze-sutton", {"switch_step": 10**6}),
    ("BlockingMaze-sutton", {"switch_step": 0}),
    ("ShortcutMaze-sutton", {"switch_step": 10**6}),
    ("ShortcutMaze-sutton", {"switch_step": 0}),
]


@pytest.mark.parametrize(("id", "arguments"), WORLDS, ids=str)
def test_dyna_q_learns_the_optimal_policy_of_every_deterministic_world(id, arguments):
    """Greedy in the learned values is optimal in value iteration's, in every state explored."""
    env = mbrl_jax.make_env(id, **arguments)
    clock = 0 if arguments.get("switch_step", 1) else 1
    model = envs.tabular(env, clock=clock)
    exact = envs.value_iteration(model, 0.95)[1]
    onward = (model.transition - model.terminates).sum(axis=1) > 0
    reached = model.start > 0
    for _ in range(len(reached)):
        reached |= reached @ onward
    result = mbrl_jax.train(
        "dyna_q", env, 30_000, seeds=8, eval_every=30_000, eval_episodes=0,
        q_init=1.0, epsilon=0.3, step_size=1.0, planning_steps=30,
    )  # fmt: skip
    learned = np.asarray(result.state.q).reshape(8, *exact.shape)
    explored = np.asarray(result.state.model.visits.counts).reshape(learned.shape).min(axis=-1) > 0
    assert explored.sum() >= 0.95 * 8 * reached.sum()
    best = exact >= exact.max(axis=-1, keepdims=True) - 1e-9
    greedy = learned >= learned.max(axis=-1, keepdims=True) - 1e-5
    wrong = explored & np.any(greedy & ~best[None], axis=-1)
    assert not wrong.any(), f"{wrong.sum()} of {explored.sum()} states"


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("agent", ["dyna_q", "prioritised_sweeping"])
def test_counts_converge_to_the_exact_value_of_the_slippery_lake(agent):
    """V*(start) = 0.5420 at gamma 0.99, solved exactly by value iteration."""
    env = mbrl_jax.make_env("FrozenLake-misc", is_slippery=True)
    exact = envs.value_iteration(envs.tabular(env), 0.99)[0]
    assert exact[0] == pytest.approx(0.5420, abs=1e-4)
    fields = {"planning": "sweep", "planning_steps": 1} if agent == "dyna_q" else {}
    result = mbrl_jax.train(
        agent, env, 150_000, seeds=8, eval_every=150_000, eval_episodes=0, gamma=0.99,
        model="counts", epsilon=1.0, step_size=0.5, **fields,
    )  # fmt: skip
    values = np.asarray(result.state.q).reshape(8, 16, 4).max(axis=-1)
    half_width = 1.96 * values[:, 0].std(ddof=1) / np.sqrt(8)
    assert values[:, 0].mean() == pytest.approx(exact[0], abs=max(0.02, 2 * half_width))


def test_first_index_ties_never_reach_the_goal_and_optimism_mends_it(lake):
    """Section 4.6 of the measurements: 0 of 20 seeds with first-index ties, all with optimism."""
    common = {"seeds": 20, "eval_every": 500, "eval_episodes": 0, "planning_steps": 0}
    stuck = mbrl_jax.train("dyna_q", lake, 4000, ties="first", **common)
    assert stuck.history["train_reward"].sum() == 0
    hopeful = mbrl_jax.train("dyna_q", lake, 4000, ties="first", q_init=1.0, **common)
    assert (hopeful.history["train_reward"].sum(axis=1) > 0).all()


@pytest.mark.parametrize("bonus", [{"bonus": "rmax"}, {"bonus": "mbie_eb", "beta": 1.0}], ids=str)
def test_exploration_bonuses_visit_more_of_the_maze(bonus):
    env = mbrl_jax.make_env("DynaMaze-sutton", max_steps_in_episode=10**6)
    common = {"seeds": 8, "eval_every": 600, "eval_episodes": 0, "epsilon": 0.0, "ties": "first"}
    plain = mbrl_jax.train("dyna_q", env, 600, **common)
    curious = mbrl_jax.train("dyna_q", env, 600, **common, **bonus)
    pairs = [np.asarray(r.state.model.visits.num_pairs).min() for r in (plain, curious)]
    assert pairs[1] > 2 * pairs[0]


def test_every_tabular_agent_learns_the_lake(lake):
    for name in dyna.AGENTS:
        result = mbrl_jax.train(
            name,
            lake,
            8000,
            seeds=16,
            eval_every=4000,
            planning_steps=(0 if name == "q_learning" else 5),
        )
        assert result.history["eval_return"][:, -1].mean() > 0.9, name


LOOPS = """
import os, sys
import jax
import numpy as np
import mbrl_jax
from mbrl_jax.runtime import devices
from mbrl_jax.runtime.train import make_job, traced

if sys.argv[1] == "kernels":
    devices.loops_as_kernels()
env = mbrl_jax.make_env("FrozenLake-misc", is_slippery=True)
found = []
for name, fields in (("dyna_q", {"planning_steps": 3}), ("prioritised_sweeping", {})):
    definition = mbrl_jax.AGENTS[name]
    job = make_job(definition, env, 200, 2, 0, 200, 0, None, "auto", fields)
    init, chunk = job.functions()
    config = traced(job.config)
    run = init(job.keys(), config)
    chunk = chunk.lower(job.like(), config, np.int32(0)).compile()
    text = chunk.as_text()
    entry = text[text.index("ENTRY"):]
    # whether the entry has a loop that is not within a kernel
    found.append((job.mode, "while(" in entry))
    run, metrics = chunk(run, config, np.int32(0))
    leaves = jax.tree.leaves((run.agent, metrics))
    found.append([np.asarray(x).tobytes().hex() for x in leaves])
before = os.environ.get("XLA_FLAGS")
devices.loops_as_kernels()  # too late
assert os.environ.get("XLA_FLAGS") == before
print(found)
"""


def test_loops_as_kernels_change_the_speed_and_no_bit():
    """The whole training loop is one kernel of the CPU; state and metrics are those without it."""
    found = {}
    for kind in ("kernels", "plain"):
        variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, "-c", LOOPS, kind], capture_output=True, text=True, timeout=300,
            env={**variables, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[kind] = ast.literal_eval(done.stdout)
    assert found["kernels"][1::2] == found["plain"][1::2]
    assert found["kernels"][::2] == [("map", False)] * 2
    assert found["plain"][::2] == [("vmap", True)] * 2


def test_tabular_agents_alone_ask_for_loops_as_kernels():
    tabular = {name for name, definition in AGENTS.items() if definition.tabular}
    assert tabular == {"q_learning", "dyna_q", "dyna_q_plus", "prioritised_sweeping"}
