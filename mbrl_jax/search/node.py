"""One node as the rules of a search see it, and transforms of values brought to that form.

A search keeps the choice of each node and renews it only when a simulation passes through, so a
rule may look at nothing but its node (and, for PUCT, at the range of values in the whole tree).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.search import qtransforms
from mbrl_jax.search.base import QTransform, Tree, over_actions
from mbrl_jax.search.vmapping import hoisted
from mbrl_jax.types import InputError


class Node(NamedTuple):
    """L nodes; L is the last axis, along which a CPU sums fast. Without it: one node."""

    prior: jax.Array  # [A, L] float32 probabilities, -inf where an action is not allowed
    visits: jax.Array  # [A, L] int32 of the actions
    qvalues: jax.Array  # [A, L] float32 reward + discount * value of the child; 0 if not visited
    values: jax.Array  # [A, L] float32 mean return from the child on; 0 if not visited
    raw: jax.Array  # [L] float32 what the value network said
    value: jax.Array  # [L] float32 mean of `raw` and the returns of the simulations through it
    total: jax.Array  # [L] int32 visits of the node, its own evaluation among them
    root: jax.Array  # [L] int32 number of its root, 0..B-1
    number: jax.Array  # [L] int32 number in its tree, 0 for the root
    outcomes: jax.Array | None = None  # [2, A, L] rewards and discounts, if a transform reads them
    span: jax.Array | None = None  # [2, L] least and greatest qvalue in its tree, if that is kept


Rule = Callable[[Node], jax.Array]
"""The action [L] int32 that each of L nodes takes."""
Values = Callable[[Node], jax.Array]
"""What a transform adds to the scores of the actions of L nodes, [A, L] float32."""


def best(scores: jax.Array, order: jax.Array | None = None) -> jax.Array:
    """The actions of the greatest scores, [L] int32.

    A maximum and a minimum: XLA's argmax takes longer on a CPU.

    Args:
      scores: [A, L]; where one of a column is NaN, the answer is the last action.
      order: [A, L] uint32; among equal scores the least of it comes first (its last ceil(log2 A)
        bits do not count). None, and among equals of that too: the first action.
    """
    num_actions = scores.shape[0]
    own = jnp.arange(num_actions, dtype=jnp.int32)[:, None]
    top = scores == over_actions(jnp.maximum, scores)
    if order is None:
        return over_actions(jnp.minimum, jnp.where(top, own, num_actions - 1))[0]
    low = np.uint32((1 << (num_actions - 1).bit_length()) - 1)
    last = ~low | np.uint32(num_actions - 1)
    keys = jnp.where(top, (order & ~low) | own.astype(jnp.uint32), last)
    return (over_actions(jnp.minimum, keys)[0] & low).astype(jnp.int32)


def safe_log(probs: jax.Array) -> jax.Array:
    """log(probs), the logarithm of the least normal number (-87.3 in float32) where that is 0."""
    return jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))


FIELDS: dict[str, Callable[[Node], Any]] = {
    "node_visits": lambda node: node.total,
    "raw_values": lambda node: node.raw,
    "node_values": lambda node: node.value,
    "children_prior_logits": lambda node: safe_log(node.prior),
    "children_prior_probs": lambda node: node.prior,
    "children_visits": lambda node: node.visits,
    "children_values": lambda node: node.values,
    "children_rewards": lambda node: node.outcomes[0] if node.outcomes is not None else None,
    "children_discounts": lambda node: node.outcomes[1] if node.outcomes is not None else None,
    "value_range": lambda node: node.span,
}
"""What a transform may read of its node, by the names of `Tree`; beside them `qvalues`."""
OUTCOMES = frozenset({"children_rewards", "children_discounts"})
SPAN = "value_range"


class NodeView:
    """A node in the clothes of a `Tree`, for transforms of the form (tree, node index).

    Its arrays can be read at the node's own index alone, which is a traced int32: 0 at the root.
    """

    ROOT_INDEX, NO_PARENT, UNVISITED = Tree.ROOT_INDEX, Tree.NO_PARENT, Tree.UNVISITED

    def __init__(self, node: Node, reads: set[str] | None = None):
        """Args:
        node: of one node ([A] and [] arrays), or of L ([A, L] and [L]).
        reads: collects the names that are read.
        """
        self._node = node
        self._reads = reads

    @property
    def num_actions(self) -> int:
        return self._node.visits.shape[0]

    def qvalues(self, index: Any) -> jax.Array:
        return Own(self._node.qvalues, self._node.number, "qvalues")[index]

    def __getattr__(self, name: str) -> Own:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FIELDS:
            raise InputError(
                f"qtransform reads tree.{name}: a search shows it its own node alone; expected "
                f"qvalues(node_index) or one of {', '.join(FIELDS)}, at [node_index]"
            )
        if self._reads is not None:
            self._reads.add(name)
        return Own(FIELDS[name](self._node), self._node.number, name)


class Own:
    """An array of a tree that holds one node's row."""

    def __init__(self, row: jax.Array, index: jax.Array, name: str):
        self._row, self._index, self._name = row, index, name

    def __getitem__(self, index: Any) -> jax.Array:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is not self._index:
            raise self._misread(f"at [{first}]")
        return self._row[tuple(rest)] if rest else self._row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__jax_array__":
            raise AttributeError(name)
        raise self._misread("as a whole")

    def _misread(self, how: str) -> InputError:
        return InputError(
            f"qtransform reads tree.{self._name} {how}: a search shows it its own node alone; "
            "expected the node_index that it is given"
        )


