"""The trees of all roots as one flat forest, descended without a loop.

Row i * B + b is node i of root b, so that the nodes which one batch of simulations adds are one
slice. Edge row * W + a is action a at a row, whose W cells hold first its edges.

Every rule of selection here sees the node alone, so a node's choice changes only when a simulation
passes through it. Each edge therefore keeps the edge at which greedy descent through it ends
(`target`), and the backup, which walks the path anyway, renews it. Selection is one lookup. Where
the rule looks at the whole tree (a forest with a `span`), `target` is the row of the edge's child
instead, and descent a loop.

Values follow the running mean of mctx and the papers: the value of a node is the mean over its own
evaluation and the returns of the simulations through it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import QTransform
from mbrl_jax.search.qtransforms import takes_lanes
from mbrl_jax.search.seeds import Model

VISITS, QVALUE, VALUE, TARGET = range(4)
"""Of an edge: int32, bits of float32, bits of the child's value, int32."""
RAW, REWARD, DISCOUNT, PARENT = range(4)
"""Of a node: bits of float32 thrice, the edge it hangs at (int32)."""


class Node(NamedTuple):
    """What a rule of selection may see; L nodes, the last axis, along which a CPU sums fast."""

    prior: jax.Array  # [A, L] probabilities, -inf where an action is not allowed
    visits: jax.Array  # [A, L] int32
    qvalues: jax.Array  # [A, L], 0 where not visited
    raw: jax.Array  # [L]
    value: jax.Array  # [L]
    total: jax.Array  # [L] int32 visits of the node, its own evaluation among them
    root: jax.Array  # [L] int32 number of its root
    span: jax.Array | None = None  # [2, L] least and greatest value in its tree, if that is kept


