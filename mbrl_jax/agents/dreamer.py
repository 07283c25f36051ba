"""DreamerV3: a world model of latent states, in which an actor and a critic learn by imagination.

Hafner et al. (2025), "Mastering diverse control tasks through world models", in all constants as
the authors' code has them (danijar/dreamerv3); every departure is a field of the config. The model
is in `models.rssm`; beside this file `dreamer_config` holds the settings and the schedule,
`dreamer_records` what the replay keeps, and `dreamer_losses` the losses as plain functions.

In two ways this differs from that code, whose training runs beside its acting: latents are written
back into the replay at once, where theirs arrive an update later, and the policy acts with the
newest parameters.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mbrl_jax import loops, prng
from mbrl_jax.agents import AgentDef
from mbrl_jax.agents import dreamer_losses as losses
from mbrl_jax.agents import dreamer_records as records
from mbrl_jax.agents.dreamer_config import (
    PRESETS,
    Config,
    Model,
    model_of,
    optimiser,
    rounds,
    schedule,
)
from mbrl_jax.agents.dreamer_config import window_length as length_of
from mbrl_jax.agents.dreamer_records import Arrived, Record
from mbrl_jax.data import online
from mbrl_jax.data.online import Queue
from mbrl_jax.models import (
    rssm,
    rssm_actions,
    rssm_codec,
    rssm_heads,
    rssm_latents,
    rssm_layers,
    rssm_params,
)
from mbrl_jax.nn import normaliser
from mbrl_jax.nn.networks import polyak
from mbrl_jax.nn.normaliser import Range
from mbrl_jax.nn.two_hot import symexp_bins, two_hot_loss, two_hot_mean
from mbrl_jax.types import Agent, EnvSpec, Metrics, Mode, PyTree, Step


class State(NamedTuple):
    params: PyTree
    slow: PyTree  # parameters of the slow critic
    opt: PyTree
    range_: Range  # of imagined returns
    replay: PyTree
    queue: Queue  # of windows that nobody has trained on
    arrived: Arrived


class Memory(NamedTuple):
    """What the policy carries from step to step."""

    latent: rssm.State  # [N, ...]
    action: jax.Array  # [N, A] float32, the vector of the last one


class Draws(NamedTuple):
    """All noise of an update."""

    posterior: jax.Array  # [B, burn_in + T, S, C]
    prior: jax.Array  # [H, B * T, S, C]
    action: jax.Array  # [H + 1, B * T, A]


def posterior_of(
    cfg: Config, model: Model, params: PyTree, window: Record, noise: jax.Array
) -> rssm.Posterior:
    """The posterior of the last T records of a window [B, L, ...].

    The record before them gives the previous action, and as `cfg.replay_context` says the state:
    the one stored with it, zeros, or the end of a burn-in of `cfg.burn_in` records, through which
    no gradient flows.
    """
    length, start = cfg.batch_length, None
    if cfg.replay_context == "stored":
        start = records.unstored(model, window.deter[:, 0], window.stoch[:, 0])
    obs = jax.tree.map(lambda x: x[:, 1:], window.obs)
    tokens = rssm_codec.encode(params["enc"], obs, model.obs, model.dtype)
    before = rssm_actions.action_vector(window.action[:, :-1], model.actions)
    first = window.is_first[:, 1:]
    given: PyTree = {"tokens": tokens, "actions": before, "is_first": first, "noise": noise}
    if cfg.replay_context == "burn_in":
        fixed, early = jax.lax.stop_gradient(
            (params, {name: x[:, :-length] for name, x in given.items()})
        )
        past = rssm.observe(fixed, **early, **model.latent)
        start = rssm.State(past.deter[:, -1], past.stoch[:, -1])
    late = {name: x[:, -length:] for name, x in given.items()}
    return rssm.observe(params, **late, start=start, **model.latent)


def world_model_losses(
    cfg: Config, model: Model, params: PyTree, trained: Record, posterior: rssm.Posterior
) -> dict[str, jax.Array]:
    """The losses [B, T] of reconstruction, reward, continue and dynamics."""
    deter, stoch, dtype = posterior.deter, posterior.stoch, model.dtype
    made: dict[str, jax.Array] = {}
    if cfg.decoder:
        decoded = rssm_codec.decode(
            params["dec"], deter, stoch, model.obs, model.sizes.depth, dtype
        )
        for name, loss in rssm_codec.losses(decoded, trained.obs, model.obs).items():
            made[f"rec_{name}"] = loss
    logits = rssm_heads.head(params["reward"], deter, stoch, dtype)
    made["reward"] = two_hot_loss(logits, trained.reward, symexp_bins())
    logit = rssm_heads.continues(params["cont"], deter, stoch, dtype)
    made["cont"] = losses.continue_loss(logit, trained.is_terminal, cfg.gamma)
    prior = rssm.prior_logits(params, deter, model.sizes.stoch, dtype)
    kl = partial(rssm_latents.kl, share=cfg.unimix, gaussian=model.gaussian)
    return made | losses.dynamics_losses(posterior.logits, prior, kl, cfg.free_nats, cfg.kl)


class Imagined(NamedTuple):
    """What imagination from N states gives; the losses are means over its steps."""

    actor: jax.Array  # [N] loss
    critic: jax.Array  # [N] loss
    returns: jax.Array  # [H, N]
    range_: Range
    entropy: jax.Array  # [H, N]


def act_in(cfg: Config, model: Model, actor: PyTree, latent: rssm.State) -> rssm_actions.Policy:
    """The policy of the parameters `actor` in latent states [*lead], which are data to it."""
    latent = jax.lax.stop_gradient(latent)
    outputs = rssm_heads.actor(actor, latent.deter, latent.stoch, model.dtype)
    return rssm_actions.policy(outputs, cfg.policy_unimix)


def imagine(
    cfg: Config, model: Model, params: PyTree, slow: PyTree, range_: Range, start: rssm.State,
    draws: Draws,
) -> Imagined:  # fmt: skip
    """Actor and critic on trajectories from the states `start` [N, ...], which are data.

    Neither moves the world model. With `cfg.actor_gradient` "dynamics" the actor climbs the returns
    through the model's differentiable steps.
    """
    bins, dtype = symexp_bins(), model.dtype
    fixed, start = jax.lax.stop_gradient((params, start))
    through = cfg.actor_gradient == "dynamics"
    actor = rssm_layers.cast_kernels((params if through else fixed)["actor"], dtype)

    def policy(deter: jax.Array, stoch: jax.Array, noise: jax.Array) -> jax.Array:
        made = act_in(cfg, model, actor, rssm.State(deter, stoch))
        return rssm_actions.sample_action(made, noise, model.actions)

    dreamt = rssm.imagine(
        fixed, start, policy, (draws.prior, draws.action), cfg.horizon, **model.latent
    )
    features = dreamt.deter, dreamt.stoch
    reward = two_hot_mean(rssm_heads.head(fixed["reward"], *features, dtype), bins)
    cont = jax.nn.sigmoid(rssm_heads.continues(fixed["cont"], *features, dtype))
    # by the critic itself, which the slow one only holds back
    judge = slow if cfg.slow_target else fixed["critic"]
    value = two_hot_mean(rssm_heads.head(judge, *features, dtype), bins)
    returns, weight = losses.imagined_returns(reward, cont, value, cfg.lam)
    range_ = normaliser.update_range(range_, jax.lax.stop_gradient(returns), cfg.range_rate)
    scale = normaliser.width(range_) if cfg.normalise_returns else jnp.float32(1)

    # heads see the last state too, which counts for nothing: the features stay one array, and the
    # critic's products are those of its values above
    data = jax.lax.stop_gradient(dreamt)
    latent = rssm.State(data.deter, data.stoch)
    distribution = act_in(cfg, model, params["actor"], latent)
    entropy = rssm_actions.policy_entropy(distribution)[:-1]
    if through:
        by_actor = losses.climbing_loss(returns / scale, entropy, weight, cfg.entropy_scale)
    else:
        log_prob = rssm_actions.log_prob(distribution, data.actions, model.actions)[:-1]
        advantage = (returns - value[:-1]) / scale
        by_actor = losses.actor_loss(log_prob, entropy, advantage, weight, cfg.entropy_scale)

    logits = rssm_heads.head(params["critic"], *latent, dtype)
    held = two_hot_mean(rssm_heads.head(slow, *latent, dtype), bins)
    targets, counts = (jnp.pad(x, ((0, 1), (0, 0))) for x in (returns, weight))
    by_critic = losses.critic_loss(logits, targets, held, counts, bins, cfg.slow_scale)[:-1]
    return Imagined(jnp.mean(by_actor, 0), jnp.mean(by_critic, 0), returns, range_, entropy)


def replay_critic_loss(
    cfg: Config, model: Model, params: PyTree, slow: PyTree, trained: Record,
    posterior: rssm.Posterior, boot: jax.Array,
) -> jax.Array:  # fmt: skip
    """The critic on replayed rewards [B, T - 1]; its gradient also forms the representation.

    boot: [B, T], the returns that were imagined from each state.
    """
    bins, features = symexp_bins(), (posterior.deter[:, :-1], posterior.stoch[:, :-1])
    reward, last, terminal, boot = (
        x.T for x in (trained.reward, trained.is_last, trained.is_terminal, boot)
    )
    returns = losses.replay_returns(reward, last, terminal, boot, cfg.gamma, cfg.lam).T
    logits = rssm_heads.head(params["critic"], *features, model.dtype)
    held = two_hot_mean(rssm_heads.head(slow, *features, model.dtype), bins)
    weight = 1.0 - trained.is_last[:, :-1]
    return losses.critic_loss(logits, returns, held, weight, bins, cfg.slow_scale)


class Learnt(NamedTuple):
    """What a loss gives beside its total."""

    losses: dict[str, jax.Array]  # [B, T], that of the replayed critic [B, T - 1]; unscaled
    latent: rssm.State  # [B, T, ...] to be written back
    imagined: Imagined


def total_loss(
    cfg: Config, spec: EnvSpec, params: PyTree, slow: PyTree, range_: Range, window: Record,
    draws: Draws,
) -> tuple[jax.Array, Learnt]:  # fmt: skip
    """The sum of all losses of a window [B, L, ...], each scaled and averaged, and its parts."""
    model = model_of(cfg, spec)
    window = records.loaded(window)
    trained = jax.tree.map(lambda x: x[:, -cfg.batch_length :], window)
    posterior = posterior_of(cfg, model, params, window, draws.posterior)
    batch, length = trained.reward.shape
    made = world_model_losses(cfg, model, params, trained, posterior)

    latent = rssm.State(posterior.deter, posterior.stoch)
    start = jax.tree.map(lambda x: x.reshape(batch * length, *x.shape[2:]), latent)
    imagined = imagine(cfg, model, params, slow, range_, start, draws)
    made["actor"] = imagined.actor.reshape(batch, length)
    made["critic"] = imagined.critic.reshape(batch, length)
    if cfg.replay_critic:
        boot = jax.lax.stop_gradient(imagined.returns[0]).reshape(batch, length)
        made["replay_critic"] = replay_critic_loss(
            cfg, model, params, slow, trained, posterior, boot
        )

    scales = {"dyn": cfg.dyn_scale, "rep": cfg.rep_scale, "replay_critic": cfg.replay_critic_scale}
    total = jnp.float32(0)
    for name, loss in made.items():
        chex.assert_shape(loss, (batch, length - (name == "replay_critic")))
        total += scales.get(name, 1.0) * jnp.mean(loss)
    return total, Learnt(made, latent, imagined)


def draw(cfg: Config, spec: EnvSpec, key: jax.Array) -> Draws:
    """All noise of an update, before its loops."""
    model, keys = model_of(cfg, spec), prng.split(key, 3)
    latent = (model.sizes.stoch, model.sizes.classes)
    starts, gaussian = cfg.batch_size * cfg.batch_length, model.gaussian
    posterior = (cfg.batch_size, length_of(cfg) - 1, *latent)
    return Draws(
        rssm_latents.draw_noise(keys[0], posterior, gaussian),
        rssm_latents.draw_noise(keys[1], (cfg.horizon, starts, *latent), gaussian),
        rssm_actions.draw_action_noise(keys[2], (cfg.horizon + 1, starts), model.actions),
    )


def learn(
    cfg: Config, spec: EnvSpec, state: State, window: Record, draws: Draws, number: jax.Array
) -> tuple[State, Learnt, Metrics]:
    """One gradient step on a window [B, L, ...], as the update `number` ([] int32, from 0).

    The replay is left as it is.
    """
    loss = partial(total_loss, cfg, spec)
    (total, learnt), grads = jax.value_and_grad(loss, has_aux=True)(
        state.params, state.slow, state.range_, window, draws
    )
    moves, opt = optimiser(cfg, number).update(grads, state.opt, state.params)
    params = jax.tree.map(jnp.add, state.params, moves)
    range_ = learnt.imagined.range_
    metrics = {f"{name}_loss": jnp.mean(x) for name, x in learnt.losses.items()}
    metrics |= {
        "total_loss": total,
        "entropy": jnp.mean(learnt.imagined.entropy),
        "imagined_return": jnp.mean(learnt.imagined.returns),
        "return_range": range_.high - range_.low,
        "grad_norm": optax.tree.norm(grads),
    }
    slow = polyak(params["critic"], state.slow, cfg.slow_rate)
    return state._replace(params=params, slow=slow, opt=opt, range_=range_), learnt, metrics


def init(cfg: Config, spec: EnvSpec, key: jax.Array) -> State:
    """`Agent.init`."""
    model = model_of(cfg, spec)
    params = rssm_params.init(
        key, model.sizes, model.obs, model.actions, model.gaussian, cfg.decoder
    )
    return State(
        params=params,
        # a copy, since the state is donated and two of its leaves must not be one buffer
        slow=jax.tree.map(jnp.copy, params["critic"]),
        opt=optimiser(cfg, 0).init(params),
        range_=normaliser.init_range(),
        replay=records.replay_of(cfg, spec).init(),
        queue=online.empty(),
        arrived=records.nothing_arrived(cfg.num_envs),
    )


def init_memory(cfg: Config, spec: EnvSpec, num_envs: int) -> Memory:
    """`Agent.init_memory`."""
    sizes, model = rssm_params.sizes_of(cfg.size), model_of(cfg, spec)
    zero = rssm.zero_state((num_envs,), sizes.deter, sizes.stoch, sizes.classes, model.dtype)
    width = rssm_actions.action_width(model.actions)
    return Memory(zero, jnp.zeros((num_envs, width), jnp.float32))


def act(
    cfg: Config, spec: EnvSpec, state: State, memory: Memory, obs, is_first, key, t, mode: Mode
):
    """`Agent.act`; the extras are the latents and the action as a record keeps them.

    Evaluations sample too, as the authors' do.
    """
    model = model_of(cfg, spec)
    latent_key, action_key = jax.random.split(key)
    tokens = rssm_codec.encode(state.params["enc"], obs, model.obs, model.dtype)
    noise = rssm_latents.draw_noise(latent_key, memory.latent.stoch.shape, model.gaussian)
    now = rssm.step(
        state.params, memory.latent, tokens, memory.action, is_first, noise, **model.latent
    )
    latent = rssm.State(now.deter, now.stoch)
    if mode == "random":
        action = spec.random_actions(action_key, obs)
        raw = action if spec.discrete else spec.to_unit(action)
    else:
        policy = act_in(cfg, model, state.params["actor"], latent)
        draws = rssm_actions.draw_action_noise(action_key, is_first.shape, model.actions)
        vector = rssm_actions.sample_action(policy, draws, model.actions)
        raw = rssm_actions.split_actions(vector, model.actions)
        action = raw if spec.discrete else spec.from_unit(jnp.clip(raw, -1.0, 1.0))
    memory = Memory(latent, rssm_actions.action_vector(raw, model.actions))
    kept = records.stored(model, latent) if cfg.replay_context == "stored" else {}
    return action, memory, {"action": raw, **kept}


def observe(cfg: Config, spec: EnvSpec, state: State, step: Step, extras, t: jax.Array) -> State:
    """`Agent.observe`."""
    record, arrived = records.record_of(step, state.arrived, extras)
    rows = records.replay_of(cfg, spec).add(state.replay, record, t)
    return state._replace(replay=rows, arrived=arrived)


def update(
    cfg: Config, spec: EnvSpec, state: State, key: jax.Array, t: jax.Array, n: jax.Array
) -> tuple[State, Metrics]:
    """`Agent.update`: the updates of a round, each on fresh windows first and then random ones."""
    replay, (_, updates) = records.replay_of(cfg, spec), rounds(cfg)
    model, length = model_of(cfg, spec), length_of(cfg)

    def one(state: State, i: jax.Array) -> tuple[State, Metrics]:
        keys = prng.fold_in(key, 2 * i + jnp.arange(2, dtype=jnp.int32))
        window, index, queue = replay.sample_online(
            state.replay, keys[0], cfg.batch_size, length, t + 1, state.queue
        )
        state, learnt, metrics = learn(
            cfg, spec, state, window, draw(cfg, spec, keys[1]), n * updates + i
        )
        rows = state.replay
        if cfg.replay_context == "stored":
            rows = replay.set(
                rows, index[:, -cfg.batch_length :], records.stored(model, learnt.latent)
            )
        return state._replace(replay=rows, queue=queue), metrics

    state, metrics = loops.scan(one, state, jnp.arange(updates, dtype=jnp.int32))
    return state, jax.tree.map(jnp.mean, metrics)


def make(config: Config, spec: EnvSpec) -> Agent:
    """The agent of one environment.

    Raises:
      InputError: observations that cannot be encoded, action masks, several players or unbounded
        actions; a train ratio that cannot be scheduled in whole updates; windows that the replay
        does not hold.
    """
    spec.check_usable("Dreamer", dicts=True)
    spec.check_bounded("Dreamer")
    records.replay_of(config, spec)
    return Agent(
        init=partial(init, config, spec),
        init_memory=partial(init_memory, config, spec),
        act=partial(act, config, spec),
        observe=partial(observe, config, spec),
        update=partial(update, config, spec),
        schedule=schedule(config),
    )


AGENTS = {
    "dreamer": AgentDef(
        "dreamer", "DreamerV3: imagination in a latent world model", Config(), make, PRESETS
    )
}
