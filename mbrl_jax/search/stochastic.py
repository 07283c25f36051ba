"""Search with chance: actions lead to afterstates, the world's answers to the next states.

Antonoglou et al. (2022), "Planning in stochastic environments with a learned model". Nodes of both
kinds share one axis of A actions and C chance outcomes, of which each kind has only its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search import puct
from mbrl_jax.search.base import (
    Budget,
    Lanes,
    LoopFn,
    Number,
    Params,
    PolicyOutput,
    QTransform,
    RecurrentFnOutput,
    RecurrentState,
    RootFnOutput,
    Tree,
    record,
)
from mbrl_jax.search.node import Node, Rule, best, transform_of, values_of
from mbrl_jax.search.qtransforms import qtransform_by_parent_and_siblings
from mbrl_jax.search.root import advice, check, logits_of, masked, noisy, tempered


@record
class StochasticRecurrentState:
    """What a node of either kind embeds; the other kind's embedding means nothing."""

    state_embedding: Any  # [B, ...]
    afterstate_embedding: Any  # [B, ...]
    is_decision_node: jax.Array  # [B] bool


def stochastic_muzero_policy(
    params: Params,
    rng_key: jax.Array,
    root: Any,
    decision_recurrent_fn: Callable[..., tuple[Any, RecurrentState]],
    chance_recurrent_fn: Callable[..., tuple[Any, RecurrentState]],
    num_simulations: int,
    invalid_actions: jax.Array | None = None,
    max_depth: int | None = None,
    loop_fn: LoopFn = jax.lax.fori_loop,
    *,
    qtransform: QTransform = qtransform_by_parent_and_siblings,
    dirichlet_fraction: Number = 0.25,
    dirichlet_alpha: Number = 0.3,
    pb_c_init: Number = 1.25,
    pb_c_base: Number = 19652,
    temperature: Number = 1.0,
) -> PolicyOutput:
    """Stochastic MuZero's search: PUCT at states; at afterstates the outcome most behind its share.

    Args:
      params, rng_key, root, num_simulations, invalid_actions, max_depth, loop_fn, qtransform,
        dirichlet_fraction, dirichlet_alpha, pb_c_init, pb_c_base, temperature: as in
        `muzero_policy`.
      decision_recurrent_fn: (params, key, action [B], state embedding) ->
        (`DecisionRecurrentFnOutput`, afterstate embedding).
      chance_recurrent_fn: (params, key, chance outcome [B], afterstate embedding) ->
        (`ChanceRecurrentFnOutput`, state embedding). Both are called at every simulation, since a
        batch holds nodes of both kinds.

    Returns:
      Actions, shares of visits as weights [B, A], and trees, whose axis of actions holds the A
      actions alone.

    Raises:
      InputError: as in `muzero_policy`.
    """
    invalid = check(root, num_simulations, invalid_actions, max_depth)
    batch, num_actions = invalid.shape
    rng_key, dirichlet_key, search_key = jax.random.split(rng_key, 3)
    logits = logits_of(root, invalid)
    logits = masked(noisy(dirichlet_key, logits, dirichlet_fraction, dirichlet_alpha), invalid)
    transform = transform_of(qtransform, num_actions)
    shapes = jax.eval_shape(
        decision_recurrent_fn, params, search_key, jnp.zeros(batch, jnp.int32), root.embedding
    )
    num_outcomes = shapes[0].chance_logits.shape[-1]
    afterstate = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])

    def none(num: int, choices: int) -> jax.Array:
        return jnp.full((num, choices), -jnp.inf, jnp.float32)

    def joined(of_actions: jax.Array, of_outcomes: jax.Array) -> jax.Array:
        logits = of_actions, of_outcomes
        return jnp.concatenate([jnp.asarray(x, jnp.float32) for x in logits], axis=-1)

    def step(params: Params, key: jax.Array, choice: jax.Array, embedding: Any) -> Any:
        decision_key, chance_key = jax.random.split(key)
        action = jnp.minimum(choice, num_actions - 1)
        outcome = jnp.maximum(choice - num_actions, 0)
        after, afterstate = decision_recurrent_fn(
            params, decision_key, action, embedding.state_embedding
        )
        new, state = chance_recurrent_fn(
            params, chance_key, outcome, embedding.afterstate_embedding
        )
        num, decides = choice.shape[0], embedding.is_decision_node
        zero = jnp.zeros(num, jnp.float32)
        of_afterstate = RecurrentFnOutput(
            reward=zero, discount=zero + 1.0, value=after.afterstate_value,
            prior_logits=joined(none(num, num_actions), after.chance_logits),
        )  # fmt: skip
        of_state = RecurrentFnOutput(
            reward=new.reward, discount=new.discount, value=new.value,
            prior_logits=joined(new.action_logits, none(num, num_outcomes)),
        )  # fmt: skip
        out = jax.tree.map(
            lambda a, b: jnp.where(decides.reshape(-1, *[1] * (a.ndim - 1)), a, b),
            of_afterstate, of_state,
        )  # fmt: skip
        return out, StochasticRecurrentState(
            state_embedding=state, afterstate_embedding=afterstate, is_decision_node=~decides
        )

    def rule(lanes: Lanes) -> Rule:
        values = values_of(transform, lanes.closed)

        def choice(node: Node) -> jax.Array:
            decision = of_actions(node, num_actions)
            found = puct.scores(values, lanes, decision)
            order = puct.tie_order(lanes, decision)
            shares = node.prior[num_actions:] / (node.visits[num_actions:] + 1)
            # an afterstate has no priors of actions, a state none of outcomes
            is_chance = jnp.sum(shares, axis=0) > 0
            return jnp.where(is_chance, num_actions + best(shares), best(found, order))

        return choice

    wide = StochasticRecurrentState(
        state_embedding=root.embedding, afterstate_embedding=afterstate,
        is_decision_node=jnp.ones(batch, bool),
    )  # fmt: skip
    wide_root = RootFnOutput(prior_logits=root.prior_logits, value=root.value, embedding=wide)
    ties_key, search_key = jax.random.split(search_key)
    wide_logits = joined(logits, none(batch, num_outcomes))
    wide_invalid = jnp.pad(invalid, ((0, 0), (0, num_outcomes)))
    constants = pb_c_init, pb_c_base
    lanes = puct.lanes_of(ties_key, wide_root, wide_logits, wide_invalid, transform, constants)
    budget = Budget(num_simulations, max_depth, loop_fn)
    tree, value = puct.search(params, search_key, step, lanes, rule, transform, budget)
    tree = _of_actions(tree, num_actions)
    weights = tree.summary().visit_probs
    action = jax.random.categorical(rng_key, tempered(weights, temperature))
    return advice(action, weights, tree, lanes._replace(invalid=invalid), value)


def of_actions(node: Node, num_actions: int) -> Node:
    """The nodes without the outcomes' part of their axis of choices.

    Args:
      node: L nodes of A + C choices.
      num_actions: A.
    """
    names = "prior", "visits", "qvalues", "values"
    outcomes = None if node.outcomes is None else node.outcomes[:, :num_actions]
    return node._replace(
        outcomes=outcomes, **{name: getattr(node, name)[:num_actions] for name in names}
    )


def _of_actions(tree: Tree, num_actions: int) -> Tree:
    """The tree without the outcomes' part of its axis of choices."""
    wide = [f.name for f in dataclasses.fields(tree) if f.name.startswith("children_")]
    wide.append("root_invalid_actions")
    cut = {name: getattr(tree, name)[..., :num_actions] for name in wide}
    return dataclasses.replace(tree, **cut)