class Transform(NamedTuple):
    """A `qtransform` and what a search has to know of it."""

    function: Callable[[list[Any], Node], jax.Array]  # (values of `closed`, one node) -> [A]
    closed: list[Any]  # the traced values that it closes over, such as a scale of a traced config
    lanes: QTransform | None  # the same function of L nodes at once, where it is one of ours
    reads: frozenset[str]  # of `FIELDS`

    @property
    def local(self) -> bool:
        """Whether a node's values depend on the node alone."""
        return SPAN not in self.reads

    @property
    def reads_outcomes(self) -> bool:
        """Whether rewards and discounts must be kept beside the values."""
        return bool(OUTCOMES & self.reads)

    def for_roots(self, batch: int) -> list[jax.Array]:
        """What it closes over, [B, ...] each, as the lanes of a search carry it."""
        return [jnp.broadcast_to(x, (batch, *jnp.shape(x))) for x in self.closed]


def transform_of(qtransform: QTransform, num_actions: int) -> Transform:
    """Tries the transform on one node, without computing anything.

    Args:
      qtransform: (tree, node index) -> [A].
      num_actions: A.

    Raises:
      InputError: it reads what a search does not show, or gives another shape.
    """

    def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    row, one = (num_actions,), of((), jnp.int32)
    node = Node(
        of(row), of(row, jnp.int32), of(row), of(row), of(()), of(()), one, one, one,
        of((2, *row)), of((2,)),
    )  # fmt: skip
    reads: set[str] = set()

    def function(node: Node) -> jax.Array:
        found = qtransform(NodeView(node, reads), node.number)
        if jnp.shape(found) != row:
            raise InputError(f"qtransform gives shape {jnp.shape(found)}: expected {row}, as [A]")
        return jnp.asarray(found, jnp.float32)

    call, closed = hoisted(function, node)
    lanes = None if closed or _module(qtransform) != qtransforms.__name__ else qtransform
    return Transform(call, closed, lanes, frozenset(reads))


def values_of(transform: Transform, closed: list[jax.Array]) -> Values:
    """The transform as a function of L nodes.

    Args:
      transform: see `transform_of`.
      closed: [B, ...] its closed-over values, one for each root.
    """

    def values(node: Node) -> jax.Array:
        if transform.lanes is not None:
            return jnp.asarray(transform.lanes(NodeView(node), node.number), jnp.float32)
        own = [x.at[node.root].get(mode="promise_in_bounds") for x in closed]
        return jax.vmap(transform.function, in_axes=(0, -1), out_axes=-1)(own, node)

    return values


def _module(qtransform: Any) -> str | None:
    while isinstance(qtransform, functools.partial):
        qtransform = qtransform.func
    return getattr(qtransform, "__module__", None)
