"""The searches of MuZero, for acting and for reanalysis alike."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax import search
from mbrl_jax.agents.muzero_config import Config
from mbrl_jax.models import muzero_chance, muzero_net
from mbrl_jax.models.latent import recurrent_fn, search_root
from mbrl_jax.models.muzero_layers import Latent, Net, Prediction, Support
from mbrl_jax.nn.distributions import diagonal_normal
from mbrl_jax.types import PyTree, Scalar


class Advice(NamedTuple):
    """What a search says of a batch of observations."""

    action: jax.Array  # [B] int32; [B, D] float32 of continuous actions, before the squashing
    weights: jax.Array  # [B, A], or [B, K] of the candidates: the target of the policy
    candidates: PyTree  # [B, K, D] float32 before the squashing; () of discrete actions
    value: jax.Array  # [B] mean return of the simulations


def run(
    cfg: Config,
    net: Net,
    support: Support,
    params: PyTree,
    key: jax.Array,
    obs: PyTree,
    noise: bool,
    temperature: Scalar = 1.0,
) -> Advice:
    """A search from each of the observations [B, ...].

    Args:
      cfg, net, support, params: of the functions.
      key: consumed.
      obs: [B, ...]; where they hold an action mask, what it forbids is not taken at the root.
      noise: whether the root explores: Gumbel or Dirichlet noise.
      temperature: [] of the action among the visits (puct); 0 takes the most visited one.
    """
    if cfg.search == "sampled":
        return _sampled(cfg, net, support, params, key, obs, noise)
    if cfg.chance_codes:
        return _stochastic(cfg, net, support, params, key, obs, noise, temperature)
    model = muzero_net.latent_model(net, support, cfg.gamma)
    legal = net.spec.legal(obs)
    given = {
        "params": params, "rng_key": key, "root": search_root(model, params, obs),
        "recurrent_fn": recurrent_fn(model), "num_simulations": cfg.num_simulations,
        "invalid_actions": None if legal is None else ~legal,
    }  # fmt: skip
    if cfg.search == "gumbel":
        found = search.gumbel_muzero_policy(
            **given, qtransform=_transform(cfg), max_num_considered_actions=cfg.max_considered,
            gumbel_scale=float(noise),
        )  # fmt: skip
    else:
        found = search.muzero_policy(
            **given, qtransform=_transform(cfg), pb_c_init=cfg.pb_c_init,
            dirichlet_alpha=cfg.dirichlet_alpha,
            dirichlet_fraction=cfg.dirichlet_fraction if noise else 0.0, temperature=temperature,
        )  # fmt: skip
    return Advice(found.action, found.action_weights, (), found.search_tree.summary().value)


def at_random(
    cfg: Config, net: Net, support: Support, params: PyTree, key: jax.Array, obs: PyTree,
    before: jax.Array, is_first: jax.Array,
) -> Advice:  # fmt: skip
    """Uniform legal actions, or those of the step before with the chance `warmup_repeat`.

    The targets that go with them are the uniform policy and the network's own value.

    Args:
      cfg, net, support, params, key, obs: as in `run`.
      before: [B, ...] the actions of the step before, as the environment takes them.
      is_first: [B] bool, where there was none.
    """
    spec, keys = net.spec, jax.random.split(key, 3)
    prediction = muzero_net.predict(net, params, muzero_net.represent(net, params, obs))
    value = muzero_net.expected(prediction.value, support.value)
    legal, batch = spec.legal(obs), is_first.shape[0]
    again = jax.random.bernoulli(keys[2], cfg.warmup_repeat, (batch,)) & ~is_first
    if legal is not None:
        again = again & (jnp.take_along_axis(legal, before[:, None], axis=1)[:, 0] > 0)
    again = again.reshape(batch, *[1] * (before.ndim - 1))
    action = jnp.where(again, before, spec.random_actions(keys[0], obs))
    if spec.num_actions is None:
        candidates, _ = candidates_of(cfg, prediction, keys[1], 0)
        weights = jnp.full(candidates.shape[:2], 1.0 / cfg.num_candidates)
        # the largest number below 1 in float32 would be squashed from 8.7
        unit = jnp.clip(spec.to_unit(action), -0.999, 0.999)
        return Advice(jnp.arctanh(unit), weights, candidates, value)
    if legal is None:
        weights = jnp.full(prediction.policy.shape, 1.0 / spec.num_actions)
    else:
        weights = legal / jnp.maximum(jnp.sum(legal, axis=-1, keepdims=True), 1.0)
    return Advice(action, weights.astype(jnp.float32), (), value)


def _transform(cfg: Config):
    if cfg.search == "puct":

        def transform(tree, node_index):
            return search.qtransform_by_parent_and_siblings(
                tree, node_index, epsilon=cfg.least_range
            )

    else:

        def transform(tree, node_index):
            return search.qtransform_completed_by_mix_value(
                tree, node_index, value_scale=cfg.value_scale, maxvisit_init=cfg.visit_offset,
                epsilon=cfg.least_range,
            )  # fmt: skip

    return transform


def candidates_of(
    cfg: Config, prediction: Prediction, key: jax.Array, wide: int
) -> tuple[jax.Array, jax.Array]:
    """Candidates [B, K, D] of a Gaussian policy, before the squashing, and their priors [B, K].

    The last `wide` are drawn from the policy stretched by `cfg.wide_factor`, as Wang et al. (2024),
    "EfficientZero V2", do at the root. The prior corrects for the mixture that they come from.
    """
    (mean, std), num = prediction.policy, cfg.num_candidates
    mean, std = mean[:, None], std[:, None]
    factor = jnp.where(jnp.arange(num) < num - wide, 1.0, cfg.wide_factor).reshape(1, -1, 1)
    noise = jax.random.normal(key, (mean.shape[0], num, mean.shape[-1]), jnp.float32)
    actions = mean + factor * std * noise
    policy = diagonal_normal(mean, std).log_prob(actions)
    if not wide:
        return actions, jnp.zeros_like(policy)
    stretched = diagonal_normal(mean, cfg.wide_factor * std).log_prob(actions)
    shares = jnp.log(jnp.float32([(num - wide) / num, wide / num]))
    proposal = jnp.logaddexp(shares[0] + policy, shares[1] + stretched)
    return actions, search.sampled_logits(policy, proposal)


def _sampled(
    cfg: Config, net: Net, support: Support, params: PyTree, key: jax.Array, obs: PyTree,
    noise: bool,
) -> Advice:  # fmt: skip
    root_key, key = jax.random.split(key)
    latent = muzero_net.represent(net, params, obs)
    prediction = muzero_net.predict(net, params, latent)
    actions, logits = candidates_of(cfg, prediction, root_key, cfg.wide_candidates)
    root = search.SampledRootFnOutput(
        actions=actions, prior_logits=logits, embedding=latent,
        value=muzero_net.expected(prediction.value, support.value),
    )  # fmt: skip

    def step(params: PyTree, key: jax.Array, action: jax.Array, latent: Latent):
        after, outcome = muzero_net.transition(net, params, support, latent, jnp.tanh(action))
        prediction = muzero_net.predict(net, params, after)
        actions, logits = candidates_of(cfg, prediction, key, 0)
        return search.SampledRecurrentFnOutput(
            reward=muzero_net.reward_of(support, latent, outcome),
            discount=muzero_net.discount_of(net, outcome, cfg.gamma), actions=actions,
            prior_logits=logits, value=muzero_net.expected(prediction.value, support.value),
        ), after  # fmt: skip

    found = search.sampled_policy(
        params, key, root, step, cfg.num_simulations, qtransform=_transform(cfg),
        max_num_considered_actions=cfg.max_considered, gumbel_scale=float(noise),
    )  # fmt: skip
    value = found.search_tree.summary().value
    return Advice(found.action, found.action_weights, found.actions, value)


def _stochastic(
    cfg: Config, net: Net, support: Support, params: PyTree, key: jax.Array, obs: PyTree,
    noise: bool, temperature: Scalar,
) -> Advice:  # fmt: skip
    model, legal = muzero_net.latent_model(net, support, cfg.gamma), net.spec.legal(obs)

    def decide(params: PyTree, key: jax.Array, action: jax.Array, latent: Latent):
        vector = muzero_net.action_vector(net.spec, action)
        features, seen = muzero_chance.afterstate(net, params, latent.features, vector)
        said = muzero_chance.chance(net, params, seen)
        value = muzero_net.expected(said.value, support.value)
        out = search.DecisionRecurrentFnOutput(chance_logits=said.codes, afterstate_value=value)
        return out, features

    def answer(params: PyTree, key: jax.Array, code: jax.Array, features: jax.Array):
        vector = jax.nn.one_hot(code, net.chance, dtype=jnp.float32)
        latent, outcome = muzero_net.transition(net, params, support, Latent(features), vector)
        logits, value = model.evaluate(params, latent)
        reward = muzero_net.reward_of(support, latent, outcome)
        discount = muzero_net.discount_of(net, outcome, cfg.gamma)
        return search.ChanceRecurrentFnOutput(
            action_logits=logits, value=value, reward=reward, discount=discount
        ), latent

    found = search.stochastic_muzero_policy(
        params, key, search_root(model, params, obs), decide, answer, cfg.num_simulations,
        None if legal is None else ~legal, qtransform=_transform(cfg), pb_c_init=cfg.pb_c_init,
        dirichlet_alpha=cfg.dirichlet_alpha,
        dirichlet_fraction=cfg.dirichlet_fraction if noise else 0.0, temperature=temperature,
    )  # fmt: skip
    return Advice(found.action, found.action_weights, (), found.search_tree.summary().value)
