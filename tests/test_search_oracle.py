"""Planning with the true environment: mazes, Catch, tic-tac-toe and Pendulum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax import AGENTS, make_env, search, train
from mbrl_jax.agents import sac
from mbrl_jax.analysis import stats
from mbrl_jax.envs import tables
from mbrl_jax.models import latent, oracle
from mbrl_jax.nn.distributions import tanh_normal
from mbrl_jax.nn.networks import ContinuousCritic


@pytest.mark.parametrize(
    ("policy", "gamma", "num"),
    [
        # every action once
        ("gumbel_muzero_policy", 0.95, 4),
        # a value is the mean of what was tried, good and bad, which hides 5 % of difference
        ("gumbel_muzero_policy", 0.7, 64),
        # beside a hole it hides 50 % from counts, which follow it (mctx's too: at 0.7 and 64
        # simulations 31 % of all keys lead from the lake's first state into the wall)
        ("muzero_policy", 0.3, 64),
    ],
)
@pytest.mark.parametrize(
    "env", [make_env("FrozenLake-misc", is_slippery=False), make_env("DynaMaze-sutton")],
    ids=lambda env: env.spec.id,
)  # fmt: skip
def test_exact_values_lead_along_an_optimal_path_from_every_state(env, policy, gamma, num):
    """Every action is optimal, and so every path is; eight searches a state. Uniform priors."""
    table = tables.tabular(env)
    values, action_values = tables.value_iteration(table, gamma)
    ends = table.terminates.sum(axis=(1, 2)) == env.spec.num_actions
    cells = jnp.flatnonzero(~ends & (values > 0))
    assert len(cells) > 8
    cells = jnp.repeat(cells, 8)  # other ties

    def evaluate(values, obs):
        return jnp.zeros((obs.shape[0], env.spec.num_actions)), values[obs]

    model = oracle.latent_oracle(env, evaluate, gamma)
    blank, _ = env.reset(jax.random.key(0))
    states = jax.vmap(lambda cell: blank.replace(position=cell))(cells)
    options = {"gumbel_scale": 0.0}
    if policy == "muzero_policy":
        options = {"dirichlet_fraction": 0.0, "temperature": 0.0}

    @jax.jit
    def plan(params, key):
        root = latent.search_root(model, params, (states, cells))
        function = latent.recurrent_fn(model)
        return getattr(search, policy)(params, key, root, function, num, **options).action

    params = oracle.OracleParams(env.params, jnp.asarray(values, jnp.float32))
    actions = np.asarray(plan(params, jax.random.key(1)))
    chosen = action_values[np.asarray(cells), actions]
    np.testing.assert_allclose(chosen, values[np.asarray(cells)], rtol=1e-6)


def test_catch_is_caught_without_any_value():
    """1,000 episodes, 128 simulations a step, uniform priors and zero values."""
    env, episodes = make_env("Catch-bsuite"), 1_000

    def evaluate(_, obs):
        return jnp.zeros((obs.shape[0], env.spec.num_actions)), jnp.zeros(obs.shape[0])

    model = oracle.latent_oracle(env, evaluate, 1.0)
    params = oracle.OracleParams(env.params)

    @jax.jit
    def play(key):
        start_key, key = jax.random.split(key)
        state, obs = jax.vmap(env.reset)(jax.random.split(start_key, episodes))

        def step(carry, key):
            state, obs, over = carry
            plan_key, key = jax.random.split(key)
            root = latent.search_root(model, params, (state, obs))
            plan = search.muzero_policy(
                params, plan_key, root, latent.recurrent_fn(model), 128, dirichlet_fraction=0.0,
                temperature=0.0,
            )  # fmt: skip
            keys = jax.random.split(key, episodes)
            state, after = jax.vmap(env.step)(keys, state, plan.action)
            reward = jnp.where(over, 0.0, after.reward)
            return (state, after.obs, over | after.terminated), reward

        start = state, obs, jnp.zeros(episodes, bool)
        (_, _, over), rewards = jax.lax.scan(step, start, jax.random.split(key, 9))
        return over, rewards.sum(axis=0)

    over, returns = play(jax.random.key(0))
    assert over.all()
    assert (np.asarray(returns) == 1.0).mean() >= 0.99


LINES = np.array(
    [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]]
)


def outcome(board):
    """1 where the one who moved last (the -1s) has won, else 0; [..., 9] -> [...]."""
    return (board[..., LINES] == -1).all(axis=-1).any(axis=-1)


@functools.cache
def minimax(board):
    """Value for the one to move (the 1s) and the best moves, of a tuple of 9."""
    if outcome(np.array(board)):
        return -1, ()
    free = [i for i in range(9) if board[i] == 0]
    if not free:
        return 0, ()
    after = {i: -minimax(tuple(-(1 if j == i else x) for j, x in enumerate(board)))[0]
             for i in free}  # fmt: skip
    best = max(after.values())
    return best, tuple(i for i in free if after[i] == best)


def tic_tac_toe(board, action):
    """Board [B, 9] as the one to move sees it, 1 its own and -1 the other's -> the next one's."""
    over = outcome(board) | (board != 0).all(axis=-1)
    legal = jnp.take_along_axis(board, action[:, None], axis=1)[:, 0] == 0
    moved = -(board + jax.nn.one_hot(action, 9, dtype=board.dtype))
    return jnp.where((over | ~legal)[:, None], board, moved), over


def playout(key, board):
    """What a random game from the board brings to the one to move, [B]."""

    def step(carry, key):
        board, sign = carry
        logits = jnp.where(board == 0, 0.0, -1e9)
        after, over = tic_tac_toe(board, jax.random.categorical(key, logits))
        return (after, jnp.where(over, sign, -sign)), None

    sign = jnp.ones(board.shape[0])
    (board, sign), _ = jax.lax.scan(step, (board, sign), jax.random.split(key, 9))
    return jnp.where(outcome(board), -sign, 0.0)


def game(params, key, action, board):
    after, over = tic_tac_toe(board, action)
    won = outcome(after) & ~over
    ended = over | outcome(after) | (after != 0).all(axis=-1)
    return search.RecurrentFnOutput(
        reward=jnp.where(won, 1.0, 0.0), discount=jnp.where(ended, 0.0, -1.0),
        prior_logits=jnp.where(after == 0, 0.0, -1e9), value=playout(key, after),
    ), after  # fmt: skip


@pytest.mark.slow
def test_tic_tac_toe_is_never_lost():
    """1,000 games against a perfect player, half of them as the second; 1,600 simulations a move.

    Uniform priors and values of one random game each; games that stand alike share a search.
    """
    games, most = 1_000, 64
    between = functools.partial(search.qtransform_by_min_max, min_value=-1.0, max_value=1.0)

    @jax.jit
    def plan(board):
        root = search.RootFnOutput(
            prior_logits=jnp.zeros((most, 9)), value=jnp.zeros(most), embedding=board
        )
        return search.muzero_policy(
            (), jax.random.key(0), root, game, 1_600, board != 0, qtransform=between,
            dirichlet_fraction=0.0, temperature=0.0, pb_c_init=2.5,
        ).action  # fmt: skip

    rng = np.random.default_rng(0)
    board = np.zeros((games, 9), np.int32)  # seen by the one to move
    ours = np.arange(games) < games // 2
    lost = np.zeros(games, bool)
    for _ in range(9):
        over = outcome(board) | (board != 0).all(axis=1)
        action = np.array([0 if o else rng.choice(minimax(tuple(b))[1]) for b, o in
                           zip(board.tolist(), over, strict=True)])  # fmt: skip
        unlike, number = np.unique(board[ours], axis=0, return_inverse=True)
        padded = np.zeros((most, 9), np.int32)
        padded[: len(unlike)] = unlike
        action[ours] = np.asarray(plan(jnp.asarray(padded)))[number.reshape(-1)]
        assert (board[np.arange(games), action] == 0)[~over].all()
        after = board.copy()
        after[np.arange(games), action] = 1
        board = np.where(over[:, None], board, -after)
        lost |= ~over & ~ours & outcome(board)
        ours = ~ours
    assert (outcome(board) | (board != 0).all(axis=1)).all()
    assert not lost.any()


@pytest.mark.slow
def test_sampled_search_improves_on_a_short_sac_run():
    """Pendulum: 10 episodes of both from the same starts; the interval of the difference."""
    env, episodes, num = make_env("Pendulum-v1"), 10, 16
    sac_config = AGENTS["sac"].config_for("Pendulum-v1")
    learner = sac.make_learner(sac_config, env.spec)
    critic = ContinuousCritic(env.spec, sac_config.critic_hidden, sac_config.activation,
                              sac_config.layer_norm, sac_config.critic)  # fmt: skip
    trained = train("sac", "Pendulum-v1", 1_500, 1, eval_every=1_500, eval_episodes=10)
    state = jax.tree.map(lambda x: x[0], trained.state.learner)

    def candidates(params, obs, key):
        """Half of the policy, half uniform; both are weighed by the policy's density."""
        plain = learner.policy(params.actor, obs)
        policy = tanh_normal(plain.mean_before[:, None], plain.log_std[:, None])
        noise = jax.random.normal(key, (obs.shape[0], num // 2, 1))
        drawn = policy.from_noise(noise)[0]
        even = jnp.broadcast_to(jnp.linspace(-0.99, 0.99, num // 2)[:, None], drawn.shape)
        actions = jnp.concatenate([drawn, even], axis=1)
        log_policy = policy.log_prob(actions)
        proposal = jnp.logaddexp(log_policy, jnp.full(log_policy.shape, np.log(0.5)))
        return actions, search.sampled_logits(log_policy, proposal)

    def value(params, obs):
        action = learner.policy(params.actor, obs).mode()
        of_each = jax.vmap(lambda one: critic.apply({"params": one}, obs, action))(params.critic)
        return jnp.min(of_each, axis=0) / sac_config.reward_scale

    def evaluate(params, obs):
        return jnp.zeros((obs.shape[0], num)), value(params, obs)

    model = oracle.latent_oracle(env, evaluate, sac_config.gamma)
    expand = latent.recurrent_fn(model)

    def step(params, key, action, state):
        out, state = expand(params, jax.random.clone(key), env.spec.from_unit(action), state)
        actions, logits = candidates(params.evaluate, state.obs, jax.random.fold_in(key, 1))
        return search.SampledRecurrentFnOutput(
            reward=out.reward, discount=out.discount, value=out.value, actions=actions,
            prior_logits=logits,
        ), state  # fmt: skip

    def plan(params, key, state, obs):
        draw_key, key = jax.random.split(key)
        root = latent.search_root(model, params, (state, obs))
        actions, logits = candidates(params.evaluate, obs, draw_key)
        return search.sampled_policy(
            params, key,
            search.SampledRootFnOutput(actions=actions, prior_logits=logits, value=root.value,
                                       embedding=root.embedding),
            step, 64, gumbel_scale=0.0,
        ).action  # fmt: skip

    def greedy(params, key, state, obs):
        return learner.policy(params.evaluate.actor, obs).mode()

    @functools.partial(jax.jit, static_argnums=0)
    def returns(act, params, key):
        start_key, key = jax.random.split(key)
        state, obs = jax.vmap(env.reset)(jax.random.split(start_key, episodes))

        def one(carry, key):
            act_key, key = jax.random.split(key)
            action = env.spec.from_unit(act(params, act_key, *carry))
            state, after = jax.vmap(env.step)(jax.random.split(key, episodes), carry[0], action)
            return (state, after.obs), after.reward

        keys = jax.random.split(key, env.spec.episode_limit)
        return jax.lax.scan(one, (state, obs), keys)[1].sum(axis=0)

    params, key = oracle.OracleParams(env.params, state.params), jax.random.key(7)
    searched, plain = (
        np.asarray(returns(act, params, jax.random.clone(key))) for act in (plan, greedy)
    )
    assert stats.bootstrap_interval(searched - plain, stats.mean).low > 0, (searched, plain)
