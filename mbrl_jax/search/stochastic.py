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
    LoopFn,
    Params,
    PolicyOutput,
    QTransform,
    RecurrentFnOutput,
    RecurrentState,
    RootFnOutput,
    Tree,
    record,
)
from mbrl_jax.search.forest import Node, Rule
from mbrl_jax.search.policies import Constants, Number, check, masked, noisy, puct_search, tempered
from mbrl_jax.search.qtransforms import is_local, qtransform_by_parent_and_siblings


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
      ValueError: no simulation or action, or shapes that do not agree.
    """
    invalid = check(root, num_simulations, invalid_actions, max_depth)
    batch, num_actions = invalid.shape
    rng_key, dirichlet_key, search_key = jax.random.split(rng_key, 3)
    logits = noisy(dirichlet_key, root.prior_logits, dirichlet_fraction, dirichlet_alpha)
    shapes = jax.eval_shape(
        decision_recurrent_fn, params, search_key, jnp.zeros(batch, jnp.int32), root.embedding
    )
    num_outcomes = shapes[0].chance_logits.shape[-1]
    afterstate = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
    none = jnp.full((batch, num_outcomes), -jnp.inf)

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
        zero = jnp.zeros(num)
        of_afterstate = RecurrentFnOutput(
            reward=zero, discount=zero + 1.0, value=after.afterstate_value,
            prior_logits=jnp.concatenate(
                [jnp.full((num, num_actions), -jnp.inf), after.chance_logits], axis=-1
            ),
        )  # fmt: skip
        of_state = RecurrentFnOutput(
            reward=new.reward, discount=new.discount, value=new.value,
            prior_logits=jnp.concatenate(
                [new.action_logits, jnp.full((num, num_outcomes), -jnp.inf)], axis=-1
            ),
        )  # fmt: skip
        out = jax.tree.map(
            lambda a, b: jnp.where(decides.reshape(-1, *[1] * (a.ndim - 1)), a, b),
            of_afterstate, of_state,
        )  # fmt: skip
        return out, StochasticRecurrentState(
            state_embedding=state, afterstate_embedding=afterstate, is_decision_node=~decides
        )

    def rule(constants: Constants) -> Rule:
        decide = puct.puct(qtransform, *constants)

        def scores(node: Node) -> jax.Array:
            cut = {f: getattr(node, f)[:num_actions] for f in ("prior", "visits", "qvalues")}
            own = node._replace(**cut)
            shares = node.prior[num_actions:] / (node.visits[num_actions:] + 1)
            # an afterstate has no priors of actions, a state none of outcomes
            is_chance = jnp.sum(shares, axis=0, keepdims=True) > 0
            decisions = jnp.where(is_chance, -jnp.inf, decide(own))
            return jnp.concatenate([decisions, jnp.where(is_chance, shares, -jnp.inf)], axis=0)

        return scores

    wide = StochasticRecurrentState(
        state_embedding=root.embedding, afterstate_embedding=afterstate,
        is_decision_node=jnp.ones(batch, bool),
    )  # fmt: skip
    wide_root = RootFnOutput(prior_logits=root.prior_logits, value=root.value, embedding=wide)
    tree = puct_search(
        params, search_key, jnp.concatenate([masked(logits, invalid), none], axis=-1),
        wide_root, step, rule, (pb_c_init, pb_c_base), is_local(qtransform), num_simulations,
        jnp.pad(invalid, ((0, 0), (0, num_outcomes))), max_depth, loop_fn,
    )  # fmt: skip
    tree = _of_actions(tree, num_actions)
    weights = tree.summary().visit_probs
    action = jax.random.categorical(rng_key, tempered(weights, temperature))
    return PolicyOutput(action=action, action_weights=weights, search_tree=tree)


def _of_actions(tree: Tree, num_actions: int) -> Tree:
    """The tree without the outcomes' part of its axis of choices."""
    wide = [f.name for f in dataclasses.fields(tree) if f.name.startswith("children_")]
    wide.append("root_invalid_actions")
    cut = {name: getattr(tree, name)[..., :num_actions] for name in wide}
    return dataclasses.replace(tree, **cut)
