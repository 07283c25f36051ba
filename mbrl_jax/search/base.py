"""What goes into a search and what comes out of it, field for field as mctx's users know it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp

Params = Any
RecurrentState = Any
"""Of a batch of nodes: a tree of arrays [B, ...]."""
RecurrentFn = Callable[[Params, jax.Array, jax.Array, RecurrentState], tuple[Any, RecurrentState]]
"""(params, key, action [B] int32, embedding [B, ...]) -> (RecurrentFnOutput, embedding). One key
for the whole batch. Any object with the fields of `RecurrentFnOutput` will do."""
LoopFn = Callable[..., Any]
"""(lower, upper, body, initial value) -> final value, as `jax.lax.fori_loop`."""
QTransform = Callable[[Any, Any], jax.Array]
"""(tree of one root, node index) -> values [A] that a rule adds to its scores."""
Number = jax.Array | float
FEW = 8
"""Up to so many actions are taken one after another, which XLA fuses, and not by a reduction."""

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen `chex.dataclass`, of whose fields type checkers know."""
    return chex.dataclass(frozen=True)(cls)


@record
class RootFnOutput:
    """A batch of states from which to search."""

    prior_logits: chex.Array  # [B, A] of the policy network
    value: chex.Array  # [B] of the value network
    embedding: RecurrentState  # [B, ...] what the first call of the recurrent function gets


@record
class RecurrentFnOutput:
    """One step of the model from a batch of nodes."""

    reward: chex.Array  # [B] of the transition
    discount: chex.Array  # [B] of the successor's value: 0 past an end, -1 where the player changes
    prior_logits: chex.Array  # [B, A] of the successor
    value: chex.Array  # [B] of the successor


@record
class DecisionRecurrentFnOutput:
    """An action taken, the world's answer still open (Antonoglou et al. 2022)."""

    chance_logits: chex.Array  # [B, C] of the chance outcomes
    afterstate_value: chex.Array  # [B]


@record
class ChanceRecurrentFnOutput:
    """The world's answer to an afterstate (Antonoglou et al. 2022)."""

    action_logits: chex.Array  # [B, A] of the new state
    value: chex.Array  # [B] of the new state
    reward: chex.Array  # [B] of the transition
    discount: chex.Array  # [B] of the new state's value


@record
class SearchSummary:
    """Statistics of the roots."""

    visit_counts: chex.Array  # [B, A] float32
    visit_probs: chex.Array  # [B, A] their shares; uniform where nothing was visited
    value: chex.Array  # [B] mean return of all simulations
    qvalues: chex.Array  # [B, A]; zero where not visited


@record
class Tree:
    """The trees of a finished search; B of them, of N nodes, with A actions each.

    Node 0 is the root; a node's number is at most that of the simulation that made it. Numbers that
    no node took have no visits and no parent.
    """

    node_visits: chex.Array  # [B, N] int32, its own evaluation among them
    raw_values: chex.Array  # [B, N] of the value network
    node_values: chex.Array  # [B, N] mean return of the simulations through it
    parents: chex.Array  # [B, N] int32
    action_from_parent: chex.Array  # [B, N] int32
    children_index: chex.Array  # [B, N, A] int32
    children_prior_logits: chex.Array  # [B, N, A]
    children_visits: chex.Array  # [B, N, A] int32
    children_rewards: chex.Array  # [B, N, A]
    children_discounts: chex.Array  # [B, N, A]
    children_values: chex.Array  # [B, N, A] mean return from the child on
    embeddings: Any  # [B, N, ...]
    root_invalid_actions: chex.Array  # [B, A]
    extra_data: Any  # [B, ...]

    ROOT_INDEX: ClassVar[int] = 0
    NO_PARENT: ClassVar[int] = -1
    UNVISITED: ClassVar[int] = -1

    @property
    def num_actions(self) -> int:
        return self.children_index.shape[-1]

    @property
    def num_simulations(self) -> int:
        return self.node_visits.shape[-1] - 1

    def qvalues(self, indices: Any) -> jax.Array:
        """Of the nodes `indices` [B], [B, A]; of a tree without a batch, of one node, [A]."""
        if jnp.ndim(indices):
            return jax.vmap(Tree.qvalues)(self, indices)
        reward, discount = self.children_rewards[indices], self.children_discounts[indices]
        return reward + discount * self.children_values[indices]

    def summary(self) -> SearchSummary:
        """Visits and values at the roots."""
        counts = self.children_visits[:, 0].astype(self.node_values.dtype)
        total = jnp.sum(counts, axis=-1, keepdims=True)
        shares = jnp.where(total > 0, counts / jnp.maximum(total, 1), 1 / self.num_actions)
        qvalues = (
            self.children_rewards[:, 0]
            + self.children_discounts[:, 0] * (self.children_values[:, 0])
        )
        return SearchSummary(
            visit_counts=counts, visit_probs=shares, value=self.node_values[:, 0], qvalues=qvalues
        )


@record
class PolicyOutput:
    """What a search advises.

    Where the numbers of a root are not numbers (NaN or infinite priors, or NaN in its value or in
    what the model said below it), its weights are NaN and its action is the first allowed one; the
    other roots are as they would be without it.
    """

    action: chex.Array  # [B] int32
    action_weights: chex.Array  # [B, A] target of the policy network; sums to one
    search_tree: Tree


class Budget(NamedTuple):
    """How far a search goes; static."""

    num_simulations: int
    max_depth: int | None  # edges from a root to its deepest node; None: as many as simulations
    loop_fn: LoopFn

    @property
    def limit(self) -> int | None:
        """`max_depth`, if it can ever be met."""
        depth = self.max_depth
        return depth if depth is not None and depth < self.num_simulations else None


class Lanes(NamedTuple):
    """What the roots bring to their search.

    Every leaf has the axis of roots in front, along which `vmap` over seeds puts the roots of one
    seed after those of another (`vmapping.py`).
    """

    prior_logits: jax.Array  # [B, A] float32, with their noise, the lowest number where not allowed
    value: jax.Array  # [B] float32 of the value network
    embedding: Any  # [B, ...]
    invalid: jax.Array  # [B, A] bool, actions that the root may not take
    gumbel: jax.Array | None = None  # [B, A] float32, for Gumbel MuZero
    ties: jax.Array | None = None  # [B] uint32 that say how PUCT breaks ties
    constants: tuple[jax.Array, ...] = ()  # [B] float32 each, of PUCT
    closed: Any = ()  # [B, ...] each, what the transform closes over (`node.Transform`)
    before: Tree | None = None  # the tree from which PUCT goes on


def over_actions(combine: Any, x: jax.Array) -> jax.Array:
    """A reduction over the first axis, [1, ...].

    Of few actions one after another: XLA fuses that with what comes before and after it, and a
    search is bound by the number of its kernels.

    Args:
      combine: jnp.add, jnp.minimum or jnp.maximum.
      x: [A, ...].
    """
    if x.shape[0] <= FEW:
        return functools.reduce(combine, [x[a : a + 1] for a in range(x.shape[0])])
    return combine.reduce(x, axis=0, keepdims=True)