Rule = Callable[[Node], jax.Array]
"""Scores [A, L] of the actions of L nodes; the greatest is taken, the first among equals."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forest:
    """R = N * B rows of W cells of four numbers.

    A row's cells: its A edges, its prior, filled up to whole cells, and its node.
    """

    table: jax.Array  # [R, 4 W] int32
    embedding: Any  # [R, ...]
    root_value: jax.Array  # [B]
    depth: jax.Array | None  # [R] int32, where depth is limited
    span: jax.Array | None  # [2, B] least and greatest value of an edge, where a rule asks for it
    num_actions: int = dataclasses.field(metadata={"static": True})

    @property
    def batch(self) -> int:
        return self.root_value.shape[0]

    @property
    def cells(self) -> jax.Array:
        """[R * W, 4] int32; edges and nodes are numbers of cells."""
        return self.table.reshape(-1, 4)

    @property
    def width(self) -> int:
        """Cells of a row."""
        return self.num_actions + -(-self.num_actions // 4) + 1

    def records(self, rows: jax.Array) -> jax.Array:
        """What `record` made of the rows [L], [L, 4 (W - A)]."""
        return self.table.at[rows, 4 * self.num_actions :].get(mode="promise_in_bounds")


def bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def number(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def pick(x: jax.Array, action: jax.Array) -> jax.Array:
    """x [A, L] at actions [L], as [1, L]."""
    return jnp.take_along_axis(x, action[None], axis=0, mode="promise_in_bounds")


class NodeView:
    """One node in the clothes of a tree, for transforms of the form (tree, node index)."""

    def __init__(self, node: Node):
        self._node = node

    def qvalues(self, index: Any) -> jax.Array:
        return self._node.qvalues

    @property
    def children_visits(self) -> jax.Array:
        return self._node.visits[None]

    @property
    def children_prior_probs(self) -> jax.Array:
        return self._node.prior[None]

    @property
    def children_prior_logits(self) -> jax.Array:
        return safe_log(self._node.prior)[None]

    @property
    def raw_values(self) -> jax.Array:
        return self._node.raw[None]

    @property
    def node_values(self) -> jax.Array:
        return self._node.value[None]

    @property
    def node_visits(self) -> jax.Array:
        return self._node.total[None]

    @property
    def value_range(self) -> jax.Array:
        assert self._node.span is not None
        return self._node.span[None]


def safe_log(probs: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))


def transformed(qtransform: QTransform, node: Node) -> jax.Array:
    """The transform of every node, [A, L]."""
    if takes_lanes(qtransform):
        return qtransform(NodeView(node), 0)
    return jax.vmap(lambda one: qtransform(NodeView(one), 0), in_axes=-1, out_axes=-1)(node)


def record(
    prior: jax.Array, raw: jax.Array, reward: jax.Array, discount: jax.Array, edge: jax.Array
) -> jax.Array:
    """What the rows of new nodes that hang at the edges [L] hold beside their own edges.

    -> [L, 4 (W - A)].
    """
    num, num_actions = prior.shape
    node = jnp.stack([bits(raw), bits(reward), bits(discount), edge], axis=-1)
    fill = jnp.zeros((num, -num_actions % 4), jnp.int32)
    return jnp.concatenate([bits(prior), fill, node], axis=-1)


def unpack(rows: jax.Array, num_actions: int) -> tuple[Node, jax.Array]:
    """Rows [L, 4 W] -> nodes of their raw values, no visits and the first root; their cells."""
    columns, cell = rows.T, rows[:, -4:]
    edges = columns[: 4 * num_actions].reshape(num_actions, 4, -1)
    prior = number(columns[4 * num_actions : 5 * num_actions])
    raw, zero = number(cell[:, RAW]), jnp.zeros(rows.shape[0], jnp.int32)
    return Node(prior, edges[:, VISITS], number(edges[:, QVALUE]), raw, raw, zero, zero), cell


def plant(
    prior: jax.Array,
    value: jax.Array,
    embedding: Any,
    num_nodes: int,
    limited: bool = False,
    local: bool = True,
) -> Forest:
    """The roots, with room for `num_nodes` nodes under each, itself among them.

    `limited`: in depth; `local`: rules see a node alone.

    Raises:
      ValueError: more edges than int32 can number.
    """
    batch, num_actions = prior.shape
    nothing = jnp.zeros(batch)
    root = record(prior, value, nothing, nothing, jnp.zeros(batch, jnp.int32))
    num_rows, width = batch * num_nodes, num_actions + root.shape[1] // 4
    if num_rows * width >= 2**31:
        raise ValueError(
            f"{batch} roots with {num_nodes} nodes of {num_actions} actions: expected fewer than "
            "2^31 edges; search in smaller batches"
        )
    empty = Forest(
        jnp.zeros((num_rows, 4 * width), jnp.int32),
        jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), embedding),
        value, jnp.zeros(num_rows, jnp.int32) if limited else None,
        None if local else jnp.tile(jnp.array([[jnp.inf], [-jnp.inf]]), (1, batch)), num_actions,
    )  # fmt: skip
    return store(empty, root, embedding, 0)


def store(forest: Forest, records: jax.Array, embedding: Any, first_row: Any) -> Forest:
    """Writes new nodes, one slice from `first_row` on, where no edge was visited yet."""
    put = jax.lax.dynamic_update_slice_in_dim
    depth = forest.depth
    if depth is not None:
        above = records[:, -4 + PARENT] // forest.width
        depth = put(depth, jnp.where(above < forest.batch, 1, take(depth, above) + 1), first_row, 0)
    return dataclasses.replace(
        forest,
        table=jax.lax.dynamic_update_slice(
            forest.table, records, (first_row, 4 * forest.num_actions)
        ),
        embedding=jax.tree.map(
            lambda x, new: put(x, new, first_row, 0), forest.embedding, embedding
        ),
        depth=depth,
    )


def expand(
    forest: Forest,
    model: Model,
    call: jax.Array,
    edge: jax.Array,
    factor: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The model's answers behind the edges [L] -> records (see there) and embeddings of new nodes.

    `factor` [L, A] times the prior is what they keep.

    Raises:
      ValueError: outputs of the recurrent function whose shapes do not agree.
    """
    before = jax.tree.map(lambda x: take(x, edge // forest.width), forest.embedding)
    out, embedding = model(call, edge % forest.width, before)
    num = edge.shape[0]
    shapes = dict.fromkeys(("reward", "discount", "value"), (num,))
    for name, expected in {**shapes, "prior_logits": (num, forest.num_actions)}.items():
        found = jnp.shape(getattr(out, name))
        if found != expected:
            raise ValueError(f"recurrent_fn: {name} of shape {found}, expected {expected}")
    got, gave = (jax.tree.map(lambda x: (jnp.shape(x), x.dtype), x) for x in (before, embedding))
    if got != gave:
        raise ValueError(f"recurrent_fn: embedding {gave}, expected {got}, as it was given")
    prior = jax.nn.softmax(jnp.asarray(out.prior_logits, jnp.float32))
    if factor is not None:
        prior = prior * factor
    raw, reward, discount = (
        jnp.asarray(x, jnp.float32) for x in (out.value, out.reward, out.discount)
    )
    return record(prior, raw, reward, discount, edge), embedding


def choose(forest: Forest, rule: Rule) -> jax.Array:
    """The edge at which greedy descent from each root ends, [B] int32."""
    edge = first_edges(forest) + best(rule(roots(forest)))
    return end_of(edge, root_cells(forest, edge))


def first_edges(forest: Forest) -> jax.Array:
    """Of the roots, [B] int32."""
    return jnp.arange(forest.batch) * forest.width


def root_cells(forest: Forest, edge: jax.Array) -> jax.Array:
    """The cells [L, 4] of edges [L] of roots."""
    return take(forest.table[: forest.batch].reshape(-1, 4), edge)


def end_of(edge: jax.Array, cell: jax.Array) -> jax.Array:
    """The edge at which greedy descent through each of the edges [L] of `cell` [L, 4] ends."""
    return jnp.where(cell[:, VISITS] > 0, cell[:, TARGET], edge)


def best(scores: jax.Array) -> jax.Array:
    """The first of the best of scores [A, L], [L] int32; the last action where one is NaN.

    A maximum and a minimum: XLA's argmax takes longer on a CPU.
    """
    own = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None]
    top = scores == jnp.max(scores, axis=0, keepdims=True)
    return jnp.min(jnp.where(top, own, scores.shape[0] - 1), axis=0)


def roots(forest: Forest) -> Node:
    """The roots, B of them."""
    node, _ = unpack(forest.table[: forest.batch], forest.num_actions)
    total = 1 + jnp.sum(node.visits, axis=0)
    every = jnp.arange(forest.batch, dtype=jnp.int32)
    return node._replace(value=forest.root_value, total=total, root=every, span=forest.span)
